"""A statement of account, told from ledgers: what was bought, what became of it, and what can be done about it.

It says what the notes say. Whether the audio is still where it was saved is not looked at, and refunds are not known.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal, localcontext
from functools import partial
from typing import Annotated, Any, Final, Literal, TypeAlias, get_args

from pydantic import BaseModel, ConfigDict, PlainSerializer, ValidationError

from prefect_nanogpt.errors import NanoGPTError, StorageError, hide, secrets_in, without_login
from prefect_nanogpt.job import RESUBMIT, WHAT_TO_LOOK_AT
from prefect_nanogpt.ledger import FOLDER, Entry, Ledger, amounts, charge_in, run_in
from prefect_nanogpt.models import LONGEST_WORD, Ticket, one_line
from prefect_nanogpt.storage import Destination, absolute

__all__ = ["COLUMNS", "BoughtJob", "Charge", "Statement", "Total", "cells", "statement_of", "totals_of"]

Outcome: TypeAlias = Literal["saved", "open", "sending", "uncertain", "lost", "refused", "failed", "unreadable"]
Amount = Annotated[Decimal, PlainSerializer(lambda amount: f"{amount:f}", return_type=str, when_used="json")]
Notes: TypeAlias = Mapping[int, Mapping[str, Mapping[str, Any]]]

READERS: Final = 16
DIGITS: Final = 100
"""More than amounts have, one of a unit with thirty decimals and another of a million together."""
LONGEST_DETAIL: Final = 1_000
COLUMNS: Final = (
    *("outcome", "cost", "currency", "other_costs", "tries", "unpriced", "at", "model", "text", "kind", "run_id"),
    *("flow_run", "flow_run_id", "folder", "detail", "to_do", "provider", "job"),
)
"""Of a table of jobs, in their order."""

_TO_DO: Final[Mapping[Outcome, str]] = {
    "saved": "",
    "open": "Run it again, or collect_open_tickets: that fetches it, and costs nothing.",
    "sending": "Wait for the run that is submitting it.",
    "uncertain": WHAT_TO_LOOK_AT,
    "lost": f"Run it again: that asks for it once more, and costs nothing. To pay for it anew, {RESUBMIT}lost.",
    "refused": f"Change the text: the same one would be refused again. To send it all the same, {RESUBMIT}refused.",
    "failed": "Run it again: the text is submitted anew, and charged.",
    "unreadable": "Make its notes readable. Until then it is not known what it cost, nor what became of it.",
}
_TO_DO_ABOUT_A_TICKET: Final[Mapping[Outcome, str]] = {
    "open": "Wait for its ticket again, or run collect_open_tickets: that fetches it, and costs nothing.",
    "uncertain": "The note of its ticket is damaged. Wait for the ticket again: that costs nothing.",
    "lost": "Wait for its ticket again: that asks for it once more, and costs nothing.",
    "refused": "Change the text: the same one would be refused again.",
    "failed": "Submit the text anew where it was submitted: that is charged.",
}


class Charge(BaseModel):
    """A try of a job that was, or may have been, charged.

    Attributes:
        number: The number of the try, from 1.
        at: When it was sent; of a ticket from elsewhere, when it was noted.
        cost: What the provider said that it cost; None where it did not say.
        currency: The unit of the cost.
        run_id: The provider's id of the job; None where there is none, or no answer.
        flow_run: The name of the flow run that sent it.
        flow_run_id: The id of that flow run.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    at: datetime | None = None
    cost: Amount | None = None
    currency: str | None = None
    run_id: str | None = None
    flow_run: str | None = None
    flow_run_id: str | None = None


class BoughtJob(BaseModel):
    """A job that money was, or may have been, spent on, as a ledger tells of it.

    Attributes:
        outcome: `saved`; `open` (answered, and not ended); `sending` (may still be answered); `uncertain` (nobody knows
            whether it was accepted); `lost` (the provider does not know it, or no longer); `refused` (its text was);
            `failed` (for another reason); `unreadable` (its notes cannot be read).
        cost: What the provider said that all tries cost together, in `currency`; None where it said nothing.
        currency: The unit of `cost`: USD, if anything was charged in it.
        other_costs: What was charged besides, by currency, where tries were charged in several.
        tries: How many tries were, or may have been, charged. None for a refused text that was not charged, for what
            was joined of parts, and for what is counted with another job.
        unpriced: How many of these tries have a cost that nobody has said.
        at: When its last note was written.
        model: The model.
        text: The beginning of the text, where the notes have it.
        kind: `text`; `part` of a long text; `whole`, joined of parts that are jobs; `ticket`, submitted elsewhere.
        run_id: The provider's id of the job.
        flow_run: The name of the flow run that submitted it, or waited for its ticket.
        flow_run_id: The id of that flow run.
        folder: The folder or URL of its audio.
        detail: The files that were saved, or the code and the reason of the end; and which notes are damaged.
        to_do: What can be done about it; empty where nothing needs to be.
        provider: The base URL of the API; None where the notes do not say.
        job: The digest that its notes are called by.
        charges: The tries that were, or may have been, charged.
    """

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    cost: Amount | None = None
    currency: str | None = None
    other_costs: dict[str, Amount] | None = None
    tries: int = 0
    unpriced: int = 0
    at: datetime | None = None
    model: str | None = None
    text: str | None = None
    kind: Literal["text", "part", "whole", "ticket"] = "text"
    run_id: str | None = None
    flow_run: str | None = None
    flow_run_id: str | None = None
    folder: str
    detail: str = ""
    to_do: str = ""
    provider: str | None = None
    job: str
    charges: list[Charge]


class Total(BaseModel):
    """What the jobs of a provider have cost together: all of them, or those of a day, a model or a flow run.

    Attributes:
        provider: The base URL of the API; None where the notes do not say.
        by: What the jobs have in common.
        name: The day in UTC (`2026-05-17`), the model, or the name of the flow run; empty for all.
        flow_run_id: The id of the flow run.
        costs: What the provider said that they cost, by currency. Refunds are not known.
        jobs: How many jobs were, or may have been, charged.
        unknown: How many of these have a try of unknown cost.
    """

    model_config = ConfigDict(frozen=True)

    provider: str | None
    by: Literal["all", "day", "model", "flow_run"]
    name: str = ""
    flow_run_id: str | None = None
    costs: dict[str, Amount]
    jobs: int
    unknown: int


class Statement(BaseModel):
    """What ledgers tell.

    Attributes:
        jobs: The jobs, the latest first.
        problems: Which ledgers are not there, and which cannot be read, wholly or in part.
    """

    jobs: list[BoughtJob]
    problems: list[str]


async def statement_of(folders: Sequence[str | os.PathLike[str]], elsewhere: str | None = None) -> Statement:
    """Read the ledgers of folders, each once.

    Args:
        folders: The folders of audio, URLs or blocks.
        elsewhere: The place that is set for all ledgers, which is read too. A folder without a ledger of its own is no
            problem then.

    Returns:
        The jobs, each charge in one of them only, and what could not be read.
    """
    found: list[BoughtJob] = []
    problems: list[str] = []
    places = {_real(place): place for place in reversed([*folders, *([elsewhere] if elsewhere else [])])}
    for place in reversed(places.values()):
        try:
            jobs = await _read(place)
        except Exception as error:  # the drivers of buckets have families of errors of their own
            words = error.message if isinstance(error, NanoGPTError) else f"{type(error).__name__}: {error}"
            shown = without_login(os.fspath(place))
            problems.append(f"The ledger of {shown} cannot be read: {hide(secrets_in(os.fspath(place)), words)}")
            continue
        if jobs is None and (not elsewhere or _real(place) == _real(elsewhere)):
            problems.append(f"There is no ledger in {without_login(absolute(place))}.")
        if unreadable := sum(job.outcome == "unreadable" for job in jobs or ()):
            problems.append(f"Jobs that cannot be read in {without_login(absolute(place))}: {unreadable}.")
        found += jobs or []
    return Statement(jobs=_charged_once(found), problems=problems)


def _real(place: str | os.PathLike[str]) -> str:
    """Give one name for what is one folder."""
    place = absolute(place)
    return os.path.realpath(place) if os.path.isabs(place) else place.rstrip("/")


async def _read(place: str | os.PathLike[str]) -> list[BoughtJob] | None:
    """Read a ledger; None where there is none."""
    home = await asyncio.to_thread(Destination, place, displaces=False)
    return await home.run(_jobs_in, home)


def _jobs_in(home: Destination) -> list[BoughtJob] | None:
    ledger = Ledger(home)
    entries = ledger.entries()
    if not entries and ledger.identity() is None:
        return None
    with ThreadPoolExecutor(READERS) as readers:
        return [job for job in readers.map(partial(_told, ledger), entries.values()) if job is not None]


def _told(ledger: Ledger, entry: Entry) -> BoughtJob | None:
    """Tell of a job; one whose notes cannot be read hides no other."""
    try:
        return _job(ledger, ledger.that_left(entry))
    except (ConnectionError, TimeoutError):
        raise
    except (OSError, StorageError) as error:
        words = error.message if isinstance(error, StorageError) else error.strerror or str(error)
        unknown = [Charge(number=number) for number in entry.charged]
        told = BoughtJob(outcome="unreadable", folder=ledger.place, job=entry.job, charges=[])
        detail = f"The notes {entry.job}.* cannot be read: {hide((), one_line(words, LONGEST_DETAIL))}"
        return _with(told, unknown, detail=detail, to_do=_TO_DO["unreadable"])


def _job(ledger: Ledger, entry: Entry) -> BoughtJob | None:
    """Tell of a job by its notes; None where nothing was bought."""
    number = entry.last or max((number for number, _ in entry.saved), default=0)
    if not number:  # planned, or not accepted
        return None
    notes = ledger.notes(entry)
    damaged = [f"{number}.{state}" for number, states in notes.items() for state, note in states.items() if not note]
    if damaged and (now := ledger.entry(entry.job)).states != entry.states:
        return _job(ledger, ledger.that_left(now))  # tidied up meanwhile
    latest = notes[number]
    about = _merged(notes)
    ticket = _ticket_in(latest.values())
    outcome = _outcome(ledger, entry, latest)
    kind = _kind(notes)
    folder = str(about.get("save_to") or ledger.place)
    detail = _files(latest, folder) if outcome == "saved" else _reason(latest, outcome)
    if damaged:
        detail = f"{detail} Damaged notes: {', '.join(f'{entry.job}.{name}' for name in damaged)}.".strip()
    to_do = (_TO_DO_ABOUT_A_TICKET if kind == "ticket" else _TO_DO).get(outcome, _TO_DO[outcome])
    run = run_in(about)
    job = BoughtJob(
        outcome=outcome,
        at=max(filter(None, (_time(note) for states in notes.values() for note in states.values())), default=None),
        # A ticket may name it as the provider behind does.
        model=_words(about.get("model") or (ticket.model if ticket else None)),
        text=_words(about.get("text")),
        kind=kind,
        run_id=ticket.run_id if ticket else None,
        flow_run=_words(run.name),
        flow_run_id=_words(run.id),
        folder=without_login(folder),
        detail=hide((), one_line(detail, LONGEST_DETAIL)),
        to_do=to_do,
        provider=without_login(provider) if (provider := _words(about.get("provider"))) else None,
        job=entry.job,
        charges=[],
    )
    return _with(job, _charges(entry, notes, kind))


def _merged(notes: Notes) -> dict[str, Any]:
    """Put together what notes say of a job: first what the latest try has noted before it was sent."""
    about: dict[str, Any] = {}
    for states in notes.values():
        for state in sorted(states, key=lambda state: ("over", "saved", "answer", "sent").index(state.split("-")[0])):
            about |= states[state]
    return about


def _outcome(ledger: Ledger, entry: Entry, latest: Mapping[str, Mapping[str, Any]]) -> Outcome:
    if entry.over is not None:
        ends = {state: str(note.get("at", "")) for state, note in latest.items()}
        saved = max((at for state, at in ends.items() if state.startswith("saved-")), default="")
        # What was lost may be found after all, and what was saved may be lost later.
        is_saved_since = saved > max(at for state, at in ends.items() if state.startswith("over-"))
        return "saved" if is_saved_since else entry.over
    if entry.is_answered:
        return "uncertain" if ledger.submission(entry) is None else "open"
    if entry.is_in_the_air:
        return "sending" if ledger.may_still_be_answered(entry) else "uncertain"
    return "saved" if any(note for state, note in latest.items() if state.startswith("saved-")) else "unreadable"


def _kind(notes: Notes) -> Literal["text", "part", "whole", "ticket"]:
    of_tries = [(state, note) for states in notes.values() for state, note in states.items()]
    if any("parts" in note for _, note in of_tries):
        return "whole"
    if any(note.get("is_part") or str(note.get("name")).startswith(f"{FOLDER}/") for _, note in of_tries):
        return "part"
    return "text" if any(state == "sent" for state, _ in of_tries) else "ticket"


def _files(latest: Mapping[str, Mapping[str, Any]], folder: str) -> str:
    """List the files that have the audio: those of other folders with their folder."""
    saved = [note for state, note in latest.items() if state.startswith("saved-") and note]
    places = [(str(note.get("save_to", folder)), str(note.get("name"))) for note in saved]
    parts = [f"(joined of {note['parts']} parts, which are jobs of their own)" for note in saved if note.get("parts")]
    files = ", ".join(sorted(name if place == folder else f"{place.rstrip('/')}/{name}" for place, name in places))
    return " ".join([files, *parts[:1]])


def _reason(latest: Mapping[str, Mapping[str, Any]], outcome: Outcome) -> str:
    note = latest.get(f"over-{outcome}", {})
    return ": ".join(str(note[name]) for name in ("code", "message") if note.get(name))


def _charges(entry: Entry, notes: Notes, kind: str) -> list[Charge]:
    """Tell which tries were, or may have been, charged. What was joined of parts is counted with them."""
    states_of = {
        number: {state for state in states if not (kind == "whole" and state.startswith("saved-"))}
        for number, states in entry.states.items()
    }
    charges = []
    for number in Entry(entry.job, states_of).charged:
        states = {state: notes[number][state] for state in sorted(states_of[number] - {"plan"})}
        told = charge_in(note for state, note in states.items() if state != "sent")
        about = _merged({number: states})
        ticket, run = _ticket_in(states.values()), run_in(about)
        charges.append(
            Charge(
                number=number,
                at=_time(about),
                cost=told[1] if told else None,
                currency=_words(told[0] or "USD") if told else None,  # which is what no unit means
                run_id=ticket.run_id if ticket else None,
                flow_run=_words(run.name),
                flow_run_id=_words(run.id),
            )
        )
    return charges


def _ticket_in(notes: Iterable[Mapping[str, Any]]) -> Ticket | None:
    for note in notes:
        if isinstance(note.get("ticket"), dict):
            with suppress(ValidationError):
                return Ticket.model_validate(note["ticket"])
    return None


def _time(note: Mapping[str, Any]) -> datetime | None:
    with suppress(ValueError, OverflowError):
        at = datetime.fromisoformat(str(note.get("at")))
        return at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
    return None


def _words(words: object) -> str | None:
    return one_line(str(words), LONGEST_WORD) or None if words is not None else None


def _with(job: BoughtJob, charges: list[Charge], **more: Any) -> BoughtJob:
    """Give a job with these charges, and what they come to."""
    unpriced = sum(charge.cost is None for charge in charges)
    told = {"charges": charges, "tries": len(charges), "unpriced": unpriced, **amounts(_sums(charges)), **more}
    return job.model_copy(update=told)


def _sums(charges: Iterable[Charge]) -> dict[str | None, Decimal]:
    """Add up what was charged, to the last digit, by currency."""
    sums: dict[str | None, Decimal] = {}
    with localcontext(prec=DIGITS):
        for charge in charges:
            if charge.cost is not None:
                sums[charge.currency] = sums.get(charge.currency, Decimal(0)) + charge.cost
    return sums


def _charged_once(jobs: Collection[BoughtJob]) -> list[BoughtJob]:
    """Leave each charge to one job, so that jobs add up to what was charged, and give them latest first.

    A ticket may be waited for in several folders, or where its text was submitted; and a ledger may have been copied.
    """
    counted: set[tuple[object, ...]] = set()
    once = []
    for job in sorted(jobs, key=lambda job: (job.kind == "ticket", -_seconds(job), job.folder)):
        new = [charge for charge in job.charges if _identity(job, charge) not in counted]
        counted |= {_identity(job, charge) for charge in new}
        if len(new) < len(job.charges):
            job = _with(job, new, detail=f"{job.detail} (its cost is counted with another entry)".strip())
        once.append(job)
    return sorted(once, key=lambda job: -_seconds(job))


def _identity(job: BoughtJob, charge: Charge) -> tuple[object, ...]:
    return (job.provider, charge.run_id) if charge.run_id else (job.job, charge.number, charge.at)


def _seconds(job: BoughtJob) -> float:
    return job.at.timestamp() if job.at else 0.0


def totals_of(jobs: Iterable[BoughtJob]) -> list[Total]:
    """Add up what jobs have cost: in all, and by day (UTC), model and flow run. Providers are kept apart.

    Args:
        jobs: The jobs, each charge in one of them only, as `statement_of` gives them.

    Example:
        >>> totals_of([])
        []
    """
    charges: dict[tuple[str | None, str, str, str | None], list[tuple[int, Charge]]] = {}
    for index, job in enumerate(jobs):
        for charge in job.charges:
            groups = [
                ("all", "", None),
                ("day", f"{charge.at:%Y-%m-%d}" if charge.at else "unknown", None),
                ("model", job.model or "unknown", None),
                ("flow_run", charge.flow_run or charge.flow_run_id or "none", charge.flow_run_id),
            ]
            for group in groups:
                charges.setdefault((job.provider, *group), []).append((index, charge))
    order = get_args(Total.model_fields["by"].annotation)
    totals = [
        Total(
            provider=provider,
            by=by,
            name=name,
            flow_run_id=flow_run_id,
            costs={str(currency): cost for currency, cost in _sums(charge for _, charge in of_group).items()},
            jobs=len({index for index, _ in of_group}),
            unknown=len({index for index, charge in of_group if charge.cost is None}),
        )
        for (provider, by, name, flow_run_id), of_group in charges.items()
    ]
    totals.sort(key=lambda total: total.name if total.by == "day" else "", reverse=True)  # the latest first
    return sorted(totals, key=lambda total: (total.provider or "", order.index(total.by)))


def cells(told: Mapping[str, Any]) -> dict[str, str]:
    """Give the columns that a table has of a job, in their order, as text."""
    return {name: _cell(told[name]) for name in COLUMNS if name in told}


def _cell(value: object) -> str:
    match value:
        case None:
            return ""
        case Decimal():
            return f"{value:f}"
        case datetime():
            return value.isoformat(timespec="seconds")
        case dict():
            return ", ".join(f"{cost:f} {currency}" for currency, cost in value.items())
        case _:
            return str(value)
