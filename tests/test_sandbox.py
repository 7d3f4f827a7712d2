"""The sandbox over real HTTP: the protocol, the faults it can be told to make, and that it really speaks."""

import array
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

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
        ({"model": "tts-1", "response_format": "opus"}, 400, "unsupported_format"),
        ({"text": "[sandbox:explode]"}, 400, "Known: reject"),
        ({"text": "[sandbox:wait]"}, 400, "Known: reject"),
        ({"text": "[sandbox:reject]", "model": "tts-1"}, 400, "content_policy_violation"),
    ],
)
def test_a_bad_submission_is_refused_and_costs_nothing(
    sandbox: Sandbox, api: httpx.Client, fields: dict[str, Any], code: int, says: str
) -> None:
    answer = submit(api, **fields)

    assert answer.status_code == code
    assert answer.json()["status"] == code
    assert says in answer.text
    assert not sandbox.ledger.charges


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
    with Sandbox(job_seconds=0.6) as sandbox, httpx.Client(headers={"x-api-key": KEY}) as client:
        ticket = sandbox.add_job("Hello there.")
        seen: list[Any] = []
        while (body := status_at(sandbox, client, ticket))["status"] == "pending":
            assert body["runId"] == ticket["runId"]
            seen.append(body.get("queuePosition"))
        assert [position for position, _ in itertools.groupby(seen)] == [3, 2, 1, None]
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


def test_balance_and_catalogue(sandbox: Sandbox, api: httpx.Client) -> None:
    balance = api.post("/check-balance").json()
    catalogue = httpx.get(f"{sandbox.base_url}/v1/audio-models", params={"detailed": "true", "type": "tts"}).json()

    assert balance["usd_balance"] == "100"
    rows = {row["id"]: row for row in catalogue["data"]}
    assert len(rows) == catalogue["meta"]["count"] == 7
    assert rows[MODEL]["pricing"] == {"currency": "USD", "per_thousand_chars": 0.06}
    assert rows[MODEL]["supported_parameters"]["max_chars"] == 10_000
    assert len(rows[MODEL]["supported_parameters"]["voices"]) == 46
    assert rows[MODEL]["capabilities"]["text_to_speech"] is True
    assert "Qwen-3-TTS-1.7B" not in rows, "its price is not known"


def test_keys_are_masked_on_the_api_side_and_plain_on_the_audio_side(sandbox: Sandbox, api: httpx.Client) -> None:
    ticket = submit(api).json()
    httpx.get(status(api, ticket).json()["audioUrl"], headers={"x-api-key": "leaked"})

    shown = httpx.get(f"{sandbox.root_url}/_sandbox/requests")
    assert KEY not in shown.text
    assert "leaked" in shown.text
    assert shown.json()["counts"] == {"submit": 1, "status": 1, "audio": 1, "other": 1}
    ledger = httpx.get(f"{sandbox.root_url}/_sandbox/ledger").json()
    assert ledger["counts"] == {"charge": 1}
    assert ledger["entries"][0]["run_id"] == ticket["runId"]
    assert "not NanoGPT" in httpx.get(sandbox.root_url).json()["about"]


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


def test_a_connection_can_be_cut_before_and_within_an_answer(sandbox: Sandbox, api: httpx.Client) -> None:
    ticket = sandbox.add_job()
    sandbox.on_status(ticket["runId"], [Cut(), Cut(after_bytes=5), Hang(0.05)])

    for error in ("without sending a response", "received 5 bytes", "without sending a response"):
        with pytest.raises(httpx.RemoteProtocolError, match=error):
            status(api, ticket)
    assert status(api, ticket).status_code == 200


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
        while "NANOGPT_BASE_URL" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        base_url = re.search(r"NANOGPT_BASE_URL=(\S+)", said)
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
    with start_command("--host", "0.0.0.0") as process:
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "loopback" in said
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
