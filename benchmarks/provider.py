"""The sandbox in a process of its own.

Says where it is, then answers each line of its input: `seen` with what it saw so far, `counts` with how many requests
of each kind came and how many faults were given, `charges` with how often each text was paid for, `file MEGABYTES` with
the status of a finished job whose audio is that large.

python -m benchmarks.provider [--delay SECONDS] [--faults SHARE]
"""

import argparse
import asyncio
import json
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import cycle, repeat
from typing import Any

from benchmarks.jobs import SEED, seconds_of
from prefect_nanogpt.sandbox import Answer, Cut, Sandbox, Stall

BUSY = Answer(429, {"error": "Rate limit exceeded", "status": 429}, headers={"retry-after": "1", "connection": "close"})
BROKEN = Answer(500, {"error": "Internal error", "status": 500})
CLOSED_SECONDS = 0.5
OPEN_SECONDS = 4.5

given: Counter[str] = Counter()
"""How many faults were given, by what they were."""


def seen(sandbox: Sandbox) -> dict[str, Any]:
    """Count requests, and tell how long after its completion each job was found to be finished, in seconds.

    Of more than 20,000 requests the sandbox keeps the newest, so the delays are then those of the last jobs.
    """
    requests = sandbox.requests()
    done = {
        request.run_id: request.received_at + seconds_of(request.json["text"])
        for request in requests
        if request.kind == "submit" and request.run_id
    }
    found = {request.run_id: request.received_at for request in requests if request.kind == "status"}
    to_api = [request.received_at for request in requests if request.host == "api"]
    return {
        "submitted": sandbox._api.arrived["submit"],
        "status_calls": sandbox._api.arrived["status"],
        "downloads": sandbox._api.arrived["audio"],
        "most_in_10_seconds": most_within(10.0, to_api),
        "delays": [at - done[run_id] for run_id, at in found.items() if run_id in done],
    }


def most_within(seconds: float, times: list[float]) -> int:
    """Count the most that came within so many seconds."""
    most = first = 0
    for last, time in enumerate(times):
        while times[first] < time - seconds:
            first += 1
        most = max(most, last + 1 - first)
    return most


def charges(sandbox: Sandbox) -> dict[str, int]:
    """Count the charges for each text, as it is spoken."""
    return Counter(sandbox._api.jobs[entry.run_id].utterance.text for entry in sandbox.ledger.charges)


def large_file(sandbox: Sandbox, megabytes: int) -> dict[str, Any]:
    """Offer a WAV file of silence."""
    ticket = sandbox.add_job("A long one.")
    size = megabytes * 1024**2
    header = b"RIFF" + (size - 8).to_bytes(4, "little") + b"WAVEfmt " + (16).to_bytes(4, "little")
    header += (1).to_bytes(2, "little") + (1).to_bytes(2, "little") + (48_000).to_bytes(4, "little")
    header += (96_000).to_bytes(4, "little") + (2).to_bytes(2, "little") + (16).to_bytes(2, "little")
    header += b"data" + (size - 44).to_bytes(4, "little")
    answer = Answer(body=header + bytes(size - len(header)), headers={"content-type": "audio/wav"})
    sandbox.on_audio(ticket["runId"], repeat(answer))
    return sandbox.completed_body(ticket["runId"])


def be_distant(sandbox: Sandbox, seconds: float) -> None:
    """Be silent for so long before the body of each answer of the API."""
    for script in (sandbox.on_submit, sandbox.on_models, sandbox.on_balance):
        script(repeat(Stall(0, seconds)))
    sandbox.on_status(None, repeat(Stall(0, seconds)))


def be_faulty(sandbox: Sandbox, share: float) -> None:
    """Answer a share of all requests with faults after which each may be made again without doubt."""
    sandbox.on_submit(faults("submission", share, [BUSY]))
    sandbox.on_status(None, faults("status call", share, [BROKEN, BUSY, Cut()]))
    sandbox.on_audio(None, faults("download", share, [Cut(after_bytes=1000), BROKEN, Cut()]))


def faults(what: str, share: float, kinds: Sequence[Answer | Cut]) -> Iterator[Answer | Cut | None]:
    """Give a fault by chance, each kind in turn, and otherwise None."""
    rng, turn = random.Random(SEED), cycle(kinds)
    while True:
        fault = next(turn) if rng.random() < share else None
        given[what] += fault is not None
        yield fault


def often_closed(sandbox: Sandbox) -> str:
    """Offer the API at another port, where connections are refused for a moment now and then; give its base URL.

    Connections that there are stay, so that what was sent over them is answered.
    """
    port = int(sandbox.root_url.rpartition(":")[2])
    started = threading.Event()
    address: list[int] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while piece := await reader.read(65_536):
                writer.write(piece)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()

    async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pass_on(reader, there_writer), pass_on(there_reader, writer))

    async def run() -> None:
        while True:
            server = await asyncio.start_server(relay, "127.0.0.1", address[0] if address else 0, backlog=4096)
            address[:] = [server.sockets[0].getsockname()[1]]
            started.set()
            await asyncio.sleep(OPEN_SECONDS)
            server.close()
            given["closed listener"] += 1
            await asyncio.sleep(CLOSED_SECONDS)

    threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
    started.wait()
    return f"http://127.0.0.1:{address[0]}/api"


def main() -> None:
    """Serve until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.provider")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds that each answer of the API takes longer")
    parser.add_argument(
        "--faults", type=float, default=0.0, help="the share of requests that are answered with a fault"
    )
    arguments = parser.parse_args()
    with Sandbox(job_seconds=0.0, balance="1000000", speak=False) as sandbox:
        base_url = sandbox.base_url
        if arguments.delay:
            be_distant(sandbox, arguments.delay)
        if arguments.faults:
            be_faulty(sandbox, arguments.faults)
            base_url = often_closed(sandbox)
        print(json.dumps({"base_url": base_url}), flush=True)
        for line in sys.stdin:
            match line.split():
                case ["file", megabytes]:
                    answer = large_file(sandbox, int(megabytes))
                case ["charges"]:
                    answer = charges(sandbox)
                case ["counts"]:
                    answer = {"requests": dict(sandbox._api.arrived), "faults": dict(given)}
                case _:
                    answer = seen(sandbox)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
