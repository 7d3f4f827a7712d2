"""What a text or a batch would cost, before anything is paid."""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from decimal import Decimal
from os import PathLike
from typing import Any, get_args

import httpx
from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_nanogpt.catalogue import doubts_about, too_long
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client, places_of
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.job import Resubmit, would_be_submitted
from prefect_nanogpt.ledger import Entry, Job, Ledger, by_currency
from prefect_nanogpt.lines import read_lines, usable
from prefect_nanogpt.long_text import LEAST_PART, units
from prefect_nanogpt.models import (
    DEFAULT_MODEL,
    AudioModel,
    Balance,
    TTSRequest,
    options_of,
    problems_in,
    request_with,
)
from prefect_nanogpt.pronunciation import read_pronunciation
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks.catalogue import NOT_IN_CATALOGUE
from prefect_nanogpt.tasks.parts import longest_part, parts_of, plan_of

__all__ = ["Estimate", "ModelEstimate", "estimate"]


class ModelEstimate(BaseModel):
    """What the jobs of one model would cost.

    Attributes:
        model: The model id.
        jobs: How many would be submitted.
        characters: How many characters they have together.
        usd_per_thousand_chars: The catalogue's price in USD of a thousand characters, where it has one.
        usd_per_generation: The catalogue's price in USD of a job, where it has one.
        usd: What they would cost together, in USD; None where the catalogue has no price.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    jobs: int
    characters: int
    usd_per_thousand_chars: Decimal | None = None
    usd_per_generation: Decimal | None = None
    usd: Decimal | None = None


class Estimate(BaseModel):
    """What a run would submit and pay for, by the ledger and the catalogue of this moment.

    Attributes:
        lines: How many lines there are; 1 for a text.
        characters: How many characters they have together.
        jobs: How many different jobs that is: equal lines are one, a long text is one for each of its parts.
        paid_jobs: How many of them are, or may be, paid for and are fetched, or found, without another charge. Whether
            their audio is still there is not looked at.
        held_jobs: How many are uncertain, lost or refused, and are not submitted without `resubmit`.
        new_jobs: How many would be submitted, and charged.
        models: The jobs that would be submitted, by model.
        usd: What those of a known price would cost together, in USD.
        spent: What the provider has said that earlier tries of all these jobs cost, by currency.
        balance: What is left on the account; None where that could not be read.
        unknown: What is not known, each a sentence.
        warnings: Models and voices that the catalogue does not have, and the like, each a sentence.
    """

    model_config = ConfigDict(frozen=True)

    lines: int
    characters: int
    jobs: int
    paid_jobs: int
    held_jobs: int
    new_jobs: int
    models: tuple[ModelEstimate, ...]
    usd: Decimal
    spent: dict[str, Decimal]
    balance: Balance | None
    unknown: tuple[str, ...]
    warnings: tuple[str, ...]


@task(
    name="estimate",
    task_run_name="estimate",
    description="Tell what a text or a batch would cost, without submitting anything.",
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def estimate(
    text: str | None = None,
    *,
    lines: Sequence[Mapping[Any, Any]] | str | PathLike[str] | None = None,
    model: str = DEFAULT_MODEL,
    voice: str | None = None,
    speed: float | None = None,
    response_format: str | None = None,
    options: Mapping[str, Any] | None = None,
    save_to: str | PathLike[str] = "audio",
    credentials: NanoGPTCredentials | str | None = None,
    take: int = 1,
    resubmit: Collection[Resubmit] = (),
    max_chars: int | None = None,
    max_cost: Decimal | float | str | None = None,
    strict: bool = False,
    pronounce: Mapping[str, Any] | str | PathLike[str] | None = None,
) -> Estimate:
    """Tell what `text_to_speech` or `text_to_speech_batch` would submit and pay for now. Nothing is submitted or saved.

    The prices are those of the provider's catalogue, times the characters of the texts. How the provider counts
    characters is not documented, so what it charges may differ; only a ticket tells.

    Args:
        text: A text, as for `text_to_speech`.
        lines: The lines of a batch, in the place of a text: rows, or the path or URL of a table.
        model: The model of the text, or of the lines that name none.
        voice: The voice of the text, or of the lines that name none.
        speed: The speaking rate of the text.
        response_format: The container of the text.
        options: Further options, as for the flows.
        save_to: Where it would be saved: what is paid for is found there.
        credentials: The credentials, or the name of their block; None for the environment, or else the block `default`.
        take: Which rendition.
        resubmit: Which jobs would be submitted anew: `uncertain`, `lost`, `refused`.
        max_chars: The longest part of a text, in UTF-16 code units; None for the model's limit in the catalogue.
        max_cost: The most that it may cost, earlier tries included, in USD: more is warned of.
        strict: Whether a model or voice that the catalogue does not have is an error.
        pronounce: What would be said for words, as for the flows.

    Returns:
        How many jobs there are, how many of them are paid for, what the others cost, and what is not known.

    Raises:
        NanoGPTError: The text or the lines are not in order; or, with `strict`, the catalogue does not have a model or
            a voice (code `NOT_IN_CATALOGUE`).
        StorageError: The ledger cannot be read.
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.tasks import estimate

        @flow
        async def is_cheap(chapter: str) -> bool:
            estimated = await estimate(chapter, voice="Rachel", save_to="audio/book")
            return estimated.usd < 1 and not estimated.unknown
        ```
    """
    if (text is None) == (lines is None):
        raise NanoGPTError("Give a text or lines, and one of them.", code="INVALID_REQUEST")
    if take < 1 or (max_chars is not None and max_chars < LEAST_PART) or not {*resubmit} <= {*get_args(Resubmit)}:
        raise NanoGPTError("take, max_chars or resubmit is none that a flow takes.", code="INVALID_REQUEST")
    given = {"model": model, "voice": voice, "speed": speed, "response_format": response_format}
    given = {name: value for name, value in given.items() if value is not None}
    wanted = await asyncio.to_thread(_wanted, text, lines, given, options, take, pronounce)
    destination = await asyncio.to_thread(Destination, save_to)
    places = await places_of(credentials)
    ledger = Ledger.of(destination, places.ledger)
    entries = await ledger.run(ledger.entries)
    jobs = [Job(places.provider, request, number) for request, number in wanted]
    async with nanogpt_client(credentials) as client:
        catalogue, balance, unknown = await _look_up(client)
        if lines is None:
            jobs = await _parts(jobs[0], ledger, entries.get(jobs[0].id) or Entry(jobs[0].id), max_chars, client)
    known = {job.id: entries.get(job.id) or Entry(job.id) for job in jobs}
    new = {job.id: job for job in jobs if would_be_submitted(known[job.id], resubmit)}
    requests = [job.request for job in new.values() if job.request]
    doubts = doubts_about(requests, catalogue)
    if doubts.names and strict:
        raise NanoGPTError(" ".join(doubts.names), code=NOT_IN_CATALOGUE)
    held = await ledger.run(_held, ledger, [known[job] for job in known.keys() - new.keys()])
    models = _by_model(new.values(), catalogue or [])
    usd = sum((model.usd for model in models if model.usd is not None), Decimal(0))
    spent = by_currency((await ledger.run(ledger.costs, *known.values())).items())
    warnings = [*doubts.names, *doubts.formats, *too_long(requests, catalogue)]
    if balance is not None and balance.usd is not None and balance.usd < usd:
        warnings.append("The balance does not cover it.")
    if max_cost is not None and usd + spent.get("USD", Decimal(0)) > Decimal(str(max_cost)):
        warnings.append(f"With what is spent that is more than max_cost={max_cost}: nothing would be submitted.")
    return Estimate(
        lines=len(wanted),
        characters=sum(len(request.text) for request, _ in wanted),
        jobs=len(known),
        paid_jobs=len(known) - len(new) - held,
        held_jobs=held,
        new_jobs=len(new),
        models=models,
        usd=usd,
        spent=spent,
        balance=balance,
        unknown=(*unknown, *(_without_price(models) if catalogue is not None else ())),
        warnings=tuple(warnings),
    )


def _wanted(
    text: str | None,
    lines: Any,
    given: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    take: int,
    pronounce: Any,
) -> list[tuple[TTSRequest, int]]:
    """Read what is to be said, as the flows do: requests and their takes.

    Raises:
        NanoGPTError: It is not in order.
    """
    pronunciation = read_pronunciation(pronounce)
    try:
        if text is not None:
            return [(request_with(options, {**given, "text": pronunciation.apply(text).text}), take)]
        defaults = {**given, **options_of(options or {})}
        read = [line.said_with(pronunciation) for line in read_lines(usable(lines), defaults, take)]
        return [(line.request, line.take) for line in read]
    except ValueError as error:
        what = "; ".join(problems_in(error)) if isinstance(error, ValidationError) else error
        raise NanoGPTError(f"{what}.", code="INVALID_REQUEST") from None


async def _look_up(client: NanoGPTClient) -> tuple[list[AudioModel] | None, Balance | None, list[str]]:
    """Read the catalogue and the balance, and say what could not be read."""
    catalogue, balance, unknown = None, None, []
    try:
        catalogue = await client.list_models()
    except NanoGPTError as error:
        _let_a_refused_key_through(error)
        unknown.append(f"The prices, and whether models and voices are there: the catalogue cannot be read ({error}).")
    try:
        balance = await client.get_balance()
    except NanoGPTError as error:
        _let_a_refused_key_through(error)
        unknown.append(f"The balance: it cannot be read ({error}).")
    return catalogue, balance, unknown


def _let_a_refused_key_through(error: NanoGPTError) -> None:
    if error.http_status == httpx.codes.UNAUTHORIZED:
        raise error


async def _parts(job: Job, ledger: Ledger, entry: Entry, max_chars: int | None, client: NanoGPTClient) -> list[Job]:
    """Give the jobs that a text is said as: itself, or its parts, split as they were or would be."""
    if await ledger.run(ledger.audio, entry):
        return [job]
    assert job.request is not None
    plan = await ledger.run(ledger.plan, job.id)
    limit = await longest_part(job, plan, ledger, entry, max_chars, client)
    if limit is None or units(job.request.text.strip()) <= limit:
        return [job]
    return parts_of(job, plan if plan is not None and plan.limit == limit else await plan_of(job, limit))


def _held(ledger: Ledger, entries: Iterable[Entry]) -> int:
    """Count the jobs that are neither paid for nor submitted unasked."""
    return sum(
        not ledger.may_still_be_answered(entry) if entry.is_in_the_air else not entry.is_paid for entry in entries
    )


def _without_price(models: Iterable[ModelEstimate]) -> list[str]:
    return [f"What {one.model} costs: the catalogue has no price of it." for one in models if one.usd is None]


def _by_model(jobs: Iterable[Job], catalogue: Iterable[AudioModel]) -> tuple[ModelEstimate, ...]:
    """Price jobs by the catalogue, the dearest model first."""
    known = {model.id: model for model in catalogue}
    texts: dict[str, list[str]] = {}
    for job in jobs:
        assert job.request is not None
        texts.setdefault(job.request.model, []).append(job.request.text)
    models = []
    for model, said in texts.items():
        found = known.get(model) or AudioModel(id=model)
        prices = [price for price in map(found.price, said) if price is not None]
        models.append(
            ModelEstimate(
                model=model,
                jobs=len(said),
                characters=sum(map(len, said)),
                usd_per_thousand_chars=found.usd_per_thousand_chars,
                usd_per_generation=found.usd_per_generation,
                usd=sum(prices, Decimal(0)) if prices else None,
            )
        )
    return tuple(sorted(models, key=lambda model: model.usd or 0, reverse=True))
