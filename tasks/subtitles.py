"""Subtitles of audio that is there: as a task, and beside the audio of a flow."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, cast, get_args

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from prefect_nanogpt.errors import NanoGPTError, require_extra, without_login
from prefect_nanogpt.lines import ManifestRow
from prefect_nanogpt.models import AudioFile
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.subtitles import SubtitleFormat, cues, subtitles
from prefect_nanogpt.tasks import audio as saving
from prefect_nanogpt.tasks.join import LONGEST_GAP_SECONDS, folder_and_name
from prefect_nanogpt.tasks.retries import JITTER, may_help, with_retries

__all__ = ["can_write_subtitles", "write_beside", "write_subtitles"]


def run_name() -> str:
    """Name a run by what it makes."""
    return f"write {without_login(os.fspath(task_run.parameters['to']))}"


@task(
    name="write-subtitles",
    task_run_name=run_name,
    description="Write subtitles of audio.",
    retries=len(saving.RETRY_DELAYS_SECONDS),
    retry_delay_seconds=saving.RETRY_DELAYS_SECONDS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=may_help,
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def write_subtitles(
    parts: Sequence[ManifestRow | tuple[str, AudioFile]],
    to: str | PathLike[str],
    gap_seconds: float = 0.0,
    audio: AudioFile | None = None,
) -> str:
    """Write subtitles of one or several pieces of audio that are played one after another.

    Cues have one or two lines of at most 42 columns, and are shown for one to seven seconds where there is time for it.
    Each piece begins and ends where it does in the audio. Inside of it the time is shared out by characters, since the
    provider tells no times of words. A file that has the name is replaced.

    Args:
        parts: What is heard, in order: rows of a batch, or pairs of a text and its audio.
        to: The file to write, a path or fsspec URL that ends with `.srt` or, for WebVTT, `.vtt`.
        gap_seconds: The silence between two pieces, in seconds, as it was given to `join_audio`.
        audio: What `join_audio` has made of the pieces. Where compressed audio is joined without silence, encoders have
            added some hundredths of a second to each, which this tells.

    Returns:
        Where the subtitles are: the absolute path, or the URL.

    Raises:
        NanoGPTError: There is nothing to show, or a row without audio, or the format is not known (code
            `INVALID_REQUEST`); it is not known how long a piece plays, or `audio` is not made of the pieces (code
            `SUBTITLES_IMPOSSIBLE`); or the extra `long` is not installed (code `EXTRA_MISSING`).
        StorageError: The file cannot be written.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.flows import text_to_speech_batch
        from prefect_nanogpt.tasks import join_audio, write_subtitles

        @flow
        async def episode(lines: list[dict[str, str]]) -> str:
            rows = await text_to_speech_batch(lines, save_to="audio/lines")
            audio = await join_audio(rows, "audio/episode-1.mp3", gap_seconds=0.4)
            return await write_subtitles(rows, "audio/episode-1.srt", gap_seconds=0.4, audio=audio)
        ```
    """
    folder, name = folder_and_name(os.fspath(to))
    stem, _, extension = name.rpartition(".")
    timed = [_timed(part) for part in parts]
    if problem := _problem_in(timed, stem, extension.lower(), gap_seconds):
        raise NanoGPTError(problem, code="INVALID_REQUEST")
    can_write_subtitles()
    kind = cast(SubtitleFormat, extension.lower())
    total_seconds = audio.duration_seconds if audio is not None else None
    made = await asyncio.to_thread(cues, [part for part in timed if part], gap_seconds, total_seconds)
    place = Destination(folder)
    await place.run(place.write, name, subtitles(made, kind))
    return place.location_of(name)


def can_write_subtitles() -> None:
    """Make sure, before anything is paid for, that what makes subtitles is installed.

    Raises:
        NanoGPTError: It is not (code `EXTRA_MISSING`).
    """
    require_extra("long", "To write subtitles")


async def write_beside(
    place: Destination,
    audio_name: str,
    kind: SubtitleFormat,
    parts: Sequence[tuple[str, float | None]],
    *,
    total_seconds: float | None = None,
    language: str | None = None,
    there: Mapping[str, int] | None = None,
) -> str:
    """Write subtitles under the name of the audio, unless they are there.

    Args:
        place: The folder.
        audio_name: The name of the audio's file.
        kind: Their format.
        parts: The text of each part, and how long it plays, in seconds.
        total_seconds: How long the audio plays, in seconds, where it has several parts.
        language: The language of the text, where it is known.
        there: The files in the folder and their sizes in bytes, where they were listed.

    Returns:
        The name of their file.

    Raises:
        NanoGPTError: They cannot be made (code `SUBTITLES_IMPOSSIBLE`) or written.
    """
    made = await asyncio.to_thread(cues, parts, total_seconds=total_seconds, language=language)
    name, content = f"{audio_name.rpartition('.')[0]}.{kind}", subtitles(made, kind)

    def write() -> None:
        if (there or {}).get(name) != len(content) or place.read(name) != content:
            place.write(name, content)

    try:
        await with_retries(lambda: place.run(write), saving.RETRY_DELAYS_SECONDS)
    except NanoGPTError as error:
        error.message = f"The subtitles {name} cannot be written: {error.message}"
        raise
    return name


def _timed(part: Any) -> tuple[str, float | None] | None:
    """Give the text of a piece and how long it plays, in seconds; None where there is no audio of it."""
    match part:
        case ManifestRow():
            return (part.text, part.duration_seconds) if part.location else None
        case (str() as text, AudioFile() as audio):
            return text, audio.duration_seconds
        case _:
            return None


def _problem_in(
    timed: Sequence[tuple[str, float | None] | None], stem: str, extension: str, gap_seconds: float
) -> str | None:
    """Say why there is nothing to show, or nothing to write it to."""
    if not timed:
        return "There is nothing to show."
    if without := [number for number, part in enumerate(timed, 1) if part is None]:
        return f"There is no audio with its text at place {', '.join(map(str, without))}."
    if without := [number for number, part in enumerate(timed, 1) if part and not part[0]]:
        return f"There is no text at place {', '.join(map(str, without))}."
    if not stem or extension not in get_args(SubtitleFormat):
        return "`to` does not end with .srt or .vtt."
    if not 0 <= gap_seconds <= LONGEST_GAP_SECONDS:
        return f"gap_seconds={gap_seconds} is not from 0 to {LONGEST_GAP_SECONDS}."
    return None
