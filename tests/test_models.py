"""The provider's words as types, for every shape that is documented or was seen."""

import json
from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from prefect_nanogpt.errors import normalize_code
from prefect_nanogpt.models import (
    AudioModel,
    Balance,
    Completed,
    Pending,
    Rejected,
    Ticket,
    TTSRequest,
    parse_balance,
    parse_models,
    parse_status,
    parse_submission,
)
from prefect_nanogpt.models import error_in as error_of

DOCUMENTED_TICKET = {
    "status": "pending",
    "runId": "98b0d593-fe8d-49b8-89c9-233022232297",
    "model": "Elevenlabs-Turbo-V2.5",
    "charged": True,
    "cost": 0.0050388,
    "paymentSource": "USD",
    "isApiRequest": True,
}
MODEL = "Elevenlabs-V3"


# Tickets


def test_a_ticket_takes_the_providers_json_as_it_is() -> None:
    ticket = Ticket.model_validate(DOCUMENTED_TICKET)

    assert ticket.run_id == DOCUMENTED_TICKET["runId"]
    assert ticket.cost == Decimal("0.0050388")
    assert (ticket.payment_source, ticket.is_api_request) == ("USD", True)


def test_a_ticket_takes_snake_case_names_too() -> None:
    by_name = Ticket(
        run_id=DOCUMENTED_TICKET["runId"],
        model=DOCUMENTED_TICKET["model"],
        cost="0.0050388",
        payment_source="USD",
        is_api_request=True,
    )

    assert by_name == Ticket.model_validate(DOCUMENTED_TICKET)


def test_a_run_id_and_a_model_are_a_ticket() -> None:
    ticket = Ticket.model_validate({"runId": " 98b0\n", "model": "m", "isApiRequest": None})

    assert (ticket.run_id, ticket.cost, ticket.payment_source, ticket.is_api_request) == ("98b0", None, None, True)


def test_a_ticket_becomes_the_providers_json_again() -> None:
    ticket = Ticket.model_validate(DOCUMENTED_TICKET)

    written = json.loads(ticket.to_json())

    assert written == {key: DOCUMENTED_TICKET[key] for key in DOCUMENTED_TICKET if key not in ("status", "charged")}
    assert Ticket.model_validate(written) == ticket
    assert Ticket.model_validate_json(ticket.model_dump_json()) == ticket


@pytest.mark.parametrize("around", ["{}", "\n{}\n", "```json\n{}\n```\n", "``` {} ```"])
def test_a_ticket_is_read_as_it_was_copied(around: str) -> None:
    ticket = Ticket.model_validate(DOCUMENTED_TICKET)
    assert Ticket.model_validate(around.replace("{}", ticket.to_json(indent=2))) == ticket


@pytest.mark.parametrize(
    "broken",
    [
        {"runId": ""},
        {"runId": "  "},
        {"runId": None},
        {"runId": 7},
        {"runId": "x" * 513},
        {"runId": ".."},
        {"runId": "../../etc/passwd"},
        {"runId": "a/../b"},
        {"runId": "a\\..\\b"},
        {"runId": "two\nlines"},
        {"runId": "nul\x00"},
        {"runId": "turned\u202eround"},
        {"model": ""},
        {"model": "two\n```\nlines"},
        {"paymentSource": "two\n```\nlines"},
        {"cost": -1},
        {"cost": "much"},
    ],
    ids=str,
)
def test_what_is_no_ticket_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Ticket.model_validate({**DOCUMENTED_TICKET, **broken})

    assert [error["loc"] for error in caught.value.errors()] == [tuple(broken)]


@pytest.mark.parametrize(
    "run_id", ["018f5c2e9d3b7c4e8a1b2c3d4e5f6071", "vc_run_789", "runs/eu/98b0", "a.b", "run:7", "läuft-1", "..."]
)
def test_run_ids_are_opaque(run_id: str) -> None:
    assert Ticket(run_id=run_id, model="m").run_id == run_id


# Requests


def test_a_request_sends_what_was_set_and_nothing_else() -> None:
    request = TTSRequest.model_validate(
        {"text": "Hello", "model": "Qwen-3-TTS-1.7B", "voice": "Ryan", "speed": 1.5, "top_k": 7, "prompt": None}
    )

    assert request.body() == {"text": "Hello", "model": "Qwen-3-TTS-1.7B", "voice": "Ryan", "speed": 1.5, "top_k": 7}


@pytest.mark.parametrize(
    "broken",
    [
        {"text": ""},
        {"text": " \n"},
        {"model": ""},
        {"speed": 0.05},
        {"speed": 5.1},
        {"stability": 1.1},
        {"similarity_boost": -0.1},
        {"style": 2},
        {"response_format": "pcm"},
    ],
    ids=str,
)
def test_what_the_provider_would_refuse_is_refused_before_it_is_sent(broken: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        TTSRequest.model_validate({"text": "Hello", **broken})

    assert [error["loc"] for error in caught.value.errors()] == [tuple(broken)]


# Status answers


@pytest.mark.parametrize("word", ["pending", "processing", "queued", "IN_QUEUE", " In_Progress "])
def test_a_known_word_for_waiting_is_waiting(word: str) -> None:
    status = parse_status({"status": word})

    assert status == Pending(word=word.strip().lower())
    assert status.is_known


@pytest.mark.parametrize("body", [{"status": "moderated", "error": "No."}, {"status": "pending", "terminal": True}])
def test_an_end_in_words_that_are_not_known_is_not_certain(body: dict[str, Any]) -> None:
    status = parse_status(body)

    assert isinstance(status, Rejected)
    assert not status.is_certain
    assert repr(body["status"]) in status.message
    failed = parse_status({"status": "error"})
    assert isinstance(failed, Rejected)
    assert failed.is_certain


def test_an_unknown_word_is_waiting_and_not_known() -> None:
    status = parse_status({"status": "Warming up", "audioUrl": "https://a.test/1.mp3"})

    assert status == Pending(word="warming up")
    assert not status.is_known


@pytest.mark.parametrize(("position", "read"), [(3, 3), (0, 0), ("3", None), (2.5, None), (True, None), (None, None)])
def test_the_queue_position_counts_where_it_is_a_number(position: object, read: int | None) -> None:
    assert parse_status({"status": "pending", "queuePosition": position}) == Pending(
        word="pending", queue_position=read
    )


def test_the_documented_completed_answer_is_completed() -> None:
    status = parse_status(
        {"status": "completed", "audioUrl": "https://a.test/1.mp3", "contentType": "audio/mpeg", "model": "m"}
    )

    assert status == Completed(audio_url="https://a.test/1.mp3", content_type="audio/mpeg")


@pytest.mark.parametrize(
    ("body", "url"),
    [
        ({"status": "succeeded", "audioUrl": "https://a.test/1.mp3"}, "https://a.test/1.mp3"),
        ({"status": "COMPLETED", "audioUrl": "https://a.test/1.mp3", "terminal": True}, "https://a.test/1.mp3"),
        (
            {"status": "completed", "audioUrls": ["https://a.test/1.mp3", "https://a.test/2.mp3"]},
            "https://a.test/1.mp3",
        ),
        ({"status": "completed", "audioUrl": "", "audioUrls": [None, "https://a.test/2.mp3"]}, "https://a.test/2.mp3"),
        ({"status": "completed", "audioUrl": "https://a.test/1.mp3", "audioUrls": []}, "https://a.test/1.mp3"),
        (
            {"status": "completed", "audioUrl": "https://a.test/1.mp3", "cost": "much", "duration": {}},
            "https://a.test/1.mp3",
        ),
        ({"status": "completed", "url": "https://a.test/1.mp3"}, "https://a.test/1.mp3"),
        ({"status": "completed", "data": {"audioUrl": "https://a.test/1.mp3"}}, "https://a.test/1.mp3"),
        ({"status": "completed", "audioUrl": None, "data": {"url": "https://a.test/1.mp3"}}, "https://a.test/1.mp3"),
        (
            {"status": "completed", "url": "https://a.test/1", "data": {"audioUrl": "https://b.test"}},
            "https://a.test/1",
        ),
        ({"status": "completed", "url": "https://a.test/1", "data": ["https://b.test"]}, "https://a.test/1"),
        ({"status": "ready", "terminal": True, "url": "https://a.test/1.mp3"}, "https://a.test/1.mp3"),
        ({"terminal": True, "audioUrl": "https://a.test/1.mp3"}, "https://a.test/1.mp3"),
    ],
)
def test_every_way_to_say_where_the_audio_is_counts(body: dict[str, Any], url: str) -> None:
    status = parse_status(body)

    assert isinstance(status, Completed)
    assert status.audio_url == url


@pytest.mark.parametrize(
    "nothing",
    [
        {},
        {"audioUrl": None},
        {"audioUrl": ""},
        {"audioUrls": []},
        {"audioUrls": "x"},
        {"data": None},
        {"terminal": True},
    ],
)
def test_completed_without_a_url_is_still_waiting(nothing: dict[str, Any]) -> None:
    assert parse_status({"status": "completed", **nothing}) == Pending(word="completed")


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"status": "error", "error": "TTS generation failed."}, "TTS_FAILED", "TTS generation failed."),
        ({"status": "error", "code": "CONTENT_POLICY_VIOLATION", "error": "No."}, "CONTENT_POLICY_VIOLATION", "No."),
        ({"status": "failed", "code": "content-policy violation"}, "CONTENT_POLICY_VIOLATION", "gave no reason"),
        ({"status": "content_policy_violation"}, "CONTENT_POLICY_VIOLATION", "gave no reason"),
        ({"status": "Canceled", "message": "By hand."}, "TTS_FAILED", "By hand."),
        ({"status": "cancelled", "error": {"message": "By hand.", "type": "by_user"}}, "BY_USER", "By hand."),
        ({"status": "error", "error": "x", "audioUrl": "https://a.test/1.mp3"}, "TTS_FAILED", "x"),
        ({"status": "moderated", "error": "Not this."}, "TTS_FAILED", "Not this."),
        ({"status": "expired", "error": {"message": "Too old.", "code": "gone"}}, "GONE", "Too old."),
        ({"status": "moderated", "terminal": True}, "TTS_FAILED", "'moderated'"),
        ({"status": "pending", "terminal": True}, "TTS_FAILED", "'pending'"),
        ({"status": "stopped", "terminal": True, "message": "By hand."}, "TTS_FAILED", "By hand."),
        ({"status": "error", "error": "CONTENT_POLICY_VIOLATION"}, "CONTENT_POLICY_VIOLATION", "CONTENT_POLICY"),
        ({"status": "error", "error": {"message": "content_policy_violation"}}, "CONTENT_POLICY_VIOLATION", "content"),
        (
            {"status": "failed", "code": "500", "error": "No.", "message": "Content policy violation: no."},
            "CONTENT_POLICY_VIOLATION",
            "No.",
        ),
        (
            {"status": "error", "error": {"code": "bad_request", "type": "CONTENT_POLICY_VIOLATION"}},
            "CONTENT_POLICY_VIOLATION",
            "gave no reason",
        ),
    ],
)
def test_every_way_to_fail_is_a_rejection(body: dict[str, Any], code: str, message: str) -> None:
    status = parse_status(body)

    assert isinstance(status, Rejected)
    assert status.code == code
    assert message in status.message
    assert status.is_content_policy == (code == "CONTENT_POLICY_VIOLATION")


@pytest.mark.parametrize(
    "body",
    [
        {"status": "pending", "error": "The last try failed, there is another one."},
        {"status": "warming up", "message": "Soon."},
        {"status": "warming up", "terminal": False, "error": None},
        {"status": "warming up", "terminal": "no", "error": ""},
        {"status": "warming up", "error": 0},
        {"status": "rendering", "error": "", "message": "Your audio is being rendered."},
        {"status": "rendering", "error": {}, "message": "Soon.", "type": "info"},
        {"status": "rendering", "error": None, "code": "rendering"},
        {"status": "processing", "error": "CONTENT_POLICY_VIOLATION was not seen"},
    ],
    ids=str,
)
def test_what_does_not_say_that_it_is_the_end_is_waited_for(body: dict[str, Any]) -> None:
    assert parse_status(body) == Pending(word=body["status"])


@pytest.mark.parametrize(
    "words",
    [
        "Content policy violations are looked for by a service that fails.",
        "Content policy violation scanner is unavailable, retry.",
        "There was no CONTENT_POLICY_VIOLATION.",
    ],
)
def test_words_about_policy_that_are_not_its_code_are_no_refusal(words: str) -> None:
    status = parse_status({"status": "error", "error": words})

    assert isinstance(status, Rejected)
    assert not status.is_content_policy


@pytest.mark.parametrize("body", [{}, {"status": None}, {"status": " "}, {"status": 200}, {"error": "No."}])
def test_an_answer_without_a_status_is_not_of_this_protocol(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no status"):
        parse_status(body)


# Submission answers


def test_the_documented_answers_to_a_submission_are_read() -> None:
    url = {"audioUrl": "https://a.test/1.wav", "contentType": "audio/wav", "duration": 2.3, "cost": 0.001}

    assert parse_submission(DOCUMENTED_TICKET, MODEL) == Ticket.model_validate(DOCUMENTED_TICKET)
    assert parse_submission({**url, "currency": "USD"}, MODEL) == Completed(
        audio_url="https://a.test/1.wav",
        content_type="audio/wav",
        duration_seconds=2.3,
        cost=Decimal("0.001"),
        currency="USD",
    )


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"cost": "free"},
        {"cost": -1},
        {"paymentSource": 7},
        {"isApiRequest": "perhaps"},
        {"model": "\n"},
        {"model": 7},
    ],
    ids=str,
)
def test_a_ticket_that_was_paid_for_is_kept_however_odd_the_rest_of_it_is(odd: dict[str, Any]) -> None:
    assert parse_submission({"status": "pending", "runId": "98b0", **odd}, MODEL) == Ticket(run_id="98b0", model=MODEL)


@pytest.mark.parametrize(
    "odd",
    [
        {"model": "\n"},
        {"model": {"id": "m"}},
        {"cost": "free"},
        {"cost": {"usd": 1}},
        {"paymentSource": ["USD"]},
        {"paymentSource": "two\nlines"},
        {"isApiRequest": "perhaps"},
        {"isApiRequest": 7},
        {"status": 202},
        {"charged": "maybe"},
    ],
    ids=str,
)
def test_a_ticket_with_one_odd_field_keeps_the_others(odd: dict[str, Any]) -> None:
    sound = DOCUMENTED_TICKET | {"model": "fal-ai/speech", "isApiRequest": False}

    ticket = parse_submission({**sound, **odd}, MODEL)

    [name] = odd
    instead = {"model": MODEL, "isApiRequest": True}.get(name)
    assert ticket == Ticket.model_validate({**sound, name: instead})


@pytest.mark.parametrize(
    "body",
    [
        {"status": "pending", "id": "98b0"},
        {"id": "98b0"},
        {"id": 98},
        {"runId": "98b0", "id": "another"},
        {"status": "pending", "id": "98b0", "url": "https://nano-gpt.test/status/98b0"},
    ],
    ids=str,
)
def test_the_run_id_is_read_from_id_where_there_is_no_other(body: dict[str, Any]) -> None:
    assert parse_submission(body, MODEL) == Ticket(run_id=str(body.get("runId") or body["id"]), model=MODEL)


def test_a_ticket_is_pasted_as_clients_have_it() -> None:
    assert Ticket.model_validate('{"id": "98b0", "model": "m"}') == Ticket(run_id="98b0", model="m")


@pytest.mark.parametrize(
    "body", [{"id": "98b0", "url": "https://a.test/1.mp3"}, {"data": {"url": "https://a.test/1.mp3"}}]
)
def test_audio_at_once_is_audio_whatever_its_id(body: dict[str, Any]) -> None:
    assert parse_submission(body, MODEL) == Completed(audio_url="https://a.test/1.mp3")


def test_the_id_of_an_error_is_no_ticket() -> None:
    with pytest.raises(ValueError, match="neither a run id nor an audio URL"):
        parse_submission({"id": "request-7", "error": "No."}, MODEL)


def test_an_answer_with_neither_ticket_nor_url_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a run id nor an audio URL"):
        parse_submission({"status": "pending"}, MODEL)


# Error bodies


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"error": {"message": "No.", "type": "a_type", "code": "a_code", "param": None}}, "A_CODE", "No."),
        ({"error": {"message": "No.", "type": "RATE_LIMITED"}, "refundMessage": "-"}, "RATE_LIMITED", "No."),
        ({"error": {"message": "No.", "type": "a_type", "code": None}}, "A_TYPE", "No."),
        ({"error": "Insufficient balance", "status": 402, "requiredBalance": 0.5}, None, "Insufficient balance"),
        ({"error": 400, "message": "No."}, None, "No."),
        ({"error": "No.", "code": "prompt_too_long"}, "PROMPT_TOO_LONG", "No."),
        ({"type": "server_error", "message": "No."}, "SERVER_ERROR", "No."),
        ({"message": " No. "}, None, "No."),
        ({"error": {"code": "only_a_code"}}, "ONLY_A_CODE", None),
        ({"error": {"code": 429, "message": " "}}, None, None),
        ({"error": None}, None, None),
        ({}, None, None),
        (["No."], None, None),
        ("No.", None, None),
        (None, None, None),
    ],
)
def test_code_and_message_are_found_in_every_shape_of_error(body: Any, code: str | None, message: str | None) -> None:
    assert error_of(body) == (code, message)


@pytest.mark.parametrize(
    ("code", "normal"),
    [
        ("content_policy_violation", "CONTENT_POLICY_VIOLATION"),
        (" <b>voice`|gone</b>\n", "B_VOICE_GONE_B"),
        ("x" * 200, "X" * 64),
        ("a" * 63 + "-b", "A" * 63),
        ("…", None),
        ("", None),
        (402, None),
        (None, None),
    ],
)
def test_a_code_is_kept_to_letters_digits_and_underscores(code: object, normal: str | None) -> None:
    assert normalize_code(code) == normal


# The catalogue and the balance


def model_of(**row: Any) -> AudioModel:
    """Read a row of the catalogue."""
    [model] = parse_models({"data": [{"id": "m", **row}]})
    return model


def test_a_price_by_characters_prices_a_text() -> None:
    model = model_of(
        name="A model",
        pricing={"currency": "USD", "per_thousand_chars": Decimal("0.06")},
        supported_parameters={"max_chars": 10_000, "voices": ["Ann", "Bob"], "response_formats": ["mp3", "wav"]},
    )

    assert model == AudioModel(
        id="m",
        name="A model",
        usd_per_thousand_chars=Decimal("0.06"),
        max_chars=10_000,
        voices=("Ann", "Bob"),
        response_formats=("mp3", "wav"),
    )
    assert model.price("x" * 84) == Decimal("0.00504")


@pytest.mark.parametrize(
    ("pricing", "price"),
    [
        ({"per_generation": 0.15}, "0.15"),
        ({"per_generation": 0.15, "per_thousand_chars": 10}, "0.20"),
        ({"per_generation": 0.15, "per_minute": 0, "per_second": None}, "0.15"),
        ({"per_thousand_chars": 0}, "0"),
    ],
    ids=str,
)
def test_a_price_by_generation_is_that_of_a_job_however_long_its_text(pricing: dict[str, Any], price: str) -> None:
    assert model_of(pricing=pricing).price("Hello") == Decimal(price)


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"pricing": {"currency": "XNO", "per_thousand_chars": 1}},
        {"pricing": {"per_thousand_chars": "varies"}},
        {"pricing": {"per_thousand_chars": "varies", "per_generation": 0.1}},
        {"pricing": {"per_thousand_chars": 0.06, "per_second": 0.01}},
        {"pricing": {"per_prompt_char_block": 0.1, "prompt_char_block_size": 100}},
        {"pricing": None, "supported_parameters": []},
        {"pricing": [0.06], "supported_parameters": {"max_chars": "many", "voices": "all", "response_formats": 3}},
        {"supported_parameters": {"max_chars": -1, "voices": [None, 7, {"id": 3}, {}, " "]}},
        {"supported_parameters": {"voices": {"default": None, "values": []}}},
        {"name": {"en": "A model"}},
    ],
    ids=str,
)
def test_what_is_odd_about_a_model_is_not_said(row: dict[str, Any]) -> None:
    model = model_of(**row)

    assert model == AudioModel(id="m")
    assert model.price("Hello") is None


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"capabilities": {"text_to_speech": True}}, "speech"),
        ({"category": "audio_tts"}, "speech"),
        ({"category": "audio_tts", "capabilities": {"text_to_speech": False, "voice_cloning": True}}, "speech"),
        ({"capabilities": {"text_to_speech": True, "voice_cloning": True}}, "speech"),
        ({"category": "audio_music", "capabilities": {"text_to_speech": True}}, "music"),
        ({"id": "Elevenlabs-Music-V1"}, "music"),
        ({"id": "minimax-voice-clone", "category": "audio_tts"}, "clone"),
        ({"category": "audio_voice_clone"}, "clone"),
        ({"id": "Cyclone-TTS", "category": "audio_tts"}, "speech"),
        ({"category": "text-to-speech"}, "speech"),
        ({"capabilities": {"voice_cloning": True}}, "clone"),
        ({"category": "audio_stt"}, "other"),
        ({"capabilities": {"text_to_speech": False}}, "other"),
    ],
    ids=str,
)
def test_speech_is_told_from_the_other_rows_of_the_catalogue(row: dict[str, Any], kind: str) -> None:
    assert model_of(**row).kind == kind


def test_rows_that_are_no_models_do_not_hide_the_others() -> None:
    rows = [
        None,
        "m",
        7,
        [],
        {},
        {"id": None},
        {"id": ""},
        {"id": "two\nlines"},
        {"id": "m"},
        {"id": "m", "name": "again"},
    ]

    assert parse_models({"data": rows}) == [AudioModel(id="m")]


@pytest.mark.parametrize(
    "voices",
    [
        ["Ann", "Ann", "Bob"],
        [{"id": "Ann"}, {"name": "Bob"}],
        [{"name": "Ann (US)", "voice": "Ann"}, {"label": "Bob", "value": "Bob"}],
        {"values": ["Ann", "Bob"], "default": "Ann"},
        {"en": ["Ann"], "de": ["Bob"]},
        {"Ann": {}, "Bob": {}},
    ],
    ids=str,
)
def test_voices_are_read_in_every_shape(voices: object) -> None:
    assert model_of(supported_parameters={"voices": voices}).voices == ("Ann", "Bob")


@pytest.mark.parametrize(
    "body", [{}, {"data": None}, {"data": {"id": "m"}}, {"object": "list"}, {"data": []}, {"data": [None, {}]}]
)
def test_what_is_no_list_of_models_is_no_catalogue(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="list of models"):
        parse_models(body)


@pytest.mark.parametrize(
    ("body", "balance"),
    [
        ({"usd_balance": "129.46956147", "nano_balance": "26.71801147"}, ("129.46956147", "26.71801147")),
        ({"usd_balance": Decimal("0.5"), "nano_balance": 3}, ("0.5", "3")),
        ({"usd_balance": "-0.25"}, ("-0.25", None)),
        ({"usd_balance": "much", "nano_balance": "0"}, (None, "0")),
        ({"usd_balance": "NaN", "nano_balance": "1e2"}, (None, "100")),
    ],
    ids=str,
)
def test_a_balance_is_exact_and_what_is_odd_about_it_is_unknown(
    body: dict[str, Any], balance: tuple[str | None, str | None]
) -> None:
    usd, xno = (None if amount is None else Decimal(amount) for amount in balance)

    assert parse_balance(body) == Balance(usd=usd, xno=xno)


@pytest.mark.parametrize("body", [{}, {"usd_balance": None}, {"usd_balance": "much", "nano_balance": []}])
def test_an_answer_without_an_amount_is_no_balance(body: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no balance"):
        parse_balance(body)
