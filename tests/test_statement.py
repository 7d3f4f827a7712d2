"""What was bought, told from the ledger: each job, what it cost, what can be done, and totals to the last digit."""

import csv
import io
import json
import shutil
import socket
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from rich.cells import cell_len

from prefect_nanogpt import NanoGPTCredentials, ledger
from prefect_nanogpt.client import DEFAULT_BASE_URL
from prefect_nanogpt.errors import StorageError, SubmissionUncertain
from prefect_nanogpt.flows import collect_open_tickets, text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.ledger import FOLDER, Job, Ledger
from prefect_nanogpt.models import Ticket, TTSRequest
from prefect_nanogpt.sandbox import Accept, Answer, Cut, Sandbox
from prefect_nanogpt.statement import COLUMNS, BoughtJob, Statement, Total, statement_of, totals_of
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import read_ledger, submit_tts
from tests.s3_server import S3Server, s3, s3_env
from tests.test_cli import run
from tests.test_paid_once import PENDING, SOON, notes, say

__all__ = ["s3", "s3_env", "say"]

MODEL = "Elevenlabs-Turbo-V2.5"
TORN = b'{"at": "2026-'


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "TORN_SECONDS", 0.01)


async def jobs_in(*folders: str | Path) -> list[BoughtJob]:
    statement = await statement_of(folders)
    assert statement.problems == []
    return statement.jobs


async def job_in(folder: str | Path) -> BoughtJob:
    [job] = await jobs_in(folder)
    return job


def total(jobs: list[BoughtJob], by: str = "all") -> dict[str, dict[str, Decimal]]:
    return {total.name: total.costs for total in totals_of(jobs) if total.by == by}


def of_note(note: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(note.read_text())
    return told


async def one_of_each(sandbox: Sandbox, say: dict[str, Any]) -> None:
    """Buy something for each outcome; each text says which."""
    sandbox.on_submit([Accept(then=Cut())])
    await text_to_speech("It is uncertain.", **say, return_state=True)
    sandbox.on_status(None, [Answer(404)] * 4)
    await text_to_speech("It is lost.", **say, return_state=True)
    sandbox.on_status(None, [PENDING])
    await text_to_speech("It is open.", **say, **SOON, return_state=True)
    await text_to_speech("[sandbox:reject] It is refused.", **say, return_state=True)
    await text_to_speech("[sandbox:fail] It is failed.", **say, return_state=True)
    await text_to_speech("It is saved.", **say)
    job = Job(sandbox.base_url, TTSRequest(text="It is sending.", model=MODEL))
    assert Ledger(Destination(say["save_to"])).claim(job, 1)


TO_DO = {
    "uncertain": "compare your balance or your usage page",
    "lost": "asks for it once more, and costs nothing. To pay for it anew, set `resubmit`",
    "open": "collect_open_tickets: that fetches it, and costs nothing",
    "refused": "Change the text",
    "failed": "submitted anew, and charged",
    "sending": "Wait for the run that is submitting it",
}


class TestJobs:
    async def test_each_has_its_outcome_and_what_can_be_done(
        self, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path
    ) -> None:
        await one_of_each(sandbox, say)

        done = run("ledger", say["save_to"], "--json", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        jobs = [BoughtJob.model_validate(job) for job in json.loads(done.stdout)["jobs"]]

        assert len(jobs) == 7
        for job in jobs:
            assert f"It is {job.outcome}." in str(job.text)
            assert TO_DO.get(job.outcome, "") in job.to_do
            assert (job.to_do == "") == (job.outcome == "saved")
            assert (job.model, job.kind, job.folder) == (MODEL, "text", say["save_to"])
            assert (job.flow_run is None) == (job.flow_run_id is None) == (job.outcome == "sending")
            known = {charge.run_id: charge.amount for charge in sandbox.ledger.charges}
            assert job.cost == known.get(str(job.run_id))
            assert job.unpriced == (job.outcome in ("uncertain", "sending"))
        shown = run("ledger", say["save_to"], cwd=tmp_path, COLUMNS="300").stdout
        for outcome, to_do in TO_DO.items():
            assert f"It is {outcome}." in shown
            assert to_do in shown
        jobs_shown, _, totals_shown = shown.partition("Jobs that are saved, and need nothing: 1.")
        assert "It is saved." not in jobs_shown
        assert totals_shown
        everything = run("ledger", say["save_to"], "--all", cwd=tmp_path).stdout
        assert "It is saved." in everything.partition("Refunds")[0].partition("in all")[0]

    async def test_all_tries_are_counted_and_each_once(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        for _ in range(3):
            await text_to_speech("[sandbox:fail] Over and over.", **say, return_state=True)

        job = await job_in(say["save_to"])

        assert (job.outcome, job.tries, job.unpriced) == ("failed", 3, 0)
        assert (job.cost, job.currency) == (sandbox.ledger.charged_total, "USD")
        assert [charge.run_id for charge in job.charges] == [charge.run_id for charge in sandbox.ledger.charges]
        assert job.detail.startswith("TTS_FAILED: ")

    async def test_what_was_not_accepted_was_not_bought(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        sandbox.on_submit([Answer(402, json={"error": "Insufficient balance."})])
        await text_to_speech("Too poor.", **say, return_state=True)

        assert await jobs_in(say["save_to"]) == []

    async def test_parts_are_jobs_and_the_whole_is_counted_with_them(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        await text_to_speech("The first part.\n\nThe second part.", **say, max_chars=20, name="book")
        await text_to_speech("The first part.\n\nThe second part.", **say, max_chars=20, name="copy")

        jobs = await jobs_in(say["save_to"])

        assert Counter(job.kind for job in jobs) == {"part": 2, "whole": 1}
        [whole] = [job for job in jobs if job.kind == "whole"]
        assert (whole.outcome, whole.tries, whole.cost) == ("saved", 0, None)
        assert whole.detail == "book.mp3, copy.mp3 (joined of 2 parts, which are jobs of their own)"
        assert whole.provider == sandbox.base_url
        assert total(jobs) == {"": {"USD": sandbox.ledger.charged_total}}

    async def test_a_job_in_two_files_is_one_charge(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        for name in ("intro", "outro"):
            await text_to_speech("Twice the same.", **say, name=name)

        job = await job_in(say["save_to"])

        assert (job.detail, job.tries, job.cost) == ("intro.mp3, outro.mp3", 1, sandbox.ledger.charged_total)

    async def test_a_late_answer_is_not_uncertain(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        here = Ledger(Destination(say["save_to"]))
        job = Job(sandbox.base_url, TTSRequest(text="Late.", model=MODEL))
        claim = here.claim(job, 1)
        assert claim is not None
        here.note_over(job.id, 1, "uncertain", SubmissionUncertain("It is silent."))
        assert (await job_in(say["save_to"])).outcome == "uncertain"
        ticket = Ticket.model_validate(sandbox.add_job("Late."))
        here.note_answer(claim, ticket)

        job_told = await job_in(say["save_to"])

        assert (job_told.outcome, job_told.tries, job_told.cost) == ("open", 1, ticket.cost)
        await text_to_speech("Late.", **say)
        job_told = await job_in(say["save_to"])
        assert (job_told.outcome, job_told.tries, job_told.cost) == ("saved", 1, ticket.cost)

    async def test_what_was_lost_and_is_found_is_saved(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        sandbox.on_status(None, [Answer(404)] * 4)
        await text_to_speech("Found again.", **say, return_state=True)
        assert (await job_in(say["save_to"])).outcome == "lost"
        audio = await text_to_speech("Found again.", **say)
        assert (await job_in(say["save_to"])).outcome == "saved"

        Path(audio.location).unlink()
        [note] = notes(say["save_to"], "over")
        note.write_text(json.dumps({**of_note(note), "at": datetime.now(UTC).isoformat()}))
        assert (await job_in(say["save_to"])).outcome == "lost"

    async def test_what_is_not_written_yet_is_told_too(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await text_to_speech("Remembered.", **say)
        here = Ledger(Destination(say["save_to"]))
        for note in notes(say["save_to"], "saved"):
            monkeypatch.setitem(here._remembered, note.name, note.read_bytes())
            note.unlink()

        job = await job_in(say["save_to"])

        assert (job.outcome, job.cost) == ("saved", sandbox.ledger.charged_total)

    async def test_a_ticket_is_counted_with_the_text_it_is_of(
        self, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path
    ) -> None:
        await text_to_speech("Waited for everywhere.", **say)
        [charge] = sandbox.ledger.charges
        ticket = {"runId": charge.run_id, "model": charge.model, "cost": str(charge.amount), "paymentSource": "USD"}
        await wait_for_tts(ticket, **say)
        await wait_for_tts(ticket, **{**say, "save_to": str(tmp_path / "elsewhere")})

        jobs = await jobs_in(say["save_to"], tmp_path / "elsewhere")

        assert sorted((job.kind, job.outcome, job.tries) for job in jobs) == [
            ("text", "saved", 1),
            ("ticket", "saved", 0),
            ("ticket", "saved", 0),
        ]
        assert total(jobs) == {"": {"USD": charge.amount}}
        assert {job.provider for job in jobs} == {sandbox.base_url}

    async def test_a_ticket_from_elsewhere_is_told_with_what_it_says(
        self, sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        ticket = sandbox.add_job("From elsewhere.")
        sandbox.on_status(None, [PENDING])
        await wait_for_tts(ticket, **say, **SOON, return_state=True)

        job = await job_in(say["save_to"])

        assert (job.kind, job.outcome, job.run_id, job.text) == ("ticket", "open", ticket["runId"], None)
        assert job.to_do.startswith("Wait for its ticket again")
        assert (job.cost, job.unpriced) == (sandbox.ledger.charges[0].amount, 0)

    async def test_a_copied_ledger_is_counted_once(self, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path) -> None:
        await text_to_speech("Backed up.", **say)
        await text_to_speech("Backed up, without a run id.", model="tts-1", **say)
        shutil.copytree(say["save_to"], tmp_path / "backup")
        (tmp_path / "link").symlink_to(say["save_to"])

        jobs = await jobs_in(say["save_to"], tmp_path / "backup", tmp_path / "link")

        assert sorted((job.folder, job.tries) for job in jobs) == [
            *[(say["save_to"], 1)] * 2,
            *[(str(tmp_path / "backup"), 0)] * 2,
        ]

    async def test_a_job_that_is_saved_while_it_is_read_is_told_as_saved(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sandbox.on_status(None, [PENDING])
        await text_to_speech("In between.", **say, **SOON, return_state=True)
        [answer] = notes(say["save_to"], "answer")
        ticket = answer.read_bytes()
        await text_to_speech("In between.", **say)
        [saved] = notes(say["save_to"], "saved")
        end = saved.read_bytes()
        saved.unlink()
        answer.write_bytes(ticket)
        read = Destination.read

        def too_late(self: Destination, name: str) -> bytes | None:
            if name == answer.name:
                saved.write_bytes(end)
                answer.unlink()
            return read(self, name)

        monkeypatch.setattr(Destination, "read", too_late)

        job = await job_in(say["save_to"])

        assert (job.outcome, job.cost) == ("saved", sandbox.ledger.charged_total)
        assert job.detail == f"{job.run_id}.mp3"

    async def test_each_note_is_read_once(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lines = [{"id": f"line-{number}", "text": f"Line {number}."} for number in range(5)]
        await text_to_speech_batch(lines, **say)
        reads: Counter[str] = Counter()
        read = Destination.read

        def counted(self: Destination, name: str) -> bytes | None:
            reads[name] += 1
            return read(self, name)

        monkeypatch.setattr(Destination, "read", counted)

        assert len(await jobs_in(say["save_to"])) == 5
        assert reads == Counter(note.name for note in notes(say["save_to"]))
        assert len(reads) == 10


class TestTotals:
    async def test_they_agree_with_the_provider_to_the_last_digit(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        lines = [{"id": f"line-{number}", "text": "x" * (number + 1)} for number in range(7)]
        await text_to_speech_batch([*lines, {"id": "equal", "text": "x"}], **say)
        for _ in range(2):
            await text_to_speech("[sandbox:fail] Charged twice.", **say, return_state=True)
        await text_to_speech("[sandbox:reject] Refused.", **say, return_state=True)
        await text_to_speech("At once.", model="Kokoro-82m", voice="af_bella", **say)

        jobs = await jobs_in(say["save_to"])

        charges = sandbox.ledger.charges
        by_model: Counter[str] = Counter()
        for charge in charges:
            by_model[charge.model] += charge.amount  # type: ignore[assignment]
        days = {datetime.fromtimestamp(charge.at, UTC).strftime("%Y-%m-%d") for charge in charges}
        assert total(jobs) == {"": {"USD": sandbox.ledger.charged_total}}
        assert total(jobs, "model") == {model: {"USD": amount} for model, amount in by_model.items()}
        assert total(jobs, "day").keys() == days
        assert sum(costs["USD"] for costs in total(jobs, "day").values()) == sandbox.ledger.charged_total
        of_runs = [each for each in totals_of(jobs) if each.by == "flow_run"]
        assert len({each.flow_run_id for each in of_runs}) == 5
        assert sum(each.costs["USD"] for each in of_runs) == sandbox.ledger.charged_total

    async def test_what_nobody_has_said_is_counted_apart_and_is_no_zero(
        self, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path
    ) -> None:
        for number in range(3):
            await text_to_speech(f"Bytes {number}.", model="tts-1", **say)
        await text_to_speech("With a ticket.", **say)

        jobs = await jobs_in(say["save_to"])

        assert {(job.model, job.cost) for job in jobs} == {("tts-1", None), (MODEL, sandbox.ledger.charges[-1].amount)}
        [all_of_it] = [each for each in totals_of(jobs) if each.by == "all"]
        assert (all_of_it.jobs, all_of_it.unknown) == (4, 3)
        assert all_of_it.costs == {"USD": sandbox.ledger.charges[-1].amount}
        shown = run("ledger", say["save_to"], cwd=tmp_path).stdout
        [line] = [
            line for line in shown.splitlines() if "tts-1" in line and "flow" not in line and "tts-tts" not in line
        ]
        assert line.split() == ["tts-1", "unknown", "3", "3"]
        assert "Refunds are not known" in shown

    async def test_currencies_are_added_by_themselves_and_exactly(self, sandbox: Sandbox, save_to: str) -> None:
        here = Ledger(Destination(save_to))
        tiny, large = Decimal("0.000000000000000000000000000001"), Decimal("123456789.1")
        for number, (cost, currency) in enumerate([(tiny, "XNO"), (large, "XNO"), (large, None), (large, "USD")]):
            ticket = Ticket(run_id=f"run-{number}", model=MODEL, cost=cost, payment_source=currency)
            here.note_ticket(Job(sandbox.base_url, ticket=ticket), ticket)

        jobs = await jobs_in(save_to)

        [costs] = total(jobs).values()
        assert costs == {"XNO": Decimal("123456789.100000000000000000000000000001"), "USD": Decimal("246913578.2")}
        told = json.loads(next(each for each in totals_of(jobs) if each.by == "all").model_dump_json())
        assert told["costs"]["XNO"] == "123456789.100000000000000000000000000001"

    async def test_a_sandbox_is_told_apart_from_the_provider(
        self, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path
    ) -> None:
        await text_to_speech("The provider's.", **say)
        for note in notes(say["save_to"]):
            note.write_text(note.read_text().replace(sandbox.base_url, DEFAULT_BASE_URL))
        await text_to_speech("A sandbox's.", **say)

        totals = [each for each in totals_of(await jobs_in(say["save_to"])) if each.by == "all"]

        real, play = (charge.amount for charge in sandbox.ledger.charges)
        assert {each.provider: each.costs for each in totals} == {
            DEFAULT_BASE_URL: {"USD": real},
            sandbox.base_url: {"USD": play},
        }
        shown = run("ledger", say["save_to"], "--all", cwd=tmp_path).stdout
        assert f"at {sandbox.base_url}" in shown
        assert f"At {sandbox.base_url}:" in shown
        assert DEFAULT_BASE_URL not in shown


class TestDamage:
    @pytest.mark.parametrize(
        ("state", "outcome", "unpriced"),
        [("saved", "unreadable", 1), ("sent", "saved", 0), ("answer", "uncertain", 1), ("over", "refused", 0)],
    )
    async def test_a_torn_note_is_said_and_hides_no_other(
        self, state: str, outcome: str, unpriced: int, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path
    ) -> None:
        await text_to_speech("Sound.", **say)
        sound = set(notes(say["save_to"]))
        if state == "answer":
            sandbox.on_status(None, [PENDING])
        text = "[sandbox:reject] Torn." if state == "over" else "Torn."
        await text_to_speech(text, **say, **(SOON if state == "answer" else {}), return_state=True)
        [note] = [note for note in notes(say["save_to"], state) if note not in sound]
        note.write_bytes(TORN)

        done = run("ledger", say["save_to"], "--json", cwd=tmp_path)

        assert done.returncode == (1 if outcome == "unreadable" else 0)
        jobs = [BoughtJob.model_validate(job) for job in json.loads(done.stdout)["jobs"]]
        [torn] = [job for job in jobs if job.text != "Sound."]
        assert (torn.outcome, torn.tries, torn.unpriced) == (outcome, 1, unpriced)
        assert f"Damaged notes: {note.name.removesuffix('.json')}." in torn.detail
        assert [job.cost for job in jobs if job.text == "Sound."] == [sandbox.ledger.charges[0].amount]

    async def test_a_job_with_nothing_but_a_torn_note_is_uncertain(self, save_to: str) -> None:
        Path(save_to, FOLDER).mkdir(parents=True)
        Path(save_to, FOLDER, f"{'a' * 32}.1.sent.json").write_bytes(TORN)

        job = await job_in(save_to)

        assert (job.outcome, job.cost, job.unpriced, job.at, job.provider) == ("uncertain", None, 1, None, None)

    @pytest.mark.parametrize(
        "edited",
        [
            {"run": 5, "text": {"a": 1}, "provider": []},
            {"ticket": "a text", "audio": 7},
            {"at": "0001-01-01T00:00:00+14:00", "is_part": "yes"},
            {"ticket": {"runId": "../x", "cost": "NaN"}},
            {"audio": {"cost": "much"}, "save_to": 5, "name": None},
        ],
    )
    async def test_an_edited_note_stops_nothing(
        self, edited: dict[str, Any], sandbox: Sandbox, say: dict[str, Any]
    ) -> None:
        await text_to_speech("Sound.", **say)
        sound = set(notes(say["save_to"]))
        await text_to_speech("Edited.", **say)
        for note in set(notes(say["save_to"])) - sound:
            note.write_text(json.dumps({**of_note(note), **edited}))

        jobs = await jobs_in(say["save_to"])

        assert [job.outcome for job in jobs] == ["saved", "saved"]
        assert [job.cost for job in jobs if job.text == "Sound."] == [sandbox.ledger.charges[0].amount]
        totals_of(jobs)

    async def test_a_note_that_cannot_be_read_is_no_torn_one(
        self, sandbox: Sandbox, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await text_to_speech("Readable.", **say)
        [readable] = notes(say["save_to"], "saved")
        await text_to_speech("Not readable.", **say)
        read = Path.read_bytes

        def refused(self: Path) -> bytes:
            if ".saved-" in self.name and self != readable:
                raise PermissionError(13, "Permission denied")
            return read(self)

        monkeypatch.setattr(Path, "read_bytes", refused)

        statement = await statement_of([say["save_to"]])

        assert statement.problems == [f"Jobs that cannot be read in {say['save_to']}: 1."]
        assert {job.outcome: (job.cost, job.unpriced) for job in statement.jobs} == {
            "saved": (sandbox.ledger.charges[0].amount, 0),
            "unreadable": (None, 1),
        }


class TestPlaces:
    async def test_a_ledger_that_is_not_there_and_one_that_cannot_be_read_are_said_apart(
        self, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path
    ) -> None:
        await text_to_speech("Here.", **say)
        (tmp_path / "closed").mkdir()
        (tmp_path / "closed" / FOLDER).write_text("No folder at all.")

        done = run("ledger", "nowhere", "closed", say["save_to"], "--csv", cwd=tmp_path)

        assert done.returncode == 1
        absent, closed = done.stderr.splitlines()
        assert absent == f"There is no ledger in {tmp_path}/nowhere."
        assert closed.startswith("The ledger of closed cannot be read: ")
        assert [job["text"] for job in csv.DictReader(io.StringIO(done.stdout))] == ["Here."]
        assert not (tmp_path / "nowhere").exists()

    def test_it_is_audio_by_default_and_needs_neither_key_nor_server(self, tmp_path: Path) -> None:
        done = run("ledger", cwd=tmp_path, server=False, PREFECT_HOME=str(tmp_path / "prefect"), PREFECT_API_URL="")
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"There is no ledger in {tmp_path}/audio.\n"

    def test_a_server_that_is_down_is_said_and_stops_nothing(self, save_to: str, tmp_path: Path) -> None:
        Ledger(Destination(save_to)).identity(create=True)
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{unused.getsockname()[1]}/api"
            done = run("ledger", save_to, cwd=tmp_path, server=False, PREFECT_API_URL=url)
        assert (done.returncode, done.stdout) == (0, "Nothing was bought.\n")
        assert "Whether the credentials name a ledger is not known" in done.stderr

    async def test_the_place_that_is_set_for_all_ledgers_is_read_too(
        self, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        of_block = say["credentials"].model_copy(update={"ledger": str(tmp_path / "of the block")})
        await text_to_speech("Of the block.", **{**say, "credentials": of_block})
        await text_to_speech("Beside.", **say)
        monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path / "set"))
        await text_to_speech("Set.", **say)

        done = run("ledger", "--json", cwd=tmp_path, NANOGPT_LEDGER=str(tmp_path / "set"))
        assert (done.returncode, done.stderr) == (0, "")
        assert {job["text"] for job in json.loads(done.stdout)["jobs"]} == {"Set.", "Beside."}
        jobs = await read_ledger(say["save_to"], of_block)
        assert {job.text: job.folder for job in jobs} == {"Of the block.": say["save_to"], "Beside.": say["save_to"]}
        done = run("ledger", cwd=tmp_path, NANOGPT_LEDGER=str(tmp_path / "nowhere"))
        assert (done.returncode, done.stderr) == (1, f"There is no ledger in {tmp_path}/nowhere.\n")

    async def test_a_ledger_in_a_bucket_is_read_as_one_beside_files(
        self, sandbox: Sandbox, say: dict[str, Any], s3_env: S3Server
    ) -> None:
        bucket = "s3://speech/episodes"
        await one_of_each(sandbox, {**say, "save_to": bucket})

        statement = await statement_of([bucket, "s3://speech/nothing", "s3://private/speech"])

        assert {job.outcome for job in statement.jobs} == {*TO_DO, "saved"}
        assert {job.folder for job in statement.jobs} == {bucket}
        absent, refused = statement.problems
        assert absent == "There is no ledger in s3://speech/nothing."
        assert refused.startswith("The ledger of s3://private/speech cannot be read: ")

    def test_a_login_in_a_url_is_not_shown(self, tmp_path: Path) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            place = f"127.0.0.1:{unused.getsockname()[1]}/speech"
            done = run("ledger", f"ftp://speaker:sesame@{place}", "--json", cwd=tmp_path)
        assert done.returncode == 1
        assert f"ftp://{place}" in done.stderr
        assert json.loads(done.stdout)["jobs"] == []
        assert "sesame" not in done.stdout + done.stderr
        assert "speaker" not in done.stdout + done.stderr


class TestWriting:
    async def test_json_and_csv_say_the_same_and_read_back(
        self, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path
    ) -> None:
        await one_of_each(sandbox, say)
        statement = await statement_of([say["save_to"]])

        told = json.loads(run("ledger", say["save_to"], "--json", cwd=tmp_path).stdout)
        table = list(csv.DictReader(io.StringIO(run("ledger", say["save_to"], "--csv", cwd=tmp_path).stdout)))

        assert Statement.model_validate({name: told[name] for name in ("jobs", "problems")}) == statement
        assert [Total.model_validate(each) for each in told["totals"]] == totals_of(statement.jobs)
        assert all(isinstance(job["cost"], str | None) for job in told["jobs"])
        assert "not known" in told["refunds"]
        assert tuple(table[0]) == COLUMNS
        assert [row["job"] for row in table] == [job.job for job in statement.jobs]
        costs = [Decimal(row["cost"]) for row in table if row["cost"]]
        assert sum(costs) == sum(job.cost for job in statement.jobs if job.cost is not None)
        assert [row["cost"] for row in table if row["outcome"] == "uncertain"] == [""]

    async def test_no_text_is_a_formula_nor_a_command_to_the_terminal(
        self, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path
    ) -> None:
        for sign in "=+-@":
            text = f"{sign}1+1\x1b[31m\x07\r\n\u202eevil"
            await submit_tts(TTSRequest(text=text), say["save_to"], say["credentials"])

        for form in ("--csv", "--json", "--all"):
            shown = run("ledger", say["save_to"], form, cwd=tmp_path).stdout
            assert not {"\x1b", "\x07", "\r", "\u202e"} & set(shown)
            for sign in "=+-@":
                assert f"{sign}1+1 evil" in shown
            if form == "--csv":
                texts = [row["text"] for row in csv.DictReader(io.StringIO(shown))]
                assert sorted(texts) == [f"'{sign}1+1 evil" for sign in "+-=@"]

    async def test_a_terminal_of_80_columns_shows_all_of_it(
        self, sandbox: Sandbox, say: dict[str, Any], tmp_path: Path
    ) -> None:
        wide = "世界" * 60
        ticket = await submit_tts(
            TTSRequest(text=f"{wide} [bold]markup[/bold] :smile:"), say["save_to"], say["credentials"]
        )
        assert isinstance(ticket, Ticket)
        await one_of_each(sandbox, say)

        shown = run("ledger", say["save_to"], "--all", cwd=tmp_path, COLUMNS="80").stdout

        assert max(cell_len(line) for line in shown.splitlines()) <= 80
        assert "".join(character for character in shown if character in wide) == wide
        assert "[bold]markup[/bold]" in shown
        assert ":smile:" in shown
        assert ticket.run_id in shown

    def test_two_forms_at_once_are_bad_usage(self, tmp_path: Path) -> None:
        done = run("ledger", "--json", "--csv", cwd=tmp_path)
        assert (done.returncode, done.stdout) == (2, "")


class TestInFlows:
    async def test_a_flow_reads_what_was_bought(self, sandbox: Sandbox, say: dict[str, Any]) -> None:
        await text_to_speech("Read in a flow.", **say)

        @flow
        async def costs() -> list[BoughtJob]:
            return await read_ledger([say["save_to"]])

        [job] = await costs()
        assert (job.text, job.cost) == ("Read in a flow.", sandbox.ledger.charged_total)

    async def test_a_ledger_that_is_not_there_fails_the_task(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="There is no ledger in"):
            await read_ledger(tmp_path / "nowhere")

    async def test_the_table_of_the_collector_has_the_same_columns(
        self, sandbox: Sandbox, say: dict[str, Any], credentials: NanoGPTCredentials
    ) -> None:
        sandbox.on_status(None, [PENDING])
        await text_to_speech("Collected.", **say, **SOON, return_state=True)

        state = await collect_open_tickets(credentials, return_state=True)

        async with get_client() as client:
            [table] = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key={"any_": ["tts-open-tickets"]}),
                flow_run_filter=FlowRunFilter(id={"any_": [state.state_details.flow_run_id]}),
            )
        [row] = [row for row in json.loads(str(table.data)) if row["run_id"] == sandbox.ledger.charges[0].run_id]
        assert list(row) == [name for name in COLUMNS if name in row]
        assert row == {
            "outcome": "saved",
            "cost": f"{sandbox.ledger.charged_total:f}",
            "currency": "USD",
            "model": MODEL,
            "text": "Collected.",
            "run_id": sandbox.ledger.charges[0].run_id,
            "flow_run": f"tts-{MODEL}-Collected.",
            "detail": f"{say['save_to']}/{row['run_id']}.mp3",
        }
