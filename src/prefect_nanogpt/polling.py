"""How often to look at a job, and when to stop: no network, no Prefect, and a clock that tests can replace."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["DeadlinePassed", "Outcome", "PollSchedule", "poll"]

S = TypeVar("S")

SHORTEST_PAUSE_SECONDS: Final = 0.25
LONGEST_PAUSE_SECONDS: Final = 86_400.0
FIRST_PAUSE_AS_AFTER_SECONDS: Final = 3.0
"""A new job is first looked at after the pause of a job that was waited for so long, 1.4 s by default: so few are
finished before that an earlier look is not worth its call."""
LAST_LOOK_SECONDS: Final = 30.0
"""How long the look at the deadline may take, so that a slow answer at the last moment still counts."""


class PollSchedule(BaseModel):
    """The pauses between two looks at a job, in seconds.

    The pause grows with the square root of the time waited. Where nothing is known of a job's duration but its order
    of magnitude, that is the growth which finds a finished job soonest for a given number of calls.

    Example:
        >>> PollSchedule(jitter=0).pause(elapsed=16.0)
        3.2
    """

    model_config = ConfigDict(frozen=True, extra="forbid", title="Poll schedule")

    min_seconds: float = Field(
        default=0.8,
        ge=SHORTEST_PAUSE_SECONDS,
        le=LONGEST_PAUSE_SECONDS,
        title="Shortest pause, in seconds",
        description="The shortest pause between two status calls, in seconds; at least 0.25.",
    )
    max_seconds: float = Field(
        default=4.5,
        ge=SHORTEST_PAUSE_SECONDS,
        le=LONGEST_PAUSE_SECONDS,
        title="Longest pause, in seconds",
        description="The longest pause between two status calls, in seconds.",
    )
    growth: float = Field(
        default=0.8,
        ge=0,
        le=LONGEST_PAUSE_SECONDS,
        title="Growth",
        description="The pause is this times the square root of the seconds waited so far.",
    )
    jitter: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        title="Jitter",
        description="The share by which each pause is randomly shortened or lengthened, so that jobs spread out.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> PollSchedule:
        if self.max_seconds < self.min_seconds:
            raise ValueError("max_seconds must not be below min_seconds")
        return self

    def pause(self, elapsed: float, rng: Callable[[], float] = random.random) -> float:
        """Say how long to pause, in seconds, once `elapsed` seconds have been waited."""
        pause = min(self.max_seconds, max(self.min_seconds, self.growth * math.sqrt(elapsed)))
        return max(SHORTEST_PAUSE_SECONDS, pause * (1 + self.jitter * (2 * rng() - 1)))


class Outcome(Generic[S]):
    """What `poll` ended with: the final status, the number of looks it took, and the seconds waited."""

    def __init__(self, status: S, polls: int, seconds: float) -> None:
        self.status = status
        self.polls = polls
        self.seconds = seconds


class DeadlinePassed(Exception):
    """`poll` gave up at its deadline, after a last look."""

    def __init__(self, polls: int, seconds: float) -> None:
        super().__init__(polls, seconds)
        self.polls = polls
        self.seconds = seconds


async def poll(
    look: Callable[[float], Awaitable[S]],
    *,
    is_final: Callable[[S], bool],
    schedule: PollSchedule,
    timeout_seconds: float,
    look_at_once: bool = True,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> Outcome[S]:
    """Look at a job until it is final or the deadline has passed.

    The last pause ends at the deadline and is followed by one more look, so a job that finished meanwhile counts.

    Args:
        look: Reads the status once; it is told how many seconds are left.
        is_final: Whether a status ends the wait.
        schedule: The pauses between two looks.
        timeout_seconds: How long to wait in all, in seconds.
        look_at_once: False for a job that was accepted just now, which cannot be finished yet.
        clock: The current time in seconds, never set back.
        sleep: Waits for a number of seconds.

    Returns:
        The final status, with the number of looks and the seconds it took.

    Raises:
        DeadlinePassed: The job was not final at the deadline.
    """
    start = clock()
    polls = 0
    if not look_at_once:
        await sleep(min(schedule.pause(FIRST_PAUSE_AS_AFTER_SECONDS), timeout_seconds))
    while True:
        left = timeout_seconds - (clock() - start)
        polls += 1
        try:
            async with asyncio.timeout(max(left, LAST_LOOK_SECONDS)):
                status = await look(max(left, 0.0))
        except TimeoutError:
            raise DeadlinePassed(polls, clock() - start) from None
        elapsed = clock() - start
        if is_final(status):
            return Outcome(status, polls, elapsed)
        if elapsed >= timeout_seconds:
            raise DeadlinePassed(polls, elapsed)
        await sleep(min(schedule.pause(elapsed), timeout_seconds - elapsed))
