"""The running sandbox: two loopback ports, served from a thread of their own."""

import asyncio
import contextlib
import functools
import logging
import math
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, Self

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from .api import Api, Kind, RecordedRequest, is_loopback, logger
from .jobs import DEFAULT_MODEL, MODELS, Ledger, new_job
from .script import Reply, Surface, parse_directives
from .speech import HUMS, TO_SPEAK

_KEEP_ALIVE_SECONDS = 75
_LAST_PORT = 65_535
_KEY = "sandbox"
_MOST_MONEY = 10**15  # cents of a cent are still exact beside it


class Sandbox:
    """A local stand-in of NanoGPT's text-to-speech API, running between `with` and the end of its block.

    Within the block `NANOGPT_API_KEY` and `NANOGPT_BASE_URL` of this process are those of the sandbox, whatever they
    were: flows that are called there without credentials use it, and are charged nothing.

    Args:
        job_seconds: How long an asynchronous job takes; with 0 it is completed at its first status call.
        balance: The account's money in US dollars.
        host: A loopback address; no other is taken.
        port: Port of the API; 0 for a free one.
        audio_port: Port of the audio host; 0 for a free one.
        run_id_style: `dashed` UUIDs, or their 32 `hex` digits. Both were seen of the provider.
        qualified_models: Whether tickets name the model as the provider behind does, like
            `fal-ai/elevenlabs/tts/turbo-v2.5`. A status call with the id that was sent is then a 404. Reported once, of
            other audio than speech.
        refund_needs_ticket: Whether a rejected job is refunded only if the status call that learns of it has
            the ticket's `cost` and `paymentSource`. An assumption, so a switch.
        speak: False for tones instead of speech, which cost next to nothing.

    Raises:
        ValueError: If the host is not a loopback address, or a number cannot be right.
        OSError: From `__enter__`, if a port is taken.

    Example:
        ```python
        from prefect_nanogpt.sandbox import Answer, Sandbox

        with Sandbox(job_seconds=0) as sandbox:
            ticket = sandbox.add_job(text="Hello")
            sandbox.on_status(ticket["runId"], [Answer(status=503), {"status": "processing"}])
        ```
    """

    def __init__(
        self,
        *,
        job_seconds: float = 3.0,
        balance: str | Decimal = "100",
        host: str = "127.0.0.1",
        port: int = 0,
        audio_port: int = 0,
        run_id_style: Literal["dashed", "hex"] = "dashed",
        qualified_models: bool = False,
        refund_needs_ticket: bool = True,
        speak: bool = True,
    ) -> None:
        if host != "localhost" and not is_loopback(host):
            raise ValueError(f"The sandbox listens on loopback addresses only, not on {host!r}.")
        for name, number in (("port", port), ("audio_port", audio_port)):
            if not 0 <= number <= _LAST_PORT:
                raise ValueError(f"{name} must be from 0 to {_LAST_PORT}, not {number}.")
        if port and port == audio_port:
            raise ValueError(f"The API and the audio host need a port each: both were given {port}.")
        if not 0 <= job_seconds < math.inf:
            raise ValueError(f"job_seconds must be a finite number, 0 or more, not {job_seconds}.")
        if not _is_money(balance):
            raise ValueError(f"balance must be an amount from 0 to {_MOST_MONEY}, not {balance}.")
        self._host, self._port, self._audio_port = host, port, audio_port
        self._api = Api(
            job_seconds=job_seconds,
            balance=Decimal(balance),
            hex_run_ids=run_id_style == "hex",
            qualified_models=qualified_models,
            refund_needs_ticket=refund_needs_ticket,
            speak=speak,
        )
        self._thread = threading.Thread(target=self._run, name="nanogpt-sandbox", daemon=True)
        self._sockets: list[socket.socket] = []
        self._started: Future[None] = Future()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            for port in (self._port, self._audio_port):
                self._sockets.append(opened.enter_context(_listen(self._host, port)))
            self.root_url, self.audio_url = (self._url(listener) for listener in self._sockets)
            self.base_url = f"{self.root_url}/api"
            self._api.audio_url = self.audio_url
            self._thread.start()
            self._started.result()
            opened.pop_all()
        _environment.enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        _environment.leave(self)
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._api.studio.close()

    # Scripting

    def add_job(
        self,
        text: str = "Hello",
        model: str = "Elevenlabs-Turbo-V2.5",
        run_id: str | None = None,
        charged: bool = True,
    ) -> dict[str, Any]:
        """Take a job as if it had been submitted, and return the provider's ticket for it.

        Directives in the text count. With `charged` false the ledger knows nothing of it.
        """
        job = new_job(
            MODELS[model or DEFAULT_MODEL],
            parse_directives(text),
            {},
            characters=len(text),
            seconds=self._api.job_seconds,
            hex_run_id=self._api.hex_run_ids,
            qualified_model=self._api.qualified_models,
        )
        job.run_id = run_id or job.run_id
        if charged:
            self._api.ledger.charge(job, len(text))
        self._api.add(job)
        return job.ticket(charged)

    def on_submit(self, replies: Iterable[Reply | Mapping[str, Any] | None]) -> None:
        """Queue replies for the next submissions, on either route.

        A mapping is the JSON body of a 200, None the normal behaviour. The replies may be endless
        (`itertools.repeat`). A missing or bad key is refused before any script is looked at.
        """
        self._script("submit", None, replies)

    def on_status(self, run_id: str | None, replies: Iterable[Reply | Mapping[str, Any] | None]) -> None:
        """Queue replies for the next status calls of a job, known or not; with None, of any job.

        A rejection among them refunds like one of the sandbox's own.
        """
        self._script("status", run_id, replies)

    def on_audio(self, run_id: str | None, replies: Iterable[Reply | Mapping[str, Any] | None]) -> None:
        """Queue replies for the next downloads (GET, not HEAD) of a job; with None, of whichever comes."""
        self._script("audio", run_id, replies)

    def on_models(self, replies: Iterable[Reply | Mapping[str, Any] | None]) -> None:
        """Queue replies for the next requests for the catalogue of models."""
        self._script("models", None, replies)

    def on_balance(self, replies: Iterable[Reply | Mapping[str, Any] | None]) -> None:
        """Queue replies for the next requests for the balance. A missing or bad key is refused before."""
        self._script("balance", None, replies)

    def _script(
        self, surface: Surface, run_id: str | None, replies: Iterable[Reply | Mapping[str, Any] | None]
    ) -> None:
        with self._api.changed:
            self._api.scripts.add(surface, run_id, replies)

    def completed_body(self, run_id: str) -> dict[str, Any]:
        """Return the status body of the job when it is completed, to build others from."""
        return self._api.completed_body(run_id)

    def audio_bytes(self, run_id: str) -> bytes:
        """Return what a good download of the job's audio gives."""
        return self._api.studio.record(self._api.jobs[run_id].utterance).result().data

    # Looking

    @property
    def hums(self) -> bool:
        """Whether it was to speak and cannot, for want of the extra `sandbox`."""
        return self._api.studio.hums

    @property
    def ledger(self) -> Ledger:
        """The account's charges, refunds and balance."""
        return self._api.ledger

    def requests(self, kind: Kind | None = None) -> list[RecordedRequest]:
        """Return the newest requests, 20,000 or 100 MB of them, oldest first, of one kind or all.

        They are as they came, with keys and cookies: a test may look at the headers of the `audio` ones for a key
        that went to the wrong host. For people to see there is `masked()`.
        """
        with self._api.changed:
            return [request for request in self._api.log if kind in (None, request.kind)]

    def wait_for_request(self, kind: Kind, count: int = 1, timeout: float = 30) -> None:
        """Block until `count` requests of the kind have arrived since the start, answered or not.

        Raises:
            TimeoutError: If they have not within `timeout` seconds.
        """
        with self._api.changed:
            if not self._api.changed.wait_for(lambda: self._api.arrived[kind] >= count, timeout):
                arrived = self._api.arrived[kind]
                raise TimeoutError(f"{arrived} of {count} {kind} requests arrived in {timeout:g} s.")

    # Serving

    def _url(self, listener: socket.socket) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{listener.getsockname()[1]}"

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        """Serve until told to stop, then close every connection at once: none is worth waiting for."""
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        state = ServerState()
        state.default_headers = [(b"server", b"nanogpt-sandbox")]
        servers = []
        for application, listener in zip((self._api.api, self._api.audio_host), self._sockets, strict=True):
            config = uvicorn.Config(
                application,
                interface="asgi3",
                http=_Protocol,
                ws="none",
                lifespan="off",
                proxy_headers=False,
                log_config=None,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            )
            config.load()
            servers.append(
                await self._loop.create_server(
                    functools.partial(_Protocol, config, state, {}),
                    sock=listener,
                    backlog=4096,
                )
            )
        self._started.set_result(None)
        await self._stop.wait()
        for server in servers:
            server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        for task in list(state.tasks):
            task.cancel()
        await asyncio.gather(*state.tasks)


class _Environment:
    """What processes find in their environment while sandboxes run: the one that was entered last of those that do."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: list[Sandbox] = []
        self._before: dict[str, str | None] = {}

    def enter(self, sandbox: Sandbox) -> None:
        with self._lock:
            if not self._running:
                self._before = {name: os.environ.get(name) for name in ("NANOGPT_API_KEY", "NANOGPT_BASE_URL")}
            self._running.append(sandbox)
            self._show()

    def leave(self, sandbox: Sandbox) -> None:
        with self._lock:
            was_shown = self._running[-1] is sandbox
            self._running.remove(sandbox)
            if self._running and was_shown:
                self._show()
            elif not self._running:
                for name, value in self._before.items():
                    os.environ.pop(name, None) if value is None else os.environ.update({name: value})

    def _show(self) -> None:
        os.environ.update(NANOGPT_API_KEY=_KEY, NANOGPT_BASE_URL=self._running[-1].base_url)


_environment = _Environment()


class _Protocol(H11Protocol):
    """uvicorn's HTTP, with the TCP connection within the application's reach."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {"transport": transport}
        self.access_log = False


def _is_money(amount: str | Decimal) -> bool:
    try:
        return 0 <= Decimal(amount) <= _MOST_MONEY
    except InvalidOperation:  # not a number, or NaN
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, because asyncio turns Nagle's algorithm off (40 ms an answer) only where the protocol says TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if sys.platform != "win32":  # there it would let two sandboxes share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"{error.strerror} ({host}:{port})") from None
    return listener


def serve(
    port: int = 8765,
    audio_port: int | None = None,
    host: str = "127.0.0.1",
    *,
    job_seconds: float = 3.0,
    balance: float = 100.0,
    speak: bool = True,
    qualified_models: bool = False,
) -> None:
    """Run the sandbox until Ctrl-C or SIGTERM, saying on stderr what it is and how to use it.

    Args:
        port: Port of the API; 0 for any free one.
        audio_port: Port of the host that finished audio is downloaded from; any free one by default.
        host: A loopback address; no other is taken.
        job_seconds: How long an asynchronous job takes, in seconds.
        balance: The pretended account's money, in US dollars.
        speak: Speech; else tones, which cost next to nothing.
        qualified_models: Tickets name the model as the provider behind does, and are only known by that name.

    Raises:
        ValueError: If the host is not a loopback address, or a number cannot be right.
        OSError: If a port is taken.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s sandbox %(message)s", "%H:%M:%S"))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        with (
            Sandbox(
                job_seconds=job_seconds,
                balance=str(balance),
                host=host,
                port=port,
                audio_port=audio_port or 0,
                speak=speak,
                qualified_models=qualified_models,
            ) as sandbox,
            _stop_signals() as stop,
        ):
            logger.info("This is a sandbox, a stand-in on this machine. It is not NanoGPT; no money is spent.")
            logger.info("API %s, audio host %s", sandbox.base_url, sandbox.audio_url)
            logger.info("Use it in another terminal, with these two lines:")
            # Without the time before them, to be copied.
            print(f"export NANOGPT_BASE_URL={sandbox.base_url}\nexport NANOGPT_API_KEY={_KEY}", file=sys.stderr)
            if sandbox.hums:
                logger.warning("%s %s", HUMS, TO_SPEAK)
            logger.info("What it saw: %s/_sandbox/ledger and /_sandbox/requests", sandbox.root_url)
            while not stop.wait(1):  # in slices, so that Ctrl-C is noticed on Windows too
                pass
        logger.info("Stopped.")
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set. Only a program's main thread may listen for them."""
    stop = threading.Event()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, lambda *_: stop.set())
    try:
        yield stop
    finally:
        for number, action in previous.items():
            signal.signal(number, action)
