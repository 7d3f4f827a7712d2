"""Runs our tasks, and tasks of somebody's own that use ours, in a pool of processes: python -m tests.pooling SAVE_TO

This is the main module, so whatever a pool is given of it travels by value, with the globals that it refers to.
"""

import asyncio
import json
import sys
from typing import Any

from prefect import flow, task
from prefect.task_runners import ProcessPoolTaskRunner

from prefect_nanogpt import flows
from prefect_nanogpt.credentials import nanogpt_client
from prefect_nanogpt.errors import BatchPartial, NanoGPTError
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch
from prefect_nanogpt.models import AudioFile, PollSchedule, Ticket, TTSRequest, TTSStatus
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import get_tts_status, save_audio, submit_tts

QUICK = PollSchedule(min_seconds=0.25, max_seconds=0.25, jitter=0)
TEXTS = ["The first of the pool.", "The second of the pool."]
LINES = [{"id": "good", "text": "Good."}, {"id": "bad", "text": "[sandbox:reject] Bad."}]


@task
async def ask(ticket: Ticket) -> TTSStatus:
    """Poll with our client."""
    async with nanogpt_client(None) as client:
        return await client.status(ticket)


@task
async def narrate(text: str, save_to: str) -> AudioFile:
    """Say a text with our flow."""
    return await text_to_speech(text, save_to=save_to, poll=QUICK, name="narrated")


@task
def fetch(ticket: Ticket, save_to: str) -> str:
    """Wait for a job with our flow, called by way of its module in a task that is not asynchronous."""
    assert Destination(save_to).is_local
    return asyncio.run(flows.wait_for_tts(ticket, save_to=save_to, poll=QUICK)).location


@task
async def narrate_all(save_to: str) -> None:
    """Say lines, one of which is refused."""
    await text_to_speech_batch(LINES, save_to=save_to, poll=QUICK)


@flow
def pool(save_to: str) -> dict[str, Any]:
    tickets = submit_tts.map([TTSRequest(text=text) for text in TEXTS], save_to=save_to).result()
    statuses = get_tts_status.with_options(name="ask").map(tickets).result()
    names = [ticket.run_id for ticket in tickets]
    told: dict[str, Any] = {
        "saved": [audio.location for audio in save_audio.map(statuses, names, save_to=save_to).result()],
        "asked": ask.submit(tickets[0]).result() == statuses[0],
        "narrated": narrate.submit(TEXTS[0], save_to).result().location,
        "fetched": fetch.submit(tickets[1], save_to).result(),
    }
    try:
        narrate.submit("[sandbox:reject] Refused.", save_to).result()
    except NanoGPTError as error:
        told["refused"] = [error.code, error.ticket is not None]
    try:
        narrate_all.submit(save_to).result()
    except BatchPartial as error:
        told["rows"] = [row.outcome for row in error.rows]
    return told


if __name__ == "__main__":
    print(json.dumps(pool.with_options(task_runner=ProcessPoolTaskRunner(max_workers=2))(sys.argv[1])))
