"""The sandbox over real HTTP: the protocol, the faults it can be told to make, and that it really speaks."""

import array
import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter
from pydantic import SecretStr

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.models import HUMMED
from prefect_nanogpt.sandbox import Accept, Answer, Cut, Hang, Redirect, Sandbox, Slow, Stall
from tests.sounds import DECODED_RATE, decoded

MODEL = "Elevenlabs-Turbo-V2.5"
KEY = "sk-test-of-the-sandbox"
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(job_seconds=0) as running:
        yield running


@pytest.fixture
def api(sandbox: Sandbox) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=sandbox.base_url, headers={"x-api-key": KEY}) as client:
        yield client


def submit(api: httpx.Client, text: str = "Hello there.", **fields: Any) -> httpx.Response:
    return api.post("/tts", json={"text": text, "model": MODEL} | fields)


def status(api: httpx.Client, ticket: dict[str, Any], **extra: Any) -> httpx.Response:
    return api.get("/tts/status", params={"runId": ticket["runId"], "model": MODEL} | extra)


def audio_of(api: httpx.Client, text: str, **fields: Any) -> httpx.Response:
    return httpx.get(status(api, submit(api, text, **fields).json()).json()["audioUrl"])


def decode(audio: bytes) -> tuple[float, float]:
    """Duration in seconds and loudness (root mean square of 16-bit samples)."""
    samples = array.array("h", decoded(audio))
    return len(samples) / DECODED_RATE, rms(samples)


def rms(samples: "array.array[int]") -> float:
    return float((sum(sample * sample for sample in samples) / len(samples)) ** 0.5)


def needs_speech() -> None:
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("lameenc")


# The three answers to a submission


def test_an_asynchronous_model_answers_with_a_charged_ticket(sandbox: Sandbox, api: httpx.Client) -> None:
    answer = submit(api, "x" * 84)

    assert answer.status_code == 202
    assert answer.headers["x-nanogpt-sandbox"] == "true"
    assert answer.headers["x-request-id"]
    ticket = answer.json()
    assert re.fullmatch(UUID, ticket.pop("runId"))
    assert ticket == {
        "status": "pending",
        "model": MODEL,
        "charged": True,
        "cost": 0.00504,
        "paymentSource": "USD",
        "isApiRequest": True,
    }
    assert sandbox.ledger.charged_total == Decimal("0.00504")
    assert sandbox.ledger.balance == Decimal("99.99496")
    assert sandbox.ledger.charges[0].text_length == 84


@pytest.mark.parametrize("model", ["tts-1", "tts-1-hd", "gpt-4o-mini-tts", "xai-tts"])
def test_a_synchronous_model_answers_with_the_audio(sandbox: Sandbox, api: httpx.Client, model: str) -> None:
    answer = submit(api, model=model)

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "audio/mpeg"
    assert decode(answer.content)[0] > 0.3
    assert len(sandbox.ledger.charges) == 1


def test_a_model_can_answer_with_a_wav_at_once(api: httpx.Client) -> None:
    answer = submit(api, model="gemini-2.5-flash-preview-tts", voice="Kore", response_format="mp3")

    assert answer.headers["content-type"] == "audio/wav"
    assert answer.content.startswith(b"RIFF")


FORMATS = {
    "mp3": ("audio/mpeg", (b"ID3", b"\xff")),
    "opus": ("audio/opus", b"OggS"),
    "aac": ("audio/aac", (b"\xff\xf1", b"\xff\xf9")),
    "flac": ("audio/flac", b"fLaC"),
    "wav": ("audio/wav", b"RIFF"),
}


@pytest.mark.parametrize("encoder", ["PyAV", "ffmpeg"])
@pytest.mark.parametrize("speak", [True, False])
def test_an_openai_model_answers_in_the_format_that_is_asked_for(
    encoder: str, speak: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if encoder == "ffmpeg":
        tmp_path.joinpath("ffmpeg").symlink_to(get_ffmpeg_exe())
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setitem(sys.modules, "av", None)
    else:
        pytest.importorskip("av")
    with Sandbox(speak=speak) as sandbox, httpx.Client() as client:
        client.base_url, client.headers["x-api-key"] = httpx.URL(sandbox.base_url), KEY
        mp3 = decode(submit(client, model="tts-1").content)
        for format, (content_type, magic) in FORMATS.items():
            answer = submit(client, model="tts-1", response_format=format)
            assert (answer.status_code, answer.headers["content-type"]) == (200, content_type)
            assert answer.content.startswith(magic)
            assert decode(answer.content) == pytest.approx(mp3, rel=0.3)


def test_without_an_encoder_a_format_is_refused_and_the_answer_says_why(
    sandbox: Sandbox, api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(sys.modules, "av", None)
    answer = submit(api, model="tts-1", response_format="flac")

    assert (answer.status_code, answer.json()["code"]) == (400, "unsupported_format")
    assert "no encoder for flac here: install the extra `audio`" in answer.json()["error"]
    assert not sandbox.ledger.charges
    assert submit(api, model="tts-1", response_format="wav").status_code == 200


@pytest.mark.parametrize("model", [MODEL, "xai-tts"])
def test_other_models_ignore_the_format_that_is_asked_for(api: httpx.Client, model: str) -> None:
    answer = submit(api, model=model, response_format="wav")
    audio = httpx.get(status(api, answer.json()).json()["audioUrl"]) if model == MODEL else answer

    assert audio.headers["content-type"] == "audio/mpeg"
    assert decode(audio.content)[0] > 0.3
    assert not audio.content.startswith(b"RIFF")


@pytest.mark.parametrize("format", ["opus", "aac", "flac"])
def test_a_flow_saves_what_it_asked_for(sandbox: Sandbox, format: str, tmp_path: Path) -> None:
    request = {"model": "tts-1", "response_format": format}
    audio = asyncio.run(text_to_speech("In another format.", save_to=str(tmp_path), **request))

    assert audio.container == {"opus": "ogg"}.get(format, format)


def test_the_default_model_answers_with_the_url_of_a_wav(api: httpx.Client) -> None:
    answer = api.post("/tts", json={"text": "Hello there."})

    assert answer.status_code == 200
    assert answer.json()["contentType"] == "audio/wav"
    assert answer.json()["audioUrl"].endswith(".wav")
    assert answer.json()["currency"] == "USD"
    audio = httpx.get(answer.json()["audioUrl"])
    assert audio.headers["content-type"] == "audio/wav"
    assert audio.content.startswith(b"RIFF")


def test_the_sibling_route_gives_audio_or_the_same_ticket(api: httpx.Client) -> None:
    ticket = api.post("/v1/audio/speech", json={"input": "Hello", "model": MODEL})
    audio = api.post("/v1/audio/speech", json={"input": "Hello", "model": "tts-1", "response_format": "wav"})
    kokoro = api.post("/v1/audio/speech", json={"input": "Hello", "model": "Kokoro-82m"})

    assert (ticket.status_code, ticket.json()["status"]) == (202, "pending")
    assert status(api, ticket.json()).json()["status"] == "completed"
    assert audio.content.startswith(b"RIFF")
    assert kokoro.content.startswith(b"RIFF")


def test_run_ids_can_be_without_dashes() -> None:
    with Sandbox(run_id_style="hex") as sandbox:
        assert re.fullmatch(r"[0-9a-f]{32}", sandbox.add_job()["runId"])


QUALIFIED = "fal-ai/elevenlabs/tts/turbo-v2.5"


@pytest.mark.parametrize("how", ["for all", "for one", "as a job"])
def test_a_ticket_can_name_the_model_otherwise_and_then_only_that_name_counts(how: str) -> None:
    with Sandbox(job_seconds=0, qualified_models=how != "for one") as sandbox, httpx.Client() as client:
        client.base_url, client.headers["x-api-key"] = httpx.URL(sandbox.base_url), KEY
        sandbox.on_submit([Accept(qualified_model=True)])
        ticket = sandbox.add_job() if how == "as a job" else submit(client).json()

        assert ticket["model"] == QUALIFIED
        assert status(client, ticket).json() == {"error": "TTS run not found", "status": 404}
        completed = status(client, ticket, model=QUALIFIED).json()
        assert (completed["status"], completed["model"]) == ("completed", QUALIFIED)
        assert sandbox.ledger.charges[0].model == MODEL


def test_a_ticket_without_a_model_is_asked_for_by_the_one_that_was_sent(sandbox: Sandbox, api: httpx.Client) -> None:
    sandbox.on_submit([Accept(minimal=True, qualified_model=True)])
    ticket = submit(api).json()

    assert status(api, ticket).json()["status"] == "completed"


def test_a_flow_asks_by_the_name_in_the_ticket(tmp_path: Path) -> None:
    with Sandbox(job_seconds=0, speak=False, qualified_models=True) as sandbox:
        asyncio.run(text_to_speech("Known otherwise.", save_to=str(tmp_path)))
        assert {request.query["model"] for request in sandbox.requests("status")} == {QUALIFIED}


# What is refused


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"text": " "}, 400, "text"),
        ({"text": 7}, 400, "text"),
        ({"speed": 9}, 400, "speed"),
        ({"speed": "fast"}, 400, "speed"),
        ({"stability": 1.5}, 400, "stability"),
        ({"voice": 3}, 400, "voice"),
        ({"text": "x" * 10_001}, 413, "10000"),
        ({"model": "no-such-model"}, 404, "model_not_found"),
        ({"model": "tts-1", "response_format": "pcm"}, 400, "unsupported_format"),
        ({"text": "[sandbox:explode]"}, 400, "Known: reject"),
        ({"text": "[sandbox:wait]"}, 400, "Known: reject"),
        ({"text": "[sandbox:wait 1e999]"}, 400, "Known: reject"),
        ({"text": "[sandbox:wait 86401]"}, 400, "a number up to 86400"),
        ({"text": f"[sandbox:wait {'9' * 400}]"}, 400, "a number up to 86400"),
        ({"text": "[sandbox:busy 99999999999999999999]"}, 400, "a number up to 86400"),
        ({"text": f"[sandbox:throttle {'9' * 5000}]"}, 400, "a number up to 86400"),
        ({"text": "[sandbox:busy 1]" * 101}, 400, "100 directives"),
        ({"text": ["Hello"]}, 400, "text"),
        ({"text": "half \ud83d of it"}, 400, "Unicode"),
        ({"text": "Hello\0"}, 400, "NUL"),
        ({"speed": True}, 400, "speed"),
        ({"voice": "\udfff"}, 400, "voice"),
        ({"voice": "v" * 1001}, 400, "1000"),
        ({"model": "tts-1\0"}, 400, "model"),
        ({"text": "[sandbox:reject]", "model": "tts-1"}, 400, "content_policy_violation"),
    ],
)
def test_a_bad_submission_is_refused_and_costs_nothing(
    sandbox: Sandbox, api: httpx.Client, fields: dict[str, Any], code: int, says: str
) -> None:
    body = json.dumps({"text": "Hello there.", "model": MODEL} | fields)  # httpx sends no lone surrogates itself
    answer = api.post("/tts", content=body)

    assert answer.status_code == code
    assert answer.json()["status"] == code
    assert says in answer.text
    assert not sandbox.ledger.charges


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"text": "Hello", "more": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}",
        b'{"text": "Hello", "more": ' + b"1" * 5000 + b"}",
        b'{"text": "Hello", "more": NaN}',
        b'{"text": "Hello", "more": [-Infinity]}',
        b'{"text": "Hello", "more": 1e400}',
        b'{"text": "Hello\xff"}',
        b'{"text": "Hello \xed\xa0\x80"}',
        '{"text": "Hello"}'.encode("utf-16"),
        b"\0" * 8,
        b"",
    ],
)
@pytest.mark.parametrize("route", ["/tts", "/v1/audio/speech"])
def test_a_body_that_is_no_json_in_utf_8_is_refused(api: httpx.Client, route: str, body: bytes) -> None:
    answer = api.post(route, content=body)

    assert answer.status_code == 400
    assert "JSON object" in answer.text


@pytest.mark.parametrize(
    "target",
    [
        "/api/tts/status?runId=%ff%zz&model=%",
        "/api/tts/status?" + "&".join(f"name{n}=x" for n in range(5000)),
        "/audio/%00.mp3",
        "/audio/..%2f..%2fetc.mp3",
        "/%0d%0aset-cookie:%20a=b",
        "//",
        "*",
        "http://elsewhere.example/api/tts",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "CONNECT", "BREW"])
def test_odd_requests_are_answered_on_both_ports(sandbox: Sandbox, method: str, target: str) -> None:
    for url in (sandbox.root_url, sandbox.audio_url):
        answer = raw(url, f"{method} {target} HTTP/1.1", "host: localhost", "x-api-key: any")
        assert re.match(r"HTTP/1.1 40[045] ", answer), answer
        assert "set-cookie:" not in answer.partition("\r\n\r\n")[0]


def raw(url: str, *head: str, body: str = "") -> str:
    """Send a request as it is, and return what is answered until the connection closes."""
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port), timeout=20) as connection:
        connection.sendall("\r\n".join([*head, "connection: close", "", body]).encode("latin-1"))
        return b"".join(iter(lambda: connection.recv(65_536), b"")).decode("latin-1")


@pytest.mark.parametrize(
    ("hosts", "status"),
    [
        (["localhost"], 200),
        (["LocalHost:80"], 200),
        (["api.localhost"], 200),
        (["127.0.0.1:1"], 200),
        (["127.1.2.3"], 200),
        (["[::1]"], 200),
        (["[::1]:8765"], 200),
        (["rebound.example"], 421),
        (["rebound.example:8765"], 421),
        (["localhost.example"], 421),
        (["127.0.0.1.example"], 421),
        (["127.0.0.1:80:80"], 421),
        (["127.0.0.1, rebound.example"], 421),
        (["rebound.example@127.0.0.1"], 421),
        (["192.168.0.1"], 421),
        (["0.0.0.0"], 421),
        (["[::ffff:10.0.0.1]"], 421),
        ([""], 421),
        ([], 400),  # as HTTP/1.1 wants it
        (["localhost", "rebound.example"], 400),
    ],
)
def test_only_loopback_names_are_answered_on_both_ports(sandbox: Sandbox, hosts: list[str], status: int) -> None:
    audio = sandbox.completed_body(sandbox.add_job()["runId"])["audioUrl"]
    for url in (f"{sandbox.root_url}/_sandbox/requests", audio):
        answer = raw(url, f"GET {httpx.URL(url).path} HTTP/1.1", *(f"host: {host}" for host in hosts))
        assert answer.startswith(f"HTTP/1.1 {status} "), answer
    assert raw(sandbox.root_url, "GET / HTTP/1.0").startswith("HTTP/1.1 421 ")


def test_no_page_of_another_site_may_read_or_send_a_key(sandbox: Sandbox) -> None:
    asks = {"origin": "https://elsewhere.example", "access-control-request-headers": "x-api-key"}
    for answer in (
        httpx.options(f"{sandbox.base_url}/tts", headers=asks | {"access-control-request-method": "POST"}),
        httpx.get(f"{sandbox.root_url}/_sandbox/requests", headers=asks),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"x-api-key": "bad-key"}, "invalid_api_key"),
        ({"authorization": "Bearer invalid"}, "invalid_api_key"),
        ({"authorization": "Bearer anything"}, None),
        ({"x-api-key": "anything"}, None),
    ],
)
def test_any_key_will_do_except_a_bad_one(sandbox: Sandbox, headers: dict[str, str], code: str | None) -> None:
    answer = httpx.post(f"{sandbox.base_url}/check-balance", headers=headers)

    assert answer.status_code == (401 if code else 200)
    assert answer.json().get("code") == code


def test_errors_of_the_openai_style_routes_have_its_shape(sandbox: Sandbox) -> None:
    answer = httpx.post(f"{sandbox.base_url}/v1/audio/speech", json={"input": "Hello"})

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "missing_api_key"
    assert answer.json()["error"]["type"] == "authentication_error"


def test_an_empty_purse_is_told_what_is_needed() -> None:
    with Sandbox(balance="0.001") as sandbox:
        answer = httpx.post(
            f"{sandbox.base_url}/tts", headers={"x-api-key": KEY}, json={"text": "x" * 1000, "model": MODEL}
        )
        assert answer.status_code == 402
        assert answer.json() == {"error": "Insufficient balance", "status": 402, "requiredBalance": 0.06}
        assert sandbox.ledger.balance == Decimal("0.001")


# Status


def test_a_job_moves_up_the_queue_and_is_completed() -> None:
    with Sandbox(job_seconds=1_000) as sandbox, httpx.Client(headers={"x-api-key": KEY}) as client:
        ticket = sandbox.add_job("Hello there.")
        job = sandbox._api.jobs[ticket["runId"]]
        for position in (3, 2, 1, None):
            body = status_at(sandbox, client, ticket)
            assert (body["status"], body["runId"]) == ("pending", ticket["runId"])
            assert body.get("queuePosition") == position
            job.submitted_at -= 210
        job.submitted_at -= 200
        body = status_at(sandbox, client, ticket)
        assert body == sandbox.completed_body(ticket["runId"])
        assert client.get(body["audioUrl"]).content == sandbox.audio_bytes(ticket["runId"])


def status_at(sandbox: Sandbox, client: httpx.Client, ticket: dict[str, Any]) -> Any:
    params = {"runId": ticket["runId"], "model": ticket["model"]}
    return client.get(f"{sandbox.base_url}/tts/status", params=params).json()


def test_a_status_call_needs_run_id_and_model_and_knows_its_jobs(sandbox: Sandbox, api: httpx.Client) -> None:
    ticket = sandbox.add_job()

    assert api.get("/tts/status", params={"runId": ticket["runId"]}).status_code == 400
    assert status(api, {"runId": "unknown"}).json() == {"error": "TTS run not found", "status": 404}
    assert status(api, ticket, model="Elevenlabs-V3").status_code == 404
    assert status(api, ticket, isApiRequest="True").status_code == 200
    assert status(api, ticket, isApiRequest="true").status_code == 200


def test_a_rejected_job_is_refunded_once_and_only_with_the_ticket(sandbox: Sandbox, api: httpx.Client) -> None:
    ticket = submit(api, "Something bad [sandbox:reject]").json()

    body = status(api, ticket).json()
    assert (body["status"], body["code"]) == ("error", "CONTENT_POLICY_VIOLATION")
    assert not sandbox.ledger.refunds
    for _ in range(2):
        status(api, ticket, cost=ticket["cost"], paymentSource=ticket["paymentSource"])
    assert [entry.run_id for entry in sandbox.ledger.refunds] == [ticket["runId"]]
    assert sandbox.ledger.balance == 100


def test_the_refund_can_be_made_independent_of_the_ticket() -> None:
    with Sandbox(job_seconds=0, refund_needs_ticket=False) as sandbox, httpx.Client() as client:
        client.headers["x-api-key"] = KEY
        status_at(sandbox, client, sandbox.add_job("[sandbox:reject]"))
        assert len(sandbox.ledger.refunds) == 1


def test_a_scripted_rejection_refunds_too(sandbox: Sandbox, api: httpx.Client) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [{"status": "error", "code": "CONTENT_POLICY_VIOLATION"}])
    status(api, ticket, cost="0.0003", paymentSource="USD")
    assert len(sandbox.ledger.refunds) == 1


# Neighbours


def test_the_balance_is_told_in_plain_decimals(sandbox: Sandbox, api: httpx.Client) -> None:
    assert api.post("/check-balance", json={}).json() == {
        "usd_balance": "100",
        "nano_balance": "0",
        "nanoDepositAddress": "nano_1sandbox",
    }
    with Sandbox(balance="0.0000001") as poor:
        answer = httpx.post(f"{poor.base_url}/check-balance", headers={"x-api-key": KEY})
    assert answer.json()["usd_balance"] == "0.0000001"


def test_the_catalogue_is_detailed_unless_told_otherwise(sandbox: Sandbox) -> None:
    url = f"{sandbox.base_url}/v1/audio-models"
    body = httpx.get(url, params={"type": "tts"}).json()
    brief = httpx.get(url, params={"detailed": "false"}).json()

    rows = {row["id"]: row for row in body["data"]}
    assert len(rows) == body["meta"]["count"] == brief["meta"]["count"] == 12
    assert abs(datetime.fromisoformat(body["meta"]["generated_at"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert abs(rows[MODEL].pop("created") - time.time()) < 60
    assert len(rows[MODEL]["supported_parameters"].pop("voices")) == 46
    assert rows[MODEL] == {
        "id": MODEL,
        "object": "model",
        "owned_by": "sandbox",
        "name": MODEL,
        "description": "Sandbox stand-in.",
        "architecture": {"modality": "text->audio", "input_modalities": ["text"], "output_modalities": ["audio"]},
        "pricing": {"currency": "USD", "per_thousand_chars": 0.06},
        "capabilities": {"text_to_speech": True},
        "supported_parameters": {"max_chars": 10_000},
        "category": "audio_tts",
    }
    assert all(row.keys() == {"id", "object", "created", "owned_by"} for row in brief["data"])
    assert httpx.get(url, params={"type": "stt"}).json()["data"] == []
    assert "Qwen-3-TTS-1.7B" not in rows


def test_the_rows_of_the_catalogue_differ_as_the_provider_s_do(sandbox: Sandbox, api: httpx.Client) -> None:
    rows = {row["id"]: row for row in api.get("/v1/audio-models", params={"type": "tts"}).json()["data"]}

    flagged = {id for id, row in rows.items() if row["capabilities"].get("text_to_speech")}
    speech = {id for id, row in rows.items() if row.get("category") == "audio_tts"}
    assert flagged < speech
    assert rows.keys() - speech == {"Elevenlabs-Music-V1", "minimax-voice-clone"}
    assert rows["Elevenlabs-Music-V1"]["category"] == "audio_music"
    assert rows["Elevenlabs-Music-V1"]["pricing"] == {"currency": "USD", "per_second": 0.01, "minimum": 0.1}
    assert rows["minimax-voice-clone"]["pricing"] == {"currency": "USD", "per_generation": 1.0}
    assert {id for id in speech if "pricing" not in rows[id]} == {
        "Minimax-Speech-2.8-HD",
        "gemini-2.5-flash-preview-tts",
    }
    assert rows["Minimax-Speech-2.8-HD"]["supported_parameters"]["language"] == {
        "default": "Auto",
        "values": ["Auto", "English", "Chinese", "Japanese"],
    }
    for model in rows.keys() - speech:
        assert submit(api, model=model).json()["code"] == "model_not_found"


def test_a_model_can_cost_the_same_whatever_its_text(sandbox: Sandbox, api: httpx.Client) -> None:
    for text in ("Short.", "Longer. " * 100):
        ticket = submit(api, text, model="microsoft/vibevoice").json()
        assert ticket["cost"] == 0.15
        assert status(api, ticket, model="microsoft/vibevoice").json()["status"] == "completed"
    assert sandbox.ledger.charged_total == Decimal("0.30")


def test_a_cloned_voice_is_taken(api: httpx.Client) -> None:
    ticket = submit(api, model="Minimax-Speech-2.8-HD", voice="MyOwnVoice01").json()

    assert status(api, ticket, model="Minimax-Speech-2.8-HD").json()["contentType"] == "audio/mpeg"


def test_the_pages_show_what_was_asked_and_charged(sandbox: Sandbox, api: httpx.Client) -> None:
    ticket = submit(api).json()
    httpx.get(status(api, ticket).json()["audioUrl"])

    shown = httpx.get(f"{sandbox.root_url}/_sandbox/requests")
    assert [request["status"] for request in shown.json()["requests"]] == [202, 200, 200, None]
    assert shown.json()["requests"][1]["query"] == {"runId": ticket["runId"], "model": MODEL}
    assert shown.json()["counts"] == {"submit": 1, "status": 1, "audio": 1, "other": 1}
    ledger = httpx.get(f"{sandbox.root_url}/_sandbox/ledger").json()
    assert ledger["counts"] == {"charge": 1}
    assert ledger["entries"][0]["run_id"] == ticket["runId"]
    assert "not NanoGPT" in httpx.get(sandbox.root_url).json()["about"]


@pytest.mark.parametrize("port", ["api", "audio"])
def test_keys_are_masked_for_people_and_plain_for_tests(
    sandbox: Sandbox, port: str, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("x-api-key", "authorization", "cookie", "set-cookie", "proxy-authorization", "x-amz-security-token")
    secrets = {name: f"secret-of-{name}" for name in names}
    url = sandbox.audio_url if port == "audio" else sandbox.root_url
    with caplog.at_level("INFO", "prefect_nanogpt.sandbox"):
        httpx.get(
            f"{url}/audio/ftp://user:password@host/sk-nano-secret.mp3",
            params={"api_key": "secret", "of": "ftp://user:password@host/", "other": "sk-nano-secret", "cost": "0.1"},
            headers=secrets | {"referer": "http://elsewhere.example/?token=secret&page=3", "accept-language": "sk-SK"},
        )
        page = httpx.get(f"{sandbox.root_url}/_sandbox/requests")

    [shown] = page.json()["requests"][:-1]
    said = [record.getMessage() for record in caplog.records if "/audio/" in record.getMessage()]
    assert len(said) == 1
    for hidden in ("secret-of", "sk-nano-secret", "password@", "secret&"):
        assert hidden not in page.text + said[0]
    assert {shown["headers"][name] for name in names} == {"***"}, "that it was there can be seen"
    assert shown["headers"]["referer"] == "http://elsewhere.example/?token=***&page=3"
    assert shown["headers"]["accept-language"] == "sk-SK"
    assert shown["path"] == "/audio/***@host/***.mp3"
    assert shown["query"] == {"api_key": "***", "of": "***@host/", "other": "***", "cost": "0.1"}
    [asked] = sandbox.requests()[:-1]
    assert {name: asked.headers[name] for name in names} == secrets
    assert asked.query["api_key"] == "secret"


def test_a_path_cannot_write_lines_of_its_own_into_the_log(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "prefect_nanogpt.sandbox"):
        httpx.get(f"{sandbox.audio_url}/%0aGET%20/%1b[2J%C3%A9{'x' * 10_000}")
        httpx.get(sandbox.root_url)  # by its answer, what went before has been logged
    said = caplog.messages[0]
    assert re.fullmatch(r"GET /\\nGET /\\x1b\[2J\\xe9x+… -> 404", said)
    assert len(said) < 400


# What is kept


def test_requests_are_kept_up_to_so_many_bytes(sandbox: Sandbox, api: httpx.Client) -> None:
    for n in range(25):
        assert submit(api, f"{n}", padding="x" * 4_400_000).status_code == 202

    kept = sandbox.requests("submit")
    assert [request.json["text"] for request in kept] == [f"{n}" for n in range(3, 25)]
    assert submit(api, padding="x" * 4_500_000).status_code == 413
    assert sandbox.requests()[-1].json is None
    assert len(sandbox.requests()) == 23


def test_jobs_are_kept_up_to_so_many_bytes_and_their_directives_with_them(sandbox: Sandbox, api: httpx.Client) -> None:
    first, *others = [
        sandbox.add_job(f"{'x' * 40_000_000}[sandbox:html][sandbox:busy 1]", charged=False) for _ in range(3)
    ]
    url = f"{sandbox.audio_url}/audio/{first['runId']}.mp3"

    assert status(api, first).status_code == 404
    assert httpx.get(url).json() == {"error": "No such file", "status": 404}
    assert [status(api, ticket).status_code for ticket in others] == [503, 503]


def test_the_ledger_keeps_its_newest_lines_and_counts_all(sandbox: Sandbox) -> None:
    last = [sandbox.add_job("x") for _ in range(40_010)][-1]

    assert len(sandbox.ledger.entries) == 40_000
    assert sandbox.ledger.entries[-1].run_id == last["runId"]
    assert sandbox.ledger.charged_total == 40_010 * Decimal("0.00006")
    assert sandbox.ledger.balance == 100 - sandbox.ledger.charged_total


def test_a_job_that_never_ends_is_let_go_when_its_client_leaves(
    sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "prefect_nanogpt.sandbox"):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{sandbox.base_url}/tts", headers={"x-api-key": KEY}, json={"text": "[sandbox:stuck]"}, timeout=0.5
            )
        deadline = time.monotonic() + 20
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.05)
    assert caplog.messages[0].startswith("POST /api/tts -> no answer")


def test_an_answer_takes_no_noticeable_time(sandbox: Sandbox, api: httpx.Client) -> None:
    ticket = sandbox.add_job()
    began = time.monotonic()
    for _ in range(50):
        status(api, ticket)
    assert time.monotonic() - began < 1, "40 ms each is Nagle's algorithm at work"


def test_requests_are_recorded_for_tests(sandbox: Sandbox, api: httpx.Client) -> None:
    ticket = submit(api).json()
    status(api, ticket, cost="0.1")

    sent, asked = sandbox.requests()
    assert (sent.kind, sent.status, sent.run_id, sent.json["text"]) == ("submit", 202, ticket["runId"], "Hello there.")
    assert (asked.kind, asked.status, asked.query["cost"]) == ("status", 200, "0.1")
    assert asked.headers["x-api-key"] == KEY
    assert sent.received_at <= asked.received_at <= time.monotonic()
    assert sandbox.requests("audio") == []
    with pytest.raises(TimeoutError, match="1 of 2 status"):
        sandbox.wait_for_request("status", count=2, timeout=0.01)


# Directives in the text


def test_a_directive_changes_the_status_calls(api: httpx.Client) -> None:
    busy = submit(api, "Hello [sandbox:busy 2][sandbox:throttle 3] there").json()
    answers = [status(api, busy) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [503, 503, 429, 200]
    assert answers[2].headers["retry-after"] == "3"

    failed = status(api, submit(api, "[sandbox:fail]").json()).json()
    assert failed == {"status": "error", "error": "TTS generation failed. Please try again."}
    for text in ("[sandbox:stuck]", "[sandbox:wait 20]"):
        assert status(api, submit(api, text).json()).json()["queuePosition"] == 3


def test_a_directive_changes_every_download(api: httpx.Client) -> None:
    page = audio_of(api, "Hello [sandbox:html]")
    assert page.headers["content-type"].startswith("text/html")
    assert audio_of(api, "Hello [sandbox:empty]").content == b""
    assert audio_of(api, "Hello [sandbox:gone]").status_code == 404
    url = status(api, submit(api, "Hello [sandbox:truncate]").json()).json()["audioUrl"]
    for _ in range(2):
        with pytest.raises(httpx.RemoteProtocolError, match="received 1000 bytes"):
            httpx.get(url)
    assert submit(api, "Hello [sandbox:html]", model="tts-1").headers["content-type"].startswith("text/html")


def test_directives_are_not_spoken(api: httpx.Client) -> None:
    with_directive = audio_of(api, "Hello there. [sandbox:wait 0]").content
    assert with_directive == audio_of(api, "Hello there.").content


# Faults from Python


def test_scripted_answers_come_in_order_and_then_all_is_normal(sandbox: Sandbox, api: httpx.Client) -> None:
    first, second = sandbox.add_job(), sandbox.add_job()
    sandbox.on_status(first["runId"], [Answer(status=500, body="oops"), None, {"status": "processing"}])
    sandbox.on_status(None, [Answer(status=429, headers={"Retry-After": "1"}, json={})])

    assert status(api, second).status_code == 429
    answers = [status(api, first) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [500, 200, 200, 200]
    assert answers[0].text == "oops"
    assert [answer.json()["status"] for answer in answers[1:]] == ["completed", "processing", "completed"]


@pytest.mark.parametrize("surface", ["models", "balance"])
def test_the_catalogue_and_the_balance_can_be_down_or_odd(sandbox: Sandbox, api: httpx.Client, surface: str) -> None:
    def ask() -> httpx.Response:
        return api.get("/v1/audio-models") if surface == "models" else api.post("/check-balance")

    script = sandbox.on_models if surface == "models" else sandbox.on_balance
    script(
        [Answer(503), None, {"data": "none"}, Answer(json=[1]), Answer(body="<html>"), Cut(3), Hang(0.05), Slow(9e4)]
    )

    answers = [ask() for _ in range(5)]
    assert [answer.status_code for answer in answers] == [503, 200, 200, 200, 200]
    assert answers[1].json().keys() & {"usd_balance", "data"}
    assert [answer.text for answer in answers[2:]] == ['{"data": "none"}', "[1]", "<html>"]
    for error in ("received 3 bytes", "without sending a response"):
        with pytest.raises(httpx.RemoteProtocolError, match=error):
            ask()
    for _ in range(2):
        assert ask().json().keys() & {"usd_balance", "data"}


def test_a_connection_can_be_cut_before_and_within_an_answer(sandbox: Sandbox, api: httpx.Client) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [Cut(), Cut(after_bytes=5), Hang(0.05)])

    for error in ("without sending a response", "received 5 bytes", "without sending a response"):
        with pytest.raises(httpx.RemoteProtocolError, match=error):
            status(api, ticket)
    assert status(api, ticket).status_code == 200


def test_a_fault_within_the_sandbox_is_a_500_and_said_in_the_log(
    sandbox: Sandbox, api: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    url = status(api, sandbox.add_job()).json()["audioUrl"]
    sandbox.on_status(None, (1 / 0 for _ in range(1)))
    sandbox.on_submit([Answer(json=object())])
    sandbox.on_audio(None, [Answer(headers={"x-name": "\u20ac"})])

    assert status(api, sandbox.add_job()).json()["status"] == 500
    assert api.post("/v1/audio/speech", json={"input": "Hello"}).json()["error"]["type"] == "server_error"
    assert httpx.get(url).json()["status"] == 500
    assert [record.exc_info is not None for record in caplog.records if "failed" in record.getMessage()] == [True] * 3
    assert httpx.get(url).status_code == 200


def test_a_submission_can_be_lost_with_or_without_the_charge(sandbox: Sandbox, api: httpx.Client) -> None:
    sandbox.on_submit([Cut(), Accept(then=Cut()), Accept(then=Answer(status=500, json={"error": "oops"}))])

    with pytest.raises(httpx.RemoteProtocolError):
        submit(api)
    assert len(sandbox.ledger.charges) == 0
    with pytest.raises(httpx.RemoteProtocolError):
        submit(api)
    assert len(sandbox.ledger.charges) == 1
    assert submit(api).status_code == 500
    assert len(sandbox.ledger.charges) == 2


def test_a_submission_can_be_answered_late_and_otherwise(sandbox: Sandbox, api: httpx.Client) -> None:
    sandbox.on_submit([Accept(delay=5), Accept(status_code=200, minimal=True, hex_run_id=True)])

    with pytest.raises(httpx.ReadTimeout):
        api.post("/tts", json={"text": "Hello", "model": MODEL}, timeout=0.2)
    assert len(sandbox.ledger.charges) == 1, "charged at once"
    answer = submit(api)
    assert answer.status_code == 200
    assert answer.json() == {"status": "pending", "runId": sandbox.ledger.charges[1].run_id}
    assert re.fullmatch(r"[0-9a-f]{32}", answer.json()["runId"])


def test_a_download_can_be_slow_stall_be_cut_or_move(sandbox: Sandbox, api: httpx.Client) -> None:
    run_id = sandbox.add_job("Hello there.")["runId"]
    url, whole = sandbox.completed_body(run_id)["audioUrl"], sandbox.audio_bytes(run_id)
    sandbox.on_audio(run_id, [Slow(5 * len(whole)), Stall(100, 0.2), Cut(after_bytes=100), Redirect("/elsewhere")])

    for least in (0.1, 0.2):
        began = time.monotonic()
        assert httpx.get(url).content == whole
        assert time.monotonic() - began >= least * 0.9
    with pytest.raises(httpx.RemoteProtocolError, match="received 100 bytes"):
        httpx.get(url)
    assert httpx.head(url).headers["content-length"] == str(len(whole)), "a HEAD uses up no script"
    assert httpx.get(url).headers["location"] == "/elsewhere"
    assert httpx.get(url).content == whole
    assert httpx.get(url.replace(".mp3", ".wav")).status_code == 404


def test_scripts_may_be_endless(sandbox: Sandbox, api: httpx.Client) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], itertools.repeat({"status": "pending"}))
    assert {status(api, ticket).json()["status"] for _ in range(5)} == {"pending"}


def test_leaving_the_block_cuts_what_hangs_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    outcomes: list[str] = []

    def ask(url: str, text: str) -> None:
        try:
            httpx.post(url, headers={"x-api-key": KEY}, timeout=30, json={"text": text})
        except httpx.HTTPError as error:
            outcomes.append(type(error).__name__)

    with Sandbox() as sandbox:
        sandbox.on_submit([Hang(60), Accept(delay=60), Accept(then=Stall(5, 60))])
        address = f"{sandbox.base_url}/tts"
        clients = [threading.Thread(target=ask, args=[address, "Hello"]) for _ in range(3)]
        for client in clients:
            client.start()
        sandbox.wait_for_request("submit", 3)
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 2
    for client in clients:
        client.join(5)
    assert len(outcomes) == 3
    assert capfd.readouterr().err == ""


# Streams


def speech(api: httpx.Client, **fields: Any) -> httpx.Response:
    return api.post("/v1/audio/speech", json={"input": "Hello, all of you out there.", "stream": True} | fields)


@pytest.mark.parametrize("model", ["tts-1", "Elevenlabs-V3"])
def test_a_streamed_answer_comes_in_chunks_without_a_length(sandbox: Sandbox, model: str) -> None:
    body = json.dumps({"input": "Hello, all of you out there.", "model": model, "stream": True})
    head = ("host: localhost", f"x-api-key: {KEY}", f"content-length: {len(body)}")
    answer = raw(sandbox.root_url, "POST /api/v1/audio/speech HTTP/1.1", *head, body=body)

    shown, _, content = answer.partition("\r\n\r\n")
    shown = shown.lower()
    assert shown.startswith("http/1.1 200")
    assert "transfer-encoding: chunked" in shown
    assert "content-type: audio/mpeg" in shown
    assert "content-length" not in shown
    pieces = []
    while size := int(content.partition("\r\n")[0], 16):
        pieces.append(content.partition("\r\n")[2][:size])
        content = content.partition("\r\n")[2][size + 2 :]
    assert len(pieces) > 2
    assert decode("".join(pieces).encode("latin-1"))[0] > 0.3
    assert len(sandbox.ledger.charges) == 1


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/audio/speech", {"model": "xai-tts"}),
        ("/v1/audio/speech", {"model": "tts-1", "stream": "yes"}),
        ("/tts", {"model": "tts-1"}),
    ],
)
def test_a_stream_that_is_not_supported_is_ignored(api: httpx.Client, path: str, fields: dict[str, Any]) -> None:
    answer = api.post(path, json={"input": "Hello", "stream": True} | fields)

    assert int(answer.headers["content-length"]) == len(answer.content)


def test_a_stream_can_be_slow_stall_be_cut_or_refused(sandbox: Sandbox, api: httpx.Client) -> None:
    whole = speech(api, model="tts-1").content
    sandbox.on_submit([Slow(5 * len(whole)), Stall(100, 0.2), Cut(after_bytes=100), Accept(then=Cut(5000))])

    for least in (0.1, 0.2):
        began = time.monotonic()
        assert speech(api, model="tts-1").content == whole
        assert time.monotonic() - began >= least * 0.9
    for _ in range(2):
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            speech(api, model="tts-1")
    with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
        speech(api, model="tts-1", input="Hello [sandbox:truncate]")
    assert len(sandbox.ledger.charges) == 6
    refused = speech(api, model=MODEL, input="[sandbox:reject]")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "content_policy_violation")
    assert len(sandbox.ledger.charges) == 6


# Speech


@pytest.mark.parametrize("model", [MODEL, "Kokoro-82m"])
def test_it_speaks_aloud_for_about_as_long_as_a_person_would(api: httpx.Client, model: str) -> None:
    needs_speech()
    text = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all."
    submitted = submit(api, text, model=model).json()
    audio = httpx.get(submitted.get("audioUrl") or status(api, submitted).json()["audioUrl"])

    assert audio.headers["x-sandbox-voice"] == "espeak-ng"
    seconds, loudness = decode(audio.content)
    assert 3 < seconds < 7
    assert loudness > 1000


def test_voices_differ_speed_counts_and_other_scripts_are_spoken(api: httpx.Client) -> None:
    needs_speech()
    rachel = audio_of(api, "Hello there, my friend.", voice="Rachel").content
    adam = audio_of(api, "Hello there, my friend.", voice="Adam").content
    fast = audio_of(api, "Hello there, my friend.", voice="Adam", speed=2).content
    chinese = audio_of(api, "你好世界。今天天气很好。").content

    assert rachel != adam
    assert decode(fast)[0] < 0.75 * decode(adam)[0]
    seconds, loudness = decode(chinese)
    assert 1 < seconds < 6, "spoken, not spelled out"
    assert loudness > 1000


@pytest.mark.parametrize("model", [MODEL, "Kokoro-82m"])
def test_without_the_engine_a_tone_as_long_as_the_text_stands_in(model: str) -> None:
    with Sandbox(speak=False) as sandbox:
        short, long = (sandbox.add_job("word " * words, model=model)["runId"] for words in (6, 60))
        answer = httpx.head(sandbox.completed_body(long)["audioUrl"])
        assert answer.headers["x-sandbox-voice"] == "tone"
        (seconds, loudness), (longer, _) = decode(sandbox.audio_bytes(short)), decode(sandbox.audio_bytes(long))
    assert seconds == pytest.approx(2, abs=0.4)
    assert longer == pytest.approx(20, abs=0.4)
    assert loudness > 1000


# The command


def start_command(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "prefect_nanogpt.sandbox", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_what_it_is_serves_and_stops_without_a_traceback(stop: signal.Signals) -> None:
    with start_command("--port", "0", "--job-seconds", "0") as process:
        assert process.stderr is not None
        said = ""
        while "NANOGPT_API_KEY" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        base_url = re.search(r"^export NANOGPT_BASE_URL=(\S+)\nexport NANOGPT_API_KEY=sandbox$", said, re.MULTILINE)
        assert base_url
        answer = httpx.post(f"{base_url[1]}/tts", headers={"x-api-key": KEY}, json={"text": "Hello", "model": MODEL})
        process.send_signal(stop)
        out, rest = process.communicate(timeout=20)
    assert answer.status_code == 202
    assert "not NanoGPT" in said
    assert "POST /api/tts -> 202" in rest
    assert "Stopped." in rest
    assert "Traceback" not in said + rest + out
    assert KEY not in said + rest + out
    assert process.returncode == 0


def test_it_listens_on_loopback_only() -> None:
    with pytest.raises(ValueError, match="loopback"):
        Sandbox(host="0.0.0.0")
    with Sandbox(host="localhost") as sandbox:
        assert httpx.get(sandbox.root_url).status_code == 200


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"port": 99_999}, "port must be from 0 to 65535, not 99999"),
        ({"port": -1}, "port must be from 0 to 65535"),
        ({"audio_port": 65_536}, "audio_port must be from 0 to 65535"),
        ({"port": 8765, "audio_port": 8765}, "a port each"),
        ({"job_seconds": -1}, "job_seconds"),
        ({"job_seconds": float("inf")}, "job_seconds"),
        ({"job_seconds": float("nan")}, "job_seconds"),
        ({"balance": "-1"}, "balance"),
        ({"balance": "Infinity"}, "balance"),
        ({"balance": "NaN"}, "balance"),
        ({"balance": "1e999999999"}, "balance"),
        ({"balance": "much"}, "balance"),
    ],
)
def test_values_that_cannot_be_right_are_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sandbox(**given)


def test_a_port_that_is_taken_is_an_error_and_lets_go_of_the_other() -> None:
    with Sandbox() as sandbox:
        taken = int(sandbox.root_url.rpartition(":")[2])
        with pytest.raises(OSError, match=f"127.0.0.1:{taken}"), Sandbox(audio_port=taken):
            pass
        with start_command("--port", str(taken)) as process:
            _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(rf".* cannot start: .*\(127.0.0.1:{taken}\)\n", said)


@pytest.mark.parametrize("arguments", [("--host", "0.0.0.0"), ("--port", "99999"), ("--port", "x"), ("--balance=nan",)])
def test_bad_usage_of_the_command_is_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    with start_command(*arguments) as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.count("\n") == 1
    assert "Traceback" not in said


# The published samples


def sample(language: str, sandbox: Sandbox, run_id: str = "") -> str:
    page = Path(__file__).with_name("samples").joinpath("tts-status.md").read_text(encoding="utf-8")
    code = re.search(rf"```{language}\n(.*?)```", page, re.DOTALL)
    assert code
    filled_in = code[1].replace("https://nano-gpt.com/api", sandbox.base_url)
    return filled_in.replace("YOUR_API_KEY", KEY).replace("RUN_ID", run_id)


def run_sample(language: str, sandbox: Sandbox, ticket: dict[str, Any], folder: Path) -> Any:
    """Run a sample in its own process on a ticket."""
    if language == "python":
        call = (
            f"print(wait_for_tts({ticket['runId']!r}, {MODEL!r}, {KEY!r}, cost={ticket['cost']}, payment_source='USD'))"
        )
        command = [sys.executable, "-c", f"{sample(language, sandbox)}\n{call}"]
    elif language == "javascript":
        if not shutil.which("node"):
            pytest.skip("node is not installed: the JavaScript sample is not run")
        call = f"console.log(await waitForTTS({json.dumps(ticket)}, {KEY!r}))"
        module = folder / "sample.mjs"
        module.write_text(f"{sample(language, sandbox)}\n{call}", encoding="utf-8")
        command = ["node", str(module)]
    else:
        if missing := [program for program in ("bash", "curl", "jq") if not shutil.which(program)]:
            pytest.skip(f"{', '.join(missing)} not installed: the shell sample is not run")
        command = ["bash", "-c", sample(language, sandbox, ticket["runId"])]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("language", ["python", "javascript", "bash"])
def test_a_published_sample_waits_for_the_audio(language: str, sandbox: Sandbox, tmp_path: Path) -> None:
    ticket = sandbox.add_job()
    if language == "bash":
        sandbox.on_status(ticket["runId"], [{"status": "pending", "queuePosition": 1}])  # its single check
    done = run_sample(language, sandbox, ticket, tmp_path)

    assert done.returncode == 0, done.stderr
    assert sandbox.completed_body(ticket["runId"])["audioUrl"] in done.stdout
    assert {request.status for request in sandbox.requests("status")} == {200}


@pytest.mark.parametrize("language", ["python", "javascript", "bash"])
def test_a_published_sample_fails_on_a_rejection(language: str, sandbox: Sandbox, tmp_path: Path) -> None:
    done = run_sample(language, sandbox, sandbox.add_job("[sandbox:reject]"), tmp_path)

    assert done.returncode == 1
    assert "Content rejected by provider" in done.stdout + done.stderr
    assert len(sandbox.ledger.refunds) == 1


# In the environment


@pytest.fixture
def nobodys_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NANOGPT_API_KEY", "NANOGPT_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def environment() -> tuple[str | None, str | None]:
    return os.environ.get("NANOGPT_API_KEY"), os.environ.get("NANOGPT_BASE_URL")


def test_within_its_block_a_sandbox_is_found_by_flows_and_children_even_where_a_key_is_set(
    nobodys_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NANOGPT_API_KEY", "sk-nano-of-somebody")
    script = "import os; print(os.environ['NANOGPT_API_KEY'], os.environ['NANOGPT_BASE_URL'])"
    with Sandbox(job_seconds=0, speak=False) as sandbox:
        audio = asyncio.run(text_to_speech("Without a key.", save_to=str(tmp_path)))
        child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert child.stdout.split() == ["sandbox", sandbox.base_url]
        [request] = sandbox.requests("submit")
        assert request.headers["x-api-key"] == "sandbox"
    assert Path(audio.location).exists()
    assert environment() == ("sk-nano-of-somebody", None)


def test_credentials_that_are_given_go_before_the_sandbox_of_the_block(
    nobodys_environment: None, tmp_path: Path
) -> None:
    with Sandbox(job_seconds=0, speak=False) as given, Sandbox(speak=False) as of_the_block:
        credentials = NanoGPTCredentials(api_key=SecretStr("mine"), base_url=given.base_url)
        asyncio.run(text_to_speech("With a key.", save_to=str(tmp_path), credentials=credentials))
        assert len(given.requests("submit")) == 1
        assert of_the_block.requests() == []


def test_sandboxes_that_end_in_another_order_leave_no_block_without_one(nobodys_environment: None) -> None:
    first, second = Sandbox(speak=False), Sandbox(speak=False)
    with ExitStack() as outer, ExitStack() as inner:
        inner.enter_context(first)
        outer.enter_context(second)
        assert environment()[1] == second.base_url
        inner.close()
        assert environment() == ("sandbox", second.base_url)
    assert environment() == (None, None)


# Where it cannot speak


def test_a_sandbox_without_its_extra_says_that_it_hums_and_so_does_the_run(
    nobodys_environment: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("prefect_nanogpt.sandbox.speech.can_speak", lambda: False)
    monkeypatch.setattr("prefect_nanogpt.sandbox.speech._espeak", lambda: None)
    with Sandbox(job_seconds=0) as sandbox, caplog.at_level("WARNING"):
        assert sandbox.hums
        audio = asyncio.run(text_to_speech("Hummed.", save_to=str(tmp_path), artifact_key="hummed"))
    assert audio.is_hummed
    assert HUMMED in caplog.text
    with get_client(sync_client=True) as client:
        [report] = client.read_artifacts(artifact_filter=ArtifactFilter(key={"any_": ["hummed"]}))
    assert HUMMED in str(report.data)


def test_a_sandbox_that_speaks_or_is_told_not_to_says_nothing_of_it(tmp_path: Path) -> None:
    for speak in (True, False):
        with Sandbox(job_seconds=0, speak=speak) as sandbox:
            assert not sandbox.hums
            audio = asyncio.run(text_to_speech("Heard.", save_to=str(tmp_path / str(speak))))
        assert not audio.is_hummed
