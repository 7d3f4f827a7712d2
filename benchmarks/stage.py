"""The processes of a comparison: the provider, a Prefect server, and a client that is measured from outside."""

import json
import os
import resource
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
QUIET = {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_SERVER_LOGGING_LEVEL": "INFO"}


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
def provider() -> Iterator[Provider]:
    """Run the sandbox."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.provider"],
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
    """A Prefect server with an SQLite database of its own."""

    url: str
    home: Path
    pid: int

    def rows(self) -> int:
        """Count the rows of all tables."""
        with closing(sqlite3.connect(f"file:{self.home / 'prefect.db'}?mode=ro", uri=True, timeout=60)) as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return sum(int(database.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0]) for table in tables)

    def settled_rows(self) -> int:
        """Count the rows once the server has written what it was sent."""
        before = -1
        while (now := self.rows()) != before:
            before = now
            time.sleep(2)
        return now

    def requests(self) -> int:
        """Count the HTTP requests it has answered."""
        return (self.home / "access.log").read_text().count('HTTP/1.1"')

    def cpu_seconds(self) -> float:
        """Read the CPU time it has taken so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def prefect_server() -> Iterator[PrefectServer]:
    """Run a Prefect server."""
    home = Path(tempfile.mkdtemp(prefix="benchmark-prefect-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app"]
    with (home / "access.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **QUIET, "PREFECT_HOME": str(home), "PREFECT_UI_ENABLED": "false"},
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


def client(module: str, *arguments: str, provider: Provider | None = None, server: PrefectServer | None = None) -> Run:
    """Run a client to its end. The folder for its audio is its last argument."""
    folder = tempfile.mkdtemp(prefix="benchmark-audio-")
    environment = {**os.environ, **QUIET, "PREFECT_HOME": tempfile.mkdtemp(prefix="benchmark-home-")}
    if provider is not None:
        environment |= {"NANOGPT_API_KEY": "sandbox", "NANOGPT_BASE_URL": provider.base_url}
    if server is not None:
        environment["PREFECT_API_URL"] = server.url
    try:
        return measured([sys.executable, "-m", module, *arguments, folder], environment)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(environment["PREFECT_HOME"], ignore_errors=True)


def measured(command: list[str], environment: dict[str, str] | None = None) -> Run:
    """Run a command to its end and measure the whole process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.monotonic()
    # One at a time is waited for, so what the children took more is what this one took.
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    wall = time.monotonic() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode != 0:
        raise RuntimeError(f"{command} ended with {result.returncode}:\n{result.stderr[-4000:]}")
    said = json.loads(result.stdout.splitlines()[-1]) if result.stdout.strip() else {}
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return Run(wall, cpu, said)
