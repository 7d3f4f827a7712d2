"""The same jobs through `text_to_speech_batch`.

The script it is compared with knows no rate limit, so it goes without its own: with it, twenty requests a second are
all that either could make.

python -m benchmarks.batch COUNT KIND FOLDER
"""

import asyncio
import json
import sys

from benchmarks.jobs import durations_of, memory_mb, texts
from prefect_nanogpt.flows import text_to_speech_batch
from prefect_nanogpt.turns import Turns


async def main(durations: list[float], folder: str) -> None:
    """Say all the texts at once, tracked in Prefect."""
    lines = [{"id": str(number), "text": text} for number, text in enumerate(texts(durations))]
    await text_to_speech_batch(lines, save_to=folder, max_in_flight=len(lines))


if __name__ == "__main__":
    # The flow refuses more than the provider's 25 requests a second.
    Turns.per_second = property(lambda _: None, lambda *_: None)  # type: ignore[assignment]
    asyncio.run(main(durations_of(sys.argv[2], int(sys.argv[1])), sys.argv[3]))
    print(json.dumps({"peak_mb": memory_mb("VmHWM")}))
