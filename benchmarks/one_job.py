"""What one job costs through the flow `wait_for_tts`, beside the bare client and a flow that does nothing.

All in CPU time of this process.

python -m benchmarks.one_job ROUNDS FOLDER
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.sorting import FlowRunSort

from benchmarks.jobs import texts
from prefect_nanogpt.credentials import find_credentials
from prefect_nanogpt.flows import wait_for_tts
from prefect_nanogpt.models import Completed, PollSchedule, Ticket, TTSRequest
from prefect_nanogpt.polling import poll
from prefect_nanogpt.storage import Destination

PAUSE_SECONDS = 0.25
STEADY = PollSchedule(min_seconds=PAUSE_SECONDS, max_seconds=PAUSE_SECONDS, jitter=0)
SHORT, LONG = 0.0, 3.0
WRITTEN_SECONDS = 5.0

Way = Callable[[int, Ticket, str], Awaitable[int]]


async def bare(_: int, ticket: Ticket, folder: str) -> int:
    """Wait for a job and save its audio with the client alone; give the number of polls."""
    async with (await find_credentials()).get_client() as client:
        outcome = await poll(
            lambda _: client.status(ticket),
            is_final=lambda status: isinstance(status, Completed),
            schedule=STEADY,
            timeout_seconds=60,
        )
        assert isinstance(outcome.status, Completed)
        async with client.download(outcome.status.audio_url) as response:
            await Destination(folder).save(response.aiter_bytes(), ticket.run_id)
    return outcome.polls


async def tracked(_: int, ticket: Ticket, folder: str) -> int:
    """Wait for a job and save its audio in a flow; give the number of polls."""
    return (await wait_for_tts(ticket, save_to=folder, poll=STEADY)).polls


@task
async def nothing() -> None:
    """Do nothing."""


@flow
async def empty(tasks: int) -> None:
    """Do nothing in so many tasks, with the pauses of the polls between them."""
    for number in range(tasks):
        if number > 0:
            await asyncio.sleep(PAUSE_SECONDS)
        await nothing()


named = empty.with_options(flow_run_name=lambda: "tts-some-model-0123abcd")
"""The same flow, its runs named by a function, as those of `wait_for_tts` are."""


async def floor(nothing_in: Callable[[int], Awaitable[None]], tasks: int, ticket: Ticket, folder: str) -> int:
    """Run a flow that does nothing in as many tasks; give their number."""
    await nothing_in(tasks)
    return tasks


async def cost(way: Way, tasks: int, seconds: float, folder: str) -> tuple[float, int]:
    """Give the CPU time of one job in seconds, and its polls."""
    async with (await find_credentials()).get_client() as client:
        ticket = await client.submit(TTSRequest(text=texts([seconds])[0]))
    assert isinstance(ticket, Ticket)
    before = time.process_time()
    polls = await way(tasks, ticket, folder)
    return time.process_time() - before, polls


async def task_runs() -> int:
    """Count the task runs of the latest flow run."""
    await asyncio.sleep(WRITTEN_SECONDS)  # the server is told of them later
    async with get_client() as client:
        runs = await client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
        found = await client.read_task_runs(
            flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [runs[0].id]}})
        )
    return len(found)


async def main(rounds: int, folder: str) -> dict[str, Any]:
    """Tell the cost of a run and of a poll, each way, in milliseconds, for each round."""
    _, polls = await cost(tracked, 0, LONG, folder)
    besides = await task_runs() - polls  # the save, and whatever else is a task run
    floors: dict[str, Way] = {"floor": partial(floor, empty), "named_floor": partial(floor, named)}
    ways: dict[str, Way] = {"tracked": tracked, "bare": bare, **floors}
    for way in ways.values():
        await cost(way, 1 + besides, SHORT, folder)
    run_ms: dict[str, list[float]] = {name: [] for name in ways}
    poll_ms: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            once = statistics.median([(await cost(way, 1 + besides, SHORT, folder))[0] for _ in range(3)])
            many, count = await cost(way, polls + besides, LONG, folder)
            more = count - (1 + besides if name in floors else 1)
            run_ms[name].append(1_000 * once)
            poll_ms[name].append(1_000 * (many - once) / more)
    return {"task_runs": 1 + besides, "run_ms": run_ms, "poll_ms": poll_ms}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(int(sys.argv[1]), sys.argv[2]))))
