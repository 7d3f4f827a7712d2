"""An episode of a podcast out of the five newest items of a feed, each said once whenever this runs.

Shows a batch whose lines come from elsewhere: the ids are those of the feed, so that of the five items of tomorrow only
the new ones are paid for. What it will cost is looked up first, and an episode that is too dear is not made.

    # prefect-nanogpt with its extra `audio`, installed as the README says
    prefect-nanogpt sandbox &
    export NANOGPT_BASE_URL=http://127.0.0.1:8765/api NANOGPT_API_KEY=anything
    python feed_episode.py                              # of feed.xml beside it
    python feed_episode.py https://example.org/feed.xml
"""

import asyncio
import html
import re
import sys
from decimal import Decimal
from pathlib import Path
from xml.etree import ElementTree

import httpx
from prefect import flow, task

from prefect_nanogpt.flows import text_to_speech_batch
from prefect_nanogpt.tasks import estimate, join_audio

ITEMS = 5
MOST = Decimal("0.50")
"""What one episode may cost, in USD."""


def plain(markup: str) -> str:
    """Give the words of a piece of HTML."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", markup)).split()).replace(" .", ".")


@task(retries=3, retry_delay_seconds=10)
def newest_items(feed: str) -> list[dict[str, str]]:
    """Read the newest items of a feed as lines of a batch."""
    content = (
        httpx.get(feed, follow_redirects=True).raise_for_status().text if "://" in feed else Path(feed).read_text()
    )
    items = ElementTree.fromstring(content).findall("channel/item")[:ITEMS]
    return [
        {
            "id": item.findtext("guid", ""),
            "text": f"{plain(item.findtext('title', ''))}. {plain(item.findtext('description', ''))}",
        }
        for item in items
    ]


@flow(log_prints=True)
async def feed_episode(feed: str, folder: str = "podcast") -> str | None:
    """Make an episode of a feed."""
    lines = newest_items(feed)
    expected = await estimate(lines=lines, voice="Rachel", save_to=f"{folder}/items")
    print(f"{expected.new_jobs} of {len(lines)} items are new, for {expected.usd:f} USD.")
    if expected.usd > MOST:
        return None
    rows = await text_to_speech_batch(lines, voice="Rachel", save_to=f"{folder}/items", max_cost=MOST)
    episode = await join_audio(rows, f"{folder}/episode.mp3", gap_seconds=1.0)
    return episode.location


if __name__ == "__main__":
    print(asyncio.run(feed_episode(sys.argv[1] if len(sys.argv) > 1 else str(Path(__file__).with_name("feed.xml")))))
