"""The ledger at its edges: many at once, stores with ways of their own, torn notes, senders that are gone."""

import asyncio
import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import StorageError, SubmissionUncertain
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.ledger import SILENCE_SECONDS
from prefect_nanogpt.models import Ticket, TTSRequest
from prefect_nanogpt.sandbox import Accept, Hang, Sandbox
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import submit_tts
from tests.claiming import NOTE, TEXT
from tests.conftest import API_KEY, eventually, start
from tests.s3_server import S3Server, s3, s3_env
from tests.sftp_server import SFTPServer, sftp

__all__ = ["s3", "s3_env", "sftp"]

BUCKET = "s3://speech/episodes"
REQUEST = TTSRequest(text=TEXT)
MANY = 16
CANNOT_CLAIM = "cannot create a file for one of several writers only"
WAITING = "Another run is submitting the same text"

Submit = Callable[..., Any]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, save_to: str) -> str:
    """A folder that many processes share."""
    if request.param == "local":
        return save_to
    request.getfixturevalue("s3_env")
    return BUCKET


@pytest.fixture
def submit(sandbox: Sandbox, credentials: NanoGPTCredentials) -> Submit:
    async def submit(save_to: str, **options: Any) -> Ticket:
        ticket = await submit_tts(REQUEST, save_to, credentials, **options)
        assert isinstance(ticket, Ticket)
        return ticket

    return submit


def at_once(how: str, save_to: str, **environment: str) -> list[Any]:
    """Do one thing in many processes at the same moment, and give what each of them got."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.claiming", how, save_to, str(MANY)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "NANOGPT_API_KEY": API_KEY, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    assert len(got) == MANY
    return list(got)


def submissions(sandbox: Sandbox) -> int:
    return len(sandbox.requests("submit"))


# Many at once


def one_of(got: list[Any]) -> None:
    [winner] = [process for process in got if process["won"]]
    assert {process["found"] for process in got} == {winner["own"]}


def test_of_many_processes_one_claims_and_the_others_find_its_note(place: str) -> None:
    one_of(at_once("claim", place))


def test_of_many_processes_one_claims_where_there_are_no_hard_links(save_to: str) -> None:
    one_of(at_once("claim-without-links", save_to))


def test_of_many_threads_one_claims_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    look = MemoryFileSystem.exists

    def look_then_dawdle(self: MemoryFileSystem, path: str, **options: Any) -> bool:
        there = look(self, path, **options)
        time.sleep(0.01)
        return bool(there)

    monkeypatch.setattr(MemoryFileSystem, "exists", look_then_dawdle)
    folder = Destination("memory://many").folder(".nanogpt")
    assert folder.claims_exclusively
    gate = threading.Barrier(MANY)
    won: list[str] = []

    def claim(own: str) -> None:
        gate.wait()
        if folder.create(NOTE, own.encode()):
            won.append(own)

    threads = [threading.Thread(target=claim, args=(str(number),)) for number in range(MANY)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [name.encode() for name in won] == [folder.read(NOTE)]
    MemoryFileSystem.store.clear()


def test_many_processes_that_submit_one_text_pay_once_and_all_get_its_ticket(place: str, sandbox: Sandbox) -> None:
    sandbox.on_submit([Accept(delay=1.0)])
    run_ids = at_once("submit", place, NANOGPT_BASE_URL=sandbox.base_url)
    assert [charge.run_id for charge in sandbox.ledger.charges] == list(set(run_ids))
    assert submissions(sandbox) == 1


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS])
async def test_many_in_one_process_pay_once_where_there_are_no_hard_links(
    number: int, save_to: str, sandbox: Sandbox, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    tickets = await asyncio.gather(*(submit(save_to) for _ in range(MANY)))
    assert [charge.run_id for charge in sandbox.ledger.charges] == list({ticket.run_id for ticket in tickets})


# Conditional writes


def sent(server: S3Server) -> list[int]:
    """How the writes of `sent` notes ended."""
    return [status for name, status in server.creations if ".sent." in name]


async def test_who_finds_its_own_claim_after_a_lost_answer_has_won(
    sandbox: Sandbox, s3_env: S3Server, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    s3_env.faults = [(".sent.", "lost")]
    ticket = await submit(BUCKET)
    assert sent(s3_env) == [200, 412]
    assert [charge.run_id for charge in sandbox.ledger.charges] == [ticket.run_id]


async def test_nothing_is_sent_while_nobody_knows_whether_the_claim_is_there(
    sandbox: Sandbox, s3_env: S3Server, submit: Submit
) -> None:
    s3_env.faults = [(".sent.", "blind")]
    with pytest.raises(StorageError):
        await submit(BUCKET)
    assert (sent(s3_env)[0], submissions(sandbox)) == (200, 0)
    s3_env.fail_reads = False
    ticket = await submit(BUCKET)
    assert [charge.run_id for charge in sandbox.ledger.charges] == [ticket.run_id]


@pytest.mark.parametrize("status", [409, 503])
async def test_a_conflict_says_try_again_and_not_somebody_has_it(
    status: int, sandbox: Sandbox, s3_env: S3Server, submit: Submit
) -> None:
    s3_env.faults = [(".sent.", status)]
    await submit(BUCKET)
    assert sent(s3_env) == [status, 200]
    assert len(sandbox.ledger.charges) == 1


def test_after_a_conflict_another_may_be_found_to_have_won(s3_env: S3Server) -> None:
    folder = Destination(BUCKET).folder(".nanogpt")
    assert folder.create(NOTE, b"theirs")
    s3_env.faults = [(NOTE, 409)]
    assert not folder.create(NOTE, b"mine")
    assert folder.read(NOTE) == b"theirs"


@pytest.mark.parametrize("status", [409, 503])
@pytest.mark.parametrize("ignores", [False, True])
def test_a_probe_that_is_disturbed_tells_the_truth_all_the_same(ignores: bool, status: int, s3_env: S3Server) -> None:
    s3_env.ignore_conditions = ignores
    s3_env.faults = [("probe", status), ("probe", status)]
    assert Destination(BUCKET).folder(".nanogpt").claims_exclusively is not ignores


async def test_a_store_that_does_not_say_which_condition_failed_is_a_store_that_claims(
    sandbox: Sandbox, s3_env: S3Server, submit: Submit, caplog: pytest.LogCaptureFixture
) -> None:
    s3_env.name_conditions = False
    first, second = await submit(f"{BUCKET}/elsewhere"), await submit(f"{BUCKET}/elsewhere")
    assert (first, len(sandbox.ledger.charges)) == (second, 1)
    assert CANNOT_CLAIM not in caplog.text
    assert Destination(f"{BUCKET}/elsewhere").folder(".nanogpt").claims_exclusively


@pytest.mark.parametrize("refuses", [False, True])
async def test_a_store_without_the_condition_is_found_out_named_once_and_still_a_ledger(
    refuses: bool, sandbox: Sandbox, s3_env: S3Server, submit: Submit, caplog: pytest.LogCaptureFixture
) -> None:
    s3_env.ignore_conditions = not refuses
    s3_env.faults = [("", 501)] * 100 if refuses else []
    save_to = f"{BUCKET}/{'refused' if refuses else 'ignored'}"
    first, second = await submit(save_to), await submit(save_to)
    assert (first, len(sandbox.ledger.charges)) == (second, 1)
    assert caplog.text.count(CANNOT_CLAIM) == 1
    assert [name for name, _ in s3_env.creations if "probe" not in name] == []
    folder = Destination(save_to).folder(".nanogpt")
    assert folder.create(NOTE, b"theirs")
    assert not folder.create(NOTE, b"mine")


async def test_a_probe_that_cannot_be_made_takes_no_warning_away(
    sandbox: Sandbox, s3_env: S3Server, submit: Submit, caplog: pytest.LogCaptureFixture
) -> None:
    s3_env.ignore_conditions = True
    s3_env.faults = [("probe", 503)] * 5
    await submit(f"{BUCKET}/at-first-out-of-reach")
    assert caplog.text.count(CANNOT_CLAIM) == 1


# A file system that cannot claim


async def test_a_folder_behind_sftp_says_once_that_it_cannot_claim_and_keeps_all_else(
    sandbox: Sandbox,
    sftp: SFTPServer,
    credentials: NanoGPTCredentials,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_to = f"{sftp.url}/audio"
    first = await text_to_speech(TEXT, save_to=save_to, credentials=credentials)
    again = await text_to_speech(TEXT, save_to=save_to, credentials=credentials)
    assert caplog.text.count(CANNOT_CLAIM) == 1
    assert first.ticket is not None
    assert first.location == again.location == f"{save_to}/{first.ticket.run_id}.mp3"
    here = tmp_path / "sftp" / "audio" / f"{first.ticket.run_id}.mp3"
    assert here.read_bytes() == sandbox.audio_bytes(first.ticket.run_id)
    assert submissions(sandbox) == len(sandbox.requests("audio")) == 1


async def test_behind_sftp_the_many_of_one_process_pay_once(sandbox: Sandbox, sftp: SFTPServer, submit: Submit) -> None:
    tickets = await asyncio.gather(*(submit(f"{sftp.url}/many") for _ in range(MANY)))
    assert [charge.run_id for charge in sandbox.ledger.charges] == list({ticket.run_id for ticket in tickets})


async def test_behind_sftp_what_a_dead_process_has_sent_is_uncertain(
    sandbox: Sandbox, sftp: SFTPServer, submit: Submit
) -> None:
    sandbox.on_submit([Accept(then=Hang(600))])
    process = start("tests.claiming", "submit", f"{sftp.url}/dead", "1", sandbox=sandbox)
    await asyncio.to_thread(sandbox.wait_for_request, "submit", 1, 60)
    process.kill()
    process.wait()
    with pytest.raises(SubmissionUncertain):
        await submit(f"{sftp.url}/dead")
    assert submissions(sandbox) == 1


async def test_a_login_that_is_refused_is_a_storage_that_cannot_be_used(
    sandbox: Sandbox, sftp: SFTPServer, submit: Submit
) -> None:
    with pytest.raises(StorageError, match="cannot be used"):
        await submit("sftp://somebody:else@127.0.0.1:" + str(sftp.options["port"]))
    assert submissions(sandbox) == 0


# Notes that are torn, and senders


Notes = dict[str, bytes]


@pytest.fixture
async def notes(sandbox: Sandbox, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Notes:
    """The notes of a job that was submitted, as they lie in another folder than the test's."""
    monkeypatch.setattr("prefect_nanogpt.ledger.TORN_SECONDS", 0.01)
    await submit(str(tmp_path / "model"))
    return {file.name: file.read_bytes() for file in (tmp_path / "model" / ".nanogpt").iterdir()}


def put(save_to: str, notes: Notes, state: str, content: bytes | None = None) -> None:
    """Put a note of this state into the ledger of a folder."""
    [name] = [name for name in notes if f".{state}." in name]
    file = Path(save_to) / ".nanogpt" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(notes[name] if content is None else content)


def sent_by(notes: Notes, seconds_ago: float, **sender: Any) -> bytes:
    """Write the note of a submission by another sender, so long ago."""
    [content] = [notes[name] for name in notes if ".sent." in name]
    note = json.loads(content)
    at = datetime.now(UTC) - timedelta(seconds=seconds_ago)
    note |= {"token": "another", "at": at.isoformat(), "sender": note["sender"] | sender}
    return json.dumps(note).encode()


TORN = [b"", b'{"token": "07', b"\xff\xfe\x00\x01", bytes(4096), b"[]", b"null", b"{}"]


@pytest.mark.parametrize("torn", TORN)
async def test_a_torn_note_of_a_submission_is_one_of_unknown_outcome(
    torn: bytes, notes: Notes, save_to: str, sandbox: Sandbox, submit: Submit
) -> None:
    put(save_to, notes, "sent", torn)
    for _ in range(2):
        with pytest.raises(SubmissionUncertain):
            await submit(save_to)
    assert submissions(sandbox) == 1
    await submit(save_to, resubmit=["uncertain"])
    assert submissions(sandbox) == 2


@pytest.mark.parametrize("torn", TORN)
async def test_a_torn_note_of_an_answer_is_not_paid_for_anew(
    torn: bytes, notes: Notes, save_to: str, sandbox: Sandbox, submit: Submit
) -> None:
    put(save_to, notes, "sent")
    put(save_to, notes, "answer", torn)
    with pytest.raises(SubmissionUncertain):
        await submit(save_to)
    assert submissions(sandbox) == 1


async def test_what_a_process_has_sent_that_was_killed_is_uncertain_at_once(
    save_to: str, sandbox: Sandbox, submit: Submit
) -> None:
    sandbox.on_submit([Accept(then=Hang(600))])
    process = start("tests.claiming", "submit", save_to, "1", sandbox=sandbox)
    await asyncio.to_thread(sandbox.wait_for_request, "submit", 1, 60)
    process.kill()
    process.wait()
    with pytest.raises(SubmissionUncertain):
        await submit(save_to)
    assert len(sandbox.ledger.charges) == 1


async def test_what_a_living_process_has_sent_is_waited_for(
    save_to: str, sandbox: Sandbox, submit: Submit, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox.on_submit([Accept(delay=3.0)])
    process = start("tests.claiming", "submit", save_to, "1", sandbox=sandbox)
    await asyncio.to_thread(sandbox.wait_for_request, "submit", 1, 60)
    ticket = await submit(save_to)
    assert WAITING in caplog.text
    assert [charge.run_id for charge in sandbox.ledger.charges] == [ticket.run_id]
    assert process.wait(60) == 0


async def test_what_another_machine_has_just_sent_is_waited_for(
    notes: Notes, save_to: str, sandbox: Sandbox, submit: Submit, caplog: pytest.LogCaptureFixture
) -> None:
    put(save_to, notes, "sent", sent_by(notes, SILENCE_SECONDS - 60, machine="another"))
    submitting = asyncio.ensure_future(submit(save_to))

    async def waits() -> bool | None:
        return WAITING in caplog.text or None

    await eventually(waits)
    put(save_to, notes, "answer")
    assert (await submitting).run_id == sandbox.ledger.charges[0].run_id
    assert submissions(sandbox) == 1


@pytest.mark.parametrize(
    ("seconds_ago", "sender"),
    [
        (SILENCE_SECONDS + 1, {"machine": "another"}),
        (SILENCE_SECONDS + 1, {"pid": os.getppid()}),
        (0, {"pid": os.getppid(), "started": "1"}),
        (0, {}),
    ],
    ids=["another machine, long ago", "a process that may live, long ago", "another process of its number", "itself"],
)
async def test_what_was_sent_by_who_will_not_answer_is_uncertain(
    seconds_ago: float, sender: dict[str, Any], notes: Notes, save_to: str, sandbox: Sandbox, submit: Submit
) -> None:
    put(save_to, notes, "sent", sent_by(notes, seconds_ago, **sender))
    with pytest.raises(SubmissionUncertain):
        await submit(save_to)
    assert submissions(sandbox) == 1


async def test_an_answer_that_is_noted_after_the_notes_were_listed_is_found(
    notes: Notes, save_to: str, sandbox: Sandbox, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(save_to, notes, "sent")
    put(save_to, notes, "answer")
    look, listings = Destination.list_files, []

    def look_before_the_answer(self: Destination, prefix: str = "") -> dict[str, int]:
        listings.append(look(self, prefix))
        is_first = len(listings) == 1
        return {name: size for name, size in listings[-1].items() if not (is_first and ".answer." in name)}

    monkeypatch.setattr(Destination, "list_files", look_before_the_answer)
    assert (await submit(save_to)).run_id == sandbox.ledger.charges[0].run_id
    assert len(listings) > 1
    assert submissions(sandbox) == 1


# Reads that fail


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("calls", [(os, "scandir", "listdir"), (Path, "read_bytes")], ids=["listed", "read"])
async def test_a_folder_that_cannot_be_read_is_not_an_empty_one(
    calls: tuple[Any, ...], number: int, save_to: str, sandbox: Sandbox, submit: Submit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def fail(path: Any, *arguments: Any) -> Any:
            if ".nanogpt" in os.fspath(path):
                raise OSError(number, os.strerror(number), str(path))
            return call(path, *arguments)

        return fail

    ticket = await submit(save_to)
    owner, *names = calls
    with monkeypatch.context() as broken:
        for name in names:
            broken.setattr(owner, name, failing(getattr(owner, name)))
        with pytest.raises(StorageError, match="cannot be used"):
            await submit(save_to)
    assert await submit(save_to) == ticket
    assert submissions(sandbox) == 1


async def test_a_bucket_that_cannot_be_read_is_not_an_empty_one(
    sandbox: Sandbox, s3_env: S3Server, submit: Submit
) -> None:
    ticket = await submit(BUCKET)
    s3_env.fail_reads = True
    with pytest.raises(StorageError, match=BUCKET):
        await submit(BUCKET)
    s3_env.fail_reads = False
    assert await submit(BUCKET) == ticket
    assert submissions(sandbox) == 1
