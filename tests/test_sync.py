"""The flows and tasks from code without `async`: scripts, sync flows, threads, notebooks."""

import asyncio
import inspect
import pickle
import signal
from pathlib import Path
from uuid import UUID

import pytest
from prefect import flow, task, unmapped
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import FlowRun

from prefect_nanogpt import NanoGPTCredentials, flows, sync, tasks
from prefect_nanogpt.errors import ContentPolicyViolation, NanoGPTError
from prefect_nanogpt.models import Completed, Ticket, TTSRequest
from prefect_nanogpt.sandbox import Accept, Sandbox
from prefect_nanogpt.sync import get_tts_status, save_audio, submit_tts, text_to_speech
from tests.conftest import files_in, start


def children_of(flow_run_id: UUID | None) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        parent = {"any_": [flow_run_id]}
        return client.read_flow_runs(flow_run_filter=FlowRunFilter(parent_flow_run_id=parent))  # type: ignore[arg-type]


def test_plain_code_gets_audio(save_to: str, credentials: NanoGPTCredentials) -> None:
    audio = text_to_speech("From plain code.", save_to=save_to, credentials=credentials)
    assert files_in(save_to) == [Path(audio.location)]


def test_a_state_is_returned_where_it_is_asked_for(save_to: str, credentials: NanoGPTCredentials) -> None:
    state = text_to_speech("[sandbox:reject] Hm.", save_to=save_to, credentials=credentials, return_state=True)
    assert state.name == "CONTENT_POLICY_VIOLATION"


def test_in_a_sync_flow_it_is_a_child_and_its_error_has_its_type(save_to: str, credentials: NanoGPTCredentials) -> None:
    @flow
    def parent() -> str:
        text_to_speech("Hello.", save_to=save_to, credentials=credentials)
        try:
            text_to_speech("[sandbox:reject] Hm.", save_to=save_to, credentials=credentials)
        except ContentPolicyViolation as refused:
            return refused.code
        return "not refused"

    state = parent(return_state=True)
    assert state.result() == "CONTENT_POLICY_VIOLATION"
    children = children_of(state.state_details.flow_run_id)
    assert sorted(str(child.state_name) for child in children) == ["CONTENT_POLICY_VIOLATION", "Completed"]


def test_ten_threads_of_a_map_say_ten_texts(save_to: str, credentials: NanoGPTCredentials, sandbox: Sandbox) -> None:
    @task
    def say(text: str) -> str:
        return text_to_speech(text, save_to=save_to, credentials=credentials).location

    @flow
    def parent() -> list[str]:
        return say.map([f"Text {number}." for number in range(10)]).result()

    state = parent(return_state=True)
    assert sorted(map(Path, state.result())) == files_in(save_to)
    assert len(sandbox.ledger.charges) == 10
    assert len(children_of(state.state_details.flow_run_id)) == 10


async def test_threads_of_an_async_flow_say_texts(save_to: str, credentials: NanoGPTCredentials) -> None:
    @task
    def say(text: str) -> str:
        return text_to_speech(text, save_to=save_to, credentials=credentials).location

    @flow
    async def parent() -> list[str]:
        said = say.map(["One.", "Two.", "Three."])
        return await asyncio.to_thread(said.result)

    assert sorted(map(Path, await parent())) == files_in(save_to)


def test_a_task_may_be_made_of_it(save_to: str, credentials: NanoGPTCredentials) -> None:
    @flow
    def parent() -> str:
        said = task(text_to_speech).submit("As a task.", save_to=save_to, credentials=credentials)
        return said.result().location

    assert [Path(parent())] == files_in(save_to)


def test_the_steps_are_tasks_of_a_sync_flow(save_to: str, credentials: NanoGPTCredentials) -> None:
    @flow
    def steps() -> str:
        ticket = submit_tts(TTSRequest(text="Step by step."), save_to, credentials)
        assert isinstance(ticket, Ticket)
        status = get_tts_status(ticket.model_dump(mode="json"), credentials)
        assert isinstance(status, Completed)
        return save_audio(status, name="steps", save_to=save_to, credentials=credentials).location

    assert [Path(steps())] == files_in(save_to)


async def test_under_a_running_loop_it_works(save_to: str, credentials: NanoGPTCredentials) -> None:
    audio = text_to_speech("In a notebook.", save_to=save_to, credentials=credentials)
    assert files_in(save_to) == [Path(audio.location)]


async def test_in_an_async_flow_it_says_what_to_await(
    save_to: str, credentials: NanoGPTCredentials, sandbox: Sandbox
) -> None:
    @flow
    async def parent() -> None:
        text_to_speech("In an async flow.", save_to=save_to, credentials=credentials)

    with pytest.raises(NanoGPTError, match=r"Await the one of prefect_nanogpt\.flows"):
        await parent()
    assert sandbox.requests("submit") == []


@pytest.mark.parametrize("name", sync.__all__)
def test_it_looks_like_what_it_calls(name: str) -> None:
    here = getattr(sync, name)
    there = getattr(flows, name, None) or getattr(sync.tasks, name)
    # Beside what is written, those of flows have what forms send, and no need of lines.
    written = [
        parameter.replace(default=parameter.empty) if parameter.name == "lines" and hasattr(flows, name) else parameter
        for parameter in inspect.signature(there.fn).parameters.values()
        if parameter.name not in ("advanced", "table")
    ]
    assert inspect.signature(here) == inspect.signature(there.fn).replace(parameters=written)
    assert here.__doc__ == there.fn.__doc__
    assert not inspect.iscoroutinefunction(inspect.unwrap(here))
    assert pickle.loads(pickle.dumps(here)) is here


def test_lines_are_asked_for() -> None:
    assert inspect.signature(sync.text_to_speech_batch).parameters["lines"].default is inspect.Parameter.empty


def test_ctrl_c_waits_for_the_ticket_of_a_submission_that_has_left(tmp_path: Path) -> None:
    with Sandbox(job_seconds=60, speak=False) as sandbox:
        sandbox.on_submit([Accept(delay=3)])
        process = start("tests.saying", "Interrupted.", str(tmp_path), sandbox=sandbox)
        sandbox.wait_for_request("submit", timeout=60)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) != 0
        [charge] = sandbox.ledger.charges
    notes = [path.read_text() for path in (tmp_path / ".nanogpt").rglob("*answer*")]
    assert [charge.run_id in note for note in notes] == [True]


def test_tasks_are_submitted_and_mapped_in_a_sync_flow(
    save_to: str, credentials: NanoGPTCredentials, sandbox: Sandbox
) -> None:
    @flow
    def parent(texts: list[str]) -> list[str]:
        terms = {"save_to": unmapped(save_to), "credentials": unmapped(credentials)}
        requests = [TTSRequest(text=text) for text in texts]
        tickets = tasks.submit_tts.map(requests, **terms).result()
        statuses = tasks.get_tts_status.map(tickets, credentials=unmapped(credentials))
        names = [ticket.run_id for ticket in tickets]
        audio = [
            tasks.save_audio.submit(status, name, save_to, credentials)
            for status, name in zip(statuses, names, strict=True)
        ]
        return [saved.result().location for saved in audio]

    state = parent(["One.", "Two.", "Three."], return_state=True)
    assert sorted(map(Path, state.result())) == files_in(save_to)
    assert len(sandbox.ledger.charges) == 3
