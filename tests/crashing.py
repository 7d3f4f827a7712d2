"""Runs a given flow run of `text_to_speech` in a process of its own, which kills itself at a given point.

    python -m tests.crashing FLOW_RUN_ID [POINT]

The points where the provider or the audio host is in the middle of something are the sandbox's to hold, and the
parent's to kill at.
"""

import asyncio
import os
import signal
import sys
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow_async

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.report import Report


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(owner: type, method: str) -> None:
    setattr(owner, method, die)


def die_after(owner: type, method: str) -> None:
    original = getattr(owner, method)

    async def and_die(*args: Any, **kwargs: Any) -> None:
        await original(*args, **kwargs)
        die()

    setattr(owner, method, and_die)


POINTS = {
    "before the POST is sent": lambda: die_before(NanoGPTClient, "submit"),
    "after the answer is read": lambda: die_after(NanoGPTClient, "submit"),
    "after the file is in place": lambda: die_before(Report, "finished"),
    "after the artifact": lambda: die_after(Report, "finished"),
}


async def run(flow_run_id: UUID) -> None:
    async with get_client() as client:
        flow_run = await client.read_flow_run(flow_run_id)
    await run_flow_async(text_to_speech, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        POINTS[sys.argv[2]]()
    asyncio.run(run(UUID(sys.argv[1])))
