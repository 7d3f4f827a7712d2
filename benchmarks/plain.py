"""The same jobs written plainly in Prefect: a task for each step, and a task run for each look.

python -m benchmarks.plain COUNT KIND FOLDER
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import httpx
from prefect import flow, task

from benchmarks.jobs import durations_of, memory_mb, texts

BASE = os.environ["NANOGPT_BASE_URL"]
client = httpx.AsyncClient(headers={"x-api-key": os.environ["NANOGPT_API_KEY"]}, timeout=None)


@task
async def submit(text: str) -> dict[str, Any]:
    """Submit a text."""
    response = await client.post(f"{BASE}/tts", json={"text": text, "model": "Elevenlabs-Turbo-V2.5"})
    return dict(response.json())


@task
async def get_status(ticket: dict[str, Any]) -> dict[str, Any]:
    """Look once."""
    params = {"runId": ticket["runId"], "model": ticket["model"]}
    response = await client.get(f"{BASE}/tts/status", params=params)
    return dict(response.json())


@task
async def download(url: str, path: Path) -> None:
    """Write the audio."""
    response = await client.get(url)
    path.write_bytes(response.content)


async def say(text: str, path: Path) -> None:
    """Take a text from submission to file."""
    ticket = await submit(text)
    while (status := await get_status(ticket))["status"] != "completed":
        await asyncio.sleep(3)
    await download(status["audioUrl"], path)


@flow
async def plain(durations: list[float], folder: Path) -> None:
    """Say all the texts at once."""
    async with client:
        await asyncio.gather(*(say(text, folder / f"{number}.mp3") for number, text in enumerate(texts(durations))))


if __name__ == "__main__":
    asyncio.run(plain(durations_of(sys.argv[2], int(sys.argv[1])), Path(sys.argv[3])))
    print(json.dumps({"peak_mb": memory_mb("VmHWM")}))
