"""Audio and ledger behind FTP, and passwords in URLs, which are to be seen nowhere."""

import json
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from prefect import Flow, flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, LogFilter, LogFilterFlowRunId
from prefect.logging.handlers import APILogHandler
from pydantic import SecretStr

from prefect_nanogpt import NanoGPTCredentials, storage
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import find_credentials
from prefect_nanogpt.errors import CredentialsError, NanoGPTError, StorageError, hide, secrets_in, without_login
from prefect_nanogpt.flows import collect_open_tickets, text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.models import PollSchedule, Ticket
from prefect_nanogpt.sandbox import Answer, Sandbox
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import join_audio
from tests.conftest import API_KEY
from tests.ftp_server import MAIL_USER, PASSWORD, USER, FTPServer, ftp
from tests.sftp_server import PASSWORD as SFTP_PASSWORD
from tests.sftp_server import SFTPServer, sftp
from tests.sounds import tone

__all__ = ["ftp", "sftp"]

LINES = [{"id": "one", "text": "One."}, {"id": "two", "text": "Two."}]
REFUSED = [*LINES, {"id": "three", "text": "[sandbox:reject] Three."}]
ENCODED = quote(PASSWORD, safe="")


@pytest.fixture
def url(ftp: FTPServer) -> str:
    return f"ftp://{USER}:{ENCODED}@{ftp.address}"


@pytest.fixture
def say(credentials: NanoGPTCredentials, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "poll": quick}


# FTP


async def test_a_first_batch_goes_into_a_new_folder_and_another_run_pays_nothing(
    sandbox: Sandbox, ftp: FTPServer, url: str, say: dict[str, Any]
) -> None:
    save_to = f"{url}/season 1/episode"
    rows = await text_to_speech_batch(LINES, save_to=save_to, **say)
    here = f"ftp://{ftp.address}/season 1/episode"
    assert [row.location for row in rows] == [f"{here}/one.mp3", f"{here}/two.mp3"]
    assert rows[0].ticket is not None
    assert (ftp.root / "season 1/episode/one.mp3").read_bytes() == sandbox.audio_bytes(rows[0].ticket.run_id)
    assert await text_to_speech_batch(LINES, save_to=save_to, **say) == rows
    assert (len(sandbox.ledger.charges), len(sandbox.requests("audio"))) == (2, 2)


async def test_who_has_no_name_is_let_in_where_the_server_lets_everybody_in(
    sandbox: Sandbox, ftp: FTPServer, say: dict[str, Any]
) -> None:
    save_to = f"ftp://{ftp.address}/open"
    first = await text_to_speech("To all.", save_to=save_to, name="to all", **say)
    again = await text_to_speech("To all.", save_to=save_to, name="to all", **say)
    assert first.location.startswith(f"{save_to}/to-all-")
    assert again.location == first.location
    assert len(sandbox.ledger.charges) == 1


async def test_parts_of_a_long_text_are_joined_behind_ftp(sandbox: Sandbox, url: str, say: dict[str, Any]) -> None:
    text = "The first sentence is here. The second sentence is here."
    whole = await text_to_speech(text, save_to=f"{url}/long", max_chars=30, **say)
    assert whole.size_bytes > 0
    assert len(sandbox.ledger.charges) == 2


async def test_a_file_longer_than_a_transfer_is_what_was_sent(
    url: str, ftp: FTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FTP_BLOCK_BYTES", 2**16)
    novel = tone("wav", 6.0)
    assert len(novel) > 4 * 2**16

    async def chunks() -> AsyncIterator[bytes]:
        yield novel

    place = Destination(f"{url}/long")
    audio = await place.save(chunks(), "novel")
    assert (ftp.root / "long/novel.wav").read_bytes() == novel
    assert await place.run(place.has, "novel.wav", audio.size_bytes, audio.sha256)


async def test_a_connection_that_was_ended_while_a_job_was_waited_for_is_made_again(
    ftp: FTPServer, url: str, quick: PollSchedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "IDLE_SECONDS", 0.5)
    ftp.idle_seconds = 1
    with Sandbox(job_seconds=3, speak=False) as slow:
        credentials = NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url=slow.base_url)
        rows = await text_to_speech_batch(LINES, save_to=f"{url}/slow", credentials=credentials, poll=quick)
        assert [row.outcome for row in rows] == ["completed"] * 2
        assert (len(slow.ledger.charges), len(slow.requests("audio"))) == (2, 2)


async def test_a_server_that_lets_few_connections_in_is_used_over_one(
    sandbox: Sandbox, ftp: FTPServer, url: str, say: dict[str, Any]
) -> None:
    ftp.most_connections = 1
    await text_to_speech("One connection.", save_to=f"{url}/few", **say)
    rows = await text_to_speech_batch(LINES, save_to=f"{url}/fewer", **say)
    assert [row.outcome for row in rows] == ["completed"] * 2
    assert len(sandbox.ledger.charges) == 3


async def test_a_server_that_renames_over_no_file_takes_more_lines_later(
    sandbox: Sandbox, ftp: FTPServer, url: str, say: dict[str, Any]
) -> None:
    ftp.renames_over = False
    await text_to_speech_batch(LINES[:1], save_to=f"{url}/strict", **say)
    rows = await text_to_speech_batch(LINES, save_to=f"{url}/strict", **say)
    assert [row.outcome for row in rows] == ["completed"] * 2
    assert len(sandbox.ledger.charges) == 2
    assert len((ftp.root / "strict/manifest.jsonl").read_text().splitlines()) == 2
    assert not list(ftp.root.rglob("*.part"))


@pytest.mark.parametrize("name", [".sent.", ".answer.", ".saved-", ".mp3"])
async def test_an_upload_that_ends_in_the_middle_leaves_nothing_half_under_a_name_that_counts(
    name: str, sandbox: Sandbox, ftp: FTPServer, url: str, say: dict[str, Any]
) -> None:
    ftp.breaks = name
    audio = await text_to_speech("In one piece.", save_to=f"{url}/half", **say)
    assert ftp.breaks is None
    assert len(sandbox.ledger.charges) == 1
    assert (ftp.root / "half" / audio.location.rpartition("/")[2]).stat().st_size == audio.size_bytes
    notes = [path for path in (ftp.root / "half/.nanogpt").iterdir() if path.suffix == ".json"]
    assert all(json.loads(note.read_bytes()) for note in notes)


async def test_a_server_that_falls_silent_is_not_waited_for_for_ever(
    sandbox: Sandbox, sftp: SFTPServer, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "SILENCE_SECONDS", 0.5)
    save_to = f"sftp://127.0.0.1:{sftp.options['port']}/quiet"
    await text_to_speech("Before.", save_to=save_to, **say)
    with sftp.silence(), pytest.raises(StorageError) as caught:
        await text_to_speech("After.", save_to=save_to, **say)
    assert caught.value.retryable
    await text_to_speech("After.", save_to=save_to, **say)
    assert len(sandbox.ledger.charges) == 2


async def test_lines_behind_a_password_are_joined_on_the_same_server_and_no_run_is_named_by_it(
    ftp: FTPServer, url: str, say: dict[str, Any]
) -> None:
    rows = await text_to_speech_batch(LINES, save_to=f"{url}/lines", **say)

    @flow
    async def join() -> str:
        return (await join_audio(rows, f"{url}/episode.mp3")).location

    state = await join(return_state=True)
    assert await state.aresult() == f"ftp://{ftp.address}/episode.mp3"
    told = await everything_told(state.state_details.flow_run_id)
    assert f"join into ftp://{ftp.address}/episode.mp3" in told
    assert ENCODED not in told


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        ("MLSD", "421 Too many connections."),
        ("MLSD", "530 Please log in."),
        ("RETR", "421 Timeout."),
        ("RETR", "550 Permission denied."),
    ],
)
async def test_what_cannot_be_read_now_is_not_taken_for_unpaid(
    command: str, answer: str, sandbox: Sandbox, ftp: FTPServer, url: str, say: dict[str, Any]
) -> None:
    audio = await text_to_speech("Paid once.", save_to=f"{url}/once", **say)
    ftp.answers[command] = answer
    with pytest.raises(StorageError):
        await text_to_speech("Paid once.", save_to=f"{url}/once", **say)
    ftp.answers.clear()
    again = await text_to_speech("Paid once.", save_to=f"{url}/once", **say)
    assert (again.location, again.sha256) == (audio.location, audio.sha256)
    assert len(sandbox.ledger.charges) == 1


@pytest.mark.parametrize("commands", [["MLSD", "LIST"], ["RETR"]])
async def test_a_folder_that_does_not_show_what_is_in_it_is_refused_before_anything_is_paid(
    commands: list[str], sandbox: Sandbox, ftp: FTPServer, url: str, say: dict[str, Any]
) -> None:
    (ftp.root / "drop" / ".nanogpt").mkdir(parents=True)
    ftp.answers |= dict.fromkeys(commands, "550 Permission denied.")
    with pytest.raises(StorageError):
        await text_to_speech("Into a drop box.", save_to=f"{url}/drop", **say)
    assert sandbox.ledger.charges == []


# What cannot be used


@pytest.fixture
def nobody_listens() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.parametrize("flow", [text_to_speech, text_to_speech_batch])
@pytest.mark.parametrize("why", ["wrong password", "refused connection", "unknown host", "a slash in it"])
@pytest.mark.parametrize("scheme", ["ftp", "sftp"])
async def test_a_server_that_cannot_be_used_is_named_before_anything_is_paid_and_its_password_is_not(
    scheme: str,
    why: str,
    flow: Flow[Any, Any],
    sandbox: Sandbox,
    ftp: FTPServer,
    sftp: SFTPServer,
    say: dict[str, Any],
    nobody_listens: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fsspec.config.conf", {})
    caplog.set_level(logging.DEBUG, logger="prefect")
    there = ftp.address if scheme == "ftp" else f"127.0.0.1:{sftp.options['port']}"
    place, password = {
        "wrong password": (there, "mis%40typed"),
        "refused connection": (nobody_listens, "mis%40typed"),
        "unknown host": ("no-such-host.invalid", "mis%40typed"),
        "a slash in it": (there, "mis/typed"),
    }[why]
    state = await flow(
        "Nowhere." if flow is text_to_speech else LINES,
        save_to=f"{scheme}://{USER}:{password}@{place}/speech",
        return_state=True,
        **say,
    )
    assert (state.name, sandbox.ledger.charges) == ("STORAGE_FAILED", [])
    assert f"{scheme}://{place}/speech" in str(state.message)
    told = f"{state.message} {await everything_told(state.state_details.flow_run_id)} {caplog.text}"
    assert "typed" not in told
    assert "mis" not in told.replace("permission", "").lower().split()


# Passwords


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("ftp://speaker:secret@host/speech", "ftp://host/speech"),
        ("ftp://me@example.org:secret@host/speech", "ftp://host/speech"),
        ("ftp://me@example.org:s/e@c?ret@[::1]/speech", "ftp://[::1]/speech"),
        ("ftp://me@host:21/to@day", "ftp://me@host:21/to@day"),
        ("ftp://me@[::1]:21/to@day", "ftp://me@[::1]:21/to@day"),
        ("https://speaker:s%40cret@host:1/x?at=a@b", "https://host:1/x?at=a@b"),
        ("ftp://speaker:s@cret@host/to@day", "ftp://host/to@day"),
        ("ftp://speaker:s/e#c?ret@host/speech", "ftp://host/speech"),
        ("ftp://:secret@[::1]:21/to@day", "ftp://[::1]:21/to@day"),
        ("simplecache::ftp://speaker:secret@host/speech", "simplecache::ftp://host/speech"),
        ("ftp://host:21/to@day", "ftp://host:21/to@day"),
        ("ftp://[::1]:21/to@day", "ftp://[::1]:21/to@day"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("/home/a:b@c", "/home/a:b@c"),
    ],
)
def test_a_url_is_shown_without_its_login(url: str, shown: str) -> None:
    assert without_login(url) == shown
    assert bool(secrets_in(url)) == (url != shown)
    assert all(password not in shown for password in secrets_in(url))


def test_a_password_is_hidden_in_the_words_of_others_and_no_word_that_has_it_in_it_is() -> None:
    assert hide(["s%40cret"], "Login s@cret, or s%40cret, failed.") == "Login ***, or ***, failed."
    assert hide(["in", ""], "Login of in failed.") == "Login of *** failed."
    assert hide(["s cret/"], "s%20cret/, s%20cret%2F") == "***, ***"
    assert hide([], "No answer from http://me:secret@host:9000/b.") == "No answer from http://host:9000/b."
    assert hide([], "http://host:80/x, at 10:20, me@host") == "http://host:80/x, at 10:20, me@host"


async def everything_told(flow_run_id: Any) -> str:
    """Read all that Prefect shows of a run besides its parameters: states, labels, name, logs, artifacts."""
    await APILogHandler.aflush()
    only = FlowRunFilter(id={"any_": [flow_run_id]})  # type: ignore[arg-type]
    async with get_client() as client:
        run = await client.read_flow_run(flow_run_id)
        found: list[Any] = [run.model_dump(mode="json", exclude={"parameters"})]
        for task_run in await client.read_task_runs(flow_run_filter=only):
            found.append(task_run.model_dump(mode="json"))
        for artifact in await client.read_artifacts(flow_run_filter=only):
            found.append(artifact.model_dump(mode="json"))
        for log in await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))):
            found.append(log.model_dump(mode="json"))
    return json.dumps(found)


def everything_kept(root: Path) -> str:
    return " ".join(
        str(path) + path.read_bytes().decode(errors="replace") for path in root.rglob("*") if path.is_file()
    )


@pytest.mark.parametrize("where", ["ftp", "e-mail", "sftp", "ledger"])
async def test_the_password_of_a_url_is_in_no_message_log_report_label_note_or_row(
    where: str,
    sandbox: Sandbox,
    ftp: FTPServer,
    sftp: SFTPServer,
    url: str,
    say: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.DEBUG, logger="prefect")
    save_to = f"{url}/{where}"
    if where == "e-mail":
        save_to = f"ftp://{MAIL_USER}:{ENCODED}@{ftp.address}/{where}"
    if where == "sftp":
        save_to = f"sftp://speaker:{SFTP_PASSWORD}@127.0.0.1:{sftp.options['port']}/speech"
    if where == "ledger":
        monkeypatch.setenv("NANOGPT_LEDGER", f"{url}/ledger")
        save_to = str(tmp_path / "audio")
    sandbox.on_status(None, [{"status": "pending"}])
    states = [
        await text_to_speech("Too late.", save_to=save_to, timeout_seconds=1e-6, return_state=True, **say),
        await text_to_speech("[sandbox:reject] No.", save_to=save_to, return_state=True, **say),
        await text_to_speech("Good.", save_to=save_to, return_state=True, **say),
        await text_to_speech_batch(REFUSED, save_to=save_to, return_state=True, **say),
        await wait_for_tts(Ticket(run_id="gone", model="m"), save_to=save_to, return_state=True, **say),
    ]
    names = ["TTS_TIMEOUT", "CONTENT_POLICY_VIOLATION", "Completed", "TTS_BATCH_PARTIAL"]
    assert [state.name for state in states[:4]] == names
    results = [await state.aresult(raise_on_failure=False) for state in states]
    told = [await everything_told(state.state_details.flow_run_id) for state in states]
    rows = await collect_open_tickets(say["credentials"], folders=[save_to])
    said = [*map(repr, [*results, *rows, *(vars(result) for result in results)]), everything_kept(tmp_path), *told]

    for password in (PASSWORD, ENCODED, SFTP_PASSWORD):
        assert password not in " ".join([*said, caplog.text])
    assert ("was given with its password" in caplog.text) == (where != "ledger")
    assert f"--save-to {without_login(save_to)}" in told[0]


async def test_a_collection_needs_the_password_again_and_says_so(
    sandbox: Sandbox, ftp: FTPServer, url: str, say: dict[str, Any]
) -> None:
    ftp.refuse_nameless()
    sandbox.on_status(None, [{"status": "pending"}])
    save_to = f"{url}/open"
    await text_to_speech("Too late.", save_to=save_to, timeout_seconds=1e-6, return_state=True, **say)
    [row] = [row for row in await collect_open_tickets(say["credentials"]) if without_login(save_to) in row.detail]
    assert row.outcome == "unreachable"
    assert "`folders`" in row.detail

    [charge] = sandbox.ledger.charges
    rows = await collect_open_tickets(say["credentials"], folders=[save_to])
    [row] = [row for row in rows if row.run_id == charge.run_id]
    assert (row.outcome, row.detail) == ("saved", f"{without_login(save_to)}/{charge.run_id}.mp3")
    assert all(without_login(save_to) not in other.detail for other in rows if other is not row)


async def test_a_ledger_elsewhere_is_found_by_its_setting_and_so_is_the_audio_beside_no_password(
    sandbox: Sandbox, url: str, say: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_LEDGER", f"{url}/ledger")
    sandbox.on_status(None, [{"status": "pending"}])
    save_to = f"{url}/audio"
    await text_to_speech("Too late.", save_to=save_to, timeout_seconds=1e-6, return_state=True, **say)
    [charge] = sandbox.ledger.charges
    rows = await collect_open_tickets(say["credentials"], folders=[save_to])
    [row] = [row for row in rows if row.run_id == charge.run_id]
    assert (row.outcome, row.detail) == ("saved", f"{without_login(save_to)}/{charge.run_id}.mp3")


async def test_the_login_of_a_proxy_in_front_of_the_api_goes_along_and_is_shown_nowhere(
    sandbox: Sandbox, save_to: str, quick: PollSchedule, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    plain = NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url=sandbox.base_url)
    base_url = sandbox.base_url.replace("://", "://proxy:pr%40xy@")
    behind = NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url=base_url)
    await text_to_speech("One job.", save_to=save_to, credentials=behind, poll=quick)
    requests = sandbox.requests("submit") + sandbox.requests("status")
    assert {request.headers["authorization"] for request in requests} == {"Basic cHJveHk6cHJAeHk="}
    assert "authorization" not in sandbox.requests("audio")[0].headers
    await text_to_speech("One job.", save_to=save_to, credentials=plain, poll=quick)
    assert len(sandbox.ledger.charges) == 1  # the same API, and so the same job
    assert "pr@xy" not in everything_kept(Path(save_to)) + caplog.text
    assert "pr%40xy" not in everything_kept(Path(save_to)) + caplog.text


async def test_the_login_in_an_audio_url_goes_along_and_is_not_logged(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ticket = sandbox.add_job()
    url = sandbox.completed_body(ticket["runId"])["audioUrl"].replace("://", "://host:h%40st@")
    async with NanoGPTClient(API_KEY, sandbox.base_url) as client, client.download(url) as response:
        assert await response.aread() == sandbox.audio_bytes(ticket["runId"])
    assert sandbox.requests("audio")[0].headers["authorization"] == "Basic aG9zdDpoQHN0"
    assert "h%40st" not in caplog.text


@pytest.mark.parametrize("lines", ["ftp://speaker:mistyped@127.0.0.1:1/lines.csv", "nosuch://speaker:mistyped@host"])
async def test_lines_that_cannot_be_read_are_named_without_their_password(lines: str, save_to: str) -> None:
    state = await text_to_speech_batch(lines, save_to=save_to, return_state=True)
    assert state.name == "LINES_UNREADABLE"
    assert without_login(lines) in str(state.message)
    assert "mistyped" not in await everything_told(state.state_details.flow_run_id)


@pytest.mark.parametrize("address", ["ftp://speaker:mistyped@host", "speaker:mistyped@nano-gpt.com/api"])
@pytest.mark.parametrize("key", ["", API_KEY])
async def test_an_address_of_the_api_that_cannot_be_used_is_not_shown_with_its_password(
    address: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_BASE_URL", address)
    monkeypatch.setenv("NANOGPT_API_KEY", key)
    with pytest.raises(CredentialsError) as caught:
        await find_credentials()
    assert "mistyped" not in str(caught.value)


def test_a_file_given_for_a_folder_is_named_without_its_password() -> None:
    with pytest.raises(NanoGPTError, match=r"ftp://host/take\.mp3") as caught:
        Destination("ftp://speaker:mistyped@host/take.mp3")
    assert "mistyped" not in str(caught.value)


async def test_the_report_links_to_audio_without_the_password_of_its_url(
    sandbox: Sandbox, save_to: str, say: dict[str, Any]
) -> None:
    ticket = sandbox.add_job()
    body = sandbox.completed_body(ticket["runId"])
    url = body["audioUrl"].replace("://", "://host:h%40st@")
    sandbox.on_status(ticket["runId"], [Answer(json={**body, "audioUrl": url})])
    state = await wait_for_tts(Ticket.model_validate(ticket), save_to=save_to, return_state=True, **say)
    told = await everything_told(state.state_details.flow_run_id)
    assert state.is_completed()
    assert body["audioUrl"] in told
    assert "h%40st" not in told
