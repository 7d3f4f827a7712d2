"""What the commands share: the terminal, the signals, the Prefect server that they use or start, and bad usage."""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import httpx
from cyclopts import Parameter, validators
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings
from pydantic import SecretStr
from rich.console import Console

from prefect_nanogpt.client import problem_with_base_url
from prefect_nanogpt.credentials import WHERE_KEYS_ARE, NanoGPTCredentials, find_credentials
from prefect_nanogpt.errors import CredentialsError, NanoGPTError, without_login
from prefect_nanogpt.ledger import Ledger
from prefect_nanogpt.storage import Destination
from prefect_nanogpt_command import STOP_SIGNALS

if TYPE_CHECKING:
    from prefect_nanogpt.sandbox import Sandbox

__all__ = [
    "JOB_FAILED",
    "NO_KEY",
    "PREFECT_FAILED",
    "Port",
    "UsageError",
    "Words",
    "api_url",
    "check_environment",
    "check_port",
    "console",
    "credentials_or_sandbox",
    "free_port",
    "prefect_api",
    "prefect_failed",
    "prefect_server",
    "refuse_if_given",
    "say_if_it_hums",
    "stop",
]

R = TypeVar("R")
Port = Annotated[int, Parameter(validator=validators.Number(gte=0, lte=65_535))]

PREFECT_FAILED: Final = (httpx.HTTPError, RuntimeError, PrefectException)
NO_KEY: Final = (
    "No NANOGPT_API_KEY: a local sandbox stands in for NanoGPT, with play money. A key of your own is made at "
    f"{WHERE_KEYS_ARE}."
)
JOB_FAILED: Final = 1
LONGEST_REASON: Final = 300
LONGEST_VERSION: Final = 60
LAST_SECONDS: Final = 5.0
SHOW_CURSOR: Final = b"\r\x1b[K\x1b[?25h"

console = Console(stderr=True, highlight=False, soft_wrap=True)


def _is_not_empty(_: Any, words: str | None) -> None:
    if words is not None and not words.strip():
        raise ValueError("Must not be empty.")


Words = Annotated[str, Parameter(validator=_is_not_empty)]


class UsageError(Exception):
    """The command line cannot be followed."""


class Stop:
    """What Ctrl-C and SIGTERM do, at whatever moment, without an exception in whatever happens to run.

    A flow runs in a thread of its own, and the main thread, where Python runs signal handlers, only waits: so Prefect
    puts no handler of its own in the place of this one, and a flow that blocks its event loop can be stopped too.

    Attributes:
        number: The first signal that came.
        at: When it came.
        last_words: Called before the process is left while a flow is running.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.at: datetime | None = None
        self.last_words: Callable[[], None] = lambda: None
        self._exit_code: int | None = None
        self._presses = 0
        self._is_leaving = False
        self._is_starting = False
        self._servers: list[subprocess.Popen[bytes]] = []
        self._flow: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def listen(self) -> None:
        """Handle the signals that are not ignored, as a shell has it for what runs in the background."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def run(self, main: Callable[[], Coroutine[Any, Any, R]]) -> R:
        """Run what the first signal cancels, as Ctrl-C does in `asyncio.run`."""
        done: Future[R] = Future()
        context = contextvars.copy_context()

        async def cancellable() -> R:
            task = asyncio.current_task()
            assert task is not None
            self._flow = asyncio.get_running_loop(), task
            return await main()

        def run() -> None:
            try:
                done.set_result(context.run(asyncio.run, cancellable()))
            except BaseException as error:
                done.set_exception(error)

        threading.Thread(target=run, name="prefect-nanogpt", daemon=True).start()
        try:
            return done.result()
        finally:
            self._flow = None

    def settle(self, exit_code: int) -> None:
        """Make a signal end the process at once with this code: there is nothing left to stop."""
        self._exit_code = exit_code

    def start_server(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a server that ends with this process, and not before: Ctrl-C in a terminal does not reach it."""
        if not self._servers:
            # Before Prefect has anything to send at the end, and so after that is sent.
            atexit.register(self._end_servers)
        self._is_starting = True
        server = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._servers.append(server)
        self._is_starting = False
        if self.number is not None:
            self._leave(128 + self.number)
        return server

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
        self.at = self.at or datetime.now(UTC)
        self._presses += 1
        if self._is_starting:
            return  # whoever starts a server looks when it is known
        if self._exit_code is not None:
            self._leave(self._exit_code)
        if self._flow is None:
            self._leave(128 + number)
        elif self._presses > 2:
            self.last_words()
            self._leave(128 + number)
        else:
            loop, task = self._flow
            with suppress(RuntimeError):  # it has just ended
                loop.call_soon_threadsafe(task.cancel if self._presses == 1 else self._cancel_all, loop)

    @staticmethod
    def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()

    def _leave(self, code: int) -> None:
        if console.is_terminal and not console.is_dumb_terminal:
            with suppress(OSError):
                os.write(2, SHOW_CURSOR)
        if self._is_leaving:  # by somebody who does not want to wait: the servers have been told
            os._exit(code)
        self._is_leaving = True
        self._end_servers()
        os._exit(code)

    def _end_servers(self) -> None:
        for server in self._servers:
            server.terminate()
        for server in self._servers:
            try:
                server.wait(LAST_SECONDS)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait(LAST_SECONDS)


stop: Final = Stop()


@contextmanager
def prefect_server(port: int, **environment: str) -> Iterator[str]:
    """Run a Prefect server, and point this process and its children at it."""
    url = f"http://127.0.0.1:{port}"
    server = stop.start_server(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        {"PREFECT_SERVER_UI_API_URL": f"{url}/api", **environment},
    )
    while True:
        try:
            # Whatever else listens there, it is not the server that is to be used.
            if server.poll() is None and httpx.get(f"{url}/api/health").is_success:
                break
        except httpx.HTTPError:
            pass
        if server.poll() is not None:
            raise NanoGPTError(
                f"No Prefect server could be started on port {port}. `prefect server start --port {port}` says why.",
                code="NO_SERVER",
            )
        time.sleep(0.1)
    os.environ["PREFECT_API_URL"] = f"{url}/api"
    with temporary_settings({PREFECT_API_URL: f"{url}/api"}):
        yield url


@contextmanager
def prefect_api() -> Iterator[None]:
    """Find the Prefect server that is set, or else run one for as long as this process."""
    if api_url():
        yield
    elif not get_current_settings().server.ephemeral.enabled:
        raise UsageError("PREFECT_API_URL is not set, and Prefect's settings allow no temporary server.")
    else:
        # As Prefect starts one by itself: without UI, and with no more services than flows need.
        with prefect_server(free_port(), PREFECT_UI_ENABLED="false", PREFECT__SERVER_EPHEMERAL="1"):
            yield


def api_url() -> str | None:
    """Give the Prefect server that the environment or the profile names; None where they name none."""
    url: str | None = PREFECT_API_URL.value()
    if url and problem_with_base_url(url):
        raise UsageError(f"What PREFECT_API_URL is set to is not an http or https URL: {without_login(url)}.")
    return url


def check_port(port: int) -> None:
    """Refuse a port that is taken, with a word on who has it.

    Raises:
        NanoGPTError: It cannot be listened at.
    """
    try:
        with socket.socket() as probe:
            if os.name != "nt":  # there it would take the port from whoever has it
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise NanoGPTError(f"port {port} cannot be used: {error.strerror}", code="NO_SERVER") from None
        from prefect_nanogpt.listening import listener_on

        who, hint = _who_listens(f"http://127.0.0.1:{port}")
        process = f", {found}" if (found := listener_on(port)) else ""
        raise NanoGPTError(
            f"port {port} is taken, by {who}{process}. Nothing was started.\n{hint}To start a server at a free port: "
            "prefect-nanogpt serve --port 0",
            code="PORT_TAKEN",
        ) from None


def _who_listens(url: str) -> tuple[str, str]:
    """Say what answers at an address, and how to use it if it is a Prefect server."""
    try:
        with httpx.stream("GET", f"{url}/api/admin/version", timeout=3, trust_env=False) as answer:
            body = next(answer.iter_bytes(LONGEST_VERSION), b"")
            server = answer.headers.get("server", "")
    except httpx.HTTPError:
        return "another program", ""
    if answer.is_success and (version := re.fullmatch(rb'"(\d[\w.+-]*)"', body)):
        use = f"To use it: PREFECT_API_URL={url}/api prefect-nanogpt serve\n"
        return f"a Prefect server ({version[1].decode()})", use
    name = "".join(character for character in server if character.isprintable())[:LONGEST_VERSION]
    return f"an HTTP server ({name})" if name else "an HTTP server", ""


def free_port() -> int:
    """Find a port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def check_environment() -> None:
    """Refuse what the environment has and cannot be used, before a server is started."""
    try:
        Path.cwd()
    except OSError as error:
        raise UsageError(f"The working directory cannot be used: {error.strerror}") from None

    async def check() -> None:
        async with (await find_credentials()).get_client():
            pass

    if os.environ.get("NANOGPT_API_KEY", "").strip() or os.environ.get("NANOGPT_BASE_URL"):
        try:
            asyncio.run(check())
        except CredentialsError as error:
            raise UsageError(error.message) from None
    if place := Ledger.elsewhere(None):
        try:
            if (folder := Destination(place)).is_local:
                folder.check()
        except NanoGPTError as error:
            raise UsageError(f"NANOGPT_LEDGER: {error.message.replace('save_to', 'it', 1)}") from None
        except OSError as error:
            raise UsageError(f"NANOGPT_LEDGER: {without_login(place)} cannot be used: {error}") from None


async def credentials_or_sandbox(stack: ExitStack) -> NanoGPTCredentials:
    """Find the credentials that there are, or else those of a sandbox that lasts as long as the stack, and say so.

    Raises:
        UsageError: What was given cannot be used.
    """
    try:
        return await find_credentials()
    except CredentialsError as error:
        refuse_if_given(error)
    from prefect_nanogpt.sandbox import Sandbox

    sandbox = stack.enter_context(Sandbox())
    say_if_it_hums(sandbox)
    console.print(NO_KEY)
    return NanoGPTCredentials(api_key=SecretStr("sandbox"), base_url=sandbox.base_url)


def refuse_if_given(error: CredentialsError) -> None:
    """Let the sandbox stand in where no credentials were given, and nowhere else."""
    if error.retryable:
        raise error
    if error.code != CredentialsError.default_code:
        raise UsageError(error.message) from None


def prefect_failed(error: BaseException) -> int:
    """Say in one line what Prefect could not do, and give the exit code."""
    server = PREFECT_API_URL.value() or ""
    words = str(error).replace(server, without_login(server)) if server else str(error)
    words = textwrap.shorten(words, LONGEST_REASON, placeholder="…")
    console.print(f"Prefect cannot be used: {words}", style="red", markup=False)
    return JOB_FAILED


def say_if_it_hums(sandbox: Sandbox) -> None:
    """Say that a sandbox cannot speak, where it cannot."""
    from prefect_nanogpt.sandbox import HUMS, TO_SPEAK

    if sandbox.hums:
        console.print(f"{HUMS} {TO_SPEAK}", markup=False)
