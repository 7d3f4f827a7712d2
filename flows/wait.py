"""From a ticket to verified audio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Final, cast

import anyio
from prefect import flow
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger
from prefect.logging.handlers import APILogHandler

from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import (
    NanoGPTError,
    TTSJobRejected,
)
from prefect_nanogpt.flows.ending import failed
from prefect_nanogpt.flows.forms import ArtifactKey, Credentials, SaveTo, Schedule, TimeoutSeconds, titled
from prefect_nanogpt.models import AudioFile, Pending, PollSchedule, Ticket, TTSStatus
from prefect_nanogpt.report import Report, resume_command
from prefect_nanogpt.storage import Destination, file_stem
from prefect_nanogpt.tasks.audio import save_audio
from prefect_nanogpt.tasks.retries import LONGEST_RETRY_AFTER_SECONDS
from prefect_nanogpt.tasks.status import get_tts_status, until_completed

__all__ = ["wait_for_tts"]

LAST_WORD_SECONDS: Final = 5.0
"""A process that is told to stop is killed soon: Prefect gives a cancelled run 30 s, others give less."""


@flow(
    name="wait-for-tts",
    description="Wait for a NanoGPT text-to-speech job and save its audio.",
    flow_run_name="tts-{ticket.model}-{ticket.run_id:.8}",
    persist_result=True,
)
async def wait_for_tts(
    ticket: Annotated[Ticket, titled("Ticket")],
    save_to: SaveTo = "audio",
    credentials: Credentials = None,
    timeout_seconds: TimeoutSeconds = 600.0,
    poll: Schedule = PollSchedule(),  # noqa: B008 - immutable
    artifact_key: ArtifactKey = "tts-audio",
) -> AudioFile:
    """Wait for a job until its audio is saved and verified.

    A run for a ticket whose audio is already in `save_to` returns it without a request. A run that ends without audio
    says in its artifact how to resume: the ticket stays good.

    Args:
        ticket: The provider's answer to the submission, as it is.
        save_to: A folder, an fsspec URL such as `s3://bucket/speech`, or a block as `remote-file-system/NAME`.
        credentials: The credentials; None for the saved block `default`, or else the environment.
        timeout_seconds: How long to wait for the job in all, in seconds.
        poll: The pauses between two status calls.
        artifact_key: The key of the report; lower-case letters, digits and dashes.

    Returns:
        Where the audio is, and what it is.

    Raises:
        TTSJobRejected: The provider gave up on the job. The run's state is named by its code, and no retries are made.
        ContentPolicyViolation: The provider refused the text; the state is named `CONTENT_POLICY_VIOLATION`.
        TTSTimeout: The job was still under way at the deadline; the state is named `TTS_TIMEOUT`.
        ProviderError: The job's status could not be had.
        AudioError: The audio could not be fetched, or is not audio.
        StorageError: The audio cannot be written to `save_to`.
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.flows import wait_for_tts

        @flow
        async def publish(ticket: dict) -> str:
            audio = await wait_for_tts(ticket, save_to="audio")
            return audio.location
        ```
    """
    report = Report(artifact_key, save_to, ticket)
    try:
        async with reporting_interruption(report):
            return await fetch_audio(
                ticket,
                report,
                save_to=save_to,
                credentials=credentials,
                timeout_seconds=timeout_seconds,
                schedule=poll,
            )
    except NanoGPTError as error:
        error.ticket = ticket
        await report.failed(error)
        final = isinstance(error, TTSJobRejected) or not error.retryable
        return cast(AudioFile, await failed(error, final=final))


async def fetch_audio(
    ticket: Ticket,
    report: Report,
    *,
    save_to: str,
    credentials: NanoGPTCredentials | None,
    timeout_seconds: float,
    schedule: PollSchedule,
    look_at_once: bool = True,
) -> AudioFile:
    """Wait for a job and save its audio, as a part of a run; what fails is raised and not yet reported.

    Args:
        ticket: The job.
        report: What to show of it.
        save_to: A folder or an fsspec URL.
        credentials: The credentials, or None to find them.
        timeout_seconds: The deadline, in seconds from now.
        schedule: The pauses between two status calls.
        look_at_once: False for a job that was accepted just now, which cannot be finished yet.
    """
    logger = get_run_logger()
    destination = Destination(save_to)
    if saved := await destination.find(file_stem(ticket.run_id)):
        audio = of_ticket(saved, ticket)
        logger.info("Job %s is already saved at %s.", ticket.run_id, audio.location)
        await report.finished(audio, "The audio was saved by an earlier run.")
        return audio
    await destination.check()
    async with nanogpt_client(credentials):
        logger.info("Waiting for job %s on %s, at most %g s.", ticket.run_id, ticket.model, timeout_seconds)
        await report.waiting(timeout_seconds)
        look = _Look(ticket, credentials, report)
        outcome = await until_completed(
            ticket, look, schedule=schedule, timeout_seconds=timeout_seconds, look_at_once=look_at_once
        )
        logger.info("Completed after %.1f s and %d status calls.", outcome.seconds, outcome.polls)
        try:
            saved = await save_audio(outcome.status, name=ticket.run_id, save_to=save_to, credentials=credentials)
        except NanoGPTError as error:
            error.ticket = ticket
            raise
    audio = of_ticket(saved, ticket).model_copy(update={"polls": outcome.polls, "waited_seconds": outcome.seconds})
    logger.info("Saved %s (%s bytes, %s).", audio.location, f"{audio.size_bytes:,}", audio.container)
    await report.finished(audio)
    return audio


def of_ticket(audio: AudioFile, ticket: Ticket) -> AudioFile:
    """Add to audio which job it is of, and what that cost."""
    return audio.model_copy(
        update={
            "ticket": ticket,
            "cost": ticket.cost if ticket.cost is not None else audio.cost,
            "currency": ticket.payment_source or audio.currency,
        }
    )


class _Look:
    """One look at a job through the status task, telling log and report when something has changed."""

    def __init__(self, ticket: Ticket, credentials: NanoGPTCredentials | None, report: Report) -> None:
        self._ticket = ticket
        self._credentials = credentials
        self._report = report
        self._last: Pending | None = None

    async def __call__(self, seconds_left: float) -> TTSStatus:
        status = await get_tts_status(
            self._ticket,
            self._credentials,
            max_retry_after_seconds=min(seconds_left, LONGEST_RETRY_AFTER_SECONDS),
        )
        if isinstance(status, Pending) and status != self._last:
            await self._tell(status)
            self._last = status
        return status

    async def _tell(self, status: Pending) -> None:
        logger = get_run_logger()
        if not status.is_known and (self._last is None or status.word != self._last.word):
            logger.warning("The provider calls the job %r, which is not documented. Waiting on.", status.word)
        if status.queue_position is not None:
            logger.info("Queue position %d.", status.queue_position)
        else:
            logger.info("The job is %s.", status.word)
        await self._report.progress(status)


@asynccontextmanager
async def reporting_interruption(report: Report) -> AsyncIterator[None]:
    """Where the run is cancelled or its process told to stop, make how to resume its last word."""
    try:
        yield
    except (asyncio.CancelledError, TerminationSignal):
        if report.ticket is not None:
            with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_WORD_SECONDS):
                get_run_logger().warning(
                    "Stopped while waiting. The job is paid for and goes on. Retry this run, or: %s",
                    resume_command(report.ticket),
                )
                await report.interrupted()
                # What ends the process next may be a signal, which leaves nobody to send the logs.
                await APILogHandler.aflush()
        raise
