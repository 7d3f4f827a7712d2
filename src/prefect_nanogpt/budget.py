"""What may be spent: it stops new submissions, and never the fetching of what is paid for."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping
from decimal import Decimal
from typing import Final, NamedTuple

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.errors import NanoGPTError, ProviderError
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.ledger import Entry, Job, Ledger
from prefect_nanogpt.models import AudioContent, AudioModel, Submission, Ticket, TTSRequest

__all__ = ["COST_LIMIT_EXCEEDED", "Budget"]

COST_LIMIT_EXCEEDED: Final = "COST_LIMIT_EXCEEDED"


class Reserved(NamedTuple):
    """What is set aside for a try, in USD: the catalogue's price, or a guess by what other jobs have cost, or None."""

    usd: Decimal | None
    job: Job
    number: int


class Budget:
    """A limit on what jobs may cost together, in USD.

    A job whose price the catalogue has is refused where it does not fit. Of the others nobody knows the price before
    the ticket, so they go one after another until the first tickets tell, and again once there is little left: never
    is more than one job's cost beyond the limit. Where the provider does not say in USD what it charged, or whether it
    did, what was set aside counts.

    Args:
        limit: The most that may be spent in all, earlier runs and failed tries included.
        ledger: What earlier runs have spent.
        client: What to read the catalogue with.
    """

    def __init__(self, limit: Decimal, ledger: Ledger, client: NanoGPTClient) -> None:
        self.limit = limit
        self.spent = Decimal(0)
        self.spent_on: dict[str, Decimal] = {}
        """What was spent on each job, by its digest."""
        self._ledger = ledger
        self._client = client
        self._counted: set[tuple[str, int]] = set()
        self._reserved: list[Reserved] = []
        self._models: dict[str, AudioModel | None] = {}
        self._seen: dict[str, list[tuple[int, Decimal]]] = {}
        self._changed = asyncio.Condition()
        self._unknowable: str | None = None
        self._refused: str | None = None

    async def count(self, jobs: Iterable[tuple[Job, Entry]], told: Mapping[str, Decimal] | None = None) -> None:
        """Count the tries of jobs that are in the ledger and not counted yet, whichever run has made them.

        Args:
            jobs: The jobs, and what the ledger knows of them.
            told: What is known to have been charged for jobs, in USD, without asking the ledger.
        """
        unknown: list[tuple[Job, Entry, list[int]]] = []
        for job, entry in jobs:
            new = [number for number in entry.charged if (job.id, number) not in self._counted]
            if told is not None and job.id in told:
                self._add(job, new, told[job.id])
            elif new:
                unknown.append((job, entry, new))
        if not unknown:
            return
        look = self._ledger.spent
        spent = await self._ledger.run(lambda: [(job, look(entry, new)) for job, entry, new in unknown])
        unpriced: list[Job] = []
        for job, tries in spent:
            self._add(job, tries, sum((usd for usd in tries.values() if usd is not None), Decimal(0)))
            unpriced += [job for usd in tries.values() if usd is None]
        await self.read_prices(unpriced)
        for job in unpriced:
            price = self._price(job)
            self._add(job, (), self._cannot_know(job) if price is None else price)

    def _add(self, job: Job, numbers: Iterable[int], usd: Decimal) -> None:
        self._counted |= {(job.id, number) for number in numbers}
        self.spent_on[job.id] = self.spent_on.get(job.id, Decimal(0)) + usd
        self.spent += usd

    async def read_prices(self, jobs: Iterable[Job]) -> None:
        """Look prices up in the provider's catalogue. Where it cannot be read they are not known, and not zero."""
        new = sorted({_request_of(job).model for job in jobs} - self._models.keys())
        try:
            for model in new:
                self._models[model] = await self._client.find_model(model)
        except NanoGPTError as error:
            self._models |= {model: None for model in new if model not in self._models}
            run_logger().warning(
                "The catalogue cannot be read, so what a text costs is only known from its ticket. Texts are submitted "
                "one after another until the first tickets tell: %s",
                error,
            )

    def _price(self, job: Job) -> Decimal | None:
        request = _request_of(job)
        model = self._models.get(request.model)
        return model.price(request.text) if model else None

    def refusal_of(self, jobs: Iterable[Job]) -> ProviderError | None:
        """Refuse everything if the catalogue's prices put a whole above the limit, and give the reason.

        Args:
            jobs: What would be submitted, before any of it is.
        """
        new = sum((self._price(job) or Decimal(0) for job in jobs), Decimal(0))
        if not new or self.spent + new <= self.limit:
            return None
        self._refused = f"By the provider's catalogue this costs {new:f} USD"
        return self._exceeded(self._refused)

    def shares(self, jobs: Mapping[int, Collection[Job]], new: Collection[str]) -> dict[int, Decimal]:
        """Divide the limit among groups of jobs.

        Each gets what is spent on its jobs, the catalogue's prices of those that would be submitted, and its part of
        the rest, by these prices; by the lengths of the texts where the catalogue has not all of them.

        Args:
            jobs: All jobs, each once, by the number of their group.
            new: The digests of the jobs that would be submitted.
        """
        prices = {number: [self._price(job) for job in group if job.id in new] for number, group in jobs.items()}
        costs = {number: sum((price or Decimal(0) for price in some), Decimal(0)) for number, some in prices.items()}
        weights = costs
        if any(price is None for some in prices.values() for price in some):
            costs = dict.fromkeys(jobs, Decimal(0))
            weights = {
                number: Decimal(sum(len(_request_of(job).text) for job in group if job.id in new))
                for number, group in jobs.items()
            }
        if not any(weights.values()):
            weights = dict.fromkeys(jobs, Decimal(1))
        rest = self.limit - self.spent - sum(costs.values())
        shares = {
            number: sum((self.spent_on.get(job.id, Decimal(0)) for job in group), Decimal(0))
            + costs[number]
            + rest * weights[number] / sum(weights.values())
            for number, group in jobs.items()
        }
        return {number: max(share, Decimal(0)) for number, share in shares.items()}

    async def reserve(self, job: Job, number: int) -> Reserved:
        """Set the price of a try aside, waiting for the tickets of others where only they tell what it may be.

        Raises:
            ProviderError: The limit does not allow it; code `COST_LIMIT_EXCEEDED`.
        """
        price = self._price(job)
        async with self._changed:
            while True:
                if self._refused:
                    raise self._exceeded(self._refused)
                if price is None and self._unknowable:
                    raise ProviderError(self._unknowable, code=COST_LIMIT_EXCEEDED)
                usd = self._guess(job) if price is None else price
                left = self.limit - self.spent - sum(reserved.usd or Decimal(0) for reserved in self._reserved)
                if usd is not None and usd <= left:
                    break
                if not self._reserved:
                    if price is not None:
                        raise self._exceeded(f"By the provider's catalogue this text costs {price:f} USD")
                    if left <= 0:
                        raise self._exceeded("The limit is reached")
                    break
                await self._changed.wait()
            self._reserved.append(reserved := Reserved(usd, job, number))
            return reserved

    async def settle(self, reserved: Reserved, submission: Submission | None, *, may_be_charged: bool) -> None:
        """Put what a job was charged in the place of what was set aside; nothing where it was not accepted."""
        async with self._changed:
            self._reserved.remove(reserved)
            if submission is not None or may_be_charged:
                self._add(reserved.job, [reserved.number], self._charged(reserved, submission))
            self._changed.notify_all()

    def _charged(self, reserved: Reserved, submission: Submission | None) -> Decimal:
        cost, currency = None, None
        if isinstance(submission, Ticket):
            cost, currency = submission.cost, submission.payment_source
        elif submission is not None and not isinstance(submission, AudioContent):
            cost, currency = submission.cost, submission.currency
        if cost is not None and currency in (None, "USD"):
            request = _request_of(reserved.job)
            self._seen.setdefault(request.model, []).append((len(request.text), cost))
            return cost
        return self._cannot_know(reserved.job) if reserved.usd is None else reserved.usd

    def _cannot_know(self, job: Job) -> Decimal:
        """Submit no more texts without a price, since one was, or may have been, charged, and nobody says how much."""
        self._unknowable = (
            "Neither the catalogue nor the provider's answers say in USD what was, or may have been, charged for a "
            f"text by {_request_of(job).model}, so max_cost={self.limit} cannot be kept. Nothing was submitted for it."
        )
        return Decimal(0)

    def _guess(self, job: Job) -> Decimal | None:
        """Guess a price by what jobs of the model have cost: at least the most of them, and more for longer texts."""
        request = _request_of(job)
        seen = self._seen.get(request.model, ())
        return max((max(cost, cost * len(request.text) / length) for length, cost in seen), default=None)

    def _exceeded(self, why: str) -> ProviderError:
        return ProviderError(
            f"{why}, and {self.spent:f} USD are, or may be, spent already; that is more than max_cost={self.limit} "
            "allows. Nothing was submitted for it.",
            code=COST_LIMIT_EXCEEDED,
        )


def _request_of(job: Job) -> TTSRequest:
    assert job.request is not None
    return job.request
