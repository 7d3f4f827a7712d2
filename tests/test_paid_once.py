"""What was paid for twice, or lost, in ways that people and machines came upon. Charges are counted by the sandbox."""

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.events import emit_event
from prefect.exceptions import ParameterTypeError
from prefect.flow_engine import run_flow_async
from prefect.runtime import flow_run as this_flow_run
from prefect.runtime import task_run as this_task_run
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_RESULTS_PERSIST_BY_DEFAULT,
    PREFECT_TASKS_DISABLE_CACHING,
    PREFECT_TASKS_REFRESH_CACHE,
    temporary_settings,
)
from prefect.states import Scheduled, State
from pydantic import SecretStr, ValidationError

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.errors import (
    AudioError,
    BatchPartial,
    ContentPolicyViolation,
    NanoGPTError,
    ProviderError,
    StorageError,
    SubmissionUncertain,
    TTSTimeout,
)
from prefect_nanogpt.flows import collect_open_tickets, text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.ledger import FOLDER, Job
from prefect_nanogpt.models import AudioFile, PollSchedule, TTSRequest
from prefect_nanogpt.sandbox import Accept, Answer, Cut, Redirect, Sandbox
from prefect_nanogpt.sandbox.jobs import MODELS, Model
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import submit_tts
from tests.conftest import API_KEY, eventually, files_in, start
from tests.test_collect import report_of

PENDING = {"status": "pending"}
SOON = {"timeout_seconds": 1e-6}
"""Gives up before the job is done, once its ticket is there."""


@pytest.fixture
def say(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    """What every flow run here is started with."""
    return {"credentials": credentials, "save_to": save_to, "poll": quick}


def notes(save_to: str, state: str = "") -> list[Path]:
    """List the notes in the ledger whose state begins so."""
    found = [file for file in files_in(Path(save_to, FOLDER)) if file.suffix == ".json"]
    return [file for file in found if file.name.split(".")[2].startswith(state)]


def texts_of(sandbox: Sandbox) -> dict[str | None, str]:
    """Give the text of each accepted submission, by its run id."""
    return {request.run_id: request.json["text"] for request in sandbox.requests("submit") if request.run_id}


async def report(state: State[Any]) -> str:
    return await report_of(state.state_details.flow_run_id)


class TestTogether:
    async def test_the_same_text_at_once_is_one_job(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        sandbox.on_submit([Accept(delay=1)])
        audios = await asyncio.gather(*(text_to_speech("All together.", **say) for _ in range(4)))
        assert len({audio.location for audio in audios}) == 1
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 1

    async def test_the_same_text_in_two_processes_is_one_job(self, sandbox: Sandbox, save_to: str) -> None:
        sandbox.on_submit([Accept(delay=8)])
        parameters = {"text": "In two processes.", "save_to": save_to, "poll": {"min_seconds": 0.25}}
        async with get_client() as client:
            runs = [(await client.create_flow_run(text_to_speech, parameters=parameters)).id for _ in range(2)]
            processes = [start("tests.crashing", str(run), sandbox=sandbox) for run in runs]
            assert [process.wait(timeout=60) for process in processes] == [0, 0]
            assert [(await client.read_flow_run(run)).state_name for run in runs] == ["Completed"] * 2
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 1

    async def test_another_text_does_not_wait_for_it(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        await asyncio.gather(*(text_to_speech(f"Text {number}.", **say) for number in range(3)))
        assert len(sandbox.ledger.charges) == 3


class TestRetries:
    @pytest.mark.parametrize("way", ["flow", "task"])
    async def test_a_retried_task_of_somebodys_pays_once(self, way: str, sandbox: Sandbox, say: dict[str, Any]) -> None:
        attempts = []

        @task(retries=2)
        async def narrate() -> None:
            attempts.append(this_task_run.run_count)
            if way == "flow":
                await text_to_speech("Said in a task.", **say)
            else:
                await submit_tts(TTSRequest(text="Said in a task."), say["save_to"], say["credentials"])
            if len(attempts) < 3:
                raise ValueError("once more")

        @flow
        async def book() -> None:
            await narrate()

        await book()
        assert len(attempts) == 3
        assert len(sandbox.ledger.charges) == 1

    async def test_a_loop_that_waits_on_after_each_timeout_pays_once(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_status(None, [PENDING] * 3)
        timeouts = 0
        while True:
            try:
                audio = await text_to_speech("Patience.", **say, **SOON)
                break
            except TTSTimeout:
                timeouts += 1
        assert timeouts == 3
        assert Path(audio.location).exists()
        assert len(sandbox.ledger.charges) == 1

    async def test_threads_of_a_flow_that_is_retried_pay_once_a_text(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        attempts = []

        def narrate(text: str) -> None:
            asyncio.run(text_to_speech(text, **say))

        @flow(retries=1)
        def book() -> None:
            attempts.append(this_flow_run.run_count)
            with ThreadPoolExecutor(3) as threads:
                list(threads.map(narrate, ["One.", "Two.", "One."]))
            if len(attempts) == 1:
                raise ValueError("once more")

        await asyncio.to_thread(book)
        assert len(attempts) == 2
        assert Counter(texts_of(sandbox).values()) == {"One.": 1, "Two.": 1}

    async def test_a_parent_that_skips_what_is_finished_gets_each_text_its_own_audio(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        finished: dict[str, AudioFile] = {}

        @flow(retries=1, persist_result=True)
        async def book() -> None:
            for text in ("One.", "Two.", "Three."):
                if text not in finished:
                    finished[text] = await text_to_speech(text, **say)
                if text == "Two." and this_flow_run.run_count == 1:
                    raise ValueError("once more")

        with temporary_settings({PREFECT_RESULTS_PERSIST_BY_DEFAULT: True}):
            await book()
        said = texts_of(sandbox)
        assert {text: said[audio.ticket.run_id] for text, audio in finished.items() if audio.ticket} == {
            text: text for text in ("One.", "Two.", "Three.")
        }
        assert len(sandbox.ledger.charges) == 3

    @pytest.mark.parametrize(
        ("settings", "options"),
        [
            ({PREFECT_TASKS_REFRESH_CACHE: True}, {}),
            ({PREFECT_TASKS_DISABLE_CACHING: True}, {}),
            ({}, {"persist_result": False}),
            ({}, {"persist_result": True, "result_serializer": "json"}),
            ({PREFECT_RESULTS_PERSIST_BY_DEFAULT: True}, {"persist_result": True, "result_serializer": "pickle"}),
        ],
        ids=["refreshed caches", "no caches", "no results", "JSON results", "pickled results"],
    )
    async def test_no_setting_of_prefect_pays_twice(
        self, settings: dict[Any, Any], options: dict[str, Any], sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_status(None, [PENDING])
        with temporary_settings(settings):
            speak = text_to_speech.with_options(retries=1, **options)
            audio = await speak("Whatever the settings.", **say, **SOON)
            again = await speak("Whatever the settings.", **say)
        assert audio.location == again.location
        assert len(sandbox.ledger.charges) == 1


class TestStorage:
    @pytest.mark.parametrize("method", ["list_files", "read"])
    @pytest.mark.parametrize("attempts", [1, 2], ids=["a new run", "a retry"])
    async def test_what_cannot_be_read_for_a_moment_is_not_taken_for_missing(
        self, method: str, attempts: int, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sandbox.on_status(None, [PENDING])
        with pytest.raises(TTSTimeout):
            await text_to_speech("Read me later.", **say, **SOON)
        works = getattr(Destination, method)
        failures = iter([OSError(errno.EIO, "Input/output error")])

        def fails_once(*args: Any) -> Any:
            for failure in failures:
                raise failure
            return works(*args)

        monkeypatch.setattr(Destination, method, fails_once)
        speak = text_to_speech.with_options(retries=attempts - 1)
        if attempts == 1:
            with pytest.raises(StorageError, match="Input/output error"):
                await speak("Read me later.", **say)
        await speak("Read me later.", **say)
        assert list(failures) == []
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 1

    async def test_a_damaged_name_of_a_run_hides_neither_audio_nor_other_jobs(
        self, sandbox: Sandbox, say: dict[str, Any], save_to: str
    ) -> None:
        audio = await text_to_speech("Who has paid for it?", **say)
        [note] = notes(save_to, "saved")
        note.write_text(json.dumps({**json.loads(note.read_text()), "run": "damaged"}))
        sandbox.on_status(None, [PENDING])
        await text_to_speech("Open.", **say, **SOON, return_state=True)
        [note] = notes(save_to, "answer")
        note.write_text(json.dumps({**json.loads(note.read_text()), "ticket": "damaged"}))

        asked = len(sandbox.requests("status"))
        assert (await text_to_speech("Who has paid for it?", **say)).location == audio.location
        assert len(sandbox.requests("status")) == asked
        await wait_for_tts(sandbox.add_job("Submitted elsewhere."), **say)

    @pytest.mark.parametrize("content", [b"", b'{"token": "8f3'], ids=["empty", "torn"])
    @pytest.mark.parametrize(
        ("state", "code", "word"),
        [
            ("sent", "SUBMISSION_UNCERTAIN", "uncertain"),
            ("answer", "SUBMISSION_UNCERTAIN", "uncertain"),
            ("saved", "AUDIO_UNAVAILABLE", "lost"),
        ],
    )
    async def test_a_damaged_note_is_not_taken_for_a_missing_one(
        self, state: str, code: str, word: Any, content: bytes, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        save_to = say["save_to"]
        if state == "saved":
            await text_to_speech("Damaged.", **say)
        else:
            sandbox.on_status(None, [PENDING])
            with pytest.raises(TTSTimeout):
                await text_to_speech("Damaged.", **say, **SOON)
            if state == "sent":
                [answer] = notes(save_to, "answer")
                answer.unlink()
        [note] = notes(save_to, state)
        note.write_bytes(content)

        ended = await text_to_speech.with_options(retries=1)("Damaged.", **say, return_state=True)

        assert ended.name == code
        assert f"to {word}" in str(ended.message)
        assert len(sandbox.ledger.charges) == 1

        audio = await text_to_speech("Damaged.", **say, resubmit=[word])
        assert Path(audio.location).exists()
        assert len(sandbox.ledger.charges) == 2
        asked = len(sandbox.requests())
        assert (await text_to_speech("Damaged.", **say)).location == audio.location
        assert len(sandbox.requests()) == asked

    @pytest.mark.parametrize("model", ["Elevenlabs-Turbo-V2.5", "tts-1"])
    async def test_a_disk_that_is_full_when_the_answer_comes_loses_nothing(
        self, model: str, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        create, publish = Destination.create, Destination._publish
        is_full = True

        def create_if_there_is_room(self: Destination, name: str, content: bytes) -> bool:
            if is_full and ".sent." not in name:
                raise OSError(errno.ENOSPC, "No space left on device")
            return create(self, name, content)

        def publish_if_there_is_room(self: Destination, *args: Any) -> str:
            if is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return publish(self, *args)

        monkeypatch.setattr(Destination, "create", create_if_there_is_room)
        monkeypatch.setattr(Destination, "_publish", publish_if_there_is_room)
        state = await text_to_speech("The disk is full.", model=model, **say, return_state=True)
        assert state.name == "STORAGE_FAILED"
        paid = "The text is paid for" if model == "tts-1" else sandbox.ledger.charges[0].run_id
        assert paid in await report(state)

        is_full = False
        audio = await text_to_speech("The disk is full.", model=model, **say)

        assert files_in(say["save_to"]) == [Path(audio.location)]
        assert len(sandbox.ledger.charges) == 1

    @pytest.mark.parametrize("how", ["renamed", "symlinked", "spelled with .."])
    async def test_a_folder_is_known_however_it_is_called(
        self, how: str, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path
    ) -> None:
        sandbox.on_status(None, repeat(PENDING, 1))
        with pytest.raises(TTSTimeout):
            await text_to_speech("Paid for.", **say, **SOON)
        await text_to_speech("Saved.", **say)
        folder = Path(say["save_to"])
        match how:
            case "renamed":
                say["save_to"] = str(folder.rename(tmp_path / "moved"))
            case "symlinked":
                say["save_to"] = str(tmp_path / "link")
                Path(say["save_to"]).symlink_to(folder)
            case _:
                say["save_to"] = f"{tmp_path}/elsewhere/../{folder.name}"

        asked = len(sandbox.requests())
        audio = await text_to_speech("Saved.", **say)
        assert Path(audio.location).exists()
        assert len(sandbox.requests()) == asked

        await text_to_speech("Paid for.", **say)
        assert len(sandbox.ledger.charges) == 2

    async def test_what_the_provider_has_forgotten_is_complete_while_the_file_is_there(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        audio = await text_to_speech("Long ago.", **say)
        assert audio.ticket is not None
        sandbox.on_status(None, repeat(Answer(404)))
        asked = len(sandbox.requests())

        assert (await text_to_speech("Long ago.", **say)).location == audio.location
        assert (await wait_for_tts(audio.ticket, **say)).location == audio.location
        shutil.rmtree(Path(say["save_to"], FOLDER))
        assert (await wait_for_tts(audio.ticket, **say)).location == audio.location

        assert len(sandbox.requests()) == asked

    async def test_audio_that_nobody_can_be_asked_for_again_is_paid_for_again_only_on_request(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        audio = await text_to_speech("Changed by somebody.", model="tts-1", **say)
        Path(audio.location).write_bytes(b"RIFF....WAVE changed")

        with pytest.raises(AudioError, match="file is gone or changed"):
            await text_to_speech("Changed by somebody.", model="tts-1", **say)
        assert len(sandbox.ledger.charges) == 1

        anew = await text_to_speech("Changed by somebody.", model="tts-1", **say, resubmit=["lost"])
        assert (anew.location, anew.sha256) == (audio.location, audio.sha256)
        assert len(sandbox.ledger.charges) == len(files_in(say["save_to"])) == 2


class TestRunsThatFailEarly:
    @pytest.mark.parametrize("lacks", ["key", "folder"])
    async def test_a_retry_that_cannot_begin_takes_nothing_away(
        self, lacks: str, sandbox: Sandbox, save_to: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NANOGPT_BASE_URL", sandbox.base_url)
        monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
        sandbox.on_status(None, [PENDING])
        parameters = {"text": "A retry without.", "save_to": save_to, **SOON}
        async with get_client() as client:
            run = (await client.create_flow_run(text_to_speech, parameters=parameters)).id

        assert (await attempt(run)).name == "TTS_TIMEOUT"
        if lacks == "key":
            monkeypatch.delenv("NANOGPT_API_KEY")
        else:
            aside = Path(save_to).rename(f"{save_to}-aside")
            Path(save_to).write_text("in the way")
        for _ in range(2):
            assert (await attempt(run)).name == {"key": "INVALID_CREDENTIALS", "folder": "STORAGE_FAILED"}[lacks]

        [charge] = sandbox.ledger.charges
        told = await report_of(run)
        assert f'"runId": "{charge.run_id}"' in told
        assert f"prefect-nanogpt wait {charge.run_id}" in told
        assert "No job of this run" not in told

        monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
        if lacks == "folder":
            Path(save_to).unlink()
            aside.rename(save_to)
        rows = [row for row in await collect_open_tickets() if row.run_id == charge.run_id]
        assert [(row.outcome, row.detail) for row in rows] == [("saved", f"{save_to}/{charge.run_id}.mp3")]
        assert len(sandbox.ledger.charges) == 1

    @pytest.mark.parametrize("failures", [1, 2, 3])
    async def test_a_block_that_cannot_be_read_for_a_moment_is_not_taken_for_none(
        self, failures: int, sandbox: Sandbox, save_to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        block = NanoGPTCredentials(
            api_key=SecretStr(API_KEY), base_url=sandbox.base_url, ledger=str(tmp_path / "notes")
        )
        await block.save("default", overwrite=True)
        lines = [{"id": "one", "text": "By the block."}]
        try:
            await text_to_speech_batch(lines, save_to=save_to)
            Path(save_to, "manifest.jsonl").unlink()
            load = NanoGPTCredentials.aload
            left = failures

            async def unreadable(name: str) -> Any:
                nonlocal left
                left -= 1
                if left >= 0:
                    raise httpx.ConnectError("not now")
                return await load(name)

            monkeypatch.setattr(NanoGPTCredentials, "aload", unreadable)
            states = [
                await text_to_speech_batch(lines, save_to=save_to, return_state=True) for _ in range(failures + 1)
            ]
        finally:
            await NanoGPTCredentials.adelete("default")

        assert states[0].name == "INVALID_CREDENTIALS"
        assert states[-1].is_completed()
        assert len(sandbox.ledger.charges) == 1


class TestAdvice:
    """What a report says is true, and can be done by whoever reads it."""

    async def test_a_part_that_is_uncertain_or_refused_is_not_called_fetchable(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        for text, answers, words in (
            ("The first part.\n\nIs it paid?", [Accept(), Accept(then=Cut())], "*Resubmit* set to `uncertain`"),
            ("Another first part.\n\n[sandbox:reject] No.", [], "would refuse the same text again"),
        ):
            sandbox.on_submit(answers)
            state = await text_to_speech(text, **say, max_chars=24, return_state=True)
            told = await report(state)
            assert "of 2 parts are paid for" in told
            assert words in told
            assert "Press *Retry*" not in told
            assert "not known to have been charged" not in told

    async def test_a_wait_is_not_told_of_parameters_that_it_does_not_have(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        ticket = sandbox.add_job(text="Forgotten.")
        sandbox.on_status(ticket["runId"], repeat(Answer(404)))
        state = await wait_for_tts(ticket, **say, return_state=True)
        for told in (await report(state), str(state.message)):
            assert "resubmit" not in told.lower()
            assert "the provider does not know" in told.lower()


async def attempt(run: UUID) -> State[Any]:
    """Make another attempt of a flow run, as after a press of Retry."""
    async with get_client() as client:
        await client.set_flow_run_state(run, Scheduled(), force=True)
        flow_run = await client.read_flow_run(run)
    await run_flow_async(text_to_speech, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")
    async with get_client() as client:
        state = (await client.read_flow_run(run)).state
    assert state is not None
    return state


class TestAnswers:
    @pytest.mark.parametrize(
        "body",
        [
            {"jobId": "98b0d593", "model": "Elevenlabs-Turbo-V2.5", "cost": 0.005},
            {"message": "Your request is queued."},
            {"id": "98b0d593", "error": "Not this."},
            {"code": "content_policy_violation", "error": "Not this."},
        ],
        ids=["another id", "a message", "the id of an error", "a code"],
    )
    async def test_an_accepted_submission_without_a_run_id_is_uncertain(
        self, body: dict[str, Any], sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_submit([Accept(then=Answer(202, json=body))])
        for _ in range(2):
            state = await text_to_speech.with_options(retries=2)("What is this?", **say, return_state=True)
            assert state.name == "SUBMISSION_UNCERTAIN"
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 1

    async def test_an_id_is_a_ticket_and_one_that_nobody_knows_is_not_paid_for_again(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_submit([Accept(then=Answer(202, json={"id": "98b0d593", "message": "Your request is queued."}))])
        for _ in range(2):
            state = await text_to_speech("What is this?", **say, return_state=True)
            assert "does not know this job" in str(state.message)
        assert {request.query["runId"] for request in sandbox.requests("status")} == {"98b0d593"}
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 1

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("data:audio/mpeg;base64,SUQzBAAAAAAAAA==", "not http or https"),
            ("file:///etc/passwd", "not http or https"),
            ("http://speech:mp3", "not a URL"),
            (None, "redirected more than"),
        ],
    )
    async def test_a_url_that_leads_nowhere_leaves_the_job_open(
        self, url: str | None, words: str, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        if url is None:
            sandbox.on_audio(None, [Redirect("/again")] * 6)
        else:
            sandbox.on_status(None, [{"status": "completed", "audioUrl": url}])
        with pytest.raises(AudioError, match=words):
            await text_to_speech.with_options(retries=1)("To nowhere.", **say)
        polls = len(sandbox.requests("status"))

        audio = await text_to_speech("To nowhere.", **say)

        assert Path(audio.location).exists()
        assert len(sandbox.requests("status")) == polls + 1
        assert len(sandbox.ledger.charges) == 1

    async def test_bytes_that_are_no_audio_lose_the_job_at_once(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        words = Answer(body=b"no audio at all", headers={"content-type": "audio/mpeg"})
        sandbox.on_submit([Accept(then=words)])
        for _ in range(2):
            state = await text_to_speech.with_options(retries=2)("Noise.", model="tts-1", **say, return_state=True)
            assert state.name == "AUDIO_INVALID"
            assert str(state.message).count("--resubmit") == 1
            assert "The text is paid for" in await report(state)
        assert len(notes(say["save_to"], "over-lost")) == 1
        assert len(sandbox.ledger.charges) == 1

        await text_to_speech("Noise.", model="tts-1", **say, resubmit=["lost"])
        assert len(sandbox.ledger.charges) == 2

    async def test_a_line_that_another_run_cannot_help_says_so_and_what_can(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        picture = Answer(body=b"\xff\xd8\xff\xe0 a picture", headers={"content-type": "audio/mpeg"})
        sandbox.on_submit([Accept(then=picture)])
        lines = [{"id": "a", "text": "Seen once.", "model": "tts-1"}]
        for _ in range(2):
            with pytest.raises(BatchPartial, match=r"name `resubmit` \(1\) may end in the same way again") as caught:
                await text_to_speech_batch(lines, **say)
            [row] = caught.value.rows
            assert row.outcome == "AUDIO_INVALID"
            assert "Another run cannot help. To pay for it anew, set `resubmit`" in str(row.detail)
        assert len(sandbox.ledger.charges) == 1

        [row] = await text_to_speech_batch(lines, **say, resubmit=["lost"])
        assert row.outcome == "completed"
        assert len(sandbox.ledger.charges) == 2

    async def test_a_url_that_came_as_the_answer_is_tried_again(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        sandbox.on_audio(None, [Answer(404)] * 4)
        with pytest.raises(AudioError, match="Run it again to try the URL again"):
            await text_to_speech("By its URL.", model="Kokoro-82m", **say)
        await text_to_speech("By its URL.", model="Kokoro-82m", **say)
        assert len(sandbox.ledger.charges) == 1

    async def test_a_url_that_came_as_the_answer_is_given_up_on_request(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_audio(None, [Answer(404)] * 8)
        with pytest.raises(AudioError, match="resubmit"):
            await text_to_speech("By its URL.", model="Kokoro-82m", **say)
        await text_to_speech("By its URL.", model="Kokoro-82m", **say, resubmit=["lost"])
        assert len(sandbox.ledger.charges) == 2


class TestInterruptions:
    async def test_a_cancelled_run_keeps_the_ticket_of_what_it_has_in_the_air(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_submit([Accept(delay=2)])
        run = asyncio.create_task(text_to_speech("Cancelled.", **say))
        await asyncio.to_thread(sandbox.wait_for_request, "submit")
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run
        assert len(notes(say["save_to"], "answer")) == 1

        await text_to_speech("Cancelled.", **say)
        assert len(sandbox.ledger.charges) == 1

    def test_ctrl_c_in_a_shell_keeps_the_ticket_and_says_how_to_go_on(self, sandbox: Sandbox, tmp_path: Path) -> None:
        sandbox.on_submit([Accept(delay=3)])
        command = [str(Path(sys.executable).parent / "prefect-nanogpt"), "say", "Stopped by hand."]
        environment = {
            **os.environ,
            "PREFECT_API_URL": PREFECT_API_URL.value(),
            "NANOGPT_API_KEY": API_KEY,
            "NANOGPT_BASE_URL": sandbox.base_url,
        }
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes)
        sandbox.wait_for_request("submit", timeout=60)
        process.send_signal(signal.SIGINT)
        said, told = process.communicate(timeout=60)

        assert (process.returncode, said) == (130, "")
        assert "A submission has left and is being charged for." in told
        assert f"prefect-nanogpt say 'Stopped by hand.' --save-to {tmp_path}/audio" in told
        assert "Traceback" not in told
        assert len(notes(f"{tmp_path}/audio", "answer")) == 1

        again = subprocess.run(command, cwd=tmp_path, env=environment, timeout=60, **pipes)
        assert [Path(again.stdout.strip())] == files_in(tmp_path / "audio")
        assert len(sandbox.ledger.charges) == 1


PARAGRAPHS = ["The first part.", "The second part.", "The third part."]


class TestLongTexts:
    async def test_the_catalogue_may_be_down_at_a_retry(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = "A sentence of a long text. " * 500
        sandbox.on_status(None, [PENDING] * 2)
        with pytest.raises(TTSTimeout):
            await text_to_speech(text, **say, **SOON)
        assert len(sandbox.ledger.charges) == 2
        monkeypatch.setattr(NanoGPTClient, "find_model", unreachable)

        audio = await text_to_speech(text, **say)

        assert files_in(say["save_to"]) == [Path(audio.location)]
        assert len(sandbox.ledger.charges) == 2

    async def test_what_was_submitted_whole_stays_whole(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        text = "\n\n".join(PARAGRAPHS)
        sandbox.on_status(None, [PENDING])
        with pytest.raises(TTSTimeout):
            await text_to_speech(text, **say, **SOON)
        await text_to_speech(text, **say, max_chars=20)
        assert len(sandbox.ledger.charges) == 1

    @pytest.mark.parametrize("model", ["Elevenlabs-Turbo-V2.5", "Kokoro-82m", "tts-1"])
    async def test_a_changed_paragraph_costs_one_part(self, model: str, sandbox: Sandbox, say: dict[str, Any]) -> None:
        first = await text_to_speech("\n\n".join(PARAGRAPHS), model=model, **say, max_chars=20)
        for charge in sandbox.ledger.charges:
            sandbox.on_status(charge.run_id, repeat(Answer(404)))

        second = await text_to_speech(
            "\n\n".join([PARAGRAPHS[0], "Another one.", PARAGRAPHS[2]]), model=model, **say, max_chars=20
        )

        assert first.location != second.location
        assert Counter(texts_of(sandbox).values()) == dict.fromkeys([*PARAGRAPHS, "Another one."], 1)

    async def test_what_is_paid_for_is_told_of_parts(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        text = f"{PARAGRAPHS[0]}\n\n[sandbox:reject] No."
        state = await text_to_speech(text, **say, max_chars=20, return_state=True)
        assert state.name == "CONTENT_POLICY_VIOLATION"
        told = await report(state)
        assert "1 of 2 parts are paid for" in told
        assert "nothing was charged" not in told.lower()


async def unreachable(*_: Any) -> None:
    raise ProviderError("The catalogue is down.", retryable=True)


class TestWhatIsTheSame:
    async def test_a_job_of_the_sandbox_is_not_taken_for_the_providers(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        tried = await text_to_speech("Try first.", name="intro", **say)
        with Sandbox(job_seconds=0, speak=False) as provider:
            elsewhere = say["credentials"].model_copy(update={"base_url": provider.base_url})
            audio = await text_to_speech("Try first.", name="intro", **{**say, "credentials": elsewhere})
            assert [charge.run_id for charge in provider.ledger.charges] == [audio.ticket and audio.ticket.run_id]
        assert audio.ticket != tried.ticket
        assert len(sandbox.ledger.charges) == 1

    async def test_a_text_under_another_name_is_copied_and_the_report_says_who_paid(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        payer = text_to_speech.with_options(flow_run_name="the run that paid")
        first = await payer("Named.", name="one", **say)
        asked = len(sandbox.requests())

        state = await text_to_speech("Named.", name="two", **say, return_state=True)

        second = await state.aresult()
        assert [file.name for file in files_in(say["save_to"])] == ["one.mp3", "two.mp3"]
        assert second.location == f"{say['save_to']}/two.mp3"
        assert Path(first.location).read_bytes() == Path(second.location).read_bytes()
        assert (second.ticket, second.sha256) == (first.ticket, first.sha256)
        assert len(sandbox.requests()) == asked
        told = await report(state)
        assert "nothing was charged now" in told
        assert "saved by the run the run that paid" in told.replace("\\", "")

    async def test_audio_of_another_text_under_the_name_is_kept_beside(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        first = await text_to_speech("First version.", name="intro", **say)
        await text_to_speech("Second version, which is longer.", name="intro", **say)
        assert {file.name for file in files_in(say["save_to"])} == {"intro.mp3", f"intro.{first.sha256[:8]}.mp3"}

        asked = len(sandbox.requests())
        again = await text_to_speech("First version.", name="intro", **say)
        assert (again.location, again.sha256) == (first.location, first.sha256)
        assert Path(again.location).read_bytes() == sandbox.audio_bytes(sandbox.ledger.charges[0].run_id)
        assert len(sandbox.requests()) == asked


class TestResubmit:
    async def test_an_uncertain_job_is_submitted_anew_on_request(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        sandbox.on_submit([Accept(then=Cut())])
        for _ in range(2):
            with pytest.raises(SubmissionUncertain, match="--resubmit"):
                await text_to_speech("Unclear.", **say, resubmit=["lost", "refused"])
        assert len(sandbox.requests("submit")) == 1

        for _ in range(2):
            await text_to_speech("Unclear.", **say, resubmit=["uncertain"])
        assert len(sandbox.ledger.charges) == 2

    async def test_a_lost_job_is_asked_for_again_and_submitted_anew_on_request(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_status(None, [PENDING, *[Answer(404)] * 12])
        with pytest.raises(TTSTimeout):
            await text_to_speech("Forgotten.", **say, **SOON)
        for _ in range(2):
            with pytest.raises(ProviderError, match="does not know this job"):
                await text_to_speech("Forgotten.", **say, resubmit=["uncertain", "refused"])
        assert len(notes(say["save_to"], "over-lost")) == 1
        assert len(sandbox.ledger.charges) == 1

        await text_to_speech("Forgotten.", **say, resubmit=["lost"])
        assert len(sandbox.ledger.charges) == 2

    async def test_a_lost_job_that_the_provider_finds_again_is_saved(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_status(None, [PENDING, *[Answer(404)] * 4])
        for error in (TTSTimeout, ProviderError):
            with pytest.raises(error):
                await text_to_speech("Found again.", **say, **SOON)
        audio = await text_to_speech("Found again.", **say)
        asked = len(sandbox.requests())
        assert (await text_to_speech("Found again.", **say)).location == audio.location
        assert len(sandbox.requests()) == asked
        assert len(sandbox.ledger.charges) == 1

    async def test_a_refused_text_is_sent_again_only_on_request(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        with pytest.raises(ContentPolicyViolation):
            await text_to_speech("[sandbox:reject] Again.", **say)
        asked = len(sandbox.requests())
        with pytest.raises(ContentPolicyViolation, match="nothing was sent now"):
            await text_to_speech("[sandbox:reject] Again.", **say, resubmit=["uncertain", "lost"])
        assert len(sandbox.requests()) == asked

        with pytest.raises(ContentPolicyViolation):
            await text_to_speech("[sandbox:reject] Again.", **say, resubmit=["refused"])
        assert len(sandbox.ledger.charges) == 2

    async def test_what_is_saved_is_never_submitted_anew(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        for _ in range(2):
            await text_to_speech("Saved.", **say, resubmit=["uncertain", "lost", "refused"])
        assert len(sandbox.ledger.charges) == 1
        for _ in range(2):
            await text_to_speech("Saved.", **say, take=2)
        assert len(sandbox.ledger.charges) == 2


class TestBudget:
    async def test_failed_tries_and_earlier_runs_count(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        text = "[sandbox:fail] Again."
        price = Decimal("0.00006") * len(text)
        for _ in range(2):
            state = await text_to_speech.with_options(retries=4)(
                text, **say, max_cost=price * Decimal("2.5"), return_state=True
            )
            assert state.name == "COST_LIMIT_EXCEEDED"
            assert sandbox.ledger.charged_total == 2 * price

    async def test_what_is_paid_for_is_fetched_whatever_the_limit(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        sandbox.on_status(None, [PENDING])
        with pytest.raises(TTSTimeout):
            await text_to_speech("Paid for.", **say, **SOON)
        await text_to_speech("Paid for.", **say, max_cost=Decimal("0.0001"))
        assert len(sandbox.ledger.charges) == 1

    async def test_a_price_per_generation_is_read(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(
            MODELS, "flat", Model("flat", "ticket", Decimal("0.4"), None, "", priced_by="per_generation")
        )
        with pytest.raises(ProviderError, match=r"costs 1\.2 USD") as caught:
            await text_to_speech("\n\n".join(PARAGRAPHS), model="flat", max_chars=20, max_cost=Decimal(1), **say)
        assert caught.value.code == "COST_LIMIT_EXCEEDED"
        assert sandbox.requests("submit") == []

    @pytest.mark.parametrize("why", ["the catalogue has none", "the catalogue is down"])
    async def test_an_unknown_price_is_never_more_than_one_job_beyond_the_limit(
        self, why: str, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(MODELS, "dear", Model("dear", "ticket", Decimal(25), None, "", assumed_price=True))
        if why == "the catalogue is down":
            monkeypatch.setattr(NanoGPTClient, "find_model", unreachable)
        text = "\n\n".join(f"Part number {number:03}." for number in range(6))
        for _ in range(2):
            state = await text_to_speech(
                text, model="dear", max_chars=20, max_cost=Decimal(1), **say, return_state=True
            )
            assert state.name == "COST_LIMIT_EXCEEDED"
            assert Decimal(1) <= sandbox.ledger.charged_total <= Decimal("1.4")
        assert "3 of 6 parts are paid for" in await report(state)


class TestRefusedBeforehand:
    @pytest.mark.parametrize(
        ("wrong", "error", "words"),
        [
            ({"text": "Half an emoji: \ud83d"}, NanoGPTError, "half a character"),
            ({"options": {"emotion": float("nan")}}, NanoGPTError, "no JSON value"),
            ({"options": {"emotion": {1, 2}}}, NanoGPTError, "no JSON value"),
            ({"options": {"emotion": object()}}, NanoGPTError, "no JSON value"),
            ({"timeout_seconds": float("inf")}, ParameterTypeError, "finite"),
            ({"timeout_seconds": float("nan")}, ParameterTypeError, "timeout_seconds"),
        ],
        ids=["half an emoji", "NaN", "a set", "an object", "an infinite timeout", "a timeout that is no number"],
    )
    async def test_what_cannot_be_sent_is_refused_and_not_noted(
        self, wrong: dict[str, Any], error: type[Exception], words: str, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        with pytest.raises(error, match=words):
            await text_to_speech(**{"text": "Fine.", **say, **wrong})
        assert sandbox.requests() == []
        assert notes(say["save_to"]) == []

    async def test_half_an_emoji_is_explained(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        with pytest.raises(ValidationError, match="unpaired surrogate"):
            await submit_tts(TTSRequest(text="Half an emoji: \ud83d"), say["save_to"], say["credentials"])


class TestEvents:
    @pytest.mark.parametrize("model", ["Elevenlabs-Turbo-V2.5", "Kokoro-82m", "tts-1"])
    async def test_a_job_is_submitted_and_completed_once(
        self, model: str, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        for _ in range(2):
            await text_to_speech("Heard of once.", model=model, **say)
        await text_to_speech("Heard of once.", model=model, name="copy", **say)
        assert await events_about("Heard of once.", model, say) == {"submitted": 1, "completed": 1}

    async def test_a_rejected_job_is_heard_of_once(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        for _ in range(2):
            with pytest.raises(ContentPolicyViolation):
                await text_to_speech("[sandbox:reject] Heard of once.", **say)
        heard = await events_about("[sandbox:reject] Heard of once.", "Elevenlabs-Turbo-V2.5", say)
        assert heard == {"submitted": 1, "rejected": 1}

    @pytest.mark.parametrize("model", ["Kokoro-82m", "tts-1"])
    async def test_a_text_that_is_refused_at_once_is_heard_of_once(
        self, model: str, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        for _ in range(2):
            with pytest.raises(ContentPolicyViolation):
                await text_to_speech("[sandbox:reject] Not this.", model=model, **say)
        assert await events_about("[sandbox:reject] Not this.", model, say) == {"rejected": 1}

    @pytest.mark.parametrize("name", [None, "late"])
    async def test_a_wait_for_the_ticket_of_a_text_settles_the_job_of_the_text(
        self, name: str | None, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_status(None, [PENDING])
        with pytest.raises(TTSTimeout) as caught:
            await text_to_speech("Waited for.", name=name, **say, **SOON)
        ticket = caught.value.ticket
        assert ticket is not None

        waited = await wait_for_tts(ticket, **say)
        again = await text_to_speech("Waited for.", name=name, **say)
        await collect_open_tickets(say["credentials"])

        assert waited.location == again.location
        assert files_in(say["save_to"]) == [Path(waited.location)]
        heard = await events_of(ticket.run_id)
        assert heard == {"submitted": 1, "timed-out": 1, "completed": 1}

    async def test_a_wait_for_audio_that_is_saved_is_not_heard_of(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        audio = await text_to_speech("Saved before.", **say)
        assert audio.ticket is not None
        assert (await wait_for_tts(audio.ticket, **say)).location == audio.location
        assert await events_of(audio.ticket.run_id) == {"submitted": 1, "completed": 1}

    async def test_a_job_that_times_out_is_heard_of_at_each_deadline(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_status(None, [PENDING])
        with pytest.raises(TTSTimeout):
            await text_to_speech("Late.", **say, **SOON)
        await text_to_speech("Late.", **say)
        heard = await events_about("Late.", "Elevenlabs-Turbo-V2.5", say)
        assert heard == {"submitted": 1, "timed-out": 1, "completed": 1}

    async def test_parts_are_heard_of_once_each(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        for _ in range(2):
            await text_to_speech("\n\n".join(PARAGRAPHS), **say, max_chars=20)
        for part in PARAGRAPHS:
            heard = await events_about(part, "Elevenlabs-Turbo-V2.5", say)
            assert heard == {"submitted": 1, "completed": 1}
        whole = await events_about("\n\n".join(PARAGRAPHS), "Elevenlabs-Turbo-V2.5", say)
        assert whole == {"completed": 1}


async def events_about(text: str, model: str, say: dict[str, Any]) -> dict[str, int]:
    """Count the events about a job, by what they say, once all that this process has sent have arrived."""
    return await events_where("job", Job(say["credentials"].base_url, TTSRequest(text=text, model=model)).id)


async def events_of(run_id: str) -> dict[str, int]:
    """Count the events about a job by its run id, by what they say."""
    return await events_where("run_id", run_id)


async def events_where(field: str, value: str) -> dict[str, int]:
    """Count the events about a job, by what they say."""
    found = await payloads_where(field, value)
    return dict(Counter(said for said, _ in found))


async def payloads_where(field: str, value: str) -> list[tuple[str, dict[str, Any]]]:
    """Give what the events about a job say, and their payloads."""
    last = f"nanogpt.tts.test-{uuid4()}"
    emit_event(last, resource={"prefect.resource.id": last})

    async def all_events() -> list[dict[str, Any]] | None:
        async with httpx.AsyncClient(base_url=PREFECT_API_URL.value()) as client:
            query = {"filter": {"event": {"prefix": ["nanogpt.tts."]}}, "limit": 50}
            found: list[dict[str, Any]] = (await client.post("/events/filter", json=query)).json()["events"]
        return found if any(event["event"] == last for event in found) else None

    found = await eventually(all_events)
    about = [event for event in found if event["payload"].get(field) == value]
    return [(event["event"].rpartition(".")[2], event["payload"]) for event in about]


async def test_a_whole_that_is_paid_for_is_fetched_although_it_was_to_be_split_before(
    say: dict[str, Any], sandbox: Sandbox
) -> None:
    text = "\n\n".join(PARAGRAPHS)
    sandbox.on_submit([Answer(402, {"error": "No money."})] * 3)
    with pytest.raises(ProviderError):
        await text_to_speech(text, **say, max_chars=20)
    audio = await text_to_speech(text, **say, max_chars=5_000)
    Path(audio.location).unlink()

    again = await text_to_speech(text, **say)

    assert again.sha256 == audio.sha256
    assert len(sandbox.ledger.charges) == 1


@pytest.mark.parametrize(
    "end",
    [
        {"status": "moderated", "error": "Not now."},
        {"status": "pending", "terminal": True},
        {"status": "gone", "terminal": True},
    ],
)
async def test_an_end_in_words_that_are_not_known_is_not_paid_for_again_unasked(
    end: dict[str, Any], say: dict[str, Any], sandbox: Sandbox
) -> None:
    sandbox.on_status(None, [end] * 2)
    for _ in range(2):
        state = await text_to_speech("What became of it?", **say, return_state=True)
        assert state.name == "TTS_FAILED"
        assert "To pay for the text anew" in str(state.message)

    assert await text_to_speech("What became of it?", **say)
    assert len(sandbox.ledger.charges) == 1
