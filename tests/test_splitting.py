"""Where texts are cut: no part too long, none without a word, no character halved, and at the best place there is."""

import random
from itertools import pairwise
from time import perf_counter, process_time
from typing import Any

import pytest
import regex
import sentencex

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.long_text import spans, split, units
from prefect_nanogpt.models import PollSchedule
from prefect_nanogpt.sandbox import Sandbox
from tests.test_long_text import chapter

NO_BREAK = "\u00a0\u2007\u202f\u2060\ufeff"
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
GERMANY, FRANCE = "\U0001f1e9\U0001f1ea", "\U0001f1eb\U0001f1f7"


class TestWhatIsPreferred:
    @pytest.mark.parametrize("limit", [50, 512, 4096, 10_000])
    def test_no_word_is_lost_or_repeated(self, limit: int) -> None:
        text = chapter(60_000)
        parts = split(text, limit)
        assert max(map(units, parts)) <= limit
        assert " ".join(parts).split() == text.split()

    def test_a_paragraph_is_preferred_to_a_sentence_and_that_to_a_word(self) -> None:
        assert split("One two. Three.\n\nFour five six. Seven", 24) == ["One two. Three.", "Four five six. Seven"]
        assert split("One two. Three four five six.", 20) == ["One two.", "Three four five six."]
        assert split("One two three four", 9) == ["One two", "three", "four"]

    def test_numbers_and_abbreviations_end_no_sentence(self) -> None:
        assert split("Yes. Dr. Watson paid 3.50 for it.", 30)[0] == "Yes."
        assert split("Ja. Das ist z. B. von Dr. Müller.", 31, "de") == ["Ja.", "Das ist z. B. von Dr. Müller."]

    @pytest.mark.parametrize("language", ["de", "de-AT", "DE_ch"])
    def test_the_language_may_name_a_country(self, language: str) -> None:
        assert split("Ja. Das ist z. B. von Dr. Müller.", 31, language)[1] == "Das ist z. B. von Dr. Müller."

    @pytest.mark.parametrize("language", ["German", "xx", "", "no such language", "zz-ZZ", None])
    def test_a_language_that_is_not_known_is_taken_for_english(self, language: str | None) -> None:
        assert split("Mr. No waits here. He paid.", 20, language) == ["Mr. No waits here.", "He paid."]

    def test_a_sentence_longer_than_a_part_is_cut_behind_clause_marks(self) -> None:
        assert split("One two three, four five six; seven eight: nine ten", 20) == [
            "One two three,",
            "four five six;",
            "seven eight:",
            "nine ten",
        ]
        assert split("It was dark—very dark, and “cold,” he said to her", 24) == [
            "It was dark—very dark,",
            "and “cold,”",
            "he said to her",
        ]

    def test_a_clause_that_leaves_most_of_a_part_empty_is_no_place_to_cut(self) -> None:
        assert (
            split("So, here are many words without any mark at all", 40)[0]
            == "So, here are many words without any mark"
        )

    def test_the_end_of_a_line_is_preferred_to_that_of_a_word(self) -> None:
        poem = (
            "The lamp is lit above the bay\nThe boats come home with silver nets\n"
            "The keeper counts them one by one\nAnd not a single one forgets\n"
        ) * 2
        parts = split(poem, 80)
        assert all(f"{before}\n{after[:5]}" in poem for before, after in pairwise(parts))
        assert len(parts) == 4

    def test_chinese_and_japanese_are_cut_by_their_marks(self) -> None:
        assert split("他说：“你好，世界。”然后他走了，一直走到海边，没有回头看一眼。风很大", 12) == [
            "他说：“你好，世界。”",
            "然后他走了，",
            "一直走到海边，",
            "没有回头看一眼。风很大",
        ]

    def test_japanese_without_marks_is_not_cut_before_small_kana_or_a_long_vowel(self) -> None:
        for limit in range(5, 12):
            for part in split("きょうちょっとスーパーマーケットでコーヒーをかってしまった", limit):
                assert part[0] not in "ょっーッャュョ"

    @pytest.mark.parametrize(
        ("text", "limit", "parts"),
        [
            ("قال الرجل، ثم مضى؛ ولم يعد", 12, ["قال الرجل،", "ثم مضى؛", "ولم يعد"]),
            ("वह घर गया। फिर वह सो गया।", 15, ["वह घर गया।", "फिर वह सो गया।"]),
        ],
    )
    def test_the_marks_of_other_scripts_count(self, text: str, limit: int, parts: list[str]) -> None:
        assert split(text, limit) == parts

    def test_a_word_longer_than_a_part_is_cut(self) -> None:
        assert split("a" * 25, 10) == ["a" * 10, "a" * 10, "a" * 5]

    def test_a_text_that_fits_is_left_as_it_is(self) -> None:
        assert split("  All of it.\n", 11) == ["All of it."]

    @pytest.mark.parametrize(
        ("text", "limit", "first"),
        [
            ("He came late, sat down and said nothing at all", 30, "He came late,"),
            ("He came late; he sat down and said nothing", 30, "He came late;"),
            ("He came late — as ever — and said nothing", 29, "He came late — as ever —"),
            ("He came late—as ever, he said—and said nothing", 30, "He came late—as ever, he said—"),
            ("He came late—as ever, he said—and said nothing", 29, "He came late—as ever,"),
            ("Preguntó la niña alta —dijo ella otra vez", 34, "Preguntó la niña alta"),
            ("جاء متأخرًا، جلس ولم يقل شيئًا على الإطلاق", 30, "جاء متأخرًا،"),
            ("ጠባቂው በየምሽቱ፣ ደረጃውን ይወጣል ሁልጊዜ ነው", 20, "ጠባቂው በየምሽቱ፣"),
            ("看守人就爬上楼梯，他每天都这样做没有人知道", 20, "看守人就爬上楼梯，"),
            ("彼は「来た」と言い、それから黙って座っていたのだ", 20, "彼は「来た」と言い、"),
            ("他来到这里了,然后坐下没有说一句话就这样过了很久很久", 20, "他来到这里了,"),
        ],
    )
    def test_a_long_sentence_is_cut_behind_a_mark(self, text: str, limit: int, first: str) -> None:
        assert split(text, limit)[0] == first

    def test_numbers_times_and_addresses_are_not_cut_at_their_marks(self) -> None:
        assert split("It costs 3,500 euros at 12:30", 20) == ["It costs 3,500 euros", "at 12:30"]
        assert split("看https://a.example/b,c;d?e=f,g吧", 30) == ["看https://a.example/b,c;d?e=f,g", "吧"]
        assert split("请你们马上写一封信寄给lamp@sea.example吧", 22) == ["请你们马上写一封信寄给", "lamp@sea.example吧"]
        assert split("価格は今日だけ特別に３，５００円になります", 13) == [
            "価格は今日だけ特別に",
            "３，５００円になります",
        ]
        assert split("今日の値段は合計で3,500円になります", 12) == ["今日の値段は合計で", "3,500円になります"]
        assert split("He paid 13,500 at 12:30 to http://a.b/c,d", 16) == [
            "He paid 13,500",
            "at 12:30 to",
            "http://a.b/c,d",
        ]
        assert split("The years 1914–1918 were bad", 17) == ["The years", "1914–1918 were", "bad"]
        assert split("La col·lecció és bonica", 21) == ["La col·lecció és", "bonica"]

    def test_the_number_of_a_list_is_no_sentence(self) -> None:
        assert split("1. one item of it\n2. two items of it", 20) == ["1. one item of it", "2. two items of it"]

    def test_sentences_inside_of_a_long_quotation_are_known(self) -> None:
        text = "He said, “I came. I saw the whole town. I won it all.” Then he left."
        assert split(text, 40) == ["He said, “I came. I saw the whole town.", "I won it all.” Then he left."]

    def test_a_sentence_of_many_thousands_of_characters_is_cut_at_its_quoted_sentences(self) -> None:
        parts = split(f"She said: “{'I came, and I saw. ' * 1_000}”", 5_000)
        assert [part[-1] for part in parts] == [".", ".", ".", "”"]


class TestWhatBelongsTogether:
    @pytest.mark.parametrize(
        ("text", "limit", "parts"),
        [
            ("He left. * * * She came back later.", 12, ["He left.", "* * * She", "came back", "later."]),
            ("one two three ...", 14, ["one two", "three ..."]),
            ("a" * 20 + " ...", 20, ["a" * 19, "a ..."]),
            ("“Go home now!” he said", 14, ["“Go home now!”", "he said"]),
            ("They said (it was late) and went", 24, ["They said (it was late)", "and went"]),
            ("And then said: “Good morning”", 20, ["And then said:", "“Good morning”"]),
            (
                "Il dit : «\u00a0Où vas-tu\u00a0?\u00a0» Elle rit.",
                25,
                ["Il dit : «\u00a0Où vas-tu\u00a0?\u00a0»", "Elle rit."],
            ),
            ("... one two", 8, ["... one", "two"]),
        ],
    )
    def test_what_says_no_word_goes_with_a_neighbour(self, text: str, limit: int, parts: list[str]) -> None:
        assert split(text, limit) == parts

    def test_a_text_without_words_is_cut_all_the_same(self) -> None:
        assert "".join(split("?!" * 30, 11)) == "?!" * 30

    @pytest.mark.parametrize(
        ("text", "limit"),
        [
            ("ประภาคารเก่าตั้งอยู่ริมทะเลและผู้ดูแลจะขึ้นบันไดทุกเย็นเพื่อจุดตะเกียงให้เรือที่กลับเข้าฝั่งเห็นทาง", 40),
            ("e\u0301" * 15, 11),
            (FAMILY * 12, 23),
            ((GERMANY + FRANCE) * 15, 11),
            ("👍🏽" * 20, 11),
            ("1️⃣2️⃣" * 20, 10),
            ("각" * 12, 10),
            ("क्षत्रिय" * 9, 11),
            ("a\r\nb" * 30, 11),
        ],
    )
    def test_no_character_as_readers_see_it_is_halved(self, text: str, limit: int) -> None:
        clusters = {found.end() for found in regex.finditer(r"\X", text)}
        ends = [end for _, end in spans(text, limit)]
        assert len(ends) > 1
        assert clusters.issuperset(ends)

    def test_a_character_longer_than_a_part_is_cut_between_code_points(self) -> None:
        parts = split("a" + "\u0301" * 50 + FAMILY * 2, 5)
        assert "".join(parts) == "a" + "\u0301" * 50 + FAMILY * 2
        assert max(map(units, parts)) <= 5

    def test_no_break_spaces_hold_while_another_space_is_there(self) -> None:
        text = "La tour mesure 40\u00a0000 millimètres et pèse 12\u202f500\u00a0kg selon M.\u00a0Lenoir"
        for limit in range(20, 60):
            for _, end in spans(text, limit, "fr")[:-1]:
                assert text[end] == " "

    def test_without_another_space_a_no_break_space_is_better_than_a_word(self) -> None:
        assert split("eins\u00a0zwei\u00a0drei\u00a0vier", 10) == ["eins\u00a0zwei", "drei\u00a0vier"]

    def test_a_zero_width_space_is_a_place_to_cut(self) -> None:
        text = "แสง\u200bไฟ\u200bจาก\u200bประภาคาร\u200bส่อง\u200bไป\u200bทั่ว\u200bทะเล\u200bใน\u200bคืน"
        parts = split(text, 30, "th")
        assert len(parts) > 1
        assert all(before.endswith("\u200b") or after.startswith("\u200b") for before, after in pairwise(parts))

    def test_lengths_are_those_of_javascript(self) -> None:
        parts = split("The show was great 😀🔥🎤 " * 60, 600)
        assert max(len(part.encode("utf-16-le")) // 2 for part in parts) <= 600
        assert units("😀a") == 3

    @pytest.mark.parametrize(
        ("text", "limit", "parts"),
        [
            ("The end is near.\n\n* * *\n\nTwo is here now.", 24, ["The end is near.\n\n* * *", "Two is here now."]),
            ("The end is near.\n\n* * *\n\nTwo is here now.", 23, ["The end is near.\n\n* * *", "Two is here now."]),
            (
                "The end is very near.\n\n* * *\n\nTwo is here now.",
                25,
                ["The end is very near.", "* * *\n\nTwo is here now."],
            ),
            ("Nobody came at all ... Then he left", 22, ["Nobody came at all ...", "Then he left"]),
            ("Nobody came at all. 👍🏽 Then he left", 24, ["Nobody came at all. 👍🏽", "Then he left"]),
            ("Nobody came at all. 👍🏽 Then he left", 23, ["Nobody came at all.", "👍🏽 Then he left"]),
            ("Nobody came.\n* * *\nThen he left for good", 22, ["Nobody came.\n* * *", "Then he left for good"]),
            ("Nobody came.\n• Then he left for good", 23, ["Nobody came.", "• Then he left for good"]),
            ("... nobody came at all to us", 20, ["... nobody came at", "all to us"]),
            ("nobody came at all to us ...", 25, ["nobody came at all to", "us ..."]),
            ("nobody came at all_______!", 20, ["nobody came at", "all_______!"]),
            ("“I came and I saw.” “Did you, my friend?”", 22, ["“I came and I saw.”", "“Did you, my friend?”"]),
            ("« Je suis venu hier ! » dit-il. « Ah bon ? »", 31, ["« Je suis venu hier ! » dit-il.", "« Ah bon ? »"]),
            ("« Je suis venu ici hier ! » « Ah bon ? »", 27, ["« Je suis venu ici hier ! »", "« Ah bon ? »"]),
            ("Nobody came there at all ( as they say )", 26, ["Nobody came there at all", "( as they say )"]),
            (
                "他说：“你好吗朋友。”她说：“我很好。”然后走了",
                12,
                ["他说：“你好吗朋友。”", "她说：“我很好。”", "然后走了"],
            ),
            ("- one item of the list\n- two\n- three items", 24, ["- one item of the list", "- two\n- three items"]),
        ],
    )
    def test_signs_stay_with_the_words_that_they_belong_to(self, text: str, limit: int, parts: list[str]) -> None:
        assert split(text, limit) == parts

    @pytest.mark.parametrize("limit", [20, 30, 50])
    def test_a_line_of_signs_is_shared_by_its_neighbours_rather_than_said_alone(self, limit: int) -> None:
        parts = split(f"Chapter one.\n{'-' * 35}\nChapter two.", limit)
        assert all(has_word(part) for part in parts)
        assert "".join(parts).count("-") == 35

    def test_signs_that_no_neighbour_can_hold_are_kept(self) -> None:
        parts = split(f"Chapter one. {'-' * 100} Chapter two.", 20)
        assert max(map(len, parts)) == 20
        assert "".join(parts).count("-") == 100

    @pytest.mark.parametrize(
        ("text", "limit", "lengths"),
        [
            ("e\u0301" * 15, 11, [10, 10, 10]),
            ("👨\u200d👩\u200d👧" * 12, 23, [16] * 6),
            ("🇩🇪🇫🇷" * 15, 11, [8] * 15),
            ("👍🏽" * 6, 11, [8, 8, 8]),
            ("1️⃣" * 8, 11, [9, 9, 6]),
            ("क्ष" * 8, 11, [9, 9, 6]),
            ("\u1100\u1161\u11a8" * 8, 11, [9, 9, 6]),
            ("😀" * 12, 11, [10, 10, 4]),
            ("a" * 25, 10, [10, 10, 5]),
        ],
        ids=["accents", "families", "flags", "skin tones", "keycaps", "conjuncts", "jamo", "emoji", "letters"],
    )
    def test_what_has_no_better_place_is_cut_between_characters(
        self, text: str, limit: int, lengths: list[int]
    ) -> None:
        parts = split(text, limit)
        assert [units(part) for part in parts] == lengths
        assert "".join(parts) == text

    def test_no_part_of_thai_begins_with_a_vowel_sign_or_ends_before_its_consonant(self) -> None:
        text = "ประภาคารเก่าตั้งอยู่ริมทะเลและผู้ดูแลจะขึ้นบันไดทุกเย็นเพื่อจุดตะเกียงให้เรือที่กลับเข้าฝั่งเห็นทางในความมืด"
        for limit in range(20, 60):
            parts = split(text, limit, "th")
            assert "".join(parts) == text
            assert not any(regex.match(r"[\p{M}ะาๆฯ]", part) or part[-1] in "เแโใไ" for part in parts)

    def test_no_part_of_japanese_begins_with_what_no_line_begins_with(self) -> None:
        text = (
            "コンピューターを使っていろんなデータをちょっとずつ処理していったところ問題は無かったらしいっていうじゃない"
        )
        for limit in range(20, 60):
            parts = split(text, limit, "ja")
            assert "".join(parts) == text
            assert not any(regex.match(r"[ーっゃゅょッャュョ]", part) for part in parts)
            assert all(part.count("コ") == part.count("ピ") for part in parts)


class TestTheSegmenter:
    def test_its_panic_leaves_the_other_places(self, capfd: pytest.CaptureFixture[str]) -> None:
        text = "J. \u00a0." * 9
        with pytest.raises(BaseException, match="char boundary"):
            list(sentencex.segment("kk", text))
        parts = split(text, 20, "kk")
        assert "".join("".join(parts).split()) == "".join(text.split())

    def test_any_fault_of_it_leaves_the_other_places(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def segment(language: str, text: str) -> list[str]:
            raise ValueError("no such thing")

        monkeypatch.setattr(sentencex, "segment", segment)
        assert split("One two. Three four five six.", 20) == ["One two. Three four", "five six."]

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
    def test_what_ends_the_process_does(self, stop: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
        def segment(language: str, text: str) -> list[str]:
            raise stop

        monkeypatch.setattr(sentencex, "segment", segment)
        with pytest.raises(stop):
            split("One two. Three four five six.", 20)

    def test_white_space_that_it_panics_at_does_not_cost_the_ends_of_sentences(
        self, capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert split("One J. \u00a0. He came. He saw it", 24, "kk") == ["One J. \u00a0. He came.", "He saw it"]
        assert "panicked" not in capfd.readouterr().err

    @pytest.mark.parametrize(
        "unit",
        [
            "This is a sentence, and more. ",
            "你好。今天天气，",
            "“Yes. ",
            "a",
            "😀",
            "\u0301",
            "(",
            ",",
            "a\u00a0",
            "://a!",
            " -",
            "」 ",
        ],
    )
    def test_no_text_takes_quadratic_time(self, unit: str) -> None:
        def seconds(characters: int) -> float:
            begun = process_time()
            spans((unit * characters)[:characters], 500)
            return process_time() - begun

        seconds(1_000)
        assert seconds(120_000) < 8 * seconds(30_000) + 0.3


SAMPLES = {
    "am": "ሰላም ለሁሉም። ዛሬ ወደ ገበያ ሄድን፣ እንጀራ ገዛን። ዋጋው ሦስት ብር ነበር።",
    "ar": "ذهب الرجل إلى السوق، واشترى خبزًا؛ ثم عاد. هل رأيته؟ نعم، رأيته.",
    "bn": "সে বাজারে গেল। রুটি কিনল, তারপর ফিরে এল। তুমি কি তাকে দেখেছ?",
    "de": "Frau Dr. Müller kam z. B. um 8.30 Uhr, d. h. zu spät. „Wirklich?“ – „Ja!“",
    "el": "Ο φάρος άναψε· η βάρκα γύρισε. Τι ώρα είναι; Είναι αργά, είπε.",
    "en": "Dr. Watson paid $3.50 for it, i.e. far too much… “Really?” asked Mr. Holmes!",
    "es": "¿Dónde está el faro? ¡Allí, junto al mar! Cuesta 12.500 €; es caro.",
    "fr": "M.\u00a0Lenoir dit\u00a0: «\u00a0Où vas-tu\u00a0?\u00a0» L'été fut long… 12\u202f500\u00a0kg.",
    "he": "האיש הלך לשוק, קנה לחם וחזר. האם ראית אותו? כן!",
    "hi": "वह बाज़ार गया। उसने रोटी खरीदी, फिर लौट आया। क्या तुमने देखा?",
    "hy": "Մարդը գնաց շուկա, հաց գնեց։ Ո՞ւր ես գնում՝ հարցրեց նա։",
    "ja": "彼は市場へ行って、パンを買った。「どこへ行くの？」とお母さんがきいた。ちょっとスーパーまで！",
    "ka": "კაცი ბაზარში წავიდა, პური იყიდა. სად მიდიხარ? სახლში.",
    "kk": "Ол базарға барды, нан сатып алды. Қайда барасың? Үйге.",
    "km": "គាត់ទៅផ្សារ។ គាត់ទិញនំប៉័ង ហើយត្រឡប់មកវិញ។ តើអ្នកឃើញគាត់ទេ?",
    "ko": "그는 시장에 갔다. 빵을 사고, 돌아왔다. “어디 가니?” 하고 물었다.",
    "my": "သူဈေးသွားတယ်။ ပေါင်မုန့်ဝယ်ပြီး၊ ပြန်လာတယ်။",
    "pl": "Pan dr Kowalski zapłacił 3,50 zł, tzn. za dużo. „Naprawdę?” — zapytał.",
    "ru": "Г-н Иванов заплатил 3,50 руб., т. е. слишком много. — Правда? — Да!",
    "ta": "அவன் சந்தைக்குப் போனான். ரொட்டி வாங்கினான், திரும்பி வந்தான். பார்த்தாயா?",
    "th": "เขาไปตลาด ซื้อขนมปังแล้วกลับมา คุณเห็นเขาไหม ผู้ดูแลจุดตะเกียงทุกเย็น",
    "tr": "Adam çarşıya gitti, ekmek aldı. Nereye gidiyorsun? Eve!",
    "vi": "Ông ấy đi chợ, mua bánh mì rồi về. Bạn có thấy ông ấy không?",
    "zh": "他去了市场，买了面包；然后回来了。“你去哪里？”妈妈问。回家！",
}
BETWEEN = [
    " ",
    " ",
    " ",
    "\n",
    "\n\n",
    "\r\n",
    "\u00a0",
    "\u200b",
    " * * * ",
    "…",
    " — ",
    " 👩‍👩‍👧 ",
    "🇩🇪🇫🇷",
    "",
    "é",
    " ... ",
]


def random_text(dice: random.Random, language: str) -> str:
    """Make a text of pieces of a language's sample, of other samples, and of what comes between."""
    pieces = []
    for _ in range(dice.randrange(3, 40)):
        sample = SAMPLES[language if dice.random() < 0.8 else dice.choice(sorted(SAMPLES))]
        start = dice.randrange(len(sample))
        pieces += [sample[start : start + dice.randrange(1, 60)], dice.choice(BETWEEN)]
    return "".join(pieces)


def has_word(text: str) -> bool:
    return any(character.isalnum() for character in text)


def assert_well_split(text: str, limit: int, language: str) -> None:
    found = spans(text, limit, language)
    parts = [text[start:end] for start, end in found]
    assert split(text, limit, language) == parts
    # No character is lost, none repeated.
    assert [start for start, _ in found] == sorted(start for start, _ in found)
    between = [text[end:start] for (_, end), (start, _) in pairwise(found)]
    for gap in [text[: found[0][0]], *between, text[found[-1][1] :]]:
        assert gap.strip() == ""
    assert all(part == part.strip() for part in parts)
    assert all(end <= start for (_, end), (start, _) in pairwise(found))
    assert max(map(units, parts)) <= limit
    clusters = {0, *(match.end() for match in regex.finditer(r"\X", text))}
    # More marks in a row than a part holds are a part without a word, whatever is done.
    can_have_words = max(map(units, regex.split(r"[\p{L}\p{N}]", text))) < limit - 3
    for number, (start, end) in enumerate(found):
        assert has_word(parts[number]) or not can_have_words, parts[number]
        if number + 1 < len(found):
            following = found[number + 1][0]
            assert {end, following} <= clusters or end == following in clusters, text[end - 5 : following + 5]
            if any(mark in text[end:following] for mark in NO_BREAK) and "\n" not in text[end:following]:
                # Only where the part has no other space between two words.
                assert not regex.search(r"\w[ \n\u200b](?!\p{M})\w", text[start:end]), text[start:end]


@pytest.mark.parametrize("language", SAMPLES)
def test_whatever_the_text_nothing_is_lost_too_long_without_a_word_or_halved(language: str) -> None:
    dice = random.Random(language)
    for _ in range(60):
        text = random_text(dice, language)
        assert_well_split(text, dice.choice([20, 25, 33, 60, 150, 600]), language)


def test_a_million_characters_are_no_matter_of_minutes() -> None:
    text = "".join(SAMPLES.values()) * 700
    began = perf_counter()
    parts = split(text, 4096)
    assert perf_counter() - began < 60  # not a figure, but what a quadratic way would take far more than
    assert len(parts) < 2.2 * units(text) / 4096


@pytest.fixture
def speech(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to, "poll": quick}


async def test_parts_shorter_than_twenty_are_refused_before_anything_is_paid_for(
    speech: dict[str, Any], sandbox: Sandbox
) -> None:
    with pytest.raises(Exception, match="greater than or equal to 20"):
        await text_to_speech("One. Two. Three. Four. Five.", **speech, max_chars=19)
    assert sandbox.requests("submit") == []


async def test_a_text_that_is_longer_in_javascript_than_here_is_said_in_parts(
    speech: dict[str, Any], sandbox: Sandbox
) -> None:
    await text_to_speech("Great 😀😀😀😀. Great 😀😀😀.", **speech, max_chars=24)
    said = [request.json["text"] for request in sandbox.requests("submit")]
    assert sorted(said) == ["Great 😀😀😀.", "Great 😀😀😀😀."]


@pytest.mark.parametrize("limit", [19, 0, -1])
async def test_a_limit_of_the_catalogue_that_cannot_be_meant_is_passed_over(
    limit: int, sandbox: Sandbox, speech: dict[str, Any]
) -> None:
    model = {"id": "Elevenlabs-Turbo-V2.5", "category": "audio_tts", "supported_parameters": {"max_chars": limit}}
    sandbox.on_models([{"object": "list", "data": [model]}])
    text = "One two three. " * 60
    await text_to_speech(text, **speech)
    assert [request.json["text"] for request in sandbox.requests("submit")] == [text]
