"""Runs of `text_to_speech`, one begun each second.

python -m benchmarks.single COUNT KIND FOLDER
"""

import asyncio
import json
import sys

from benchmarks.jobs import durations_of, memory_mb, texts
from prefect_nanogpt.flows import text_to_speech


async def say(second: int, text: str, folder: str) -> None:
    """Say a text in a run of its own."""
    await asyncio.sleep(second)
    await text_to_speech(text, save_to=folder)


async def main(durations: list[float], folder: str) -> None:
    """Say all the texts."""
    await asyncio.gather(*(say(second, text, folder) for second, text in enumerate(texts(durations))))


if __name__ == "__main__":
    asyncio.run(main(durations_of(sys.argv[2], int(sys.argv[1])), sys.argv[3]))
    print(json.dumps({"peak_mb": memory_mb("VmHWM")}))
