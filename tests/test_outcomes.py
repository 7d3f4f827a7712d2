"""What `wait_for_tts` makes of whatever the provider does, row by row as `docs/outcomes.md` has it."""

import gzip
import logging
import pickle
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from uuid import UUID

import httpx
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun, State
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import Artifact, TaskRun
from prefect.logging.handlers import APILogHandler
from prefect.settings import PREFECT_HOME, PREFECT_SERVER_DATABASE_CONNECTION_URL
from pydantic import SecretStr

from prefect_nanogpt import NanoGPTCredentials, errors
from prefect_nanogpt.errors import AudioError, ContentPolicyViolation, NanoGPTError, ProviderError, TTSJobRejected
from prefect_nanogpt.flows import wait_for_tts
from prefect_nanogpt.ledger import Ledger
from prefect_nanogpt.models import AudioFile, PollSchedule, Ticket
from prefect_nanogpt.polling import poll
from prefect_nanogpt.report import Artifact as ReportArtifact
from prefect_nanogpt.sandbox import Answer, Cut, Hang, Redirect, Sandbox, Slow
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import get_tts_status
from tests.conftest import API_KEY, eventually
from tests.sounds import tone

TABLE = Path(__file__).parent.parent / "docs" / "outcomes.md"
TWO_LOOKS = {"timeout_seconds": 60, "poll": PollSchedule(min_seconds=60, max_seconds=60, jitter=0)}
NO_KEY: dict[str, Any] = {"credentials": None}


class Row(NamedTuple):
    """A row of the documented table."""

    case: str
    action: str
    calls: str
    downloads: str
    state: str
    exception: str
    report: str
    exit: str


def documented_rows() -> list[Row]:
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("| ")]
    rows = [Row(*(cell.strip().strip("`") for cell in line.strip("|").split("|"))) for line in lines]
    return [row for row in rows if row.case != "Case"]


ROWS = {row.case: row for row in documented_rows()}


class Wait(NamedTuple):
    """A wait that is over, and what is left of it."""

    state: State[Any]
    result: Any

    @property
    def flow_run_id(self) -> UUID:
        assert self.state.state_details.flow_run_id
        return self.state.state_details.flow_run_id

    async def flow_run(self) -> FlowRun:
        async with get_client() as client:
            return await client.read_flow_run(self.flow_run_id)

    async def report(self) -> Artifact | None:
        return next((artifact for artifact in await self.artifacts() if artifact.type == "markdown"), None)

    async def artifacts(self) -> list[Artifact]:
        async with get_client() as client:
            return await client.read_artifacts(
                artifact_filter=ArtifactFilter(flow_run_id={"any_": [self.flow_run_id]})  # type: ignore[arg-type]
            )

    async def task_runs(self, name: str, runs: int = 1) -> list[TaskRun]:
        """Read the finished task runs of a task, which the server learns of a little later."""

        async def look() -> list[TaskRun] | None:
            async with get_client() as client:
                found = await client.read_task_runs(
                    flow_run_filter=FlowRunFilter(id={"any_": [self.flow_run_id]})  # type: ignore[arg-type]
                )
            found = [run for run in found if run.name.startswith(name)]
            return found if len(found) >= runs and all(run.state and run.state.is_final() for run in found) else None

        return await eventually(look)

    async def logs(self) -> list[str]:
        await APILogHandler.aflush()
        async with get_client() as client:
            logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[self.flow_run_id])))
        return [log.message for log in logs]


Waiter = Callable[..., Any]


@pytest.fixture
def wait(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> Waiter:
    """Wait for a ticket, by itself or through another version of the flow, and look at how it ended."""

    async def wait(ticket: Any, flow: Any = wait_for_tts, **arguments: Any) -> Wait:
        defaults = {"save_to": save_to, "credentials": credentials, "poll": quick}
        state = await flow(ticket, **defaults | arguments, return_state=True)
        return Wait(state, await state.aresult(raise_on_failure=False))

    return wait


@pytest.fixture
def nowhere() -> Iterator[str]:
    """The address of a port that nobody listens on."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


# The table


def error(status: int, message: str, headers: Mapping[str, str] | None = None, **more: Any) -> Answer:
    return Answer(status, {"error": message, "status": status, **more}, headers=headers or {})


def busy(retry_after: str) -> Answer:
    return error(429, "Too many requests", {"retry-after": retry_after}, code="rate_limit_exceeded")


def pending(position: int) -> dict[str, Any]:
    return {"status": "pending", "queuePosition": position}


def rejected(status: str = "error", **more: Any) -> list[dict[str, Any]]:
    return [{"status": status, "error": "The provider's own words.", **more}]


DAILY_CAP = Answer(
    429,
    {"error": {"message": "5 of 5 USD", "type": "rate_limit_error", "code": "daily_usd_limit_exceeded"}},
    headers={"retry-after": "30000"},
)
HALF = Answer(body=tone("mp3", 2.0)[:8_000])
WEB_PAGE = Answer(body="<!doctype html><title>Hello</title>", headers={"content-type": "text/html"})

Replies = Iterable[Any]


@dataclass
class Case:
    """What the provider does, and what the caller does, in one row.

    Args:
        status: Its answers to the status calls, or how to make them of the body of the finished job.
        audio: Its answers to the downloads, or how to make them of the URL of the audio.
        arguments: Further arguments of the flow.
        ticket: Changes to the ticket.
        environment: The environment variables.
        patch: What is made smaller, so that the test is.
        says: What the message of the failed state has to say.
        saved_before: Whether the audio is in the folder already.
        file_in_the_way: Whether there is a file where the folder should be.
        given_up: How many answers of HTTP 200 are not waited for.
        time_flies: Whether the pauses between the looks pass at once, on a clock that they alone move.
    """

    status: Replies | Callable[[dict[str, Any]], Replies] = ()
    audio: Replies | Callable[[str], Replies] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    ticket: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    patch: Mapping[str, Any] = field(default_factory=dict)
    says: str = ""
    saved_before: bool = False
    file_in_the_way: bool = False
    given_up: int = 0
    time_flies: bool = False


CASES = {
    "The job is finished": Case(),
    "The job moves up the queue": Case(status=[pending(3), pending(2), pending(1)]),
    "The job is called processing, queued, succeeded": Case(
        lambda finished: [{"status": "processing"}, {"status": "QUEUED"}, finished | {"status": "succeeded"}]
    ),
    "The finished job has no URL at first": Case(status=[{"status": "completed", "audioUrl": None}]),
    "The finished job has only audioUrls": Case(
        lambda finished: [{"status": "completed", "audioUrls": [finished["audioUrl"]], "terminal": True}]
    ),
    "The status word is unknown": Case(status=[{"status": "Warming up"}] * 3),
    "The status word is unknown, with an error": Case(rejected("moderated"), says="The provider's own words."),
    "The job is said to be at its end, without audio": Case([{"status": "pending", "terminal": True}], says="the end"),
    "The job is said to be at its end, with audio": Case(
        lambda finished: [{"status": "ready", "terminal": True, "data": {"url": finished["audioUrl"]}}]
    ),
    "The audio is already saved": Case(saved_before=True),
    "The job ends in an error with a code": Case(rejected(code="voice-unavailable"), says="The provider's own words."),
    "The job ends in an error without a code": Case(rejected(), says="The provider's own words."),
    "The job ends as failed": Case(rejected("failed"), says="The provider's own words."),
    "The job ends as cancelled": Case([{"status": "cancelled"}], says="gave no reason"),
    "The job ends as canceled": Case([{"status": "canceled"}], says="gave no reason"),
    "The content is rejected by its code": Case(
        rejected(code="content_policy_violation"), says="The provider's own words."
    ),
    "The content is rejected by its message": Case(
        [{"status": "error", "error": "CONTENT_POLICY_VIOLATION"}], says="CONTENT_POLICY_VIOLATION"
    ),
    "The content is rejected by its status word": Case(
        rejected("content_policy_violation"), says="The provider's own words."
    ),
    "The reason has half a character and terminal sequences in it": Case(
        [Answer(body='{"status": "error", "error": "Not \\ud83d\\u001b[31mred\\r\\nnow"}')], says="Not red now"
    ),
    "The place in the queue is no place": Case(
        [Answer(body=f'{{"status": "pending", "queuePosition": {it}}}') for it in ("-1", "9" * 400, "1e999999", "NaN")]
    ),
    "503 comes twice": Case([error(503, "Service unavailable")] * 2),
    "408 comes once": Case([error(408, "Request timeout")]),
    "500 comes on and on": Case(repeat(error(500, "Internal error")), says="Internal error. (HTTP 500)"),
    "400 comes": Case([error(400, "runId and model are required")], says="required. (HTTP 400)"),
    "401 comes": Case([error(401, "Invalid API key", code="invalid_api_key")], says="Invalid API key. (HTTP 401)"),
    "402 comes": Case([error(402, "Insufficient balance", requiredBalance=0.5)], says="Insufficient balance. (HTTP"),
    "403 comes": Case(
        [Answer(403, {"error": {"message": "No.", "type": "permission_denied_error", "code": "model_not_allowed"}})],
        says="No. (HTTP 403)",
    ),
    "501 comes": Case([error(501, "Not implemented")], says="Not implemented. (HTTP 501)"),
    "404 comes once": Case([error(404, "TTS run not found")]),
    "404 comes on and on": Case(ticket={"runId": "never-heard-of"}, says="TTS run not found. (HTTP 404)"),
    "429 comes with a short Retry-After": Case([busy("1")]),
    "429 comes with a Retry-After above 60 s": Case([busy("61")], says="come back in 61 s"),
    "429 comes with a Retry-After beyond the deadline": Case(
        [busy("30")], arguments={"timeout_seconds": 20}, says="come back in 30 s"
    ),
    "429 comes for a daily cap": Case([DAILY_CAP], says="Come back in 30000 s"),
    "A web page comes with 200": Case(repeat(WEB_PAGE), says="not a JSON object"),
    "JSON without a status comes": Case(repeat({"ok": True}), says="has no status"),
    "The connection is cut four times": Case([{"status": "processing"}, *[Cut()] * 4]),
    "The connection is cut on and on": Case(repeat(Cut()), says="could not be reached"),
    "The provider takes the call and says nothing": Case(
        [Hang(60)], patch={"prefect_nanogpt.client.STATUS_TIMEOUT": httpx.Timeout(1)}
    ),
    "The answer to the call trickles": Case(
        [Slow(100)], patch={"prefect_nanogpt.client.LONGEST_LOOK_SECONDS": 0.5}, given_up=1
    ),
    "The answer is larger than 8 MB": Case(repeat(Answer(body=bytes(8 * 1024**2 + 1))), says="larger than 8,388,608"),
    "The answer unpacks to more than 8 MB": Case(
        repeat(Answer(body=gzip.compress(bytes(9 * 1024**2)), headers={"content-encoding": "gzip"})),
        says="larger than 8,388,608",
    ),
    "The answer is too deep to be read": Case(repeat(Answer(body="[" * 100_000)), says="not a JSON object"),
    "The job is under way at the deadline": Case(
        repeat({"status": "processing"}),
        arguments=TWO_LOOKS,
        time_flies=True,
        says="2 status calls. It is paid for and goes on: prefect-nanogpt wait",
    ),
    "The job is finished at the last look": Case([{"status": "processing"}], arguments=TWO_LOOKS, time_flies=True),
    "The provider says nothing at the deadline": Case(
        repeat(Hang(60)),
        arguments={"timeout_seconds": 0.1},
        patch={"prefect_nanogpt.polling.LAST_LOOK_SECONDS": 5},
        says="1 status calls. It is paid for and goes on: prefect-nanogpt wait",
    ),
    "The audio host redirects": Case(audio=lambda url: [Redirect(url)]),
    "The audio host redirects in a circle": Case(audio=lambda url: repeat(Redirect(url)), says="more than 5 times"),
    "The audio host answers 403": Case(audio=repeat(Answer(403)), says="answered HTTP 403"),
    "The audio host answers 404": Case(audio=repeat(Answer(404)), says="answered HTTP 404"),
    "The audio host answers 503 once": Case(audio=[Answer(503)]),
    "The audio host is unreachable": Case(
        lambda finished: [finished | {"audioUrl": "http://127.0.0.1:1/speech.mp3"}], says="could not be read from 127.0"
    ),
    "The audio URL is not http": Case(
        lambda finished: [finished | {"audioUrl": "file:///etc/passwd"}], says="not http or https"
    ),
    "The audio host redirects to what is no URL": Case(
        audio=[Redirect("mailto:speech@audio.test")], says="not http or https"
    ),
    "The audio comes at less than 1 kB a second": Case(
        audio=[Slow(500)], patch={"prefect_nanogpt.connections.LEAST_BYTES_SECONDS": 0.5}
    ),
    "The audio is packed twice": Case(
        audio=repeat(Answer(body=b"ID3", headers={"content-encoding": "gzip, gzip"})), says="which was not asked for"
    ),
    "The audio is a web page": Case(audio=repeat(WEB_PAGE), says="a web page"),
    "The audio is JSON": Case(audio=repeat({"error": "expired"}), says="JSON"),
    "The audio is empty": Case(audio=repeat(Answer(headers={"content-type": "audio/mpeg"})), says="no bytes"),
    "The audio is a tag without sound": Case(audio=repeat(Answer(body=b"ID3\x04" + bytes(6))), says="a tag without"),
    "The audio ends before its header says": Case(audio=repeat(HALF), says="cut short: its header says"),
    "The audio ends before its header says once": Case(audio=[HALF]),
    "The audio is cut short once": Case(audio=[Cut(after_bytes=1000)]),
    "The audio is cut short on and on": Case(audio=repeat(Cut(after_bytes=1000)), says="could not be read"),
    "The audio is too large": Case(patch={"prefect_nanogpt.storage.LARGEST_AUDIO_BYTES": 1000}, says="1000 bytes"),
    "There is no API key": Case(arguments=NO_KEY, says="NanoGPT Credentials block named 'default'"),
    "The API key is blank": Case(arguments=NO_KEY, environment={"NANOGPT_API_KEY": " "}, says="set NANOGPT_API_KEY"),
    "The API key has a newline inside": Case(
        arguments={"credentials": NanoGPTCredentials(api_key=SecretStr(f"{API_KEY}\nnext"))}, says="no key has"
    ),
    "The base URL has no scheme": Case(
        arguments=NO_KEY,
        environment={"NANOGPT_API_KEY": API_KEY, "NANOGPT_BASE_URL": "nano-gpt.com/api"},
        says="not an http or https URL",
    ),
    "The API key is given as a dict": Case(arguments={"credentials": {"api_key": API_KEY}}, says="API key in clear"),
    "The folder cannot be written": Case(file_in_the_way=True, says="File exists"),
    "The folder is blank": Case(arguments={"save_to": " "}, says="save_to is empty"),
    "The run id is empty": Case(ticket={"runId": ""}, says="ticket.runId"),
    "The run id is a path": Case(ticket={"runId": "../../etc/passwd"}, says="ticket.runId"),
    "The timeout is negative": Case(arguments={"timeout_seconds": -1}, says="timeout_seconds"),
}


def test_every_documented_outcome_is_tested_and_every_tested_one_is_documented() -> None:
    cases = [row.case for row in documented_rows()]

    assert sorted(cases) == sorted(CASES)
    assert len(cases) == len(set(cases))


def fly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pauses between the looks pass at once."""
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("prefect_nanogpt.job.poll", partial(poll, clock=lambda: now, sleep=sleep))


Arrange = Callable[[Case], dict[str, Any]]


@pytest.fixture
def arrange(sandbox: Sandbox, save_to: str, monkeypatch: pytest.MonkeyPatch) -> Arrange:
    """Set a case up and give its ticket."""

    def arrange(case: Case) -> dict[str, Any]:
        ticket = sandbox.add_job()
        run_id = ticket["runId"]
        finished = sandbox.completed_body(run_id)
        sandbox.on_status(run_id, case.status(finished) if callable(case.status) else case.status)
        sandbox.on_audio(run_id, case.audio(finished["audioUrl"]) if callable(case.audio) else case.audio)
        if case.time_flies:
            fly(monkeypatch)
        for target, value in case.patch.items():
            monkeypatch.setattr(target, value)
        for variable, value in case.environment.items():
            monkeypatch.setenv(variable, value)
        if case.saved_before:
            Path(save_to).mkdir()
            (Path(save_to) / f"{run_id}.mp3").write_bytes(sandbox.audio_bytes(run_id))
        if case.file_in_the_way:
            Path(save_to).write_text("a file, not a folder")
        return {**ticket, **case.ticket}

    return arrange


@pytest.mark.parametrize("name", CASES)
async def test_the_outcome_is_as_documented_when(
    name: str, sandbox: Sandbox, arrange: Arrange, wait: Waiter, save_to: str
) -> None:
    case, row = CASES[name], ROWS[name]
    ticket = arrange(case)
    run_id = ticket["runId"]

    ended = await wait(ticket, **case.arguments)

    assert ended.state.name == row.state
    assert len(sandbox.requests("status")) == int(row.calls)
    assert len(sandbox.requests("audio")) == int(row.downloads)
    assert len(sandbox.requests()) == int(row.calls) + int(row.downloads)
    report = await ended.report()
    files = [path for path in Path(save_to).glob("*") if path.is_file()]
    if row.exception == "none":
        assert ended.state.is_completed()
        assert row.exit == "0"
        assert [file.read_bytes() for file in files] == [sandbox.audio_bytes(run_id)]
        assert ended.result.location == str(files[0])
        assert ended.result.polls == int(row.calls) - retries_in(sandbox) - case.given_up
        assert_report(report, row, "Speech ready", None)
        return
    assert ended.state.is_failed()
    assert files == []
    assert type(ended.result).__name__ == row.exception
    assert case.says in ended.state.message
    assert API_KEY not in ended.state.message
    if not isinstance(ended.result, NanoGPTError):
        assert (row.report, row.exit) == ("none", "2")
        assert report is None
        return
    assert row.exit == ("2" if row.state == "INVALID_CREDENTIALS" else "1")
    assert ended.result.code == row.state
    assert ended.result.ticket.run_id == run_id
    assert ended.state.message == str(ended.result)
    assert ended.state.message.startswith(f"{row.state}: ")
    assert_report(report, row, f"No speech: {row.state}", run_id)


@pytest.mark.parametrize(
    ("name", "noted"),
    [
        ("The job is finished", "saved"),
        ("The audio is already saved", "saved"),
        ("The job ends as failed", "failed"),
        ("The content is rejected by its code", "refused"),
        ("404 comes on and on", "lost"),
        ("401 comes", "open"),
        ("500 comes on and on", "open"),
        ("The job is under way at the deadline", "open"),
        ("The audio host redirects in a circle", "open"),
        ("The audio URL is not http", "open"),
        ("The audio is a web page", "open"),
        ("There is no API key", "open"),
    ],
)
async def test_only_the_provider_ends_a_job_in_the_ledger_when(
    name: str, noted: str, arrange: Arrange, wait: Waiter, sandbox: Sandbox, save_to: str
) -> None:
    ticket = arrange(CASES[name])

    await wait(ticket, **CASES[name].arguments)

    [entry] = Ledger(Destination(save_to)).entries().values()
    assert (entry.is_open, entry.is_saved, entry.over) == (
        noted == "open",
        noted == "saved",
        noted if noted not in ("open", "saved") else None,
    )


async def test_a_lost_job_is_asked_for_once_more_by_another_run(sandbox: Sandbox, wait: Waiter) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [Answer(404)] * 4)

    lost, found = await wait(ticket), await wait(ticket)

    assert (lost.state.name, found.state.name) == ("TTS_FAILED", "Completed")
    assert Path(found.result.location).read_bytes() == sandbox.audio_bytes(ticket["runId"])


def retries_in(sandbox: Sandbox) -> int:
    """Count the status calls that were answered with no status."""
    return sum(request.status != 200 for request in sandbox.requests("status"))


def assert_report(report: Artifact | None, row: Row, title: str, run_id: str | None) -> None:
    assert report is not None
    assert report.description == title
    assert row.report in (("resume", "closed") if run_id else ("ready",))
    assert ("## To get the audio" in str(report.data)) == (row.report == "resume")
    if run_id:
        assert ticket_in(report).run_id == run_id


def ticket_in(report: Artifact | None) -> Ticket:
    """Read the ticket that a report shows."""
    tokens, _ = rendered(report)
    [shown] = [token.content for token in tokens if token.type == "fence" and token.info == "json"]
    return Ticket.model_validate_json(shown)


# What the table has no room for


async def test_a_busy_provider_is_seen_in_prefect_as_retries_of_one_task_run(sandbox: Sandbox, wait: Waiter) -> None:
    ended = await wait(sandbox.add_job("[sandbox:busy 2]"))

    [look] = await ended.task_runs("poll")
    assert look.run_count == 3
    assert look.state_name == "Completed"


async def test_an_unreachable_audio_host_is_tried_four_times(sandbox: Sandbox, wait: Waiter, nowhere: str) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [{"status": "completed", "audioUrl": f"{nowhere}/speech.mp3"}])

    ended = await wait(ticket)

    [save] = await ended.task_runs("save")
    assert (save.run_count, save.state_name) == (4, "Failed")
    assert isinstance(ended.result, AudioError)
    assert ended.result.ticket.run_id == ticket["runId"]


async def test_a_provider_at_an_address_where_nobody_listens_is_tried_nine_times(
    sandbox: Sandbox, wait: Waiter, nowhere: str
) -> None:
    ended = await wait(
        sandbox.add_job(), credentials=NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url=f"{nowhere}/api")
    )

    [look] = await ended.task_runs("poll")
    assert look.run_count == 9
    assert ended.state.name == "PROVIDER_UNREACHABLE"


async def test_a_short_retry_after_is_waited_for(sandbox: Sandbox, wait: Waiter) -> None:
    ended = await wait(sandbox.add_job("[sandbox:throttle 1]"))

    first, second = sandbox.requests("status")
    assert ended.state.is_completed()
    assert second.received_at - first.received_at >= 1


async def test_an_unknown_word_and_each_queue_position_are_logged_once(sandbox: Sandbox, wait: Waiter) -> None:
    ticket = sandbox.add_job()
    warming = {"status": "warming_up"}
    sandbox.on_status(ticket["runId"], [pending(2), pending(2), pending(1), warming, warming, warming])

    logs = await (await wait(ticket)).logs()

    assert sum("'warming_up', which is not documented" in line for line in logs) == 1
    assert [line for line in logs if line.startswith("Queue position")] == ["Queue position 2.", "Queue position 1."]


async def test_the_task_runs_say_which_poll_they_are_and_where_the_job_was(sandbox: Sandbox, wait: Waiter) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [pending(3), pending(2)])

    polls = await (await wait(ticket)).task_runs("poll", runs=3)

    assert sorted(run.name for run in polls) == ["poll 1, queue 3", "poll 2, queue 2", "poll 3"]


async def test_a_run_has_one_artifact(sandbox: Sandbox, wait: Waiter) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [pending(3), pending(1)])

    [report] = await (await wait(ticket)).artifacts()

    assert (report.key, report.description) == ("tts-audio", "Speech ready")


async def test_the_report_of_a_run_that_waits_says_where_its_job_is(
    sandbox: Sandbox, wait: Waiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [pending(3), pending(2)])
    written: list[str] = []
    show = ReportArtifact.show

    async def keeping(self: ReportArtifact, data: str, *args: Any, **kwargs: Any) -> None:
        written.append(data)
        await show(self, data, *args, **kwargs)

    monkeypatch.setattr(ReportArtifact, "show", keeping)
    await wait(ticket)

    assert [re.findall("place ([0-9]) in the queue", report) for report in written] == [[], ["3"], ["2"], []]


async def test_the_log_has_no_line_of_a_step_that_has_just_ended_well(
    sandbox: Sandbox, wait: Waiter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    @task
    def of_somebody_else() -> None:
        pass

    await wait(sandbox.add_job())
    of_somebody_else()

    ends = [record for record in caplog.records if "Finished in state Completed()" in record.getMessage()]
    assert {getattr(record, "task_name", None) for record in ends if record.name == "prefect.task_runs"} == {
        "of_somebody_else"
    }


async def test_every_status_call_carries_what_the_refund_goes_by(sandbox: Sandbox, wait: Waiter) -> None:
    ticket = sandbox.add_job("[sandbox:reject]")
    sandbox.on_status(ticket["runId"], [pending(1), error(503, "Service unavailable")])

    await wait({**ticket, "cost": 0.0000504, "isApiRequest": False})

    sent = {
        "runId": ticket["runId"],
        "model": "Elevenlabs-Turbo-V2.5",
        "cost": "0.0000504",
        "paymentSource": "USD",
        "isApiRequest": "false",
    }
    assert [request.query for request in sandbox.requests("status")] == [sent] * 3
    assert len(sandbox.ledger.refunds) == 1


async def test_a_ticket_of_run_id_and_model_is_enough(sandbox: Sandbox, wait: Waiter) -> None:
    ticket = sandbox.add_job()

    ended = await wait({"runId": ticket["runId"], "model": ticket["model"]})

    assert ended.state.is_completed()
    assert sandbox.requests("status")[0].query == {
        "runId": ticket["runId"],
        "model": ticket["model"],
        "isApiRequest": "true",
    }


async def test_the_result_says_where_the_audio_is_and_how_it_came_about(sandbox: Sandbox, wait: Waiter) -> None:
    ticket = sandbox.add_job("[sandbox:busy 1] Hello.")

    audio: AudioFile = (await wait(ticket)).result

    assert audio.ticket == Ticket.model_validate(ticket)
    assert (audio.cost, audio.currency) == (audio.ticket.cost, "USD")
    assert audio.source_url == sandbox.completed_body(ticket["runId"])["audioUrl"]
    assert audio.size_bytes == len(sandbox.audio_bytes(ticket["runId"]))


async def test_a_second_run_for_a_ticket_asks_nobody_and_finds_the_file(sandbox: Sandbox, wait: Waiter) -> None:
    ticket = sandbox.add_job()
    first = await wait(ticket)
    asked = len(sandbox.requests())

    second = await wait(ticket, credentials=None)

    assert len(sandbox.requests()) == asked
    assert second.result.location == first.result.location
    assert second.result.sha256 == first.result.sha256


async def test_a_second_run_resumes_what_the_first_one_gave_up(
    sandbox: Sandbox, wait: Waiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    fly(monkeypatch)
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [{"status": "processing"}] * 2)
    first = await wait(ticket, **TWO_LOOKS)
    report = await first.report()

    second = await wait(ticket_in(report))

    assert first.state.name == "TTS_TIMEOUT"
    assert second.state.is_completed()


# Callers


@pytest.mark.parametrize(
    ("text", "expected", "code"),
    [
        ("[sandbox:reject]", ContentPolicyViolation, "CONTENT_POLICY_VIOLATION"),
        ("[sandbox:fail]", TTSJobRejected, "TTS_FAILED"),
        ("[sandbox:empty]", AudioError, "AUDIO_EMPTY"),
    ],
)
async def test_a_parent_flow_gets_the_typed_exception_with_code_and_ticket(
    text: str, expected: type[NanoGPTError], code: str, sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str
) -> None:
    ticket = sandbox.add_job(text)

    @flow
    async def pipeline() -> None:
        await wait_for_tts(ticket, save_to=save_to, credentials=credentials)

    with pytest.raises(expected, match=f"^{code}: ") as caught:
        await pipeline()

    assert type(caught.value) is expected
    assert caught.value.code == code
    assert caught.value.ticket == Ticket.model_validate(ticket)


async def test_a_poll_after_a_wait_is_not_numbered_as_one_of_it(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str
) -> None:
    ticket = Ticket.model_validate(sandbox.add_job())
    names: list[str] = []

    def note(_: Any, task_run: TaskRun, __: Any) -> None:
        names.append(task_run.name)

    @flow
    async def pipeline() -> None:
        await wait_for_tts(ticket, save_to=save_to, credentials=credentials)
        await get_tts_status.with_options(on_completion=[note])(ticket, credentials)

    await pipeline()
    assert names == ["poll"]


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in errors.__all__])
def test_an_error_survives_pickling(kind: type[NanoGPTError]) -> None:
    error = kind(
        "The words.",
        code="a code",
        retryable=True,
        ticket=Ticket(run_id="98b0d593", model="Elevenlabs-V3", cost="0.005"),
        http_status=429,
        request_id="r-1",
        retry_after_seconds=2.5,
    )

    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is kind
    assert str(copy) == str(error) == "A_CODE: The words."
    assert vars(copy) == vars(error)


# Retries of the flow


@pytest.fixture(params=["by itself", "under a parent"])
def retrying(request: pytest.FixtureRequest, wait: Waiter) -> Waiter:
    """A wait with two retries, as a run of its own and as a part of another one."""
    retrying_wait = wait_for_tts.with_options(retries=2, retry_delay_seconds=0)

    async def by_itself(ticket: Any) -> Wait:
        return await wait(ticket, flow=retrying_wait)

    async def under_a_parent(ticket: Any) -> Wait:
        @flow
        async def parent() -> list[Wait]:
            return [await by_itself(ticket)]

        [ended] = await parent()
        return ended

    return by_itself if request.param == "by itself" else under_a_parent


@pytest.mark.parametrize("text", ["[sandbox:reject]", "[sandbox:fail]"])
async def test_a_rejection_is_final_whatever_retries_the_flow_has(
    text: str, sandbox: Sandbox, retrying: Waiter
) -> None:
    ended = await retrying(sandbox.add_job(text))

    assert isinstance(ended.result, TTSJobRejected)
    assert ended.state.name == ended.result.code
    assert (await ended.flow_run()).run_count == 1
    assert len(sandbox.requests()) == 1


async def test_an_outage_is_retried_and_ends_in_the_named_state(sandbox: Sandbox, retrying: Waiter) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], repeat(Cut()))

    ended = await retrying(ticket)

    run = await ended.flow_run()
    assert (run.run_count, run.state_name) == (3, "PROVIDER_UNREACHABLE")
    assert isinstance(ended.result, ProviderError)
    assert len(sandbox.requests("status")) == 3 * 9


async def test_an_outage_that_ends_during_the_second_attempt_is_forgotten(sandbox: Sandbox, retrying: Waiter) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [Cut()] * 12)

    ended = await retrying(ticket)

    run = await ended.flow_run()
    assert (run.run_count, run.state_name) == (2, "Completed")
    assert Path(ended.result.location).read_bytes() == sandbox.audio_bytes(ticket["runId"])


@pytest.mark.parametrize(
    ("name", "attempts"),
    [
        ("401 comes", 1),
        ("429 comes for a daily cap", 1),
        ("429 comes with a Retry-After above 60 s", 1),
        ("The audio host redirects in a circle", 1),
        ("The audio is too large", 1),
        ("The folder cannot be written", 1),
        ("The API key has a newline inside", 1),
        ("404 comes on and on", 2),
        ("500 comes on and on", 2),
        ("A web page comes with 200", 2),
        ("The job is under way at the deadline", 2),
        ("The audio host answers 403", 2),
        ("The audio is a web page", 2),
    ],
)
async def test_a_retry_of_the_flow_is_made_where_it_may_help_when(
    name: str, attempts: int, arrange: Arrange, wait: Waiter
) -> None:
    case = CASES[name]
    ticket = arrange(case)

    ended = await wait(ticket, flow=wait_for_tts.with_options(retries=1, retry_delay_seconds=0), **case.arguments)

    run = await ended.flow_run()
    assert (run.run_count, run.state_name) == (attempts, ROWS[name].state)


# Credentials


def keys_seen(sandbox: Sandbox) -> set[str]:
    return {request.headers["x-api-key"] for request in sandbox.requests("status")}


@pytest.fixture
async def saved_block(sandbox: Sandbox) -> Any:
    block = NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url=sandbox.base_url)
    await block.save("default", overwrite=True)
    yield block
    await NanoGPTCredentials.adelete("default")


async def test_the_environment_gives_the_key_and_the_address(
    sandbox: Sandbox, wait: Waiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_API_KEY", " the-key-of-the-environment\n")
    monkeypatch.setenv("NANOGPT_BASE_URL", f"{sandbox.base_url}/")

    ended = await wait(sandbox.add_job(), credentials=None)

    assert ended.state.is_completed()
    assert keys_seen(sandbox) == {"the-key-of-the-environment"}


async def test_the_saved_block_gives_them_where_the_environment_does_not(
    sandbox: Sandbox, wait: Waiter, saved_block: NanoGPTCredentials
) -> None:
    ended = await wait(sandbox.add_job(), credentials=None)

    assert ended.state.is_completed()
    assert keys_seen(sandbox) == {API_KEY}


async def test_the_environment_wins_over_the_saved_block_and_what_is_given_wins_over_both(
    sandbox: Sandbox, wait: Waiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = NanoGPTCredentials(api_key=SecretStr("the-key-of-the-block"), base_url="http://127.0.0.1:1/api")
    await block.save("default", overwrite=True)
    monkeypatch.setenv("NANOGPT_API_KEY", "the-key-of-the-environment")
    monkeypatch.setenv("NANOGPT_BASE_URL", sandbox.base_url)
    given = NanoGPTCredentials(api_key=SecretStr("the-key-that-was-given"), base_url=sandbox.base_url)
    try:
        first = await wait(sandbox.add_job(), credentials=None)
        assert (first.state.name, keys_seen(sandbox)) == ("Completed", {"the-key-of-the-environment"})

        await wait(sandbox.add_job(), credentials=given)
        assert keys_seen(sandbox) == {"the-key-of-the-environment", "the-key-that-was-given"}
    finally:
        await NanoGPTCredentials.adelete("default")

    assert f"Asking {sandbox.base_url}, with the key from the environment variable NANOGPT_API_KEY." in (
        await first.logs()
    )


async def test_the_audio_host_gets_no_key_and_no_cookie(sandbox: Sandbox, wait: Waiter) -> None:
    ticket = sandbox.add_job()
    url = sandbox.completed_body(ticket["runId"])["audioUrl"]
    cookie = {"set-cookie": "tracked=yes; Path=/"}
    sandbox.on_audio(
        ticket["runId"], [Answer(302, headers={"location": url, **cookie}), Answer(503, headers=cookie), None]
    )

    ended = await wait(ticket)

    downloads = sandbox.requests("audio")
    assert ended.state.is_completed()
    assert len(downloads) == 3
    for download in downloads:
        assert set(download.headers) == {"host", "accept", "accept-encoding", "connection", "user-agent"}
    assert API_KEY not in str(downloads)


async def test_the_api_key_is_found_nowhere_after_a_good_and_a_bad_run(
    sandbox: Sandbox,
    wait: Waiter,
    saved_block: NanoGPTCredentials,
    save_to: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG")
    good = await wait(sandbox.add_job("Hello [sandbox:busy 1]"))
    rejected = await wait(sandbox.add_job("[sandbox:reject]"), credentials=None)
    broken = await wait(sandbox.add_job("[sandbox:gone]"))
    waits = [good, rejected, broken]

    async def all_logs() -> str | None:
        logs = [await ended.logs() for ended in waits]
        return str(logs) if all(any("Finished in state" in line for line in lines) for lines in logs) else None

    prefect_logs = await eventually(all_logs)
    database = Path(urlsplit(PREFECT_SERVER_DATABASE_CONNECTION_URL.value()).path.replace("//", "/"))

    async def all_events() -> bytes | None:
        content = b"".join(path.read_bytes() for path in database.parent.glob(f"{database.name}*"))
        return content if b"nanogpt.tts.rejected" in content else None

    stored = {database: await eventually(all_events)}
    artifacts = [await ended.artifacts() for ended in waits]
    tasks = [await ended.task_runs("poll") for ended in waits]
    output = capfd.readouterr()
    stored |= {path: path.read_bytes() for path in PREFECT_HOME.value().rglob("*") if path.is_file()}

    assert [ended.state.name for ended in waits] == ["Completed", "CONTENT_POLICY_VIOLATION", "AUDIO_UNAVAILABLE"]
    assert keys_seen(sandbox) == {API_KEY}
    assert str(good.flow_run_id).encode() in stored[database], "this is not the database"
    assert good.result.ticket.run_id in prefect_logs + output.err
    places = {
        "logs": prefect_logs,
        "artifacts": str([artifact.model_dump() for found in artifacts for artifact in found]),
        "states": str([(ended.state.model_dump(), repr(ended.result)) for ended in waits]),
        "flow runs": str([(await ended.flow_run()).model_dump() for ended in waits]),
        "task runs": str([run.model_dump() for found in tasks for run in found]),
        "output": output.out + output.err,
        "log records": caplog.text,
        "audio host": str(sandbox.requests("audio")),
        "error": repr(pickle.dumps([rejected.result, broken.result])),
    }
    assert [place for place, content in places.items() if API_KEY in content] == []
    assert [path for path, content in stored.items() if API_KEY.encode() in content] == []


# The provider's words

EVIL = "| <img src=x onerror=alert(1)> | [click](javascript:alert(1)) | ` \\` ``` **bold** # x"


@pytest.mark.parametrize(
    "ticket",
    [{}, {"paymentSource": EVIL}, {"model": EVIL}],
    ids=["in the message", "in the payment source", "in the model"],
)
async def test_the_providers_words_stay_words_in_the_report(
    ticket: dict[str, Any], sandbox: Sandbox, wait: Waiter
) -> None:
    job = sandbox.add_job(run_id="a`|<b>**x**[y](http://z)```")
    message = f"\n```\n\n# Heading\n\n| a | b |\n|---|---|\n{EVIL}"
    sandbox.on_status(job["runId"], [Answer(400, {"error": message}, headers={"x-request-id": "<b>`|1"})])

    report = await (await wait({**job, **ticket})).report()

    tokens, inline = rendered(report)
    assert {token.type for token in [*tokens, *inline]}.isdisjoint(
        {"html_block", "html_inline", "link_open", "image", "strong_open"}
    )
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2"]
    assert [token.info for token in tokens if token.type == "fence"] == ["json", "sh"]
    rows = re.findall(r"^\| (\w[\w ]*) \|", str(report.data), re.MULTILINE)
    assert rows == ["Code", "Reason", "HTTP status", "Request id", "Model", "Run id", "Cost"]
    assert sum(token.type == "tr_open" for token in tokens) == 1 + len(rows)
    assert "<img src=x onerror=alert(1)>" in "".join(child.content for child in inline)


async def test_the_providers_words_stay_words_in_the_report_of_saved_audio(sandbox: Sandbox, wait: Waiter) -> None:
    job = sandbox.add_job(run_id="plain")
    url = sandbox.completed_body("plain")["audioUrl"]
    sandbox.on_status("plain", [{"status": "completed", "audioUrl": f"{url}?a=)|`<b>"}])

    report = await (await wait({**job, "paymentSource": EVIL})).report()

    tokens, inline = rendered(report)
    links = [child.attrs["href"] for child in inline if child.type == "link_open"]
    assert links[2:] == [f"{url}?a=%29%7C%60%3Cb%3E"]  # after those to hear it and to keep it
    assert {token.type for token in [*tokens, *inline]}.isdisjoint({"html_block", "html_inline", "strong_open"})
    assert "<img src=x onerror=alert(1)>" in "".join(child.content for child in inline)


def rendered(report: Artifact | None) -> tuple[list[Token], list[Token]]:
    """Render a report as a page would be: its blocks, and what is in their text."""
    assert report is not None
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(str(report.data))
    return tokens, [child for token in tokens for child in token.children or ()]
