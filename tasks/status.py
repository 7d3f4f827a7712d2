"""The status of a job, as a task."""

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Final

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.models import Pending, Ticket, TTSStatus
from prefect_nanogpt.tasks.retries import JITTER, LONGEST_RETRY_AFTER_SECONDS, may_help

__all__ = ["get_tts_status", "poll_once"]

poll_number: ContextVar[int | None] = ContextVar("nanogpt_poll_number", default=None)
"""Which poll of a wait it is, for its name: to make another task with that name takes longer than the poll."""


def run_name() -> str:
    """Name a task run by its number, where whoever waits has counted."""
    number = poll_number.get()
    return "poll" if number is None else f"poll {number}"


# Two minutes in all: an outage of a minute in the middle of a wait goes unnoticed.
RETRY_DELAYS_SECONDS: Final[list[float]] = [1, 2, 4, 8, 15, 30, 30, 30]


@task(
    name="get-tts-status",
    task_run_name=run_name,
    description="Poll a NanoGPT text-to-speech job, once.",
    retries=len(RETRY_DELAYS_SECONDS),
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=may_help,
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def get_tts_status(
    ticket: Ticket | Mapping[str, Any],
    credentials: NanoGPTCredentials | str | None = None,
    max_retry_after_seconds: float = LONGEST_RETRY_AFTER_SECONDS,
) -> TTSStatus:
    """Poll a job: exactly one `GET /tts/status`, which costs nothing, with Prefect's retries around it.

    Retried are transport errors, 404 (for a job that was accepted just now), 408, 429, server errors and answers that
    are not a status. Not retried are other client errors and a daily cap. A rejected job is an answer, not an error.

    Args:
        ticket: The job; the provider's JSON of it will do.
        credentials: The credentials, or the name of their block; None for the environment, or else the block `default`.
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
    ticket = Ticket.model_validate(ticket)
    async with nanogpt_client(credentials) as client:
        status = await poll_once(client, ticket, max_retry_after_seconds)
    context = TaskRunContext.get()
    if context is not None and isinstance(status, Pending) and status.queue_position is not None:
        # The state that the run ends in carries its name, so this costs no request.
        context.task_run.name += f", queue {status.queue_position}"
    return status


async def poll_once(client: NanoGPTClient, ticket: Ticket, max_retry_after_seconds: float) -> TTSStatus:
    """Make one status call, and say of a failure whether it is worth waiting for."""
    try:
        return await client.status(ticket)
    except NanoGPTError as error:
        error.ticket = ticket
        if (wait := error.retry_after_seconds) is not None and wait > max_retry_after_seconds:
            error.retryable = False
            error.message += f" The provider asks to come back in {wait:.0f} s, which is longer than may be waited."
        raise
