"""Keeping all workers together under the provider's rate limit."""

from __future__ import annotations

import time
from typing import Final

from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import rate_limit
from prefect.exceptions import ObjectNotFound

__all__ = ["RATE_LIMIT", "stay_under_rate_limit"]

RATE_LIMIT: Final = "nanogpt"
LOOK_AGAIN_SECONDS: Final = 60.0
"""Taking a slot locks Prefect's database, even of a limit that does not exist, so it is only taken where one does."""

_no_limit_until: float | None = None


async def stay_under_rate_limit() -> None:
    """Wait for a slot of the global concurrency limit `nanogpt`; where there is no such limit, go on at once.

    The provider documents 25 requests a second over all its routes. Only Prefect's server knows how many workers
    there are, so the limit lives there: `prefect gcl create nanogpt --limit 20 --slot-decay-per-second 20`. A process
    notices a new limit within a minute.
    """
    global _no_limit_until
    if _no_limit_until is not None and time.monotonic() < _no_limit_until:
        return
    try:
        async with get_client() as client:
            await client.read_global_concurrency_limit_by_name(RATE_LIMIT)
    except ObjectNotFound:
        _no_limit_until = time.monotonic() + LOOK_AGAIN_SECONDS
    else:
        await rate_limit(RATE_LIMIT)
