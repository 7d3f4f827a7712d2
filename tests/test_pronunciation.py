"""Words that are said otherwise than they are written: what is found, what is said, what is kept as written."""

import json
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch
from prefect_nanogpt.models import PollSchedule
from prefect_nanogpt.pronunciation import Pronunciation, read_pronunciation
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.tasks import estimate
from tests.conftest import API_KEY
from tests.test_cli import run

MODEL = "Elevenlabs-Turbo-V2.5"


def said(words: dict[str, Any], text: str) -> str:
    return read_pronunciation(words).apply(text).text


# What is found


@pytest.mark.parametrize(
    ("words", "text", "heard"),
    [
        ({"Nguyen": "win"}, "Nguyen, NGUYEN and nguyen's.", "win, win and win's."),
        ({"Ann": "En"}, "Ann and Anna, Joann, Ann2, An-Ann", "En and Anna, Joann, Ann2, An-En"),
        ({"New York": "Nyu", "New": "Niu", "York": "Jork"}, "New York, new\n york; New, York", "Nyu, Nyu; Niu, Jork"),
        ({"Dr. No": "Doctor No", "Dr.": "Doctor"}, "Dr. No and Dr. Nod", "Doctor No and Doctor Nod"),
        ({"C++": "see plus plus", "C": "see"}, "C++ is no C.", "see plus plus is no see."),
        ({".NET": "dot net"}, "in .NET and ASP.NET", "in dot net and ASPdot net"),
        ({"3": "three", "1.5": "one and a half"}, "3 of 3.50, 13, 1.5, v3", "three of 3.50, 13, one and a half, v3"),
        ({"don't": "dont"}, "I don\u2019t. I don't.", "I dont. I dont."),
        ({"a": "b", "b": "a"}, "a b a", "b a b"),
        ({"a": "a a"}, "a", "a a"),
        ({"café": "kaffay"}, "cafe\u0301, CAFÉ, cafés", "kaffay, kaffay, cafés"),
        ({"e": "ee"}, "e e\u0301", "ee e\u0301"),
        ({"Straße": "street"}, "STRASSE, straße", "street, street"),
        ({"東京": "とうきょう"}, "東京都と京都、AI東京", "とうきょう都と京都、AIとうきょう"),
        ({"ไทย": "Thai"}, "ภาษาไทยครับ", "ภาษาThaiครับ"),
        ({"हिन्दी": "Hindi", "हिन": "no"}, "मैं हिन्दी में", "मैं Hindi में"),
        ({"שלום": "shalom"}, "שלום, עולם", "shalom, עולם"),
        ({"🙂": "smiles"}, "Hi 🙂!", "Hi smiles!"),
        ({"x": r"\1 \g<0>"}, "x", r"\1 \g<0>"),
        ({"New": "nu", "New York": "noo york", "C": "see", "C++": "see plus"}, "C, New", "see, nu"),
        ({"New York": "noo york"}, "New\u00a0York, New\u2009York, New\u3000York", "noo york, noo york, noo york"),
        ({"New\u00a0York": "noo york"}, "New York", "noo york"),
        (
            {"💻": "computer", "👍": "yes", "🇩🇪": "Germany"},
            "👩\u200d💻 👍🏽 🇦🇩🇪🇺 👍 🇩🇪",
            "👩\u200d💻 👍🏽 🇦🇩🇪🇺 yes Germany",
        ),
        ({"❤": "love"}, "I ❤\ufe0f it, I ❤ it", "I love it, I love it"),
        ({"x": "y"}, "!!! ...", "!!! ..."),
        ({"x": "y"}, "", ""),
        ({}, "As it is.", "As it is."),
    ],
)
def test_whole_words_are_replaced_once_the_longest_first(words: dict[str, Any], text: str, heard: str) -> None:
    assert said(words, text) == heard


def test_case_counts_where_an_entry_asks_for_it() -> None:
    words = {
        "US": {"say": "U. S.", "case": True},
        "us": {"say": "uss", "case": "yes"},
        "IT": {"say": "I. T.", "case": 1},
    }
    assert said(words, "US us Us, IT it") == "U. S. uss Us, I. T. it"
    assert (
        said({"Polish": {"say": "Poelish", "case": True}, "polish": "pollish"}, "Polish, polish") == "Poelish, pollish"
    )


# What was written


def test_what_was_written_is_found_again_for_every_part_of_what_is_said() -> None:
    spoken = read_pronunciation({"Dr.": "Doctor", "Nguyen": "Win"}).apply("Ask Dr. Nguyen. Or not.")

    assert spoken.text == "Ask Doctor Win. Or not."
    for cut in range(len(spoken.text) + 1):
        first, second = spoken.written_between(0, cut), spoken.written_between(cut, len(spoken.text))
        assert first + second == spoken.written
    end = spoken.text.index(". Or") + 1
    assert spoken.written_between(0, end) == "Ask Dr. Nguyen."
    assert spoken.written_between(end + 1, len(spoken.text)) == "Or not."
    assert spoken.written_between(4, 10) == "Dr."


# Reading


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("words.csv", "word,say\nNguyen,win\nUS,U. S.\n"),
        ("words.csv", "\ufeffWord;Say;#remark\nNguyen;win;a name\nUS;U. S.;\n"),
        ("words.csv", "say\tword\tcase\nwin\tNguyen\tno\nU. S.\tUS\tyes\n"),
        ("words.json", json.dumps([{"word": "Nguyen", "say": "win"}, {"word": "US", "say": "U. S."}])),
        ("words.jsonl", '{"word": "Nguyen", "say": "win"}\n{"word": "US", "say": "U. S.", "case": true}\n'),
    ],
)
def test_a_file_is_read_as_spreadsheets_save_it(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)

    assert read_pronunciation(path).apply("Nguyen of the US").text == "win of the U. S."
    assert read_pronunciation(path.as_uri()).apply("Nguyen").text == "win"


def test_a_table_without_rows_and_nothing_at_all_change_nothing(tmp_path: Path) -> None:
    (tmp_path / "words.csv").write_text("word,say\n")
    assert not read_pronunciation(tmp_path / "words.csv")
    assert not read_pronunciation(None)
    assert Pronunciation().apply("As it is.").text == "As it is."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "line 1: the columns word and say are needed, named in the first line"),
        ("a,b\n", "line 1: the columns word and say are needed, named in the first line; found: 'a', 'b'"),
        ("word,say\nNguyen,\n", "line 2: there is no say"),
        ("word,say\n,win\n", "line 2: there is no word"),
        ("word,say\nNguyen,win\nNGUYEN,nwin\n", "line 3: 'NGUYEN' is there twice, as 'win' too"),
        ("word,say,case\nNguyen,win,perhaps\n", "line 2: case: 'perhaps' is neither yes nor no"),
        ("word,say,voice\nNguyen,win,Adam\n", "line 2: 'voice' is unknown: there are word, say and case"),
        ('word,say\n"Nguyen,win\n', "line 2: a quotation mark opens a text here"),
        (f"word,say\nNguyen,{'win ' * 300}\n", "line 2: word has at most 100 characters, and say 1000"),
        ('[{"word": "Nguyen"}]', "line 1: there is no say"),
        ('["Nguyen"]', "line 1: not an object with word and say"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "words.csv").write_text(content)
    with pytest.raises(NanoGPTError) as caught:
        read_pronunciation(tmp_path / "words.csv")
    assert caught.value.code == "INVALID_PRONUNCIATION"
    assert words in str(caught.value)
    assert "Nothing was submitted." in str(caught.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"Nguyen": ""}, "there is no say"),
        ({"Nguyen": 7}, "say: 7 is no text"),
        ({" ": "win"}, "word: ' ' is no text"),
        ({"Nguyen": "w\x00n"}, "control character"),
        ({"Nguyen": "\ud800"}, "half a character"),
        ({"Nguyen": {"says": "win"}}, "'says' is unknown"),
        ({"a " * 51 + "b": "c"}, "word has at most 100 characters"),
        ({"a": "b", "A": "c"}, "'A' is there twice"),
        (["Nguyen"], "neither a mapping"),
    ],
)
def test_what_is_wrong_with_a_mapping_is_told(given: Any, words: str) -> None:
    with pytest.raises(NanoGPTError, match="pronounce: ") as caught:
        read_pronunciation(given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"word,say\nCaf\xe9,kaffay\n", "is not UTF-8"), (b"PK\x03\x04", "a workbook"), (None, "No such file")],
)
def test_a_file_that_cannot_be_read_is_told(content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "words.csv").write_bytes(content)
    with pytest.raises(NanoGPTError) as caught:
        read_pronunciation(tmp_path / "words.csv")
    assert caught.value.code == "PRONUNCIATION_UNREADABLE"
    assert words in str(caught.value)


# In the flows


@pytest.fixture
def say(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to, "poll": quick}


WORDS = {"Nguyen": "win", "NASA": "nassa"}


def submitted(sandbox: Sandbox) -> list[str]:
    return [request.json["text"] for request in sandbox.requests("submit")]


async def test_what_is_said_is_what_is_priced_and_what_tells_jobs_apart(say: dict[str, Any], sandbox: Sandbox) -> None:
    text = "Mr. Nguyen of NASA."
    await text_to_speech(text, pronounce=WORDS, subtitles="srt", name="a", artifact_key="pronounced", **say)

    assert submitted(sandbox) == ["Mr. win of nassa."]
    assert [charge.text_length for charge in sandbox.ledger.charges] == [len("Mr. win of nassa.")]
    assert "Mr. Nguyen of NASA." in (Path(say["save_to"]) / "a.srt").read_text()
    async with get_client() as client:
        [report] = await client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["pronounced"]))
        )
    [text] = [line for line in str(report.data).splitlines() if line.startswith("| Text |")]
    [said_as] = [line for line in str(report.data).splitlines() if line.startswith("| Said as |")]
    assert "Nguyen of NASA" in text
    assert "win of nassa" in said_as

    await text_to_speech("Mr. win of nassa.", **say)
    await text_to_speech("Mr. NGUYEN of NASA.", pronounce={**WORDS, "nobody": "no body"}, **say)
    assert len(sandbox.ledger.charges) == 1
    await text_to_speech("Mr. Nguyen of NASA.", **say)
    assert len(sandbox.ledger.charges) == 2


async def test_rows_of_a_batch_keep_the_text_as_it_is_written(
    say: dict[str, Any], sandbox: Sandbox, tmp_path: Path
) -> None:
    table = tmp_path / "words.csv"
    table.write_text("word,say\nNguyen,win\n")
    lines = [{"id": "a", "text": "Nguyen."}, {"id": "b", "text": "Win."}, {"id": "c", "text": "win."}]
    estimated = await estimate(
        lines=lines, pronounce=table, save_to=say["save_to"], credentials=say["credentials"], model=MODEL
    )

    rows = await text_to_speech_batch(lines, pronounce=table, subtitles="vtt", model=MODEL, **say)

    assert [(row.text, row.said_as) for row in rows] == [("Nguyen.", "win."), ("Win.", None), ("win.", None)]
    assert submitted(sandbox) == ["win.", "Win."]
    assert estimated.usd == sandbox.ledger.charged_total
    assert estimated.new_jobs == 2
    assert "Nguyen." in (Path(say["save_to"]) / "a.vtt").read_text()
    again = await text_to_speech_batch(lines[:1], **say, model=MODEL)
    assert again[0].said_as is None
    assert submitted(sandbox)[2:] == ["Nguyen."]
    renamed = await text_to_speech_batch([{"id": "b", "text": "WIN"}], pronounce={"WIN": "Win."}, **say, model=MODEL)
    assert (renamed[0].text, renamed[0].said_as) == ("WIN", "Win.")
    assert len(sandbox.ledger.charges) == 3


async def test_subtitles_of_a_long_text_have_every_word_as_it_is_written(say: dict[str, Any], sandbox: Sandbox) -> None:
    text = " ".join(f"Sentence {number} is by Dr. Nguyen." for number in range(40))

    await text_to_speech(
        text, pronounce={"Dr.": "Doctor", "Nguyen": "Win Nguyen Win"}, max_chars=300, subtitles="srt", name="a", **say
    )

    assert len(sandbox.ledger.charges) > 3
    content = (Path(say["save_to"]) / "a.srt").read_text()
    cues = [block.split("\n", 2)[2] for block in content.strip().split("\n\n")]
    assert " ".join(" ".join(cues).split()) == text
    assert all("Doctor Win Nguyen Win." in said for said in submitted(sandbox))


async def test_a_pronunciation_that_is_wrong_submits_nothing(say: dict[str, Any], sandbox: Sandbox) -> None:
    state = await text_to_speech("Nguyen.", pronounce={"Nguyen": ""}, **say, return_state=True)
    assert state.name == "INVALID_PRONUNCIATION"
    with pytest.raises(NanoGPTError, match="cannot be read"):
        await text_to_speech_batch([{"id": "a", "text": "Nguyen."}], pronounce="no-such.csv", **say)
    assert sandbox.requests() == []


def test_the_command_takes_a_table(tmp_path: Path, sandbox: Sandbox) -> None:
    key = {"NANOGPT_API_KEY": API_KEY, "NANOGPT_BASE_URL": sandbox.base_url}
    (tmp_path / "words.csv").write_text("word,say\nNguyen,win\n")
    assert run("say", "Nguyen.", "--pronounce", "words.csv", cwd=tmp_path, **key).returncode == 0
    assert submitted(sandbox) == ["win."]
    wrong = run("say", "Nguyen.", "--pronounce", "none.csv", cwd=tmp_path, **key)
    assert (wrong.returncode, len(submitted(sandbox))) == (2, 1)
    assert "--pronounce: " in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_ten_thousand_words_in_a_book_are_found_in_seconds() -> None:
    words = {f"name{number}": f"nayme {number}" for number in range(10_000)}
    text = " ".join(f"word name{number % 10_000} and" for number in range(28_000))
    assert len(text) > 500_000

    spoken = read_pronunciation(words).apply(text)

    assert len(spoken.changes) == 28_000
    assert spoken.written_between(0, len(spoken.text)) == text
