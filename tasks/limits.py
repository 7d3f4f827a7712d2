"""Keeping all workers together under the provider's rate limit."""

from __future__ import annotations

import asyncio
import time
from typing import Final
from weakref import WeakKeyDictionary

from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import rate_limit
from prefect.exceptions import ObjectNotFound

__all__ = ["RATE_LIMIT", "stay_under_rate_limit"]

RATE_LIMIT: Final = "nanogpt"
LOOK_AGAIN_SECONDS: Final = 60.0
"""Taking a slot locks Prefect's database, even of a limit that does not exist, so it is only taken where one does."""

_known: tuple[bool, float] = (False, -LOOK_AGAIN_SECONDS)
"""Whether there is a limit, and when that was found out."""
_looking: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


async def stay_under_rate_limit() -> None:
    """Wait for a slot of the global concurrency limit `nanogpt`; where there is no such limit, go on at once.

    The provider documents 25 requests a second over all its routes. Only Prefect's server knows how many workers
    there are, so the limit lives there: `prefect gcl create nanogpt --limit 5 --slot-decay-per-second 20`. A process
    notices a new limit within a minute.
    """
    # A thousand jobs that start together ask once.
    async with _looking.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        is_limited = await _is_limited()
    if is_limited:
        await rate_limit(RATE_LIMIT)


async def _is_limited() -> bool:
    global _known
    is_limited, since = _known
    if time.monotonic() - since >= LOOK_AGAIN_SECONDS:
        try:
            async with get_client() as client:
                await client.read_global_concurrency_limit_by_name(RATE_LIMIT)
            is_limited = True
        except ObjectNotFound:
            is_limited = False
        _known = (is_limited, time.monotonic())
    return is_limited
