"""The script that one would write first: no Prefect, no retries, no checks, one look every three seconds.

python -m benchmarks.obvious COUNT KIND FOLDER
"""

import asyncio
import json
import os
import sys
from pathlib import Path

import httpx

from benchmarks.jobs import durations_of, memory_mb, texts

BASE = os.environ["NANOGPT_BASE_URL"]


async def say(client: httpx.AsyncClient, text: str, path: Path) -> None:
    """Submit a text, look every three seconds, write the audio."""
    response = await client.post(f"{BASE}/tts", json={"text": text, "model": "Elevenlabs-Turbo-V2.5"})
    ticket = response.json()
    params = {"runId": ticket["runId"], "model": ticket["model"]}
    while True:
        response = await client.get(f"{BASE}/tts/status", params=params)
        status = response.json()
        if status["status"] == "completed":
            break
        await asyncio.sleep(3)
    response = await client.get(status["audioUrl"])
    path.write_bytes(response.content)


async def main(durations: list[float], folder: Path) -> None:
    """Say all the texts at once."""
    headers = {"x-api-key": os.environ["NANOGPT_API_KEY"]}
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(headers=headers, limits=limits, timeout=None) as client:
        await asyncio.gather(
            *(say(client, text, folder / f"{number}.mp3") for number, text in enumerate(texts(durations)))
        )


if __name__ == "__main__":
    asyncio.run(main(durations_of(sys.argv[2], int(sys.argv[1])), Path(sys.argv[3])))
    print(json.dumps({"peak_mb": memory_mb("VmHWM")}))
