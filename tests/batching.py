"""Runs `text_to_speech_batch` in a process of its own: python -m tests.batching LINES SAVE_TO [PARAMETERS AS JSON]"""

import asyncio
import json
import sys
from typing import Any

from prefect_nanogpt.flows import text_to_speech_batch
from prefect_nanogpt.models import PollSchedule

if __name__ == "__main__":
    parameters: dict[str, Any] = {
        "poll": PollSchedule(min_seconds=0.5, max_seconds=0.5),
        "requests_per_second": 25,
        **json.loads(sys.argv[3] if len(sys.argv) > 3 else "{}"),
    }
    state = asyncio.run(text_to_speech_batch(sys.argv[1], save_to=sys.argv[2], **parameters, return_state=True))
    sys.exit(0 if state.name in {"Completed", "TTS_BATCH_PARTIAL"} else 1)
