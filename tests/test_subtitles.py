"""Subtitles: all that is said, once and in order, in lines that can be read, for as long as it is heard."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pytest
import regex
from imageio_ffmpeg import get_ffmpeg_exe
from prefect import flow
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt import NanoGPTCredentials, storage
from prefect_nanogpt.audio import inspect
from prefect_nanogpt.errors import NanoGPTError, StorageError
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch
from prefect_nanogpt.lines import ManifestRow
from prefect_nanogpt.models import AudioFile, PollSchedule
from prefect_nanogpt.sandbox import Answer, Sandbox
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.subtitles import Cue, SubtitleFormat, cues, srt, subtitles, vtt
from prefect_nanogpt.tasks import join_audio, write_subtitles
from tests.conftest import API_KEY, files_in
from tests.s3_server import S3Server, s3, s3_env
from tests.sounds import DECODED_RATE, decoded

__all__ = ["s3", "s3_env"]

TEXTS = {
    "en": 'Dr. Watson, who had been silent for a while, looked up from his newspaper and said: "I can\'t believe it!" '
    "Yes. It was the third time this week that the mail coach had been late, and nobody knew why; the roads were dry.",
    "de": "Die Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft tagt z. B. am Montag. "
    "Das Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetz ist aufgehoben.",
    "fr": "Vraiment\u00a0? «\u00a0Il ne reviendra pas avant la fin de mai\u00a0», dit-elle\u00a0; puis elle se tut.",
    "ar": "مرحبا بكم في هذه الحلقة. سنتحدث اليوم عن تاريخ المدينة القديمة، وعن الناس الذين عاشوا فيها قبل مئات السنين؛ "
    "فلنبدأ الآن!",
    "he": "שלום לכם. היום נדבר על העיר העתיקה, ועל האנשים שחיו בה לפני מאות שנים. זה הכול בשיתוף NanoGPT.",
    "ja": "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。何でも薄暗いじめじめした所で"
    "ニャーニャー泣いていた事だけは記憶している。吾輩はここで始めて人間というものを見た。しかもあとで聞くとそれは"
    "書生という人間中で一番獰悪な種族であったそうだ。",
    "th": "สวัสดีครับวันนี้เราจะพูดถึงประวัติศาสตร์ของเมืองเก่าและผู้คนที่เคยอาศัยอยู่ที่นี่เมื่อหลายร้อยปีก่อน ขอเชิญรับฟังได้เลยครับ",
    "emoji": "Great 👍🏽👨‍👩‍👧‍👦!! 🎉🎉🎉 It works: 🇩🇪🇫🇷🇯🇵, cafe\u0301, and so on and so forth until all is "
    "said and done.\n\n* * *\n\nThe end.",
}
EVERY = pytest.mark.parametrize("language", TEXTS)
RATES = {"ja": 7.0, "th": 12.0}
"""In characters a second; 15 elsewhere."""


def part(language: str) -> tuple[str, float]:
    return TEXTS[language], len(TEXTS[language]) / RATES.get(language, 15.0)


def columns(line: str) -> int:
    """Count as people would who look: two for what is wide, none for marks over and signs between letters."""
    marks = sum(unicodedata.category(character) in ("Mn", "Me", "Cf") for character in line)
    return len(line) - marks + sum(unicodedata.east_asian_width(character) in "WF" for character in line)


def without_space(text: str) -> str:
    return "".join(text.split())


def shown(made: Sequence[Cue]) -> str:
    return without_space("".join(line for cue in made for line in cue.lines))


def lengths(made: Sequence[Cue]) -> list[int]:
    return [cue.end_ms - cue.start_ms for cue in made]


@EVERY
class TestInEveryLanguage:
    def test_all_that_is_said_is_shown_once_and_in_order(self, language: str) -> None:
        assert shown(cues([part(language)])) == without_space(TEXTS[language])

    def test_a_cue_has_one_or_two_lines_of_42_columns(self, language: str) -> None:
        for cue in cues([part(language)]):
            assert 1 <= len(cue.lines) <= 2
            assert all(0 < columns(line) <= 42 and line == line.strip() for line in cue.lines)

    def test_a_cue_is_shown_for_one_to_seven_seconds(self, language: str) -> None:
        assert all(1000 <= length <= 7000 for length in lengths(cues([part(language)])))

    def test_cues_follow_one_another_from_the_beginning_to_the_end(self, language: str) -> None:
        made = cues([part(language)])
        assert all(before.end_ms == after.start_ms for before, after in pairwise(made))
        assert (made[0].start_ms, made[-1].end_ms) == (0, round(part(language)[1] * 1000))

    def test_what_readers_see_as_one_character_is_not_cut(self, language: str) -> None:
        characters = set(regex.findall(r"\X", TEXTS[language]))
        for cue in cues([part(language)]):
            for line in cue.lines:
                assert set(regex.findall(r"\X", line)) <= characters | {" "}

    def test_no_line_begins_or_ends_as_no_typesetter_would(self, language: str) -> None:
        for cue in cues([part(language)]):
            for line in cue.lines:
                assert line[0] not in "、。」ーっゃュะา,.;:!?)»"
                assert line[-1] not in "「เแโใไ(«"


class TestWhereItIsCut:
    def test_a_sentence_is_a_cue(self) -> None:
        made = cues([("It rained all day long. Nobody went out to see the garden. Then the sun came.", 6.0)])
        assert [" ".join(cue.lines) for cue in made] == [
            "It rained all day long.",
            "Nobody went out to see the garden.",
            "Then the sun came.",
        ]

    def test_a_sentence_that_two_lines_do_not_hold_is_cut_at_a_comma(self) -> None:
        text = "When the long winter was over and the snow had gone from the hills, the shepherds came to the village."
        assert [cue.lines[-1][-1] for cue in cues([(text, 8.0)])] == [",", "."]

    def test_abbreviations_of_the_language_end_no_cue(self) -> None:
        text = "Das gilt für vieles, z. B. Montag und Dienstag."
        assert len(cues([(text, 6.0)], language="de-AT")) == 1

    @pytest.mark.parametrize(("width", "lines"), [(42, 1), (43, 2)])
    def test_42_columns_are_one_line_and_43_are_two(self, width: int, lines: int) -> None:
        text = f"{'a' * 20} {'b' * (width - 21)}"
        assert [len(cue.lines) for cue in cues([(text, 3.0)])] == [lines]
        wide = "字" * (width // 2) + "a" * (width % 2)
        assert [len(cue.lines) for cue in cues([(wide, 3.0)])] == [lines]

    def test_marks_over_letters_take_no_room(self) -> None:
        assert [len(cue.lines) for cue in cues([("e\u0301" * 20 + " " + "o\u0308" * 21, 3.0)])] == [1]

    def test_two_lines_are_of_similar_length(self) -> None:
        [cue] = cues([("The shepherds came back to the village in the spring", 4.0)])
        assert cue.lines == ("The shepherds came back to", "the village in the spring")

    def test_ten_thousand_characters_without_a_mark_are_cut_between_words(self) -> None:
        text = ("word and another " * 600)[:10_000]
        made = cues([(text, len(text) / 15)])
        assert shown(made) == without_space(text)
        assert {word for cue in made for line in cue.lines for word in line.split()} <= {"word", "and", "another", "wo"}
        assert all(2000 <= length <= 7000 for length in lengths(made))

    def test_a_word_is_cut_only_where_it_is_too_long_for_a_line(self) -> None:
        text = f"See https://example.org/{'a' * 60} for more."
        assert shown(cues([(text, 6.0)])) == without_space(text)
        assert cues([(text, 6.0)])[0].lines[0].startswith("See https://")


class TestTimes:
    def test_parts_begin_and_end_where_they_do_in_the_audio(self) -> None:
        parts = [part(language) for language in ("en", "ja", "ar")]
        made = cues(parts, gap_seconds=0.4)
        start = 0.0
        for text, seconds in parts:
            edges = {round(start * 1000), round((start + seconds) * 1000)}
            own = [cue for cue in made if cue.start_ms >= min(edges) and cue.end_ms <= max(edges)]
            assert {own[0].start_ms, own[-1].end_ms} == edges
            assert shown(own) == without_space(text)
            start += seconds + 0.4

    def test_what_encoders_have_added_is_shared_out_among_the_parts(self) -> None:
        made = cues([("One.", 2.0), ("Two.", 2.0), ("Three.", 2.0)], gap_seconds=0.5, total_seconds=7.15)
        assert [(cue.start_ms, cue.end_ms) for cue in made] == [(0, 2050), (2550, 4600), (5100, 7150)]

    def test_short_sentences_are_shown_together(self) -> None:
        assert [cue.lines for cue in cues([("No. Yes. Well.", 1.8)])] == [("No. Yes. Well.",)]
        assert [cue.lines for cue in cues([("No. It is far too late for any of that. Yes.", 4.0)])] == [
            ("No. It is far too late", "for any of that. Yes.")
        ]

    def test_a_part_of_less_than_a_second_is_one_cue(self) -> None:
        assert cues([("No. Yes. Well.", 0.8)]) == [Cue(0, 800, ("No. Yes. Well.",))]

    def test_what_is_short_and_fits_nowhere_takes_time_from_its_neighbours(self) -> None:
        long = "The shepherds who had come back to the village sat down before all of the houses."
        made = cues([(f"{long} Nay! {long}", 12.0)])
        assert ("Nay!",) in [cue.lines for cue in made]
        assert min(lengths(made)) == 1000

    def test_slow_speech_is_cut_into_shorter_cues(self) -> None:
        made = cues([("one two three four five six seven eight nine ten", 30.0)])
        assert all(length <= 7000 for length in lengths(made))

    def test_one_word_is_shown_for_as_long_as_it_takes(self) -> None:
        assert lengths(cues([("Om.", 20.0)])) == [20_000]

    def test_fast_speech_has_every_cue_for_its_share(self) -> None:
        text, _ = part("en")
        made = cues([(text, 0.05)])
        assert made[-1].end_ms == 50
        assert min(lengths(made)) >= 1

    def test_a_part_without_anything_to_show_is_a_time_without_cues(self) -> None:
        made = cues([("One.", 1.0), (" \n\x07", 1.0), ("Two.", 1.0)])
        assert [(cue.start_ms, cue.end_ms) for cue in made] == [(0, 1000), (2000, 3000)]

    def test_marks_without_a_word_are_shown_like_any_text(self) -> None:
        assert [cue.lines for cue in cues([("…!", 1.0), ("🎉", 1.0)])] == [("…!",), ("🎉",)]

    @pytest.mark.parametrize("seed", range(20))
    def test_whatever_is_said_and_however_fast(self, seed: int) -> None:
        chance = random.Random(seed)
        alphabets = (
            "abcdefg   ..,,;",
            "字語、。ーっ「」漢",
            "אבגד   .,",
            "กขเแาำ้ ",
            "👍🏽👨\u200d👩e\u0301 \u00a0<&>-{\n",
        )
        texts = ["".join(chance.choices(chance.choice(alphabets), k=chance.randint(1, 600))) for _ in range(5)]
        parts = [(text, len(text) / chance.uniform(3, 40) + 0.6) for text in texts]
        gap = chance.choice([0.0, 0.25])
        made = cues(parts, gap)
        assert shown(made) == without_space("".join(texts))
        assert all(columns(line) <= 42 for cue in made for line in cue.lines)
        assert all(len(cue.lines) <= 2 for cue in made)
        assert all(before.end_ms <= after.start_ms for before, after in pairwise(made))
        assert min(lengths(made)) > 0
        if texts[-1].strip():
            assert made[-1].end_ms == round((sum(seconds for _, seconds in parts) + 4 * gap) * 1000)

    @pytest.mark.parametrize("text", ["Some words, and then more. ", "吾輩は猫である。", "字", "x", "word "])
    def test_a_book_takes_seconds(self, text: str) -> None:
        book = (text * 500_000)[:500_000]
        started = time.process_time()
        made = cues([(book, len(book) / 12)])
        assert time.process_time() - started < 20
        assert len(made) > 1000


@pytest.mark.parametrize("seconds", [None, 0.0, float("nan")])
def test_a_part_of_unknown_length_is_named(seconds: float | None) -> None:
    with pytest.raises(NanoGPTError, match=r"how long part 2 \('Two\.'\) plays") as caught:
        cues([("One.", 1.0), ("Two.", seconds)])
    assert caught.value.code == "SUBTITLES_IMPOSSIBLE"


def test_what_cannot_be_of_these_parts_is_refused() -> None:
    with pytest.raises(NanoGPTError, match=r"SUBTITLES_IMPOSSIBLE: .*the whole plays for 60"):
        cues([("One.", 1.0), ("Two.", 1.0)], total_seconds=60.0)
    with pytest.raises(NanoGPTError, match=r"SUBTITLES_IMPOSSIBLE: .*part 1 .* plays for 2 ms"):
        cues([(TEXTS["en"], 0.002)])


class TestFiles:
    def test_srt_is_numbered(self) -> None:
        made = [Cue(0, 1500, ("One.",)), Cue(3_661_002, 3_662_000, ("Two,", "three."))]
        assert srt(made) == (
            "1\n00:00:00,000 --> 00:00:01,500\nOne.\n\n2\n01:01:01,002 --> 01:01:02,000\nTwo,\nthree.\n"
        )

    def test_vtt_has_its_header(self) -> None:
        made = [Cue(0, 1500, ("One.",)), Cue(360_000_000, 360_001_000, ("Two,", "three."))]
        assert vtt(made) == (
            "WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nOne.\n\n100:00:00.000 --> 100:00:01.000\nTwo,\nthree.\n"
        )

    def test_files_are_utf_8_without_a_mark(self) -> None:
        assert subtitles(cues([("Übung.", 1.0)]), "srt") == "1\n00:00:00,000 --> 00:00:01,000\nÜbung.\n".encode()
        assert subtitles([], "vtt") == b"WEBVTT\n"
        assert subtitles([], "srt") == b""

    def test_nothing_in_a_text_is_taken_for_a_part_of_the_format(self) -> None:
        text = "A <b>tag</b> & 1 < 2 --> 3.\n\n4\n\n00:00:01,000 --> 00:00:02,000 {\\an8}up\x07\x00"
        made = cues([(text, 4.0)])
        inside = vtt(made).split("\n\n")
        assert len(inside) == len(made) + 1
        assert all(block.count("-->") == 1 for block in inside[1:])
        assert "&lt;b&gt;tag&lt;/b&gt; &amp; 1 &lt; 2 --&gt; 3." in vtt(made).replace("\n", " ")
        assert len(srt(made).split("\n\n")) == len(made)
        assert srt(made).count("-->") == len(made)
        assert not re.search(r"<[a-z/]|\{\\|[\x00-\x09\x0b-\x1f]", srt(made))
        assert srt(made).replace("\u2060", "").count("<b>") == 1

    @pytest.mark.parametrize("language", ["ar", "he"])
    def test_lines_from_right_to_left_say_so(self, language: str) -> None:
        made = cues([part(language)])
        lines = [line for cue in made for line in cue.lines]
        for written in (srt(made), vtt(made)):
            assert [
                line[1:-1] for line in written.splitlines() if line[:1] == "\u202b" and line[-1] == "\u202c"
            ] == lines
        assert "\u202b" not in srt(cues([("The word שלום.", 2.0)]))


def row(number: int, text: str = "Some words.", seconds: float | None = 1.5, **told: Any) -> ManifestRow:
    place = {"location": f"/audio/{number}.mp3"}
    return ManifestRow(
        **{
            "id": f"{number}",
            "text": text,
            "outcome": "completed",
            "job": "0",
            "duration_seconds": seconds,
            **place,
            **told,
        }
    )


def audio_of(seconds: float) -> AudioFile:
    return AudioFile(
        location="/a.mp3",
        container="mp3",
        content_type="audio/mpeg",
        size_bytes=9,
        sha256="0",
        duration_seconds=seconds,
    )


class TestTheTask:
    async def test_rows_of_a_batch_are_shown_one_after_another(self, tmp_path: Path) -> None:
        place = await write_subtitles([row(1, "One."), row(2, "Two.", 2.0)], tmp_path / "new" / "Episode 1.srt", 0.5)
        assert place == str(tmp_path / "new" / "Episode 1.srt")
        assert Path(place).read_text() == srt([Cue(0, 1500, ("One.",)), Cue(2000, 4000, ("Two.",))])
        assert files_in(tmp_path / "new") == [Path(place)]

    async def test_texts_come_with_their_audio(self, tmp_path: Path) -> None:
        place = await write_subtitles([("One.", audio_of(1.0)), ("Two.", audio_of(2.0))], f"{tmp_path}/whole.VTT")
        assert Path(place).read_text() == vtt([Cue(0, 1000, ("One.",)), Cue(1000, 3000, ("Two.",))])

    async def test_the_joined_audio_tells_what_encoders_have_added(self, tmp_path: Path) -> None:
        parts = [row(1, "One.", 1.0), row(2, "Two.", 1.0)]
        place = await write_subtitles(parts, tmp_path / "whole.srt", audio=audio_of(2.1))
        assert Path(place).read_text() == srt([Cue(0, 1050, ("One.",)), Cue(1050, 2100, ("Two.",))])

    async def test_a_file_of_that_name_is_replaced(self, tmp_path: Path) -> None:
        for text in ("One.", "Two."):
            await write_subtitles([row(1, text)], tmp_path / "whole.srt")
        assert [path.read_text() for path in files_in(tmp_path)] == [srt([Cue(0, 1500, ("Two.",))])]

    async def test_they_go_to_any_file_system(self) -> None:
        assert await write_subtitles([row(1)], "memory://shows/whole.srt") == "memory:///shows/whole.srt"
        assert b"Some words." in fsspec.filesystem("memory").cat_file("/shows/whole.srt")

    async def test_they_go_to_a_bucket_as_what_they_are(self, s3_env: S3Server) -> None:
        for kind, content_type in (("srt", "application/x-subrip"), ("vtt", "text/vtt")):
            place = await write_subtitles([row(1)], f"s3://speech/episodes/whole.{kind}")
            assert place == f"s3://speech/episodes/whole.{kind}"
            assert b"Some words." in s3_env.objects()[f"episodes/whole.{kind}"]
            assert s3_env.content_type(f"episodes/whole.{kind}") == content_type

    @pytest.mark.parametrize(
        ("parts", "to", "says"),
        [
            ([], "a.srt", "INVALID_REQUEST: There is nothing to show"),
            (
                [row(1), row(2, location=None, outcome="TTS_FAILED")],
                "a.srt",
                "INVALID_REQUEST: There is no audio .* at place 2",
            ),
            ([row(1), audio_of(1.0)], "a.srt", "INVALID_REQUEST: There is no audio with its text at place 2"),
            ([row(1), row(2, text="")], "a.srt", "INVALID_REQUEST: There is no text at place 2"),
            ([row(1)], "a.mp3", r"INVALID_REQUEST: `to` does not end with \.srt or \.vtt"),
            ([row(1)], ".srt", "INVALID_REQUEST: `to`"),
            ([row(1)], "a/", "INVALID_REQUEST: `to`"),
            ([row(1), row(2, "Two.", None)], "a.srt", r"SUBTITLES_IMPOSSIBLE: .*part 2 \('Two\.'\)"),
        ],
    )
    async def test_what_cannot_be_is_explained(self, parts: Any, to: str, says: str, tmp_path: Path) -> None:
        with pytest.raises(NanoGPTError, match=says):
            await write_subtitles(parts, f"{tmp_path}/{to}")
        with pytest.raises(NanoGPTError, match="INVALID_REQUEST: gap_seconds=-1"):
            await write_subtitles([row(1)], tmp_path / "a.srt", gap_seconds=-1)
        assert files_in(tmp_path) == []

    async def test_a_place_that_cannot_be_written_is_explained(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="STORAGE_FAILED"):
            await write_subtitles([row(1)], tmp_path / "file" / "a.srt")


@pytest.fixture
def terms(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to, "poll": quick}


def no_place_for(monkeypatch: pytest.MonkeyPatch, *extensions: str, retryable: bool = False) -> None:
    """Let no file with such a name be written."""
    write = Destination.write

    def refuse(place: Destination, name: str, content: bytes) -> None:
        if name.endswith(extensions):
            raise StorageError("The disk is full.", retryable=retryable)
        write(place, name, content)

    monkeypatch.setattr(Destination, "write", refuse)


class TestOfAText:
    @pytest.mark.parametrize("kind", ["srt", "vtt"])
    async def test_they_are_beside_the_audio(
        self, kind: SubtitleFormat, terms: dict[str, Any], sandbox: Sandbox, save_to: str
    ) -> None:
        audio = await text_to_speech(TEXTS["ar"], **terms, subtitles=kind, name="مرحبا")
        written = Path(audio.location).with_suffix(f".{kind}")
        made = cues([(TEXTS["ar"], audio.duration_seconds)])
        assert written.read_bytes() == subtitles(made, kind)
        assert files_in(save_to) == sorted([Path(audio.location), written])

    async def test_they_are_made_of_audio_that_is_there_without_a_request(
        self, terms: dict[str, Any], sandbox: Sandbox
    ) -> None:
        first = await text_to_speech(TEXTS["en"], **terms)
        asked = len(sandbox.requests())
        again = await text_to_speech(TEXTS["en"], **terms, subtitles="srt")
        assert again.location == first.location
        assert len(sandbox.requests()) == asked
        assert Path(first.location).with_suffix(".srt").read_text() == srt(
            cues([(TEXTS["en"], first.duration_seconds)])
        )

    async def test_each_part_of_a_long_text_is_shown_when_it_is_heard(
        self, terms: dict[str, Any], sandbox: Sandbox
    ) -> None:
        texts = [TEXTS["en"], TEXTS["de"], f"{TEXTS['ar']} {TEXTS['ja']}"]
        audio = await text_to_speech("\n\n".join(texts), **terms, subtitles="vtt", max_chars=260, name="whole")
        assert sorted(request.json["text"] for request in sandbox.requests("submit")) == sorted(texts)
        seen = cues_of(Path(audio.location).with_suffix(".vtt").read_text())
        runs = {charge.text_length: charge.run_id for charge in sandbox.ledger.charges}
        start = 0.0
        for text in texts:
            [index] = [number for number, cue in enumerate(seen) if abs(cue[0] - start) < 0.1]
            assert without_space(text).startswith(without_space(seen[index][2]))
            start += len(decoded(sandbox.audio_bytes(runs[len(text)]))) / 2 / DECODED_RATE
        assert seen[-1][1] == pytest.approx(audio.duration_seconds, abs=0.001)

    async def test_a_text_that_was_split_in_another_way_before_is_still_shown(
        self, terms: dict[str, Any], sandbox: Sandbox
    ) -> None:
        sandbox.on_submit([Answer(400, {"error": {"message": "No.", "code": "INVALID_VOICE"}})] * 2)
        text = "The first part of it. The second part of it."
        assert (await text_to_speech(text, **terms, max_chars=30, return_state=True)).is_failed()
        audio = await text_to_speech(text, **terms, max_chars=20, subtitles="srt")
        assert Path(audio.location).with_suffix(".srt").read_text().count("part of it.") == 2

    @pytest.mark.parametrize("retryable", [False, True])
    async def test_a_failure_to_write_them_loses_nothing_and_another_run_pays_nothing(
        self, retryable: bool, terms: dict[str, Any], sandbox: Sandbox, save_to: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            no_place_for(patched, ".srt", retryable=retryable)
            state = await text_to_speech(TEXTS["en"], **terms, subtitles="srt", name="news", return_state=True)
        assert (state.name, str(Path(save_to, "news.mp3")) in (state.message or "")) == ("STORAGE_FAILED", True)
        assert files_in(save_to) == [Path(save_to, "news.mp3")]
        audio = await text_to_speech(TEXTS["en"], **terms, subtitles="srt", name="news")
        assert files_in(save_to) == [Path(audio.location), Path(save_to, "news.srt")]
        assert len(sandbox.ledger.charges) == 1

    async def test_audio_of_unknown_length_is_kept_and_has_none(
        self, terms: dict[str, Any], save_to: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(storage, "inspect", lambda path: inspect(path)._replace(duration_seconds=None))
        state = await text_to_speech(TEXTS["en"], **terms, subtitles="srt", name="news", return_state=True)
        assert state.name == "SUBTITLES_IMPOSSIBLE"
        assert "part 1 ('Dr. Watson" in (state.message or "")
        assert files_in(save_to) == [Path(save_to, "news.mp3")]

    async def test_they_go_to_a_bucket_with_the_audio(
        self, terms: dict[str, Any], s3_env: S3Server, save_to: str
    ) -> None:
        terms["save_to"] = "s3://speech/news"
        await text_to_speech("One.", **terms, subtitles="vtt", name="a")
        assert s3_env.objects()["news/a.vtt"].startswith(b"WEBVTT")


class TestOfABatch:
    async def test_every_line_has_them_beside_its_audio(self, terms: dict[str, Any], save_to: str) -> None:
        lines = [*LINES, {"id": "hello again", "text": TEXTS["en"]}]
        rows = await text_to_speech_batch(lines, **terms, subtitles="srt")
        for line, its in zip(lines, rows, strict=True):
            written = Path(its.location or "").with_suffix(".srt")
            assert written.read_text() == srt(cues([(line["text"], its.duration_seconds)]))
        assert len(files_in(save_to)) == 2 * len(lines) + 1

    async def test_another_run_makes_them_of_what_is_there(
        self, terms: dict[str, Any], sandbox: Sandbox, save_to: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = await text_to_speech_batch(LINES, **terms)
        asked = len(sandbox.requests())
        Path(save_to, "hello.vtt").write_text("of another text")
        assert await text_to_speech_batch(LINES, **terms, subtitles="vtt") == rows
        assert len(sandbox.requests()) == asked
        written = [path for path in files_in(save_to) if path.suffix == ".vtt"]
        assert len(written) == len(LINES)
        assert all(path.read_text().startswith("WEBVTT") for path in written)
        no_place_for(monkeypatch, ".vtt")  # and what is there is not written again
        assert await text_to_speech_batch(LINES, **terms, subtitles="vtt") == rows

    async def test_a_failure_to_write_them_fails_the_run_and_no_line(
        self, terms: dict[str, Any], sandbox: Sandbox, save_to: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            no_place_for(patched, "hello.srt")
            state = await text_to_speech_batch(LINES, **terms, subtitles="srt", return_state=True)
        assert state.name == "SUBTITLES_MISSING"
        assert "1 of 4 lines have audio and no subtitles, one of them hello: STORAGE_FAILED" in (state.message or "")
        assert len([path for path in files_in(save_to) if path.suffix == ".srt"]) == len(LINES) - 1
        assert all(its.is_completed for its in await text_to_speech_batch(LINES, **terms, subtitles="srt"))
        assert len(sandbox.ledger.charges) == len(LINES)
        assert Path(save_to, "hello.srt").exists()

    async def test_lines_without_audio_have_none(self, terms: dict[str, Any], save_to: str) -> None:
        lines = [*LINES, {"id": "no", "text": "[sandbox:reject] Not this."}]
        rows = await text_to_speech_batch(lines, **terms, subtitles="srt", allow_partial=True)
        assert [its.is_completed for its in rows] == [True] * len(LINES) + [False]
        assert {path.stem for path in files_in(save_to) if path.suffix == ".srt"} == {line["id"] for line in LINES}


def test_the_command_line_writes_them(sandbox: Sandbox, tmp_path: Path) -> None:
    env = {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()}
    env |= {"NANOGPT_API_KEY": API_KEY, "NANOGPT_BASE_URL": sandbox.base_url}
    command = str(Path(sys.executable).parent / "prefect-nanogpt")
    (tmp_path / "lines.csv").write_text("id,text\nhello,Hello.\n")
    for arguments in (
        ["say", "One.", "--name", "one", "--subtitles", "srt"],
        ["batch", "lines.csv", "--subtitles", "vtt"],
    ):
        subprocess.run([command, *arguments], cwd=tmp_path, env=env, check=True, capture_output=True)
    assert {path.name for path in files_in(tmp_path / "audio")} == {
        *("one.mp3", "one.srt", "hello.mp3", "hello.vtt", "manifest.jsonl")
    }
    done = subprocess.run([command, "say", "One.", "--subtitles", "ass"], cwd=tmp_path, env=env, capture_output=True)
    assert (done.returncode, b"srt" in done.stderr) == (2, True)


LINES = [
    {"id": "hello", "text": TEXTS["en"]},
    {"id": "hallo", "text": TEXTS["de"]},
    {"id": "marhaban", "text": TEXTS["ar"]},
    {"id": "konnichiwa", "text": "吾輩は猫である。名前はまだ無い。"},
]


@pytest.mark.skipif(not (shutil.which("ffmpeg") and shutil.which("ffprobe")), reason="no ffmpeg on this machine")
class TestInAVideo:
    @pytest.mark.parametrize(
        ("kind", "video", "codec", "gap_seconds"),
        [("srt", "mkv", "srt", 0.6), ("vtt", "webm", "webvtt", 0.6), ("srt", "mp4", "mov_text", 0.0)],
    )
    async def test_an_episode_is_shown_as_it_is_heard(
        self,
        kind: str,
        video: str,
        codec: str,
        gap_seconds: float,
        credentials: NanoGPTCredentials,
        quick: PollSchedule,
        tmp_path: Path,
    ) -> None:
        @flow
        async def episode() -> tuple[list[ManifestRow], AudioFile, str]:
            rows = await text_to_speech_batch(LINES, save_to=tmp_path / "lines", credentials=credentials, poll=quick)
            audio = await join_audio(rows, tmp_path / "episode.mp3", gap_seconds)
            return rows, audio, await write_subtitles(rows, tmp_path / f"episode.{kind}", gap_seconds, audio)

        rows, audio, written = await episode()
        film = filmed(Path(audio.location), Path(written), tmp_path / f"film.{video}", codec)
        seen = cues_in(film)
        assert "".join(without_space(text) for *_, text in seen) == without_space(
            "".join(line["text"] for line in LINES)
        )
        assert seen[-1][1] == pytest.approx(seconds_of(film, "a:0"), abs=0.1)
        start = 0.0
        edges = []
        for line in rows:
            edges += [start, start + (line.duration_seconds or 0)]
            start = edges[-1] + gap_seconds
        for edge in edges:
            assert min(abs(edge - time) for cue in seen for time in cue[:2]) < 0.1
        if gap_seconds:
            heard = silences(Path(audio.location))
            shown = [(before[1], after[0]) for before, after in pairwise(seen) if after[0] - before[1] > 0.1]
            assert shown == [pytest.approx(silence, abs=0.1) for silence in heard]


async def test_many_pieces_that_are_joined_without_silence_are_shown_when_they_are_heard(tmp_path: Path) -> None:
    pieces = []
    for number in range(30):
        seconds = 1 + number * 7 % 10 / 13
        sound = f"aevalsrc='if(lt(t,0.4),0,0.5*sin(2*PI*440*t))':d={seconds}:s=24000"
        piece = tmp_path / f"{number}.mp3"
        command = [get_ffmpeg_exe(), "-loglevel", "error", "-f", "lavfi", "-i", sound, "-b:a", "64k", str(piece)]
        subprocess.run(command, check=True)
        pieces.append(("Some words.", await join_audio([piece], tmp_path / "alone" / f"{number}.mp3")))
    whole = await join_audio([audio for _, audio in pieces], tmp_path / "whole.mp3")
    seen = cues_of(Path(await write_subtitles(pieces, tmp_path / "whole.vtt", audio=whole)).read_text())
    assert [start for start, *_ in seen[1:]] == [
        pytest.approx(silence[0], abs=0.1) for silence in silences(Path(whole.location)) if silence[0] > 0
    ]


def filmed(audio: Path, subtitles: Path, film: Path, codec: str) -> Path:
    """Make a video of audio and its subtitles."""
    sources = ["-f", "lavfi", "-i", "color=size=64x36:rate=5", "-i", str(audio), "-i", str(subtitles)]
    sound = ["-c:a", "libopus"] if film.suffix == ".webm" else ["-c:a", "aac"]
    image = ["-c:v", "libvpx"] if film.suffix == ".webm" else ["-c:v", "mpeg4"]
    length = ["-t", f"{seconds_of(audio, 'a:0')}"]
    command = ["ffmpeg", "-loglevel", "error", *sources, *image, *sound, "-c:s", codec, *length, str(film)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return film


def seconds_of(path: Path, stream: str) -> float:
    """Tell until when a stream plays, by its last packet."""
    command = ["ffprobe", "-loglevel", "error", "-select_streams", stream, "-show_packets", "-of", "json", str(path)]
    packets = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["packets"]
    return max(float(packet["pts_time"]) + float(packet.get("duration_time", 0)) for packet in packets)


def cues_in(film: Path) -> list[tuple[float, float, str]]:
    """Take the subtitles out of a video: when each begins and ends, in seconds, and its text without marks."""
    command = ["ffmpeg", "-loglevel", "error", "-i", str(film), "-map", "0:s:0", "-f", "webvtt", "-"]
    return cues_of(subprocess.run(command, capture_output=True, check=True).stdout.decode())


def cues_of(written: str) -> list[tuple[float, float, str]]:
    """Read WebVTT."""
    found = []
    for block in written.strip().split("\n\n")[1:]:
        timing, *lines = block.splitlines()
        start, end = (
            sum(float(part) * 60**power for power, part in enumerate(reversed(clock.split(":"))))
            for clock in timing.split(" --> ")
        )
        found.append((start, end, re.sub("[\u202b\u202c\u2060]", "", " ".join(lines))))
    return found


def silences(path: Path) -> list[tuple[float, float]]:
    """Find where nothing is heard for at least 0.3 s."""
    samples = memoryview(decoded(path.read_bytes())).cast("h")
    step = DECODED_RATE // 100
    is_loud = [max(map(abs, samples[at : at + step])) > 300 for at in range(0, len(samples), step)]
    runs = re.finditer("0{30,}", "".join("01"[loud] for loud in is_loud).rstrip("0"))
    return [(run.start() / 100, run.end() / 100) for run in runs]


async def test_subtitles_go_with_their_audio_when_another_text_takes_its_name(
    credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule
) -> None:
    said = {"credentials": credentials, "save_to": save_to, "poll": quick, "name": "x"}
    await text_to_speech("The first text.", subtitles="srt", **said)
    await text_to_speech("The second text is much longer than the first one.", **said)

    names = {path.name for path in files_in(save_to)}
    [kept] = [name for name in names if name.endswith(".srt")]
    assert names == {"x.mp3", kept.replace(".srt", ".mp3"), kept}
    assert kept != "x.srt"
    assert "The first text." in (Path(save_to) / kept).read_text()
