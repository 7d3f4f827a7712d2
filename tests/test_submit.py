"""From text to speech: submitted once, waited for, saved."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import FlowRunFilter
from prefect.runtime import flow_run as this_flow_run
from prefect.settings import PREFECT_API_URL, temporary_settings

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import (
    ContentPolicyViolation,
    NanoGPTError,
    ProviderError,
    SubmissionUncertain,
    TTSJobRejected,
    TTSTimeout,
)
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.models import AudioContent, AudioFile, Completed, PollSchedule, Ticket, TTSRequest
from prefect_nanogpt.sandbox import Accept, Answer, Cut, Sandbox
from prefect_nanogpt.tasks import submit_tts
from tests.conftest import files_in


@pytest.fixture
def say(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    """What every flow run here is started with."""
    return {"credentials": credentials, "save_to": save_to, "poll": quick}


async def last_run(name: str) -> FlowRun:
    """Read the latest run of a flow by the text that it was to say, which its name starts with."""
    async with get_client() as client:
        runs = await client.read_flow_runs(flow_run_filter=FlowRunFilter(name={"like_": name}))
    return max(runs, key=lambda run: run.created)


async def report_of(flow_run: FlowRun) -> str:
    async with get_client() as client:
        artifacts = await client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}))
    [report] = [artifact for artifact in artifacts if artifact.key == "tts-audio"]
    return str(report.data)


async def test_a_text_becomes_a_file_with_its_cost(sandbox: Sandbox, say: dict[str, Any]) -> None:
    audio = await text_to_speech("Once upon a time.", voice="Rachel", options={"stability": 0.4}, **say)
    assert audio.ticket is not None
    assert Path(audio.location).read_bytes() == sandbox.audio_bytes(audio.ticket.run_id)
    assert (audio.cost, audio.currency) == (sandbox.ledger.charges[0].amount, "USD")
    [request] = sandbox.requests("submit")
    assert request.json == {
        "text": "Once upon a time.",
        "model": "Elevenlabs-Turbo-V2.5",
        "voice": "Rachel",
        "stability": 0.4,
    }


@pytest.mark.parametrize(
    ("model", "kind", "container"), [("Kokoro-82m", Completed, "wav"), ("tts-1", AudioContent, "mp3")]
)
async def test_models_that_answer_at_once_are_saved_and_paid_once(
    model: str, kind: type, container: str, sandbox: Sandbox, say: dict[str, Any]
) -> None:
    @flow
    async def submit_only() -> Any:
        return await submit_tts(TTSRequest(text="At once.", model=model), say["save_to"], say["credentials"])

    assert isinstance(await submit_only(), kind)
    audio = await text_to_speech("At once.", model=model, **say)
    assert (audio.container, audio.ticket) == (container, None)
    assert audio.size_bytes == Path(audio.location).stat().st_size
    assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"text": ""}, "nothing to say"),
        ({"text": " \n"}, "nothing to say"),
        ({"text": "x", "speed": 9}, "speed"),
        ({"text": "x", "options": {"stability": 2}}, "stability"),
        ({"text": "x", "options": {"response_format": "pcm"}}, "wav"),
    ],
)
async def test_a_bad_request_is_refused_before_any_request(
    wrong: dict[str, Any], words: str, sandbox: Sandbox, say: dict[str, Any]
) -> None:
    with pytest.raises(NanoGPTError, match=words) as caught:
        await text_to_speech(**wrong, **say)
    assert caught.value.code == "INVALID_REQUEST"
    assert sandbox.requests() == []


async def test_a_refused_text_is_final_whatever_retries_say(sandbox: Sandbox, say: dict[str, Any]) -> None:
    with pytest.raises(ContentPolicyViolation):
        await text_to_speech.with_options(retries=2)("[sandbox:reject] Final at once.", **say)
    run = await last_run("sandbox:reject] Final")
    assert (run.state_name, run.run_count) == ("CONTENT_POLICY_VIOLATION", 1)
    assert len(sandbox.ledger.charges) == len(sandbox.ledger.refunds) == 1


async def test_a_job_that_failed_is_submitted_anew_once_an_attempt(sandbox: Sandbox, say: dict[str, Any]) -> None:
    with pytest.raises(TTSJobRejected) as caught:
        await text_to_speech.with_options(retries=2)("[sandbox:fail] Anew.", **say)
    run = await last_run("sandbox:fail] Anew")
    assert caught.value.code == run.state_name == "TTS_FAILED"
    assert run.run_count == len(sandbox.ledger.charges) == 3


async def test_an_attempt_after_a_timeout_waits_on_for_the_same_job(sandbox: Sandbox, say: dict[str, Any]) -> None:
    sandbox.on_status(None, [{"status": "pending"}])
    audio = await text_to_speech.with_options(retries=1)("Slow, then done.", timeout_seconds=1e-6, **say)
    assert (await last_run("Slow, then done")).run_count == 2
    assert len(sandbox.ledger.charges) == 1
    assert Path(audio.location).exists()


async def test_a_timeout_names_the_ticket_and_how_to_resume(sandbox: Sandbox, say: dict[str, Any]) -> None:
    sandbox.on_status(None, [{"status": "pending"}] * 3)
    with pytest.raises(TTSTimeout, match="prefect-nanogpt wait") as caught:
        await text_to_speech("Too slow.", timeout_seconds=0.3, **say)
    assert caught.value.ticket is not None
    assert caught.value.ticket.run_id == sandbox.ledger.charges[0].run_id
    assert sandbox.ledger.charges[0].run_id in await report_of(await last_run("Too slow"))


@pytest.mark.parametrize(
    "answer",
    [Accept(then=Cut()), Accept(then=Answer(500)), Answer(502), Answer(408), Answer(200, body=b"<html>")],
    ids=["a cut connection", "a 500 after the charge", "a 502", "a 408", "a web page"],
)
async def test_an_unclear_answer_is_never_followed_by_another_submission(
    answer: Any, sandbox: Sandbox, say: dict[str, Any]
) -> None:
    sandbox.on_submit([answer])
    with pytest.raises(SubmissionUncertain, match="--resubmit"):
        await text_to_speech.with_options(retries=2)("Unclear.", **say)
    run = await last_run("Unclear")
    assert (run.state_name, run.run_count) == ("SUBMISSION_UNCERTAIN", 1)
    assert len(sandbox.requests("submit")) == 1


async def test_what_certainly_was_not_accepted_is_submitted_again(sandbox: Sandbox, say: dict[str, Any]) -> None:
    throttled = Answer(429, json={"error": {"message": "Slow down", "code": "rate_limit_exceeded"}})
    sandbox.on_submit([throttled, throttled])
    await text_to_speech("Throttled.", **say)
    assert [request.status for request in sandbox.requests("submit")] == [429, 429, 202]
    assert len(sandbox.ledger.charges) == 1


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413])
async def test_a_refusal_is_not_repeated_and_leaves_nothing_uncertain(
    status: int, sandbox: Sandbox, say: dict[str, Any]
) -> None:
    sandbox.on_submit([Answer(status, json={"error": {"message": "No.", "code": "not_today"}})])

    @flow
    async def twice() -> AudioFile:
        with pytest.raises(ProviderError, match="NOT_TODAY"):
            await text_to_speech("Refused.", **say)
        return await text_to_speech("Refused.", **say)

    await twice()
    assert [request.status for request in sandbox.requests("submit")] == [status, 202]


async def test_the_same_text_twice_in_a_run_is_one_job_and_takes_are_others(
    sandbox: Sandbox, say: dict[str, Any]
) -> None:
    seen: list[list[str]] = []

    @flow(retries=1)
    async def chorus() -> None:
        audios = [await text_to_speech("Again!", **say, take=take) for take in (1, 1, 2)]
        submissions = await asyncio.gather(
            *(submit_tts(TTSRequest(text="Again!", voice="Sam"), say["save_to"], say["credentials"]) for _ in range(2))
        )
        tickets = [*(audio.ticket for audio in audios), *submissions]
        seen.append([ticket.run_id for ticket in tickets if isinstance(ticket, Ticket)])
        if this_flow_run.run_count == 1:
            raise ValueError("once more")

    await chorus()
    first, second, another_take, third, fourth = seen[0]
    assert (first, third) == (second, fourth)
    assert len({first, another_take, third}) == len(sandbox.ledger.charges) == 3
    assert seen[0] == seen[1]


async def test_a_parent_that_is_run_again_pays_nothing_for_what_it_skips_or_repeats(
    sandbox: Sandbox, say: dict[str, Any]
) -> None:
    @flow
    async def scene(lines: list[str]) -> None:
        for line in lines:
            with pytest.raises(TTSTimeout):
                await text_to_speech(line, timeout_seconds=1e-6, **say)

    @flow(retries=1)
    async def play() -> None:
        first_time = this_flow_run.run_count == 1
        await scene(["One.", "Two.", "Three."] if first_time else ["Two.", "Three."])
        if first_time:
            raise ValueError("once more")

    sandbox.on_status(None, [{"status": "pending"}] * 100)
    await play()
    assert len(sandbox.ledger.charges) == 3


async def test_audio_that_is_there_is_returned_while_it_is_intact(sandbox: Sandbox, say: dict[str, Any]) -> None:
    first = await text_to_speech("Reused.", voice="Rachel", **say)
    asked = len(sandbox.requests())
    again = await text_to_speech("Reused.", voice="Rachel", **say)
    assert (again.location, again.sha256, again.ticket) == (first.location, first.sha256, first.ticket)
    assert len(sandbox.requests()) == asked
    assert "nothing was charged" in await report_of(await last_run("Reused."))

    await text_to_speech("Reused.", voice="Sam", **say)
    assert len(sandbox.ledger.charges) == 2

    Path(first.location).write_bytes(b"RIFF....WAVE changed")
    fetched = await text_to_speech("Reused.", voice="Rachel", **say)
    assert fetched.ticket == first.ticket
    assert Path(fetched.location).read_bytes() == sandbox.audio_bytes(sandbox.ledger.charges[0].run_id)
    assert len(sandbox.ledger.charges) == 2


async def test_a_text_dearer_than_allowed_is_refused_before_money_moves(sandbox: Sandbox, say: dict[str, Any]) -> None:
    with pytest.raises(ProviderError, match="more than max_cost") as caught:
        await text_to_speech("A dear text.", max_cost=Decimal("0.0001"), **say)
    assert caught.value.code == "COST_LIMIT_EXCEEDED"
    assert sandbox.requests("submit") == []

    await text_to_speech("A dear text.", max_cost=Decimal("1"), **say)
    assert len(sandbox.ledger.charges) == 1


async def test_a_job_that_turns_out_dearer_than_allowed_is_saved_all_the_same(
    sandbox: Sandbox, say: dict[str, Any]
) -> None:
    model = "Qwen-3-TTS-1.7B"  # the catalogue knows no price for it
    audio = await text_to_speech("Dear afterwards.", model=model, max_cost=Decimal("0.0001"), **say)
    assert audio.cost is not None
    assert audio.cost > Decimal("0.0001")
    assert [str(file) for file in files_in(say["save_to"])] == [audio.location]


@pytest.fixture
def roomy_server() -> Iterator[None]:
    """A server with its database in memory: on a file, SQLite starves some of fifty concurrent writers for minutes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    memory = "sqlite+aiosqlite:///file::memory:?cache=shared&uri=true"
    server = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)],
        env={**os.environ, "PREFECT_SERVER_DATABASE_CONNECTION_URL": memory},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                if httpx.get(f"{url}/health").is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        with temporary_settings({PREFECT_API_URL: url}):
            yield
    finally:
        server.terminate()
        server.wait()


async def test_fifty_runs_at_once_pay_fifty_times_and_mix_nothing_up(
    roomy_server: None, sandbox: Sandbox, say: dict[str, Any]
) -> None:
    texts = [f"Line {number} of fifty." for number in range(50)]
    audios = await asyncio.gather(*(text_to_speech(text, **say) for text in texts))
    submitted = {request.run_id: request.json["text"] for request in sandbox.requests("submit") if request.json}
    assert [submitted[audio.ticket.run_id] for audio in audios if audio.ticket] == texts
    assert len(sandbox.ledger.charges) == 50
    assert len({audio.location for audio in audios}) == 50
    for audio in audios:
        assert audio.ticket is not None
        assert Path(audio.location).read_bytes() == sandbox.audio_bytes(audio.ticket.run_id)
