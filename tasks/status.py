"""The status of a job, as a task; and the wait for its end, as one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import ContentPolicyViolation, NanoGPTError, TTSJobRejected, TTSTimeout
from prefect_nanogpt.models import Completed, Pending, PollSchedule, Rejected, Ticket, TTSStatus
from prefect_nanogpt.polling import DeadlinePassed, Outcome, poll
from prefect_nanogpt.report import resume_command
from prefect_nanogpt.tasks.labels import named_by_step
from prefect_nanogpt.tasks.limits import stay_under_rate_limit
from prefect_nanogpt.tasks.retries import JITTER, LONGEST_RETRY_AFTER_SECONDS, is_worth_another_try, may_help

__all__ = ["get_tts_status", "rejection", "until_completed", "wait_for_job"]

# Two minutes in all: an outage of a minute in the middle of a wait is nobody's business.
RETRY_DELAYS_SECONDS: Final[list[float]] = [1, 2, 4, 8, 15, 30, 30, 30]


@task(
    name="get-tts-status",
    description="Look at a NanoGPT text-to-speech job, once.",
    retries=len(RETRY_DELAYS_SECONDS),
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=may_help,
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def get_tts_status(
    ticket: Ticket,
    credentials: NanoGPTCredentials | None = None,
    max_retry_after_seconds: float = LONGEST_RETRY_AFTER_SECONDS,
) -> TTSStatus:
    """Look at a job: exactly one `GET /tts/status`, which costs nothing, with Prefect's retries around it.

    Retried are transport errors, 404 (for a job that was accepted just now), 408, 429, server errors and answers that
    are not a status. Not retried are other client errors and a daily cap. A rejected job is an answer, not an error.

    Args:
        ticket: The job.
        credentials: The credentials; None for the saved block `default`, or else the environment.
        max_retry_after_seconds: The longest `Retry-After` to wait for, in seconds; with a longer one the task fails at
            once. Never more than 60.

    Returns:
        `Pending`, `Completed` (with the URL of the audio) or `Rejected` (with the provider's code).

    Raises:
        ProviderError: There was no status, for longer than the retries last or for a reason that they cannot mend.
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.models import Completed, Ticket
        from prefect_nanogpt.tasks import get_tts_status

        @flow
        async def is_it_ready(ticket: Ticket) -> bool:
            return isinstance(await get_tts_status(ticket), Completed)
        ```
    """
    async with nanogpt_client(credentials) as client:
        await stay_under_rate_limit()
        try:
            return await client.status(ticket)
        except NanoGPTError as error:
            error.ticket = ticket
            if (wait := error.retry_after_seconds) is not None and wait > max_retry_after_seconds:
                error.retryable = False
                error.message += f" The provider asks to come back in {wait:.0f} s, which is longer than may be waited."
            raise


@task(
    name="wait-for-job",
    task_run_name=named_by_step("wait"),
    description="Wait for the end of a NanoGPT text-to-speech job.",
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def wait_for_job(
    ticket: Ticket,
    credentials: NanoGPTCredentials | None = None,
    *,
    timeout_seconds: float = 600.0,
    schedule: PollSchedule = PollSchedule(),  # noqa: B008 - immutable
    look_at_once: bool = True,
) -> Completed:
    """Wait for a job as a single task run, which makes a thousand jobs a thousand rows and not ten thousand.

    Status calls that fail are made again for the same reasons and after the same pauses as in `get_tts_status`.

    Args:
        ticket: The job.
        credentials: The credentials; None for the saved block `default`, or else the environment.
        timeout_seconds: How long to wait in all, in seconds.
        schedule: The pauses between two status calls.
        look_at_once: False for a job that was accepted just now, which cannot be finished yet.

    Returns:
        The finished job, with the URL of its audio.

    Raises:
        TTSJobRejected: The provider gave up on the job; a `ContentPolicyViolation` where it refused the text.
        TTSTimeout: The job was still under way at the deadline.
        ProviderError: Its status could not be had.
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.models import Ticket
        from prefect_nanogpt.tasks import wait_for_job

        @flow
        async def url_of(ticket: Ticket) -> str:
            return (await wait_for_job(ticket, timeout_seconds=120)).audio_url
        ```
    """

    async def look(seconds_left: float) -> TTSStatus:
        attempts = 0
        while True:
            await stay_under_rate_limit()
            try:
                return await client.status(ticket)
            except NanoGPTError as error:
                attempts += 1
                error.ticket = ticket
                longest = min(seconds_left, LONGEST_RETRY_AFTER_SECONDS)
                if (
                    attempts > len(RETRY_DELAYS_SECONDS)
                    or not is_worth_another_try(error, attempts)
                    or (error.retry_after_seconds or 0) > longest
                ):
                    raise
                pause = RETRY_DELAYS_SECONDS[attempts - 1] * (1 + JITTER * random.random())
                await asyncio.sleep(max(pause, error.retry_after_seconds or 0))

    async with nanogpt_client(credentials) as client:
        outcome = await until_completed(
            ticket, look, schedule=schedule, timeout_seconds=timeout_seconds, look_at_once=look_at_once
        )
    return outcome.status


async def until_completed(
    ticket: Ticket,
    look: Callable[[float], Awaitable[TTSStatus]],
    *,
    schedule: PollSchedule,
    timeout_seconds: float,
    look_at_once: bool,
) -> Outcome[Completed]:
    """Look at a job until it is completed; how to look is the caller's.

    Raises:
        TTSJobRejected: The provider gave up on the job; a `ContentPolicyViolation` where it refused the text.
        TTSTimeout: The job was still under way at the deadline.
    """
    try:
        outcome = await poll(
            look,
            is_final=lambda status: not isinstance(status, Pending),
            schedule=schedule,
            timeout_seconds=timeout_seconds,
            look_at_once=look_at_once,
        )
    except DeadlinePassed as passed:
        raise TTSTimeout(
            f"Job {ticket.run_id} was still under way after {passed.seconds:.0f} s and {passed.polls} status calls. "
            f"It is paid for and goes on: {resume_command(ticket)}",
            ticket=ticket,
            retryable=True,
        ) from None
    status = outcome.status
    if isinstance(status, Rejected):
        raise rejection(status, ticket)
    assert isinstance(status, Completed)
    return Outcome(status, outcome.polls, outcome.seconds)


def rejection(status: Rejected, ticket: Ticket) -> TTSJobRejected:
    """Make the exception of a rejected job."""
    kind = ContentPolicyViolation if status.is_content_policy else TTSJobRejected
    return kind(status.message, code=status.code, ticket=ticket)
