"""Tasks and flows that travel by value to other processes, as process pools, Dask and Ray send them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from prefect import Flow, Task
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt import flows, tasks
from prefect_nanogpt.sandbox import Sandbox
from tests.conftest import API_KEY
from tests.pooling import LINES, TEXTS

TICKET = {"runId": "98b0d593", "model": "Kokoro-82m"}
EXAMPLES: dict[str, dict[str, Any]] = {
    "collect_open_tickets": {"folders": ["audio"]},
    "text_to_speech": {"text": "Hello.", "poll": {"min_seconds": 1}},
    "text_to_speech_batch": {"lines": [{"id": "one", "text": "Hello."}]},
    "wait_for_tts": {"ticket": TICKET},
}
UNDERSTAND = """
import json, pickle, sys, typing
found = pickle.load(sys.stdin.buffer)
typing.get_type_hints(found.fn)
if len(sys.argv) > 1:
    found.validate_parameters(json.loads(sys.argv[1]))
print(found.name)
"""


@pytest.mark.parametrize("name", [*tasks.__all__, *flows.__all__])
def test_every_task_and_flow_travels_by_value_and_understands_its_parameters_where_it_arrives(name: str) -> None:
    here: Task[Any, Any] | Flow[Any, Any] = getattr(tasks, name, None) or getattr(flows, name)
    parameters = [json.dumps(EXAMPLES[name])] if isinstance(here, Flow) else []
    done = subprocess.run(
        [sys.executable, "-c", UNDERSTAND, *parameters],
        input=cloudpickle.dumps(here),
        capture_output=True,
        timeout=120,
    )
    assert done.stdout.decode().split() == [here.name], done.stderr.decode()


def test_tasks_and_what_they_give_and_raise_travel_between_the_processes_of_a_pool(
    sandbox: Sandbox, save_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "PREFECT_API_URL": PREFECT_API_URL.value() or "",
        "NANOGPT_API_KEY": API_KEY,
        "NANOGPT_BASE_URL": sandbox.base_url,
    }.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run(
        [sys.executable, "-m", "tests.pooling", save_to],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    first, second = told["saved"]
    assert all(Path(location).stat().st_size > 0 for location in (first, second))
    assert told["asked"]
    # Paid for by the tasks, and found by the flows in other processes.
    assert Path(told["narrated"]).read_bytes() == Path(first).read_bytes()
    assert Path(told["fetched"]).read_bytes() == Path(second).read_bytes()
    assert told["refused"] == ["CONTENT_POLICY_VIOLATION", True]
    assert sorted(told["rows"]) == ["CONTENT_POLICY_VIOLATION", "completed"]
    # Texts, the refused text, lines.
    assert len(sandbox.ledger.charges) == len(TEXTS) + 1 + len(LINES)
