"""The notes of the ledger when things go wrong around them: what they say stays true, and nothing is paid for twice."""

import asyncio
import errno
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import sentencex

from prefect_nanogpt import client, ledger, storage
from prefect_nanogpt.errors import (
    ContentPolicyViolation,
    NanoGPTError,
    ProviderError,
    StorageError,
    SubmissionUncertain,
    TTSTimeout,
)
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.ledger import FOLDER, Claim, Job, Ledger
from prefect_nanogpt.models import AudioFile, AudioModel, Ticket, TTSRequest
from prefect_nanogpt.sandbox import Accept, Answer, Cut, Sandbox, Slow
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import submit_tts
from tests.conftest import eventually
from tests.test_paid_once import PENDING, SOON, notes, say

__all__ = ["say"]

LONG = "A sentence of a long text. " * 30
PARTS = "The first part of it.\n\nThe second part."
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "TORN_SECONDS", 0.01)


def in_another_process() -> None:
    """Forget what only this process knows."""
    for known in (Ledger._under_way, Ledger._never_sent, Ledger._unwritten):
        known.clear()  # type: ignore[attr-defined]


def states(save_to: str) -> list[str]:
    return sorted(".".join(note.name.split(".")[1:3]).partition("-")[0] for note in notes(save_to))


def failing(monkeypatch: pytest.MonkeyPatch, is_failing: Callable[[str], bool]) -> None:
    """Let the creation of some notes fail, as on a full disk."""
    create = Destination.create

    def create_or_fail(self: Destination, name: str, content: bytes) -> bool:
        if is_failing(name):
            raise FULL
        return create(self, name, content)

    monkeypatch.setattr(Destination, "create", create_or_fail)


class TestWhatCannotBeWritten:
    @pytest.mark.parametrize("model", ["Elevenlabs-Turbo-V2.5", "tts-1"])
    async def test_the_answer_stays_until_the_end_is_noted(
        self, model: str, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as full:
            failing(full, lambda name: ".saved-" in name)
            first = await text_to_speech("Full at the last note.", model=model, name="intro", **say)
        in_another_process()

        assert states(say["save_to"]) == ["1.answer", "1.sent"]
        again = await text_to_speech("Full at the last note.", model=model, name="intro", **say)
        assert (again.location, again.sha256) == (first.location, first.sha256)
        assert len(sandbox.ledger.charges) == 1

    async def test_an_end_that_cannot_be_noted_is_remembered_and_noted_later(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sandbox.on_submit([Answer(429, json={"error": "Slow down."})])
        left = ["over"] * 6
        failing(monkeypatch, lambda name: ".over-" in name and bool(left) and bool(left.pop()))
        await text_to_speech("Throttled.", **say)
        assert len(sandbox.ledger.charges) == 1
        assert "1.over" in states(say["save_to"])

    @pytest.mark.parametrize("model", ["Elevenlabs-Turbo-V2.5", "tts-1"])
    @pytest.mark.parametrize("has_links", [True, False])
    async def test_half_a_note_is_written_anew(
        self, model: str, has_links: bool, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write, left = storage._write_durably, ["once"]

        def break_off(path: Path, content: bytes) -> None:
            if left and (b'"ticket"' in content or b'"base64"' in content):
                left.pop()
                path.write_bytes(content[: len(content) // 2])
                if has_links:  # as a store without conditions leaves it
                    os.link(path, path.with_name(notes(say["save_to"], "sent")[0].name.replace("sent", "answer")))
                raise FULL
            write(path, content)

        def no_links(*_: Any) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        with monkeypatch.context() as full:
            full.setattr(storage, "_write_durably", break_off)
            if not has_links:
                full.setattr(os, "link", no_links)
            request = TTSRequest(text="Torn and mended.", model=model)
            await submit_tts(request, say["save_to"], say["credentials"])
        in_another_process()

        audio = await text_to_speech("Torn and mended.", model=model, **say)
        charge = sandbox.ledger.charges[0]
        if charge.run_id is not None and model != "tts-1":
            assert Path(audio.location).read_bytes() == sandbox.audio_bytes(charge.run_id)
        assert left == []
        assert len(sandbox.ledger.charges) == 1

    async def test_an_answer_is_noted_while_the_run_still_waits(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sandbox.on_status(None, [PENDING] * 3)
        left = [1] * ledger.NOTE_ATTEMPTS
        failing(monkeypatch, lambda name: ".answer." in name and bool(left) and bool(left.pop()))
        with pytest.raises(TTSTimeout):
            await text_to_speech("Flushed.", **say, timeout_seconds=0.6)
        in_another_process()
        assert states(say["save_to"]) == ["1.answer", "1.sent"]

    async def test_a_ticket_is_logged_before_a_storage_that_hangs_has_it(
        self,
        sandbox: Sandbox,
        say: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        said_before = []

        def look(name: str) -> bool:
            if ".answer." in name:
                said_before.append(sandbox.ledger.charges[0].run_id in caplog.text)
            return False

        caplog.set_level("INFO")
        failing(monkeypatch, look)
        await text_to_speech("Logged first.", **say)
        assert said_before == [True]

    async def test_a_driver_with_errors_of_its_own_is_a_storage_failure(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unreachable(*_: Any) -> dict[str, int]:
            raise RuntimeError("Could not connect to the endpoint")

        monkeypatch.setattr(Destination, "_audio_called", unreachable)
        state = await text_to_speech("Odd.", **{**say, "save_to": "memory://odd/audio"}, return_state=True)
        assert state.name == "STORAGE_FAILED"


class TestWhole:
    """What was submitted whole is not submitted again in parts."""

    @pytest.mark.parametrize(
        ("text", "answers", "error"),
        [
            (PARTS, [Accept(then=Cut())], SubmissionUncertain),
            (f"[sandbox:reject] {PARTS}", [], ContentPolicyViolation),
        ],
        ids=["uncertain", "refused"],
    )
    async def test_not_after_an_end(
        self, text: str, answers: list[Any], error: type[NanoGPTError], sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_submit(answers)
        with pytest.raises(error):
            await text_to_speech(text, **say)
        with pytest.raises(error):
            await text_to_speech(text, **say, max_chars=45)
        assert len(sandbox.requests("submit")) == 1

    async def test_not_where_the_file_is_gone(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        audio = await text_to_speech(PARTS, **say)
        Path(audio.location).unlink()
        assert (await text_to_speech(PARTS, **say, max_chars=25)).sha256 == audio.sha256
        assert len(sandbox.ledger.charges) == 1

    async def test_not_where_the_catalogue_was_down_before(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        catalogue: list[AudioModel | ProviderError] = [ProviderError("down"), AudioModel(id="m", max_chars=512)]

        async def audio_model(*_: Any) -> AudioModel:
            match catalogue.pop(0):
                case AudioModel() as found:
                    return found
                case down:
                    raise down

        monkeypatch.setattr(client.NanoGPTClient, "find_model", audio_model)
        sandbox.on_submit([Accept(then=Answer(502))])
        for _ in range(2):
            with pytest.raises(SubmissionUncertain):
                await text_to_speech(LONG, **say)
        assert len(sandbox.ledger.charges) == 1

    async def test_a_whole_of_parts_is_made_of_them_again(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        audio = await text_to_speech(PARTS, **say, max_chars=25)
        Path(audio.location).unlink()
        assert (await text_to_speech(PARTS, **say, max_chars=3_000)).sha256 == audio.sha256
        assert len(sandbox.ledger.charges) == 2

    async def test_a_text_is_not_split_elsewhere_by_another_segmenter(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = "The first one. The second one."
        sandbox.on_status(None, [PENDING] * 2)
        with pytest.raises(TTSTimeout):
            await text_to_speech(text, **say, **SOON, max_chars=20)
        monkeypatch.setattr(sentencex, "segment", lambda language, whole: [whole])
        await text_to_speech(text, **say)
        assert sorted(request.json["text"] for request in sandbox.requests("submit")) == [
            "The first one.",
            "The second one.",
        ]

    async def test_a_damaged_plan_submits_nothing(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        sandbox.on_status(None, [PENDING] * 2)
        with pytest.raises(TTSTimeout):
            await text_to_speech(PARTS, **say, **SOON, max_chars=25)
        [plan] = notes(say["save_to"], "plan")
        for content in ("", '{"limi', '{"max": 25}'):
            plan.write_text(content)
            with pytest.raises(StorageError, match=r"plan\.json"):
                await text_to_speech(PARTS, **say)
        await text_to_speech(PARTS, **say, max_chars=25)
        assert len(sandbox.ledger.charges) == 2


@pytest.fixture
def sent_elsewhere(say: dict[str, Any], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> tuple[Ledger, Claim]:
    """A submission that another machine, which is silent since, has in the air."""
    Path(say["save_to"]).mkdir()
    here = Ledger(Destination(say["save_to"]))
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(ledger, "_this_process", lambda: {"machine": "other", "pid": 1, "started": "1"})
        claim = here.claim(Job(sandbox.base_url, TTSRequest(text="Slow.")), 1)
    assert claim is not None
    date(say["save_to"], timedelta(days=-1))
    in_another_process()
    return here, claim


def date(save_to: str, age: timedelta) -> None:
    [sent] = notes(save_to, "sent")
    sent.write_text(json.dumps({**json.loads(sent.read_text()), "at": (datetime.now(UTC) + age).isoformat()}))


class TestLateAnswers:
    async def test_an_answer_ends_the_uncertainty(
        self, sent_elsewhere: tuple[Ledger, Claim], sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        here, claim = sent_elsewhere
        with pytest.raises(SubmissionUncertain):
            await text_to_speech("Slow.", **say)
        here.note_over(claim.job, 1, "uncertain", SubmissionUncertain("Noted by somebody who was asked to resubmit."))
        ticket = sandbox.add_job(text="Slow.")
        here.note_answer(claim, Ticket.model_validate(ticket))

        audio = await text_to_speech("Slow.", **say)
        assert audio.ticket is not None
        assert audio.ticket.run_id == ticket["runId"]
        assert sandbox.requests("submit") == []
        assert (await text_to_speech("Slow.", **say)).location == audio.location

    async def test_a_try_that_was_not_accepted_hides_no_answer(
        self, sent_elsewhere: tuple[Ledger, Claim], sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        here, claim = sent_elsewhere
        sandbox.on_submit([Answer(402, json={"error": "No balance."})])
        with pytest.raises(ProviderError, match="No balance"):
            await text_to_speech("Slow.", **say, resubmit=["uncertain"])
        ticket = sandbox.add_job(text="Slow.")
        here.note_answer(claim, Ticket.model_validate(ticket))

        audio = await text_to_speech("Slow.", **say)
        assert audio.ticket is not None
        assert audio.ticket.run_id == ticket["runId"]
        assert len(sandbox.requests("submit")) == 1

    @pytest.mark.parametrize("end", ["uncertain", "lost"])
    async def test_a_permission_to_resubmit_ends_with_its_run(
        self, end: Any, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        no_balance = Answer(402, json={"error": "No balance."})
        if end == "uncertain":
            sandbox.on_submit([Accept(then=Cut()), no_balance])
        else:
            sandbox.on_submit([None, no_balance])
            sandbox.on_status(None, repeat(Answer(404), 8))
        with pytest.raises(NanoGPTError):
            await text_to_speech("Sticky.", **say)
        with pytest.raises(ProviderError, match="No balance"):
            await text_to_speech("Sticky.", **say, resubmit=[end])
        submitted = len(sandbox.requests("submit"))

        if end == "uncertain":
            with pytest.raises(SubmissionUncertain):
                await text_to_speech("Sticky.", **say)
        else:
            await text_to_speech("Sticky.", **say)  # the provider knows the job again
        assert len(sandbox.requests("submit")) == submitted

    async def test_a_ticket_is_saved_as_of_its_own_try(
        self, sent_elsewhere: tuple[Ledger, Claim], sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        here, claim = sent_elsewhere
        sandbox.on_status(None, [PENDING])
        with pytest.raises(TTSTimeout):
            await text_to_speech("Slow.", **say, **SOON, resubmit=["uncertain"])
        late = Ticket.model_validate(sandbox.add_job(text="Slow."))
        here.note_answer(claim, late)
        assert here.try_of(claim.job, late) == 1
        await text_to_speech("Slow.", **say)
        assert "2.saved" in states(say["save_to"])
        assert "1.answer" in states(say["save_to"])

    async def test_a_clock_that_is_ahead_is_not_waited_for(
        self, sent_elsewhere: tuple[Ledger, Claim], sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        date(say["save_to"], timedelta(days=1))
        async with asyncio.timeout(20):
            with pytest.raises(SubmissionUncertain):
                await text_to_speech("Slow.", **say)


class TestEnds:
    async def test_an_end_that_this_version_does_not_know_is_uncertain(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        with pytest.raises(ContentPolicyViolation):
            await text_to_speech("[sandbox:reject] Unknown.", **say)
        [over] = notes(say["save_to"], "over")
        over.rename(str(over).replace("over-refused", "over-disputed"))
        with pytest.raises(SubmissionUncertain, match="There is no way to ask"):
            await text_to_speech("[sandbox:reject] Unknown.", **say)
        assert len(sandbox.requests("submit")) == 1

    async def test_an_uncertain_end_whose_note_is_torn_still_says_what_to_do(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        sandbox.on_submit([Accept(then=Cut())])
        with pytest.raises(SubmissionUncertain):
            await text_to_speech("Torn.", **say)
        [over] = notes(say["save_to"], "over")
        over.write_text('{"code": "X')
        with pytest.raises(SubmissionUncertain, match=r"not known.*--resubmit"):
            await text_to_speech("Torn.", **say)

    async def test_audio_that_the_provider_has_let_expire_is_not_paid_for_anew(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        audio = await text_to_speech("Moved on.", **say)
        assert audio.ticket is not None
        Path(audio.location).unlink()
        sandbox.on_status(audio.ticket.run_id, repeat({"status": "error", "error": "The result has expired."}))
        for _ in range(2):
            with pytest.raises(NanoGPTError, match="expired"):
                await text_to_speech("Moved on.", **say)
        assert len(sandbox.ledger.charges) == 1

    @pytest.mark.parametrize("field", ["id", "runId"])
    async def test_an_id_in_an_odd_answer_is_kept(self, field: str, sandbox: Sandbox, say: dict[str, Any]) -> None:
        body = {"status": "pending", field: "fal/../7781", "cost": 0.1}
        sandbox.on_submit([Accept(then=Answer(202, json=body))])
        with pytest.raises(SubmissionUncertain, match="7781"):
            await text_to_speech("Odd.", **say)
        [over] = notes(say["save_to"], "over")
        assert "7781" in over.read_text()


class TestTheSame:
    @pytest.mark.parametrize(
        ("first", "second"),
        [({"pitch": 1}, {"pitch": 1.0}), ({"a": 1, "b": 2}, {"b": 2, "a": 1}), ({"a": [2]}, {"a": (2.0,)})],
    )
    async def test_options_are_the_same_however_they_are_written(
        self, first: dict[str, Any], second: dict[str, Any], sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        for options in (first, second):
            await text_to_speech("Optional.", options=options, **say)
        assert len(sandbox.ledger.charges) == 1

    async def test_a_take_is_the_same_however_it_is_written(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        takes: list[Any] = [1, 1.0, True, "1"]
        for take in takes:
            await submit_tts(TTSRequest(text="Takes."), say["save_to"], say["credentials"], take=take)
        assert len(sandbox.ledger.charges) == 1

    @pytest.mark.parametrize("model", ["tts-1", "Kokoro-82m", "Elevenlabs-Turbo-V2.5"])
    async def test_a_text_in_two_folders_with_one_ledger_is_paid_once(
        self, model: str, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path / "ledger"))
        audios: list[AudioFile] = []
        for folder in ("one", "two", "one"):
            audios.append(
                await text_to_speech("Two folders.", model=model, **{**say, "save_to": f"{tmp_path}/{folder}"})
            )
        Path(audios[0].location).unlink()
        Path(audios[1].location).unlink()
        audios.append(await text_to_speech("Two folders.", model=model, **{**say, "save_to": f"{tmp_path}/three"}))
        assert len({audio.sha256 for audio in audios}) == 1
        assert [Path(audio.location).parent.name for audio in audios] == ["one", "two", "one", "three"]
        assert len(sandbox.ledger.charges) == 1

    async def test_a_ledger_that_is_set_aside_is_warned_of(
        self,
        sandbox: Sandbox,
        say: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        await text_to_speech("Before.", **say)
        monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path / "ledger"))
        await text_to_speech("After.", **say)
        assert f"{say['save_to']} has a record of its own" in caplog.text


class TestTheAir:
    async def test_an_answer_that_trickles_is_waited_for_so_long_and_no_longer(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "LONGEST_ANSWER_SECONDS", 1.0)
        sandbox.on_submit([Accept(then=Slow(2_000))])
        begun = time.monotonic()
        with pytest.raises(SubmissionUncertain, match="not whole after 1 s"):
            await text_to_speech("A slow stream of audio.", model="tts-1", **say)
        assert time.monotonic() - begun < 60
        assert client.LONGEST_ANSWER_SECONDS < ledger.SILENCE_SECONDS

    async def test_a_client_that_is_closed_lets_its_submissions_end(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(client, "LAST_WORD_SECONDS", 0.5)
        sandbox.on_submit([Accept(delay=3)])
        run = asyncio.create_task(submit_tts(TTSRequest(text="Long."), say["save_to"], say["credentials"]))
        await asyncio.to_thread(sandbox.wait_for_request, "submit")
        run.cancel()
        with suppress(asyncio.CancelledError):
            await run

        async def answered() -> list[Path] | None:
            return notes(say["save_to"], "answer") or None

        await eventually(answered)
        assert states(say["save_to"]) == ["1.answer", "1.sent"]

    async def test_a_part_that_breaks_off_waits_for_the_others(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save, left = Destination.save, ["once"]

        async def break_off(self: Destination, *args: Any, **kwargs: Any) -> AudioFile:
            if left and self.save_to.endswith(FOLDER):
                left.pop()
                raise RuntimeError("a fault in here")
            return await save(self, *args, **kwargs)

        monkeypatch.setattr(Destination, "save", break_off)
        sandbox.on_submit([None, Accept(delay=2)])
        state = await text_to_speech(PARTS, **say, max_chars=25, return_state=True)
        assert state.is_failed()
        assert notes(say["save_to"], "over") == []
        assert len(sandbox.ledger.charges) == 2
        await text_to_speech(PARTS, **say, max_chars=25)
        assert len(sandbox.ledger.charges) == 2

    async def test_a_claim_whose_answer_was_lost_is_still_won(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link, left = os.link, ["once"]

        def answer_lost(source: Any, target: Any) -> None:
            link(source, target)
            if left and ".sent." in str(target):
                left.pop()
                raise FileExistsError(errno.EEXIST, "File exists")

        monkeypatch.setattr(os, "link", answer_lost)
        await text_to_speech("As on NFS.", **say)
        assert left == []
        assert len(sandbox.ledger.charges) == 1

    async def test_notes_that_lead_nowhere_cannot_be_read(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        await submit_tts(TTSRequest(text="Linked."), say["save_to"], say["credentials"])
        for note in notes(say["save_to"]):
            note.unlink()
            note.symlink_to(f"/nowhere/{note.name}")
        state = await submit_tts(TTSRequest(text="Linked."), say["save_to"], say["credentials"], return_state=True)
        assert isinstance(await state.aresult(raise_on_failure=False), StorageError)
        assert len(sandbox.ledger.charges) == 1


class TestLimit:
    @pytest.mark.parametrize("end", ["uncertain", "lost"])
    async def test_max_cost_holds_for_what_is_submitted_anew(
        self, end: Any, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        if end == "uncertain":
            sandbox.on_submit([Accept(then=Cut())])
            with pytest.raises(SubmissionUncertain):
                await text_to_speech("Limited.", **say)
        else:
            Path((await text_to_speech("Limited.", model="tts-1", **say)).location).unlink()
        model = "tts-1" if end == "lost" else "Elevenlabs-Turbo-V2.5"
        with pytest.raises(ProviderError, match="COST_LIMIT_EXCEEDED"):
            await text_to_speech("Limited.", model=model, **say, resubmit=[end], max_cost=0)
        assert len(sandbox.ledger.charges) == 1

    async def test_max_cost_does_not_stop_fetching(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        sandbox.on_status(None, [PENDING])
        with pytest.raises(TTSTimeout):
            await text_to_speech("Paid.", **say, **SOON)
        assert Path((await text_to_speech("Paid.", **say, max_cost=0)).location).exists()
