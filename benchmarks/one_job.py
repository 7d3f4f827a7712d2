"""What one job costs through the flow `wait_for_tts`, on top of the bare client, in CPU time of this process.

python -m benchmarks.one_job ROUNDS FOLDER
"""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

from benchmarks.jobs import texts
from prefect_nanogpt.credentials import find_credentials
from prefect_nanogpt.flows import wait_for_tts
from prefect_nanogpt.models import Completed, PollSchedule, Ticket, TTSRequest
from prefect_nanogpt.polling import poll
from prefect_nanogpt.storage import Destination

STEADY = PollSchedule(min_seconds=0.25, max_seconds=0.25, jitter=0)
SHORT, LONG = 0.0, 5.0


async def bare(ticket: Ticket, folder: str) -> int:
    """Wait for a job and save its audio with the client alone."""
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


async def tracked(ticket: Ticket, folder: str) -> int:
    """Wait for a job and save its audio in a flow."""
    return (await wait_for_tts(ticket, save_to=folder, poll=STEADY)).polls


async def cost(way: Callable[[Ticket, str], Awaitable[int]], seconds: float, folder: str) -> tuple[float, int]:
    """Give the CPU time of one job, and its polls."""
    async with (await find_credentials()).get_client() as client:
        ticket = await client.submit(TTSRequest(text=texts([seconds])[0]))
    assert isinstance(ticket, Ticket)
    before = time.process_time()
    polls = await way(ticket, folder)
    return time.process_time() - before, polls


async def main(rounds: int, folder: str) -> dict[str, float]:
    """Tell the cost of a poll and of a run, each way, in milliseconds."""
    result = {}
    for way in (bare, tracked):
        await cost(way, SHORT, folder)
        short = [await cost(way, SHORT, folder) for _ in range(rounds)]
        long = [await cost(way, LONG, folder) for _ in range(rounds)]
        once = statistics.median(seconds for seconds, _ in short)
        many = statistics.median(seconds for seconds, _ in long)
        polls = statistics.median(polls for _, polls in long)
        a_poll = (many - once) / (polls - 1)
        result[f"{way.__name__}_poll_ms"] = 1_000 * a_poll
        result[f"{way.__name__}_run_ms"] = 1_000 * (once - a_poll)
    return result


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(int(sys.argv[1]), sys.argv[2]))))
