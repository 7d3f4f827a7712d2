"""What a line writes: its notes and its audio, with and without waiting for the disk.

python -m benchmarks.disk LINES ROUNDS FOLDER
"""

import asyncio
import itertools
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from prefect_nanogpt.ledger import Job, Ledger
from prefect_nanogpt.models import Ticket, TTSRequest
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.storage import Destination

THREADS = (1, 16)


def audio() -> bytes:
    """Make what the other benchmarks download."""
    with Sandbox(speak=False) as sandbox:
        return sandbox.audio_bytes(sandbox.add_job("Line 100.")["runId"])


async def write(folder: Path, numbers: Iterable[int], content: bytes) -> None:
    """Write what each of these lines writes."""

    async def once() -> AsyncIterator[bytes]:
        yield content

    destination = Destination(folder)
    ledger = Ledger.of(destination)
    for number in numbers:
        job = Job("https://example.org", TTSRequest(text=f"Line {number}."), name=str(number))
        claim = ledger.claim(job, 1)
        assert claim is not None
        ledger.note_answer(claim, Ticket(run_id=str(number), model="one"))
        ledger.release(claim)
        ledger.note_saved(job, 1, await destination.save(once(), str(number)))


def seconds(folder: Path, threads: int, lines: int, content: bytes) -> float:
    """Write all lines in so many threads, and give the seconds that took."""
    start = time.monotonic()
    with ThreadPoolExecutor(threads) as pool:
        shares = [range(first, lines, threads) for first in range(threads)]
        list(pool.map(lambda share: asyncio.run(write(folder, share, content)), shares))
    return time.monotonic() - start


def main(lines: int, rounds: int, folder: Path) -> dict[int, dict[str, list[float]]]:
    """Give the milliseconds a line, by the number of threads, with and without fsync."""
    content, fsync = audio(), os.fsync
    found: dict[int, dict[str, list[float]]] = {threads: {"fsync": [], "none": []} for threads in THREADS}
    for round_, threads in itertools.product(range(rounds), THREADS):
        for way, sync in (("fsync", fsync), ("none", lambda _: None)):
            os.fsync = sync
            took = seconds(folder / f"{round_}-{threads}-{way}", threads, lines, content)
            found[threads][way].append(1_000 * took / lines)
    return found


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))))
