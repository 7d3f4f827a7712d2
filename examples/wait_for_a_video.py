"""Another kind of NanoGPT job, a video, waited for with the same patience.

Shows what `prefect_nanogpt.polling` is for by itself: it knows nothing of speech, only how to look again with pauses
that grow, and when to give up. The address and the words of the status are NanoGPT's for videos, as its documentation
and published clients have them; a job is submitted elsewhere, and its run id given here.

    # prefect-nanogpt, installed as the README says
    export NANOGPT_API_KEY=...
    python wait_for_a_video.py 98b0d593-fe8d-49b8-89c9-233022232297
"""

import asyncio
import os
import sys
from typing import Any

import httpx
from prefect import flow, task

from prefect_nanogpt.polling import DeadlinePassed, PollSchedule, poll

BASE_URL = os.environ.get("NANOGPT_BASE_URL", "https://nano-gpt.com/api")
IS_OVER = {"COMPLETED", "FAILED", "CANCELED"}
PATIENCE = PollSchedule(min_seconds=5, max_seconds=30)
"""Videos take minutes."""


@task(retries=8, retry_delay_seconds=[1, 2, 4, 8, 15, 30, 30, 30], retry_jitter_factor=0.3)
async def look_at_video(run_id: str) -> dict[str, Any]:
    """Ask for the status of a video once, which costs nothing."""
    async with httpx.AsyncClient(headers={"x-api-key": os.environ["NANOGPT_API_KEY"]}, timeout=30) as client:
        answer = await client.get(f"{BASE_URL}/video/status", params={"requestId": run_id})
        status: dict[str, Any] = answer.raise_for_status().json()["data"]
        return status


@flow(log_prints=True)
async def wait_for_video(run_id: str, timeout_seconds: float = 1800, patience: PollSchedule = PATIENCE) -> str:
    """Wait for a video, and give its URL."""
    try:
        outcome = await poll(
            lambda _: look_at_video(run_id),
            is_final=lambda status: status["status"] in IS_OVER,
            schedule=patience,
            timeout_seconds=timeout_seconds,
        )
    except DeadlinePassed as passed:
        raise TimeoutError(f"{run_id} was still under way after {passed.polls} looks. Run this again.") from None
    if outcome.status["status"] != "COMPLETED":
        raise RuntimeError(f"{run_id} ended as {outcome.status['status']}: {outcome.status.get('error')}")
    print(f"Ready after {outcome.seconds:.0f} s and {outcome.polls} looks.")
    return str(outcome.status["output"]["video"]["url"])


if __name__ == "__main__":
    print(asyncio.run(wait_for_video(sys.argv[1])))
