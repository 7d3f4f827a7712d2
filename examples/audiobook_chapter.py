"""A chapter of an audiobook: a text longer than one job takes becomes one file.

    python examples/audiobook_chapter.py [CHAPTER.txt]

The text is cut where paragraphs and sentences end, each part is a job, and their audio is joined into one file.
Without an API key, the sandbox reads.

    # prefect-nanogpt with its extra `long`, installed as the README says
"""

import asyncio
import os
import sys
from contextlib import ExitStack
from decimal import Decimal
from pathlib import Path

from prefect import flow

from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.sandbox import Sandbox

CHAPTER = """\
The lamp at the end of the pier had not been lit for 30 years, and nobody in the village could say why. "It was the
oil," said some. "It was the war," said others. Mrs. Pell, who had kept the post office since before either, said
nothing.

On the 3rd of May a boat came in without a crew. Its sails were furled, its ropes were coiled, and on the table below
lay a meal for two, still warm. Dr. Amis wrote it all down. Then he ate the meal, for he was a practical man.

That night the lamp was burning.
"""


@flow
async def read_chapter(text: str, save_to: str = "audio/book", max_cost: Decimal = Decimal("2.00")) -> str:
    """Read a chapter aloud. The catalogue says how long a part may be; here it is short, to show more than one."""
    audio = await text_to_speech(text, voice="Rachel", save_to=save_to, max_chars=250, max_cost=max_cost)
    return audio.location


if __name__ == "__main__":
    with ExitStack() as stack:
        if not os.environ.get("NANOGPT_API_KEY"):
            sandbox = stack.enter_context(Sandbox())
            os.environ.update(NANOGPT_API_KEY="sandbox", NANOGPT_BASE_URL=sandbox.base_url)
        chapter = Path(sys.argv[1]).read_text(encoding="utf-8") if len(sys.argv) > 1 else CHAPTER
        print(asyncio.run(read_chapter(chapter)))
