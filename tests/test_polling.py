"""The poll loop on a clock of its own: no network, no Prefect, no waiting."""

import asyncio
import itertools
import random

import pytest
from pydantic import ValidationError

from prefect_nanogpt.polling import SHORTEST_PAUSE_SECONDS, DeadlinePassed, Outcome, PollSchedule, poll

STEADY = PollSchedule(min_seconds=2, max_seconds=2, jitter=0)


class Job:
    """A job that is finished at some time, on a clock that only moves when somebody sleeps or looks."""

    def __init__(self, finished_at: float = float("inf"), look_seconds: float = 0.0) -> None:
        self.now = 1000.0
        self.finished_at = self.now + finished_at
        self.look_seconds = look_seconds
        self.looks: list[float] = []
        self.told: list[float] = []
        self.pauses: list[float] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    async def look(self, seconds_left: float) -> bool:
        self.looks.append(self.now - 1000.0)
        self.told.append(seconds_left)
        self.now += self.look_seconds
        return self.now >= self.finished_at

    async def wait(
        self, timeout_seconds: float, schedule: PollSchedule = STEADY, look_at_once: bool = True
    ) -> Outcome[bool]:
        return await poll(
            self.look,
            is_final=bool,
            schedule=schedule,
            timeout_seconds=timeout_seconds,
            look_at_once=look_at_once,
            clock=self.clock,
            sleep=self.sleep,
        )


async def test_a_finished_job_takes_one_look_and_no_pause() -> None:
    job = Job(finished_at=0)

    outcome = await job.wait(timeout_seconds=60)

    assert (outcome.status, outcome.polls, outcome.seconds) == (True, 1, 0.0)
    assert job.pauses == []


async def test_looks_are_a_pause_apart_until_the_job_is_finished() -> None:
    job = Job(finished_at=5)

    outcome = await job.wait(timeout_seconds=60)

    assert job.looks == [0, 2, 4, 6]
    assert (outcome.polls, outcome.seconds) == (4, 6.0)


async def test_a_job_that_was_just_accepted_is_given_a_pause_first() -> None:
    job = Job(finished_at=1)

    outcome = await job.wait(timeout_seconds=60, look_at_once=False)

    assert job.looks == [2]
    assert (outcome.polls, outcome.seconds) == (1, 2.0)


@pytest.mark.parametrize(
    ("schedule", "first"),
    [
        (PollSchedule(jitter=0), 1.39),
        (PollSchedule(jitter=0, min_seconds=2), 2),
        (PollSchedule(jitter=0, min_seconds=0.25, max_seconds=0.5), 0.5),
        (PollSchedule(jitter=0, min_seconds=0.25, growth=0), 0.25),
    ],
)
async def test_the_first_pause_of_a_new_job_is_longer_than_the_shortest_unless_the_schedule_says_otherwise(
    schedule: PollSchedule, first: float
) -> None:
    job = Job(finished_at=0)

    await job.wait(timeout_seconds=60, schedule=schedule, look_at_once=False)

    assert job.looks == [pytest.approx(first, abs=0.005)]


async def test_the_first_pause_ends_at_the_deadline_at_the_latest() -> None:
    job = Job()

    with pytest.raises(DeadlinePassed):
        await job.wait(timeout_seconds=1, look_at_once=False)

    assert job.looks == [1]


async def test_the_last_look_is_at_the_deadline() -> None:
    job = Job()

    with pytest.raises(DeadlinePassed) as passed:
        await job.wait(timeout_seconds=5)

    assert job.looks == [0, 2, 4, 5]
    assert (passed.value.polls, passed.value.seconds) == (4, 5.0)


async def test_a_job_that_is_finished_at_the_last_look_counts() -> None:
    job = Job(finished_at=5)

    outcome = await job.wait(timeout_seconds=5)

    assert (outcome.status, outcome.polls) == (True, 4)


async def test_a_look_that_ends_after_the_deadline_is_the_last() -> None:
    job = Job(look_seconds=4)

    with pytest.raises(DeadlinePassed) as passed:
        await job.wait(timeout_seconds=5)

    assert job.looks == [0, 5]
    assert passed.value.seconds == 9.0


async def test_a_look_that_ends_after_the_deadline_may_find_the_job_finished() -> None:
    job = Job(finished_at=8, look_seconds=4)

    assert (await job.wait(timeout_seconds=5)).status is True


async def test_each_look_is_told_how_many_seconds_are_left() -> None:
    job = Job(look_seconds=3)

    with pytest.raises(DeadlinePassed):
        await job.wait(timeout_seconds=7)

    assert job.told == [7, 2]


async def test_a_look_that_never_ends_is_given_up_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefect_nanogpt.polling.LAST_LOOK_SECONDS", 0.01)

    async def look(_: float) -> bool:
        await asyncio.Event().wait()
        return True

    with pytest.raises(DeadlinePassed) as passed:
        await poll(look, is_final=bool, schedule=STEADY, timeout_seconds=0.01)

    assert passed.value.polls == 1


async def test_a_look_that_fails_ends_the_wait_with_its_error() -> None:
    async def look(_: float) -> bool:
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        await poll(look, is_final=bool, schedule=STEADY, timeout_seconds=60)


@pytest.mark.parametrize(
    ("schedule", "most"),
    [
        (PollSchedule(jitter=0), 145),
        (PollSchedule(), 150),
        (PollSchedule(min_seconds=0.25, max_seconds=0.25, jitter=0), 2402),
        (PollSchedule(min_seconds=0.25, max_seconds=600, growth=0, jitter=0.99), 2402),
    ],
)
async def test_ten_minutes_take_no_more_looks_than_this(schedule: PollSchedule, most: int) -> None:
    job = Job()

    with pytest.raises(DeadlinePassed) as passed:
        await job.wait(timeout_seconds=600, schedule=schedule)

    assert 100 < passed.value.polls == len(job.looks) <= most
    assert passed.value.seconds == pytest.approx(600)


async def test_no_two_looks_are_closer_than_the_shortest_pause_but_the_last() -> None:
    job = Job()

    with pytest.raises(DeadlinePassed):
        await job.wait(timeout_seconds=60, schedule=PollSchedule(min_seconds=0.25, growth=0.1, jitter=0.9))

    gaps = [later - earlier for earlier, later in itertools.pairwise(job.looks)]
    assert len(gaps) > 20
    assert min(gaps[:-1]) >= SHORTEST_PAUSE_SECONDS - 1e-9


# The schedule


def test_the_pause_grows_with_the_root_of_the_time_waited_between_its_bounds() -> None:
    schedule = PollSchedule(jitter=0)

    assert [schedule.pause(elapsed) for elapsed in (0, 1, 4, 16, 25, 3600)] == [0.8, 0.8, 1.6, 3.2, 4.0, 4.5]


@pytest.mark.parametrize(("drawn", "pause"), [(0.0, 1.8), (0.5, 2.0), (1.0, 2.2)])
def test_jitter_makes_the_pause_longer_or_shorter_by_its_share(drawn: float, pause: float) -> None:
    schedule = PollSchedule(min_seconds=2, max_seconds=2, jitter=0.1)

    assert schedule.pause(0, rng=lambda: drawn) == pytest.approx(pause)


def test_jitter_draws_from_the_whole_of_its_range_and_not_beyond() -> None:
    schedule = PollSchedule(min_seconds=2, max_seconds=2, jitter=0.5)
    pauses = [schedule.pause(0, rng=random.Random(seed).random) for seed in range(500)]

    assert 1.0 <= min(pauses) < 1.1
    assert 2.9 < max(pauses) <= 3.0


def test_no_jitter_makes_a_pause_shorter_than_a_quarter_of_a_second() -> None:
    schedule = PollSchedule(min_seconds=0.3, max_seconds=0.3, jitter=0.9)

    assert schedule.pause(0, rng=lambda: 0.0) == 0.25
    assert schedule.pause(0, rng=lambda: 1.0) == pytest.approx(0.57)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"min_seconds": 0.2}, "greater than or equal to 0.25"),
        ({"max_seconds": 0}, "greater than or equal to 0.25"),
        ({"min_seconds": 3, "max_seconds": 2}, "max_seconds must not be below min_seconds"),
        ({"growth": -1}, "greater than or equal to 0"),
        ({"jitter": 1}, "less than 1"),
        ({"jitter": -0.1}, "greater than or equal to 0"),
    ],
    ids=str,
)
def test_a_schedule_that_would_hammer_or_makes_no_sense_is_refused(broken: dict[str, float], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        PollSchedule.model_validate(broken)
