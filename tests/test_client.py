"""The client against the sandbox: every answer that is documented or was seen, and every way to get none."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from prefect_nanogpt.client import NanoGPTClient, in_own_thread
from prefect_nanogpt.errors import (
    AudioError,
    ContentPolicyViolation,
    CredentialsError,
    NanoGPTError,
    NothingSent,
    ProviderError,
    SubmissionUncertain,
)
from prefect_nanogpt.models import AudioContent, Completed, Submission, Ticket, TTSRequest
from prefect_nanogpt.sandbox import Accept, Answer, Cut, Hang, Redirect, Sandbox
from tests.conftest import API_KEY

pytestmark = pytest.mark.usefixtures("transport")
MODEL = "Elevenlabs-Turbo-V2.5"
REQUEST = TTSRequest(text="Hello there.", model=MODEL, voice="Rachel", speed=1.1)
WEB_PAGE = Answer(body="<!doctype html><title>Hello</title>", headers={"content-type": "text/html; charset=utf-8"})


@pytest.fixture
async def client(sandbox: Sandbox) -> AsyncIterator[NanoGPTClient]:
    async with NanoGPTClient(API_KEY, sandbox.base_url) as client:
        yield client


@pytest.fixture
async def secure_client() -> AsyncIterator[NanoGPTClient]:
    """A client of an https API, for which the rules about audio hosts are strict."""
    async with NanoGPTClient(API_KEY, "https://nano-gpt.test/api") as client:
        yield client


async def error_of_submission(client: NanoGPTClient, request: TTSRequest = REQUEST) -> NanoGPTError:
    with pytest.raises(NanoGPTError) as caught:
        await client.submit(request)
    return caught.value


async def error_of_status(client: NanoGPTClient, sandbox: Sandbox, answer: Any) -> NanoGPTError:
    sandbox.on_status("98b0", [answer])
    with pytest.raises(NanoGPTError) as caught:
        await client.status(Ticket(run_id="98b0", model=MODEL))
    return caught.value


async def error_of_download(client: NanoGPTClient, url: str) -> NanoGPTError:
    with pytest.raises(NanoGPTError) as caught:
        async with client.download(url) as response:
            await response.aread()
    return caught.value


# Submitting: what is accepted


async def test_a_submission_is_one_request_with_what_was_set_and_the_key(
    client: NanoGPTClient, sandbox: Sandbox
) -> None:
    await client.submit(REQUEST)

    [request] = sandbox.requests()
    assert (request.kind, request.method, request.path) == ("submit", "POST", "/api/tts")
    assert request.json == {"text": "Hello there.", "model": MODEL, "voice": "Rachel", "speed": 1.1}
    assert request.headers["x-api-key"] == API_KEY
    assert request.headers["user-agent"].startswith("prefect-nanogpt/")


async def test_an_asynchronous_model_gives_a_ticket(client: NanoGPTClient, sandbox: Sandbox) -> None:
    ticket = await client.submit(REQUEST)

    [charge] = sandbox.ledger.charges
    assert ticket == Ticket(run_id=charge.run_id, model=MODEL, cost=Decimal("0.00072"), payment_source="USD")


@pytest.mark.parametrize(
    ("reply", "run_id"),
    [
        (Accept(status_code=200), r"[0-9a-f-]{36}"),
        (Accept(minimal=True), r"[0-9a-f-]{36}"),
        (Accept(hex_run_id=True, minimal=True), r"[0-9a-f]{32}"),
        (Answer(200, {"status": "queued", "runId": "vc_run_789", "model": MODEL}), "vc_run_789"),
    ],
    ids=["with HTTP 200", "of two fields", "without dashes", "with a name"],
)
async def test_a_ticket_is_a_ticket_in_every_form(
    reply: Any, run_id: str, client: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_submit([reply])

    ticket = await client.submit(REQUEST)

    assert isinstance(ticket, Ticket)
    assert ticket.model == MODEL
    assert re.fullmatch(run_id, ticket.run_id)


async def test_a_model_may_answer_with_the_url_of_the_audio(client: NanoGPTClient, sandbox: Sandbox) -> None:
    completed = await client.submit(TTSRequest(text="Hello there.", model="Kokoro-82m"))

    assert isinstance(completed, Completed)
    assert completed.audio_url.startswith(sandbox.audio_url)
    assert (completed.content_type, completed.cost, completed.currency) == ("audio/wav", Decimal("0.000012"), "USD")


async def test_a_model_may_answer_with_the_audio(client: NanoGPTClient, sandbox: Sandbox) -> None:
    audio = await client.submit(TTSRequest(text="Hello there.", model="tts-1"))

    [charge] = sandbox.ledger.charges
    assert audio == AudioContent(content=sandbox.audio_bytes(charge.run_id), content_type="audio/mpeg")


@pytest.mark.parametrize("content_type", ["audio/mp3", "application/octet-stream", ""])
async def test_audio_is_taken_under_every_type_it_comes_as(
    content_type: str, client: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_submit([Answer(body=b"ID3...", headers={"content-type": content_type})])

    assert await client.submit(REQUEST) == AudioContent(content=b"ID3...", content_type=content_type or None)


# Submitting: what is not accepted


@pytest.mark.parametrize(
    ("status", "body", "code", "retryable"),
    [
        (400, {"error": "Bad voice", "code": "invalid_voice", "status": 400}, "INVALID_VOICE", False),
        (401, {"error": "Invalid API key", "code": "invalid_api_key"}, "INVALID_API_KEY", False),
        (402, {"error": "Insufficient balance", "status": 402, "requiredBalance": 0.1}, "TTS_FAILED", False),
        (403, {"error": {"message": "No.", "code": "model_not_allowed"}}, "MODEL_NOT_ALLOWED", False),
        (404, {"error": {"message": "No.", "code": "model_not_found"}}, "MODEL_NOT_FOUND", False),
        (409, None, "TTS_FAILED", False),
        (413, {"error": 413, "message": "Too long"}, "TTS_FAILED", False),
        (429, {"error": {"message": "Slow down", "code": "rate_limit_exceeded"}}, "RATE_LIMIT_EXCEEDED", True),
        (
            429,
            {"error": {"message": "10 of 10", "code": "daily_rpd_limit_exceeded"}},
            "DAILY_RPD_LIMIT_EXCEEDED",
            False,
        ),
        (301, None, "TTS_FAILED", False),
        (307, None, "TTS_FAILED", False),
        (308, None, "TTS_FAILED", False),
    ],
)
async def test_a_refusal_is_certain_and_only_a_throughput_limit_may_be_tried_again(
    status: int, body: Any, code: str, retryable: bool, client: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_submit([Answer(status, body, headers={"location": f"{sandbox.root_url}/elsewhere"})])

    error = await error_of_submission(client)

    assert type(error) is ProviderError
    assert (error.code, error.http_status, error.retryable) == (code, status, retryable)
    assert len(sandbox.requests()) == 1


async def test_a_text_that_is_refused_at_once_is_a_content_policy_violation(
    client: NanoGPTClient, sandbox: Sandbox
) -> None:
    error = await error_of_submission(client, TTSRequest(text="[sandbox:reject]", model="tts-1"))

    assert type(error) is ContentPolicyViolation
    assert (error.code, error.http_status, error.retryable) == ("CONTENT_POLICY_VIOLATION", 400, False)
    assert sandbox.ledger.charges == []


async def test_a_refused_key_is_said_to_be_from_where_and_sent_to_which_api_and_not_shown(sandbox: Sandbox) -> None:
    sandbox.on_submit([Answer(401, {"error": "Invalid API key", "code": "invalid_api_key"})])

    async with NanoGPTClient(API_KEY, sandbox.base_url, key_source="a drawer") as client:
        error = await error_of_submission(client)

    assert str(error) == (
        f"INVALID_API_KEY: Invalid API key. (HTTP 401) The key is from a drawer, and was sent to {sandbox.base_url}."
    )
    assert API_KEY not in str(vars(error))


async def test_where_no_connection_is_made_nothing_was_submitted() -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        async with NanoGPTClient(API_KEY, f"http://127.0.0.1:{reserved.getsockname()[1]}/api") as client:
            error = await error_of_submission(client)

    assert type(error) is NothingSent
    assert (error.code, error.retryable) == ("PROVIDER_UNREACHABLE", True)


# Submitting: what nobody knows


@pytest.mark.parametrize(
    "reply",
    [
        Cut(),
        Accept(then=Cut()),
        Accept(then=Cut(after_bytes=10)),
        Hang(60),
        Accept(delay=60),
        Answer(408, {"error": "Request timeout"}),
        Answer(500, {"error": "Internal error", "status": 500}),
        Accept(then=Answer(502, body="Bad gateway")),
        Answer(503, {"error": {"message": "Unavailable", "type": "service_unavailable"}}),
        Accept(then=WEB_PAGE),
        Answer(200, {"status": "pending"}),
        Answer(200, {"status": "error", "error": "The voice is gone", "code": "voice_gone"}),
        Answer(200, ["98b0"]),
        Answer(200, body="98b0"),
        Answer(200, body="{", headers={"content-type": "application/json"}),
        Redirect("https://elsewhere.test/", status=302),
        Redirect("https://elsewhere.test/", status=303),
    ],
    ids=str,
)
async def test_what_may_have_been_accepted_is_uncertain_and_not_tried_again(
    reply: Any, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_nanogpt.client.SUBMIT_TIMEOUT", httpx.Timeout(0.5))
    sandbox.on_submit([reply])

    async with NanoGPTClient(API_KEY, sandbox.base_url) as client:
        error = await error_of_submission(client)

    assert type(error) is SubmissionUncertain
    assert (error.code, error.retryable) == ("SUBMISSION_UNCERTAIN", False)
    assert len(sandbox.requests()) == 1


async def test_an_uncertain_submission_says_what_the_provider_answered(client: NanoGPTClient, sandbox: Sandbox) -> None:
    sandbox.on_submit([{"status": "error", "error": "The voice is gone", "code": "voice_gone"}])

    error = await error_of_submission(client)

    assert "HTTP 200" in str(error)
    assert str(error).endswith("It says: The voice is gone")


async def test_a_submission_is_seen_to_its_answer_though_nobody_waits_for_it_any_more(
    client: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_submit([Accept(delay=0.5)])
    answered: list[Submission] = []

    def send() -> Submission:
        answered.append(client.post(client.build(REQUEST), REQUEST.model))
        return answered[0]

    submitting = asyncio.create_task(in_own_thread(send))
    await asyncio.to_thread(sandbox.wait_for_request, "submit", 1, 30)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting

    [charge] = sandbox.ledger.charges
    [ticket] = answered
    assert isinstance(ticket, Ticket)
    assert ticket.run_id == charge.run_id


@pytest.mark.parametrize("before", [0, 1])
async def test_nothing_is_sent_by_a_client_that_is_closed(before: int, sandbox: Sandbox) -> None:
    async with NanoGPTClient(API_KEY, sandbox.base_url) as client:
        for _ in range(before):
            await client.submit(REQUEST)

    error = await error_of_submission(client)

    assert (type(error), error.retryable) == (NothingSent, True)
    assert len(sandbox.requests("submit")) == before


# Status


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"error": {"message": "No.", "type": "a_type", "code": "a_code", "param": None}}, "A_CODE: No. (HTTP 400)"),
        ({"error": "Insufficient balance", "status": 402}, "TTS_FAILED: Insufficient balance. (HTTP 400)"),
        ({"error": {"message": "No!", "type": "RATE_LIMITED"}, "refundMessage": "x"}, "RATE_LIMITED: No! (HTTP 400)"),
        ({"error": 400, "message": "No."}, "TTS_FAILED: No. (HTTP 400)"),
        ({"error": "No.", "code": "prompt_too_long"}, "PROMPT_TOO_LONG: No. (HTTP 400)"),
        ({"type": "server_error", "message": "No"}, "SERVER_ERROR: No. (HTTP 400)"),
        ({"message": "Gemini TTS Error"}, "TTS_FAILED: Gemini TTS Error. (HTTP 400)"),
        ([], "TTS_FAILED: Bad Request. (HTTP 400)"),
        (None, "TTS_FAILED: Bad Request. (HTTP 400)"),
    ],
)
async def test_an_error_body_of_any_shape_gives_code_and_message(
    body: Any, text: str, client: NanoGPTClient, sandbox: Sandbox
) -> None:
    error = await error_of_status(client, sandbox, Answer(400, body, headers={"x-request-id": "r-1"}))

    assert type(error) is ProviderError
    assert str(error) == text
    assert (error.http_status, error.request_id) == (400, "r-1")


@pytest.mark.parametrize("status", [400, 401, 402, 403, 409, 413, 422, 501, 301, 302])
async def test_what_repeating_cannot_mend_is_not_retryable(
    status: int, client: NanoGPTClient, sandbox: Sandbox
) -> None:
    error = await error_of_status(client, sandbox, Answer(status, headers={"location": f"{sandbox.audio_url}/steal"}))

    assert (error.http_status, error.retryable) == (status, False)
    assert [request.kind for request in sandbox.requests()] == ["status"]


@pytest.mark.parametrize("status", [404, 408, 429, 500, 502, 503, 504, 520])
async def test_what_may_pass_is_retryable(status: int, client: NanoGPTClient, sandbox: Sandbox) -> None:
    error = await error_of_status(client, sandbox, Answer(status))

    assert (error.http_status, error.retryable) == (status, True)


@pytest.mark.parametrize(
    "reply",
    [
        WEB_PAGE,
        Answer(body="pending"),
        Answer(json=["pending"]),
        Answer(json="pending"),
        Answer(json={"status": None}),
        Answer(body=b"\xff\xfe\x00"),
        Answer(status=204),
    ],
    ids=str,
)
async def test_what_is_no_status_is_an_unexpected_answer(reply: Any, client: NanoGPTClient, sandbox: Sandbox) -> None:
    error = await error_of_status(client, sandbox, reply)

    assert (type(error), error.code, error.retryable) == (ProviderError, "UNEXPECTED_ANSWER", True)


async def test_a_refusal_of_the_content_in_an_error_answer_is_a_content_policy_violation(
    client: NanoGPTClient, sandbox: Sandbox
) -> None:
    error = await error_of_status(
        client, sandbox, Answer(400, {"error": {"message": "No.", "type": "CONTENT_POLICY_VIOLATION"}})
    )

    assert type(error) is ContentPolicyViolation
    assert not error.retryable


@pytest.mark.parametrize(
    ("header", "seconds"), [("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("soon", None), ("", None), ("86400", 86400.0)]
)
async def test_retry_after_is_read_in_seconds(
    header: str, seconds: float | None, client: NanoGPTClient, sandbox: Sandbox
) -> None:
    error = await error_of_status(client, sandbox, Answer(429, headers={"retry-after": header}))

    assert error.retry_after_seconds == seconds


async def test_retry_after_is_read_as_a_date(client: NanoGPTClient, sandbox: Sandbox) -> None:
    in_an_hour = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    an_hour_ago = format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)

    future = await error_of_status(client, sandbox, Answer(503, headers={"retry-after": in_an_hour}))
    past = await error_of_status(client, sandbox, Answer(503, headers={"retry-after": an_hour_ago}))

    assert future.retry_after_seconds == pytest.approx(3600, abs=60)
    assert past.retry_after_seconds == 0


@pytest.mark.parametrize(
    ("ticket", "sent"),
    [
        ({}, {"isApiRequest": "true"}),
        ({"cost": 0.0050388}, {"cost": "0.0050388", "isApiRequest": "true"}),
        ({"cost": 1e-7}, {"cost": "0.0000001", "isApiRequest": "true"}),
        ({"cost": 120, "paymentSource": "XNO"}, {"cost": "120", "paymentSource": "XNO", "isApiRequest": "true"}),
        ({"cost": 0, "paymentSource": ""}, {"cost": "0", "isApiRequest": "true"}),
        ({"isApiRequest": False}, {"isApiRequest": "false"}),
    ],
    ids=str,
)
async def test_the_ticket_goes_along_as_plain_text(
    ticket: dict[str, Any], sent: dict[str, str], client: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_status("98b0", [{"status": "pending"}])

    await client.status(Ticket.model_validate({"runId": "98b0", "model": "microsoft/mai voice", **ticket}))

    [request] = sandbox.requests("status")
    assert request.query == {"runId": "98b0", "model": "microsoft/mai voice", **sent}


# Audio


async def test_a_download_carries_nothing_of_the_api(client: NanoGPTClient, sandbox: Sandbox) -> None:
    ticket = sandbox.add_job()
    url = sandbox.completed_body(ticket["runId"])["audioUrl"]
    sandbox.on_audio(ticket["runId"], [Redirect(url, status) for status in (301, 302, 303, 307, 308)])

    async with client.download(url) as response:
        content = await response.aread()

    assert content == sandbox.audio_bytes(ticket["runId"])
    headers = [set(request.headers) for request in sandbox.requests("audio")]
    assert headers == [{"host", "accept", "accept-encoding", "connection", "user-agent"}] * 6


@pytest.mark.parametrize(
    ("reply", "code", "retryable"),
    [
        (Answer(403), "AUDIO_UNAVAILABLE", True),
        (Answer(404), "AUDIO_UNAVAILABLE", True),
        (Answer(206, body=b"ID3"), "AUDIO_UNAVAILABLE", True),
        (Redirect("ftp://audio.test/1.mp3"), "AUDIO_UNAVAILABLE", False),
        (Redirect("file:///etc/passwd"), "AUDIO_UNAVAILABLE", False),
        (Cut(after_bytes=100), "AUDIO_TRUNCATED", True),
    ],
    ids=str,
)
async def test_a_download_that_comes_to_nothing_says_why(
    reply: Any, code: str, retryable: bool, client: NanoGPTClient, sandbox: Sandbox
) -> None:
    ticket = sandbox.add_job()
    sandbox.on_audio(ticket["runId"], [reply])

    error = await error_of_download(client, sandbox.completed_body(ticket["runId"])["audioUrl"])

    assert (type(error), error.code, error.retryable) == (AudioError, code, retryable)
    assert len(sandbox.requests()) == 1


async def test_a_redirect_to_nowhere_is_an_audio_error(client: NanoGPTClient, sandbox: Sandbox) -> None:
    ticket = sandbox.add_job()
    sandbox.on_audio(ticket["runId"], [Redirect("http://[::1")])

    error = await error_of_download(client, sandbox.completed_body(ticket["runId"])["audioUrl"])

    assert type(error) is AudioError


@pytest.mark.parametrize("url", ["", "audio.mp3", "//audio.test/1.mp3", "http://", "http://[::1", "data:audio/mpeg,x"])
async def test_what_is_no_audio_url_is_not_fetched(url: str, client: NanoGPTClient) -> None:
    error = await error_of_download(client, url)

    assert (type(error), error.retryable) == (AudioError, False)


async def test_an_https_api_cannot_point_at_plain_http(secure_client: NanoGPTClient, sandbox: Sandbox) -> None:
    error = await error_of_download(secure_client, f"{sandbox.audio_url}/audio/1.mp3")

    assert "not https, so it was not fetched" in error.message
    assert sandbox.requests() == []


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.1",
        "0x7f000001",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "[fe80::1]",
        "[fd00::1]",
        "user:password@127.0.0.1",
    ],
)
async def test_an_https_api_cannot_point_at_a_private_address(host: str, secure_client: NanoGPTClient) -> None:
    error = await error_of_download(secure_client, f"https://{host}/1.mp3")

    assert (type(error), error.retryable) == (AudioError, False)
    assert "not a public address, so it was not fetched" in error.message


# The key


@pytest.mark.parametrize("key", ["", " ", "two words", "two\nlines", "tab\there", "schlüssel", "nul\x00"], ids=repr)
def test_what_cannot_be_a_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(CredentialsError) as caught:
        NanoGPTClient(key)

    assert not key.strip() or key not in str(caught.value)


async def test_white_space_around_a_key_and_a_slash_after_the_address_do_no_harm(sandbox: Sandbox) -> None:
    async with NanoGPTClient(f" {API_KEY}\n", f"{sandbox.base_url}/") as client:
        await client.submit(REQUEST)

    [request] = sandbox.requests()
    assert (request.path, request.headers["x-api-key"]) == ("/api/tts", API_KEY)
