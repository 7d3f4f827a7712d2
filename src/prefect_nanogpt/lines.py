"""The lines of a batch, as they are read, and what became of each, as it is kept beside the audio."""

from __future__ import annotations

import json
import os
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from decimal import Decimal
from difflib import get_close_matches
from functools import lru_cache
from math import isfinite
from typing import Any, Final, NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.models import (
    LARGEST_TAKE,
    OF_THE_LINE,
    OPTION_PREFIXES,
    REMARK,
    Ticket,
    TTSRequest,
    check_option,
    field_of,
    options_of,
    plain_name,
    problems_in,
    python_value,
)
from prefect_nanogpt.pronunciation import Pronunciation
from prefect_nanogpt.storage import Destination, file_stem
from prefect_nanogpt.tables import NO_OBJECT, Fault, Row, option_value, read_json, read_rows

__all__ = [
    "FILE_NAME",
    "Line",
    "Manifest",
    "ManifestRow",
    "costs_once",
    "is_content",
    "read_lines",
    "shards_of",
    "usable",
]

FILE_NAME: Final = "manifest.jsonl"
COMPLETED: Final = "completed"
PROBLEMS_SHOWN: Final = 100
REWRITE_SECONDS: Final = 30.0
REWRITE_SHARE: Final = 0.25
"""How many rows have to be new, as a share of those in the file, before it is written anew: so for each new one no more
than four are written once more, however many lines there are."""
LONGEST_ID: Final = 1_000
ID_SHOWN: Final = 100
NAME_SHOWN: Final = 40
NOT_IN_IDS: Final = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of control characters, halves of characters, and ends of lines."""
TURNING: Final = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""What turns the direction of writing, with which a name can be made to read as another."""
OPTION: Final = "option."
JSON_BEGINS: Final = re.compile(r"\s*(\{|\[\s*[\[{])")
LINE_ENDS: Final = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}
NEAR: Final = 0.75
"""How much of a name has to be as in a known one to ask whether that was meant: `voise` and `langauge` are."""
MISSING: Final = frozenset({"NaN", "<NA>"})
"""How pandas writes what is missing, if asked to. Not `nan`, which is the code of a language."""
SPREADSHEET_ERRORS: Final = frozenset(
    "#NAME? #REF! #VALUE! #DIV/0! #N/A #NULL! #NUM! #ERROR! #SPILL! #CALC! #FIELD! #BUSY! #CONNECT! #BLOCKED! #PYTHON! "
    "#GETTING_DATA #BEZUG! #WERT! #ZAHL! #NV #ÜBERLAUF! #NOM? #VALEUR! #NOMBRE! #N/D #¡REF! #¿NOMBRE? #¡VALOR! #¡NUM! "
    "#NOME? #VALORE! #VALOR! #ИМЯ? #ССЫЛКА! #ЗНАЧ! #ЧИСЛО! #\u041d/\u0414 #名前?".split()
)
OFFICE_ERROR: Final = re.compile(r"\s*Err:[0-9]{3}\s*$")
"""How LibreOffice writes most of them."""
KNOWN: Final = frozenset({*OF_THE_LINE, *TTSRequest.model_fields})


class Line(NamedTuple):
    """One line of a batch: its id, what to say, which rendition of it, and the text if it was written otherwise."""

    id: str
    request: TTSRequest
    take: int = 1
    written: str | None = None

    @property
    def text(self) -> str:
        """The text as it was written."""
        return self.request.text if self.written is None else self.written

    def said_with(self, pronunciation: Pronunciation) -> Line:
        """Give the line as it is said."""
        spoken = pronunciation.apply(self.request.text)
        if spoken.text == spoken.written:
            return self
        return self._replace(request=self.request.model_copy(update={"text": spoken.text}), written=spoken.written)


class ManifestRow(BaseModel):
    """What became of a line.

    Attributes:
        id: The line. Its file has this name, or, where no file can, one that is made of it: `location` tells.
        text: What was to be said, as it was written; empty in rows of versions that did not keep it.
        said_as: What was said for it, where a pronunciation has changed it.
        outcome: `completed`, or the code of why there is no audio.
        detail: The reason, where there is no audio.
        location: Where the audio is.
        sha256: The SHA-256 digest of the file, in hexadecimal.
        size_bytes: The size in bytes.
        duration_seconds: The length in seconds, where it is known.
        cost: What was charged in all tries, in `currency`, where the provider said; 0 for a line that shares the job
            of an earlier one.
        currency: The unit of `cost`: USD, if anything was charged in it.
        other_costs: What was charged besides, by currency, where tries were charged in several.
        ticket: The job, where there is one.
        job: The job's digest in the ledger: a line that has changed since is another job.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    text: str = ""
    said_as: str | None = None
    outcome: str
    detail: str | None = None
    location: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    duration_seconds: float | None = None
    cost: Decimal | None = None
    currency: str | None = None
    other_costs: dict[str, Decimal] | None = None
    ticket: Ticket | None = None
    job: str

    @property
    def is_completed(self) -> bool:
        """Whether there is audio."""
        return self.outcome == COMPLETED

    @property
    def file_name(self) -> str:
        """The name of the audio's file, empty where there is none."""
        return (self.location or "").rpartition("/")[2]


def read_lines(
    lines: Iterable[Mapping[str, Any]] | str | os.PathLike[str], defaults: Mapping[str, Any], take: int = 1
) -> list[Line]:
    """Read the lines of a batch and check every one of them.

    Args:
        lines: Mappings with `id`, `text` and, where wanted, `voice`, `model`, `take`, the documented options (`speed`,
            `language`, …), and others, each as `option.<name>` or all as `options`; or the path or fsspec URL of a
            table with such columns, of a JSON array or of JSON Lines.
        defaults: What applies to lines that do not say otherwise: `model`, `voice`, and options.
        take: The take of lines that do not say which.

    Raises:
        NanoGPTError: Code `INVALID_LINES`, with every problem and where it is, or `LINES_UNREADABLE`.

    Example:
        >>> read_lines([{"id": "greeting", "text": "Hello!"}], {"model": "Kokoro-82m"})[0].request.model
        'Kokoro-82m'
    """
    reading = _Reading(defaults, take)
    for row in _rows(lines):
        reading.add(row)
    if not reading.lines and not reading.problems:
        reading.note("there are no lines")
    if problems := list(reading.problems.values()):
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise NanoGPTError(
            f"{'; '.join(problems[:PROBLEMS_SHOWN])}{more}. Nothing was submitted.", code="INVALID_LINES"
        )
    return reading.lines


def usable(lines: Any) -> Any:
    """Give lines as they can be read: a path as a string, anything else as it is.

    Raises:
        ValueError: It is a data frame, a single line, or the content of a table instead of its path.
    """
    if hasattr(lines, "to_dict"):
        raise ValueError('a data frame is given row by row, as lines=frame.to_dict("records")')
    if isinstance(lines, Mapping):
        raise ValueError('this is one mapping, and a list of them is needed, as lines=[{"id": …, "text": …}, …]')
    if isinstance(lines, os.PathLike):
        return os.fspath(lines)
    if isinstance(lines, str) and is_content(lines):
        raise ValueError("this is what is in a table, not the path of one: save it as a file, or give a list of lines")
    return lines


def is_content(text: str) -> bool:
    """Whether a text is what is in a table, and no path of one."""
    return len(text.splitlines()) > 1 or JSON_BEGINS.match(text) is not None


def _rows(lines: Iterable[Mapping[str, Any]] | str | os.PathLike[str]) -> Iterator[Row | Fault]:
    try:
        given = usable(lines)
    except ValueError as error:
        raise NanoGPTError(f"{error}. Nothing was submitted.", code="INVALID_LINES") from None
    if isinstance(given, str):
        yield from read_rows(given)
        return
    for number, fields in enumerate(given, 1):
        if isinstance(fields, Mapping):
            yield Row(number, [(str(name), value) for name, value in fields.items()], number)
        else:
            yield Fault(number, NO_OBJECT)


class _Reading:
    """The lines that are in order, and what is wrong with the others.

    Args:
        defaults: What applies to lines that do not say otherwise.
        take: The take of lines that do not say which.
    """

    def __init__(self, defaults: Mapping[str, Any], take: int) -> None:
        self.lines: list[Line] = []
        self.problems: dict[object, str] = {}
        """What is wrong, by what tells one problem from another: an unknown column is one problem of many lines."""
        self._defaults = defaults
        self._take = take
        self._stems: dict[str, tuple[str, int]] = {}
        """Whose file has a name, as id and line."""

    def note(self, what: str, line: int | None = None, key: object = None) -> None:
        """Note a problem and where it is; of several with the same key only the first."""
        text = what if line is None else f"line {line}: {what}"
        self.problems.setdefault(len(self.problems) if key is None else key, text)

    def add(self, row: Row | Fault) -> None:
        """Read a row as a line, or note what is wrong with it."""
        if isinstance(row, Fault):
            self.note(row.what, row.line)
            return
        given = self._given(row)
        line_id, take, options = "", self._take, dict[str, Any]()
        with self._noting(row.line):
            line_id = self._id(given.pop("id", ""), row.line)
        with self._noting(row.line):
            take = _whole(given.pop("take", take))
        with self._noting(row.line):
            options = _options(given.pop("options", {}))
        with self._noting(row.line):
            own = {name.removeprefix(OPTION): value for name, value in given.items()}
            request = TTSRequest.model_validate({**self._defaults, **options, "text": "", **own})
            self.lines.append(Line(line_id, request, take))

    @contextmanager
    def _noting(self, line: int) -> Iterator[None]:
        try:
            yield
        except ValidationError as invalid:
            for problem in problems_in(invalid):
                self.note(problem, line)
        except ValueError as error:
            self.note(str(error), line)

    def _given(self, row: Row) -> dict[str, Any]:
        """Give the values of a row by what their names mean; those that are missing are left out."""
        kind = "field" if row.names_line == row.line else "column"
        names: dict[str, str] = {}
        given = {}
        for name, value in row.fields:
            meaning, problem = _meaning(name)
            if problem:
                self.note(f"{kind} {problem}", row.names_line, key=problem)
            elif (plain := plain_name(meaning)) in names:
                twice = f"the {kind}s {names[plain]!r} and {name!r} are the same"
                self.note(twice, row.names_line, key=(row.names_line, twice))
            elif meaning:
                names[plain] = name
                value = python_value(value)
                with self._noting(row.line):
                    value = _value(meaning, value)
                if isinstance(value, str) and (value.strip() in SPREADSHEET_ERRORS or OFFICE_ERROR.match(value)):
                    self.note(f"{name}: {value!r} is an error of the spreadsheet, and nothing to say", row.line)
                elif not _is_missing(value, meaning):
                    given[meaning] = value
        return given

    def _id(self, value: object, line: int) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float | UUID):
            raise ValueError(f"the id {repr(value)[:ID_SHOWN]} is neither a text nor a number")
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"the id {value} is no number")
        if isinstance(value, float) and value.is_integer():  # pandas makes floats of whole numbers where one is missing
            value = int(value)
        line_id = str(value).strip()
        if not line_id:
            raise ValueError("there is no id")
        shown = repr(line_id[:ID_SHOWN])
        if len(line_id) > LONGEST_ID:
            raise ValueError(f"the id that begins with {shown} is longer than {LONGEST_ID} characters")
        if any(unicodedata.category(character) in NOT_IN_IDS or character in TURNING for character in line_id):
            raise ValueError(f"the id {shown} has a character in it that cannot be printed")
        # There are file systems that do not tell upper from lower case.
        stem = file_stem(line_id).casefold()
        if stem in self._stems:
            first, its_line = self._stems[stem]
            if first == line_id:
                raise ValueError(f"the id {shown} is that of line {its_line} too")
            raise ValueError(
                f"the file of the id {shown} would have the name of that of {first[:ID_SHOWN]!r} in line {its_line} "
                "where upper and lower case are not told apart"
            )
        self._stems[stem] = line_id, line
        return line_id


@lru_cache(maxsize=4096)
def _meaning(name: str) -> tuple[str, str]:
    """Tell what a name means, and what is wrong with it. A remark means nothing, and nothing is wrong with it."""
    if name.lstrip().startswith(REMARK):
        return "", ""
    if (known := field_of(name)) in KNOWN:
        return known, ""
    shown = name.strip()[:NAME_SHOWN]
    prefix, _, option = name.partition(".")
    if option.strip() and plain_name(prefix) in OPTION_PREFIXES:
        meaning = field_of(option)
        try:
            check_option(meaning)
        except ValueError as error:
            return "", f"{shown!r}: {error}"
        return (meaning if meaning in KNOWN else OPTION + meaning), ""
    near = get_close_matches(plain_name(name), map(plain_name, KNOWN), 1, NEAR)
    perhaps = f" (did you mean {field_of(near[0])!r}?)" if near else ""
    return "", (
        f"{shown!r} is unknown{perhaps}: name it {OPTION + shown!r} to send it to the model as an option, "
        f"{REMARK + shown!r} to pass it over, or remove it"
    )


def _options(given: object) -> dict[str, Any]:
    if isinstance(given, str):
        try:
            given = read_json(given)
        except ValueError as error:
            raise ValueError(f"options must be a JSON object ({error})") from None
    if not isinstance(given, Mapping):
        raise ValueError("options must be a JSON object")
    try:
        return options_of(given)
    except ValueError as error:
        raise ValueError(f"options: {error}") from None


def _value(meaning: str, value: Any) -> Any:
    """Give a value as its name asks: an option that is not documented is read as JSON, if it is JSON.

    Raises:
        ValueError: As `option_value` does.
    """
    if isinstance(value, str) and meaning.startswith(OPTION):
        return option_value(meaning.removeprefix(OPTION), value)
    return value


def _whole(take: object) -> int:
    try:
        number = float(str(take))
    except ValueError:
        number = 0.0
    if not number.is_integer() or not 1 <= number <= LARGEST_TAKE:
        raise ValueError("take must be a whole number from 1")
    return int(number)


def _is_missing(value: object, meaning: str) -> bool:
    """Whether a value says nothing. 0 says something; NaN, which pandas has for what is missing, does not."""
    if value is None or isinstance(value, str):
        return not (value or "").strip() or (value in MISSING and meaning not in ("id", "text"))
    if type(value).__name__ == "NAType":  # pandas.NA, which is not even unequal to itself
        return True
    try:
        return bool(value != value)
    except Exception:  # others' objects, which may not be comparable at all; that they are no JSON is told elsewhere
        return False


class Manifest:
    """The file `manifest.jsonl` beside the audio: a row for each line, in the order of the lines.

    It tells people and programs what the ledger knows, and spares the next run reading that note by note. A manifest
    that is torn or gone costs time and nothing else.

    Args:
        destination: The folder of the audio.
    """

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._others: dict[str, ManifestRow] = {}
        self._due_at = time.monotonic()
        self._told = 0
        """How many lines there were to tell of when it was last due."""
        self._length = 0
        """How many rows are in the file."""

    def read(self) -> dict[str, ManifestRow]:
        """Read the rows of earlier runs, by id. What cannot be read as a row is passed over."""
        for line in (self._destination.read(FILE_NAME) or b"").split(b"\n"):
            with suppress(ValidationError):
                row = ManifestRow.model_validate_json(line)
                self._others[row.id] = row
        self._length = len(self._others)
        return dict(self._others)

    def write(self, lines: Iterable[Line], rows: Mapping[str, ManifestRow]) -> None:
        """Write a row for each line that has one, then the rows of lines that are not of this batch.

        Another batch may have written rows of its own since this one began, so the file is read again before.
        """
        told = {line.id: rows[line.id] for line in lines if line.id in rows}
        try:
            self._others = {line_id: row for line_id, row in self.read().items() if line_id not in told}
            everything = costs_once([*told.values(), *self._others.values()])
            self._length = len(everything)
            # Half a character, should there be one in somebody's words, is escaped as JSON escapes it.
            told_of = "".join(map(_as_json, everything)).encode(errors="backslashreplace")
            self._destination.write(FILE_NAME, told_of)
        except Exception as error:  # the drivers of buckets have families of errors of their own
            run_logger().warning("The manifest cannot be written; the ledger has all that it would say: %s", error)

    def falls_due(self, lines: int) -> bool:
        """Whether it is time to bring the file up to date, now that there are so many lines to tell of.

        Of all who ask, one is told so, and writes it.
        """
        has_enough = lines - self._told > REWRITE_SHARE * self._length
        if is_due := has_enough and time.monotonic() - self._due_at > REWRITE_SECONDS:
            self._due_at, self._told = time.monotonic(), lines
        return is_due


def costs_once(rows: Iterable[ManifestRow]) -> list[ManifestRow]:
    """Leave what a job has cost to the first of its lines, so that rows add up to what was charged."""
    told: set[str] = set()
    once = []
    for row in rows:
        if row.job in told and row.cost is not None:
            row = row.model_copy(update={"cost": Decimal(0), "other_costs": None})
        told.add(row.job)
        once.append(row)
    return once


def shards_of(lines: Iterable[Line], shards: int) -> list[int]:
    """Tell for each line which shard it is of, from 1: they take turns, and equal lines stay together."""
    first: dict[tuple[bytes, int], int] = {}
    return [
        first.setdefault((line.request.content(), line.take), index) % shards + 1 for index, line in enumerate(lines)
    ]


def _as_json(row: ManifestRow) -> str:
    # Python's splitlines, JavaScript and editors end lines also where JSON does not.
    return json.dumps(row.model_dump(mode="json", exclude_none=True), ensure_ascii=False).translate(LINE_ENDS) + "\n"
