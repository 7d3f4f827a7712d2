"""Tasks and flows that travel by value to other processes, as process pools, Dask and Ray send them."""

import json
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import cloudpickle
import pytest
from prefect import Flow, Task
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt import NanoGPTCredentials, flows, tasks
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


def decorated() -> list[Any]:
    """Find every flow and task of the package, in whichever module it is, not only those that are public."""
    folders = (flows, tasks)
    modules = [
        import_module(f"{folder.__name__}.{m.name}") for folder in folders for m in iter_modules(folder.__path__)
    ]
    found = {
        id(thing): thing for module in modules for thing in vars(module).values() if isinstance(thing, Flow | Task)
    }
    return list(found.values())


@pytest.mark.parametrize("thing", decorated(), ids=lambda thing: thing.name)
def test_a_flow_or_task_with_other_options_travels_by_value_too(thing: Any) -> None:
    copy = pickle.loads(cloudpickle.dumps(thing.with_options(name="mine", retries=2)))
    assert (copy.name, copy.retries) == ("mine", 2)


def test_the_flows_and_tasks_that_are_not_public_are_among_those_that_are_tried() -> None:
    assert {thing.name for thing in decorated()} >= {"say", "submit-tts", "text-to-speech", "collect-open-tickets"}


def test_a_flow_that_was_pickled_runs_in_a_fresh_process_with_credentials_that_were(
    sandbox: Sandbox, credentials: NanoGPTCredentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", PREFECT_API_URL.value() or "")
    run = """
import asyncio, pickle, sys
flow, credentials = pickle.load(sys.stdin.buffer)
print(asyncio.run(flow("Hello.", save_to=sys.argv[1], credentials=credentials)).location)
"""
    done = subprocess.run(
        [sys.executable, "-c", run, str(tmp_path)],
        input=cloudpickle.dumps((flows.text_to_speech, credentials)),
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr.decode()
    [charge] = sandbox.ledger.charges
    assert Path(done.stdout.decode().strip()) == tmp_path / f"{charge.run_id}.mp3"


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
