"""A batch over several workers: what `examples/scale-out/compose.yaml` sets up, as processes of this machine."""

import csv
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.postgres import PROGRAMS, postgres
from prefect_nanogpt.lines import ManifestRow
from prefect_nanogpt.sandbox import Sandbox
from tests.conftest import API_KEY, call_prefect, free_port, wait_for_server

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "scale-out"
REDIS = shutil.which("redis-server")
BIN = Path(sys.executable).parent
LINES, SHARDS = 400, 4
# With the pauses between heartbeats as short as Prefect allows them, two of which may be missed.
HEARTBEAT_SECONDS, LOST_AFTER_SECONDS = 30, 70

pytestmark = [
    pytest.mark.skipif(PROGRAMS is None or REDIS is None, reason="no Postgres or no Redis on this machine"),
    pytest.mark.timeout(600),
]


def descendants(pid: int) -> list[int]:
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(") ")[2].split()[1])
    children = [child for child, parent in parents.items() if parent == pid]
    return [*children, *(descendant for child in children for descendant in descendants(child))]


@dataclass
class Stack:
    """The services of the compose file, each a process group, at addresses of this machine."""

    folder: Path
    postgres_port: int = field(default_factory=free_port)
    redis_port: int = field(default_factory=free_port)
    server_port: int = field(default_factory=free_port)
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)
    services: dict[str, Any] = field(
        default_factory=lambda: yaml.safe_load((EXAMPLE / "compose.yaml").read_text())["services"]
    )

    def here(self, value: str) -> str:
        """Put the addresses of this machine in the place of those between containers."""
        for name, address in {
            "@postgres:5432": f"@127.0.0.1:{self.postgres_port}",
            "redis:6379": f"127.0.0.1:{self.redis_port}",
            "server:4200": f"127.0.0.1:{self.server_port}",
            "/shared": str(self.folder / "shared"),
        }.items():
            value = value.replace(name, address)
        return {"redis": "127.0.0.1", "6379": str(self.redis_port)}.get(value, value)

    def environment(self, service: str, **more: str) -> dict[str, str]:
        own = {name: self.here(value) for name, value in self.services[service].get("environment", {}).items()}
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return {
            **clean,
            "PATH": f"{BIN}:{clean['PATH']}",
            "PREFECT_HOME": str(self.folder / "home"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            **own,
            **more,
        }

    def start(self, service: str, *more: str, **environment: str) -> "subprocess.Popen[bytes]":
        command = [word.replace("0.0.0.0", "127.0.0.1") for word in shlex.split(self.services[service]["command"])]
        return self.start_process(
            [*command, *more], cwd=self.folder / "project", env=self.environment(service, **environment)
        )

    def start_process(self, command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        log = (self.folder / f"log-{len(self.processes)}").open("w")
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, **options)
        self.processes.append(process)
        return process

    def kill(self, process: "subprocess.Popen[bytes]") -> None:
        """Kill a service and all that it has started, as when its machine is lost: none can tell of another's end."""
        lost = [process.pid, *descendants(process.pid)]
        for how in (signal.SIGSTOP, signal.SIGKILL):
            for pid in lost:
                with suppress(ProcessLookupError):
                    os.kill(pid, how)
        process.wait()

    def api(self, path: str, body: dict[str, Any]) -> Any:
        return call_prefect(f"http://127.0.0.1:{self.server_port}", "POST", path, body)


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    assert REDIS
    stack = Stack(tmp_path)
    project = tmp_path / "project"
    shutil.copytree(EXAMPLE, project / "examples" / "scale-out")
    watch = project / "examples" / "scale-out" / "lost-worker.yaml"
    watch.write_text(watch.read_text().replace("within: 90", f"within: {LOST_AFTER_SECONDS}"))
    shutil.copy(ROOT / "prefect.yaml", project)
    shutil.copytree(ROOT / "flows", project / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    with ExitStack() as cleanup:
        cleanup.enter_context(postgres(stack.postgres_port))
        cleanup.callback(lambda: [stack.kill(process) for process in stack.processes if process.poll() is None])
        stack.start_process([REDIS, "--port", str(stack.redis_port), "--save", "", "--dir", str(tmp_path)])
        stack.start("server", "--port", str(stack.server_port))
        wait_for_server(f"http://127.0.0.1:{stack.server_port}/api/health")
        stack.start("services")
        setup = stack.start("setup")
        assert setup.wait(120) == 0, (tmp_path / f"log-{len(stack.processes) - 1}").read_text()
        yield stack


def table(file: Path) -> Path:
    """Write lines of which the first of each shard take so long that all are under way at once for a while."""
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["id", "text"])
        for number in range(LINES):
            rows.writerow([f"line-{number:03}", f"{'[sandbox:wait 20] ' if number < 100 else ''}Line {number}."])
    return file


def test_four_shards_on_two_workers_one_of_which_is_lost(stack: Stack, tmp_path: Path) -> None:
    lines, save_to = table(tmp_path / "lines.csv"), tmp_path / "audio"
    with Sandbox(job_seconds=0.0, speak=False) as sandbox:
        provider = {"NANOGPT_API_KEY": API_KEY, "NANOGPT_BASE_URL": sandbox.base_url}
        beats = {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS), "PREFECT_WORKER_QUERY_SECONDS": "1"}
        workers = [stack.start("worker", "--limit", "2", **provider, **beats) for _ in range(2)]
        parent = stack.start_process(
            [
                sys.executable,
                "-m",
                "tests.batching",
                str(lines),
                str(save_to),
                json.dumps({"shards": SHARDS, "max_in_flight": 100}),
            ],
            cwd=ROOT,
            env=stack.environment("worker", **provider),
        )
        # All places are taken from the hundredth submission on until the first jobs are done, so none is uncertain.
        sandbox.wait_for_request("submit", count=100, timeout=180)
        time.sleep(1)
        stack.kill(workers[0])

        assert parent.wait(timeout=400) == 0

        requests = [request for request in sandbox.requests() if request.kind in ("submit", "status")]
        submitted = Counter(request.json["text"] for request in requests if request.kind == "submit")
    assert len(submitted) == LINES
    assert set(submitted.values()) == {1}

    rows = {
        row.id: row
        for line in (save_to / "manifest.jsonl").read_text().splitlines()
        for row in [ManifestRow.model_validate_json(line)]
    }
    assert len(rows) == LINES
    for row in rows.values():
        assert row.location is not None, row
        assert hashlib.sha256(Path(row.location).read_bytes()).hexdigest() == row.sha256
    assert sorted(path.name for path in save_to.iterdir()) == sorted(
        [".nanogpt", "manifest.jsonl", *(f"{line_id}.mp3" for line_id in rows)]
    )

    # The limit of all workers: ten at once, and 24 more each second. Each of the four runs has five in hand at most.
    times = sorted(request.received_at for request in requests)
    for seconds in (1, 5):
        busiest = max(sum(start <= at < start + seconds for at in times) for start in times)
        assert busiest <= 10 + 24 * seconds + 4 * 5, f"{busiest} requests in {seconds} s"

    runs = stack.api("/flow_runs/filter", {"flow_runs": {"deployment_id": {"is_null_": False}}})
    ends = Counter(run["state_name"] for run in runs)
    assert ends["Completed"] == SHARDS
    crashed = [run for run in runs if run["state_name"] == "Crashed"]
    assert crashed
    for run in crashed:
        assert "heartbeats have stopped" in run["state"]["message"]
    assert json.dumps(runs).find(API_KEY) == -1
