"""What may be spent: it stops new submissions, and never the fetching of what is paid for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Final, NamedTuple

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.errors import NanoGPTError, ProviderError
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.models import AudioContent, SpeechModel, Submission, Ticket, TTSRequest

__all__ = ["COST_LIMIT_EXCEEDED", "Budget", "usd_in"]

COST_LIMIT_EXCEEDED: Final = "COST_LIMIT_EXCEEDED"


def usd_in(costs: Mapping[str | None, Decimal]) -> Decimal:
    """Give what was charged in USD. Other currencies are not added to it; none named counts as USD."""
    return costs.get("USD", Decimal(0)) + costs.get(None, Decimal(0))


class Reserved(NamedTuple):
    """What is set aside for a job: the catalogue's price in USD, or a guess by what other jobs have cost."""

    usd: Decimal
    is_known: bool
    request: TTSRequest


class Budget:
    """A limit on what jobs may cost together, in USD.

    A job whose price the catalogue has is refused where it does not fit. Of the others nobody knows the price before
    the ticket, so they go one after another until the first tickets tell, and again once there is little left: never
    is more than one job's cost beyond the limit.

    Args:
        limit: The most that may be spent in all, earlier runs and failed tries included.
        spent: What is spent already.
    """

    def __init__(self, limit: Decimal, spent: Decimal = Decimal(0)) -> None:
        self.limit = limit
        self.spent = spent
        self._reserved: list[Reserved] = []
        self._models: dict[str, SpeechModel | None] = {}
        self._seen: dict[str, list[tuple[int, Decimal]]] = {}
        self._changed = asyncio.Condition()
        self._unknowable: str | None = None

    async def read_prices(self, models: Iterable[str], client: NanoGPTClient) -> None:
        """Look prices up in the provider's catalogue. Where it cannot be read they are not known, and not zero."""
        try:
            for model in sorted(set(models)):
                self._models[model] = await client.speech_model(model)
        except NanoGPTError as error:
            run_logger().warning(
                "The catalogue cannot be read, so what a text costs is only known from its ticket. Texts are submitted "
                "one after another until the first tickets tell: %s",
                error,
            )

    def _price(self, request: TTSRequest) -> Decimal | None:
        model = self._models.get(request.model)
        return model.price(request.text) if model else None

    def refuse_unless_affordable(self, requests: Iterable[TTSRequest]) -> None:
        """Refuse a whole that the catalogue's prices put above the limit, before any of it is submitted.

        Raises:
            ProviderError: They do; code `COST_LIMIT_EXCEEDED`.
        """
        new = sum((self._price(request) or Decimal(0) for request in requests), Decimal(0))
        if new and self.spent + new > self.limit:
            raise self._exceeded(f"By the provider's catalogue this costs {new:f} USD")

    async def reserve(self, request: TTSRequest) -> Reserved:
        """Set the price of a job aside, waiting for the tickets of others where only they tell what it may be.

        Raises:
            ProviderError: The limit does not allow it; code `COST_LIMIT_EXCEEDED`.
        """
        price = self._price(request)
        async with self._changed:
            while True:
                if price is None and self._unknowable:
                    raise self._exceeded(self._unknowable)
                usd = self._guess(request) if price is None else price
                left = self.limit - self.spent - sum(reserved.usd for reserved in self._reserved)
                if usd is not None and usd <= left:
                    break
                if not self._reserved:
                    if price is not None:
                        raise self._exceeded(f"By the provider's catalogue this text costs {price:f} USD")
                    if left <= 0:
                        raise self._exceeded("The limit is reached")
                    break
                await self._changed.wait()
            self._reserved.append(reserved := Reserved(usd or Decimal(0), price is not None, request))
            return reserved

    async def settle(self, reserved: Reserved, submission: Submission | None, *, may_be_charged: bool) -> None:
        """Put what a job was charged in the place of what was set aside; nothing where it was not accepted."""
        async with self._changed:
            self._reserved.remove(reserved)
            if submission is not None:
                self.spent += self._charged(reserved, submission)
            elif may_be_charged:
                self.spent += reserved.usd
            self._changed.notify_all()

    def _charged(self, reserved: Reserved, submission: Submission) -> Decimal:
        cost, currency = None, None
        if not isinstance(submission, AudioContent):
            cost = submission.cost
            currency = submission.payment_source if isinstance(submission, Ticket) else submission.currency
        if cost is not None and currency in (None, "USD"):
            self._seen.setdefault(reserved.request.model, []).append((len(reserved.request.text), cost))
            return cost
        if not reserved.is_known:
            self._unknowable = (
                f"Neither the catalogue nor the provider's answers say what {reserved.request.model} costs in USD"
            )
        return reserved.usd

    def _guess(self, request: TTSRequest) -> Decimal | None:
        """Guess a price by what jobs of the model have cost: at least the most of them, and more for longer texts."""
        seen = self._seen.get(request.model, ())
        return max((max(cost, cost * len(request.text) / length) for length, cost in seen), default=None)

    def _exceeded(self, why: str) -> ProviderError:
        return ProviderError(
            f"{why}, and {self.spent:f} USD are spent already; that is more than max_cost={self.limit} allows. Nothing "
            "was submitted for it.",
            code=COST_LIMIT_EXCEEDED,
        )
