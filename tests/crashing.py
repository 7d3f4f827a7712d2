"""Runs a given flow run of `text_to_speech` in a process of its own, which kills itself at a given point.

    python -m tests.crashing FLOW_RUN_ID [POINT]

The points where the provider or the audio host is in the middle of something are the sandbox's to hold, and the
parent's to kill at.
"""

import asyncio
import inspect
import os
import signal
import sys
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow_async

from prefect_nanogpt import client as http
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.ledger import Ledger
from prefect_nanogpt.report import Report
from prefect_nanogpt.storage import Destination


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_before(owner: type, method: str) -> None:
    setattr(owner, method, die)


def die_after(owner: type, method: str) -> None:
    original = getattr(owner, method)

    def and_die(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        die()

    async def and_die_later(*args: Any, **kwargs: Any) -> None:
        await original(*args, **kwargs)
        die()

    setattr(owner, method, and_die_later if inspect.iscoroutinefunction(original) else and_die)


def lose_patience() -> None:
    """Wait for the answer to a submission for a moment only."""
    http.LAST_WORD_SECONDS = 0.5  # type: ignore[misc]


POINTS = {
    "before the claim": lambda: die_before(Ledger, "claim"),
    "before the POST is sent": lambda: die_before(NanoGPTClient, "post"),
    "after the answer is read": lambda: die_after(NanoGPTClient, "post"),
    "after the answer is noted": lambda: die_after(Ledger, "note_answer"),
    "after the file is in place": lambda: die_before(Ledger, "note_saved"),
    "after it is noted as saved": lambda: die_before(Destination, "remove"),
    "before the artifact": lambda: die_before(Report, "finished"),
    "after the artifact": lambda: die_after(Report, "finished"),
    "when it has waited long enough": lose_patience,
}


async def run(flow_run_id: UUID) -> None:
    async with get_client() as client:
        flow_run = await client.read_flow_run(flow_run_id)
    await run_flow_async(text_to_speech, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        POINTS[sys.argv[2]]()
    asyncio.run(run(UUID(sys.argv[1])))
