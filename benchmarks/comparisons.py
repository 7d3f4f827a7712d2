"""The comparisons: each runs all sides in turn, on the same machine, and says what was to be reached."""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks import batches, polling
from benchmarks.comparison import Comparison, Target, shown
from benchmarks.stage import client, measured, prefect_server, provider


def compare_polling(_: bool) -> Comparison:
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


def compare_one_job(quick: bool) -> Comparison:
    """Compare one job in a flow with one through the bare client, and with a flow that does nothing."""
    rounds = 2 if quick else 5
    with provider() as api, prefect_server() as server:
        said = client("benchmarks.one_job", str(rounds), provider=api, server=server).said
    runs, polls = said["run_ms"], said["poll_ms"]
    sums = [bare + floor for bare, floor in zip(runs["bare"], runs["floor"], strict=True)]
    above = [ours - bare for ours, bare in zip(polls["tracked"], polls["bare"], strict=True)]
    names = {
        "tracked": "`wait_for_tts`",
        "bare": "the bare client",
        "floor": "an empty flow with as many empty tasks",
        "named_floor": "the same, its runs named by a function",
    }
    return Comparison(
        "One job",
        "CPU time of the process that waits: in `wait_for_tts`, through the bare client, and in a flow that does "
        "nothing in as many tasks. A run is of a job that is finished at once, so it polls once and saves once "
        f"({said['task_runs']} task runs). A poll is what each further one adds. Prefect asks its server for more, "
        "through a connection of its own, where a function names the runs of a flow, as ours are named. Medians of "
        f"{rounds} rounds in turn, with their ranges.",
        ["", "a run, ms", "a poll, ms"],
        [[name, shown(runs[way], 0), shown(polls[way])] for way, name in names.items()],
        [
            Target.of(
                "a run of `wait_for_tts`, against the bare client and the empty flow together",
                [ours / floor for ours, floor in zip(runs["tracked"], sums, strict=True)],
                1.2,
            ),
            Target.of("a poll above one of the bare client", above, 8, "ms"),
        ]
        if not quick
        else [],
        said,
    )


COMMAND = str(Path(sys.executable).with_name("prefect-nanogpt"))
PREFECT = "`import prefect`"
USUAL = "a file with one task and one flow"
FLOWS, ONE_FLOW = "`import prefect_nanogpt.flows`", "`from prefect_nanogpt.flows import text_to_speech`"
IMPORTS = {
    PREFECT: [sys.executable, "-c", "import prefect"],
    USUAL: [
        sys.executable,
        "-c",
        "from prefect import flow, task\n@task\nasync def one(): ...\n@flow\nasync def whole(): await one()",
    ],
    FLOWS: [sys.executable, "-c", "import prefect_nanogpt.flows"],
    ONE_FLOW: [sys.executable, "-c", "from prefect_nanogpt.flows import text_to_speech"],
    "`prefect-nanogpt --version`": [COMMAND, "--version"],
    "`prefect-nanogpt --help`": [COMMAND, "--help"],
}


def compare_imports(quick: bool) -> Comparison:
    """Compare importing the flows with importing Prefect."""
    rounds = 2 if quick else 7
    times = cpu_seconds(IMPORTS, rounds)

    def ratios(name: str) -> list[float]:
        return [ours / usual for ours, usual in zip(times[name], times[USUAL], strict=True)]

    return Comparison(
        "Import",
        f"CPU time of a process that does nothing else. Medians of {rounds} rounds in turn, with their ranges.",
        ["", "CPU, s"],
        [[name, shown(found, 2)] for name, found in times.items()],
        [
            Target.of(f"{FLOWS}, against {USUAL}", ratios(FLOWS), 1.05),
            Target.of(f"{ONE_FLOW}, against {USUAL}", ratios(ONE_FLOW), 1.1),
        ],
        times,
    )


def cpu_seconds(commands: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Run commands in turn, and give the CPU time of each in each round."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for round_ in range(rounds + 1):
        for name, command in commands.items():
            took = measured(command).cpu_seconds
            if round_ > 0:  # the first one compiles and fills the disk cache
                times[name].append(took)
    return times


def import_seconds() -> float:
    """Tell how fast this machine is: the CPU time of `import prefect`, in seconds."""
    return median(cpu_seconds({PREFECT: IMPORTS[PREFECT]}, 5)[PREFECT])


def compare_large_file(quick: bool) -> Comparison:
    """Compare saving a large file with `curl`."""
    megabytes, rounds = (50, 1) if quick else (200, 5)
    sides = {
        "`save_audio`": ["--without-fast"],
        **({"the same with the extra `fast`": []} if batches.FAST else {}),
    }
    speeds: dict[str, list[float]] = {name: [] for name in (*sides, "`curl`")}
    memory: dict[str, list[float]] = {name: [] for name in sides}
    with provider() as api, prefect_server() as server:
        bodies = [api.ask("file 1"), api.ask(f"file {megabytes}")]
        for _ in range(rounds):
            for name, options in sides.items():
                arguments = [*options, json.dumps(bodies)]
                said = client("benchmarks.large_file", *arguments, provider=api, server=server).said
                speeds[name].append(said["mb_per_second"])
                memory[name].append(said["above_idle_mb"])
            speeds["`curl`"].append(megabytes / _curl(bodies[1]["audioUrl"]))
    targets = []
    for name, least in zip(sides, (0.82, 1.0), strict=False):
        fast = " with `fast`" if least == 1.0 else ""
        ratios = [ours / curl for ours, curl in zip(speeds[name], speeds["`curl`"], strict=True)]
        targets += [
            Target.of(f"throughput of a large file{fast}, against curl", ratios, least, at_least=True),
            Target.of(f"memory above idle, saving a large file{fast}", memory[name], 30, "MB"),
        ]
    return Comparison(
        "A large file",
        f"A WAV file of {megabytes} MB from the sandbox to disk: `save_audio`, which hashes and checks it and waits "
        f"for the disk, against `curl`, which does not. Medians of {rounds} rounds in turn, with their ranges."
        f"{batches.NO_FAST}",
        ["", "MB/s", "memory above idle, MB"],
        [[name, shown(found, 0), shown(memory[name]) if name in memory else ""] for name, found in speeds.items()],
        targets,
        {"mb_per_second": speeds, "above_idle_mb": memory},
    )


def _curl(url: str) -> float:
    curl = shutil.which("curl")
    if curl is None:
        raise RuntimeError("This comparison needs curl.")
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        measured([curl, "--silent", "--fail", "--output", str(Path(folder, "file")), url], dict(os.environ))
        return time.monotonic() - start


ALL: dict[str, Callable[[bool], Comparison]] = {
    "jobs": batches.compare_jobs,
    "limit": batches.compare_limit,
    "distance": batches.compare_distance,
    "shards": batches.compare_shards,
    "small": batches.compare_small,
    "plain": batches.compare_plain,
    "one_job": compare_one_job,
    "imports": compare_imports,
    "growth": batches.compare_growth,
    "bucket": batches.compare_bucket,
    "polling": compare_polling,
    "large_file": compare_large_file,
    "disk": batches.compare_disk,
}
"""Each comparison by its name: it is told whether to be quick."""

QUICK = ("jobs", "polling", "large_file", "disk")
"""Those that `make bench-quick` makes."""
