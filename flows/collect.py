"""Tickets whose runs ended too early: look at each once more, and settle what can be settled.

The reports of the runs are the ledger. As long as neither audio nor a rejection is known, a report carries its ticket
in its metadata; whoever settles the ticket writes so into the same report, and then it carries none.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Final, Literal, cast

from prefect import flow
from prefect.artifacts import acreate_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort
from prefect.logging import get_run_logger
from pydantic import BaseModel, ValidationError

from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import NanoGPTError, TTSJobRejected
from prefect_nanogpt.flows.ending import failed
from prefect_nanogpt.flows.forms import ArtifactKey, Credentials, titled
from prefect_nanogpt.flows.wait import of_ticket
from prefect_nanogpt.models import AudioFile, Completed, Rejected, Ticket
from prefect_nanogpt.report import OPEN_TICKET, OPEN_UNTIL, SAVE_TO, Report
from prefect_nanogpt.storage import Destination, file_stem
from prefect_nanogpt.tasks.audio import save_audio
from prefect_nanogpt.tasks.status import get_tts_status, rejection

__all__ = ["CollectedTicket", "collect_open_tickets"]

LOOKS_AT_ONCE: Final = 8
PAGE: Final = 200
GRACE: Final = timedelta(minutes=5)
"""A run that is still said to be running so long after its deadline has lost its process."""


class CollectedTicket(BaseModel):
    """What became of an open ticket.

    Attributes:
        run_id: The provider's id of the job.
        model: The model of the job.
        cost: What was charged, in the unit of the payment source.
        outcome: `saved`, `rejected`, `pending` (left for the next time) or `failed` (could not be looked at or saved).
        detail: Where the audio is, or the code and the reason.
        flow_runs: The names of the runs that ended with this ticket open.
    """

    run_id: str
    model: str
    cost: Decimal | None
    outcome: Literal["saved", "rejected", "pending", "failed"]
    detail: str
    flow_runs: list[str]


@flow(
    name="collect-open-tickets",
    description="Look once at each job whose run ended without audio or rejection, and settle it.",
    flow_run_name="collect-open-tickets",
    persist_result=True,
)
async def collect_open_tickets(
    credentials: Credentials = None,
    lookback_days: Annotated[float, titled("Look back, in days", gt=0)] = 7.0,
    artifact_key: ArtifactKey = "tts-open-tickets",
) -> list[CollectedTicket]:
    """Settle the jobs that were paid for and whose runs timed out, crashed or were cancelled. Made to be scheduled.

    Each is looked at once, which is also what asks the provider for the refund of a rejected job. Audio that is ready
    goes to where its run would have saved it. The report of the run is brought up to date, so that the next collection
    passes it over; what is still under way is left for the next time.

    Args:
        credentials: The credentials; None for the saved block `default`, or else the environment.
        lookback_days: How long ago a run may have started, in days.
        artifact_key: The key of the table of what was found and done.

    Returns:
        What became of each open ticket, in the order of their runs, latest first.

    Raises:
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect_nanogpt.flows import collect_open_tickets

        collect_open_tickets.serve(name="hourly", cron="0 * * * *")
        ```
    """
    try:
        found = await _open_reports(datetime.now(UTC) - timedelta(days=lookback_days))
        get_run_logger().info("%d open tickets.", len(found))
        gate = asyncio.Semaphore(LOOKS_AT_ONCE)
        async with nanogpt_client(credentials):
            collected = await asyncio.gather(
                *(_collect(ticket, reports, credentials, gate) for ticket, reports in found)
            )
    except NanoGPTError as error:
        return cast(list[CollectedTicket], await failed(error, final=not error.retryable))
    await acreate_table_artifact(
        table=[row.model_dump(mode="json") for row in collected],
        key=artifact_key,
        description=f"{len(collected)} open tickets",
    )
    return collected


class _OpenReport(BaseModel):
    """A report that carries an open ticket, and the run that it belongs to."""

    artifact: Artifact
    flow_run: FlowRun
    save_to: str


async def _open_reports(since: datetime) -> list[tuple[Ticket, list[_OpenReport]]]:
    """Find the reports of ended runs that still carry their ticket; several runs may have waited for the same one."""
    tickets: dict[str, Ticket] = {}
    reports: dict[str, list[_OpenReport]] = defaultdict(list)
    async with get_client() as client:
        offset = 0
        while page := await client.read_artifacts(
            artifact_filter=ArtifactFilter(type={"any_": ["markdown"]}),
            flow_run_filter=FlowRunFilter(
                state={"type": {"any_": ["FAILED", "CRASHED", "CANCELLED", "RUNNING"]}},
                start_time={"after_": since},
            ),
            sort=ArtifactSort.CREATED_DESC,
            limit=PAGE,
            offset=offset,
        ):
            offset += len(page)
            for artifact in page:
                metadata = artifact.metadata_ or {}
                if OPEN_TICKET not in metadata or artifact.flow_run_id is None:
                    continue
                flow_run = await client.read_flow_run(artifact.flow_run_id)
                if _may_be_alive(flow_run, metadata):
                    continue
                try:
                    ticket = Ticket.model_validate_json(metadata[OPEN_TICKET])
                except ValidationError:
                    get_run_logger().warning("The report of run %s has a ticket that cannot be read.", flow_run.name)
                    continue
                tickets.setdefault(ticket.run_id, ticket)
                reports[ticket.run_id].append(
                    _OpenReport(artifact=artifact, flow_run=flow_run, save_to=metadata.get(SAVE_TO, "audio"))
                )
    return [(ticket, reports[run_id]) for run_id, ticket in tickets.items()]


def _may_be_alive(flow_run: FlowRun, metadata: dict[str, str]) -> bool:
    if flow_run.state is None or not flow_run.state.is_running():
        return False
    until = metadata.get(OPEN_UNTIL)
    return until is None or datetime.now(UTC) < datetime.fromisoformat(until) + GRACE


async def _collect(
    ticket: Ticket, found: list[_OpenReport], credentials: NanoGPTCredentials | None, gate: asyncio.Semaphore
) -> CollectedTicket:
    outcome: Literal["saved", "rejected", "pending", "failed"]
    reports = [
        Report.of(open.artifact, open.save_to, ticket, text=open.flow_run.parameters.get("text")) for open in found
    ]
    async with gate:
        try:
            audio = await _look_once(ticket, found[0].save_to, credentials)
        except TTSJobRejected as error:
            outcome, detail = "rejected", str(error)
            for report in reports:
                await report.failed(error)
        except NanoGPTError as error:
            outcome, detail = "failed", str(error)
        else:
            if audio is None:
                outcome, detail = "pending", "still under way"
            else:
                outcome, detail = "saved", audio.location
                audio = of_ticket(audio, ticket)
                for report in reports:
                    await report.finished(audio, "The audio was collected after the run had ended.")
    get_run_logger().info("Job %s: %s, %s.", ticket.run_id, outcome, detail)
    return CollectedTicket(
        run_id=ticket.run_id,
        model=ticket.model,
        cost=ticket.cost,
        outcome=outcome,
        detail=detail,
        flow_runs=[open.flow_run.name for open in found],
    )


async def _look_once(ticket: Ticket, save_to: str, credentials: NanoGPTCredentials | None) -> AudioFile | None:
    """Give the audio of a job, None while it is under way."""
    if audio := await Destination(save_to).find(file_stem(ticket.run_id)):
        return audio
    status = await get_tts_status.with_options(retries=1)(ticket, credentials)
    if isinstance(status, Rejected):
        raise rejection(status, ticket)
    if not isinstance(status, Completed):
        return None
    return await save_audio(status, name=ticket.run_id, save_to=save_to, credentials=credentials)
