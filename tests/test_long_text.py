"""Texts longer than a model takes: no word lost, no part paid for twice, one file."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import AudioError, ContentPolicyViolation, NanoGPTError, TTSJobRejected
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.models import AudioFile, PollSchedule
from prefect_nanogpt.sandbox import Answer, Sandbox
from tests.conftest import files_in
from tests.sounds import DECODED_RATE, decoded, played, tone

SENTENCES = (
    "Dr. Watson paid 3.50 for it, i.e. far too much.",
    "“Really?” asked Mr. Holmes!",
    "Frau Dr. Müller kam z. B. um 8.30 Uhr, d. h. zu spät.",
    "Größer wird's nicht; so ist das eben.",
    "M. Dupont est arrivé à 10 h. avec son chien, n'est-ce pas ?",
    "L'été fut long… et l'hiver aussi.",
)


def chapter(characters: int) -> str:
    """Write a text in three languages in which every sentence has a number of its own."""
    paragraphs: list[str] = []
    number = 0
    while sum(map(len, paragraphs)) < characters:
        paragraphs.append(" ".join(f"{SENTENCES[(number + i) % 6]} [{number + i}]" for i in range(1 + number % 9)))
        number += 1 + number % 9
    return "\n\n".join(paragraphs)


@pytest.fixture
def speech(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to, "poll": quick}


def assert_whole(audio: AudioFile, sandbox: Sandbox) -> None:
    parts = [len(decoded(sandbox.audio_bytes(charge.run_id))) / 2 / DECODED_RATE for charge in sandbox.ledger.charges]
    assert audio.duration_seconds == pytest.approx(played(audio.location), abs=0.1)
    assert audio.duration_seconds == pytest.approx(sum(parts), rel=0.01)
    assert audio.ticket is None
    if audio.currency is not None:  # models that answer with the audio itself do not say what they charged
        assert audio.cost == sum(charge.amount for charge in sandbox.ledger.charges)


async def test_sixty_thousand_characters_become_one_mp3(speech: dict[str, Any], sandbox: Sandbox, save_to: str) -> None:
    text = chapter(60_000)
    audio = await text_to_speech(text, **speech, max_chars=5_000)
    said = [request.json["text"] for request in sandbox.requests("submit")]
    assert len(said) > 12
    assert max(map(len, said)) <= 5_000
    assert sorted(" ".join(said).split()) == sorted(text.split())
    assert files_in(save_to) == [Path(audio.location)]
    assert audio.currency == "USD"
    assert_whole(audio, sandbox)


async def test_the_catalogue_knows_how_long_a_text_a_model_takes(speech: dict[str, Any], sandbox: Sandbox) -> None:
    audio = await text_to_speech(chapter(60_000), model="tts-1", response_format="wav", **speech)
    assert audio.container == "wav"
    assert 10_000 > max(len(request.json["text"]) for request in sandbox.requests("submit")) > 3_000
    assert len(sandbox.requests("submit")) == len(sandbox.ledger.charges) > 14
    assert_whole(audio, sandbox)


async def test_a_part_that_fails_fails_the_whole_and_the_others_are_kept(
    speech: dict[str, Any], sandbox: Sandbox, save_to: str
) -> None:
    text = "First part is fine. " * 3 + "\n\n" + "[sandbox:fail] Second part. " * 3 + "\n\n" + "Third part. " * 3
    state = await text_to_speech(text, **speech, max_chars=100, return_state=True)
    assert state.name == "TTS_FAILED"
    assert str(state.message).startswith("TTS_FAILED: Part 2 of 3: ")
    assert files_in(save_to) == []
    assert len(sandbox.ledger.charges) == 3


async def test_the_next_try_pays_only_for_the_part_that_failed(speech: dict[str, Any], sandbox: Sandbox) -> None:
    text = "The first part.\n\n[sandbox:fail] Two.\n\nThe third part."
    with pytest.raises(TTSJobRejected, match="Part 2 of 3"):
        await text_to_speech.with_options(retries=1)(text, **speech, max_chars=20)
    submitted = Counter(request.json["text"] for request in sandbox.requests("submit"))
    assert submitted == {"The first part.": 1, "[sandbox:fail] Two.": 2, "The third part.": 1}


async def test_parts_that_are_paid_for_are_fetched_where_the_limit_refuses_the_others(
    speech: dict[str, Any], sandbox: Sandbox, save_to: str
) -> None:
    text = "[sandbox:wait 2] A.\n\n[sandbox:fail] B."
    first = await text_to_speech(text, **speech, max_chars=20, timeout_seconds=0.5, return_state=True)
    assert (first.name, len(sandbox.ledger.charges)) == ("TTS_FAILED", 2)
    await asyncio.sleep(2)
    limit = sandbox.ledger.charged_total
    for _ in range(2):
        with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED: By the provider's catalogue"):
            await text_to_speech(text, **speech, max_chars=20, max_cost=limit)
    assert len(list(Path(save_to, ".nanogpt").glob("*.mp3"))) == len(sandbox.requests("audio")) == 1
    assert sandbox.ledger.charged_total == limit


async def test_a_refused_part_is_final(speech: dict[str, Any], sandbox: Sandbox) -> None:
    text = "The first part is all right.\n\n[sandbox:reject] The second."
    with pytest.raises(ContentPolicyViolation, match="Part 2 of 2"):
        await text_to_speech.with_options(retries=2)(text, **speech, max_chars=32)
    assert len(sandbox.requests("submit")) == 2


async def test_what_is_too_expensive_in_parts_is_refused_before_anything_is_paid_for(
    speech: dict[str, Any], sandbox: Sandbox
) -> None:
    with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED"):
        await text_to_speech(chapter(60_000), **speech, max_chars=5_000, max_cost="0.50")
    assert sandbox.ledger.charges == []


async def test_a_book_of_forty_parts_of_which_two_have_another_form_is_one_file(
    speech: dict[str, Any], sandbox: Sandbox, save_to: str
) -> None:
    others = [Answer(body=tone(form, 2.5)) for form in ("mp3 of variable rate", "wav")]
    sandbox.on_audio(None, [*[None] * 7, others[0], *[None] * 15, others[1]])
    text = "\n\n".join(f"Chapter {number} tells of the lamp and of who keeps it." for number in range(1, 41))

    audio = await text_to_speech(text, **speech, max_chars=60)

    assert len(sandbox.ledger.charges) == 40
    parts = [path for path in Path(save_to, ".nanogpt").iterdir() if path.suffix in (".mp3", ".wav")]
    assert Counter(path.suffix for path in parts) == {".mp3": 39, ".wav": 1}
    assert audio.container == "mp3"
    assert audio.duration_seconds == pytest.approx(played(audio.location), abs=0.1)
    assert audio.duration_seconds == pytest.approx(sum(map(played, parts)), rel=0.01)


async def test_parts_that_are_chained_ogg_are_joined(speech: dict[str, Any], sandbox: Sandbox) -> None:
    chained = tone("ogg opus", 2.0) + tone("ogg opus", 3.0)
    sandbox.on_audio(None, [Answer(body=chained)] * 2)

    audio = await text_to_speech("The first part of it.\n\nThe second part of it.", **speech, max_chars=25)

    assert audio.container == "ogg"
    assert audio.duration_seconds == pytest.approx(10.0, rel=0.01)
    assert played(audio.location) == pytest.approx(10.0, rel=0.01)


async def test_parts_that_cannot_be_joined_are_not_paid_for_again(
    speech: dict[str, Any], sandbox: Sandbox, save_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(files: list[Path], target: Path) -> str:
        raise AudioError("The pieces cannot be joined: no encoder", code="AUDIO_NOT_JOINABLE")

    text = "The first part of it.\n\nThe second part of it."
    with monkeypatch.context() as patched:
        patched.setattr("prefect_nanogpt.tasks.parts.join", failing)
        with pytest.raises(AudioError, match=r"All parts are paid for, and kept in .*nanogpt"):
            await text_to_speech(text, **speech, max_chars=25)
    audio = await text_to_speech(text, **speech, max_chars=25)
    assert files_in(save_to) == [Path(audio.location)]
    assert len(sandbox.ledger.charges) == 2
