"""A podcast intro: from a script to speech, to one loudness, to the bucket that listeners load from.

Shows how the speech is one step among others: each step has the retries that suit it, a run that is retried goes on
where it stopped, and the same script is never paid for twice.

    # prefect-nanogpt with its extra `s3`, installed as the README says
    pip install imageio-ffmpeg
    prefect-nanogpt sandbox &
    export NANOGPT_BASE_URL=http://127.0.0.1:8765/api NANOGPT_API_KEY=anything
    python podcast_intro.py                        # publishes into the folder `published`
    python podcast_intro.py s3://bucket/episodes   # with AWS's usual variables, files or roles
"""

import asyncio
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import fsspec
from imageio_ffmpeg import get_ffmpeg_exe
from prefect import flow, task
from prefect.cache_policies import INPUTS
from prefect.tasks import exponential_backoff

from prefect_nanogpt.flows import text_to_speech

SCRIPT = "Welcome back to the show where we read release notes aloud, so that you do not have to. Here is episode {}."
LOUDNESS = "loudnorm=I=-16:TP=-1.5:LRA=11"
"""What podcast directories ask for: -16 LUFS, with peaks below -1.5 dB."""


@task(task_run_name="normalise-{speech.name}", cache_policy=INPUTS)
def normalise(speech: Path, sha256: str) -> Path:
    """Bring speech to the loudness of a podcast. The digest is among the inputs so that new audio is done anew."""
    normalised = speech.with_suffix(".normalised.mp3")
    command = [get_ffmpeg_exe(), "-y", "-v", "error", "-i", speech, "-af", LOUDNESS, "-ar", "44100", normalised]
    subprocess.run(command, check=True)
    return normalised


@task(task_run_name="publish-{name}", retries=3, retry_delay_seconds=exponential_backoff(2), retry_jitter_factor=0.5)
def publish(file: Path, folder: str, name: str) -> str:
    """Copy a file to where listeners load it from, and return its URL."""
    fs, root = fsspec.core.url_to_fs(folder)
    fs.put_file(str(file), f"{root}/{name}")
    return str(fs.unstrip_protocol(f"{root}/{name}"))


@flow(flow_run_name="intro-{episode}", log_prints=True)
async def podcast_intro(episode: int = 1, publish_to: str = "published") -> str:
    """Make and publish the intro of an episode."""
    say = text_to_speech.with_options(retries=2, retry_delay_seconds=60)
    speech = await say(SCRIPT.format(episode), voice="Rachel", max_cost=Decimal("0.05"))
    normalised = normalise(Path(speech.location), speech.sha256)
    url = publish(normalised, publish_to, f"intro-{episode}.mp3")
    print(f"Published {url}, which cost {speech.cost} {speech.currency}.")
    return url


if __name__ == "__main__":
    Path("published").mkdir(exist_ok=True)
    asyncio.run(podcast_intro(publish_to=sys.argv[1] if len(sys.argv) > 1 else "published"))
