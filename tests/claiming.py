"""One thing done by many processes at the same moment: python -m tests.claiming HOW SAVE_TO [PROCESSES]

Prints what each of them got, as a JSON list. They are copies of one process, since each import takes seconds.
"""

import asyncio
import errno
import json
import multiprocessing
import os
import sys
from typing import Any
from unittest import mock

from prefect_nanogpt.models import TTSRequest
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import submit_tts

NOTE = "00000000000000000000000000000000.1.sent.json"
TEXT = "Said by many at once."


def claim(save_to: str) -> Any:
    """Create one note in a ledger's folder: whether this process has, and whose note is there then."""
    folder = Destination(save_to).folder(".nanogpt")
    assert folder.claims_exclusively
    gate.wait()
    own = str(os.getpid())
    won = folder.create(NOTE, own.encode())
    if isinstance(os.link, mock.Mock):
        gate.wait()  # there it is there a moment before it is whole
    return {"won": won, "own": own, "found": (folder.read(NOTE) or b"").decode()}


def claim_without_links(save_to: str) -> Any:
    """Claim where the file system has no hard links."""
    with mock.patch("os.link", side_effect=PermissionError(errno.EPERM, "Operation not permitted")):
        return claim(save_to)


def submit(save_to: str) -> Any:
    """Submit one text, and give its run id."""
    gate.wait()
    return asyncio.run(submit_tts(TTSRequest(text=TEXT), save_to)).run_id


if __name__ == "__main__":
    processes = int(sys.argv[3]) if len(sys.argv) > 3 else 16
    fork = multiprocessing.get_context("fork")
    gate = fork.Barrier(processes)
    call = {"claim": claim, "claim-without-links": claim_without_links, "submit": submit}[sys.argv[1]]
    if processes == 1:
        print(json.dumps([call(sys.argv[2])]))
    else:
        with fork.Pool(processes) as pool:
            print(json.dumps(pool.map(call, [sys.argv[2]] * processes, chunksize=1)))
