"""The order in which requests leave."""

import asyncio
import time

import pytest

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.client import REQUESTS_AT_ONCE
from prefect_nanogpt.flows import text_to_speech_batch
from prefect_nanogpt.models import Ticket, TTSRequest
from prefect_nanogpt.sandbox import Hang, Sandbox
from prefect_nanogpt.turns import Turns


class Slots:
    """A limit that others share, and who has taken from it."""

    def __init__(self) -> None:
        self.free = asyncio.Semaphore(0)
        self.asked = 0
        self.at_once = 1

    async def take(self, wanted: int) -> int:
        self.asked += 1
        await self.free.acquire()
        return min(wanted, self.at_once)


class Requests:
    """Requests that wait for their turn, and the order in which they left."""

    def __init__(self, turns: Turns) -> None:
        self.left: list[str] = []
        self._turns = turns

    def begin(self, name: str, *, first: bool = False) -> "asyncio.Task[None]":
        async def leave() -> None:
            await self._turns.wait(first=first)
            self.left.append(name)

        return asyncio.create_task(leave(), name=name)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def slots() -> Slots:
    return Slots()


@pytest.fixture
async def turns(slots: Slots) -> Turns:
    turns = Turns()
    turns.take_slots = slots.take
    return turns


async def test_submissions_leave_before_all_else_that_waits(turns: Turns, slots: Slots) -> None:
    requests = Requests(turns)
    waiting = [requests.begin(f"status {number}") for number in range(3)]
    await settle()
    waiting += [requests.begin(f"submission {number}", first=True) for number in range(2)]
    await settle()
    assert slots.asked == 1, "the order is open until a slot is free"
    for _ in waiting:
        slots.free.release()
    await asyncio.gather(*waiting)
    # The first one was alone when it came, so the slot that it waits for is its own.
    assert requests.left == ["status 0", "submission 0", "submission 1", "status 1", "status 2"]


async def test_requests_that_wait_take_their_slots_together(turns: Turns, slots: Slots) -> None:
    slots.at_once = 4
    requests = Requests(turns)
    first = requests.begin("status 0")
    await settle()
    waiting = [requests.begin(f"status {number}") for number in range(1, 6)]
    for _ in range(3):
        slots.free.release()
    await asyncio.gather(first, *waiting)
    # One alone, then four of the five that had come meanwhile, then the last.
    assert (slots.asked, len(requests.left)) == (3, 6)


@pytest.mark.parametrize("given_up", [0, 1], ids=["at its turn", "in line"])
async def test_a_request_that_is_given_up_holds_up_nobody(turns: Turns, slots: Slots, given_up: int) -> None:
    requests = Requests(turns)
    waiting = [requests.begin(f"status {number}") for number in range(3)]
    await settle()
    waiting.pop(given_up).cancel()
    await settle()
    slots.free.release()
    slots.free.release()
    await asyncio.wait_for(asyncio.gather(*waiting), timeout=10)
    assert requests.left == [f"status {number}" for number in range(3) if number != given_up]


async def test_a_request_that_is_given_up_in_the_moment_of_its_turn_passes_it_on(turns: Turns, slots: Slots) -> None:
    requests = Requests(turns)
    waiting = [requests.begin(f"status {number}") for number in range(3)]
    await settle()
    slots.free.release()
    while not requests.left:
        await asyncio.sleep(0)
        waiting[1].cancel()
    slots.free.release()
    await asyncio.wait_for(waiting[2], timeout=10)
    assert requests.left == ["status 0", "status 2"]


async def test_a_limit_that_cannot_be_asked_fails_one_request_and_not_the_next(turns: Turns) -> None:
    answers = iter([RuntimeError("no server"), None])

    async def take(wanted: int) -> int:
        if (error := next(answers)) is not None:
            raise error
        return wanted

    turns.take_slots = take
    requests = Requests(turns)
    failing, other = requests.begin("failing"), requests.begin("other")
    with pytest.raises(RuntimeError, match="no server"):
        await failing
    await other


async def test_requests_come_no_faster_than_they_may() -> None:
    turns = Turns()
    turns.per_second = 100.0
    start = time.monotonic()
    await asyncio.gather(*(turns.wait() for _ in range(21)))
    assert time.monotonic() - start > 0.19


async def test_after_a_pause_requests_do_not_make_up_for_it() -> None:
    turns = Turns()
    turns.per_second = 100.0
    await turns.wait()
    await asyncio.sleep(0.3)
    start = time.monotonic()
    await asyncio.gather(*(turns.wait() for _ in range(21)))
    assert time.monotonic() - start > 0.18


async def test_of_the_requests_of_a_batch_submissions_are_the_first(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[bool] = []
    wait = Turns.wait

    async def noting(self: Turns, *, first: bool = False) -> None:
        noted.append(first)
        await wait(self, first=first)

    monkeypatch.setattr(Turns, "wait", noting)
    lines = [{"id": str(number), "text": f"Line {number}."} for number in range(3)]
    await text_to_speech_batch(lines, save_to=save_to, credentials=credentials)
    kinds = [request.kind for request in sandbox.requests() if request.kind != "audio"]
    assert noted.count(True) == kinds.count("submit") == 3
    assert noted.count(False) == len(kinds) - 3


async def test_status_calls_do_not_wait_for_submissions_that_are_answered_late(
    sandbox: Sandbox, credentials: NanoGPTCredentials
) -> None:
    sandbox.on_submit([Hang(seconds=3.0)] * REQUESTS_AT_ONCE)
    ticket = Ticket.model_validate(sandbox.add_job())
    async with credentials.get_client() as client:
        submissions = [
            asyncio.create_task(client.submit(TTSRequest(text=f"Slow {number}."))) for number in range(REQUESTS_AT_ONCE)
        ]
        while len(sandbox.requests("submit")) < REQUESTS_AT_ONCE:  # noqa: ASYNC110 - the sandbox is another process
            await asyncio.sleep(0.02)
        await client.status(ticket)
        assert not any(submission.done() for submission in submissions)
        await asyncio.gather(*submissions, return_exceptions=True)
