"""Keeping all workers together under the provider's rate limit."""

from __future__ import annotations

import asyncio
import time
from typing import Final
from weakref import WeakKeyDictionary

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound

__all__ = ["RATE_LIMIT", "take_slots"]

RATE_LIMIT: Final = "nanogpt"
LOOK_AGAIN_SECONDS: Final = 60.0
"""Taking a slot locks Prefect's database, even of a limit that does not exist, so it is only taken where one does."""

_known: tuple[int | None, float] = (None, -LOOK_AGAIN_SECONDS)
"""How many slots the limit has, None where there is no limit, and when that was found out."""
_looking: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


async def take_slots(wanted: int) -> int:
    """Wait for slots of the global concurrency limit `nanogpt`; where there is no such limit, go on at once.

    The provider documents 25 requests a second over all its routes. Only Prefect's server knows how many workers
    there are, so the limit lives there: `prefect gcl create nanogpt --limit 10 --slot-decay-per-second 24`. A process
    notices a new limit within a minute.

    Args:
        wanted: How many requests wait for a slot.

    Returns:
        How many may leave: at most half of the limit's slots are taken at once, which costs as much as taking one, and
        leaves some for others.
    """
    # A thousand jobs that start together ask once.
    async with _looking.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
        limit = await _slots_of_limit()
    if limit is None:
        return wanted
    slots = max(1, min(wanted, limit // 2))
    from prefect.concurrency.asyncio import rate_limit  # few need it

    await rate_limit(RATE_LIMIT, occupy=slots)
    return slots


async def _slots_of_limit() -> int | None:
    global _known
    limit, since = _known
    if time.monotonic() - since >= LOOK_AGAIN_SECONDS:
        try:
            async with get_client() as client:
                limit = (await client.read_global_concurrency_limit_by_name(RATE_LIMIT)).limit
        except ObjectNotFound:
            limit = None
        _known = (limit, time.monotonic())
    return limit
