"""How often to look, and how late the end is seen: the real schedule code on a virtual clock."""

import asyncio
import math
import random
import statistics
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

from benchmarks.jobs import SEED
from prefect_nanogpt.polling import PollSchedule, poll

SHORTEST, LONGEST = 1.0, 180.0
"""The durations, in seconds: log-uniform between these, since only their order of magnitude is known."""
JOBS = 2_500
"""Each stands for an equal share of the durations: nothing of them is left to chance, only the jitter is."""
STEPS_A_SECOND = 10
LONGEST_PAUSE = 10
A_SECOND, A_DURATION = 5.0, 30.0
"""How many status calls it is worth to see an end a second sooner, and to see it one duration of the job sooner. With
these weights, calls and delays of the bound are all a little below ours."""
BOUND = "the bound: the best times for such durations"


class Cost(NamedTuple):
    """What a way of waiting costs, on average over the jobs."""

    calls: float
    delay: float
    relative_delay: float


class Clock:
    """A clock that sleeping turns forward at once."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Tell the time, in seconds."""
        return self.now

    async def sleep(self, seconds: float) -> None:
        """Turn the clock forward."""
        self.now += seconds


Wait = Callable[[float, Clock, Callable[[], Awaitable[bool]]], Coroutine[Any, Any, None]]


def ours(schedule: PollSchedule, *, look_at_once: bool) -> Wait:
    """Wait as the flows do."""

    async def wait(duration: float, clock: Clock, look: Callable[[], Awaitable[bool]]) -> None:
        await poll(
            lambda _: look(),
            is_final=bool,
            schedule=schedule,
            timeout_seconds=3_600,
            look_at_once=look_at_once,
            clock=clock,
            sleep=clock.sleep,
        )

    return wait


def loop(pause: Callable[[], float]) -> Wait:
    """Wait in a loop: look, pause, look."""

    async def wait(duration: float, clock: Clock, look: Callable[[], Awaitable[bool]]) -> None:
        while not await look():
            await clock.sleep(pause())

    return wait


def best_times() -> list[float]:
    """Find the times to look, in seconds, for which mean calls and delays, weighed, are least of all.

    By dynamic programming over steps of a tenth of a second, from the end: what it costs to go on from a time depends
    on the times after it alone. No such times have less of one, calls or either delay, without more of another.
    """
    end = round(LONGEST * STEPS_A_SECOND)
    whole = math.log(LONGEST / SHORTEST)
    cost, following = [0.0] * (end + 1), [end] * (end + 1)

    def cost_of_next(now: int, then: int) -> float:
        since, until = (max(step / STEPS_A_SECOND, SHORTEST) for step in (now, then))
        ended = math.log(until / since) / whole
        delay = until * ended - (until - since) / whole
        relative_delay = until * (1 / since - 1 / until) / whole - ended
        calls = math.log(LONGEST / since) / whole  # of each job that has not ended before, one
        return calls + A_SECOND * delay + A_DURATION * relative_delay + cost[then]

    for now in range(end - 1, -1, -1):
        next_ones = range(now + 1, min(now + LONGEST_PAUSE * STEPS_A_SECOND, end) + 1)
        cost[now], following[now] = min((cost_of_next(now, then), then) for then in next_ones)
    times, step = [], 0
    while step < end:
        step = following[step]
        times.append(step / STEPS_A_SECOND)
    return times


def at(times: list[float]) -> Wait:
    """Look at set times."""

    async def wait(duration: float, clock: Clock, look: Callable[[], Awaitable[bool]]) -> None:
        for time in times:
            await clock.sleep(time - clock.now)
            if await look():
                return

    return wait


def forewarned(schedule: PollSchedule, error: float) -> Wait:
    """Wait as the flows do, but from four fifths of a duration that was predicted within a factor of so much.

    Not what the flows do: it tells what a prediction would be worth, were there one.
    """
    rng = random.Random(SEED)

    async def wait(duration: float, clock: Clock, look: Callable[[], Awaitable[bool]]) -> None:
        predicted = duration * error ** rng.uniform(-1, 1)
        await clock.sleep(0.8 * predicted)
        await ours(schedule, look_at_once=True)(duration, clock, look)

    return wait


async def cost_of(wait: Wait, durations: list[float]) -> Cost:
    """Wait for every job, and average."""
    calls, delays = [], []
    for duration in durations:
        clock = Clock()
        looks = 0

        async def look(duration: float = duration, clock: Clock = clock) -> bool:
            nonlocal looks
            looks += 1
            return clock.now >= duration

        await wait(duration, clock, look)
        calls.append(looks)
        delays.append(clock.now - duration)
    relative = [delay / duration for delay, duration in zip(delays, durations, strict=True)]
    return Cost(statistics.mean(calls), statistics.mean(delays), statistics.mean(relative))


def compare() -> dict[str, Cost]:
    """Compare the ways of waiting over the same jobs."""
    rng = random.Random(SEED)
    schedule = PollSchedule()
    ways = {
        "text_to_speech": ours(schedule, look_at_once=False),
        "wait_for_tts": ours(schedule, look_at_once=True),
        "every 3 s (NanoGPT's sample)": loop(lambda: 3.0),
        "every 1 s (openai)": loop(lambda: 1.0),
        "every 0.5 s (replicate)": loop(lambda: 0.5),
        "every 0.1 s (fal)": loop(lambda: 0.1),
        "every 6 ± 1.5 s (runway)": loop(lambda: rng.uniform(4.5, 7.5)),
        BOUND: at(best_times()),
        "if the duration were known within a factor of 1.5": forewarned(schedule, 1.5),
        "if the duration were known within a factor of 4": forewarned(schedule, 4.0),
    }
    durations = [SHORTEST * (LONGEST / SHORTEST) ** ((number + 0.5) / JOBS) for number in range(JOBS)]
    random.seed(SEED)
    return {name: asyncio.run(cost_of(way, durations)) for name, way in ways.items()}
