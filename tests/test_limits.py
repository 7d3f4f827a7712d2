"""The provider's rate limit, kept by Prefect's own means."""

import asyncio

import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate

from prefect_nanogpt import NanoGPTCredentials, limits
from prefect_nanogpt.limits import RATE_LIMIT
from prefect_nanogpt.models import Ticket
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.tasks import get_tts_status

AT_ONCE, A_SECOND, CALLS = 2, 4.0, 12


async def test_status_calls_keep_to_a_global_rate_limit(
    sandbox: Sandbox, credentials: NanoGPTCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_known", (None, -limits.LOOK_AGAIN_SECONDS))
    tickets = [Ticket.model_validate(sandbox.add_job()) for _ in range(CALLS)]

    @flow
    async def impatient() -> None:
        await asyncio.gather(*(get_tts_status(ticket, credentials) for ticket in tickets))

    async with get_client() as client:
        await client.create_global_concurrency_limit(
            GlobalConcurrencyLimitCreate(name=RATE_LIMIT, limit=AT_ONCE, slot_decay_per_second=A_SECOND)
        )
        try:
            await impatient()
        finally:
            await client.delete_global_concurrency_limit_by_name(RATE_LIMIT)

    at = sorted(request.received_at for request in sandbox.requests("status"))
    assert len(at) == CALLS
    # Slots come back at the given rate, so that many calls cannot have come any faster, however fast the machine is.
    assert at[-1] - at[0] > (CALLS - AT_ONCE) / A_SECOND * 0.8


async def test_jobs_that_start_together_ask_for_the_limit_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def counting() -> PrefectClient:
        asked.append(1)
        return get_client()

    monkeypatch.setattr(limits, "_known", (None, -limits.LOOK_AGAIN_SECONDS))
    monkeypatch.setattr(limits, "get_client", counting)
    await asyncio.gather(*(limits.take_slots(1) for _ in range(50)))
    assert len(asked) == 1
