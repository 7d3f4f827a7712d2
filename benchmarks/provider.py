"""The sandbox in a process of its own.

Says where it is, then answers each line of its input: `seen` with what it saw so far, `file MEGABYTES` with the ticket
of a finished job whose audio is that large.
"""

import json
import sys
from itertools import repeat
from typing import Any

from benchmarks.jobs import seconds_of
from prefect_nanogpt.sandbox import Answer, Sandbox


def seen(sandbox: Sandbox) -> dict[str, Any]:
    """Count requests, and tell how long after its completion each job was found to be finished, in seconds."""
    requests = sandbox.requests()
    done = {
        request.run_id: request.received_at + seconds_of(request.json["text"])
        for request in requests
        if request.kind == "submit"
    }
    found = {request.run_id: request.received_at for request in requests if request.kind == "status"}
    kinds = [request.kind for request in requests]
    return {
        "submitted": kinds.count("submit"),
        "status_calls": kinds.count("status"),
        "downloads": kinds.count("audio"),
        "delays": [at - done[run_id] for run_id, at in found.items() if run_id in done],
    }


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


def main() -> None:
    """Serve until the input ends."""
    with Sandbox(job_seconds=0.0, balance="1000000", speak=False) as sandbox:
        print(json.dumps({"base_url": sandbox.base_url}), flush=True)
        for line in sys.stdin:
            command, *arguments = line.split()
            answer = large_file(sandbox, int(arguments[0])) if command == "file" else seen(sandbox)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
