"""The processes of a comparison: the provider, a Prefect server, and a client that is measured from outside."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect_nanogpt.shell import free_port

ROOT = Path(__file__).parent.parent
QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_SERVER_LOGGING_LEVEL": "INFO"}

SETTLED_SECONDS = 8.0
"""The server writes events every five seconds."""


class Provider:
    """The sandbox in a process of its own."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.base_url: str = self._answer()["base_url"]

    def ask(self, command: str) -> dict[str, Any]:
        """Give it a command and return its answer."""
        assert self._process.stdin
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        return dict(json.loads(self._process.stdout.readline()))


@contextmanager
def provider(*options: str) -> Iterator[Provider]:
    """Run the sandbox."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.provider", *options],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Provider(process)
        finally:
            process.kill()


@dataclass
class PrefectServer:
    """A Prefect server with a database of its own."""

    url: str
    home: Path
    pid: int

    @property
    def environment(self) -> dict[str, str]:
        """What a process has in its environment to use it."""
        return {**os.environ, **QUIET, "PREFECT_API_URL": self.url}

    def rows(self) -> int:
        """Count the rows of all tables of its SQLite database."""
        with closing(sqlite3.connect(f"file:{self.home / 'prefect.db'}?mode=ro", uri=True, timeout=60)) as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return sum(int(database.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]) for table in tables)

    def settled_rows(self) -> int:
        """Count the rows once the server has written what it was sent, which it does some seconds later."""
        rows, since = self.rows(), time.monotonic()
        while time.monotonic() - since < SETTLED_SECONDS:
            time.sleep(1)
            if (now := self.rows()) != rows:
                rows, since = now, time.monotonic()
        return rows

    def requests(self) -> int:
        """Count the HTTP requests it has answered."""
        return (self.home / "access.log").read_text().count('HTTP/1.1"')

    def cpu_seconds(self) -> float:
        """Read the CPU time it has taken so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def prefect_server(*, database: str | None = None) -> Iterator[PrefectServer]:
    """Run a Prefect server, with SQLite if no `database` is given, as a URL that Prefect knows."""
    home = Path(tempfile.mkdtemp(prefix="benchmark-prefect-"))
    port = free_port()
    own = {"PREFECT_HOME": str(home), "PREFECT_UI_ENABLED": "false"}
    if database:
        own["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    with (home / "access.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **QUIET, **own},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}/api"
        while not _answers(f"{url}/health"):
            if process.poll() is not None:
                raise RuntimeError((home / "access.log").read_text())
            time.sleep(0.3)
        yield PrefectServer(url, home, process.pid)
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(home, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@dataclass
class Run:
    """What a client process took, from its start to its end, and what it said on its last line."""

    wall_seconds: float
    cpu_seconds: float
    said: dict[str, Any]


def client(
    module: str,
    *arguments: str,
    provider: Provider | None = None,
    server: PrefectServer | None = None,
    settings: Mapping[str, str] = {},
) -> Run:
    """Run a client to its end. The folder for its audio is its last argument."""
    with surroundings(provider, server) as (environment, folder):
        return measured([sys.executable, "-m", module, *arguments, folder], environment | dict(settings))


@contextmanager
def surroundings(provider: Provider | None, server: PrefectServer | None) -> Iterator[tuple[dict[str, str], str]]:
    """Give the environment of a client's process, and an empty folder for its audio."""
    folder = tempfile.mkdtemp(prefix="benchmark-audio-")
    environment = {**os.environ, **QUIET} if server is None else server.environment
    environment["PREFECT_HOME"] = tempfile.mkdtemp(prefix="benchmark-home-")
    if provider is not None:
        environment |= {"NANOGPT_API_KEY": "sandbox", "NANOGPT_BASE_URL": provider.base_url}
    try:
        yield environment, folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(environment["PREFECT_HOME"], ignore_errors=True)


def measured(command: list[str], environment: dict[str, str] | None = None) -> Run:
    """Run a command to its end and measure the whole process."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=errors)
        _, status, took = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode != 0:
            raise RuntimeError(f"{command} ended with {process.returncode}:\n{errors.read()[-4000:]}")
        last_line = (output.read().splitlines() or [""])[-1]
    said = json.loads(last_line) if last_line.startswith("{") else {}
    return Run(wall, took.ru_utime + took.ru_stime, said)


@contextmanager
def bucket() -> Iterator[dict[str, str]]:
    """Run an S3 server with the bucket `speech`, and give what a client needs in its environment to use that."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.bucket"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout
            yield dict(json.loads(process.stdout.readline()))
        finally:
            process.kill()


def file_system(folder: str) -> str:
    """Name the type of the file system that a folder is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(place, kind) for place, kind in mounts if Path(folder).resolve().is_relative_to(place)]
    return max(above, key=lambda mount: len(mount[0]))[1]
