"""The same jobs through `text_to_speech_batch`.

python -m benchmarks.batch [--at-once] [--without-fast] [--table FILE [--shard N]] [--save-to URL] COUNT KIND FOLDER
"""

import argparse
import asyncio
import csv
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.jobs import durations_of, memory_mb, texts
from prefect_nanogpt.flows import text_to_speech_batch
from prefect_nanogpt.turns import Turns

SHARDS = 2


def without_fast() -> None:
    """Make this process do without the extra `fast`, as if it was not installed."""
    sys.modules["prefect_nanogpt.aiohttp_transport"] = None  # type: ignore[assignment]


def without_rate_limit() -> None:
    """Let requests leave at any rate: the flow refuses more than the provider's 25 a second."""
    Turns.per_second = property(lambda _: None, lambda *_: None)  # type: ignore[assignment]


def write_table(path: Path, durations: list[float]) -> None:
    """Write a table of lines, for there are lists of lines that Prefect takes for too large a parameter."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(lines_of(durations))


def lines_of(durations: list[float]) -> list[dict[str, str]]:
    """Make lines of the jobs."""
    return [{"id": str(number), "text": text} for number, text in enumerate(texts(durations))]


async def main(arguments: argparse.Namespace) -> None:
    """Say all the texts, tracked in Prefect."""
    lines: Any = arguments.table or lines_of(durations_of(arguments.kind, arguments.count))
    options: dict[str, Any] = {"max_in_flight": arguments.count} if arguments.at_once else {}
    if arguments.shard:  # its half of what a batch has by default
        options = {"shards": SHARDS, "shard": arguments.shard, "max_in_flight": 250, "requests_per_second": 12.0}
    await text_to_speech_batch(lines, save_to=arguments.save_to or arguments.folder, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch")
    parser.add_argument("--at-once", action="store_true", help="all jobs at once and no rate limit, as the script does")
    parser.add_argument("--without-fast", action="store_true", help="do without the extra `fast`")
    parser.add_argument("--shard", type=int, help=f"do one of {SHARDS} shards of the table")
    parser.add_argument("--table", help="a table of lines, in place of a list")
    parser.add_argument("--save-to", help="where the audio goes, in place of the folder")
    parser.add_argument("count", type=int)
    parser.add_argument("kind")
    parser.add_argument("folder")
    arguments = parser.parse_args()
    if arguments.at_once:
        without_rate_limit()
    if arguments.without_fast:
        without_fast()
    asyncio.run(main(arguments))
    print(json.dumps({"peak_mb": memory_mb("VmHWM")}))
