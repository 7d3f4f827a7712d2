"""Real parts: one Prefect server for the session, one sandbox for each test, real HTTP in between."""

import asyncio
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import Any, TypeVar

# Prefect reads its settings when it is imported.
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="prefect-home-")
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"] = "ignore"
for name in [name for name in os.environ if name.startswith("NANOGPT_")]:
    del os.environ[name]

import httpx
import pytest
from prefect.client.base import PrefectHttpxSyncClient
from prefect.server.api.server import SubprocessASGIServer
from prefect.settings import PREFECT_API_URL, get_current_settings
from prefect.testing.utilities import prefect_test_harness
from pydantic import SecretStr

from prefect_nanogpt import NanoGPTCredentials, client
from prefect_nanogpt.models import PollSchedule
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.tasks import (
    audio,
    get_balance,
    get_tts_status,
    join_audio,
    list_models,
    list_voices,
    save_audio,
    status,
    submit,
    submit_tts,
    write_subtitles,
)

# A shell that starts the tests in the background leaves Ctrl-C ignored, and a worker stops through it.
signal.signal(signal.SIGINT, signal.default_int_handler)

T = TypeVar("T")
API_KEY = "sk-nano-a-key-that-must-not-leak"
PREFECT_SERVER = [sys.executable, str(Path(__file__).with_name("prefect_server.py"))]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fail-on-skip", action="store_true", help="let a skipped test fail the run")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    can_be_had = item.get_closest_marker("registries") is None
    if report.skipped and can_be_had and item.config.getoption("--fail-on-skip"):
        report.outcome = "failed"
    return report


@pytest.fixture(scope="session", autouse=True)
def prefect_server() -> Iterator[None]:
    """A real Prefect server with a database of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SubprocessASGIServer, "_run_uvicorn_command", start_prefect_server)
        with prefect_test_harness(server_startup_timeout=120):
            yield


def start_prefect_server(server: SubprocessASGIServer) -> subprocess.Popen[bytes]:
    """Start a server as Prefect does, but by our own program."""
    app = ["uvicorn", "--factory", "prefect.server.api.server:create_app", "--log-level", "error", "--lifespan", "on"]
    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    kind = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    return subprocess.Popen(
        [*PREFECT_SERVER, *app, "--port", str(server.port)],
        env={**os.environ, **kind, **settings},
    )


TRANSPORTS = ["httpx", *(["aiohttp"] if importlib.util.find_spec("aiohttp") else [])]
"""What GET requests go over: aiohttp where the extra `fast` is installed."""


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of the transports. Tests that do not ask for it have the last one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "httpx":  # as if aiohttp was not installed
            patch.setitem(sys.modules, "prefect_nanogpt.aiohttp_transport", None)
        yield request.param


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    """A sandbox whose jobs are done at once, and which hums instead of speaking."""
    with Sandbox(job_seconds=0.0, speak=False) as sandbox:
        for name in ("NANOGPT_API_KEY", "NANOGPT_BASE_URL"):  # each test says for itself whether there is a key
            del os.environ[name]
        yield sandbox


@pytest.fixture(autouse=True)
def no_known_catalogue() -> None:
    """A process keeps a catalogue for minutes, and another sandbox may get the same port."""
    client._catalogues.clear()


@pytest.fixture
def credentials(sandbox: Sandbox) -> NanoGPTCredentials:
    return NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url=sandbox.base_url)


@pytest.fixture
def save_to(tmp_path: Path) -> str:
    return str(tmp_path / "audio")


@pytest.fixture
def quick() -> PollSchedule:
    """The shortest pauses that a schedule allows."""
    return PollSchedule(min_seconds=0.25, max_seconds=0.25, jitter=0)


@pytest.fixture(autouse=True)
def no_retry_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect's retries are real, the pauses between them are not: they add up to minutes."""
    for task in (
        get_balance,
        get_tts_status,
        join_audio,
        list_models,
        list_voices,
        save_audio,
        submit_tts,
        write_subtitles,
    ):
        monkeypatch.setattr(task, "retry_delay_seconds", [0.01])
    for module in (status, audio, submit):  # what calls that are no tasks go by
        monkeypatch.setattr(module, "RETRY_DELAYS_SECONDS", [0.01] * len(module.RETRY_DELAYS_SECONDS))


def start(module: str, *arguments: str, sandbox: Sandbox, **environment: str) -> subprocess.Popen[bytes]:
    """Start a module of the tests in a process of its own, with the same server, unless told, and this sandbox."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).parent.parent,
        env={
            **os.environ,
            "PREFECT_API_URL": PREFECT_API_URL.value(),
            "NANOGPT_API_KEY": API_KEY,
            "NANOGPT_BASE_URL": sandbox.base_url,
            **environment,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def files_in(folder: str | Path) -> list[Path]:
    """List the files in a folder, without the ledger."""
    return sorted(path for path in Path(folder).iterdir() if path.is_file()) if Path(folder).exists() else []


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def call_prefect(server: str, method: str, path: str, body: Any = None) -> Any:
    """Ask a Prefect server as its own clients do, which ask again where it says 503.

    On SQLite it says so at once where another has written between what a request reads and what it writes.
    """
    with PrefectHttpxSyncClient(base_url=f"{server}/api", timeout=30) as client:
        answer = client.request(method, path, json=body)
    return answer.json() if answer.content else None


def wait_for_server(url: str, seconds: float = 90) -> None:
    """Wait until a server answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            httpx.get(url).raise_for_status()
            return
        except httpx.HTTPError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.3)


def wait_for(look: Callable[[], Any], seconds: float = 90) -> Any:
    """Look again and again until there is something to see, in code without a loop."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"nothing to see after {seconds} s"
        time.sleep(0.2)
    return seen


async def eventually(look: Callable[[], Awaitable[T | None]], seconds: float = 30) -> T:
    """Look again and again until there is something to see."""
    deadline = time.monotonic() + seconds
    while (seen := await look()) is None:
        assert time.monotonic() < deadline, f"nothing to see after {seconds} s"
        await asyncio.sleep(0.1)
    return seen
