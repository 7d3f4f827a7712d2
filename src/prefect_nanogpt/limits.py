"""Keeping all workers together under the provider's rate limit."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from typing import Final, Self
from weakref import WeakKeyDictionary

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import ObjectNotFound

__all__ = ["RATE_LIMIT", "SharedLimit"]

RATE_LIMIT: Final = "nanogpt"
LOOK_AGAIN_SECONDS: Final = 60.0
"""A limit that does not exist is looked for again after so long."""
BUSY_SECONDS: Final = 0.05
BUSY_TIMES: Final = 20
"""How often, and how soon, a database that was busy is asked again, before it is left alone for longer."""

_look_again_at = 0.0
_looking: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()


class SharedLimit:
    """The global concurrency limit `nanogpt`, of which requests take slots that come back at a rate.

    The provider documents 25 requests a second over all its routes. Only Prefect's server knows how many workers
    there are, so the limit lives there: `prefect gcl create nanogpt --limit 10 --slot-decay-per-second 24`. A process
    notices a new limit within a minute.
    """

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._impatient: PrefectClient | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def take_slots(self, wanted: int) -> int:
        """Wait for slots of the limit; where there is none, go on at once.

        Args:
            wanted: How many requests wait for a slot.

        Returns:
            How many may leave: at most half of the limit's slots are taken at once, which costs as much as taking one,
            and leaves some for others.

        Raises:
            httpx.HTTPError: Prefect's server does not answer, or refuses, as it does where slots do not come back.
        """
        global _look_again_at
        # One after another: a thousand jobs that start together ask once whether there is a limit.
        async with _looking.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            if time.monotonic() < _look_again_at:
                return wanted
            try:
                async with get_client() as client:
                    return await self._take(client, wanted)
            except ObjectNotFound:
                _look_again_at = time.monotonic() + LOOK_AGAIN_SECONDS
                return wanted

    async def _take(self, client: PrefectClient, wanted: int) -> int:
        """Ask for slots when they are free, and not before.

        Prefect counts what has come back since the limit was last changed. It changes the limit too when it refuses
        slots, but then it does not count: what came back until then is lost.
        """
        changed_at, seen_at = None, 0.0
        while True:
            limit = await client.read_global_concurrency_limit_by_name(RATE_LIMIT)
            slots = max(1, min(wanted, limit.limit // 2))
            if limit.updated and limit.slot_decay_per_second:
                if limit.updated != changed_at:
                    changed_at, seen_at = limit.updated, time.monotonic()
                # A clock that is behind the server's does not say how long ago the change was.
                since = max((datetime.now(UTC) - limit.updated).total_seconds(), time.monotonic() - seen_at)
                seconds = (limit.active_slots + slots - limit.limit) / limit.slot_decay_per_second - since
                if seconds > 0:
                    await asyncio.sleep(seconds)
                    continue
            try:
                await self._ask_for(client, slots)
            except httpx.HTTPStatusError as error:
                if error.response.status_code != httpx.codes.LOCKED:
                    raise
                # Another was faster, or the clock is ahead of the server's.
                await asyncio.sleep(float(error.response.headers["Retry-After"]))
            else:
                return slots

    async def _ask_for(self, patient: PrefectClient, slots: int) -> None:
        """Ask for slots, and soon again where the database is busy.

        SQLite refuses at once where another has written since the transaction began, which is over as soon. Prefect's
        client would ask again after two seconds.
        """
        if self._impatient is None:
            hooks = {"response": [_raise_if_busy]}
            self._impatient = await self._stack.enter_async_context(get_client(httpx_settings={"event_hooks": hooks}))
        for _ in range(BUSY_TIMES):
            with suppress(_BusyError):
                await self._impatient.increment_concurrency_slots([RATE_LIMIT], slots, "rate_limit")
                return
            await asyncio.sleep(BUSY_SECONDS)
        await patient.increment_concurrency_slots([RATE_LIMIT], slots, "rate_limit")


class _BusyError(Exception):
    """The server could not write what it was asked to."""


async def _raise_if_busy(response: httpx.Response) -> None:
    if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        raise _BusyError
