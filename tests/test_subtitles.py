"""Subtitles: all that is said, once and in order, in lines that can be read, for as long as it is heard."""

import random
import re
import time
import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import pytest
import regex

from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.subtitles import Cue, cues, srt, subtitles, vtt

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
