"""The comparisons: each runs both sides in turn, on the same machine, and says what was to be reached."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import polling
from benchmarks.stage import client, measured, prefect_server, provider


@dataclass
class Target:
    """What was to be reached, and what was measured."""

    what: str
    measured: float
    limit: float
    unit: str = "×"
    at_least: bool = False

    @property
    def is_reached(self) -> bool:
        """Whether the measured figure is on the right side of the limit."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass
class Comparison:
    """A table, the targets that it is held against, and everything that was measured."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]
    targets: list[Target] = field(default_factory=list)
    raw: Any = None


def percentile_95(values: list[float]) -> float:
    """Give the value that one in twenty is above."""
    return sorted(values)[int(0.95 * len(values))]


def compare_polling() -> Comparison:
    """Compare ways of waiting on a virtual clock."""
    costs = polling.compare()
    loop = costs["every 3 s (NanoGPT's sample)"]
    ours = costs["text_to_speech"]
    return Comparison(
        "Polling",
        f"{polling.JOBS} jobs whose durations are spread log-uniformly from 1 to 180 s, on a virtual clock, through "
        "the real schedule. `text_to_speech` knows that its job is new and first looks after a pause; `wait_for_tts` "
        "does not and looks at once, as the loops do. The delay is the time from a job's end to the look that sees it; "
        "relative, as a share of the job's duration. The last three rows are not ways that exist. The bound is the "
        "times to look, without chance in them, for which the calls, the seconds of delay times "
        f"{polling.A_SECOND:g} and the relative delay times {polling.A_DURATION:g} add up to the least, found by "
        "dynamic programming: no times have less of one of the three without more of another. The other two are what "
        "a prediction of the duration would be worth.",
        ["", "calls a job", "mean delay, s", "mean relative delay"],
        [
            [name, f"{cost.calls:.1f}", f"{cost.delay:.2f}", f"{100 * cost.relative_delay:.1f} %"]
            for name, cost in costs.items()
        ],
        [
            Target("calls, against the provider's loop", ours.calls / loop.calls, 1.0),
            Target("mean relative delay, against the loop", ours.relative_delay / loop.relative_delay, 0.5),
            Target("mean absolute delay, against the loop", ours.delay / loop.delay, 1.1),
        ],
        {name: cost._asdict() for name, cost in costs.items()},
    )


def _jobs(module: str, count: int, *, tracked: bool, settle: bool = True, kind: str = "uniform") -> dict[str, Any]:
    """Run so many jobs through one of the clients, with a provider and a server of their own."""
    with provider() as api:
        if not tracked:
            run = client(module, str(count), kind, provider=api)
            server_says: dict[str, float] = {}
        else:
            with prefect_server() as server:
                rows, requests, cpu = server.settled_rows(), server.requests(), server.cpu_seconds()
                run = client(module, str(count), kind, provider=api, server=server)
                written = server.settled_rows() if settle else server.rows()
                server_says = {
                    "rows": (written - rows) / count,
                    "api_requests": (server.requests() - requests) / count,
                    "server_cpu_seconds": server.cpu_seconds() - cpu,
                }
        seen = api.ask("seen")
    delays = seen.pop("delays") or [0.0]
    return {
        "wall_seconds": run.wall_seconds,
        "cpu_seconds": run.cpu_seconds,
        "peak_mb": run.said["peak_mb"],
        "mean_delay": mean(delays),
        "p95_delay": percentile_95(delays),
        **seen,
        **server_says,
    }


def _middle(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: median(run[key] for run in runs) for key in runs[0]}


def compare_jobs(count: int, rounds: int, kind: str = "uniform") -> Comparison:
    """Compare the batch with the obvious script."""
    runs: dict[str, list[dict[str, Any]]] = {"batch": [], "obvious": []}
    for _ in range(rounds):
        for name, found in runs.items():
            found.append(_jobs(f"benchmarks.{name}", count, tracked=name == "batch", settle=False, kind=kind))
    figures = {name: _middle(found) for name, found in runs.items()}

    def ratio(key: str) -> float:
        return median(a[key] / b[key] for a, b in zip(runs["batch"], runs["obvious"], strict=True))

    names = {"batch": "`text_to_speech_batch`, tracked in Prefect", "obvious": "the obvious script"}
    return Comparison(
        f"{count:,} jobs at once".replace(",", " "),
        f"Durations uniform from 2 to {6 if kind == 'quick' else 20} s. On the one side `text_to_speech_batch`, with "
        "its retries, checks, ledger and three task runs a line, on a Prefect server with SQLite; on the other a "
        "script of thirty lines (`benchmarks/obvious.py`): `asyncio.gather`, one httpx client with 100 connections, "
        "a look every three seconds. Neither keeps to a rate limit here. Time and memory are of the whole "
        "client process, imports included; provider and server run beside it on the same machine. "
        f"Medians of {rounds} rounds in turn.",
        ["", "wall, s", "CPU, s", "peak memory, MB", "mean delay, s", "p95 delay, s", "status calls"],
        [
            [
                names[name],
                f"{of['wall_seconds']:.1f}",
                f"{of['cpu_seconds']:.1f}",
                f"{of['peak_mb']:.0f}",
                f"{of['mean_delay']:.2f}",
                f"{of['p95_delay']:.2f}",
                f"{of['status_calls']:.0f}",
            ]
            for name, of in figures.items()
        ],
        [
            Target("CPU time of the client, against the script", ratio("cpu_seconds"), 1.0),
            Target("p95 delay, against the script", ratio("p95_delay"), 1.0),
            Target("wall time, against the script", ratio("wall_seconds"), 1.2),
            Target("peak memory of a thousand jobs", figures["batch"]["peak_mb"], 250, "MB"),
        ]
        if count == COUNT
        else [],
        runs,
    )


def compare_plain() -> Comparison:
    """Compare the batch with doing it plainly in Prefect."""
    settings = {"1,000 jobs of 2 to 20 s": (COUNT, "uniform"), "100 jobs of 1 to 180 s": (100, "log-uniform")}
    found = {
        setting: {name: _jobs(f"benchmarks.{name}", count, tracked=True, kind=kind) for name in ("batch", "plain")}
        for setting, (count, kind) in settings.items()
    }
    names = {"batch": "`text_to_speech_batch`", "plain": "plainly"}
    return Comparison(
        "Against doing it plainly in Prefect",
        "A flow with a task for each step and a task run for each look, every three seconds (`benchmarks/plain.py`), "
        "all jobs at once. Rows are those of all tables of the server's database, events and logs included, once all "
        "has been written; requests are those that the server answered; events and logs travel on a websocket beside "
        "them. A thousand jobs are more than the plain flow can look after: most of them are finished before it comes "
        "to look at them the first time, so that it writes few rows and takes many times as long. A hundred jobs, "
        "log-uniform from 1 to 180 s, let it look as often as it means to.",
        ["", "looks a job", "rows a job", "API requests a job", "server CPU, s", "client CPU, s", "wall, s"],
        [
            [
                f"{setting}, {names[name]}",
                f"{of['status_calls'] / of['submitted']:.1f}",
                f"{of['rows']:.1f}",
                f"{of['api_requests']:.2f}",
                f"{of['server_cpu_seconds']:.1f}",
                f"{of['cpu_seconds']:.1f}",
                f"{of['wall_seconds']:.1f}",
            ]
            for setting, sides in found.items()
            for name, of in sides.items()
        ],
        [
            Target(
                f"rows, against a task run for each look, {setting}",
                sides["batch"]["rows"] / sides["plain"]["rows"],
                0.25,
            )
            for setting, sides in found.items()
        ],
        found,
    )


def compare_growth(counts: list[int], known: dict[int, dict[str, Any]]) -> Comparison:
    """Compare small batches with large ones."""
    start = _idle()
    found = {count: _jobs("benchmarks.batch", count, tracked=True, settle=False) for count in counts} | known
    found = dict(sorted(found.items()))
    counts = list(found)
    cpu = {count: 1_000 * (run["cpu_seconds"] - start["cpu_seconds"]) / count for count, run in found.items()}
    memory = {count: (run["peak_mb"] - start["peak_mb"]) / count for count, run in found.items()}
    measured_from = [count for count in counts if count >= 100]
    base = measured_from[0]
    return Comparison(
        "Growth",
        "The same batch with more lines, all at once. CPU and peak memory are of the client process, above one that "
        f"only imports the flows ({start['cpu_seconds']:.1f} s and {start['peak_mb']:.0f} MB).",
        ["jobs", "wall, s", "CPU a job, ms", "memory a job, kB", "peak memory, MB"],
        [
            [
                str(count),
                f"{run['wall_seconds']:.1f}",
                f"{cpu[count]:.1f}",
                f"{1024 * memory[count]:.0f}",
                f"{run['peak_mb']:.0f}",
            ]
            for count, run in found.items()
        ],
        [Target(f"CPU a job at {count}, against {base}", cpu[count] / cpu[base], 1.2) for count in measured_from[1:]]
        + [
            Target(f"memory a job at {count}, against {base}", memory[count] / memory[base], 1.2)
            for count in measured_from[1:]
        ],
        {str(count): run for count, run in found.items()},
    )


def _idle() -> dict[str, float]:
    """Measure a process that only imports the flows."""
    code = "import json, benchmarks.batch as b; print(json.dumps({'peak_mb': b.memory_mb('VmHWM')}))"
    runs = [measured([sys.executable, "-c", code]) for _ in range(3)]
    return {
        "cpu_seconds": median(run.cpu_seconds for run in runs),
        "peak_mb": median(run.said["peak_mb"] for run in runs),
    }


def compare_one_job(rounds: int) -> Comparison:
    """Compare one job in a flow with one through the bare client."""
    with provider() as api, prefect_server() as server:
        said = client("benchmarks.one_job", str(rounds), provider=api, server=server).said
    return Comparison(
        "One job",
        f"CPU time of the process that waits, in `wait_for_tts` and through the bare client. Medians of {rounds} jobs.",
        ["", "a run, ms", "a poll, ms"],
        [
            ["`wait_for_tts`", f"{said['tracked_run_ms']:.0f}", f"{said['tracked_poll_ms']:.1f}"],
            ["the bare client", f"{said['bare_run_ms']:.0f}", f"{said['bare_poll_ms']:.1f}"],
        ],
        raw=said,
    )


def compare_imports(rounds: int) -> Comparison:
    """Compare importing the flows, and one of them, with importing Prefect."""
    codes = {
        "import prefect": "import prefect",
        "one task and one flow": (
            "from prefect import flow, task\n@task\nasync def one(): ...\n@flow\nasync def whole(): await one()"
        ),
        "import prefect_nanogpt.flows": "import prefect_nanogpt.flows",
        "from prefect_nanogpt.flows import text_to_speech": "from prefect_nanogpt.flows import text_to_speech",
    }
    # Where bytecode is not kept, most of the time would go to compiling Prefect, which users do once.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times: dict[str, list[float]] = {name: [] for name in codes}
    for round_ in range(rounds + 1):
        for name, code in codes.items():
            cpu = measured([sys.executable, "-c", code], environment).cpu_seconds
            if round_ > 0:  # the first one compiles and fills the disk cache
                times[name].append(cpu)
    bare, usual, ours, one_flow = (median(times[name]) for name in codes)
    return Comparison(
        "Import",
        f"CPU time of a process that does nothing else. Medians of {rounds} rounds in turn.",
        ["", "CPU, s"],
        [[name, f"{median(found):.2f}"] for name, found in times.items()],
        [
            Target("`import prefect_nanogpt.flows`, against `import prefect`", ours / bare, 1.05),
            Target("the same, against a file with one task and one flow", ours / usual, 1.05),
            Target("`from prefect_nanogpt.flows import text_to_speech`, against that file", one_flow / usual, 1.1),
        ],
        times,
    )


def compare_large_file(megabytes: int, rounds: int) -> Comparison:
    """Compare saving a large file with `curl`."""
    found: list[dict[str, float]] = []
    with provider() as api, prefect_server() as server:
        bodies = [api.ask("file 1"), api.ask(f"file {megabytes}")]
        for _ in range(rounds):
            ours = client("benchmarks.large_file", json.dumps(bodies), provider=api, server=server).said
            found.append({**ours, "curl_mb_per_second": megabytes / _curl(bodies[1]["audioUrl"])})
    speed, curl = (median(run[key] for run in found) for key in ("mb_per_second", "curl_mb_per_second"))
    memory = median(run["above_idle_mb"] for run in found)
    return Comparison(
        "A large file",
        f"A WAV file of {megabytes} MB from the sandbox to disk: `save_audio`, which hashes and checks it and waits "
        f"for the disk, against `curl`, which does not. Medians of {rounds} rounds in turn.",
        ["", "MB/s", "memory above idle, MB"],
        [["`save_audio`", f"{speed:.0f}", f"{memory:.1f}"], ["`curl`", f"{curl:.0f}", ""]],
        [
            Target("memory above idle, saving a large file", memory, 30, "MB"),
            Target(
                "throughput of a large file, against curl",
                median(run["mb_per_second"] / run["curl_mb_per_second"] for run in found),
                0.5,
                at_least=True,
            ),
        ],
        found,
    )


def _curl(url: str) -> float:
    curl = shutil.which("curl")
    if curl is None:
        raise RuntimeError("This comparison needs curl.")
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        measured([curl, "--silent", "--fail", "--output", str(Path(folder, "file")), url], dict(os.environ))
        return time.monotonic() - start


def _jobs_of(results: dict[str, Any]) -> dict[str, Any]:
    """Take what the batch took from the comparison with the script, which comes before."""
    return _middle(results["jobs"]["raw"]["batch"])


COUNT, QUICK_COUNT, ROUNDS = 1_000, 30, 3

ALL: dict[str, Callable[[bool, dict[str, Any]], Comparison | None]] = {
    "polling": lambda quick, _: compare_polling(),
    "jobs": lambda quick, _: compare_jobs(QUICK_COUNT, 1, "quick") if quick else compare_jobs(COUNT, ROUNDS),
    "plain": lambda quick, _: None if quick else compare_plain(),
    "one_job": lambda quick, _: None if quick else compare_one_job(rounds=7),
    "imports": lambda quick, _: None if quick else compare_imports(7),
    "growth": lambda quick, known: None if quick else compare_growth([10, 100, 5_000], {COUNT: _jobs_of(known)}),
    "large_file": lambda quick, _: compare_large_file(50 if quick else 200, 1 if quick else ROUNDS),
}
"""Each comparison by its name: it is told whether to be quick, and what the ones before it measured."""
