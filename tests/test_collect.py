"""Jobs that are paid for and that no run has seen to their end are settled once, whatever has become of the run."""

import hashlib
import json
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.client.schemas.objects import StateType
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Crashed, Pending, Running
from pydantic import SecretStr

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.flows import collect_open_tickets, text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.flows.collect import CollectedTicket
from prefect_nanogpt.ledger import FOLDER
from prefect_nanogpt.models import PollSchedule, Ticket, TTSRequest
from prefect_nanogpt.sandbox import Accept, Answer, Cut, Sandbox
from prefect_nanogpt.tasks import submit_tts
from prefect_nanogpt.tasks.ledgers import LABEL
from tests.conftest import files_in

PENDING = {"status": "pending"}
STATES = {
    "crashed": Crashed(),
    "cancelled": Cancelled(),
    "running": Running(),
    "awaiting": AwaitingRetry(),
    "scheduled": Pending(),
    "cancelling": Cancelling(),
}


@pytest.fixture
def given_up(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    """What a run is started with that looks once at its job: no look is as short as this wait."""
    return {"credentials": credentials, "save_to": save_to, "poll": quick, "timeout_seconds": 1e-6}


async def test_every_open_ticket_is_settled_once_and_the_rest_is_left_alone(
    sandbox: Sandbox, credentials: NanoGPTCredentials, given_up: dict[str, Any]
) -> None:
    texts = {
        "timed out": "Done meanwhile.",
        "no audio": "Its audio could not be fetched.",
        "refused": "[sandbox:reject] Refused meanwhile.",
        "failed": "[sandbox:fail] Failed meanwhile.",
        "forgotten": "The provider does not know it any more.",
        "slow": "[sandbox:stuck] Still under way.",
        "finished": "Finished.",
        "rejected": "[sandbox:reject] Rejected.",
        **{name: f"Its run is {name}." for name in STATES},
    }
    jobs = {name: sandbox.add_job(text=text) for name, text in texts.items()}
    for name, ticket in jobs.items():
        if name == "no audio":
            sandbox.on_audio(ticket["runId"], [Answer(404)] * 4)
        elif name not in {"finished", "rejected"}:
            sandbox.on_status(ticket["runId"], [PENDING])
        run = wait_for_tts.with_options(flow_run_name=f"collect: {name}")
        state = await run(ticket, **given_up, return_state=True)
        assert state.is_completed() == (name == "finished")
        if name in STATES:
            async with get_client() as client:
                await client.set_flow_run_state(state.state_details.flow_run_id, STATES[name], force=True)
    sandbox.on_status(jobs["forgotten"]["runId"], [Answer(404)] * 4)
    asked = len(_looks_at(jobs, sandbox))

    first = await collect_open_tickets(credentials)
    mine = {row.flow_runs[0].removeprefix("collect: "): row for row in first if row.run_id in _ids(jobs)}

    saved = {"timed out", "no audio", *STATES}
    assert {name: row.outcome for name, row in mine.items()} == {
        **dict.fromkeys(saved, "saved"),
        "refused": "rejected",
        "failed": "rejected",
        "forgotten": "lost",
        "slow": "pending",
    }
    assert "CONTENT_POLICY_VIOLATION" in mine["refused"].detail
    for name in saved:
        assert Path(mine[name].detail).read_bytes() == sandbox.audio_bytes(jobs[name]["runId"])
    assert len(_looks_at(jobs, sandbox)) - asked == len(mine) + 3  # one of them was asked about four times
    assert len(sandbox.ledger.refunds) == 2

    second = await collect_open_tickets(credentials)
    assert {row.flow_runs[0]: row.outcome for row in second if row.run_id in _ids(jobs)} == {
        "collect: slow": "pending",
        "collect: forgotten": "saved",  # a lost job is asked for again
    }
    assert sandbox.requests("submit") == []


def _looks_at(jobs: dict[str, dict[str, str]], sandbox: Sandbox) -> list[str | None]:
    """List the status calls about these jobs; other tests on the same server may have left open jobs of theirs."""
    return [request.run_id for request in sandbox.requests("status") if request.run_id in _ids(jobs)]


def _ids(jobs: dict[str, dict[str, str]]) -> set[str]:
    return {ticket["runId"] for ticket in jobs.values()}


def rows_of(rows: Sequence[CollectedTicket], sandbox: Sandbox) -> list[CollectedTicket]:
    """Pick the rows about jobs that this sandbox was paid for, in the order of their charges."""
    ids = [charge.run_id for charge in sandbox.ledger.charges]
    return sorted((row for row in rows if row.run_id in ids), key=lambda row: ids.index(str(row.run_id)))


async def test_the_report_of_a_collected_run_tells_where_the_audio_is(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, given_up: dict[str, Any]
) -> None:
    sandbox.on_status(None, [PENDING])
    state = await text_to_speech("A text worth keeping.", **given_up, return_state=True)
    assert state.name == "TTS_TIMEOUT"
    public = credentials.model_copy(update={"public_url": "https://cdn.example.org/{name}"})
    [row] = rows_of(await collect_open_tickets(public), sandbox)
    [file] = files_in(save_to)
    assert (row.outcome, row.detail) == ("saved", str(file))
    report = await report_of(state.state_details.flow_run_id)
    assert f"https://cdn.example.org/{file.name}" in report
    assert str(file) in report
    assert "A text worth keeping" in report


async def report_of(flow_run_id: UUID | None) -> str:
    async with get_client() as client:
        [report] = await client.read_artifacts(
            artifact_filter=ArtifactFilter(type={"any_": ["markdown"]}),
            flow_run_filter=FlowRunFilter(id={"any_": [flow_run_id]}),
        )
    return str(report.data)


async def test_a_text_with_a_name_is_saved_under_it(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, given_up: dict[str, Any]
) -> None:
    sandbox.on_status(None, [PENDING])
    await text_to_speech("A text with a name.", name="intro", **given_up, return_state=True)
    await collect_open_tickets(credentials)
    assert [file.name for file in files_in(save_to)] == ["intro.mp3"]


async def test_a_part_is_saved_as_a_part_and_never_as_the_whole(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, given_up: dict[str, Any]
) -> None:
    sandbox.on_status(None, [PENDING] * 2)
    parts = {"max_chars": 20}
    state = await text_to_speech("The first part.\n\nThe second part.", **given_up, **parts, return_state=True)
    assert state.name == "TTS_TIMEOUT"
    told = await report_of(state.state_details.flow_run_id)

    rows = rows_of(await collect_open_tickets(credentials), sandbox)

    assert [row.outcome for row in rows] == ["saved", "saved"]
    assert all(Path(row.detail).parent == Path(save_to, FOLDER) for row in rows)
    assert files_in(save_to) == []
    assert await report_of(state.state_details.flow_run_id) == told

    asked = len(sandbox.requests())
    audio = await text_to_speech("The first part.\n\nThe second part.", **given_up, **parts)
    assert files_in(save_to) == [Path(audio.location)]
    assert len(sandbox.requests()) == asked


async def test_lines_are_saved_under_their_ids_and_the_batch_goes_on_from_there(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, given_up: dict[str, Any]
) -> None:
    lines = [{"id": "one", "text": "The first line."}, {"id": "two", "text": "The second line."}]
    sandbox.on_status(None, [PENDING] * 2)
    state = await text_to_speech_batch(lines, **given_up, return_state=True)
    assert state.name == "TTS_BATCH_PARTIAL"

    rows = rows_of(await collect_open_tickets(credentials), sandbox)

    assert sorted(row.detail for row in rows) == [f"{save_to}/one.mp3", f"{save_to}/two.mp3"]
    asked = len(sandbox.requests())
    assert [row.outcome for row in await text_to_speech_batch(lines, **given_up)] == ["completed", "completed"]
    assert len(sandbox.requests()) == asked


async def test_the_folders_that_no_run_has_used_are_named(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str
) -> None:
    ticket = await submit_tts(TTSRequest(text="Submitted by a script."), save_to, credentials)
    assert isinstance(ticket, Ticket)
    assert rows_of(await collect_open_tickets(credentials), sandbox) == []

    [row] = rows_of(await collect_open_tickets(credentials, folders=[save_to]), sandbox)

    assert (row.outcome, row.detail) == ("saved", f"{save_to}/{ticket.run_id}.mp3")


async def test_the_jobs_of_another_provider_are_left_alone(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, given_up: dict[str, Any]
) -> None:
    sandbox.on_status(None, [PENDING])
    await text_to_speech("Known to one of them only.", **given_up, return_state=True)
    asked = len(sandbox.requests())

    with Sandbox(job_seconds=0, speak=False) as another:
        elsewhere = credentials.model_copy(update={"base_url": another.base_url})
        assert rows_of(await collect_open_tickets(elsewhere, folders=[save_to]), sandbox) == []
        assert another.requests() == []
    assert len(sandbox.requests()) == asked

    [row] = rows_of(await collect_open_tickets(credentials), sandbox)
    assert row.outcome == "saved"


async def test_a_ledger_elsewhere_says_where_the_audio_goes(
    sandbox: Sandbox,
    credentials: NanoGPTCredentials,
    save_to: str,
    given_up: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path / "ledger"))
    sandbox.on_status(None, [PENDING] * 2)
    await text_to_speech("Its ledger is elsewhere.", **given_up, return_state=True)
    ticket = sandbox.add_job("And so is that of a ticket.")
    await wait_for_tts(ticket, **given_up, return_state=True)
    monkeypatch.delenv("NANOGPT_LEDGER")

    rows = rows_of(await collect_open_tickets(credentials), sandbox)

    assert [row.detail for row in rows] == [f"{save_to}/{charge.run_id}.mp3" for charge in sandbox.ledger.charges]
    assert not Path(save_to, FOLDER).exists()


async def test_a_folder_of_another_machine_is_said_to_be_out_of_reach(
    sandbox: Sandbox, credentials: NanoGPTCredentials, given_up: dict[str, Any]
) -> None:
    state = await text_to_speech("Saved.", **{**given_up, "timeout_seconds": 10}, return_state=True)
    assert state.is_completed()
    place = json.dumps({"place": "/only/over/there", "machine": "another-machine"})
    async with get_client() as client:
        run = state.state_details.flow_run_id
        await client.update_flow_run_labels(run, {f"{LABEL}elsewhere": place})

    [row] = [row for row in await collect_open_tickets(credentials) if "/only/over/there" in row.detail]

    assert row.outcome == "unreachable"
    assert "of the machine another-machine: run the collection there" in row.detail


async def test_a_submission_of_which_nobody_knows_is_told_and_never_repeated(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, given_up: dict[str, Any]
) -> None:
    sandbox.on_submit([Accept(then=Cut())])
    state = await text_to_speech("Lost on the way.", **given_up, return_state=True)
    assert state.name == "SUBMISSION_UNCERTAIN"
    # As if the process had died with the answer on its way.
    [note] = Path(save_to, FOLDER).glob("*.over-uncertain.json")
    note.unlink()

    rows = [row for row in await collect_open_tickets(credentials) if row.flow_runs and "Lost on" in row.flow_runs[0]]

    assert [row.outcome for row in rows] == ["uncertain"]
    assert len(sandbox.requests("submit")) == 1


async def test_without_a_key_nothing_is_settled_and_the_run_says_why() -> None:
    with pytest.raises(NanoGPTError, match="NANOGPT_API_KEY") as caught:
        await collect_open_tickets()
    assert caught.value.code == "MISSING_CREDENTIALS"


async def test_a_collection_takes_its_name_from_no_other_audio(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, given_up: dict[str, Any]
) -> None:
    patient = {**given_up, "timeout_seconds": 20}
    sandbox.on_status(None, [PENDING] * 2)
    await text_to_speech_batch([{"id": "a", "text": "The old wording of the line."}], **given_up, return_state=True)
    await text_to_speech("The old wording of the intro.", name="intro", **given_up, return_state=True)
    [line] = await text_to_speech_batch([{"id": "a", "text": "New."}], **patient)
    intro = await text_to_speech("New intro.", name="intro", **patient)

    rows = rows_of(await collect_open_tickets(credentials), sandbox)

    assert [row.outcome for row in rows] == ["saved", "saved"]
    for location, sha256, row in [(line.location, line.sha256, rows[0]), (intro.location, intro.sha256, rows[1])]:
        old = sandbox.audio_bytes(str(row.run_id))
        assert hashlib.sha256(Path(str(location)).read_bytes()).hexdigest() == sha256
        assert row.detail == str(location).replace(".mp3", f".{hashlib.sha256(old).hexdigest()[:8]}.mp3")
        assert Path(row.detail).read_bytes() == old
    asked = len(sandbox.requests())
    await text_to_speech("The old wording of the intro.", name="intro", **given_up)
    assert Path(intro.location).read_bytes() == sandbox.audio_bytes(str(rows[1].run_id))
    assert len(sandbox.requests()) == asked  # it was noted where it was saved


async def test_a_folder_that_is_gone_is_out_of_reach_until_it_is_named_where_it_is_now(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, given_up: dict[str, Any]
) -> None:
    sandbox.on_status(None, [PENDING])
    await text_to_speech("Its disk is not mounted.", **given_up, return_state=True)
    Path(save_to).rename(moved := f"{save_to}-moved")

    rows = await collect_open_tickets(credentials, folders=["/no/such/folder", "nosuch://driver"])
    for place in (f"{save_to} is not there", "/no/such/folder is not there", "nosuch://driver"):
        [row] = [row for row in rows if place in row.detail]
        assert row.outcome == "unreachable"
    Path(save_to).mkdir()  # the mount point of a disk that is not mounted
    [row] = [row for row in await collect_open_tickets(credentials) if f"{save_to} is there, and" in row.detail]
    assert row.outcome == "unreachable"
    assert "name in `folders` where it is now" in row.detail

    rows = await collect_open_tickets(credentials, folders=[moved])
    assert [row.outcome for row in rows_of(rows, sandbox)] == ["saved"]
    assert [row for row in rows if f"{save_to} " in row.detail] == []


async def test_a_folder_of_the_same_name_on_another_machine_is_told_of_unless_both_share_it(
    sandbox: Sandbox,
    credentials: NanoGPTCredentials,
    save_to: str,
    given_up: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-machine")
        sandbox.on_status(None, [PENDING])
        state = await text_to_speech("Said over there.", **given_up, return_state=True)
    rows = await collect_open_tickets(credentials)
    assert [row.outcome for row in rows_of(rows, sandbox)] == ["saved"]  # it is mounted here too
    assert [row for row in rows if f"{save_to} " in row.detail] == []

    await text_to_speech("Said here.", **{**given_up, "timeout_seconds": 10})
    async with get_client() as client:
        told = json.dumps({"place": save_to, "machine": "another-machine", "ledger": "another"})
        await client.update_flow_run_labels(state.state_details.flow_run_id, {f"{LABEL}elsewhere": told})
    [row] = [row for row in await collect_open_tickets(credentials) if f"{save_to} " in row.detail]
    assert row.outcome == "unreachable"
    assert f"{save_to} is a folder of the machine another-machine" in row.detail


async def test_audio_for_a_folder_of_another_machine_is_not_saved_here(
    sandbox: Sandbox,
    credentials: NanoGPTCredentials,
    save_to: str,
    given_up: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path / "ledger"))
    sandbox.on_status(None, [PENDING] * 2)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(socket, "gethostname", lambda: "another-machine")
        await text_to_speech("Its folder is over there.", name="x", **given_up, return_state=True)
        await text_to_speech("[sandbox:reject] And so is this one's.", **given_up, return_state=True)
    shutil.rmtree(save_to)  # it was never on this machine

    ready, rejected = rows_of(await collect_open_tickets(credentials), sandbox)

    assert (ready.outcome, rejected.outcome) == ("unreachable", "rejected")
    assert f"The audio goes to {save_to}, a folder of the machine another-machine" in ready.detail
    assert len(sandbox.ledger.refunds) == 1
    assert not Path(save_to).exists()
    audio = await text_to_speech("Its folder is over there.", name="x", **given_up)
    assert Path(audio.location) == Path(save_to, "x.mp3")
    assert len(sandbox.ledger.charges) == 2


async def test_a_named_folder_is_looked_up_where_its_runs_have_their_ledger(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_block = credentials.model_copy(update={"ledger": str(tmp_path / "of the block")})
    await submit_tts(TTSRequest(text="By a script, with a block."), save_to, of_block)
    monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path / "of the environment"))
    await submit_tts(TTSRequest(text="By a script, with a variable."), save_to, credentials)

    for index, given in enumerate([of_block, credentials]):
        [row] = rows_of(await collect_open_tickets(given, folders=[save_to]), sandbox)
        assert (row.outcome, row.run_id) == ("saved", sandbox.ledger.charges[index].run_id)


async def test_a_job_whose_notes_are_damaged_gets_a_row_and_stops_no_other(
    sandbox: Sandbox,
    credentials: NanoGPTCredentials,
    save_to: str,
    given_up: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path / "ledger"))
    damages: list[dict[str, Any]] = [
        {},
        {"run": "edited"},
        {"save_to": "nosuch://driver"},
        {"name": 5},
        {"ticket": None},
    ]
    sandbox.on_status(None, [PENDING] * len(damages))
    for number, damage in enumerate(damages):
        await text_to_speech(f"Text {number}.", **given_up, return_state=True)
        for note in Path(tmp_path, "ledger", FOLDER).glob("*.json"):
            told = json.loads(note.read_text())
            if told.get("text", f"Text {number}.") == f"Text {number}." and "damaged" not in told:
                note.write_text(json.dumps({**told, **damage, "damaged": True}))

    rows = await collect_open_tickets(credentials)

    assert [row.outcome for row in rows_of(rows, sandbox)] == ["saved", "saved", "unreachable", "failed"]
    [unread] = [row for row in rows if row.run_id is None and "is damaged" in row.detail]
    assert unread.outcome == "uncertain"


async def test_a_lost_job_is_asked_for_again_and_told_of_in_the_look_back(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, given_up: dict[str, Any]
) -> None:
    sandbox.on_status(None, [PENDING, *[Answer(404)] * 8])
    await text_to_speech("The gateway hiccups for long.", **given_up, return_state=True)

    for _ in range(2):
        assert [row.outcome for row in rows_of(await collect_open_tickets(credentials), sandbox)] == ["lost"]
    at_once = await collect_open_tickets(credentials, folders=[save_to], lookback_days=1e-9)
    assert rows_of(at_once, sandbox) == []
    assert [row.outcome for row in rows_of(await collect_open_tickets(credentials), sandbox)] == ["saved"]
    assert rows_of(await collect_open_tickets(credentials), sandbox) == []
    assert len(sandbox.requests("status")) == 10


async def test_of_one_ticket_in_two_folders_both_are_told(
    sandbox: Sandbox, credentials: NanoGPTCredentials, given_up: dict[str, Any], tmp_path: Path
) -> None:
    ticket = sandbox.add_job("Waited for twice.")
    sandbox.on_status(None, [PENDING] * 2)
    for folder in ("a", "b"):
        await wait_for_tts(ticket, **{**given_up, "save_to": str(tmp_path / folder)}, return_state=True)
    sandbox.on_audio(None, [None, *[Answer(404)] * 4])

    [row] = rows_of(await collect_open_tickets(credentials), sandbox)

    assert row.outcome == "failed"
    [saved] = [*files_in(tmp_path / "a"), *files_in(tmp_path / "b")]
    assert f"saved: {saved}" in row.detail
    assert "failed: AUDIO_UNAVAILABLE" in row.detail


async def test_a_refused_key_fails_the_collection(
    sandbox: Sandbox, credentials: NanoGPTCredentials, given_up: dict[str, Any]
) -> None:
    sandbox.on_status(None, [PENDING])
    await text_to_speech("Waits for a key.", **given_up, return_state=True)
    wrong = credentials.model_copy(update={"api_key": SecretStr("bad-key")})

    state = await collect_open_tickets(wrong, return_state=True)

    assert (state.type, state.name) == (StateType.FAILED, "INVALID_API_KEY")
    assert "stays open: run the collection again with a key that is accepted" in str(state.message)
    assert [row.outcome for row in rows_of(await collect_open_tickets(credentials), sandbox)] == ["saved"]


async def test_the_cost_of_a_model_that_answers_at_once_is_told(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, given_up: dict[str, Any]
) -> None:
    sandbox.on_audio(None, [Answer(503)] * 4)
    state = await text_to_speech("At once.", model="Kokoro-82m", voice="af_bella", **given_up, return_state=True)
    assert state.name == "AUDIO_UNAVAILABLE"

    [row] = [row for row in await collect_open_tickets(credentials) if save_to in row.detail]

    assert (row.outcome, row.cost) == ("saved", sandbox.ledger.charges[0].amount)
