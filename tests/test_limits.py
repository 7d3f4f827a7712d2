"""The provider's rate limit, kept by Prefect's own means."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from datetime import datetime, timedelta, tzinfo
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from prefect_nanogpt import NanoGPTCredentials, limits
from prefect_nanogpt.limits import RATE_LIMIT, SharedLimit
from prefect_nanogpt.models import Ticket
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.tasks import get_tts_status

AT_ONCE, A_SECOND, CALLS = 2, 4.0, 12


@pytest.fixture(autouse=True)
def not_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test before has found out that there is no limit."""
    monkeypatch.setattr(limits, "_look_again_at", 0.0)


@pytest.fixture
async def limit(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """A limit whose slots come back, unless it is given another rate."""
    a_second = getattr(request, "param", A_SECOND)
    async with get_client() as client:
        await client.create_global_concurrency_limit(
            GlobalConcurrencyLimitCreate(name=RATE_LIMIT, limit=AT_ONCE, slot_decay_per_second=a_second)
        )
        yield
        await client.delete_global_concurrency_limit_by_name(RATE_LIMIT)


@pytest.fixture
def refusals(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What Prefect's server has answered to requests for slots that it did not grant."""
    seen = []
    increment = PrefectClient.increment_concurrency_slots

    async def watched(*arguments: Any) -> httpx.Response:
        try:
            return await increment(*arguments)
        except httpx.HTTPStatusError as error:
            seen.append(error.response.status_code)
            raise

    monkeypatch.setattr(PrefectClient, "increment_concurrency_slots", watched)
    return seen


def busy(monkeypatch: pytest.MonkeyPatch, times: int) -> list[httpx.Request]:
    """Let Prefect's server be too busy to give out slots so many times; give the requests for them as they come."""
    send = httpx.AsyncHTTPTransport.handle_async_request
    asked: list[httpx.Request] = []

    async def busy_at_first(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/increment"):
            asked.append(request)
            if len(asked) <= times:
                return httpx.Response(503)
        return await send(transport, request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", busy_at_first)
    return asked


@pytest.mark.parametrize("clock", [0, -3_600, 3_600])
@pytest.mark.usefixtures("limit")
async def test_status_calls_keep_to_a_global_rate_limit(
    clock: int, sandbox: Sandbox, credentials: NanoGPTCredentials, monkeypatch: pytest.MonkeyPatch, refusals: list[int]
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
            return datetime.now(tz) + timedelta(seconds=clock)

    monkeypatch.setattr(limits, "datetime", Clock)
    tickets = [Ticket.model_validate(sandbox.add_job()) for _ in range(CALLS)]

    @flow
    async def impatient() -> None:
        await asyncio.gather(*(get_tts_status(ticket, credentials) for ticket in tickets))

    await impatient()
    at = sorted(request.received_at for request in sandbox.requests("status"))
    assert len(at) == CALLS
    # Slots come back at the given rate, so that many calls cannot have come any faster, however fast the machine is.
    assert at[-1] - at[0] > (CALLS - AT_ONCE) / A_SECOND * 0.8
    # Where Prefect refuses slots, it forgets what has come back. Only whose clock is ahead asks too early.
    assert bool(refusals) == (clock > 0)


@pytest.mark.usefixtures("limit")
async def test_a_busy_database_is_asked_again_at_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = busy(monkeypatch, times=3)
    async with SharedLimit() as limit:
        with caplog.at_level(logging.DEBUG, "prefect.client"):
            assert await limit.take_slots(1) == 1
    assert len(asked) == 4
    assert "Another attempt will be made" not in caplog.text


@pytest.mark.usefixtures("limit")
async def test_a_database_that_stays_busy_is_left_to_the_patience_of_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    busy(monkeypatch, times=sys.maxsize)
    monkeypatch.setattr(limits, "BUSY_SECONDS", 0.0)
    async with SharedLimit() as limit:
        with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}), pytest.raises(httpx.HTTPStatusError, match="503"):
            await limit.take_slots(1)


@pytest.mark.parametrize("limit", [0.0], indirect=True)
@pytest.mark.usefixtures("limit")
async def test_a_limit_whose_slots_do_not_come_back_is_refused_with_the_reason() -> None:
    async with SharedLimit() as limit:
        with pytest.raises(httpx.HTTPStatusError, match="decay"):
            await limit.take_slots(1)


async def test_jobs_that_start_together_ask_for_the_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counting() -> PrefectClient:
        asked.append(1)
        return get_client()

    monkeypatch.setattr(limits, "get_client", counting)
    async with SharedLimit() as limit:
        await asyncio.gather(*(limit.take_slots(1) for _ in range(50)))
    assert len(asked) == 1
