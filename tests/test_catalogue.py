"""What the provider offers, what it would cost, and what is left: asked for, and told before anything is paid."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from pydantic import SecretStr

from prefect_nanogpt import NanoGPTCredentials, client
from prefect_nanogpt.catalogue import doubts_about
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import places_of
from prefect_nanogpt.errors import BatchPartial, NanoGPTError, ProviderError
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.models import AudioModel, Balance, PollSchedule, TTSRequest
from prefect_nanogpt.sandbox import Accept, Answer, Cut, Hang, Sandbox
from prefect_nanogpt.tasks import estimate, get_balance, list_models, list_voices
from tests.conftest import API_KEY, files_in
from tests.test_cli import run
from tests.test_long_text import chapter

TURBO = "Elevenlabs-Turbo-V2.5"
WEB_PAGE = Answer(body="<!doctype html><title>Soon</title>", headers={"content-type": "text/html"})


@pytest.fixture
async def asking(sandbox: Sandbox) -> AsyncIterator[NanoGPTClient]:
    async with NanoGPTClient(API_KEY, sandbox.base_url) as client:
        yield client


@pytest.fixture
def say(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to, "poll": quick}


@pytest.fixture
def ask(credentials: NanoGPTCredentials, save_to: str) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to}


@pytest.fixture
def key(sandbox: Sandbox) -> dict[str, str]:
    return {"NANOGPT_API_KEY": API_KEY, "NANOGPT_BASE_URL": sandbox.base_url}


def catalogue_of(*rows: Any) -> dict[str, Any]:
    return {"object": "list", "data": list(rows), "meta": {"count": len(rows)}}


# Reading


async def test_the_catalogue_tells_speech_from_music_and_cloning(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    models = {model.id: model for model in await asking.list_models()}

    assert {model.id: model.kind for model in models.values() if model.kind != "speech"} == {
        "Elevenlabs-Music-V1": "music",
        "minimax-voice-clone": "clone",
    }
    assert models[TURBO].price("x" * 1_000) == Decimal("0.06")
    assert models["microsoft/vibevoice"].price("x" * 1_000) == Decimal("0.15")
    assert models["Minimax-Speech-2.8-HD"].price("x") is None
    assert models["Elevenlabs-Music-V1"].price("x") is None
    assert models["tts-1"].response_formats == ("mp3", "opus", "aac", "flac", "wav")
    [request] = sandbox.requests("models")
    assert request.query == {"detailed": "true", "type": "tts"}


async def test_the_catalogue_is_kept_for_minutes_by_all_clients_of_a_process(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look() -> None:
        async with NanoGPTClient(API_KEY, sandbox.base_url) as client:
            assert await client.find_model(TURBO)
            assert await client.list_voices(TURBO)

    await look()
    await look()
    assert len(sandbox.requests("models")) == 1
    monkeypatch.setattr(client, "CATALOGUE_KEPT_SECONDS", -1.0)
    await look()
    assert len(sandbox.requests("models")) == 3


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (WEB_PAGE, "UNEXPECTED_ANSWER"),
        (Answer(json=["Elevenlabs-V3"]), "UNEXPECTED_ANSWER"),
        ({"data": "none"}, "UNEXPECTED_ANSWER"),
        (Answer(status=503, json={"error": "Down.", "code": "down"}), "DOWN"),
        (Cut(), "PROVIDER_UNREACHABLE"),
        (Hang(5), "PROVIDER_UNREACHABLE"),
    ],
    ids=str,
)
async def test_a_catalogue_that_cannot_be_read_is_an_error_and_not_kept(
    answer: Any, code: str, asking: NanoGPTClient, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LONGEST_CATALOGUE_SECONDS", 0.5)
    sandbox.on_models([answer])

    with pytest.raises(ProviderError) as caught:
        await asking.list_models()

    assert caught.value.code == code
    assert caught.value.retryable
    with pytest.raises(ProviderError):  # nobody waits for it again and again
        await asking.find_model(TURBO)
    assert len(sandbox.requests("models")) == 1
    async with NanoGPTClient(API_KEY, sandbox.base_url) as another:
        assert await another.find_model(TURBO)


async def test_five_thousand_rows_with_their_voices_are_read(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    voices = [f"voice-{number}" for number in range(150)]
    rows = [
        {"id": f"model-{number}", "category": "audio_tts", "supported_parameters": {"voices": voices}}
        for number in range(5_000)
    ]
    assert len(json.dumps(rows)) > 8 * 1024**2
    sandbox.on_models([catalogue_of(*rows)])

    models = await asking.list_models()

    assert len(models) == 5_000
    assert models[-1].voices == tuple(voices)


async def test_voices_are_those_of_the_model(asking: NanoGPTClient) -> None:
    assert await asking.list_voices("xai-tts") == ["Eve", "Ara", "Leo", "Rex", "Sal"]
    assert await asking.list_voices("microsoft/vibevoice") == []
    with pytest.raises(ProviderError, match=r"no model 'elevenlabs-v3'\. Perhaps Elevenlabs-V3 ") as caught:
        await asking.list_voices("elevenlabs-v3")
    assert caught.value.code == "MODEL_NOT_FOUND"
    assert not caught.value.retryable


async def test_a_balance_is_asked_for_with_the_key_and_is_exact(asking: NanoGPTClient, sandbox: Sandbox) -> None:
    assert await asking.get_balance() == Balance(usd=Decimal("100"), xno=Decimal("0"))
    sandbox.on_balance([{"usd_balance": "129.46956147", "nano_balance": "none"}])
    assert await asking.get_balance() == Balance(usd=Decimal("129.46956147"), xno=None)
    requests = sandbox.requests("balance")
    assert {(request.method, request.headers["x-api-key"]) for request in requests} == {("POST", API_KEY)}


@pytest.mark.parametrize("answer", [WEB_PAGE, {}, {"usd_balance": "much"}, Answer(status=500)], ids=str)
async def test_a_balance_that_is_not_told_is_an_error_and_not_zero(
    answer: Any, asking: NanoGPTClient, sandbox: Sandbox
) -> None:
    sandbox.on_balance([answer])
    with pytest.raises(ProviderError) as caught:
        await asking.get_balance()
    assert caught.value.retryable


async def test_a_refused_key_says_where_it_is_from(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = NanoGPTCredentials(api_key=SecretStr("bad-key"), base_url=sandbox.base_url)
    with pytest.raises(ProviderError, match="parameter `credentials`") as caught:
        await get_balance(bad)
    assert caught.value.http_status == 401
    assert len(sandbox.requests("balance")) == 1
    assert "bad-key" not in str(caught.value)


async def test_the_tasks_are_retried_in_a_flow(ask: dict[str, Any], sandbox: Sandbox) -> None:
    down = Answer(status=503, json={"error": "Down."})
    sandbox.on_models([down, WEB_PAGE])
    sandbox.on_balance([down])
    credentials = ask["credentials"]

    @flow
    async def looking() -> tuple[list[AudioModel], list[str], Balance]:
        return await list_models(credentials), await list_voices("tts-1", credentials), await get_balance(credentials)

    models, voices, balance = await looking()

    assert TURBO in {model.id for model in models}
    assert "alloy" in voices
    assert balance.usd == 100
    assert len(sandbox.requests("models")) == 3
    assert len(sandbox.requests("balance")) == 2


# Models and voices that the catalogue does not have


MODELS = [
    AudioModel(id=TURBO, voices=("Rachel", "Adam")),
    AudioModel(id="tts-1", voices=("alloy",), response_formats=("mp3", "WAV")),
    AudioModel(id="Minimax-Speech-2.8-HD", voices=("Deep_Voice_Man",)),
    AudioModel(id="unvoiced"),
    AudioModel(id="Elevenlabs-Music-V1", kind="music"),
]


@pytest.mark.parametrize(
    ("request_", "names", "formats"),
    [
        ({"model": TURBO, "voice": "Rachel"}, [], []),
        ({"model": TURBO}, [], []),
        ({"model": "unvoiced", "voice": "anybody"}, [], []),
        ({"model": "Minimax-Speech-2.8-HD", "voice": "MyVoice2026"}, [], []),
        ({"model": TURBO, "voice": "Rachell"}, ["no voice 'Rachell' of Elevenlabs-Turbo-V2.5. Perhaps Rachel is"], []),
        ({"model": TURBO, "voice": "MyVoice2026"}, ["no voice 'MyVoice2026'"], []),
        ({"model": "Minimax-Speech-2.8-HD", "voice": "DeepVoiceMan"}, ["Perhaps Deep_Voice_Man is meant."], []),
        ({"model": "ElevenLabs Turbo V2.5"}, ["Perhaps Elevenlabs-Turbo-V2.5 is meant."], []),
        ({"model": "Elevenlabs-Music-V1"}, ["is not for speech (music)"], []),
        ({"model": "tts-1", "response_format": "wav"}, [], []),
        ({"model": "tts-1", "response_format": "flac"}, [], ["does not offer the format 'flac', but mp3, WAV"]),
        ({"model": TURBO, "response_format": "wav"}, [], ["will answer with mp3, not wav"]),
        ({"model": TURBO, "response_format": "MP3"}, [], []),
        (
            {"model": "Kokoro-82m", "response_format": "mp3"},
            ["no model 'Kokoro-82m'"],
            ["will answer with wav, not mp3"],
        ),
        ({"model": "unvoiced", "response_format": "flac"}, [], []),
    ],
    ids=str,
)
def test_what_is_doubtful_is_said_with_what_may_be_meant(
    request_: dict[str, Any], names: Sequence[str], formats: Sequence[str]
) -> None:
    found = doubts_about([TTSRequest(text="Hi.", **request_), TTSRequest(text="Ho.", **request_)], MODELS)

    for said, wanted in ((found.names, names), (found.formats, formats)):
        assert len(said) == len(wanted)
        assert all(words in sentence for words, sentence in zip(wanted, said, strict=True))


def test_without_a_catalogue_nothing_is_said_against_names() -> None:
    request = TTSRequest(text="Hi.", model=TURBO, voice="Nobody", response_format="flac")
    assert doubts_about([request], None) == (
        [],
        [f"{TURBO} is known to ignore response_format: " + "it will answer with mp3, not flac."],
    )


async def test_a_doubtful_voice_is_warned_of_before_it_is_paid_for(
    say: dict[str, Any], sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    await text_to_speech("Hello.", voice="Rachell", **say)

    assert "no voice 'Rachell' of Elevenlabs-Turbo-V2.5. Perhaps Rachel is meant." in caplog.text
    assert [request.kind for request in sandbox.requests()][:2] == ["models", "submit"]
    caplog.clear()
    await text_to_speech("Hello.", voice="Rachell", **say)
    assert "no voice" not in caplog.text  # nothing is submitted that it could be about
    assert len(sandbox.requests("submit")) == 1


async def test_what_is_strict_submits_nothing_that_is_doubtful(say: dict[str, Any], sandbox: Sandbox) -> None:
    state = await text_to_speech("Hello.", voice="Rachell", strict=True, **say, return_state=True)
    assert state.name == "NOT_IN_CATALOGUE"
    assert "Nothing was submitted." in str(state.message)

    lines = [{"id": "a", "text": "Hello."}, {"id": "b", "text": "Bye.", "model": "tts-2"}]
    with pytest.raises(NanoGPTError, match=r"no model 'tts-2'\. Perhaps tts-1 ") as caught:
        await text_to_speech_batch(lines, strict=True, **say)
    assert caught.value.code == "NOT_IN_CATALOGUE"
    assert sandbox.requests("submit") == []
    assert [path.name for path in files_in(say["save_to"])] == ["manifest.jsonl"]

    assert await text_to_speech("Hello.", voice="Rachel", strict=True, **say)


async def test_what_is_strict_fetches_what_is_paid_for(say: dict[str, Any], sandbox: Sandbox) -> None:
    sandbox.on_status(None, [{"status": "pending"}] * 2)
    with pytest.raises(BatchPartial):
        await text_to_speech_batch([{"id": "a", "text": "Paid.", "voice": "Rachell"}], timeout_seconds=0.5, **say)
    lines = [{"id": "a", "text": "Paid.", "voice": "Rachell"}, {"id": "b", "text": "New.", "voice": "Nobody"}]

    with pytest.raises(NanoGPTError, match="no voice 'Nobody'") as caught:
        await text_to_speech_batch(lines, strict=True, **say)

    assert caught.value.code == "NOT_IN_CATALOGUE"
    assert [path.name for path in files_in(say["save_to"])] == ["a.mp3", "manifest.jsonl"]
    assert len(sandbox.ledger.charges) == 1
    assert (
        await estimate(lines=lines[:1], strict=True, save_to=say["save_to"], credentials=say["credentials"])
    ).jobs == 1


async def test_a_run_goes_on_without_the_catalogue_and_says_so(
    say: dict[str, Any], sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    sandbox.on_models(repeat(WEB_PAGE, 2))

    await text_to_speech("Hello.", voice="Rachell", strict=True, **say)
    await text_to_speech_batch([{"id": "a", "text": "Bye.", "voice": "Rachell"}], **say)

    assert caplog.text.count("The catalogue cannot be read, so whether it has the models and voices") == 2
    assert len(sandbox.ledger.charges) == 2


async def test_a_batch_reads_the_catalogue_once_and_warns_once(
    say: dict[str, Any], sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{"id": f"{number}", "text": f"Line {number}.", "voice": "Nobody"} for number in range(20)]

    await text_to_speech_batch(lines, max_cost=5, **say)

    assert caplog.text.count("no voice 'Nobody'") == 1
    assert len(sandbox.requests("models")) == 1


# Tickets by the provider's own name of the model


async def test_a_ticket_is_asked_for_by_the_model_that_it_names(
    credentials: NanoGPTCredentials, say: dict[str, Any], sandbox: Sandbox
) -> None:
    sandbox.on_submit([Accept(qualified_model=True)])

    audio = await text_to_speech("Hello.", **say)

    assert audio.ticket is not None
    assert audio.ticket.model == "fal-ai/elevenlabs/tts/turbo-v2.5"
    assert {request.query["model"] for request in sandbox.requests("status")} == {audio.ticket.model}
    again = await text_to_speech("Hello.", **say)
    assert again.location == audio.location
    assert len(sandbox.ledger.charges) == 1


async def test_a_job_that_is_asked_for_by_another_model_is_told_what_may_be_wrong(save_to: str) -> None:
    with Sandbox(job_seconds=0, speak=False, qualified_models=True) as sandbox:
        ticket = sandbox.add_job() | {"model": TURBO}
        with pytest.raises(ProviderError, match=f"a job of {TURBO}: the provider may know it only by the model that"):
            await wait_for_tts(ticket, save_to=save_to)


@pytest.mark.parametrize("base_url", ["https://api.nano-gpt.com/api", "https://nano-gpt.com/api/"])
async def test_the_two_hosts_of_the_provider_have_the_same_jobs(base_url: str) -> None:
    credentials = NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url=base_url)

    assert (await places_of(credentials)).provider == "https://nano-gpt.com/api"
    async with credentials.get_client() as client:
        assert client.base_url == base_url.rstrip("/")


# What it would cost


async def test_an_estimate_of_a_text_is_what_the_run_is_charged_and_nothing_is_written(
    say: dict[str, Any], ask: dict[str, Any], sandbox: Sandbox, save_to: str
) -> None:
    text = "What does this cost? " * 7

    before = await estimate(text, voice="Rachel", **ask)

    assert not Path(save_to).exists()
    assert sandbox.requests("submit") == []
    assert (before.lines, before.jobs, before.paid_jobs, before.new_jobs) == (1, 1, 0, 1)
    assert before.characters == len(text)
    assert before.balance == Balance(usd=Decimal(100), xno=Decimal(0))
    assert (before.spent, before.unknown, before.warnings) == ({}, (), ())
    await text_to_speech(text, voice="Rachel", **say)
    assert before.usd == sandbox.ledger.charged_total

    after = await estimate(text, voice="Rachel", **ask)
    assert (after.usd, after.paid_jobs, after.new_jobs, after.models) == (0, 1, 0, ())
    assert after.spent == {"USD": sandbox.ledger.charged_total}
    assert after.balance is not None
    assert after.balance.usd == sandbox.ledger.balance
    assert (await estimate(text, voice="Rachel", take=2, **ask)).new_jobs == 1


async def test_an_estimate_of_a_batch_counts_equal_lines_once_and_what_is_paid_for_not_at_all(
    say: dict[str, Any], ask: dict[str, Any], sandbox: Sandbox, tmp_path: Path
) -> None:
    table = tmp_path / "lines.csv"
    table.write_text(
        "id,text,voice,model\na,Hello there.,,\nb,Hello there.,,\nc,Hello there.,Adam,\nd,Good-bye.,alloy,tts-1\n"
        "e,A flat price.,,microsoft/vibevoice\n"
    )
    await text_to_speech("Hello there.", voice="Adam", **say)
    paid = sandbox.ledger.charged_total

    before = await estimate(lines=str(table), **ask)

    assert (before.lines, before.jobs, before.paid_jobs, before.new_jobs) == (5, 4, 1, 3)
    assert before.spent == {"USD": paid}
    assert [(one.model, one.jobs, one.characters, one.usd) for one in before.models] == [
        ("microsoft/vibevoice", 1, 13, Decimal("0.15")),
        (TURBO, 1, 12, Decimal("0.00072")),
        ("tts-1", 1, 9, Decimal("0.000135")),
    ]
    await text_to_speech_batch(str(table), **say)
    assert before.usd == sandbox.ledger.charged_total - paid
    after = await estimate(lines=table, **ask)
    assert (after.new_jobs, after.paid_jobs, after.usd) == (0, 4, 0)


async def test_an_estimate_of_a_long_text_counts_its_parts_as_they_will_be(
    say: dict[str, Any], ask: dict[str, Any], sandbox: Sandbox
) -> None:
    text = chapter(25_000)

    before = await estimate(text, **ask)

    assert before.jobs > 2
    await text_to_speech(text, **say)
    assert len(sandbox.ledger.charges) == before.jobs
    assert sandbox.ledger.charged_total == before.usd
    assert (await estimate(text, **ask)).new_jobs == 0

    edited = text.replace("Watson paid", "Watson once paid", 1)
    before = await estimate(edited, max_chars=5_000, **ask)
    charged, count = sandbox.ledger.charged_total, len(sandbox.ledger.charges)
    await text_to_speech(edited, max_chars=5_000, **say)
    assert sandbox.ledger.charged_total - charged == before.usd
    assert len(sandbox.ledger.charges) - count == before.new_jobs


async def test_an_estimate_tells_what_is_held_back_and_what_resubmit_would_pay_again(
    say: dict[str, Any], ask: dict[str, Any], sandbox: Sandbox
) -> None:
    lines = [
        {"id": "refused", "text": "[sandbox:reject] No."},
        {"id": "failed", "text": "[sandbox:fail] No."},
        {"id": "lost", "text": "Where is it?"},
        {"id": "uncertain", "text": "Who knows?"},
        {"id": "saved", "text": "Here."},
    ]
    with pytest.raises(BatchPartial):
        await text_to_speech_batch(lines[:2], **say)
    sandbox.on_submit([Accept(then=Cut())])
    with pytest.raises(BatchPartial):
        await text_to_speech_batch(lines[3:4], **say)
    sandbox.on_status(None, repeat(Answer(status=404), 8))
    with pytest.raises(BatchPartial):
        await text_to_speech_batch(lines[2:3], **say)
    sandbox._api.scripts.take("status", None)
    await text_to_speech_batch(lines[4:], **say)

    found = await estimate(lines=lines, **ask)
    assert (found.jobs, found.paid_jobs, found.held_jobs, found.new_jobs) == (5, 1, 3, 1)
    everything = await estimate(lines=lines, resubmit=["uncertain", "lost", "refused"], **ask)
    assert (everything.paid_jobs, everything.held_jobs, everything.new_jobs) == (1, 0, 4)
    assert everything.usd == sum(Decimal("0.06") * len(line["text"]) / 1000 for line in lines[:4])


async def test_an_estimate_says_what_it_does_not_know(ask: dict[str, Any], sandbox: Sandbox) -> None:
    unpriced = await estimate("Hello.", model="Minimax-Speech-2.8-HD", **ask)
    assert unpriced.unknown == ("What Minimax-Speech-2.8-HD costs: the catalogue has no price of it.",)
    assert (unpriced.usd, unpriced.models[0].usd) == (0, None)

    client._catalogues.clear()
    sandbox.on_models([WEB_PAGE, WEB_PAGE])
    sandbox.on_balance([Answer(status=500)])
    blind = await estimate("Hello.", **ask)
    assert blind.balance is None
    assert [sentence.partition(":")[0] for sentence in blind.unknown] == [
        "The prices, and whether models and voices are there",
        "The balance",
    ]
    assert blind.models[0].usd is None


async def test_an_estimate_warns_of_what_would_go_wrong(ask: dict[str, Any], sandbox: Sandbox) -> None:
    sandbox.on_balance([{"usd_balance": "0.0001"}])

    found = await estimate("Hello there.", voice="Rachell", response_format="wav", **ask)

    assert [sentence[:40] for sentence in found.warnings] == [
        "The catalogue has no voice 'Rachell' of ",
        "Elevenlabs-Turbo-V2.5 is known to ignore",
        "The balance does not cover it.",
    ]
    with pytest.raises(NanoGPTError, match="no voice 'Rachell'"):
        await estimate("Hello there.", voice="Rachell", strict=True, **ask)
    longest = await estimate(lines=[{"id": "a", "text": "x" * 4_097}], model="tts-1", max_cost="0.01", **ask)
    assert [sentence.partition(":")[0] for sentence in longest.warnings] == [
        "1 text is longer than tts-1 takes by the catalogue (4,096 characters), and may be refused.",
        "With what is spent that is more than max_cost=0.01",
    ]


async def test_a_refused_key_is_no_estimate(ask: dict[str, Any], sandbox: Sandbox) -> None:
    ask["credentials"] = NanoGPTCredentials(api_key=SecretStr("bad-key"), base_url=sandbox.base_url)
    with pytest.raises(ProviderError) as caught:
        await estimate("Hello there.", **ask)
    assert caught.value.http_status == 401


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ({}, "INVALID_REQUEST"),
        ({"text": "Hi.", "lines": []}, "INVALID_REQUEST"),
        ({"text": " "}, "INVALID_REQUEST"),
        ({"text": "Hi.", "speed": 9}, "INVALID_REQUEST"),
        ({"text": "Hi.", "take": 0}, "INVALID_REQUEST"),
        ({"text": "Hi.", "max_chars": 3}, "INVALID_REQUEST"),
        ({"text": "Hi.", "resubmit": ["everything"]}, "INVALID_REQUEST"),
        ({"lines": []}, "INVALID_LINES"),
        ({"lines": "no-such.csv"}, "LINES_UNREADABLE"),
        ({"lines": {"id": "a", "text": "Hi."}}, "INVALID_REQUEST"),
    ],
    ids=str,
)
async def test_what_is_not_in_order_has_no_estimate(given: dict[str, Any], code: str, ask: dict[str, Any]) -> None:
    with pytest.raises(NanoGPTError) as caught:
        await estimate(**given, **ask)
    assert caught.value.code == code


# The commands


def test_models_voices_and_balance_are_shown_to_people_and_programs(tmp_path: Path, key: dict[str, str]) -> None:
    table = run("models", cwd=tmp_path, server=False, **key)
    assert (table.returncode, table.stderr) == (0, "")
    rows = [line.split() for line in table.stdout.splitlines()]
    assert [TURBO, "0.06", "10,000", "46", "speech"] in rows
    assert ["microsoft/vibevoice", "0.15", "speech"] in rows
    assert ["Minimax-Speech-2.8-HD", "unknown", "2", "speech"] in rows
    kinds = [row[-1] for row in rows if row and row[-1] in ("speech", "music", "clone")]
    assert kinds == sorted(kinds, key=["speech", "music", "clone"].index)
    narrow = run("models", cwd=tmp_path, server=False, COLUMNS="80", **key)
    assert "gemini-2.5-flash-preview-tts" in narrow.stdout

    models = json.loads(run("models", "--json", cwd=tmp_path, server=False, **key).stdout)
    assert {model["id"]: model["usd_per_thousand_chars"] for model in models}["tts-1"] == "0.015"
    assert run("voices", "xai-tts", cwd=tmp_path, server=False, **key).stdout.splitlines()[0] == "Eve"
    assert json.loads(run("voices", "xai-tts", "--json", cwd=tmp_path, server=False, **key).stdout)[0] == "Eve"
    assert run("balance", cwd=tmp_path, server=False, **key).stdout.splitlines() == ["100 USD", "0 XNO"]
    assert json.loads(run("balance", "--json", cwd=tmp_path, server=False, **key).stdout)["usd"] == "100"


def test_the_lookups_say_what_is_wrong(tmp_path: Path, key: dict[str, str]) -> None:
    unknown = run("voices", "tts1", cwd=tmp_path, server=False, **key)
    assert unknown.returncode == 1
    assert "Perhaps tts-1" in unknown.stderr
    refused = run("balance", cwd=tmp_path, server=False, **key | {"NANOGPT_API_KEY": "bad-key"})
    assert refused.returncode == 1
    assert "INVALID_API_KEY" in refused.stderr
    assert "Traceback" not in refused.stderr + unknown.stderr


def test_without_a_key_nobody_is_asked_in_the_place_of_the_provider(tmp_path: Path) -> None:
    done = run("balance", "--json", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "MISSING_CREDENTIALS" in done.stderr


def test_ctrl_c_ends_a_question_without_a_traceback(tmp_path: Path, sandbox: Sandbox, key: dict[str, str]) -> None:
    sandbox.on_balance([Hang(60)])
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "prefect-nanogpt"), "balance"],
        cwd=tmp_path,
        env={**os.environ, **key},
        stderr=subprocess.PIPE,
        text=True,
    )
    sandbox.wait_for_request("balance", timeout=60)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in told


def test_a_dry_run_shows_the_price_and_submits_nothing(tmp_path: Path, sandbox: Sandbox, key: dict[str, str]) -> None:
    shown = run("say", "Hello there.", "--dry-run", cwd=tmp_path, server=False, PREFECT_API_URL="", **key)
    assert shown.returncode == 0
    assert "server" not in shown.stderr  # of Prefect, which it does not need
    told = dict(line.strip().split("  ", 1) for line in shown.stdout.splitlines())
    told = {name: value.strip() for name, value in told.items()}
    assert told == {
        "Lines": "1, with 12 characters",
        "Jobs": "1: 0 paid for, 1 to be submitted",
        TURBO: "1 job, 12 characters at 0.06 USD per 1,000: 0.00072 USD",
        "Would be charged": "0.00072 USD",
        "Charged before": "nothing known",
        "Balance": "100 USD, 0 XNO",
    }
    (tmp_path / "lines.csv").write_text("id,text\na,Hello.\n")
    batch = run("batch", "lines.csv", "--dry-run", "--voice", "Rachell", cwd=tmp_path, server=False, **key)
    assert "0.00036 USD" in batch.stdout
    assert "Perhaps Rachel is meant" in batch.stdout
    strict = run("batch", "lines.csv", "--dry-run", "--voice", "Rachell", "--strict", cwd=tmp_path, server=False, **key)
    assert strict.returncode == 1
    assert sandbox.requests("submit") == []
    assert not (tmp_path / "audio").exists()
