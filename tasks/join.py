"""Several audio files made one, as a task."""

import asyncio
import math
import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Final

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from prefect_nanogpt.audio import CONTENT_TYPES, EXTENSIONS, inspect
from prefect_nanogpt.errors import AudioError, NanoGPTError, StorageError, require_extra, without_login
from prefect_nanogpt.joining import join
from prefect_nanogpt.lines import ManifestRow
from prefect_nanogpt.models import AudioFile
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks.audio import RETRY_DELAYS_SECONDS
from prefect_nanogpt.tasks.retries import JITTER, may_help

__all__ = ["LONGEST_GAP_SECONDS", "bytes_of", "folder_and_name", "join_audio"]

BLOCK_BYTES: Final = 1024**2
LONGEST_GAP_SECONDS: Final = 3600


def run_name() -> str:
    """Name a run by what it makes."""
    return f"join into {without_login(os.fspath(task_run.parameters['to']))}"


@task(
    name="join-audio",
    task_run_name=run_name,
    description="Join audio files into one.",
    retries=len(RETRY_DELAYS_SECONDS),
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=may_help,
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def join_audio(
    files: Sequence[AudioFile | ManifestRow | str | PathLike[str]],
    to: str | PathLike[str],
    gap_seconds: float = 0.0,
    container: str | None = None,
) -> AudioFile:
    """Join audio files into one, such as an episode out of its lines.

    Files of the first one's codec, sample rate and channels are copied, so that nothing is lost and hours take seconds;
    others are converted to it. Where another container is asked for, all are encoded once. Other audio that has the
    name is kept beside, as `<name>.<first letters of its digest>.<extension>`.

    Args:
        files: The files, in order: what the flows return (also the rows of a batch), paths, or fsspec URLs. Where they
            are on the server of `to`, they are fetched with the password that `to` has.
        to: The file to make: a path or fsspec URL. An extension such as `.mp3`, `.wav`, `.opus`, `.flac`, `.m4a` or
            `.aac` says which container to make; without one, that of the first file is made, and its extension added.
        gap_seconds: The silence between two files, in seconds.
        container: The container to make, `mp3`, `wav`, `ogg`, `flac`, `mp4` or `aac`, where the extension does not say.
            The other extensions are understood too.

    Returns:
        The file, with its duration as a decoder plays it. What the files have cost is not added up.

    Raises:
        NanoGPTError: There are no files, one of them is a line without audio, or the container is not known or not that
            of the extension (code `INVALID_REQUEST`); or the extra `audio` is not installed (code `EXTRA_MISSING`).
        AudioError: A file is not audio (code `AUDIO_INVALID`), or not whole (`AUDIO_EMPTY`, `AUDIO_TRUNCATED`).
        StorageError: A file cannot be read, or the result cannot be written.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.flows import text_to_speech_batch
        from prefect_nanogpt.models import AudioFile
        from prefect_nanogpt.tasks import join_audio

        @flow
        async def episode(lines: list[dict[str, str]]) -> AudioFile:
            rows = await text_to_speech_batch(lines, save_to="audio/lines")
            return await join_audio(rows, "audio/episode-1.mp3", gap_seconds=0.4)
        ```
    """
    folder, name = folder_and_name(os.fspath(to))
    stem, _, extension = name.rpartition(".")
    named = EXTENSIONS.get(extension.lower()) if stem else None
    asked = EXTENSIONS.get(container.lower(), container) if container else named
    if isinstance(files, str | PathLike):
        raise NanoGPTError("`files` is one path: give a list of them.", code="INVALID_REQUEST")
    locations = [_with_login_of(os.fspath(to), _location(file)) for file in files]
    if problem := _problem_in(locations, name, asked, gap_seconds):
        raise NanoGPTError(problem, code="INVALID_REQUEST")
    if named and asked != named:
        raise NanoGPTError(f"`to` ends with .{extension}, and `container` is {container!r}.", code="INVALID_REQUEST")
    require_extra("audio", "To join audio")
    place = Destination(folder)
    with tempfile.TemporaryDirectory() as temporary:
        local = {
            location: await _fetch(location, Path(temporary, str(number)))
            for number, location in enumerate(dict.fromkeys(locations))
        }
        for location, path in local.items():
            await _verify(path, location)
        joined = Path(temporary, "joined")
        await asyncio.to_thread(join, [local[location] for location in locations], joined, asked, gap_seconds)
        return await place.save(
            bytes_of(joined),
            stem if named else name,
            largest_bytes=math.inf,
            extension=extension if named else None,
        )


def _problem_in(locations: Sequence[str], name: str, container: str | None, gap_seconds: float) -> str | None:
    """Say why there is nothing to join, or nothing to join it to."""
    if not locations:
        return "There are no files to join."
    if without := [number for number, location in enumerate(locations, 1) if not location]:
        return f"There is no audio at place {', '.join(map(str, without))} of the files."
    if not name:
        return "`to` is a folder: give the file to make."
    if container is not None and container not in CONTENT_TYPES:
        return f"{container!r} is no container that can be made: {', '.join(CONTENT_TYPES)}."
    if not 0 <= gap_seconds <= LONGEST_GAP_SECONDS:
        return f"gap_seconds={gap_seconds} is not from 0 to {LONGEST_GAP_SECONDS}."
    return None


def _location(file: AudioFile | ManifestRow | str | PathLike[str]) -> str:
    return (file.location or "") if isinstance(file, AudioFile | ManifestRow) else os.fspath(file)


def _with_login_of(to: str, location: str) -> str:
    """Give a location on the same server the password that it was saved with, since rows do not tell it."""
    server = "/".join(to.split("/", 3)[:3])
    shown = without_login(server)
    return location.replace(shown, server, 1) if shown != server and location.startswith(f"{shown}/") else location


def folder_and_name(location: str) -> tuple[str, str]:
    """Give the folder of a path or URL, and the name of the file in it, empty where there is none."""
    folder, name = location.rsplit("/", 1) if "://" in location else os.path.split(location)
    return folder or os.curdir, name


async def _fetch(location: str, into: Path) -> Path:
    folder, name = folder_and_name(location)
    place = Destination(folder)
    try:
        return await place.run(place.fetch, name, into)
    except StorageError as error:
        error.message = f"{without_login(location)} cannot be read. {error.message}"
        raise


async def _verify(path: Path, location: str) -> None:
    """Make sure that a file is whole, since what is made of half of it would look whole.

    Raises:
        AudioError: It is not.
    """
    try:
        await asyncio.to_thread(inspect, path)
    except AudioError as error:
        raise AudioError(f"{without_login(location)}: {error.message}", code=error.code) from None


async def bytes_of(path: Path) -> AsyncIterator[bytes]:
    """Read a file block by block."""
    with path.open("rb") as file:
        while block := await asyncio.to_thread(file.read, BLOCK_BYTES):
            yield block
