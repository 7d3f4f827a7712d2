"""Makes the runs that it is told to, and logs all that there is to log, to `log` and to standard error.

    python -m tests.leaking

The first line on standard input is JSON: where the key is to come from (`environment`, `block` or `parameter`) and the
fields of the block. Each further line is the parameters of a run, answered on standard output with the name of its end
once the server has been told of it.
"""

import asyncio
import json
import logging
import sys
from typing import Any

from prefect import State, flow
from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import APILogHandler

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch
from prefect_nanogpt.models import PollSchedule
from prefect_nanogpt.tasks import save_audio

save_audio.retry_delay_seconds = [0.01]

QUICK = PollSchedule(min_seconds=0.25, max_seconds=0.25, jitter=0)


@flow(persist_result=True)
async def publish(parameters: dict[str, Any], credentials: NanoGPTCredentials | None) -> Any:
    """Say something with our flows in a flow of somebody's own, who keeps results."""
    say: Any = text_to_speech_batch if "lines" in parameters else text_to_speech
    return await say(**parameters, credentials=credentials, poll=QUICK)


async def run(parameters: dict[str, Any], credentials: NanoGPTCredentials | None) -> str:
    state: State[Any] = await publish(parameters, credentials, return_state=True)
    end = await state.aresult(raise_on_failure=False)
    await APILogHandler.aflush()
    return end.code if isinstance(end, NanoGPTError) else str(state.name)


def log_everything() -> None:
    setup_logging()  # now, since the first flow would do it, and take the handlers away
    root = logging.getLogger()
    root.setLevel(logging.DEBUG)
    root.addHandler(logging.FileHandler("log"))


def main() -> None:
    told = json.loads(sys.stdin.readline())
    given = None
    if told["from"] != "environment":
        given = NanoGPTCredentials.model_validate(told["fields"])
    log_everything()
    if told["from"] == "block":
        assert given is not None
        given.save("default", overwrite=True, _sync=True)  # type: ignore[call-arg]
        given = None
    for line in sys.stdin:
        print(asyncio.run(run(json.loads(line), given)), flush=True)


if __name__ == "__main__":
    main()
