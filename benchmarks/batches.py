"""The comparisons of whole batches: with the obvious script, with the bound of the rate limit, with plain Prefect."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.batch import SHARDS, write_table
from benchmarks.comparison import Comparison, Target, percentile_95, shown
from benchmarks.jobs import durations_of
from benchmarks.postgres import PROGRAMS, postgres
from benchmarks.stage import PrefectServer, Run, bucket, client, file_system, prefect_server, provider
from prefect_nanogpt.shell import free_port

PER_SECOND = 25.0
"""The provider's limit, over all routes."""
FAST = find_spec("aiohttp") is not None and find_spec("prefect_nanogpt.aiohttp_transport") is not None
"""Whether the extra `fast` is installed."""
NO_FAST = "" if FAST else " The extra `fast` was not installed, so nothing is said of it."

PLAIN_BATCH, FAST_BATCH, SCRIPT = "`text_to_speech_batch`", "the same with the extra `fast`", "the obvious script"
BATCHES = {PLAIN_BATCH: ["--without-fast"], **({FAST_BATCH: []} if FAST else {})}
"""The options of `benchmarks.batch` for each installation that there is."""
COLUMNS = {
    "wall, s": ("wall_seconds", 1),
    "CPU, s": ("cpu_seconds", 1),
    "peak memory, MB": ("peak_mb", 0),
    "mean delay, s": ("mean_delay", 2),
    "p95 delay, s": ("p95_delay", 2),
    "status calls a job": ("looks", 2),
    "most requests in 10 s": ("most_in_10_seconds", 0),
    "rows a job": ("rows", 1),
    "API requests a job": ("api_requests", 2),
    "server CPU, s": ("server_cpu_seconds", 1),
}


def _jobs(
    module: str,
    *options: str,
    count: int,
    kind: str,
    tracked: bool = True,
    settle: bool = False,
    delay: float = 0.0,
    settings: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Run so many jobs through one of the clients, with a provider and a server of their own."""
    arguments = [*options, str(count), kind]
    with provider("--delay", str(delay)) as api:
        if not tracked:
            run = client(module, *arguments, provider=api)
            server_says: dict[str, float] = {}
        else:
            with prefect_server() as server:
                before = _server_says(server, settle=settle)
                run = client(module, *arguments, provider=api, server=server, settings=settings or {})
                after = _server_says(server, settle=settle)
                server_says = {
                    name: (value - before[name]) / (1 if name == "server_cpu_seconds" else count)
                    for name, value in after.items()
                }
        seen = api.ask("seen")
    return _figures(run, seen, count) | server_says


def _server_says(server: PrefectServer, *, settle: bool) -> dict[str, float]:
    """Tell what a server has done; its rows and CPU time only where it is waited for what it still has to write."""
    if not settle:
        return {"api_requests": server.requests()}
    rows = server.settled_rows()
    return {"rows": rows, "api_requests": server.requests(), "server_cpu_seconds": server.cpu_seconds()}


def _figures(run: Run, seen: dict[str, Any], count: int) -> dict[str, float]:
    delays = seen["delays"] or [0.0]
    return {
        "wall_seconds": run.wall_seconds,
        "cpu_seconds": run.cpu_seconds,
        "peak_mb": run.said["peak_mb"],
        "mean_delay": mean(delays),
        "p95_delay": percentile_95(delays),
        "looks": seen["status_calls"] / count,
        "most_in_10_seconds": seen["most_in_10_seconds"],
    }


Runs = list[dict[str, float]]


def _row(name: str, runs: Runs, columns: list[str]) -> list[str]:
    """Show the columns of a side; the server's rows are counted in some of the rounds."""
    cells = []
    for column in columns:
        key, digits = COLUMNS[column]
        values = [run[key] for run in runs if key in run]
        cells.append(shown(values, digits) if values else "")
    return [name, *cells]


def _ratios(ours: Runs, theirs: Runs, key: str) -> list[float]:
    return [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)]


def compare_jobs(quick: bool) -> Comparison:
    """Compare the batch with the obvious script, neither with a rate limit."""
    count, kind, rounds = (30, "quick", 1) if quick else (1_000, "uniform", 3)
    sides: dict[str, Runs] = {name: [] for name in (*BATCHES, SCRIPT)}
    for round_ in range(rounds):
        for name, found in sides.items():
            if name == SCRIPT:
                found.append(_jobs("benchmarks.obvious", count=count, kind=kind, tracked=False))
            else:
                options = ["--at-once", *BATCHES[name]]
                found.append(_jobs("benchmarks.batch", *options, count=count, kind=kind, settle=round_ == 0))
    targets = []
    for name in BATCHES if not quick else ():
        ours, script = sides[name], sides[SCRIPT]
        extra = " with `fast`" if name == FAST_BATCH else ""
        targets += [
            Target.of(
                f"CPU time of 1,000 jobs{extra}, against the script",
                _ratios(ours, script, "cpu_seconds"),
                0.75 if name == FAST_BATCH else 1.0,
            ),
            Target.of(f"wall time{extra}, against the script", _ratios(ours, script, "wall_seconds"), 1.2),
            Target.of(f"p95 delay{extra}, against the script", _ratios(ours, script, "p95_delay"), 1.0),
            Target.of(f"peak memory of 1,000 jobs{extra}", [run["peak_mb"] for run in ours], 250, "MB"),
            Target.of(f"rows a job{extra}", [run["rows"] for run in ours if "rows" in run], 28, "rows"),
        ]
    columns = [
        "wall, s",
        "CPU, s",
        "peak memory, MB",
        "mean delay, s",
        "p95 delay, s",
        "status calls a job",
        "rows a job",
        "server CPU, s",
    ]
    return Comparison(
        f"{count:,} jobs at once",
        f"Durations uniform from 2 to {6 if quick else 20} s. On the one side `text_to_speech_batch`, with its "
        "retries, checks, ledger and a task run a line, on a Prefect server with SQLite; on the other a script of "
        "thirty lines (`benchmarks/obvious.py`): `asyncio.gather`, one httpx client with 100 connections, a look every "
        "three seconds. Neither keeps to a rate limit here. Time and memory are of the whole client process, imports "
        "included; provider and server run beside it on the same machine. Rows are those of all tables of the server's "
        "database, events and logs included, once all has been written; they and the server's CPU time are of the "
        f"first round. Medians of {rounds} rounds in turn, with their ranges; ratios are of the same round.{NO_FAST}",
        ["", *columns],
        [_row(name, found, columns) for name, found in sides.items()],
        targets,
        sides,
    )


LIMIT_COLUMNS = [
    "wall, s",
    "mean delay, s",
    "p95 delay, s",
    "status calls a job",
    "most requests in 10 s",
    "CPU, s",
    "peak memory, MB",
]


def _times_bound(runs: Runs, count: int) -> list[float]:
    return [run["wall_seconds"] / (2 * count / PER_SECOND) for run in runs]


def _limit_row(name: str, runs: Runs, count: int) -> list[str]:
    row = _row(name, runs, LIMIT_COLUMNS)
    return [row[0], shown(_times_bound(runs, count), 2), *row[1:]]


def compare_limit(quick: bool) -> Comparison:
    """Compare a batch under the provider's limit with the least time that its requests take."""
    kind, settings = ("quick", {60: 1}) if quick else ("uniform", {500: 3, 1_000: 1})
    found = {
        count: [_jobs("benchmarks.batch", "--without-fast", count=count, kind=kind) for _ in range(rounds)]
        for count, rounds in settings.items()
    }
    return Comparison(
        "Under the provider's limit",
        "The same batch with its defaults: all requests over all routes, 24 a second. The bound is two requests a line "
        "(a submission and one status call that sees the end) at the 25 a second that the provider allows. Times are "
        "of the whole process, its start and the import of Prefect included. The delay is the time from a job's end to "
        "the status call that sees it. The sandbox has no limit of its own; how near a batch comes to the provider's "
        f"is told by the most requests to the API within ten seconds. Medians of "
        f"{' and '.join(f'{rounds} of {count:,} lines' for count, rounds in settings.items())}.",
        ["", "time ÷ bound", *LIMIT_COLUMNS],
        [_limit_row(f"{count:,} lines", runs, count) for count, runs in found.items()],
        [
            Target.of(f"time of {count:,} lines under the limit, against the bound", _times_bound(runs, count), 1.35)
            for count, runs in found.items()
            if not quick
        ],
        {str(count): runs for count, runs in found.items()},
    )


def compare_distance(quick: bool) -> Comparison:
    """See what a batch under the limit takes where the provider is far away."""
    count, kind = (60, "quick") if quick else (500, "uniform")
    settings = [(0.2, PLAIN_BATCH)] if quick else [(0.05, PLAIN_BATCH), (0.2, PLAIN_BATCH), (0.2, FAST_BATCH)]
    found = {
        f"{1_000 * delay:.0f} ms, {name}": _jobs(
            "benchmarks.batch", *BATCHES[name], count=count, kind=kind, delay=delay
        )
        for delay, name in settings
        if name in BATCHES
    }
    return Comparison(
        "Under the limit, from a distance",
        f"{count:,} lines as above, where the body of each answer of the API comes so much later. What is on its way "
        "takes a place among the requests at once, so this shows whether there are enough of those. One run each."
        f"{NO_FAST}",
        ["", "time ÷ bound", *LIMIT_COLUMNS],
        [_limit_row(name, [run], count) for name, run in found.items()],
        [
            Target.of(f"time of {count:,} lines, {name}, against the bound", _times_bound([run], count), 1.35)
            for name, run in found.items()
            if not quick
        ],
        found,
    )


def compare_shards(quick: bool) -> Comparison:
    """Compare two processes that share a batch and the limit with the bound of one."""
    count, kind, rounds = (60, "quick", 1) if quick else (500, "uniform", 3)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        found.setdefault("SQLite", []).append(_in_shards(count, kind, None))
        if PROGRAMS is not None:
            with postgres(free_port()) as url:
                found.setdefault("Postgres", []).append(_in_shards(count, kind, url))
    return Comparison(
        "Under the limit, in shards",
        f"{count:,} lines as above in {SHARDS} processes at the same time, as shards have them: each with its half of "
        "the lines, of `max_in_flight` and of `requests_per_second`, both into one folder, and on the Prefect server "
        "the global limit `nanogpt` with 10 slots of which 24 come back in a second. The server's database is SQLite, "
        "or Postgres, if that is on the machine. CPU is of both processes, memory of the larger. Medians of "
        f"{rounds} rounds in turn, with their ranges.",
        ["", "time ÷ bound", *LIMIT_COLUMNS],
        [_limit_row(f"{SHARDS} shards, {database}", runs, count) for database, runs in found.items()],
        [
            Target.of(
                f"time of {count:,} lines in {SHARDS} shards, {database}, against the bound",
                _times_bound(runs, count),
                1.35,
            )
            for database, runs in found.items()
            if not quick
        ],
        found,
    )


def _in_shards(count: int, kind: str, database: str | None) -> dict[str, float]:
    """Run a batch in shards, all at the same time."""
    with tempfile.TemporaryDirectory(prefix="benchmark-shards-") as folder, provider() as api:
        table = Path(folder, "lines.csv")
        write_table(table, durations_of(kind, count))
        with prefect_server(database=database) as server, ThreadPoolExecutor() as processes:
            _limit_requests(server)

            def run_shard(number: int) -> Run:
                options = ["--without-fast", "--shard", str(number), "--table", str(table), "--save-to", folder]
                return client("benchmarks.batch", *options, str(count), kind, provider=api, server=server)

            runs = list(processes.map(run_shard, range(1, SHARDS + 1)))
        seen = api.ask("seen")
    whole = Run(
        max(run.wall_seconds for run in runs),
        sum(run.cpu_seconds for run in runs),
        {"peak_mb": max(run.said["peak_mb"] for run in runs)},
    )
    return _figures(whole, seen, count)


def _limit_requests(server: PrefectServer) -> None:
    """Make the global limit that the documentation names."""
    with tempfile.TemporaryDirectory(prefix="benchmark-home-") as home:
        subprocess.run(
            [
                sys.executable,
                "-m",
                "prefect",
                "gcl",
                "create",
                "nanogpt",
                *"--limit 10 --slot-decay-per-second 24".split(),
            ],
            env=server.environment | {"PREFECT_HOME": home},
            check=True,
            capture_output=True,
        )


def compare_small(quick: bool) -> Comparison:
    """Compare what is too small for the rate limit to matter with the script."""
    count, kind, rounds, singles = (10, "quick", 1, 2) if quick else (30, "uniform", 3, 10)
    sides: dict[str, Runs] = {f"{count} lines, {PLAIN_BATCH}": [], f"{count} jobs, {SCRIPT}": []}
    batch, script = sides.values()
    for _ in range(rounds):
        batch.append(_jobs("benchmarks.batch", "--without-fast", count=count, kind=kind))
        script.append(_jobs("benchmarks.obvious", count=count, kind=kind, tracked=False))
    single = [_jobs("benchmarks.single", count=singles, kind=kind)]
    columns = ["mean delay, s", "p95 delay, s", "status calls a job", "wall, s", "CPU, s"]
    return Comparison(
        "A few jobs",
        f"Durations uniform from 2 to {6 if quick else 20} s, with the defaults, so few that the rate limit hardly "
        f"matters; and {singles} runs of `text_to_speech`, one begun each second. Delays as above. Medians of {rounds} "
        "rounds in turn, with their ranges; the single runs once.",
        ["", *columns],
        [
            *(_row(name, runs, columns) for name, runs in sides.items()),
            _row(f"{singles} runs of `text_to_speech`", single, columns),
        ],
        [Target.of(f"p95 delay of {count} lines, against the script", _ratios(batch, script, "p95_delay"), 0.5)]
        if not quick
        else [],
        sides | {"single": single},
    )


def compare_plain(quick: bool) -> Comparison:
    """Compare the batch with doing it plainly in Prefect, both at the same time."""
    count, kind = (5, "quick") if quick else (100, "log-uniform")
    sides = {PLAIN_BATCH: ("benchmarks.batch", "--at-once", "--without-fast"), "plainly": ("benchmarks.plain",)}
    with ThreadPoolExecutor() as processes:
        runs = processes.map(lambda side: _jobs(*side, count=count, kind=kind, settle=True), sides.values())
        found = dict(zip(sides, runs, strict=True))
    columns = ["status calls a job", "rows a job", "API requests a job", "server CPU, s", "CPU, s", "wall, s"]
    batch, plain = found.values()
    return Comparison(
        "Against doing it plainly in Prefect",
        f"{count} jobs at once, {'uniform from 2 to 6 s' if quick else 'log-uniform from 1 to 180 s'}, against a flow "
        "with a task for each step and a task run for each look, every three seconds (`benchmarks/plain.py`), each on "
        "a server of its own, at the same time. API requests are those that the server answered; events and logs "
        "travel on a websocket beside them.",
        ["", *columns],
        [_row(name, [run], columns) for name, run in found.items()],
        [Target("rows, against a task run for each look", batch["rows"] / plain["rows"], 0.25)] if not quick else [],
        found,
    )


def compare_growth(quick: bool) -> Comparison:
    """Compare small batches with large ones in a local folder."""
    counts, kind = ([10, 30], "quick") if quick else ([100, 1_000, 10_000], "uniform")
    found = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-table-") as folder:
        for count in counts:
            table = Path(folder, f"{count}.csv")
            write_table(table, durations_of(kind, count))
            options = ["--at-once", "--without-fast", "--table", str(table)]
            found[count] = _jobs("benchmarks.batch", *options, count=count, kind=kind)
    return _growth("Growth", "into a local folder", found, _one_line(), quick=quick)


def compare_bucket(quick: bool) -> Comparison:
    """Compare small batches with large ones in a bucket."""
    counts, kind = ([10, 30], "quick") if quick else ([100, 1_000], "uniform")
    with bucket() as settings:

        def save(count: int) -> dict[str, float]:
            options = ["--at-once", "--without-fast", "--save-to", f"s3://speech/{count}"]
            return _jobs("benchmarks.batch", *options, count=count, kind=kind, settings=settings)

        found = {count: save(count) for count in counts}
        one = _one_line("s3://speech/one", settings)
    return _growth("Growth in a bucket", "into a bucket of an S3 server on the same machine", found, one, quick=quick)


def _one_line(save_to: str | None = None, settings: Mapping[str, str] | None = None) -> dict[str, float]:
    """Measure a batch of one line: what all others take besides."""
    runs = []
    with provider() as api, prefect_server() as server:
        for number in range(3):
            options = ["--save-to", f"{save_to}/{number}"] if save_to else []
            arguments = ["--without-fast", *options, "1", "quick"]
            runs.append(client("benchmarks.batch", *arguments, provider=api, server=server, settings=settings or {}))
    return {
        "cpu_seconds": median(run.cpu_seconds for run in runs),
        "peak_mb": median(run.said["peak_mb"] for run in runs),
    }


def _growth(
    title: str, where: str, found: dict[int, dict[str, float]], one: dict[str, float], *, quick: bool
) -> Comparison:
    cpu = {count: 1_000 * (run["cpu_seconds"] - one["cpu_seconds"]) / (count - 1) for count, run in found.items()}
    base, *larger = found
    return Comparison(
        title,
        f"The same batch with more lines, all at once, {where}. CPU and memory are of the client process; CPU a line "
        f"is what it takes more than with one line ({one['cpu_seconds']:.1f} s of CPU and {one['peak_mb']:.0f} MB).",
        ["lines", "wall, s", "CPU a line, ms", "peak memory, MB"],
        [
            [
                f"{count:,}",
                f"{run['wall_seconds']:.1f}",
                f"{cpu[count]:.1f}",
                f"{run['peak_mb']:.0f}",
            ]
            for count, run in found.items()
        ],
        [
            Target(f"CPU a line of {count:,} {where}, against {base:,}", cpu[count] / cpu[base], 1.2)
            for count in larger
            if not quick
        ],
        {"one": one, **{str(count): run for count, run in found.items()}},
    )


def compare_disk(quick: bool) -> Comparison:
    """Compare the notes and the audio of lines with and without waiting for the disk."""
    lines, rounds = (100, 1) if quick else (1_000, 3)
    said = client("benchmarks.disk", str(lines), str(rounds)).said
    with tempfile.TemporaryDirectory(prefix="benchmark-audio-") as folder:
        kind = file_system(folder)
    return Comparison(
        "Waiting for the disk",
        f"What a line writes, without Prefect and network: the notes that it is sent, answered and saved, and its "
        f"audio, {lines:,} times on {kind}; and the same where `os.fsync` does nothing. Time that passes, a line. "
        f"Medians of {rounds} rounds in turn, with their ranges.",
        ["", "with fsync, ms a line", "without, ms a line"],
        [
            [f"{threads} thread{'s' if threads != '1' else ''}", shown(of["fsync"], 2), shown(of["none"], 2)]
            for threads, of in said.items()
        ],
        raw=said,
    )
