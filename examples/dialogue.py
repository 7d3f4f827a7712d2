"""A table of dialogue in three languages becomes one file for each line, and a list of what is still to be recorded.

    python examples/dialogue.py

Without an API key, the sandbox speaks.
"""

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path

from prefect import flow

from prefect_nanogpt.errors import BatchPartial
from prefect_nanogpt.flows import text_to_speech_batch
from prefect_nanogpt.sandbox import Sandbox

LINES = Path(__file__).parent / "dialogue.csv"


@flow
async def record_dialogue(lines: str = str(LINES), save_to: str = "audio/dialogue") -> list[str]:
    """Record what can be recorded, and name the lines that somebody has to look at."""
    try:
        await text_to_speech_batch(lines, save_to=save_to, max_in_flight=20)
    except BatchPartial as partial:
        return [f"{row.id}: {row.outcome}" for row in partial.rows if not row.is_completed]
    return []


if __name__ == "__main__":
    with ExitStack() as stack:
        if not os.environ.get("NANOGPT_API_KEY"):
            sandbox = stack.enter_context(Sandbox())
            os.environ.update(NANOGPT_API_KEY="sandbox", NANOGPT_BASE_URL=sandbox.base_url)
        open_lines = asyncio.run(record_dialogue())
    print("\n".join(open_lines) or "Every line is recorded.")
