"""Saving a finished job's audio, as a task."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.models import AudioContent, AudioFile, Completed
from prefect_nanogpt.storage import Destination, file_stem
from prefect_nanogpt.tasks.labels import named_by_step
from prefect_nanogpt.tasks.retries import JITTER, may_help

__all__ = ["save_audio"]

RETRY_DELAYS_SECONDS: Final[list[float]] = [1, 4, 15]


@task(
    name="save-audio",
    task_run_name=named_by_step("save"),
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
    save_to: str = "audio",
    credentials: NanoGPTCredentials | None = None,
) -> AudioFile:
    """Save the audio of a finished job: streamed, verified, and in its place only when whole.

    The audio host gets no API key. What is not audio, empty or cut short never gets the final name.

    Args:
        audio: The finished job, as `get_tts_status` or `submit_tts` returned it.
        name: What to call the file, without extension; use the run id. Made safe for a file name.
        save_to: A folder, an fsspec URL such as `s3://bucket/speech`, or a block as `remote-file-system/NAME`.
        credentials: The credentials, which decide only whether plain http is acceptable.

    Returns:
        Where the audio is, with its container, size, digest and, where it can be told, duration.

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
    destination = Destination(save_to)
    stem = file_stem(name)
    if isinstance(audio, AudioContent):
        return await destination.save(_only(audio.content), stem)
    async with nanogpt_client(credentials) as client, client.download(audio.audio_url) as response:
        encoded = "content-encoding" in response.headers
        length = response.headers.get("content-length")
        saved = await destination.save(
            response.aiter_bytes(),
            stem,
            expected_bytes=int(length) if length and not encoded else None,
        )
    announced: dict[str, Any] = {"cost": audio.cost, "currency": audio.currency, "source_url": audio.audio_url}
    if saved.duration_seconds is None:
        announced["duration_seconds"] = audio.duration_seconds
    return saved.model_copy(update=announced)


async def _only(content: bytes) -> AsyncIterator[bytes]:
    yield content
