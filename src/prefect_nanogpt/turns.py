"""The order in which the requests of a client leave: one by one, evenly spaced, submissions first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

__all__ = ["Turns"]


class Turns:
    """Lets requests leave one by one, those that come `first` before all others that wait.

    Under a rate limit that order ends a batch soonest: a job that waits at the provider costs nothing, and the sooner
    it is there, the sooner it is done.

    Attributes:
        per_second: How many requests may leave in a second, evenly spaced; None for no limit.
        take_slots: Takes slots of a limit that others share, for up to so many requests that wait for them, and says
            how many it has got; None for no such limit.
    """

    def __init__(self) -> None:
        self.per_second: float | None = None
        self.take_slots: Callable[[int], Awaitable[int]] | None = None
        self._slots = 0
        self._next = 0.0
        self._is_taken = False
        self._waiting: list[tuple[bool, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    async def wait(self, *, first: bool = False) -> None:
        """Wait until a request may leave."""
        if self.per_second is None and self.take_slots is None:
            return
        async with self._at_the_head(first):
            if self.per_second is not None:
                await asyncio.sleep(self._next - time.monotonic())
                # One that is late does not delay the next, and several that are late do not leave together.
                self._next = max(self._next + 1 / self.per_second, time.monotonic())
            if self.take_slots is not None:
                if not self._slots:
                    self._slots = await self.take_slots(1 + len(self._waiting))
                self._slots -= 1

    @asynccontextmanager
    async def _at_the_head(self, first: bool) -> AsyncIterator[None]:
        if self._is_taken:
            turn = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (not first, next(self._order), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if not turn.cancelled():  # it came in the same moment
                    self._pass_on()
                raise
        self._is_taken = True
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            *_, turn = heapq.heappop(self._waiting)
            if not turn.done():  # its request was not given up meanwhile
                turn.set_result(None)
                return
        self._is_taken = False
