"""Saving a finished job's audio, as a task."""

from collections.abc import AsyncIterator
from os import PathLike
from typing import Final

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.connections import split_login
from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import AudioError
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.models import HUMMED, AudioContent, AudioFile, Completed
from prefect_nanogpt.storage import Destination, file_stem
from prefect_nanogpt.tasks.retries import JITTER, may_help

__all__ = ["download_to", "save_audio", "save_content"]

RETRY_DELAYS_SECONDS: Final[list[float]] = [1, 4, 15]


@task(
    name="save-audio",
    task_run_name="save {name}",
    description="Download a finished job's audio, verify it, and move it into place.",
    retries=len(RETRY_DELAYS_SECONDS),
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=may_help,
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def save_audio(
    audio: Completed | AudioContent,
    name: str,
    save_to: str | PathLike[str] = "audio",
    credentials: NanoGPTCredentials | str | None = None,
) -> AudioFile:
    """Save the audio of a finished job: streamed, verified, and in its place only when whole.

    The audio host gets no API key. What is not audio, has no sound in it or ends before its own headers say never gets
    the final name, and is downloaded again; with the extra `audio` a decoder plays it to tell. Other audio that has the
    name is kept beside, as `<name>.<first letters of its digest>.<extension>`.

    Args:
        audio: The finished job, as `get_tts_status` or `submit_tts` returned it.
        name: What to call the file, without extension; use the run id. Made safe for a file name.
        save_to: A folder, an fsspec URL such as `s3://bucket/speech`, or a block as `remote-file-system/NAME`.
        credentials: The credentials, or the name of their block, which decide only whether plain http is acceptable.

    Returns:
        Where the audio is, with its container, size, digest and, with the extra `audio`, duration and outline.

    Raises:
        AudioError: The audio cannot be fetched, or is not audio.
        StorageError: It cannot be written to `save_to`.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.models import AudioFile, Completed, Ticket
        from prefect_nanogpt.tasks import get_tts_status, save_audio

        @flow
        async def fetch(ticket: Ticket) -> AudioFile | None:
            status = await get_tts_status(ticket)
            return await save_audio(status, name=ticket.run_id) if isinstance(status, Completed) else None
        ```
    """
    place = Destination(save_to)
    stem = file_stem(name)
    if isinstance(audio, AudioContent):
        return await save_content(audio, stem, place)
    async with nanogpt_client(credentials) as client:
        return await download_to(place, client, audio, stem)


async def save_content(audio: AudioContent, stem: str, place: Destination) -> AudioFile:
    """Save audio that came as the answer to a submission. What is wrong with it stays wrong, however often tried."""

    async def content() -> AsyncIterator[bytes]:
        yield audio.content

    try:
        return await place.save(content(), stem)
    except AudioError as error:
        error.retryable = False
        raise


async def download_to(place: Destination, client: NanoGPTClient, audio: Completed, stem: str) -> AudioFile:
    """Download audio into a folder."""
    async with client.download(audio.audio_url) as response:
        length = response.headers.get("content-length")
        is_hummed = "x-sandbox-hums" in response.headers
        saved = await place.save(response.aiter_raw(), stem, expected_bytes=int(length) if length else None)
    if is_hummed:
        run_logger().warning(HUMMED)
    source_url, _ = split_login(audio.audio_url)
    known = {"cost": audio.cost, "currency": audio.currency, "source_url": source_url, "is_hummed": is_hummed}
    return saved.model_copy(update=known)
