"""A text that is longer than its model takes, as parts: each a job of its own, joined into one file."""

import asyncio
import tempfile
import time
from collections.abc import Collection, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Final

from prefect_nanogpt.budget import COST_LIMIT_EXCEEDED, Budget
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.errors import AudioError, NanoGPTError, StorageError, require_extra
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.job import Said, Terms, save_whole, would_be_submitted
from prefect_nanogpt.joining import join
from prefect_nanogpt.ledger import Entry, Job, Ledger, Plan
from prefect_nanogpt.long_text import LEAST_PART, spans, units
from prefect_nanogpt.models import AudioFile, Completed, Ticket
from prefect_nanogpt.report import Report, only_to_look_at
from prefect_nanogpt.tasks.catalogue import NOT_IN_CATALOGUE, check_names
from prefect_nanogpt.tasks.say import PlainSteps, say_in_one_task

__all__ = ["longest_part", "parts_of", "plan_of", "say_in_parts", "timed_parts"]

EVERY_MODEL_TAKES: Final = 500
"""In characters. The least that the provider's catalogue was seen to name is 512."""
PARTS_AT_ONCE: Final = 8
SUBMIT_NOTHING: Final = (COST_LIMIT_EXCEEDED, NOT_IN_CATALOGUE)
"""What parts that are paid for are fetched in spite of."""
REPORT_SECONDS: Final = 5.0


async def longest_part(
    job: Job, plan: Plan | None, ledger: Ledger, entry: Entry, max_chars: int | None, client: NanoGPTClient
) -> int | None:
    """Tell how long the parts of a text may be; None for a text that is to be said whole.

    A text that was submitted whole stays whole, and one that was split is split at the same places again, also where
    the catalogue cannot be read any more: what is paid for is found only so.

    Raises:
        StorageError: Nobody knows where the text was split.
    """
    assert job.request is not None
    if entry.is_paid and await ledger.run(_is_of_its_own, ledger, entry):
        return None
    if plan is not None and (max_chars is None or entry.saved):
        return plan.limit
    if plan is None and "plan" in entry.states.get(1, ()) and max_chars is None:
        raise StorageError(
            f"The note of how this text was split ({job.id}.1.plan.json in {ledger.place}) is damaged, so its parts, "
            "which may be paid for, cannot be found. Give the length of the parts as `max_chars`."
        )
    if plan is None and (entry.is_paid or entry.over in ("uncertain", "refused", "lost")):
        return None
    if max_chars is not None:
        return max_chars
    if units(job.request.text) <= EVERY_MODEL_TAKES:
        return None
    try:
        model = await client.find_model(job.request.model)
    except NanoGPTError as error:
        run_logger().warning("The catalogue could not be read for the longest text: %s", error)
        return None
    if model is None or model.max_chars is None or model.max_chars < LEAST_PART:
        return None  # nothing is said, or nothing that can be meant
    return model.max_chars


def _is_of_its_own(ledger: Ledger, entry: Entry) -> bool:
    """Whether what is paid for is the text as a whole, of which the provider can be asked, and not its parts."""
    return not entry.is_saved or isinstance(ledger.submission(entry), Ticket | Completed)


async def plan_of(job: Job, limit: int) -> Plan:
    """Tell where to split a text, into parts of at most so many UTF-16 code units."""
    assert job.request is not None
    require_extra("long", "The text is longer than the model takes. To say it in parts")
    return Plan(limit=limit, spans=await asyncio.to_thread(spans, job.request.text, limit, job.request.language))


def parts_of(job: Job, plan: Plan) -> list[Job]:
    """Give the jobs of the parts of a text, in order; equal ones are the same job."""
    assert job.request is not None
    requests = [job.request.model_copy(update={"text": job.request.text[start:end]}) for start, end in plan.spans]
    return [Job(job.provider, request, job.take, is_part=True) for request in requests]


async def say_in_parts(
    job: Job,
    terms: Terms,
    limit: int,
    plan: Plan | None,
    client: NanoGPTClient,
    max_cost: Decimal | None,
    report: Report,
    *,
    strict: bool,
) -> Said:
    """Say a text that is too long for its model: each part a job, joined in order.

    Where an earlier try has split it into parts of at most this many UTF-16 code units, it is split at the same places,
    or others would be paid for.

    A part that fails fails the whole. Those under way are seen to their end, no further one is begun, and the ledger
    has all of them for the next attempt. Their audio stays in the ledger's folder, so that a text of which one sentence
    has changed costs one part, also where the provider no longer has the others. Where `max_cost` does not allow the
    missing parts, those that are paid for are fetched all the same.

    Raises:
        NanoGPTError: The first failure of a part; or the parts cannot be joined.
    """
    assert job.request is not None
    ledger = terms.ledger
    if plan is None or plan.limit != limit:
        plan = await plan_of(job, limit)
        await ledger.run(ledger.note_plan, job.id, plan)
    parts = parts_of(job, plan)
    unique = {part.id: part for part in parts}
    entries = await ledger.run(ledger.entries)
    known = {part: entries.get(part) or Entry(part) for part in unique}
    run_logger().info("%d characters are split into %d parts of at most %d.", len(job.request.text), len(parts), limit)
    places = asyncio.Semaphore(PARTS_AT_ONCE)
    failures: list[NanoGPTError] = []
    done: dict[str, AudioFile] = {}
    told = 0.0

    @only_to_look_at
    async def tell() -> None:
        nonlocal told
        told = time.monotonic()
        report.paid = await ledger.run(_what_is_paid, ledger, unique.keys())

    async def say_part(number: int, part: Job) -> None:
        async with places:
            if failures and not (failures[0].code in SUBMIT_NOTHING and known[part.id].is_paid):
                return
            try:
                said = await say_in_one_task(f"part {number} of {len(parts)}", part, terms, steps, known[part.id])
            except NanoGPTError as error:
                error.message = f"Part {number} of {len(parts)}: {error.message}"
                failures.append(error)
                return
        done[part.id] = said.audio
        run_logger().info("Part %d of %d is here.", number, len(parts))
        if time.monotonic() - told > REPORT_SECONDS:
            await tell()
            await report.waiting()

    await tell()
    await report.waiting()
    new = [part for part in unique.values() if would_be_submitted(known[part.id], terms.resubmit)]
    budget = Budget(max_cost, ledger, client) if max_cost is not None else None
    if budget:
        await budget.count([(part, known[part.id]) for part in unique.values()])
    failures += await _refusals(job, new, client, budget, strict=strict)
    steps = PlainSteps(terms, client, budget)
    numbers = {part.id: number for number, part in reversed(list(enumerate(parts, 1)))}
    # One that breaks off must not end the client while others have submissions in the air.
    ends = await asyncio.gather(*(say_part(numbers[part.id], part) for part in unique.values()), return_exceptions=True)
    await tell()
    for end in ends:
        if isinstance(end, BaseException):
            raise end
    if failures:
        raise failures[0]
    audio = await _join([done[part.id] for part in parts], job, terms)
    report.paid = None
    return Said(audio)


def timed_parts(job: Job, ledger: Ledger) -> list[tuple[tuple[int, int], float | None]]:
    """Tell where the parts of a text are in it, and how long each plays, in seconds; none where it is whole."""
    if (plan := ledger.plan(job.id)) is None:
        return []
    entries = ledger.entries()
    return [
        (span, ledger.seconds(entries.get(part.id) or Entry(part.id)))
        for span, part in zip(plan.spans, parts_of(job, plan), strict=True)
    ]


async def _refusals(
    job: Job, new: Collection[Job], client: NanoGPTClient, budget: Budget | None, *, strict: bool
) -> list[NanoGPTError]:
    """Say why none of the parts that are not paid for may be submitted, if there is a reason."""
    assert job.request is not None
    try:
        if new:
            await check_names([job.request], client, strict=strict)
    except NanoGPTError as error:
        return [error]
    if budget is None:
        return []
    await budget.read_prices(new)
    return [refusal] if (refusal := budget.refusal_of(new)) else []


async def _join(parts: Sequence[AudioFile], job: Job, terms: Terms) -> AudioFile:
    """Join the audio of all parts."""
    from prefect_nanogpt.tasks.join import bytes_of

    folder = terms.ledger.folder
    with tempfile.TemporaryDirectory() as temporary:
        names = [part.location.rpartition("/")[2] for part in parts]
        files = {name: await folder.run(folder.fetch, name, Path(temporary)) for name in dict.fromkeys(names)}
        whole = Path(temporary, "whole")
        try:
            await asyncio.to_thread(join, [files[name] for name in names], whole)
        except AudioError as error:
            error.message += f" All parts are paid for, and kept in {folder.shown}."
            raise
        return await save_whole(job, terms, bytes_of(whole), parts)


def _what_is_paid(ledger: Ledger, parts: Collection[str]) -> str:
    """Say how many parts are paid for, and what that was, as far as the ledger knows."""
    entries = ledger.entries()
    known = [entries[part] for part in parts if part in entries and entries[part].is_paid]
    costs = ledger.costs(*known)
    amounts = ", ".join(f"{cost.normalize():f} {currency or ''}".strip() for currency, cost in costs.items())
    return f"{len(known)} of {len(parts)} parts are paid for{f' ({amounts})' if amounts else ''}."
