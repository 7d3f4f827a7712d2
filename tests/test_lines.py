"""Tables and lists as people have them: what is read, what is refused, and what is said about it."""

import codecs
import csv
import gzip
import json
import os
import re
from collections.abc import Callable
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy
import pytest
from prefect import State
from prefect.exceptions import ParameterTypeError

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import BatchPartial, NanoGPTError
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch
from prefect_nanogpt.lines import Line, Manifest, ManifestRow, read_lines
from prefect_nanogpt.models import PollSchedule, TTSRequest
from prefect_nanogpt.sandbox import Accept, Cut, Sandbox
from prefect_nanogpt.storage import Destination, file_stem
from prefect_nanogpt.tables import read_rows
from tests.conftest import API_KEY, files_in
from tests.test_links import report_of

DEFAULTS = {"model": "Kokoro-82m", "voice": "Adam"}
Read = Callable[..., list[Line]]
Refuse = Callable[..., str]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Read the lines of a file with this content, or of a list."""

    def read(content: str | bytes | list[Any], name: str = "lines.csv", **defaults: Any) -> list[Line]:
        if isinstance(content, list):
            return read_lines(content, {**DEFAULTS, **defaults})
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_lines(str(file), {**DEFAULTS, **defaults})

    return read


@pytest.fixture
def refuse(read: Read) -> Refuse:
    """Have lines refused, and give what is said about them."""

    def refuse(content: Any, name: str = "lines.csv", code: str = "INVALID_LINES", **defaults: Any) -> str:
        with pytest.raises(NanoGPTError) as caught:
            read(content, name, **defaults)
        assert caught.value.code == code
        assert str(caught.value).endswith(". Nothing was submitted.")
        return str(caught.value)

    return refuse


def texts(lines: list[Line]) -> dict[str, str]:
    return {line.id: line.request.text for line in lines}


class TestTables:
    def test_a_table_from_a_spreadsheet(self, read: Read) -> None:
        content = '\ufeffid,text,voice,speed\r\na,"Hello,\r\nyou.",Rachel,\r\nb,Bye.,,1.5\r\n'
        a, b = read(content)
        assert (a.id, a.request.text, a.request.voice, a.request.speed) == ("a", "Hello,\r\nyou.", "Rachel", None)
        assert (b.id, b.request.voice, b.request.speed, b.request.model) == ("b", "Adam", 1.5, "Kokoro-82m")

    @pytest.mark.parametrize("name", ["lines.csv", "lines.tsv", "lines.txt", "lines"])
    @pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
    def test_the_header_tells_the_separator_whatever_is_in_the_texts(
        self, separator: str, name: str, read: Read
    ) -> None:
        rows = [
            ["id", "text", "voice"],
            ["a", "One, two; three\tfour | five, six, seven.", "Rachel"],
            ["b", "Bye.", ""],
        ]
        content = "".join(separator.join(f'"{value}"' for value in row) + "\n" for row in rows)
        a, b = read(content, name)
        assert (a.request.text, a.request.voice, b.request.voice) == (rows[1][1], "Rachel", "Adam")

    def test_a_comma_in_a_table_of_semicolons_needs_no_quotation_marks(self, read: Read) -> None:
        assert texts(read("id;text;voice\nhello;Good morning, all.;Adam\nbye;Good night.;\n")) == {
            "hello": "Good morning, all.",
            "bye": "Good night.",
        }

    @pytest.mark.parametrize("separator", [";", "\t", ",", "^"])
    @pytest.mark.parametrize("end", ["\r\n", "\n", "\r"])
    def test_excels_line_about_the_separator_is_followed(
        self, separator: str, end: str, read: Read, refuse: Refuse
    ) -> None:
        table = f"sep={separator}{end}id{separator}text{end}hello{separator}Good morning.{end}"
        assert texts(read(table)) == {"hello": "Good morning."}
        assert "line 4: the id 'hello' is that of line 3 too" in refuse(f"{table}hello{separator}Again.{end}")

    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-16-le"])
    @pytest.mark.parametrize("name", ["lines.csv", "lines.jsonl", "lines.json"])
    def test_unicode_with_a_byte_order_mark_is_read(self, encoding: str, name: str, read: Read) -> None:
        content = "id\ttext\na\tCafé, 東京 🗼\n"
        if name != "lines.csv":
            content = json.dumps({"id": "a", "text": "Café, 東京 🗼"}, ensure_ascii=False)
        mark = "\ufeff" if encoding in ("utf-16-be", "utf-16-le") else ""
        assert texts(read((mark + content).encode(encoding), name)) == {"a": "Café, 東京 🗼"}

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("id,text\na,Fine.\nb,Café.\n".encode("latin-1"), ("line 3", "0xE9", "Windows-1252", " b,Café.'")),
            ("\ufeffid,text\n".encode() + b"a,\x93Hi\x94\n", ("byte 13, in line 2", "0x93", "“Hi”")),
            ("id,text\na,Hello.\n".encode("utf-16-le"), ("null bytes", "UTF-16 without a byte order mark")),
            ("id,text\na,Hello.\n".encode("utf-16-be"), ("null bytes", "UTF-16 without a byte order mark")),
            ("id,text\na,Hello.\n".encode("utf-16")[:-1], ("UTF-16 and is damaged at byte 34",)),
            ("id,text\na,Hello.\n".encode("utf-32"), ("null characters",)),
            ("id,text\na,こんにちは\n".encode("shift-jis"), ("not UTF-8", "line 2")),
            (b"PK\x03\x04 and what else there is in a workbook", ("workbook", "CSV UTF-8")),
            (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1 and what else there is in an older one", ("workbook",)),
            (gzip.compress(b"id,text\na,Hello.\n", mtime=0), ("archive",)),
            (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", ("a PDF",)),
            (b"{\\rtf1\\ansi id,text}", ("an RTF document",)),
            (b"\n<!DOCTYPE html>\n<html>\n", ("a web page or XML",)),
            (codecs.BOM_UTF8 + b"<?xml version='1.0'?>\n<Workbook>\n", ("a web page or XML",)),
            ("id,text\na,Hello.\nb,こんにちは\n".encode("iso-2022-jp"), ("0x1B in line 3", "ISO-2022-JP")),
            (b"id,text\na,Bell\x07.\n", ("0x07 in line 2",)),
        ],
    )
    def test_another_encoding_is_named_as_far_as_it_can_be_told(
        self, content: bytes, said: tuple[str, ...], refuse: Refuse
    ) -> None:
        message = refuse(content, code="LINES_UNREADABLE")
        for words in (*said, "lines.csv cannot be read", "CSV UTF-8"):
            assert words in message

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_lines_are_numbered_as_in_an_editor(self, end: str, refuse: Refuse) -> None:
        rows = ["", "id,text", ",,", 'a,"Two', 'lines."', "", "  ", "b,", "c,Fine.", "a,Again."]
        message = refuse(end.join(rows))
        assert message.startswith("INVALID_LINES: line 8: text: the text is empty")
        assert "line 10: the id 'a' is that of line 4 too" in message

    def test_rows_without_any_value_are_passed_over(self, read: Read) -> None:
        assert texts(read('id,text,voice\n\nhello,Good morning.,Adam\n,,\n , ,""\n,,,,,\n\n')) == {
            "hello": "Good morning."
        }

    def test_values_may_be_left_out_at_the_end_of_a_row(self, read: Read) -> None:
        a, b = read("id,text,voice,speed\na,Hello.\nb,Bye.,Rachel\n")
        assert (a.request.voice, b.request.voice, b.request.speed) == ("Adam", "Rachel", None)

    @pytest.mark.parametrize(
        ("table", "text"),
        [
            ('id,text\na,A 5" pipe and a "good" one\n', 'A 5" pipe and a "good" one'),
            ('id,text\na,"She said ""Hello"", and left."\n', 'She said "Hello", and left.'),
            ('id,text\na, "Spaces, around" \n', "Spaces, around"),
            ('id,text\na,"""Hello."""\n', '"Hello."'),
            ('id,text,voice\na,"Line one.\n\nLine three.",Rachel', "Line one.\n\nLine three."),
        ],
    )
    def test_quotation_marks(self, table: str, text: str, read: Read) -> None:
        assert texts(read(table)) == {"a": text}

    @pytest.mark.parametrize(
        ("rows", "line", "said"),
        [
            (['a,"Hello.', "b,Bye.", "c,Still here."], 2, "not closed up to the end of the file"),
            (["a,Hello.", '"b,Bye.', "c,Still here."], 3, "not closed up to the end of the file"),
            (['a,"Hello.""', "b,Bye."], 2, "not closed up to the end of the file"),
            (['a,"Two', 'lines.","And', "more,", "and more"], 3, "not closed up to the end of the file"),
            (['a,"Hello.', "b,Bye.", 'c,"Still" here.'], 2, "is closed 2 lines later, before 'Still\" here.'"),
            (['a,"Hello.', 'b,"Bye."'], 2, "is closed in the next line, before 'Bye.\"'"),
            (["a,Hello.", 'b,"Bye" and more'], 3, "is closed before 'and more'"),
            (["a,Hello.", 'b,"She said "Hello", and left."'], 3, "has to be written twice"),
        ],
    )
    def test_a_quotation_mark_in_the_wrong_place_is_told_where_it_opens_and_pays_for_nothing(
        self, rows: list[str], line: int, said: str, refuse: Refuse
    ) -> None:
        message = refuse("\n".join(["id,text", *rows]))
        assert f"line {line}: a quotation mark opens a text here and is" in message
        assert said in message

    @pytest.mark.parametrize(("separator", "name"), [(",", "comma"), (";", "semicolon"), ("\t", "tab")])
    def test_a_text_with_the_separator_in_it_is_told(self, separator: str, name: str, refuse: Refuse) -> None:
        rows = [["id", "text"], ["a", "Fine."], ["b", "Good morning", " all."], ["c", "One", " two", " three."]]
        message = refuse("\n".join(map(separator.join, rows)))
        for line, fields in ((3, 3), (4, 4)):
            assert (
                f"line {line}: there are more fields ({fields}) than columns (2): a text with a {name} in it" in message
            )

    def test_columns_without_a_title_are_passed_over_where_they_are_empty(self, read: Read) -> None:
        assert texts(read("id;;text;;\na;;Hello.;;\nb;;Bye.;;;;\n")) == {"a": "Hello.", "b": "Bye."}

    @pytest.mark.parametrize(
        ("table", "column", "line"),
        [(",id,text\n0,a,Hello.\n1,b,Bye.\n", 1, 2), ("id,text,\na,Hello.,\nb,Bye.,Loudly\n", 3, 3)],
    )
    def test_a_value_without_a_title_is_told_once(self, table: str, column: int, line: int, refuse: Refuse) -> None:
        message = refuse(table)
        assert message.count("has no title") == 1
        assert f"line 1: column {column} has no title, but a value in line {line}" in message

    @pytest.mark.parametrize(
        ("table", "found"),
        [
            ("hello,Good morning.\n", ": 'hello', 'Good morning.'"),
            ("id;txt\nhello;Good morning.\n", ": 'id', 'txt'"),
            ("", ""),
        ],
    )
    def test_a_header_without_the_columns_that_are_needed_is_shown(
        self, table: str, found: str, refuse: Refuse
    ) -> None:
        message = refuse(table)
        assert "line 1: the columns id and text are needed, named in the first line" in message
        assert found in message

    @pytest.mark.parametrize("remark", ["# A remark, with a comma", '# with one " mark', '"# quoted, too"', "#;;", "#"])
    def test_remarks_before_the_header_are_passed_over(self, remark: str, read: Read, refuse: Refuse) -> None:
        table = f"{remark}\n\n# and another; of them\nid;text\na;Hello, you.\n#2;Not a remark.\n"
        assert texts(read(table)) == {"a": "Hello, you.", "#2": "Not a remark."}
        assert "line 7: the id 'a' is that of line 5 too" in refuse(f"{table}a;Again.\n")

    def test_a_column_may_be_called_by_the_mark_of_remarks(self, read: Read) -> None:
        assert texts(read("#,id,text\n1,a,Hello.\n")) == {"a": "Hello."}

    def test_tables_that_were_put_together_are_one(self, read: Read) -> None:
        table = "\ufeffid,text,voice\na,Hello.,Rachel\n\ufeffID, Text,voice\nb,Bye.,\n\ufeff\ufeffc,Once more.\n"
        assert texts(read(table)) == {"a": "Hello.", "b": "Bye.", "c": "Once more."}
        lines = '{"id": "a", "text": "Hello."}\n\ufeff{"id": "b", "text": "Bye."}\n'
        assert texts(read(f"\ufeff\ufeff{lines}", "lines.jsonl")) == {"a": "Hello.", "b": "Bye."}

    def test_a_text_that_is_written_as_a_formula_is_that_text(self, read: Read) -> None:
        table = 'id,text\n"=""0012""","=""He said """"no"""".""" \n0013,= is a sign\n'
        assert texts(read(table)) == {"0012": 'He said "no".', "0013": "= is a sign"}

    @pytest.mark.parametrize(
        "formula",
        [
            *("=CONCAT(A1;B1)", "=A2&B2", "=$B$7", "=Sheet1!A2", "='My sheet'!A2", "=VERKETTEN(A1)", "=СЦЕПИТЬ(A1)"),
            *("=+A1", "=(A1&B1)", "{=A1:A3}", "=Table1[Text]", "=[@Text]", "=#REF!", " =A2&B2", "=$Sheet1.A2"),
            *("='My Sheet'.A2", "of:=[.A2]", "=[1]Sheet1!A1", '=""Hello ""&A2', '= _xlfn.TEXTJOIN("" "",1,A1:A9)'),
        ],
    )
    def test_a_formula_is_nothing_to_say(self, formula: str, read: Read, refuse: Refuse) -> None:
        message = refuse(f'id,text\na,Hello.\nb,"{formula}"\n')
        assert re.search(r"line 3: text: ['\"][ {of:]*=", message)
        assert "is a formula, and nothing to say: save the sheet with its values" in message
        assert texts(read(f'id,text,#source\na,Hello.,"{formula}"\n')) == {"a": "Hello."}
        assert texts(read([{"id": "a", "text": "=A2&B2"}])) == {"a": "=A2&B2"}

    @pytest.mark.parametrize(
        "text", ["=)", "=D", "=P (tongue)", "= 5 is a sum", "=C4 is an explosive", "=10-4", "=2/3 of all", "==", "{=)"]
    )
    def test_a_text_that_begins_like_a_formula_is_a_text(self, text: str, read: Read) -> None:
        assert texts(read(f'id,text\na,"{text}"\n')) == {"a": text}

    def test_names_that_come_again_and_are_others_are_refused(self, read: Read, refuse: Refuse) -> None:
        assert texts(read("id,text,voice,\na,Hello.\nid,text,Voice\nb,Bye.\n")) == {"a": "Hello.", "b": "Bye."}
        for names in ("text,id", "id,text", "id,text,voice,model"):
            message = refuse(f"id,text,speed\na,Hello.,1\n{names}\nb,Bye.\n")
            assert "line 3: these are names of columns again, and not those of line 1" in message

    @pytest.mark.parametrize("remarks", ["# Columns, id, text", "# Needed, id, text, voice\n#, id, text\n# more"])
    def test_a_remark_may_name_the_columns(self, remarks: str, read: Read) -> None:
        assert texts(read(f"{remarks}\n\nid,text,voice\na,Hello.,Rachel\n")) == {"a": "Hello."}

    def test_a_text_in_a_table_of_tabs_holds_no_rows(self, read: Read, refuse: Refuse) -> None:
        message = refuse('id\ttext\na\t"I came,\nb\tI saw,\nc\tI conquered."\n')
        assert "line 2: a quotation mark opens a text here that has whole rows in it" in message
        assert texts(read('id\ttext\na\t"I came,\nI saw."\n')) == {"a": "I came,\nI saw."}

    @pytest.mark.parametrize("table", ["\n" * 20_000 + "x,y\n", "id,text" + "," * 20_000 + "\n" + "a,\n" * 20_000])
    def test_what_is_no_table_is_told_in_time(self, table: str, refuse: Refuse) -> None:
        refuse(table)

    def test_a_hundred_thousand_lines(self, read: Read, refuse: Refuse) -> None:
        rows = [f'line-{number},"Line {number}, and ""more""."' for number in range(100_000)]
        table = "\n".join(["id,text", *rows])
        assert len(read(table)) == 100_000
        message = refuse(f"{table}\nline-7,Again.\ntail,\n")
        assert "line 100002: the id 'line-7' is that of line 9 too; line 100003: text" in message

    def test_what_python_writes_is_what_is_read(self, tmp_path: Path) -> None:
        texts = [
            '"',
            '""',
            'a"b',
            " leading",
            "tab\there",
            "semi;colon, comma",
            "\nbreak\r\n",
            "'",
            '","',
            "—“x”",
            "\\",
        ]
        with (tmp_path / "lines.csv").open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file, quoting=csv.QUOTE_ALL)
            rows.writerow(["id", "text"])
            rows.writerows(enumerate(texts))
        assert [line.request.text for line in read_lines(str(tmp_path / "lines.csv"), {})] == texts


class TestNames:
    @pytest.mark.parametrize(
        ("column", "field"),
        [
            ("Voice", "voice"),
            ("voice ", "voice"),
            (" VOICE", "voice"),
            ("Model", "model"),
            ("Response Format", "response_format"),
            ("response-format", "response_format"),
            ("responseFormat", "response_format"),
            ("Language", "language"),
            ("option.Language", "language"),
        ],
    )
    def test_a_column_that_differs_in_case_spaces_or_dashes_is_that_column(
        self, column: str, field: str, read: Read
    ) -> None:
        for lines in (
            read(f"ID, Text ,{column}\na,Hello.,x\n"),
            read(json.dumps({"Id": "a", "TEXT": "Hello.", column: "x"}), "lines.jsonl"),
            read([{"id": "a", "text": "Hello.", column: "x"}]),
        ):
            assert lines[0].request.body() == {**DEFAULTS, "text": "Hello.", field: "x"}

    @pytest.mark.parametrize(
        ("column", "near"),
        [("voise", "voice"), ("voices", "voice"), ("langauge", "language"), ("respons_format", "response_format")],
    )
    def test_a_near_miss_is_asked_about(self, column: str, near: str, refuse: Refuse) -> None:
        assert f"line 1: column {column!r} is unknown (did you mean {near!r}?)" in refuse(
            f"id,text,{column}\na,Hello.,x\n"
        )
        assert f"line 1: field {column!r} is unknown (did you mean {near!r}?)" in refuse(
            [{"id": "a", "text": "Hello.", column: "x"}]
        )

    @pytest.mark.parametrize("column", ["notes", "scene", "seed", "outcome"])
    def test_an_unknown_column_is_never_an_option_that_is_paid_for(self, column: str, refuse: Refuse) -> None:
        rows = [{"id": "a", "text": "Hello.", column: 7}, {"id": "b", "text": "Bye.", column: 8}]
        for content, name in (
            (f"id,text,{column}\na,Hello.,7\nb,Bye.,8\n", "lines.csv"),
            ("\n".join(map(json.dumps, rows)), "lines.jsonl"),
            (json.dumps(rows), "lines.json"),
            (rows, ""),
        ):
            message = refuse(content, name)
            assert message.count(f"{column!r} is unknown") == 1
            assert f"name it 'option.{column}' to send it to the model as an option, '#{column}' to pass" in message

    def test_an_empty_unknown_column_is_refused_too(self, refuse: Refuse) -> None:
        assert "'notes' is unknown" in refuse("id,text,notes\na,Hello.,\n")

    def test_a_remark_is_passed_over(self, read: Read) -> None:
        for content, name in (
            ("id,text,#notes, # Scene\na,Hello.,whisper?,3\n", "lines.csv"),
            ([{"id": "a", "text": "Hello.", "#notes": object()}], ""),
        ):
            [line] = read(content, name)
            assert line.request.body() == {**DEFAULTS, "text": "Hello."}

    def test_a_batchs_own_manifest_is_no_table_of_lines(self, refuse: Refuse) -> None:
        row = ManifestRow(id="a", text="Hello.", outcome="completed", location="/audio/a.mp3", job="0f")
        message = refuse(row.model_dump_json(exclude_none=True), "manifest.jsonl")
        for name in ("outcome", "location", "job"):
            assert f"line 1: field {name!r} is unknown" in message

    @pytest.mark.parametrize("header", ["text,text", "text,Text", "Text , TEXT", '"te xt",text'])
    def test_two_columns_that_mean_the_same_are_told_once(self, header: str, refuse: Refuse) -> None:
        message = refuse(f"id,{header}\na,One.,Two.\nb,One.,Two.\n")
        assert message.count("are the same") == 1
        assert message.startswith("INVALID_LINES: line 1: the columns ")

    def test_two_names_that_mean_the_same_are_told_in_each_line(self, refuse: Refuse) -> None:
        line = {"text": "One.", "Text": "Two.", "speed": 1, "option.speed": 2}
        message = refuse([{"id": "a", **line}, {"id": "b", **line}])
        for number in (1, 2):
            assert f"line {number}: the fields 'text' and 'Text' are the same" in message
            assert f"line {number}: the fields 'speed' and 'option.speed' are the same" in message

    def test_every_problem_is_told_at_once_with_its_line(self, refuse: Refuse) -> None:
        message = refuse(
            'id,text,speed,mood\na,"Two\nlines.",\na,Again.,\n,No id.,\nc,  ,\nd,Fast.,900\ne,Too,,many,fields\nf,"Open'
        )
        assert message.removeprefix("INVALID_LINES: ").split("; ") == [
            "line 1: column 'mood' is unknown: name it 'option.mood' to send it to the model as an option, '#mood' to "
            "pass it over, or remove it",
            "line 4: the id 'a' is that of line 2 too",
            "line 5: there is no id",
            "line 6: text: the text is empty: there is nothing to say",
            "line 7: speed: Input should be less than or equal to 5",
            "line 8: there are more fields (5) than columns (4): a text with a comma in it needs quotation marks "
            "around it",
            "line 9: a quotation mark opens a text here and is not closed up to the end of the file. Nothing was "
            "submitted.",
        ]

    def test_only_the_first_hundred_problems_are_told(self, refuse: Refuse) -> None:
        message = refuse([{"id": number, "text": ""} for number in range(130)])
        assert message.count("the text is empty") == 100
        assert message.endswith("; and 30 more. Nothing was submitted.")


class TestOptions:
    def test_options_of_a_table_are_read_as_json_where_they_are_json(self, read: Read) -> None:
        values = {
            "seed": "7",
            "loud": "true",
            "fast": "TRUE",
            "slow": "False",
            "mood": " calm ",
            "code": "007",
            "list": '"[1, 2]"',
            "digits": '"""7"""',
        }
        header = ",".join(f"option.{name}" for name in values)
        [line] = read(f"id,text,{header}\na,Hello.,{','.join(values.values())}\n")
        said = line.request.body()
        assert {name: said[name] for name in values} == {
            "seed": 7,
            "loud": True,
            "fast": True,
            "slow": False,
            "mood": "calm",
            "code": "007",
            "list": [1, 2],
            "digits": "7",
        }

    @pytest.mark.parametrize("value", ["", " ", "NaN", "null"])
    def test_an_option_without_a_value_is_not_given(self, value: str, read: Read) -> None:
        [line] = read(f"id,text,option.seed\na,Hello.,{value}\n", seed=3)
        assert line.request.body()["seed"] == 3

    def test_a_column_comes_before_the_options_and_they_come_before_the_defaults(self, read: Read) -> None:
        options = {"speed": 2, "seed": 2, "mood": "gay"}
        [line] = read(
            [{"id": "a", "text": "Hello.", "options": options, "speed": 3, "option.seed": 3}],
            speed=1,
            seed=1,
            mood="sad",
            pitch=1,
        )
        said = line.request.body()
        assert [said[name] for name in ("speed", "seed", "mood", "pitch")] == [3, 3, "gay", 1]

    def test_decimal_commas(self, read: Read, refuse: Refuse) -> None:
        table = "id;text;speed;Stability;option.style\na;1,5;1,25; 0,5 ;0,75\n"
        [line] = read(table)
        assert (line.request.text, line.request.speed, line.request.stability, line.request.style) == (
            "1,5",
            1.25,
            0.5,
            0.75,
        )
        for written, number in (("1.234,5", "1234.5"), ("1 234,5", "1234.5"), ("\u22121,5", "-1.5"), (".5", "0.5")):
            assert f"is no number: write {number}, or for a text" in refuse(f"id;text;option.n\na;Hi.;{written}\n")
        for written in ("1,2,3", "50%", "+49", "2026.01.02", "1.5.2"):
            [line] = read(f"id;text;option.n\na;Hi.;{written}\n")
            assert line.request.body()["n"] == written
        message = refuse("id;text;option.pitch\na;Hello.;-1,5\n")
        assert "line 2: pitch: '-1,5' is no number: write -1.5, or for a text \"-1,5\"" in message
        [line] = read('id;text;option.pitch\na;Hello.;"""-1,5"""\n')
        assert line.request.body()["pitch"] == "-1,5"

    @pytest.mark.parametrize(
        "twice",
        [
            {"option.mood": "calm", "option.Mood": "loud"},
            {"option.mood": "calm", "options.mood ": "loud"},
            {"speed": 1, "option.Speed": 2},
            {"options": {"mood": "calm", "Mood": "loud"}},
            {"options": {"mood": "calm"}, "option.MOOD": "loud"},
        ],
        ids=str,
    )
    def test_an_option_is_given_once_in_whatever_spelling(self, twice: dict[str, Any], refuse: Refuse) -> None:
        message = refuse([{"id": "a", "text": "Hello.", **twice}])
        assert "line 1: " in message
        assert "are the same" in message or "is there twice" in message

    def test_options_as_json_in_a_table(self, read: Read) -> None:
        [line] = read(
            'id;text;options\na;Hello.;{"Response-Format": "wav", "seed": 7, "language": null}\n', language="en"
        )
        assert line.request.body() == {**DEFAULTS, "text": "Hello.", "response_format": "wav", "seed": 7}

    @pytest.mark.parametrize("name", ["id", "text", "Model", "voice", "take", "options"])
    def test_what_is_a_field_of_the_line_is_no_option(self, name: str, refuse: Refuse) -> None:
        said = f"{name.lower()} is no option but a field of its own"
        assert f"line 1: column 'option.{name}': {said}" in refuse(f"id,text,option.{name}\na,Hello.,x\n")
        assert f"line 1: options: {said}" in refuse([{"id": "a", "text": "Hello.", "options": {name: "x"}}])

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ("loud", "options must be a JSON object"),
            ([], "options must be a JSON object"),
            ('{"a": 1, "a": 2}', "the name 'a' is there twice"),
            ({"speed": 1, "Speed": 2}, "options: 'speed' is there twice"),
        ],
    )
    def test_options_that_are_not_in_order(self, options: object, said: str, refuse: Refuse) -> None:
        assert said in refuse([{"id": "a", "text": "Hello.", "options": options}])

    @pytest.mark.parametrize(
        "value",
        [object(), {1, 2}, b"loud", float("inf"), [float("nan")], numpy.array([1, 2]), numpy.datetime64("2026-01-01")],
        ids=["an object", "a set", "bytes", "infinity", "NaN inside", "an array", "a date"],
    )
    async def test_an_option_that_is_no_json_value_is_named(
        self, value: object, refuse: Refuse, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        said = "the option 'mood' is no JSON value"
        for line in ({"option.mood": value}, {"options": {"mood": value}}):
            lines = [{"id": "a", "text": "Hello."}, {"id": "b", "text": "Bye.", **line}]
            assert f"line 2: {said}" in refuse(lines)
        state = await text_to_speech_batch(lines, **batch, return_state=True)
        assert (state.name, said in str(state.message)) == ("INVALID_LINES", True)
        one = {name: batch[name] for name in ("credentials", "save_to", "poll")}
        state = await text_to_speech("Hello.", options={"mood": value}, **one, return_state=True)
        assert (state.name, said in str(state.message)) == ("INVALID_REQUEST", True)
        assert sandbox.requests() == []


class TestOptionsOfFlows:
    """What holds for the options of lines holds for those of flows and of a request itself."""

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"speed": 1, "Speed": 2}, "'speed' is there twice, as 'speed' and as 'Speed'"),
            ({"mood": "calm", " Mood": "loud"}, "is there twice"),
            ({"Model": "tts-1"}, "model is no option but a field of its own"),
            ({"voice": "Adam"}, "voice is no option but a field of its own"),
            ({"take": 2}, "take is no option but a field of its own"),
            ({"option.seed": 7}, "'option.seed' is no option; one called mood is given as 'mood'"),
            ({"#seed": 7}, "'#seed' is no option"),
            ({" ": 7}, "'' is no option"),
        ],
    )
    async def test_they_are_refused_where_they_would_be_paid_for_and_ignored(
        self, options: dict[str, Any], says: str, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        one = {name: batch[name] for name in ("credentials", "save_to", "poll")}
        state = await text_to_speech("Hello.", options=options, **one, return_state=True)
        assert (state.name, says in str(state.message)) == ("INVALID_REQUEST", True)
        state = await text_to_speech_batch([{"id": "a", "text": "Hello."}], options=options, **batch, return_state=True)
        assert (state.name, says in str(state.message)) == ("INVALID_REQUEST", True)
        assert sandbox.requests() == []

    async def test_what_is_given_by_itself_is_not_given_among_the_options_too(
        self, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        one = {name: batch[name] for name in ("credentials", "save_to", "poll")}
        state = await text_to_speech("Hello.", speed=1.5, options={"Speed": 2}, **one, return_state=True)
        assert state.name == "INVALID_REQUEST"
        assert "'speed' is there twice, by itself and among the options" in str(state.message)
        assert sandbox.requests() == []

    async def test_another_spelling_is_the_same_job(self, batch: dict[str, Any], sandbox: Sandbox) -> None:
        one = {name: batch[name] for name in ("credentials", "save_to", "poll")}
        for options in ({"similarity_boost": 0.5}, {"Similarity-Boost": 0.5}, {"similarityBoost": "0,5"}):
            await text_to_speech("Hello.", options=options, **one)
        assert len(sandbox.ledger.charges) == 1
        [sent] = sandbox.requests("submit")
        assert sent.json["similarity_boost"] == 0.5

    @pytest.mark.parametrize("field", ["id", "take", "options", "Option.seed", "#seed"])
    def test_a_request_has_no_fields_of_lines(self, field: str) -> None:
        with pytest.raises(ValueError, match="is no option"):
            TTSRequest.model_validate({"text": "Hello.", field: "7"})

    def test_spaces_around_names_are_not_part_of_them(self) -> None:
        request = TTSRequest(text=" Hi. ", model=" tts-1 ", voice="Adam ", language=" en", response_format=" wav")
        assert request.body() == {
            "text": " Hi. ",
            "model": "tts-1",
            "voice": "Adam",
            "language": "en",
            "response_format": "wav",
        }
        with pytest.raises(ValueError, match="raw PCM"):
            TTSRequest(text="Hi.", response_format="PCM ")

    def test_a_request_knows_its_fields(self) -> None:
        request = TTSRequest.model_validate(
            {"Text": "Hello.", "Response Format": "wav", "speed": "1,5", "Mood": "calm"}
        )
        assert request.body() == {
            "text": "Hello.",
            "model": request.model,
            "response_format": "wav",
            "speed": 1.5,
            "Mood": "calm",
        }


class NAType:
    """As pandas.NA: it does not say whether it equals anything."""

    def __repr__(self) -> str:
        return "<NA>"

    def __eq__(self, other: object) -> Any:
        return self

    def __ne__(self, other: object) -> Any:
        return self

    def __bool__(self) -> bool:
        raise TypeError("boolean value of NA is ambiguous")


class TestValues:
    @pytest.mark.parametrize(
        "missing",
        [None, "", " ", float("nan"), numpy.float64("nan"), numpy.float32("nan"), numpy.datetime64("NaT"), NAType()],
        ids=repr,
    )
    def test_what_is_missing_is_not_given(self, missing: object, read: Read, refuse: Refuse) -> None:
        fields = ("voice", "model", "speed", "take", "options", "option.seed", "language", "instructions")
        [line] = read([{"id": "a", "text": "Hello.", **dict.fromkeys(fields, missing)}], seed=3)
        assert (line.request.body(), line.take) == ({**DEFAULTS, "text": "Hello.", "seed": 3}, 1)
        message = refuse([{"id": missing, "text": missing}])
        assert "line 1: there is no id; line 1: text: the text is empty" in message

    def test_what_json_makes_of_a_missing_value_is_not_given(self, read: Read) -> None:
        [line] = read('{"id":"a","text":"Hi.","voice":NaN,"speed":null}\n', "lines.jsonl")
        assert line.request.body() == {**DEFAULTS, "text": "Hi."}

    def test_what_pandas_writes_for_a_missing_value_is_not_given(self, read: Read) -> None:
        [first, second, third] = read("id,text,voice,language\na,Hi.,NaN,NaN\nb,Ho.,<NA>,nan\nc,Ha.,Nan,\n")
        assert first.request.body() == {**DEFAULTS, "text": "Hi."}
        assert second.request.body() == {**DEFAULTS, "text": "Ho.", "language": "nan"}  # Min Nan Chinese
        assert third.request.voice == "Nan"

    def test_an_error_of_the_spreadsheet_is_no_text(self, read: Read, refuse: Refuse) -> None:
        for error in ("#NAME? ", "#BEZUG!", "#NV", "Err:508", "#CALC!", "#ИМЯ?", "#¡REF!", "#GETTING_DATA"):
            assert "is an error of the spreadsheet" in refuse(f"id,text\na,{error}\n")
        assert texts(read("id,text\na,#winning!\nb,Err:508 is what it said\n"))["a"] == "#winning!"
        message = refuse("id,text,voice\na,#NAME?,\n#REF!,Hi.,#N/A\n")
        for words in ("line 2: text: '#NAME?'", "line 3: id: '#REF!'", "line 3: voice: '#N/A'"):
            assert words in message
        assert texts(read("id,text\na,Is #NAME? one?\n")) == {"a": "Is #NAME? one?"}

    def test_a_text_that_looks_like_a_missing_value_is_a_text(self, read: Read) -> None:
        assert texts(read("id,text\na,NaN\nb,null\nc,None\n")) == {"a": "NaN", "b": "null", "c": "None"}

    @pytest.mark.parametrize(
        ("given", "line_id"),
        [
            (0, "0"),
            ("0", "0"),
            (1.0, "1"),
            ("1.0", "1.0"),
            (1.5, "1.5"),
            (numpy.int64(7), "7"),
            (numpy.float64(7), "7"),
            (" a b ", "a b"),
            (UUID(int=1), str(UUID(int=1))),
        ],
        ids=repr,
    )
    def test_an_id_is_a_text_or_a_number(self, given: Any, line_id: str, read: Read) -> None:
        assert [line.id for line in read([{"id": given, "text": "Hello."}])] == [line_id]

    @pytest.mark.parametrize("given", [float("inf"), float("-inf"), numpy.float64("inf")], ids=repr)
    def test_an_id_is_not_infinite(self, given: Any, refuse: Refuse) -> None:
        assert "inf is no number" in refuse([{"id": given, "text": "Hello."}])
        assert "inf is no number" in refuse('{"id": Infinity, "text": "Hello."}', "lines.jsonl")

    @pytest.mark.parametrize("given", [True, False, numpy.bool_(False), [1], {"id": 1}, b"a"], ids=repr)
    def test_anything_else_is_no_id(self, given: Any, refuse: Refuse) -> None:
        assert "is neither a text nor a number" in refuse([{"id": given, "text": "Hello."}])

    def test_zero_is_an_id_in_json_and_false_is_none(self, read: Read, refuse: Refuse) -> None:
        assert texts(read('{"id":0,"text":"Zero is an id."}', "lines.jsonl")) == {"0": "Zero is an id."}
        assert "line 1: the id False is neither" in refuse('{"id":false,"text":"No."}', "lines.jsonl")

    def test_values_of_numpy_are_those_of_python(self, read: Read) -> None:
        given = {
            "id": numpy.int64(0),
            "text": numpy.str_("Hello."),
            "speed": numpy.float32(1.5),
            "take": numpy.float64(2),
            "option.seed": numpy.int64(7),
            "options": {"loud": numpy.bool_(True)},
        }
        plain = {"id": 0, "text": "Hello.", "speed": 1.5, "take": 2, "option.seed": 7, "options": {"loud": True}}
        [[line], [same]] = [read([fields]) for fields in (given, plain)]
        assert (line.id, line.take, line.request.content()) == (same.id, same.take, same.request.content())

    def test_a_member_of_an_enumeration_is_its_value(self, read: Read) -> None:
        class Voice(Enum):
            ADAM = "Adam"

        class Mood(StrEnum):
            CALM = "calm"

        given = {
            "id": "a",
            "text": "Hello.",
            "voice": Voice.ADAM,
            "option.mood": Mood.CALM,
            "options": {"m": Mood.CALM},
        }
        [line] = read([given])
        assert line.request.content() == TTSRequest(text="Hello.", **DEFAULTS, m="calm", mood="calm").content()

    @pytest.mark.parametrize(
        "text", ["\u200b", "\ufeff \u2060", "\u00a0\u3000\t", "\u200e\u200d", "\u2028\x85"], ids=ascii
    )
    def test_a_text_that_nobody_sees_is_empty(self, text: str, refuse: Refuse) -> None:
        assert "line 1: text: the text is empty" in refuse([{"id": "a", "text": text}])

    @pytest.mark.parametrize("take", ["two", 0, -1, 1.5, "1.5", True, "inf", "nan", [2]])
    def test_a_take_is_a_whole_number(self, take: object, refuse: Refuse) -> None:
        assert "line 1: take must be a whole number from 1" in refuse([{"id": "a", "text": "Hello.", "take": take}])

    @pytest.mark.parametrize("take", [2, "2", 2.0, "2.0", " 2 "])
    def test_a_take_may_be_written_as_spreadsheets_do(self, take: object, read: Read) -> None:
        assert [line.take for line in read([{"id": "a", "text": "Hello.", "take": take}])] == [2]

    def test_spaces_around_a_voice_are_not_part_of_it(self, read: Read) -> None:
        [line] = read("id,text,voice,model\na,Hello., Rachel , tts-1 \n")
        assert (line.request.voice, line.request.model) == ("Rachel", "tts-1")


class TestJSON:
    def test_json_lines(self, read: Read) -> None:
        lines = '\ufeff{"id": 1, "text": "One.", "options": {"emotion": "calm"}}\n\n{"id": "2", "text": "Two."}\n'
        for name in ("lines.jsonl", "lines.ndjson", "lines.json", "lines.txt"):
            one, two = read(lines, name)
            assert (one.id, one.request.body()["emotion"]) == ("1", "calm")
            assert two.request.text == "Two."

    @pytest.mark.parametrize("name", ["lines.json", "lines.jsonl", "lines.csv", "lines"])
    @pytest.mark.parametrize("indent", [None, 0, 2])
    def test_an_array(self, name: str, indent: int | None, read: Read, refuse: Refuse) -> None:
        items = [{"id": "a", "text": "Hi, [you]."}, {"id": "b", "text": 'Ho, {"you"}.'}]
        assert texts(read(json.dumps(items, indent=indent), name)) == {"a": "Hi, [you].", "b": 'Ho, {"you"}.'}
        assert "the id 'b' is that of line" in refuse(json.dumps([*items, items[1]], indent=indent), name)

    def test_a_single_object_over_several_lines_is_one_line(self, read: Read) -> None:
        assert texts(read('\n{\n  "id": "a",\n  "text": "Hi."\n}\n', "lines.json")) == {"a": "Hi."}

    @pytest.mark.parametrize("indent", [None, 0, 2, "\t"])
    @pytest.mark.parametrize("between", ["\n", "\r\n\r\n", " "])
    def test_objects_one_behind_the_other_over_as_many_lines_as_they_like(
        self, indent: int | str | None, between: str, read: Read, refuse: Refuse
    ) -> None:
        items = [{"id": number, "text": f"{{{number}}}", "options": {"list": [{"a": 1}]}} for number in range(3)]
        content = between.join(json.dumps(item, indent=indent) for item in items)
        assert texts(read(content, "lines.json")) == {"0": "{0}", "1": "{1}", "2": "{2}"}
        line = len(f"{content}{between}|".splitlines())
        said = f"line {line}: the id 2 is that of line "
        assert said.replace("id 2", "id '2'") in refuse(f"{content}{between}{json.dumps(items[2])}", "lines.json")

    def test_each_object_that_is_no_json_is_told_where_it_is(self, refuse: Refuse) -> None:
        good = json.dumps({"id": "a", "text": "Hi."}, indent=1)
        content = (
            f'{{"id": "x", "text": "cut\n{good}\nno json\nnor this\n{{\n "id": y\n}}\n{{"id": "z",\n{{"id": "b"}}\n'
        )
        message = refuse(content, "lines.json")
        told = dict(part.removeprefix("INVALID_LINES: ").split(": ", 1) for part in message.split("; "))
        assert list(told) == ["line 1", "line 6", "line 7", "line 9", "line 11", "line 12"]
        assert told["line 12"].startswith("text: the text is empty")

    def test_a_large_file_that_is_no_json_is_given_up_soon(self, tmp_path: Path) -> None:
        file = tmp_path / "lines.jsonl"
        file.write_text('{"id": "a", "text": "Hi."\n' * 200_000)
        faults = list(read_rows(str(file)))
        assert (len(faults), faults[-1].line) == (100, 100)

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ('{"id": "a"\n', "line 1: not JSON (Expecting ',' delimiter)"),
            ('{"id": "a", "text": "Hi."}\n\n{"id": "b", text: "Ho."}\n', "line 3: not JSON (Expecting property name"),
            ('["a"]\n', "line 1: not an object with an id and a text"),
            ('{"id": "a", "text": "One.", "text": "Two."}\n', "line 1: not JSON (the name 'text' is there twice)"),
            (
                '[\n{"id": "a", "text": "Hi."},\n{"id": "b", "text": "Ho.", "id": "c"}]',
                "line 3: not JSON (the name 'id'",
            ),
            ('[{"id": "a", "text": "Hi."},\n7,\n{"id": "b", "text": ""}]', "line 2: not an object"),
            ('[{"id": "a", "text": "Hi."},\n7,\n{"id": "b", "text": ""}]', "line 3: text: the text is empty"),
            ('[{"id": "a", "text": "Hi."}\n{"id": "b", "text": "Ho."}]', "line 2: not JSON (after an item"),
            ('[\r\n{"id": "a",\r\n"text": Hi}]', "line 3: not JSON (Expecting value)"),
            ('[{"id": "a", "text": "Hi."},\n]', "line 2: not JSON"),
            ('[{"id": "a", "text": "Hi."}]\n\n{}', "line 3: there is more after the end of the array"),
            (
                '{"lines": [{"id": "a", "text": "Hi."}]}',
                "line 1: an object with a list in it. Needed is the list itself",
            ),
            ("[]", "there are no lines"),
            ("", "there are no lines"),
            ("[" * 100_000, "line 1: not JSON (it is nested too deeply)"),
            ('{"id": "a", "text": "Hi.", "option.x": ' + "[" * 100_000, "line 1: not JSON (it is nested too deeply)"),
            ('{"id": "a", "text": "Hi.", "option.x": ' + "7" * 5_000 + "}", "line 1: not JSON (Exceeds the limit"),
        ],
    )
    def test_what_is_not_in_order_is_told_with_its_line(self, content: str, said: str, refuse: Refuse) -> None:
        assert said in refuse(content, "lines.json")

    def test_a_large_array_is_read_in_time_in_proportion_to_its_length(self, tmp_path: Path) -> None:
        file = tmp_path / "lines.json"
        file.write_text(json.dumps([{"id": number, "text": "x"} for number in range(50_000)], indent=1))
        *_, last = read_rows(str(file))
        assert (last.line, dict(last.fields)["id"]) == (4 * 49_999 + 2, 49_999)  # type: ignore[union-attr]


class TestIds:
    @pytest.mark.parametrize(
        "line_id",
        [
            *(
                "CON",
                "con",
                "Prn",
                "aux",
                "NUL",
                "COM0",
                "COM1",
                "com9",
                "LPT5",
                "COM¹",
                "CONIN$",
                "CONOUT$",
                "CON.txt",
            ),
            *(
                "https://feed.example/episodes?id=7&page=1#top",
                "a/b",
                "a\\b",
                "..",
                ".",
                "../x",
                ".hidden",
                "end.",
                "x y",
            ),
            *("می\u200cخورم", "👨\u200d👩\u200d👧", "a\u00a0b", "a\u202fb", "日\u3000本", "a\u00adb"),
            *("C:", "a:b", "*", "日本", "-rf", "a" * 101, "x" * 1_000, '"quoted"', "a.b"),
        ],
    )
    def test_an_id_that_is_no_file_name_gets_one_and_stays_as_it_is(self, line_id: str, read: Read) -> None:
        [line] = read([{"id": line_id, "text": "Hello."}])
        assert line.id == line_id
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", file_stem(line_id))

    @pytest.mark.parametrize(
        "line_id", ["a\x00b", "a\nb", "a\x1b[31mb", "\ud83d", "a\u202eb", "a\u2028b", "a\x85b"], ids=ascii
    )
    def test_control_characters_are_refused(self, line_id: str, refuse: Refuse) -> None:
        assert "has a character in it that cannot be printed" in refuse([{"id": line_id, "text": "Hello."}])

    def test_an_id_may_be_so_long_and_not_longer(self, refuse: Refuse) -> None:
        message = refuse([{"id": "x" * 1_001, "text": "Hello."}])
        assert "is longer than 1000 characters" in message
        assert len(message) < 300

    def test_ids_whose_files_would_have_one_name_are_refused_before_anything_is_paid(self, refuse: Refuse) -> None:
        twins = [{"id": line_id, "text": "Hello."} for line_id in ("a", "b/c", "A", "b/c")]
        message = refuse(twins)
        assert "line 3: the file of the id 'A' would have the name of that of 'a' in line 1 where" in message
        assert "line 4: the id 'b/c' is that of line 2 too" in message


class TestWhatIsGiven:
    def test_a_path_may_be_an_object(self, tmp_path: Path) -> None:
        file = tmp_path / "lines.csv"
        file.write_text("id,text\na,Hello.\n")
        assert texts(read_lines(file, {})) == texts(read_lines(file.as_uri(), {})) == {"a": "Hello."}

    def test_any_iterable_of_mappings_is_read(self) -> None:
        assert texts(read_lines(({"id": number, "text": "Hello."} for number in range(2)), {})) == {
            "0": "Hello.",
            "1": "Hello.",
        }

    def test_a_single_line_in_the_place_of_a_list_is_told(self) -> None:
        with pytest.raises(NanoGPTError, match=r"INVALID_LINES: this is one mapping, and a list of them is needed"):
            read_lines({"id": "a", "text": "Hello."}, {})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "content",
        ["id,text\na,Hello.", '[{"id": "a"}]', ' [ {"id": "a"} ]', "[\t[1]]", '{"id": "a", "text": "Hello."}'],
    )
    def test_a_table_in_the_place_of_its_path_is_told(self, content: str) -> None:
        with pytest.raises(NanoGPTError, match="INVALID_LINES: this is what is in a table, not the path of one"):
            read_lines(content, {})

    def test_what_is_no_mapping_is_told(self, refuse: Refuse) -> None:
        assert "line 2: not an object with an id and a text" in refuse([{"id": "a", "text": "Hello."}, "b"])

    @pytest.mark.parametrize(
        "place", ["ftp://reader:secret@127.0.0.1:9/lines.csv", "nosuch://reader:secret@host/x", "/no/such/file.csv"]
    )
    def test_a_file_that_cannot_be_reached_is_named_without_the_password(self, place: str) -> None:
        with pytest.raises(NanoGPTError, match=r"LINES_UNREADABLE: .* cannot be read: ") as caught:
            read_lines(place, {})
        assert "secret" not in str(caught.value)
        assert place.rpartition("/")[2] in str(caught.value)


class Frame:
    """What a data frame is known by."""

    def to_dict(self, orient: str) -> list[dict[str, Any]]:
        raise AssertionError


@pytest.fixture
def batch(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to, "poll": quick, "requests_per_second": 25}


class TestManifest:
    """How often it is written."""

    @pytest.fixture
    def written(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """The bytes of each writing, with no pause between two."""
        write, sizes = Destination.write, list[int]()

        def counting(self: Destination, name: str, content: bytes) -> None:
            sizes.append(len(content))
            write(self, name, content)

        monkeypatch.setattr(Destination, "write", counting)
        monkeypatch.setattr("prefect_nanogpt.lines.REWRITE_SECONDS", -1.0)
        return sizes

    @staticmethod
    def say(manifest: Manifest, count: int, rows: dict[str, ManifestRow], prefix: str = "line") -> None:
        """Add rows one by one, as a batch does, and write the file when it falls due, and at the end."""
        lines = [Line(f"{prefix}-{number:05}", TTSRequest(text="Hi.", model="Kokoro-82m")) for number in range(count)]
        for line in lines:
            rows[line.id] = ManifestRow(id=line.id, text="Hi.", outcome="completed", job=line.id)
            if manifest.falls_due(len(rows)):
                manifest.write(lines, rows)
        manifest.write(lines, rows)

    @pytest.mark.parametrize("count", [50, 500, 3_000])
    @pytest.mark.parametrize("place", ["local", "memory://"])
    def test_what_is_written_is_a_few_times_its_size_however_many_lines_there_are(
        self, place: str, count: int, tmp_path: Path, written: list[int]
    ) -> None:
        manifest = Manifest(Destination(str(tmp_path) if place == "local" else f"{place}manifest/{count}"))
        self.say(manifest, count, {})
        assert len(manifest.read()) == count
        assert len(written) > 10
        assert sum(written) <= 6 * written[-1]  # four for each row that is new, the last of them, and the end

    def test_few_lines_beside_many_of_other_batches_do_not_write_them_again_and_again(
        self, tmp_path: Path, written: list[int]
    ) -> None:
        self.say(Manifest(Destination(str(tmp_path))), 1_000, {}, "other")
        written.clear()
        manifest = Manifest(Destination(str(tmp_path)))
        manifest.read()
        self.say(manifest, 100, {})
        assert len(written) == 1
        assert len(manifest.read()) == 1_100

    def test_it_never_lacks_more_than_a_fifth_of_what_there_is_to_tell(
        self, tmp_path: Path, written: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = dict[str, ManifestRow]()
        manifest = Manifest(Destination(str(tmp_path)))
        falls_due, lacking = manifest.falls_due, list[float]()

        def looking(lines: int) -> bool:
            if not (is_due := falls_due(lines)):
                lacking.append(1 - len(Manifest(Destination(str(tmp_path))).read()) / lines)
            return is_due

        monkeypatch.setattr(manifest, "falls_due", looking)
        self.say(manifest, 300, rows)
        assert 0.15 < max(lacking) <= 0.2

    def test_of_all_who_ask_at_once_one_writes_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        manifest = Manifest(Destination(str(tmp_path)))
        assert not any(manifest.falls_due(count) for count in range(1, 20))  # it is early yet
        monkeypatch.setattr("prefect_nanogpt.lines.REWRITE_SECONDS", -1.0)
        assert [manifest.falls_due(20) for _ in range(16)].count(True) == 1


class TestInTheFlow:
    async def test_a_path_may_be_an_object(self, batch: dict[str, Any], tmp_path: Path, sandbox: Sandbox) -> None:
        file = tmp_path / "lines.csv"
        file.write_text("id,text\na,Hello.\n")
        [row] = await text_to_speech_batch(file, **batch)
        assert (row.id, row.text) == ("a", "Hello.")

    @pytest.mark.parametrize(
        ("lines", "said"),
        [
            (Frame(), r'lines=frame\.to_dict\("records"\)'),
            ((line for line in [{"id": "a", "text": "Hello."}]), r"give list\(lines\)"),
            ("id,text\na,Hello.\n", "not the path of one"),
        ],
        ids=["a data frame", "a generator", "a table"],
    )
    async def test_what_cannot_be_read_says_what_can(
        self, lines: Any, said: str, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        with pytest.raises(ParameterTypeError, match=said):
            await text_to_speech_batch(lines, **batch)
        assert sandbox.requests() == []

    async def test_ids_that_are_no_file_names_keep_their_rows_and_a_rerun_finds_their_files(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        ids = ["https://feed.example/7?a={b}&c=%20", "CON", "../x", "a/b", "manifest", "日本", "x" * 1_000]
        lines = [{"id": line_id, "text": f"Line {number}."} for number, line_id in enumerate(ids)]
        rows = await text_to_speech_batch(lines, **batch)
        assert [row.id for row in rows] == ids
        assert {Path(str(row.location)) for row in rows} == {
            file for file in files_in(save_to) if file.suffix == ".mp3"
        }
        assert Path(save_to, "manifest.mp3").exists()
        assert all(len(os.fsencode(file.name)) < 100 and file.stem.upper() != "CON" for file in files_in(save_to))
        assert await text_to_speech_batch(lines, **batch) == rows
        assert len(sandbox.ledger.charges) == len(ids)

    async def test_each_row_carries_the_text_of_its_line(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        long = "A long one. " * 100
        lines = [
            {"id": "same", "text": "The jingle."},
            {"id": "too", "text": "The jingle."},
            {"id": "refused", "text": "[sandbox:reject] No."},
            {"id": "long", "text": long},
            {"id": "unknown", "text": "Who knows?"},
        ]
        said = {line["id"]: line["text"] for line in lines}
        sandbox.on_submit([None] * 3 + [Accept(then=Cut())])
        with pytest.raises(BatchPartial) as first:
            await text_to_speech_batch(lines, **batch, artifact_key="tts-texts", max_in_flight=1)
        assert {row.id: row.text for row in first.value.rows} == said
        table = (await report_of("tts-texts")).replace("\\", "")
        shown = dict(re.findall(r"^\| ([a-z]+) .*\| ([^|]+) \| [^|]* \| [^|]* \|$", table, re.M))
        assert shown["same"] == "The jingle."
        assert shown["long"].startswith("A long one. A long one.")
        assert len(shown["long"]) <= 80

        await text_to_speech_batch([{"id": "another", "text": "Of another batch."}], **batch)

        manifest = [json.loads(row) for row in Path(save_to, "manifest.jsonl").read_text().splitlines()]
        assert {row["id"]: row["text"] for row in manifest} == {**said, "another": "Of another batch."}

    async def test_shards_read_the_lines_as_the_whole_does(
        self, batch: dict[str, Any], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
        monkeypatch.setenv("NANOGPT_BASE_URL", sandbox.base_url)
        lines = [
            {"id": numpy.int64(0), "text": "Zero.", "voice": float("nan"), "option.seed": numpy.int64(7)},
            {"id": 1.0, "text": "One.", "voice": NAType(), "speed": numpy.float32(1.5), "take": numpy.float64(2)},
            {"id": UUID(int=2), "text": "Two.", "#remark": object(), "options": {"loud": numpy.bool_(True)}},
        ]

        async def run(parameters: dict[int, dict[str, Any]], _: str | None) -> dict[int, State[Any]]:
            given = json.loads(json.dumps(parameters, allow_nan=False))
            return {
                int(number): await text_to_speech_batch(**{**its, "poll": batch["poll"]}, return_state=True)
                for number, its in given.items()
            }

        monkeypatch.setattr("prefect_nanogpt.flows.batch.run_shards", run)
        rows = await text_to_speech_batch(lines, **{**batch, "credentials": None}, voice="Rachel", shards=3)
        assert [row.id for row in rows] == ["0", "1", str(UUID(int=2))]
        assert all(row.is_completed for row in rows)
        assert len(sandbox.ledger.charges) == 3
