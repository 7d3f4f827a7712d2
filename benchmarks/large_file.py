"""What saving a large file takes in memory and time.

python -m benchmarks.large_file [--without-fast] STATUSES FOLDER, where STATUSES is the JSON of two finished jobs
"""

import asyncio
import json
import sys
import time
from pathlib import Path

from prefect import flow

from benchmarks.batch import without_fast
from benchmarks.jobs import memory_mb
from prefect_nanogpt.models import AudioFile, Completed, parse_status
from prefect_nanogpt.tasks import save_audio


@flow
async def save(small: Completed, large: Completed, folder: str) -> dict[str, float]:
    """Save a small file, so that all is loaded, and then the large one."""
    await save_audio(small, name="small", save_to=folder)
    idle = memory_mb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    start = time.monotonic()
    audio: AudioFile = await save_audio(large, name="large", save_to=folder)
    seconds = time.monotonic() - start
    return {
        "above_idle_mb": memory_mb("VmHWM") - idle,
        "mb_per_second": audio.size_bytes / 1024**2 / seconds,
    }


if __name__ == "__main__":
    *options, statuses, folder = sys.argv[1:]
    if options == ["--without-fast"]:
        without_fast()
    small, large = (parse_status(body) for body in json.loads(statuses))
    assert isinstance(small, Completed)
    assert isinstance(large, Completed)
    print(json.dumps(asyncio.run(save(small, large, folder))))
