"""Jobs that are paid for and that nobody has seen to their end: poll each once more, and settle what can be settled."""

import asyncio
import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias, cast

import httpx
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, TaskRunFilter
from pydantic import BaseModel

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import nanogpt_client
from prefect_nanogpt.errors import NanoGPTError, ProviderError, StorageError, SubmissionUncertain, TTSJobRejected
from prefect_nanogpt.events import RunReference, run_logger
from prefect_nanogpt.flows.ending import PLAIN_JSON, failed, keep_result
from prefect_nanogpt.flows.forms import ArtifactKey, Credentials, titled
from prefect_nanogpt.job import Said, Terms, settle
from prefect_nanogpt.ledger import Entry, Job, Ledger
from prefect_nanogpt.models import Ticket
from prefect_nanogpt.report import Artifact, Report, quietly
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks.ledgers import LABEL
from prefect_nanogpt.tasks.say import PlainSteps

__all__ = ["CollectedTicket", "collect_open_tickets"]

JOBS_AT_ONCE: Final = 8
REQUESTS_PER_SECOND: Final = 10.0
POLL_DELAYS_SECONDS: Final = (1.0,)
"""What cannot be polled now is polled by the next collection."""
PAGE: Final = 200
OWN_FLOWS: Final = ["text-to-speech", "text-to-speech-batch", "wait-for-tts"]

Outcome: TypeAlias = Literal["saved", "rejected", "lost", "pending", "uncertain", "failed", "unreachable"]


class CollectedTicket(BaseModel):
    """What became of an open job.

    Attributes:
        outcome: `saved`; `rejected` by the provider; `lost` (the provider does not know it any more); `pending` (left
            for the next time); `uncertain` (nobody knows whether it was accepted); `failed` (could not be polled or
            saved now); `unreachable` (its ledger is in a folder that this machine does not have).
        detail: Where the audio is, or the code and the reason.
        run_id: The provider's id of the job; None for a model that answers at once.
        model: The model of the job.
        cost: What was charged, in the unit of the payment source.
        flow_runs: The names of the runs that submitted it or waited for it.
    """

    outcome: Outcome
    detail: str
    run_id: str | None = None
    model: str | None = None
    cost: Decimal | None = None
    flow_runs: list[str]


@flow(
    name="collect-open-tickets",
    description="Poll each job once that is paid for and has no end yet, and settle it.",
    flow_run_name="collect-open-tickets",
    persist_result=False,
    result_serializer=PLAIN_JSON,
)
async def collect_open_tickets(
    credentials: Credentials = None,
    folders: Annotated[Sequence[str], titled("Folders")] = (),
    lookback_days: Annotated[float, titled("Look back, in days", gt=0, allow_inf_nan=False)] = 7.0,
    artifact_key: ArtifactKey = "tts-open-tickets",
) -> list[CollectedTicket]:
    """Settle the jobs that were paid for and that no run has seen to their end. Made to be scheduled.

    The ledgers of the named folders are read, and those of every run that used this package in the look-back. Each
    open job is polled once, whichever way it came about (a text, a part, a line, a ticket) and whatever its run is
    doing; that is also what asks the provider for the refund of a rejected job. Audio that is ready goes to where its
    run would have saved it. What is still under way is left for the next time. Nothing is submitted.

    Args:
        credentials: The credentials; None for the environment, or else the saved block `default`.
        folders: Folders, URLs or blocks to look in besides those that runs have used, as their `save_to` named them.
        lookback_days: How long ago a run may have started whose ledger is looked at, in days.
        artifact_key: The key of the table of what was found and done.

    Returns:
        What became of each open job.

    Raises:
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect_nanogpt.flows import collect_open_tickets

        collect_open_tickets.serve(name="hourly", cron="0 * * * *")
        ```
    """
    keep_result()
    try:
        places = await _places(folders, datetime.now(UTC) - timedelta(days=lookback_days))
        async with nanogpt_client(credentials) as client:
            client.requests_per_second = REQUESTS_PER_SECOND
            rows: list[CollectedTicket] = []
            found: list[_Open] = []
            for place, machine in places.items():
                try:
                    home = await asyncio.to_thread(Destination, place)
                    found += await home.run(_open_jobs, home, machine, client.base_url)
                except NanoGPTError as error:
                    rows.append(CollectedTicket(outcome="unreachable", detail=str(error), flow_runs=[]))
            run_logger().info("%d open jobs in %d ledgers.", len(found), len(places))
            gate = asyncio.Semaphore(JOBS_AT_ONCE)
            rows += await asyncio.gather(*(_collect(same, client, gate) for same in _by_run_id(found)))
    except NanoGPTError as error:
        return cast(list[CollectedTicket], await failed(error, final=not error.retryable))
    table = [
        {
            "outcome": row.outcome,
            "detail": row.detail,
            "run id": row.run_id or "",
            "model": row.model or "",
            "cost": f"{row.cost:f}" if row.cost is not None else "",
            "runs": ", ".join(row.flow_runs),
        }
        for row in rows
    ]
    await Artifact("table", artifact_key).show(json.dumps(table), f"{len(rows)} open jobs")
    return rows


async def _places(folders: Sequence[str], since: datetime) -> dict[str, str | None]:
    """Find the folders that have ledgers, and on which machine each was used."""
    places: dict[str, str | None] = {Destination(folder).save_to: None for folder in folders}
    filters: list[dict[str, Any]] = [{"flow_filter": FlowFilter(name={"any_": OWN_FLOWS})}]
    # Tasks in flows of other people's, and our flows under other names.
    filters += [{"task_run_filter": TaskRunFilter(name={"like_": name})} for name in ("submit-tts", "poll", "say-")]
    started = FlowRunFilter(start_time={"after_": since})
    async with get_client() as client:
        for filter in filters:
            offset = 0
            while page := await client.read_flow_runs(flow_run_filter=started, limit=PAGE, offset=offset, **filter):
                offset += len(page)
                for label, value in [item for flow_run in page for item in flow_run.labels.items()]:
                    if label.startswith(LABEL):
                        told = json.loads(str(value))
                        places.setdefault(told["place"], told["machine"])
    return places


@dataclass
class _Open:
    """An open job, as its notes tell of it."""

    job: Job
    entry: Entry
    ledger: Ledger
    model: str | None
    ticket: Ticket | None
    run: RunReference
    text: str | None


def _open_jobs(home: Destination, machine: str | None, provider: str) -> list[_Open]:
    """Read the open jobs of a ledger that are of the API that this run asks. Blocks.

    Raises:
        StorageError: The ledger cannot be read from here.
    """
    if home.is_local and machine not in (None, socket.gethostname()) and not Path(home.root).exists():
        raise StorageError(f"{home.save_to} is a folder of the machine {machine}: run the collection there as well.")
    here = Ledger(home)
    found = []
    for entry in here.entries().values():
        if not entry.is_open or (entry.is_in_the_air and here.may_still_be_answered(entry)):
            continue
        answer = here.read_note(entry.job, entry.last, "answer")
        note = {**answer, **here.read_note(entry.job, entry.last, "sent")}
        if note.get("provider", provider) != provider:
            run_logger().info("A job of %s is left alone, since this run asks %s.", note["provider"], provider)
            continue
        submission = here.submission(entry)
        ticket = submission if isinstance(submission, Ticket) else None
        found.append(
            _Open(
                job=Job(provider, name=note.get("name"), is_part=bool(note.get("is_part")), noted_as=entry.job),
                entry=entry,
                ledger=Ledger(Destination(note["save_to"]), home) if note.get("save_to") else here,
                model=ticket.model if ticket else note.get("model"),
                ticket=ticket,
                run=RunReference.model_validate(note.get("run") or {}),
                text=note.get("text"),
            )
        )
    return found


def _by_run_id(found: Sequence[_Open]) -> list[list[_Open]]:
    """Put together what is about the same job of the provider's: a text's job, and a wait for its ticket."""
    groups: dict[str, list[_Open]] = {}
    for job in found:
        groups.setdefault(job.ticket.run_id if job.ticket else job.entry.job, []).append(job)
    return list(groups.values())


async def _collect(same: Sequence[_Open], client: NanoGPTClient, gate: asyncio.Semaphore) -> CollectedTicket:
    first = same[0]
    async with gate:
        (outcome, detail), *_ = [await _settle(found, client) for found in same]
    run_id = first.ticket.run_id if first.ticket else None
    run_logger().info("Job %s: %s, %s", run_id or first.entry.job, outcome, detail)
    return CollectedTicket(
        outcome=outcome,
        detail=detail,
        run_id=run_id,
        model=first.model,
        cost=first.ticket.cost if first.ticket else None,
        flow_runs=sorted({found.run.name for found in same if found.run.name}),
    )


async def _settle(found: _Open, client: NanoGPTClient) -> tuple[Outcome, str]:
    """Poll a job once, note what came of it, and bring the report of its run up to date."""
    terms = Terms(found.ledger)
    steps = PlainSteps(terms, client, poll_delays=POLL_DELAYS_SECONDS)
    try:
        audio = await settle(found.job, terms, steps, found.entry)
    except SubmissionUncertain as error:
        return "uncertain", str(error)
    except NanoGPTError as error:
        is_lost = error.http_status == httpx.codes.NOT_FOUND and isinstance(error, ProviderError)
        if is_lost or isinstance(error, TTSJobRejected):
            await _update_report(found, error)
            return "lost" if is_lost else "rejected", str(error)
        return "failed", str(error)
    if audio is None:
        return "pending", "Still under way."
    await _update_report(found, Said(audio))
    return "saved", audio.location


async def _update_report(found: _Open, news: Said | NanoGPTError) -> None:
    """Tell in the report of the run that submitted a text what became of it."""
    if found.job.is_part or found.run.id is None:
        return
    report = await quietly(Report.of_run(found.run.id, found.ledger.destination.save_to, found.text))
    if report is None:
        return
    report.ticket = found.ticket
    if isinstance(news, Said):
        await report.finished(news)
    else:
        await report.failed(news)
