"""Settings and parameters that cannot be meant: each is refused with a word, before anything is sent or stored."""

import asyncio
import json
import logging
from base64 import b64encode
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter
from prefect.client.schemas.objects import FlowRun, State
from prefect.flow_engine import run_flow
from prefect.runtime import flow_run as runtime
from pydantic import SecretStr, ValidationError

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.client import NanoGPTClient, problem_with_base_url
from prefect_nanogpt.credentials import find_credentials
from prefect_nanogpt.errors import CredentialsError, NanoGPTError, ProviderError
from prefect_nanogpt.flows import collect_open_tickets, text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.flows.batch import _Batch
from prefect_nanogpt.ledger import Ledger
from prefect_nanogpt.lines import ManifestRow
from prefect_nanogpt.models import Completed, PollSchedule, Ticket, TTSRequest
from prefect_nanogpt.sandbox import Answer, Sandbox
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks import get_tts_status, save_audio, submit_tts
from prefect_nanogpt.tasks.ledgers import open_ledger
from tests.conftest import API_KEY
from tests.test_collect import rows_of

LINES = [{"id": name, "text": f"Line {name}."} for name in ("one", "two", "three", "four", "five")]


async def run_of(state: State[Any]) -> FlowRun:
    assert state.state_details.flow_run_id
    async with get_client() as client:
        return await client.read_flow_run(state.state_details.flow_run_id)


# Parameters


@pytest.mark.parametrize(
    "odd",
    [
        *({"timeout_seconds": seconds} for seconds in (0, -1, float("nan"), float("inf"), 30 * 86_400 + 1, 1e300)),
        *({"max_cost": cost} for cost in (-1, float("nan"), float("inf"), "1e1000000", "1e-1000000", 10**10)),
        *({"take": take} for take in (0, -1, 2**31, 10**400)),
        *({"poll": {"max_seconds": seconds}} for seconds in (float("nan"), float("inf"), 1e300)),
        *({"poll": {"growth": growth}} for growth in (-1, float("inf"), float("nan"))),
    ],
    ids=lambda odd: str(odd)[:40],
)
async def test_a_number_that_cannot_be_meant_is_refused(odd: dict[str, Any], sandbox: Sandbox, save_to: str) -> None:
    credentials = NanoGPTCredentials(api_key=API_KEY, base_url=sandbox.base_url)  # type: ignore[arg-type]

    state = await text_to_speech("Hello.", save_to=save_to, credentials=credentials, return_state=True, **odd)

    assert state.is_failed()
    assert next(iter(odd)) in str(state.message)
    assert sandbox.requests() == []


@pytest.mark.parametrize("rate", [0, 0.009, 25.1, float("nan"), float("inf"), -1])
async def test_a_rate_that_the_provider_does_not_allow_is_refused(rate: float, save_to: str) -> None:
    state = await text_to_speech_batch(LINES, save_to=save_to, requests_per_second=rate, return_state=True)

    assert "requests_per_second" in str(state.message)


async def test_a_number_that_cannot_be_stored_spoils_no_list_of_runs() -> None:
    for odd in (float("nan"), float("inf"), 10**400):
        await collect_open_tickets(lookback_days=odd, return_state=True)

    async with get_client() as client:
        flows = FlowFilter(name={"any_": ["collect-open-tickets"]})  # type: ignore[arg-type]
        runs = await client.read_flow_runs(flow_filter=flows, limit=3)
    assert len(runs) == 3


@pytest.mark.parametrize("days", [0, -1, float("inf"), 1e300])
async def test_a_look_back_that_no_calendar_has_is_refused(days: float) -> None:
    state = await collect_open_tickets(lookback_days=days, return_state=True)

    assert "lookback_days" in str(state.message)


@pytest.mark.parametrize(
    "odd",
    [{"max_cost": Decimal("NaN")}, {"max_cost": "much"}, {"max_cost": Decimal(-1)}, {"take": 0}, {"take": "two"}],
    ids=str,
)
async def test_the_task_refuses_what_the_flow_refuses(
    odd: dict[str, Any], sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str
) -> None:
    with pytest.raises(NanoGPTError, match="INVALID_REQUEST: take or max_cost"):
        await submit_tts(TTSRequest(text="Hello."), save_to, credentials, **odd)

    assert sandbox.requests() == []


@pytest.mark.parametrize("text", ["half \ud83d of it", "nul\0 in it"], ids=ascii)
@pytest.mark.parametrize("where", ["text", "voice", "model", "option", "name of an option"])
async def test_what_cannot_be_sent_is_refused_with_a_word(
    text: str, where: str, sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str
) -> None:
    given: dict[str, Any] = {
        "text": {"text": text},
        "voice": {"voice": text},
        "model": {"model": text},
        "option": {"options": {"mood": {"deep": [text]}}},
        "name of an option": {"options": {text: 1}},
    }[where]

    state = await text_to_speech(
        **{"text": "Hello.", **given}, save_to=save_to, credentials=credentials, return_state=True
    )

    assert state.name == "INVALID_REQUEST"
    assert any(
        word in str(state.message) for word in ("half a character", "zero byte", "single line", "unicode string")
    )
    assert sandbox.requests() == []


def test_an_option_that_is_too_deep_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]

    with pytest.raises(ValidationError, match="mood"):
        TTSRequest.model_validate({"text": "Hello.", "mood": deep})


def test_a_backslash_before_a_u_is_no_zero_byte() -> None:
    assert TTSRequest(text="\\u0000", voice="a\\\\u0000b").voice == "a\\\\u0000b"


@pytest.mark.parametrize(
    "model", ["x" * 201, "x" * 300_000, "two\nlines", "\x1b[2J"], ids=lambda model: repr(model)[:9]
)
def test_a_model_is_one_short_line(model: str) -> None:
    with pytest.raises(ValidationError, match="single line"):
        TTSRequest(text="Hello.", model=model)
    with pytest.raises(ValidationError, match="single line"):
        Ticket(run_id="98b0", model=model)


# Places


@pytest.mark.parametrize("has_ledger", [False, True], ids=["ledger beside", "ledger elsewhere"])
@pytest.mark.parametrize(
    "save_to",
    [
        *("http://127.0.0.1:1/x", "https://127.0.0.1:1/x", "data:audio/wav,x", "data://x", "zip:///nowhere/x.zip"),
        *(
            "zip://a::/nowhere/x.zip",
            "ftp://127.0.0.1:1/x",
            "webhdfs://127.0.0.1:1/x",
            "C:\\audio",
            "\\\\server\\audio",
        ),
        *("s3:bucket", "nosuch://x", "reference://x", "simplecache::memory://x", "remote-file-system/nosuch"),
    ],
)
async def test_a_place_that_cannot_be_written_is_refused_before_anything_is_paid(
    save_to: str,
    has_ledger: bool,
    sandbox: Sandbox,
    credentials: NanoGPTCredentials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if has_ledger:
        monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path))
    flows: list[Any] = [text_to_speech("Hello.", save_to=save_to, credentials=credentials, return_state=True)]
    flows += [text_to_speech_batch(LINES, save_to=save_to, credentials=credentials, return_state=True)]

    for call in flows:
        state = await call
        assert state.name == "STORAGE_FAILED"
        assert isinstance(await state.aresult(raise_on_failure=False), NanoGPTError)
    assert sandbox.requests() == []


async def test_many_who_prove_a_place_at_once_do_not_disturb_each_other(
    credentials: NanoGPTCredentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path))
    theirs = Destination("memory://proven")
    theirs.write("probe", b"a file of somebody's own")

    await asyncio.gather(*(open_ledger("memory://proven", credentials) for _ in range(20)))

    assert theirs.read("probe") == b"a file of somebody's own"
    assert list(theirs.list_files()) == ["probe"]


async def test_a_place_that_takes_what_it_does_not_give_back_is_refused(
    sandbox: Sandbox, credentials: NanoGPTCredentials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_LEDGER", str(tmp_path))
    monkeypatch.setattr(Destination, "read", lambda self, name: None)

    state = await text_to_speech("Hello.", save_to="memory://hole", credentials=credentials, return_state=True)

    assert state.name == "STORAGE_FAILED"
    assert "does not show what is written to it" in str(state.message)
    assert sandbox.requests() == []


# Credentials


@pytest.mark.parametrize(
    "base_url",
    [
        *(
            "nano-gpt.com/api",
            "ftp://nano-gpt.com",
            "https://",
            "https:///api",
            "https://nano gpt.com",
            "https://a:99999",
        ),
        *("https://a:0", "https://[::1", f"https://{'a' * 70}.com", "https://xn--a/", "mailto:a@b", "https://\ud800/"),
    ],
    ids=lambda url: ascii(url)[:20],
)
async def test_an_address_that_is_none_is_an_error_wherever_it_is_given(
    base_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "not an http or https URL" in str(problem_with_base_url(base_url))
    with pytest.raises(CredentialsError) as of_the_client:
        NanoGPTClient(API_KEY, base_url)
    with pytest.raises(ValidationError):
        NanoGPTCredentials(api_key=API_KEY, base_url=base_url)  # type: ignore[arg-type]
    if "\ud800" not in base_url:
        monkeypatch.setenv("NANOGPT_BASE_URL", base_url)
        monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
        with pytest.raises(CredentialsError) as of_the_environment:
            await find_credentials()
        assert of_the_environment.value.code == "INVALID_CREDENTIALS"
    assert of_the_client.value.code == "INVALID_CREDENTIALS"


def test_an_address_is_named_without_its_login() -> None:
    with pytest.raises(CredentialsError) as caught:
        NanoGPTClient(API_KEY, "https://speaker:secret@a:99999/api")

    assert "speaker" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("login", ["proxy:123/abc", "u:12#4pw", "u:p@ss/word", "evil.example/:x", "u:100%41", "u:p?x"])
async def test_the_login_of_an_address_is_a_login_whatever_characters_it_has(login: str, sandbox: Sandbox) -> None:
    block = NanoGPTCredentials(api_key=API_KEY, base_url=sandbox.base_url, base_url_login=login)  # type: ignore[arg-type]

    async with block.get_client() as client:
        await client.submit(TTSRequest(text="Hello."))

    [request] = sandbox.requests("submit")
    assert request.headers["authorization"] == f"Basic {b64encode(login.encode()).decode()}"
    assert client.base_url == block.base_url == sandbox.base_url


def test_only_the_login_of_the_address_itself_is_moved() -> None:
    block = NanoGPTCredentials(
        api_key=API_KEY,  # type: ignore[arg-type]
        base_url="https://me:p%2Fw@Gateway.Corp:443/api?u=http://a:pw@c",
        ledger="ftp://speaker:secret@host/x",
    )

    assert block.base_url == "https://gateway.corp/api?u=http://a:pw@c"
    assert block.base_url_login == SecretStr("me:p/w")
    assert (block.ledger, block.ledger_login) == ("ftp://host/x", SecretStr("speaker:secret"))


@pytest.mark.parametrize("source", ["environment", "block", "parameter"])
async def test_a_key_with_odd_characters_names_where_it_is_from(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = f"{API_KEY}\nX-Injected: yes"
    if source == "environment":
        monkeypatch.setenv("NANOGPT_API_KEY", odd)
        credentials = await find_credentials()
    else:
        credentials = NanoGPTCredentials(api_key=odd)  # type: ignore[arg-type]
    if source == "block":
        await credentials.save("odd-key", overwrite=True)
        credentials = await NanoGPTCredentials.aload("odd-key")

    with pytest.raises(CredentialsError) as caught:
        credentials.get_client()

    named = {"environment": "NANOGPT_API_KEY", "block": "nanogpt-credentials/odd-key", "parameter": "`credentials`"}
    assert named[source] in str(caught.value)
    assert caught.value.code == "INVALID_CREDENTIALS"
    assert API_KEY not in str(caught.value)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "gopher://127.0.0.1:1", "http://127.0.0.1:port"])
def test_a_proxy_that_cannot_be_used_is_named_as_that(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)

    with pytest.raises(ProviderError, match="The proxy that the environment names, or its NO_PROXY, cannot be used"):
        NanoGPTClient(API_KEY)


# A key in clear


def in_clear(sandbox: Sandbox) -> list[Any]:
    return [{"api_key": API_KEY, "base_url": sandbox.base_url}, API_KEY, {"apikey": API_KEY}]


@pytest.mark.parametrize("form", [0, 1, 2], ids=["dict", "text", "misspelt"])
@pytest.mark.parametrize(
    ("called", "arguments"),
    [
        (text_to_speech, {"text": "Hello."}),
        (text_to_speech_batch, {"lines": LINES}),
        (wait_for_tts, {"ticket": {"runId": "98b0", "model": "m"}}),
        (collect_open_tickets, {}),
        (text_to_speech.with_options(name="another", retries=1), {"text": "Hello."}),
    ],
    ids=["text", "batch", "wait", "collect", "with options"],
)
async def test_a_key_in_clear_is_refused_and_not_stored(
    called: Any, arguments: dict[str, Any], form: int, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    state = await called(**arguments, credentials=in_clear(sandbox)[form], return_state=True)

    run = await run_of(state)
    assert "NanoGPTCredentials.load" in str(state.message)
    assert "credentials" in run.parameters
    assert API_KEY not in run.model_dump_json() + str(state.message) + caplog.text
    assert sandbox.requests() == []


async def test_a_key_in_clear_that_the_api_has_stored_is_taken_out_again(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = {"text": "Hello.", "credentials": in_clear(sandbox)[0]}
    async with get_client() as client:
        run = await client.create_flow_run(flow(name="as the API stores it")(lambda: None), parameters=parameters)
        monkeypatch.setattr(runtime, "id", str(run.id), raising=False)

        with pytest.raises(Exception, match="an API key in clear"):
            text_to_speech.validate_parameters(parameters)

        stored = (await client.read_flow_run(run.id)).parameters
    assert stored["text"] == "Hello."
    assert stored["credentials"] == {"api_key": "********", "base_url": "********"}


async def test_a_task_refuses_a_key_in_clear_too(sandbox: Sandbox, save_to: str) -> None:
    for credentials in in_clear(sandbox):
        with pytest.raises(CredentialsError, match="in clear"):
            await get_tts_status(Ticket(run_id="98b0", model="m"), credentials)
        with pytest.raises(CredentialsError, match="in clear"):
            await submit_tts(TTSRequest(text="Hello."), save_to, credentials)
    assert sandbox.requests() == []


async def test_a_block_is_stored_without_its_key_and_works(
    credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule
) -> None:
    state = await text_to_speech("Hello.", save_to=save_to, credentials=credentials, poll=quick, return_state=True)

    assert state.is_completed()
    assert API_KEY not in (await run_of(state)).model_dump_json()


# A block by its name


@pytest.fixture
async def studio(credentials: NanoGPTCredentials) -> str:
    """Save the credentials as a block, and give its name."""
    await credentials.save("studio-2", overwrite=True)
    return "studio-2"


@pytest.mark.parametrize("prefix", ["", "nanogpt-credentials/"], ids=["by name", "with its type"])
async def test_a_block_is_found_by_its_name_in_flows_and_tasks(
    prefix: str, studio: str, save_to: str, sandbox: Sandbox, quick: PollSchedule
) -> None:
    name = prefix + studio

    audio = await text_to_speech("Hello.", save_to=save_to, credentials=name, poll=quick)
    rows = await text_to_speech_batch(LINES[:1], save_to=Path(save_to), credentials=name, poll=quick)
    collected = rows_of(await collect_open_tickets(credentials=name, folders=[Path(save_to)]), sandbox)
    ticket = Ticket.model_validate(sandbox.add_job("By name."))
    waited = await wait_for_tts(ticket, Path(save_to), credentials=name, poll=quick, name="named")
    status = await get_tts_status(ticket, name)

    assert (audio.ticket is not None, rows[0].is_completed, collected) == (True, True, [])
    assert waited.location == str(Path(save_to, "named.mp3"))
    assert isinstance(status, Completed)


@pytest.mark.parametrize(
    "key",
    [
        "sk-nano-1",
        "2f1b3c4d-5e6f-4a7b-8c9d-0e1f2a3b4c5d",
        "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
        "a1b2c3d4e5f6",
        "abcdefghijklmnopqrstuvwxyz",
        "Studio",
        "nanogpt-credentials/Sk_1",
        "nanogpt-credentials/sk-nano-0a1b2c3d",
    ],
)
async def test_what_may_be_a_key_is_taken_for_one(key: str, sandbox: Sandbox, save_to: str) -> None:
    state = await text_to_speech("Hello.", save_to=save_to, credentials=key, return_state=True)

    assert "API key in clear" in str(state.message)
    assert key not in (await run_of(state)).model_dump_json()


async def test_a_name_of_no_block_is_neither_repeated_nor_kept(save_to: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    state = await text_to_speech("Hello.", save_to=save_to, credentials="quiet-otter", return_state=True)

    run = await run_of(state)
    assert "there is no saved block" in str(state.message)
    assert run.parameters["credentials"] == "********"
    assert "quiet-otter" not in run.model_dump_json()
    wrong = await text_to_speech("Hello.", save_to=save_to, credentials="quiet-otter", take=0, return_state=True)
    assert "take" in str(wrong.message)
    # What looks the block up has the name in the path of its request.
    said = [record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))]
    assert [line for line in said if "quiet-otter" in line] == []


async def test_a_name_of_no_block_is_not_kept_in_what_a_form_has_either(save_to: str) -> None:
    parameters = {"text": "Hello.", "save_to": save_to, "advanced": {"credentials": "quiet-otter", "take": 2}}
    async with get_client() as client:
        run = await client.create_flow_run(text_to_speech, parameters=parameters)
        await run_flow(text_to_speech, flow_run=run, return_type="state")  # type: ignore[misc]
        stored = await client.read_flow_run(run.id)

    assert stored.state_name == "INVALID_CREDENTIALS"
    assert stored.parameters["advanced"] == {"credentials": "********", "take": 2}


async def test_a_block_that_is_named_with_its_type_and_is_not_there_is_named(save_to: str) -> None:
    name = "nanogpt-credentials/of-nobody"
    state = await text_to_speech("Hello.", save_to=save_to, credentials=name, return_state=True)
    assert f"there is no saved block {name}" in str(state.message)


async def test_a_folder_that_ends_like_audio_is_refused_before_anything_is_paid(
    credentials: NanoGPTCredentials, sandbox: Sandbox, tmp_path: Path
) -> None:
    place = tmp_path / "hello.mp3"
    with pytest.raises(NanoGPTError, match="as `name`"):
        await text_to_speech("Hello.", save_to=place, credentials=credentials)
    with pytest.raises(NanoGPTError, match="as `name`"):
        await text_to_speech_batch(LINES, save_to=place, credentials=credentials)
    with pytest.raises(NanoGPTError, match="as `name`"):
        await wait_for_tts(Ticket(run_id="98b0", model="m"), place, credentials=credentials)
    with pytest.raises(NanoGPTError, match="as `name`"):
        await collect_open_tickets(credentials=credentials, folders=[place])
    with pytest.raises(NanoGPTError, match="as `name`"):
        await submit_tts(TTSRequest(text="Hello."), place, credentials)
    with pytest.raises(NanoGPTError, match="as `name`"):
        await save_audio(Completed(audio_url="https://host/hello.mp3"), "hello", place, credentials)
    assert sandbox.requests() == []


async def test_a_batch_may_be_partial_where_that_is_allowed(
    credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule
) -> None:
    lines = [LINES[0], {"id": "bad", "text": "[sandbox:reject] Never."}]
    state = await text_to_speech_batch(
        lines, save_to=save_to, credentials=credentials, poll=quick, allow_partial=True, return_state=True
    )
    assert state.is_completed()
    assert "1 of 2 lines have no audio: 1 CONTENT_POLICY_VIOLATION" in str(state.message)
    assert [row.outcome for row in await state.aresult()] == ["completed", "CONTENT_POLICY_VIOLATION"]


async def test_what_may_go_better_is_tried_again_before_a_batch_is_partial(
    credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule, sandbox: Sandbox
) -> None:
    lines = [{"id": "bad", "text": "[sandbox:fail] Not today."}]
    persistent = text_to_speech_batch.with_options(retries=2)
    rows = await persistent(lines, save_to=save_to, credentials=credentials, poll=quick, allow_partial=True)
    assert [row.outcome for row in rows] == ["TTS_FAILED"]
    assert len(sandbox.ledger.charges) == 3


@pytest.mark.parametrize("answer", [Answer(401, {"error": "no"}), Answer(402, {"error": "empty"})])
async def test_a_batch_that_the_account_has_stopped_is_no_partial_success(
    answer: Answer, credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule, sandbox: Sandbox
) -> None:
    sandbox.on_submit([None, answer, answer])
    lines = [{"id": str(number), "text": f"Line {number}."} for number in range(3)]
    state = await text_to_speech_batch(
        lines,
        save_to=save_to,
        credentials=credentials,
        poll=quick,
        allow_partial=True,
        max_in_flight=1,
        return_state=True,
    )
    assert state.name == "TTS_BATCH_PARTIAL"


# What is only to look at


async def test_no_report_progress_or_event_that_fails_ends_a_run(
    sandbox: Sandbox,
    credentials: NanoGPTCredentials,
    save_to: str,
    quick: PollSchedule,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("a fault in here")

    monkeypatch.setattr("prefect_nanogpt.report._code", fails)
    monkeypatch.setattr("prefect_nanogpt.report.escaped", fails)
    monkeypatch.setattr("prefect_nanogpt.report.draw_waveform", fails)
    monkeypatch.setattr("prefect_nanogpt.flows.batch._charged", fails)
    monkeypatch.setattr("prefect_nanogpt.events.emit_event", fails)
    monkeypatch.setattr("prefect_nanogpt.report.draw_steps", fails)
    sandbox.on_status(None, [{"status": "pending", "queuePosition": 1}])
    given: dict[str, Any] = {"save_to": save_to, "credentials": credentials, "poll": quick, "return_state": True}

    states = [await text_to_speech("Hello.", **given), await text_to_speech_batch(LINES, **given)]
    sandbox.on_status(None, [{"status": "failed"}])
    states.append(await text_to_speech("No.", **given))

    assert [state.name for state in states] == ["Completed", "Completed", "TTS_FAILED"]
    assert "ZeroDivisionError: a fault in here" in caplog.text


async def test_a_line_whose_row_cannot_be_made_stops_no_other(
    sandbox: Sandbox,
    credentials: NanoGPTCredentials,
    save_to: str,
    quick: PollSchedule,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tell = _Batch._tell

    async def fails(self: _Batch, index: int, end: Any) -> ManifestRow:
        if self.lines[index].id == "three":
            raise UnicodeEncodeError("utf-8", "\ud800", 0, 1, "a fault in here")
        return await tell(self, index, end)

    monkeypatch.setattr(_Batch, "_tell", fails)
    given: dict[str, Any] = {"save_to": save_to, "credentials": credentials, "poll": quick, "return_state": True}

    state = await text_to_speech_batch(LINES, **given)
    monkeypatch.undo()
    again = await text_to_speech_batch(LINES, **given)

    assert (state.name, again.name) == ("TTS_BATCH_PARTIAL", "Completed")
    rows = (await state.aresult(raise_on_failure=False)).rows
    assert [row.outcome for row in rows] == [*["completed"] * 2, "UNEXPECTED_ERROR", *["completed"] * 2]
    assert len(sandbox.ledger.charges) == len(LINES)


async def test_half_a_character_in_what_is_kept_ends_nothing(tmp_path: Path) -> None:
    ledger = Ledger(Destination(str(tmp_path)))
    error = NanoGPTError("half \ud83d of it")

    assert ledger.note_over("0" * 32, 1, "failed", error)

    [note] = tmp_path.glob(".nanogpt/*.over-failed.json")
    assert json.loads(note.read_bytes())["message"] == "half \ud83d of it"
