"""Nothing paid for is lost, nothing is paid for twice, whatever dies when: real processes, really killed."""

import asyncio
import itertools
import signal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import FlowRunFilter, LogFilter
from prefect.states import Scheduled

from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.ledger import FOLDER
from prefect_nanogpt.sandbox import Accept, Sandbox, Stall
from tests.conftest import eventually, files_in, start

TEXT = "This is paid for once, whatever happens."
PENDING = {"status": "pending"}


class Process:
    """The process of a flow run."""

    def __init__(self, flow_run_id: UUID, sandbox: Sandbox, *point: str) -> None:
        self._process = start("tests.crashing", str(flow_run_id), *point, sandbox=sandbox)

    def kill(self, how: signal.Signals) -> None:
        self._process.send_signal(how)
        self.join()

    def join(self) -> int:
        return self._process.wait(timeout=60)


async def new_run(save_to: str, **parameters: Any) -> UUID:
    async with get_client() as client:
        parameters = {"text": TEXT, "save_to": save_to, "poll": {"min_seconds": 0.25}, **parameters}
        return (await client.create_flow_run(text_to_speech, parameters=parameters)).id


async def retry(run: UUID, sandbox: Sandbox) -> FlowRun:
    """Do what the Retry button does, and let another process pick the run up."""
    async with get_client() as client:
        await client.set_flow_run_state(run, Scheduled(), force=True)
        assert Process(run, sandbox).join() == 0
        return await client.read_flow_run(run)


async def state_name(run: UUID) -> str | None:
    async with get_client() as client:
        return (await client.read_flow_run(run)).state_name


def held(sandbox: Sandbox, kind: str, seconds: float = 60) -> None:
    """Make the sandbox hold the client in the middle of something, the first time."""
    match kind:
        case "submit":
            sandbox.on_submit([Accept(delay=seconds)])
        case "status":
            sandbox.on_status(None, itertools.repeat(PENDING))
        case "audio":
            sandbox.on_audio(None, [Stall(after_bytes=1_000, seconds=60)])


def reached(sandbox: Sandbox, kind: str) -> None:
    sandbox.wait_for_request(kind, timeout=60)


def go_on(sandbox: Sandbox, kind: str) -> None:
    if kind == "status":
        run_id = sandbox.ledger.charges[0].run_id
        sandbox.on_status(run_id, [sandbox.completed_body(run_id)])


def notes(save_to: str) -> list[str]:
    """List the states of the job's notes in the ledger."""
    return [file.name.split(".")[2] for file in files_in(Path(save_to, FOLDER))]


async def test_a_run_that_died_before_its_claim_pays_in_the_next_attempt(sandbox: Sandbox, save_to: str) -> None:
    run = await new_run(save_to)
    assert Process(run, sandbox, "before the claim").join() == -signal.SIGKILL
    assert notes(save_to) == []
    assert sandbox.ledger.charges == []

    flow_run = await retry(run, sandbox)

    await assert_one_job_and_one_file(flow_run, sandbox, save_to)


@pytest.mark.parametrize("point", ["before the POST is sent", "after the answer is read"])
async def test_a_run_that_died_around_the_submission_says_that_it_does_not_know(
    point: str, sandbox: Sandbox, save_to: str
) -> None:
    run = await new_run(save_to)
    assert Process(run, sandbox, point).join() == -signal.SIGKILL
    charged = len(sandbox.ledger.charges)

    flow_run = await retry(run, sandbox)

    assert flow_run.state_name == "SUBMISSION_UNCERTAIN"
    assert "was sent to the provider at" in str(flow_run.state.message if flow_run.state else "")
    assert len(sandbox.ledger.charges) == charged == (0 if point.startswith("before") else 1)
    assert len(sandbox.requests("submit")) == charged
    assert files_in(save_to) == []


async def test_an_uncertain_submission_is_made_again_only_on_request(sandbox: Sandbox, save_to: str) -> None:
    run = await new_run(save_to, resubmit=["uncertain"])
    Process(run, sandbox, "after the answer is read").join()

    flow_run = await retry(run, sandbox)

    assert flow_run.state_name == "Completed"
    assert len(sandbox.ledger.charges) == 2


@pytest.mark.parametrize(
    ("how", "point"),
    [(signal.SIGKILL, []), (signal.SIGTERM, ["when it has waited long enough"])],
    ids=["SIGKILL", "SIGTERM and no answer in time"],
)
async def test_a_run_that_died_waiting_for_the_answer_says_that_it_does_not_know(
    how: signal.Signals, point: list[str], sandbox: Sandbox, save_to: str
) -> None:
    held(sandbox, "submit")
    run = await new_run(save_to)
    process = Process(run, sandbox, *point)
    reached(sandbox, "submit")
    process.kill(how)
    assert notes(save_to) == ["sent"]

    flow_run = await retry(run, sandbox)

    assert flow_run.state_name == "SUBMISSION_UNCERTAIN"
    assert len(sandbox.ledger.charges) == 1
    assert len(sandbox.requests("submit")) == 1
    assert files_in(save_to) == []


async def test_a_run_that_is_told_to_stop_while_it_waits_for_the_answer_keeps_the_ticket(
    sandbox: Sandbox, save_to: str
) -> None:
    held(sandbox, "submit", seconds=3)
    run = await new_run(save_to)
    process = Process(run, sandbox)
    reached(sandbox, "submit")
    process.kill(signal.SIGTERM)
    assert notes(save_to) == ["answer", "sent"]
    assert await state_name(run) == "Crashed"
    assert "has left and is being charged for" in await eventually(lambda: logged(run, "A submission"))

    flow_run = await retry(run, sandbox)

    await assert_one_job_and_one_file(flow_run, sandbox, save_to)


async def test_a_run_that_died_when_the_answer_was_noted_goes_on_from_there(sandbox: Sandbox, save_to: str) -> None:
    run = await new_run(save_to)
    assert Process(run, sandbox, "after the answer is noted").join() == -signal.SIGKILL
    assert notes(save_to) == ["answer", "sent"]

    flow_run = await retry(run, sandbox)

    await assert_one_job_and_one_file(flow_run, sandbox, save_to)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda how: how.name)
@pytest.mark.parametrize("kind", ["status", "audio"])
async def test_a_run_that_died_after_its_ticket_goes_on_from_there(
    kind: str, how: signal.Signals, sandbox: Sandbox, save_to: str
) -> None:
    held(sandbox, kind)
    # Long pauses, so that the process sleeps: Prefect raises SIGTERM in whatever runs, and a callback may swallow it.
    run = await new_run(save_to, poll={"min_seconds": 3, "max_seconds": 3, "jitter": 0})
    process = Process(run, sandbox)
    reached(sandbox, kind)
    await asyncio.sleep(1)
    process.kill(how)
    go_on(sandbox, kind)
    if how is signal.SIGTERM:
        assert await state_name(run) == "Crashed"
        await assert_last_word_says_how_to_resume(run)

    flow_run = await retry(run, sandbox)

    await assert_one_job_and_one_file(flow_run, sandbox, save_to)


@pytest.mark.parametrize(
    "point",
    ["after the file is in place", "after it is noted as saved", "before the artifact", "after the artifact"],
)
async def test_a_run_that_died_after_its_audio_was_saved_finds_it(point: str, sandbox: Sandbox, save_to: str) -> None:
    run = await new_run(save_to)
    assert Process(run, sandbox, point).join() == -signal.SIGKILL
    asked = len(sandbox.requests())

    flow_run = await retry(run, sandbox)

    await assert_one_job_and_one_file(flow_run, sandbox, save_to)
    assert len(sandbox.requests()) == asked


async def assert_one_job_and_one_file(flow_run: FlowRun, sandbox: Sandbox, save_to: str) -> None:
    assert flow_run.state_name == "Completed"
    assert len(sandbox.ledger.charges) == 1
    assert len(sandbox.requests("submit")) == 1
    [file] = files_in(save_to)
    assert file.read_bytes() == sandbox.audio_bytes(sandbox.ledger.charges[0].run_id)
    async with get_client() as client:
        reports = [
            artifact
            for artifact in await client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}))
            if artifact.key == "tts-audio"
        ]
    assert len(reports) == 1
    assert str(file) in str(reports[0].data)
    assert "To get the audio" not in str(reports[0].data)
    assert sum(note.startswith("saved-") for note in notes(save_to)) == 1


async def logged(run: UUID, beginning: str) -> str | None:
    async with get_client() as client:
        logs = await client.read_logs(LogFilter(flow_run_id={"any_": [run]}))
    return next((log.message for log in logs if log.message.startswith(beginning)), None)


async def assert_last_word_says_how_to_resume(run: UUID) -> None:
    assert "prefect-nanogpt wait" in await eventually(lambda: logged(run, "Stopped while waiting"))
    async with get_client() as client:
        [report] = [
            artifact
            for artifact in await client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": [run]}))
            if artifact.key == "tts-audio"
        ]
    assert "Stopped while waiting" in str(report.data)
    assert "To get the audio" in str(report.data)
