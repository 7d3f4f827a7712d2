"""Many lines in one process, through transient faults and one kill: nothing paid twice, nothing lost, nothing leaked.

python -m benchmarks.soak [LINES]

One request in twenty is answered with a fault after which it may be made again without doubt: submissions with 429,
status calls with 500, 429 or a cut connection, downloads with audio cut short, 500 or a cut connection; and new
connections to the API are refused for half a second in five. The first process is killed (SIGKILL) when a tenth of
the lines have been submitted; what it had in the air then is uncertain, and stays so. A second one does the rest, so
that it has enough to do for its memory to be looked at. Neither keeps to a rate limit.
"""

import argparse
import asyncio
import json
import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import IO, Any

import httpx

from benchmarks.batch import without_rate_limit, write_table
from benchmarks.comparison import Target
from benchmarks.jobs import durations_of, memory_mb
from benchmarks.report import verdict
from benchmarks.stage import ROOT, PrefectServer, Provider, prefect_server, provider, surroundings
from prefect_nanogpt.client import SUBMISSIONS_AT_ONCE
from prefect_nanogpt.flows import text_to_speech_batch
from prefect_nanogpt.lines import ManifestRow

KIND = "quick"
FAULTS = 0.05
KILLED_AT = 0.1
WARM_AT = 0.2
"""The share of the lines from which on memory has to be flat."""
LOOK_SECONDS = 0.5
CLOSED_SECONDS = 15.0
"""How long connections have to close after the flow: the server ends idle ones."""


def open_files() -> Counter[str]:
    """Count the file descriptors of this process, by what they are of; of sockets, by the port at the other end."""
    peers = {
        fields[9]: f"socket to port {int(fields[2].rpartition(':')[2], 16)}"
        for table in ("tcp", "tcp6")
        for fields in map(str.split, Path(f"/proc/self/net/{table}").read_text().splitlines()[1:])
    }
    found: Counter[str] = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            what, _, number = os.readlink(f"/proc/self/fd/{descriptor}").partition(":[")
        except FileNotFoundError:  # that of the listing
            continue
        found[peers.get(number.rstrip("]"), what)] += 1
    return found


async def descriptors_left(before: Counter[str]) -> Counter[str]:
    """Wait for connections to close, and count the descriptors that there are more of than before."""
    left = open_files() - before
    waited = 0.0
    while left and waited < CLOSED_SECONDS:
        await asyncio.sleep(LOOK_SECONDS)
        waited += LOOK_SECONDS
        left = open_files() - before
    return left


def size_of(rows: list[ManifestRow]) -> float:
    """Give what the rows that the flow returns take, in MB."""
    tracemalloc.start()
    copies = pickle.loads(pickle.dumps(rows))
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(copies) == len(rows)
    return size / 1024**2


async def say(count: int, folder: str) -> dict[str, Any]:
    """Say all the lines in this process, after one that loads all that is needed."""
    table = Path(folder, "lines.csv")
    write_table(table, durations_of(KIND, count))
    warm_up = [{"id": "first", "text": f"[sandbox:wait 0.1] Process {os.getpid()}."}]
    await text_to_speech_batch(warm_up, save_to=str(Path(folder, "first")))
    before = open_files()
    print(json.dumps({"descriptors": before.total()}), flush=True)
    rows = await text_to_speech_batch(str(table), save_to=folder, allow_partial=True)
    after_mb, peak_mb = memory_mb("VmRSS"), memory_mb("VmHWM")
    left = await descriptors_left(before)
    return {
        "outcomes": Counter(row.outcome for row in rows),
        "left": left,
        "after_mb": after_mb,
        "peak_mb": peak_mb,
        "rows_mb": size_of(rows),
    }


def start(count: int, folder: str, environment: dict[str, str], output: IO[str]) -> "subprocess.Popen[str]":
    """Begin a process that says the lines."""
    command = [sys.executable, "-m", "benchmarks.soak", str(count), "--in", folder]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)


def kill_after(submissions: int, process: "subprocess.Popen[str]", api: Provider) -> None:
    """Kill a process once so many submissions have come."""
    while api.ask("counts")["requests"].get("submit", 0) < submissions:
        if process.poll() is not None:
            raise RuntimeError("The first process ended before it was killed.")
        try:
            process.wait(0.05)
        except subprocess.TimeoutExpired:
            continue
    process.send_signal(signal.SIGKILL)
    process.wait()


def watch(process: "subprocess.Popen[str]", folder: Path) -> list[tuple[int, float]]:
    """Look at a process until it ends: how many files there are, and how much memory it takes in MB."""
    found = []
    while process.poll() is None:
        memory = [line for line in _read(f"/proc/{process.pid}/status").splitlines() if line.startswith("VmRSS:")]
        if memory:
            found.append((sum(1 for _ in folder.glob("*.mp3")), int(memory[0].split()[1]) / 1024))
        try:
            process.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            continue
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def soak(count: int, api: Provider, server: PrefectServer) -> list[Target]:
    """Say the lines, with a kill in between, print what was measured, and give what it is held against."""
    with surroundings(api, server) as (environment, folder):
        log = Path(folder, "log")
        with log.open("w+") as output:
            process = start(count, folder, environment, output)
            kill_after(int(KILLED_AT * count), process, api)
            process = start(count, folder, environment, output)
            memory = watch(process, Path(folder))
        if process.returncode != 0:
            raise RuntimeError(log.read_text()[-4000:])
        said = json.loads(log.read_text().splitlines()[-1])
        rows = [json.loads(line) for line in Path(folder, "manifest.jsonl").read_text().splitlines()]
        has_audio = {row["id"] for row in rows if row["outcome"] == "completed" and _is_there(row)}
        seen = api.ask("counts")
        charges = api.ask("charges")
    uncertain = {row["id"] for row in rows if row["outcome"] == "SUBMISSION_UNCERTAIN"}
    paid = {str(number): charges.get(f"Line {number}.", 0) for number in range(count)}
    at = {share: next(mb for files, mb in memory if files >= share * count) for share in (WARM_AT, 0.4, 0.6, 0.8)}
    warm = at[WARM_AT]
    # Prefect keeps one client, whose idle connections stay until it is used again, also those the server has closed.
    left = dict(said["left"])
    prefects = left.pop(f"socket to port {httpx.URL(server.url).port}", 0)
    show(
        {
            "lines": f"{count:,}",
            "requests": ", ".join(f"{number:,} {kind}" for kind, number in seen["requests"].items()),
            "faults": ", ".join(f"{number:,} {kind}" for kind, number in seen["faults"].items()),
            "outcomes": ", ".join(f"{number:,} {outcome}" for outcome, number in said["outcomes"].items()),
            "uncertain lines that were charged": f"{sum(paid[line] for line in uncertain)}",
            "memory at a share of the lines": ", ".join(f"{share:.0%} {mb:.0f} MB" for share, mb in at.items()),
            "memory after the flow": f"{said['after_mb']:.0f} MB, at its highest {said['peak_mb']:.0f} MB",
            "the rows that it returns": f"{said['rows_mb']:.1f} MB",
            "file descriptors left": ", ".join(f"{number} {what}" for what, number in left.items()) or "none",
            "connections to Prefect's server left": f"{prefects}",
        }
    )
    once = sum(1 for line, times in paid.items() if times == 1 or (line in uncertain and times == 0))
    return [
        Target("lines that were paid for once (or are uncertain)", once, count, "lines", at_least=True),
        Target("lines with audio, or uncertain", len(has_audio | uncertain), count, "lines", at_least=True),
        Target("uncertain lines", len(uncertain), SUBMISSIONS_AT_ONCE, "lines"),
        Target("growth of memory beside the rows", said["after_mb"] - warm - said["rows_mb"], 30, "MB"),
        Target("file descriptors left", sum(left.values()), 0, "descriptors"),
    ]


def _is_there(row: dict[str, Any]) -> bool:
    path = Path(row["location"])
    return path.is_file() and path.stat().st_size == row["size_bytes"]


def show(figures: dict[str, str]) -> None:
    """Print a table."""
    for name, value in figures.items():
        print(f"  {name:<40}{value}")


def main() -> None:
    """Soak, and exit with 1 where something was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak")
    parser.add_argument("lines", type=int, nargs="?", default=10_000)
    parser.add_argument("--in", dest="folder", help="say the lines in this process, into this folder")
    arguments = parser.parse_args()
    if arguments.folder:
        without_rate_limit()
        print(json.dumps(asyncio.run(say(arguments.lines, arguments.folder))))
        return
    with provider("--faults", str(FAULTS)) as api, prefect_server() as server:
        targets = soak(arguments.lines, api, server)
    for target in targets:
        print(f"  {verdict(target)}")
    sys.exit(not all(target.is_reached for target in targets))


if __name__ == "__main__":
    main()
