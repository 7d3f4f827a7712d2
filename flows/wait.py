"""From a ticket to verified audio."""

from dataclasses import replace
from typing import cast

from prefect.runtime import flow_run as this_flow_run

from prefect_nanogpt.credentials import nanogpt_client
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.flows.ending import PLAIN_JSON, failed, given_name, keep_result, reporting_interruption
from prefect_nanogpt.flows.forms import (
    ArtifactKey,
    Credentials,
    FileName,
    PaidTicket,
    SaveTo,
    Schedule,
    TimeoutSeconds,
    flow,
    has_form,
)
from prefect_nanogpt.job import Said, Terms, find, say
from prefect_nanogpt.ledger import Job
from prefect_nanogpt.models import AudioFile, PollSchedule, Ticket
from prefect_nanogpt.report import Report
from prefect_nanogpt.storage import absolute
from prefect_nanogpt.tasks.ledgers import open_ledger
from prefect_nanogpt.tasks.say import TaskSteps

__all__ = ["wait_for_tts"]


def run_name() -> str:
    """Name a run by the model and the beginning of the run id."""
    ticket = this_flow_run.parameters["ticket"]
    return given_name() or f"tts-{ticket.model}-{ticket.run_id:.8}"


@has_form("ticket", "save_to", "name", "credentials")
@flow(
    name="wait-for-tts",
    description="Wait for a NanoGPT text-to-speech job and save its audio.",
    flow_run_name=run_name,
    persist_result=False,
    result_serializer=PLAIN_JSON,
)
async def wait_for_tts(
    ticket: PaidTicket,
    save_to: SaveTo = "audio",
    credentials: Credentials = None,
    timeout_seconds: TimeoutSeconds = 600.0,
    poll: Schedule = PollSchedule(),  # noqa: B008 - immutable
    name: FileName = None,
    artifact_key: ArtifactKey = "tts-audio",
) -> AudioFile:
    """Wait for a job until its audio is saved and verified.

    A run for a ticket whose audio is already in `save_to` returns it without a request. The ticket is noted in the
    ledger of `save_to`, so another run finds it, and `collect_open_tickets` saves the audio if none does.

    Args:
        ticket: The provider's answer to the submission, as it is; its JSON as a text will do.
        save_to: A folder, an fsspec URL such as `s3://bucket/speech`, or a block as `remote-file-system/NAME`.
        credentials: The credentials, or the name of their block; None for the environment, or else the block `default`.
        timeout_seconds: How long to wait for the job in all, in seconds.
        poll: The pauses between two status calls.
        name: What to call the file, without extension; None for the provider's run id.
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
        from prefect_nanogpt.models import Ticket

        @flow
        async def publish(ticket: Ticket) -> str:
            audio = await wait_for_tts(ticket, save_to="audio")
            return audio.location
        ```
    """
    keep_result()
    ticket = Ticket.model_validate(ticket)
    save_to = absolute(save_to)
    report = Report(artifact_key, save_to)
    report.ticket = ticket
    try:
        async with reporting_interruption(report, save_to):
            ledger, provider = await open_ledger(save_to, credentials)
            job = await ledger.run(ledger.open_job_of, provider, ticket) or Job(provider, ticket=ticket)
            job = replace(job, name=name or job.name)
            terms = Terms(ledger, timeout_seconds, poll)
            said = await find(job, terms, await ledger.run(ledger.entry, job.id))
            if said is None:
                if job.noted_as is None:
                    await ledger.run(ledger.note_ticket, job, ticket)
                said = await _wait(job, terms, credentials, report)
            await report.finished(said, ledger.destination)
            return said.audio
    except NanoGPTError as error:
        error.ticket = ticket
        await report.failed(error)
        return cast(AudioFile, await failed(error, final=not error.retryable))


async def _wait(job: Job, terms: Terms, credentials: Credentials, report: Report) -> Said:
    async with nanogpt_client(credentials):
        said = await say(job, terms, TaskSteps(terms, credentials, report))
    run_logger().info("Completed after %.1f s and %d status calls.", said.audio.waited_seconds, said.audio.polls)
    return said
