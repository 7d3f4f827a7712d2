"""Jobs that are paid for and that nobody has seen to their end: poll each once more, and settle what can be settled."""

import asyncio
import json
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias, cast, get_args

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter, TaskRunFilter
from pydantic import BaseModel, ValidationError

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import nanogpt_client, places_of
from prefect_nanogpt.errors import (
    NanoGPTError,
    ProviderError,
    StorageError,
    SubmissionUncertain,
    TTSJobRejected,
    without_login,
)
from prefect_nanogpt.events import RunReference, run_logger
from prefect_nanogpt.flows.ending import PLAIN_JSON, failed, given_name, keep_result
from prefect_nanogpt.flows.forms import ArtifactKey, Credentials, SaveTo, flow, has_form, titled
from prefect_nanogpt.job import Said, Terms, settle
from prefect_nanogpt.ledger import Entry, Job, Ledger, run_in
from prefect_nanogpt.models import (
    LONGEST_WORD,
    AudioContent,
    AudioFile,
    Completed,
    Submission,
    Ticket,
    one_line,
)
from prefect_nanogpt.report import Artifact, Report, quietly
from prefect_nanogpt.statement import cells
from prefect_nanogpt.storage import Destination, absolute
from prefect_nanogpt.tasks import status
from prefect_nanogpt.tasks.ledgers import LABEL, LedgerLabel
from prefect_nanogpt.tasks.retries import NOT_FOUND_ATTEMPTS
from prefect_nanogpt.tasks.say import PlainSteps

__all__ = ["CollectedTicket", "collect_open_tickets"]

JOBS_AT_ONCE: Final = 8
REQUESTS_PER_SECOND: Final = 10.0
PAGE: Final = 200
OWN_FLOWS: Final = ["text-to-speech", "text-to-speech-batch", "wait-for-tts"]

IF_A_LEDGER_IS_GONE: Final = (
    "Mount or restore it, or name in `folders` where it is now: a job that is open in it is not settled."
)

IF_IT_NEEDS_A_PASSWORD: Final = (
    "If it needs a password, name it with the password in `folders`, or give the password in the environment: runs "
    "leave no passwords behind."
)

Outcome: TypeAlias = Literal["saved", "pending", "rejected", "lost", "uncertain", "unreachable", "failed"]
"""From good to bad."""


class CollectedTicket(BaseModel):
    """What became of an open job.

    Attributes:
        outcome: `saved`; `pending` (left for the next time); `rejected` by the provider; `lost` (the provider does not
            know it, or no longer); `uncertain` (nobody knows whether it was accepted); `unreachable` (its ledger or its
            folder is not there, or on another machine); `failed` (could not be read, polled or saved now). The worst,
            in this order, where several folders wait for one job.
        detail: Where the audio is, or the code and the reason; of each folder, where several wait for one job.
        run_id: The provider's id of the job; None for a model that answers at once.
        model: The model of the job.
        cost: What was charged, in `currency`.
        currency: The unit of `cost`, where the provider said.
        text: The beginning of the text, where the notes have it.
        flow_runs: The names of the runs that submitted it or waited for it.
    """

    outcome: Outcome
    detail: str
    run_id: str | None = None
    model: str | None = None
    cost: Decimal | None = None
    currency: str | None = None
    text: str | None = None
    flow_runs: list[str]


@has_form("credentials", "folders", "lookback_days")
@flow(
    name="collect-open-tickets",
    description="Poll each job once that is paid for and has no end yet, and settle it.",
    flow_run_name=lambda: given_name() or "collect-open-tickets",
    persist_result=False,
    result_serializer=PLAIN_JSON,
)
async def collect_open_tickets(
    credentials: Credentials = None,
    folders: Annotated[Sequence[SaveTo], titled("Folders")] = (),
    lookback_days: Annotated[float, titled("Look back, in days", gt=0, le=36_500, allow_inf_nan=False)] = 7.0,
    artifact_key: ArtifactKey = "tts-open-tickets",
) -> list[CollectedTicket]:
    """Settle the jobs that were paid for and that no run has seen to their end. Made to be scheduled.

    The ledgers of the named folders are read, and those of every run that used this package in the look-back. Each
    open job is polled once, whichever way it came about (a text, a part, a line, a ticket) and whatever its run is
    doing; that is also what asks the provider for the refund of a rejected job. Audio that is ready goes to where its
    run would have saved it, and displaces nothing: where other audio has its name by now, it gets the name
    `<name>.<digest>.<extension>`. What is still under way is left for the next time. Jobs that were noted as lost
    within the look-back are asked for again. Nothing is submitted.

    Args:
        credentials: The credentials, or the name of their block; None for the environment, or else the block `default`.
        folders: Folders, URLs or blocks to look in besides those that runs have used, as their `save_to` named them.
            With them goes the ledger of `NANOGPT_LEDGER` or the credentials block, where that is set.
        lookback_days: How long ago a run may have started whose ledger is looked at, or a job may have been noted as
            lost that is asked for again, in days.
        artifact_key: The key of the table of what was found and done.

    Returns:
        What became of each open job, and what could not be looked at.

    Raises:
        NanoGPTError: One of the folders is the name of an audio file (code `INVALID_REQUEST`).
        CredentialsError: There is no usable API key.
        ProviderError: The API key was refused. The table says what was settled before.

    Example:
        ```python
        from prefect_nanogpt.flows import collect_open_tickets

        collect_open_tickets.serve(name="hourly", cron="0 * * * *")
        ```
    """
    keep_result()
    since = datetime.now(UTC) - timedelta(days=lookback_days)
    refusals: list[NanoGPTError] = []
    try:
        for folder in folders:
            with suppress(StorageError):  # what is not there is told of in the table
                await asyncio.to_thread(Destination, folder)
        async with nanogpt_client(credentials) as client:
            client.turns.per_second = REQUESTS_PER_SECOND
            known = await places_of(credentials)
            elsewhere = Ledger.elsewhere(known.ledger)
            places = await _places(folders, elsewhere, since)
            # Labels and notes leave the logins of URLs out.
            given = {
                without_login(place): place for place in [absolute(place) for place in (*folders, elsewhere) if place]
            }
            found, rows = await _look_through(places, given, known.provider, since)
            run_logger().info("%d open jobs in %d ledgers.", len(found), len(places))
            gate = asyncio.Semaphore(JOBS_AT_ONCE)
            rows += await asyncio.gather(
                *(_collect(same, client, known.public_url, gate, refusals) for same in _by_run_id(found))
            )
    except NanoGPTError as error:
        return cast(list[CollectedTicket], await failed(error, final=not error.retryable))
    table = [cells({**dict(row), "flow_run": ", ".join(row.flow_runs)}) for row in rows]
    await Artifact("table", artifact_key).show(json.dumps(table), f"{len(rows)} open jobs")
    if refusals:
        refusals[0].message += " What is not settled stays open: run the collection again with a key that is accepted."
        return cast(list[CollectedTicket], await failed(refusals[0], final=True))
    return rows


async def _places(folders: Sequence[str | PathLike[str]], elsewhere: str | None, since: datetime) -> list[LedgerLabel]:
    """Find where ledgers are: those of the named folders, also where all ledgers are elsewhere, and those of runs."""
    named = [*folders, *([elsewhere] if folders and elsewhere else [])]
    places = {LedgerLabel(place=without_login(absolute(folder))): None for folder in named}
    filters: list[dict[str, Any]] = [{"flow_filter": FlowFilter(name={"any_": OWN_FLOWS})}]
    # Tasks in flows of other people's, and our flows under other names.
    filters += [{"task_run_filter": TaskRunFilter(name={"like_": name})} for name in ("submit", "poll", "say ")]
    started = FlowRunFilter(start_time={"after_": since})
    async with get_client() as client:
        for filter in filters:
            offset = 0
            while page := await client.read_flow_runs(flow_run_filter=started, limit=PAGE, offset=offset, **filter):
                offset += len(page)
                for label, value in [item for flow_run in page for item in flow_run.labels.items()]:
                    if label.startswith(LABEL):
                        places[_label_of(str(value))] = None
    return list(places)


def _label_of(told: str) -> LedgerLabel:
    """Read a label; what is none is a place that nobody will find, and that is then told of."""
    with suppress(ValidationError):
        return LedgerLabel.model_validate_json(told)
    return LedgerLabel(place=told)


@dataclass
class _Open:
    """An open job, as its notes tell of it. `save_to` and `machine` say where its audio goes, if not to the ledger."""

    job: Job
    entry: Entry
    ledger: Ledger
    model: str | None
    submission: Submission | None
    run: RunReference
    text: str | None
    save_to: str | None
    machine: str | None

    @property
    def ticket(self) -> Ticket | None:
        return self.submission if isinstance(self.submission, Ticket) else None


async def _look_through(
    places: Sequence[LedgerLabel], given: Mapping[str, str], provider: str, since: datetime
) -> tuple[list[_Open], list[CollectedTicket]]:
    """Read the open jobs of ledgers, each place once, and give rows about what cannot be read.

    `given` has the places that were given with a password, as they were given, by what is shown of them.
    """
    found: list[_Open] = []
    rows: list[CollectedTicket] = []
    identities: dict[str, str | None] = {}
    failures: dict[str, Exception] = {}
    local: set[str] = set()
    for place in dict.fromkeys(told.place for told in places):
        try:
            home = await asyncio.to_thread(Destination, given.get(place, place), displaces=False)
            local |= {place} if home.is_local else set()
            identities[place], jobs, damaged = await home.run(_open_jobs, home, provider, since)
            found += [replace(job, save_to=given.get(job.save_to or "", job.save_to)) for job in jobs]
            rows += damaged
        except Exception as error:
            failures[place] = error
    reasons: list[Exception] = []
    for told in places:
        if told.ledger is not None and told.ledger in identities.values():
            continue  # here, or wherever it was moved to
        if told.place in local and told.machine not in (None, socket.gethostname()):
            where = f"{told.place} is a folder of the machine {told.machine}"
            reasons.append(StorageError(f"{where}: run the collection there as well."))
        elif told.place in failures:
            needs = f" {IF_IT_NEEDS_A_PASSWORD}" if "://" in told.place and told.place not in given else ""
            reasons.append(StorageError(f"{_words_of(failures[told.place])}{needs}"))
        elif told.ledger is not None:
            where = f"{told.place} is there, and the ledger that a run has used in it is not"
            reasons.append(StorageError(f"{where}. {IF_A_LEDGER_IS_GONE}"))
    told_once = dict.fromkeys(str(reason) for reason in reasons)
    return found, [*rows, *(CollectedTicket(outcome="unreachable", detail=told, flow_runs=[]) for told in told_once)]


def _words_of(error: Exception) -> str:
    return error.message if isinstance(error, NanoGPTError) else str(error)


def _open_jobs(
    home: Destination, provider: str, since: datetime
) -> tuple[str | None, list[_Open], list[CollectedTicket]]:
    """Read which ledger is at a place, its open jobs, and rows about those that cannot be read. Blocks.

    Raises:
        StorageError: There is no such folder here, or the ledger cannot be read.
    """
    if home.is_local and not Path(home.root).is_dir():
        raise StorageError(f"{home.shown} is not there. {IF_A_LEDGER_IS_GONE}")
    here = Ledger(home)
    found, damaged = [], []
    for entry in here.entries().values():
        try:
            job = _open_job(here, entry, provider, since)
        except Exception as error:
            detail = f"The notes {entry.job}.{entry.last} in {here.folder.shown} cannot be read: {error}"
            damaged.append(CollectedTicket(outcome="failed", detail=detail, flow_runs=[]))
        else:
            found += [job] if job else []
    return here.identity(), found, damaged


def _open_job(here: Ledger, entry: Entry, provider: str, since: datetime) -> _Open | None:
    """Read a job; None where it is not open, or not one of the API that this run asks."""
    is_lost = entry.over == "lost" and not any(number == entry.last for number, _ in entry.saved)
    if not (entry.is_open or is_lost) or (entry.is_in_the_air and here.may_still_be_answered(entry)):
        return None
    lost = here.read_note(entry.job, entry.last, "over-lost") if is_lost else {}
    if is_lost and str(lost.get("at")) < since.isoformat():
        return None
    sent = here.read_note(entry.job, entry.last, "sent")
    note = {**lost, **here.read_note(entry.job, entry.last, "answer"), **sent}
    if note.get("provider", provider) != provider:
        run_logger().info("A job of %s is left alone, since this run asks %s.", note["provider"], provider)
        return None
    submission = here.submission(entry)
    ticket = submission if isinstance(submission, Ticket) else None
    if is_lost and ticket is None:  # nobody can be asked
        return None
    return _Open(
        job=Job(
            provider,
            name=note.get("name"),
            ticket=None if sent else ticket,
            is_part=bool(note.get("is_part")),
            noted_as=entry.job,
        ),
        entry=entry,
        ledger=here,
        model=ticket.model if ticket else str(note.get("model") or "") or None,
        submission=submission,
        run=run_in(note),
        text=note.get("text"),
        save_to=note.get("save_to"),
        machine=note.get("machine"),
    )


def _by_run_id(found: Sequence[_Open]) -> list[list[_Open]]:
    """Put together what is about the same job of the provider's: a text's job, and a wait for its ticket."""
    groups: dict[str, list[_Open]] = {}
    for job in found:
        groups.setdefault(job.ticket.run_id if job.ticket else job.entry.job, []).append(job)
    return list(groups.values())


async def _collect(
    same: Sequence[_Open],
    client: NanoGPTClient,
    public_url: str | None,
    gate: asyncio.Semaphore,
    refusals: list[NanoGPTError],
) -> CollectedTicket:
    """Settle the places that wait for a job, and tell of the one that is worst off, with all of them in the detail."""
    first, submission = same[0], same[0].submission
    async with gate:
        ends = list(dict.fromkeys([await _settle(found, client, public_url, refusals) for found in same]))
    outcome = max((outcome for outcome, _ in ends), key=get_args(Outcome).index)
    detail = ends[0][1] if len(ends) == 1 else "; ".join(f"{outcome}: {detail}" for outcome, detail in ends)
    run_id = first.ticket.run_id if first.ticket else None
    run_logger().info("Job %s: %s, %s", run_id or first.entry.job, outcome, detail)
    currency = None
    if isinstance(submission, Ticket | Completed) and submission.cost is not None:
        currency = submission.payment_source if isinstance(submission, Ticket) else submission.currency
    return CollectedTicket(
        outcome=outcome,
        detail=detail,
        run_id=run_id,
        model=first.model,
        cost=submission.cost if isinstance(submission, Ticket | Completed) else None,
        currency=currency,
        text=one_line(str(first.text), LONGEST_WORD) if first.text else None,
        flow_runs=sorted({found.run.name for found in same if found.run.name}),
    )


class _Steps(PlainSteps):
    """Steps that poll as often as it takes to be sure that a job is lost, and save only what is within reach."""

    def __init__(self, terms: Terms, client: NanoGPTClient, out_of_reach: NanoGPTError | None) -> None:
        # What cannot be polled now is polled by the next collection.
        super().__init__(terms, client, poll_delays=status.RETRY_DELAYS_SECONDS[: NOT_FOUND_ATTEMPTS - 1])
        self._out_of_reach = out_of_reach

    async def save(self, audio: Completed | AudioContent, stem: str, place: Destination) -> AudioFile:
        """Save finished audio."""
        if self._out_of_reach is not None and place is self._terms.ledger.destination:
            raise self._out_of_reach
        return await super().save(audio, stem, place)


def _where_audio_goes(found: _Open) -> tuple[Ledger, NanoGPTError | None]:
    """Give the ledger with the folder of a job's audio, and why that folder is out of reach, if it is. Blocks."""
    if found.save_to is None:
        return found.ledger, None
    try:
        place = Destination(found.save_to, displaces=False)
    except NanoGPTError as error:
        return found.ledger, error
    out_of_reach = None
    if place.is_local and found.machine != socket.gethostname() and not Path(place.root).is_dir():
        out_of_reach = StorageError(
            f"The audio goes to {place.shown}, a folder of the machine {found.machine}: run the collection there as "
            "well, or start the same text or ticket again, which finds what is paid for."
        )
    return Ledger(place, found.ledger.destination), out_of_reach


async def _settle(
    found: _Open, client: NanoGPTClient, public_url: str | None, refusals: list[NanoGPTError]
) -> tuple[Outcome, str]:
    """Poll a job once, note what came of it, and bring the report of its run up to date."""
    if refusals:
        return "failed", str(refusals[0])
    ledger, out_of_reach = found.ledger, None
    try:
        ledger, out_of_reach = await asyncio.to_thread(_where_audio_goes, found)
        ledger.destination.public_url = public_url
        terms = Terms(ledger)
        audio = await settle(found.job, terms, _Steps(terms, client, out_of_reach), found.entry)
    except SubmissionUncertain as error:
        return "uncertain", str(error)
    except NanoGPTError as error:
        if error.http_status == httpx.codes.UNAUTHORIZED:
            refusals.append(error)
        is_lost = error.http_status == httpx.codes.NOT_FOUND and isinstance(error, ProviderError)
        if is_lost or isinstance(error, TTSJobRejected):
            await _update_report(found, ledger, error)
            return "lost" if is_lost else "rejected", str(error)
        return "unreachable" if error is out_of_reach else "failed", str(error)
    except Exception as error:
        run_logger().warning("Job %s could not be settled.", found.entry.job, exc_info=True)
        return "failed", f"{type(error).__name__}: {error}"
    if audio is None:
        return "pending", "Still under way."
    await _update_report(found, ledger, Said(audio))
    return "saved", audio.location


async def _update_report(found: _Open, ledger: Ledger, news: Said | NanoGPTError) -> None:
    """Tell in the report of the run that submitted a text what became of it."""
    is_known = found.entry.over is not None and isinstance(news, ProviderError)
    if found.job.is_part or found.run.id is None or is_known:
        return
    report = await quietly(Report.of_run(found.run.id, ledger.destination.save_to, found.text))
    if report is None:
        return
    report.ticket = found.ticket
    await quietly(report.finished(news, ledger.destination) if isinstance(news, Said) else report.failed(news))
