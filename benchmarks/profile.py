"""What a line costs, by part: the batch under py-spy, its samples summed up by what the code is of.

python -m benchmarks.profile [--without-fast] [LINES]

Needs py-spy on the path. Only samples that hold the interpreter's lock are counted, which is what takes CPU time in
Python. A sample is of the first of `WHOLE` that any function on its stack is of, or else of the part that its innermost
function with a part is of: what a library does is its caller's.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from benchmarks.stage import measured, prefect_server, provider, surroundings

RATE = 200
"""Samples a second."""
WHOLE = {
    "import": r"_find_and_load|_call_with_frames_removed",
    "Prefect's threads: events and logs": (
        r"prefect/_internal/concurrency/services|prefect/events/(worker|clients)|prefect/logging/handlers"
    ),
    "Prefect's API client": r"prefect/client/",
    "notes: the ledger": r"prefect_nanogpt/ledger\.py",
    "HTTP: submissions": r"\b(post|_send|build) \(prefect_nanogpt/client\.py",
}
INNERMOST = {
    "HTTP: status calls and downloads": (
        r"\((httpx|httpcore|aiohttp|h11)/|prefect_nanogpt/(client|connections|aiohttp_transport|turns)\.py"
    ),
    "saving and decoding": r"prefect_nanogpt/(storage|audio|waveform)\.py|\(av/",
    "our own code": r"\((prefect_nanogpt|benchmarks)/",
    "Prefect: emitting events": r"\(prefect/events/",
    "Prefect: logging": r"\(prefect/logging/",
    "Prefect: the task engine and the rest": r"\(prefect/",
}
LOOP, REST = "the event loop", "the rest"
PARTS = [*WHOLE, *INNERMOST, LOOP, REST]


def part_of(stack: str) -> str:
    """Tell which part a sample is of, by its functions and their files, the innermost last."""
    for part, pattern in WHOLE.items():
        if re.search(pattern, stack):
            return part
    for function in reversed(stack.split(";")):
        for part, pattern in INNERMOST.items():
            if re.search(pattern, function):
                return part
    return LOOP if "(asyncio/" in stack else REST


def summed_up(samples: Iterable[str]) -> Counter[str]:
    """Sum up the lines of py-spy's raw output: functions separated by semicolons, and how often they were seen."""
    found: Counter[str] = Counter()
    for line in samples:
        stack, _, times = line.rpartition(" ")
        found[part_of(stack)] += int(times)
    return found


def main() -> None:
    """Profile, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile")
    parser.add_argument("--without-fast", action="store_true", help="do without the extra `fast`")
    parser.add_argument("lines", type=int, nargs="?", default=1_000)
    arguments = parser.parse_args()
    if shutil.which("py-spy") is None:
        sys.exit("This needs py-spy: pip install py-spy")
    options = ["--at-once", *(["--without-fast"] if arguments.without_fast else [])]
    with (
        provider() as api,
        prefect_server() as server,
        surroundings(api, server) as (environment, folder),
        tempfile.TemporaryDirectory(prefix="benchmark-profile-") as output,
    ):
        raw = Path(output, "raw")
        record = ["py-spy", "record", "--gil", "--format", "raw", "--rate", str(RATE), "--output", str(raw), "--"]
        batch = [sys.executable, "-m", "benchmarks.batch", *options, str(arguments.lines), "uniform", folder]
        measured([*record, *batch], environment)
        found = summed_up(raw.read_text().splitlines())
    total = found.total()
    print(f"{'':<44}{'share':>8}{'ms a line':>12}")
    for part in PARTS:
        milliseconds = 1_000 * found[part] / RATE / arguments.lines
        print(f"{part:<44}{found[part] / total:>8.1%}{milliseconds:>12.2f}")
    print(f"{'all':<44}{1:>8.1%}{1_000 * total / RATE / arguments.lines:>12.2f}")


if __name__ == "__main__":
    main()
