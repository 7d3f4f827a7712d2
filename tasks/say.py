"""A whole job as one task run; and the two ways of making its steps."""

from collections.abc import Awaitable, Callable, Sequence
from decimal import Decimal
from typing import Any

from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Failed
from prefect.utilities.annotations import quote

from prefect_nanogpt.budget import Budget
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import NanoGPTCredentials
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.job import Said, Steps, Submitted, Terms, say, submit
from prefect_nanogpt.ledger import Entry, Job
from prefect_nanogpt.models import AudioContent, AudioFile, Completed, Pending, Ticket, TTSStatus
from prefect_nanogpt.report import Report
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import audio as saving
from prefect_nanogpt.tasks import status as polling
from prefect_nanogpt.tasks import submit as submitting
from prefect_nanogpt.tasks.retries import LONGEST_RETRY_AFTER_SECONDS, with_retries

__all__ = ["PlainSteps", "TaskSteps", "say_in_one_task"]


@task(
    name="say",
    task_run_name="say {name}",
    description="Submit a text, wait for its job and save the audio.",
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def say_as_task(name: str, call: Callable[[], Awaitable[Said]]) -> Said | State[Any]:
    """Make one job in one task run, whose state is named by the end of the job.

    A failure is returned and not raised, so that the log has a line of it and no traceback.
    """
    try:
        return await call()
    except NanoGPTError as error:
        return Failed(name=error.code, message=str(error), data=error)


async def say_in_one_task(name: str, job: Job, terms: Terms, steps: Steps, entry: Entry | None = None) -> Said:
    """Get the audio of a job as `say` does, in a task run called `say <name>`.

    Raises:
        NanoGPTError: As `say` does.
    """
    # Quoted, since Prefect would look for futures in everything that a job refers to.
    call: Any = say_as_task(name, quote(lambda: say(job, terms, steps, entry)), return_state=True)
    state: State[Said] = await call
    return await state.aresult()


class PlainSteps:
    """The steps of a job as plain calls, with the retries that the tasks have.

    Args:
        terms: What the jobs have in common.
        client: The client.
        budget: What may be spent.
        poll_delays: The pauses between the retries of a failing status call, in seconds.
    """

    def __init__(
        self,
        terms: Terms,
        client: NanoGPTClient,
        budget: Budget | None = None,
        poll_delays: Sequence[float] = polling.RETRY_DELAYS_SECONDS,
    ) -> None:
        self._terms = terms
        self._client = client
        self._budget = budget
        self._poll_delays = poll_delays

    async def submit(self, job: Job, entry: Entry) -> Submitted:
        """Submit a job."""
        known: list[Entry | None] = [entry]

        async def call() -> Submitted:
            return await submit(
                job,
                self._terms.ledger,
                self._client,
                resubmit=self._terms.resubmit,
                entry=known.pop() if known else None,
                budget=self._budget,
                log_ticket=False,
            )

        return await with_retries(call, submitting.RETRY_DELAYS_SECONDS)

    async def poll(self, ticket: Ticket, seconds_left: float) -> TTSStatus:
        """Ask for the status of a job once."""
        longest = min(seconds_left, LONGEST_RETRY_AFTER_SECONDS)
        return await with_retries(lambda: polling.poll_once(self._client, ticket, longest), self._poll_delays)

    async def save(self, audio: Completed | AudioContent, stem: str, place: Destination) -> AudioFile:
        """Save finished audio."""
        if isinstance(audio, AudioContent):
            return await saving.save_content(audio, stem, place)
        return await with_retries(
            lambda: saving.download_to(place, self._client, audio, stem), saving.RETRY_DELAYS_SECONDS
        )

    async def waits(self, ticket: Ticket) -> None:
        """Tell nobody: what is said of many jobs is said of all of them together."""


class TaskSteps:
    """The steps of a job as a task run each, told in the run's report and log.

    Args:
        terms: What the job is made by.
        credentials: The credentials.
        report: The report of the run.
        max_cost: The most that the job may cost, in USD.
    """

    def __init__(
        self,
        terms: Terms,
        credentials: NanoGPTCredentials | str | None,
        report: Report,
        max_cost: Decimal | None = None,
    ) -> None:
        self._terms = terms
        self._credentials = credentials
        self._report = report
        self._max_cost = max_cost
        self._polls = 0
        self._last: Pending | None = None

    async def submit(self, job: Job, entry: Entry) -> Submitted:
        """Submit a job."""
        assert job.request is not None
        submission = await submitting.submit_tts(
            job.request,
            self._terms.ledger.destination.save_to,
            self._credentials,
            take=job.take,
            resubmit=self._terms.resubmit,
            max_cost=self._max_cost,
            name=job.name,
        )
        return Submitted(submission, await self._terms.ledger.run(self._terms.ledger.try_of, job.id, submission))

    async def waits(self, ticket: Ticket) -> None:
        """Show the ticket, before anything can happen to this process."""
        self._report.ticket = ticket
        seconds = self._terms.timeout_seconds
        run_logger().info("Waiting for job %s on %s, at most %g s.", ticket.run_id, ticket.model, seconds)
        await self._report.waiting()

    async def poll(self, ticket: Ticket, seconds_left: float) -> TTSStatus:
        """Ask for the status of a job once, and tell when something has changed."""
        self._polls += 1
        number = polling.poll_number.set(self._polls)
        try:
            status = await polling.get_tts_status(
                ticket,
                self._credentials,
                max_retry_after_seconds=min(seconds_left, LONGEST_RETRY_AFTER_SECONDS),
            )
        finally:  # what is polled afterwards in the same context is not of this wait
            polling.poll_number.reset(number)
        if isinstance(status, Pending) and status != self._last:
            await self._tell(status)
            self._last = status
        return status

    async def save(self, audio: Completed | AudioContent, stem: str, place: Destination) -> AudioFile:
        """Save finished audio."""
        if self._report.ticket is None:
            self._report.paid = "The text is paid for."
        saved = await saving.save_audio(audio, name=stem, save_to=place.save_to, credentials=self._credentials)
        run_logger().info("Saved %s (%s bytes, %s).", saved.location, f"{saved.size_bytes:,}", saved.container)
        return saved

    async def _tell(self, status: Pending) -> None:
        if not status.is_known and (self._last is None or status.word != self._last.word):
            run_logger().warning("The provider calls the job %r, which is not documented. Waiting on.", status.word)
        if status.queue_position is not None:
            run_logger().info("Queue position %d.", status.queue_position)
        else:
            run_logger().info("The job is %s.", status.word)
        await self._report.progress(status)
