"""A narrated video: lines are said, joined with pauses, subtitled, and put under pictures.

Shows how text becomes a video whose subtitles fit its sound: the lines are measured once they are said, so that each is
shown when it is heard. Run again after a line was edited, it pays for that line only.

    # prefect-nanogpt with its extras `audio` and `long`, installed as the README says
    pip install imageio-ffmpeg
    prefect-nanogpt sandbox &
    export NANOGPT_BASE_URL=http://127.0.0.1:8765/api NANOGPT_API_KEY=anything
    python narrated_video.py
"""

import asyncio
import subprocess
from pathlib import Path

from imageio_ffmpeg import get_ffmpeg_exe
from prefect import flow, task

from prefect_nanogpt.flows import text_to_speech_batch
from prefect_nanogpt.tasks import join_audio, write_subtitles

LINES = [
    {"id": "1-title", "text": "How a ticket becomes speech."},
    {"id": "2-submit", "text": "First the text is submitted, and NANO-GPT answers with a ticket, which is paid for."},
    {"id": "3-poll", "text": "Then the job is polled, now and then, until its audio is there."},
    {"id": "4-save", "text": "At last the audio is downloaded, verified and saved."},
]
SAID_AS = {"NANO-GPT": "nano G P T"}
PAUSE_SECONDS = 0.6


@task(task_run_name="mux {video}")
def mux(audio: str, seconds: float | None, subtitles: str, video: Path) -> str:
    """Put the sound and its subtitles under a picture; in practice, under slides or a recording."""
    picture = ["-f", "lavfi", "-i", f"color=c=midnightblue:s=1280x720:r=10:d={seconds}"]
    tracks = ["-map", "0:v", "-map", "1:a", "-map", "2:s", "-c:v", "mpeg4", "-c:a", "aac", "-c:s", "mov_text"]
    sound = ["-i", audio, "-i", subtitles]
    command = [get_ffmpeg_exe(), "-y", "-v", "error", *picture, *sound, *tracks, video]
    subprocess.run(command, check=True)
    return str(video.resolve())


@flow(log_prints=True)
async def narrated_video(folder: str = "video") -> str:
    """Say the lines, and make a video with subtitles of them."""
    rows = await text_to_speech_batch(LINES, voice="Rachel", save_to=f"{folder}/lines", pronounce=SAID_AS)
    audio = await join_audio(rows, f"{folder}/narration.mp3", gap_seconds=PAUSE_SECONDS)
    subtitles = await write_subtitles(rows, f"{folder}/narration.srt", gap_seconds=PAUSE_SECONDS, audio=audio)
    video = mux(audio.location, audio.duration_seconds, subtitles, Path(folder, "narrated.mp4"))
    print(f"{video} plays for {audio.duration_seconds:.1f} s.")
    return video


if __name__ == "__main__":
    print(asyncio.run(narrated_video()))
