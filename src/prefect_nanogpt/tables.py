"""Files of lines, read into rows: tables as spreadsheets save them, JSON arrays, and JSON Lines.

What a row means is checked in `lines`. Here every value is what the file says, and what cannot be read is told with the
number of its line, as an editor shows it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import zip_longest
from typing import Any, Final, NamedTuple

import fsspec

from prefect_nanogpt.errors import NanoGPTError, hide, passwords_in, without_password

__all__ = ["NO_OBJECT", "Fault", "Row", "plain_name", "read_json", "read_rows"]

NEEDED: Final = frozenset({"id", "text"})
COLUMNS_NEEDED: Final = "the columns id and text are needed, named in the first line"
NO_OBJECT: Final = "not an object with an id and a text"
SEPARATORS: Final = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
TOO_DEEP: Final = "it is nested too deeply"
SHOWN: Final = 40
COLUMNS_SHOWN: Final = 10
SAVE_AS_UTF8: Final = "Save it as UTF-8; in Excel, that is 'CSV UTF-8'"
_BYTE_ORDER_MARKS: Final = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_NO_TEXT: Final = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"\x1f\x8b")
"""How a ZIP archive begins, which a workbook is, an older workbook, and a file of gzip."""
_LINE_END: Final = re.compile(r"\r\n?|\n")
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_SEPARATOR_LINE: Final = re.compile(r"sep=([^\r\n\"])[ ]*(?:\r\n?|\n)", re.IGNORECASE)
# Possessive, so that a text whose end is missing is not taken for a shorter one that ends at a doubled mark.
_QUOTED: Final = re.compile(r' *+"((?:[^"]++|"")*+)(" *+)?')
_DECODER: Final = json.JSONDecoder()


class Row(NamedTuple):
    """What one line of a file, or one item of a list, says.

    Attributes:
        line: The number of its line, from 1; of the first, where it has several.
        fields: Its values with their names.
        names_line: The number of the line that the names are in: of a table, the header.
    """

    line: int
    fields: Sequence[tuple[str, Any]]
    names_line: int


class Fault(NamedTuple):
    """What is wrong with a line that is no row."""

    line: int
    what: str


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """Reduce a name to what tells it from others, which case, spaces, `-` and `_` do not.

    Example:
        >>> plain_name(" Response-Format")
        'responseformat'
    """
    return re.sub(r"[\s_\-\u200b\ufeff]+", "", name).casefold()


def read_json(text: str) -> Any:
    """Read JSON in which no object has the same name twice.

    Raises:
        ValueError: It is no JSON, or has such an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in found if names.count(name) > 1)
        raise ValueError(f"the name {twice[:SHOWN]!r} is there twice")
    return found


def read_rows(place: str) -> Iterator[Row | Fault]:
    """Read the rows of a file: as JSON where it looks like JSON, whatever its name, and else as a table.

    Args:
        place: The path or fsspec URL of the file.

    Raises:
        NanoGPTError: It cannot be read, or is neither UTF-8 nor UTF-16 with a byte order mark (code
            `LINES_UNREADABLE`).
    """
    try:
        with fsspec.open(place, "rb") as file:
            text = _decoded(file.read())
    except Exception as error:  # the drivers of buckets have families of errors of their own
        words = hide(passwords_in(place), str(error)).rstrip(".") or type(error).__name__
        raise NanoGPTError(
            f"{without_password(place)} cannot be read: {words}. Nothing was submitted.", code="LINES_UNREADABLE"
        ) from None
    if text.lstrip()[:1] in ("[", "{") or place.lower().endswith((".json", ".jsonl", ".ndjson")):
        yield from _json_rows(text)
    else:
        yield from _table_rows(text)


def _decoded(data: bytes) -> str:
    """Decode a file. An encoding is never guessed: texts that are wrongly read would be paid for.

    Raises:
        ValueError: It is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    if data.startswith(_NO_TEXT):
        raise ValueError("it is a workbook or an archive. Save the sheet as 'CSV UTF-8'")
    mark, encoding = next((item for item in _BYTE_ORDER_MARKS.items() if data.startswith(item[0])), (b"", "utf-8"))
    body = data.removeprefix(mark)
    if encoding == "utf-8" and b"\0" in body:
        raise ValueError(
            f"it has null bytes in it, the first at {data.index(0)}, as UTF-16 without a byte order mark has. "
            f"{SAVE_AS_UTF8}"
        )
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        if encoding != "utf-8":
            raise ValueError(f"it begins as UTF-16 and is damaged at byte {at}. {SAVE_AS_UTF8}") from None
        line = len(_LINE_END.findall(body[: error.start].decode())) + 1
        around = body[max(0, error.start - 10) : error.start + 10].decode("cp1252", "replace")
        raise ValueError(
            f"it is not UTF-8: byte {at}, in line {line}, is 0x{body[error.start]:02X}. Was it saved as Windows-1252? "
            f"Then it says {' '.join(around.split())!r} there. {SAVE_AS_UTF8}"
        ) from None
    if "\0" in text:  # UTF-32 begins like UTF-16
        raise ValueError(f"it has null characters in it. {SAVE_AS_UTF8}")
    return text


def _lines_in(text: str, start: int, end: int) -> int:
    return len(_LINE_END.findall(text, start, end))


# Tables


def _table_rows(text: str) -> Iterator[Row | Fault]:
    line, position, separators = 1, 0, list(SEPARATORS)
    if first := _SEPARATOR_LINE.match(text):  # as Excel writes it for itself
        line, position, separators = 2, first.end(), [first[1]]
    # Only the header can tell which one it is: in the texts stands any of them.
    separator = max(separators, key=lambda one: _names_in(next(_records(text, position, line, one), None)))
    records = _records(text, position, line, separator)
    header = next(records, Fault(line, COLUMNS_NEEDED))
    if isinstance(header, Fault):
        yield header
        return
    line, names = header[0], [" ".join(name.split()) for name in header[1]]
    if not {plain_name(name) for name in names} >= NEEDED:
        found = ", ".join(repr(name[:SHOWN]) for name in names[:COLUMNS_SHOWN])
        yield Fault(line, f"{COLUMNS_NEEDED}; found: {found}")
        return
    untitled = {column for column, name in enumerate(names) if not plain_name(name)}
    for record in records:
        if isinstance(record, Fault):
            yield record
            continue
        at, values = record
        filled = {column for column, value in enumerate(values) if value.strip()}
        if max(filled) >= len(names):
            yield Fault(
                at,
                f"there are more fields ({max(filled) + 1}) than columns ({len(names)}): a text with a "
                f"{SEPARATORS.get(separator, repr(separator))} in it needs quotation marks around it",
            )
            continue
        for column in sorted(untitled & filled):
            yield Fault(
                line,
                f"column {column + 1} has no title, but a value in line {at}: give it one, or remove it (pandas writes "
                "no index with index=False)",
            )
        untitled -= filled
        pairs = zip_longest(names, values[: len(names)], fillvalue="")
        yield Row(at, [(name, value) for name, value in pairs if plain_name(name)], line)


def _names_in(header: tuple[int, list[str]] | Fault | None) -> tuple[int, int]:
    """Tell how good a reading of the header is: how many names of `NEEDED` it gives, and how many in all."""
    if header is None or isinstance(header, Fault):
        return 0, 0
    return len(NEEDED & {plain_name(name) for name in header[1]}), len(header[1])


def _records(text: str, position: int, line: int, separator: str) -> Iterator[tuple[int, list[str]] | Fault]:
    """Cut a table into its records, each with the number of its first line; those without any value are passed over.

    The standard library's reader takes the rest of a file for one text where a quotation mark is not closed or, told to
    be strict, does not say where it opens. Nothing behind such a mark can be told.
    """
    plain = re.compile(rf"[^{re.escape(separator)}\r\n]*")
    start, values = line, list[str]()
    while position <= len(text):
        if quoted := _QUOTED.match(text, position):
            opened, line, position = line, line + _lines_in(text, position, quoted.end()), quoted.end()
            stray = plain.match(text, position)
            if quoted[2] is None or (stray and stray[0]):
                yield Fault(opened, _wrong_quotation(quoted[2], line - opened, stray[0] if stray else ""))
                return
            values.append(quoted[1].replace('""', '"'))
        elif found := plain.match(text, position):
            position = found.end()
            values.append(found[0].lstrip(" "))
        if text.startswith(separator, position):
            position += 1
            continue
        if any(value.strip() for value in values):
            yield start, values
        end = _LINE_END.match(text, position)
        position = end.end() if end else len(text) + 1
        start, values = line + 1, []
        line += 1


def _wrong_quotation(closed: str | None, lines_later: int, stray: str) -> str:
    if closed is None:
        return "a quotation mark opens a text here and is not closed up to the end of the file"
    where = f" {lines_later} lines later," if lines_later > 1 else " in the next line," if lines_later else ""
    return (
        f"a quotation mark opens a text here and is closed{where} before {stray[:SHOWN]!r}: either it is to be closed "
        "earlier, or a quotation mark in the text has to be written twice"
    )


# JSON


def _json_rows(text: str) -> Iterator[Row | Fault]:
    for item in _json_items(text):
        if isinstance(item, Fault):
            yield item
            continue
        line, words = item
        try:
            fields = read_json(words)
        except ValueError as error:
            yield _not_json(line, error)
            continue
        if not isinstance(fields, dict):
            yield Fault(line, NO_OBJECT)
        elif "text" not in map(plain_name, fields) and any(isinstance(value, list) for value in fields.values()):
            yield Fault(
                line, "an object with a list in it. Needed is the list itself, or one object a line with id and text"
            )
        else:
            yield Row(line, list(fields.items()), line)


def _json_items(text: str) -> Iterator[tuple[int, str] | Fault]:
    """Cut JSON into its items, each with the number of its line: of an array; or a single one; or one a line."""
    position = _past_space(text, 0)
    if text.startswith("[", position):
        yield from _array_items(text, position)
        return
    with suppress(ValueError, RecursionError):
        _, end = _DECODER.raw_decode(text, position)
        if _past_space(text, end) == len(text):
            yield _lines_in(text, 0, position) + 1, text[position:end]
            return
    yield from ((number, line) for number, line in enumerate(_LINE_END.split(text), 1) if line.strip())


def _array_items(text: str, opened: int) -> Iterator[tuple[int, str] | Fault]:
    counted, line = 0, 1
    position = _past_space(text, opened + 1)
    is_open = not text.startswith("]", position)
    while is_open:
        line += _lines_in(text, counted, position)
        counted = position
        try:
            _, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            yield _not_json(line + _lines_in(text, position, at), error)
            return
        yield line, text[position:end]
        position = _past_space(text, end)
        is_open = text.startswith(",", position)
        if is_open:
            position = _past_space(text, position + 1)
    line += _lines_in(text, counted, position)
    if not text.startswith("]", position):
        yield Fault(line, "not JSON (after an item of the array, a comma or a closing bracket is needed)")
    elif (rest := _past_space(text, position + 1)) < len(text):
        yield Fault(line + _lines_in(text, position, rest), "there is more after the end of the array")


def _past_space(text: str, position: int) -> int:
    space = _SPACE.match(text, position)
    return space.end() if space else position


def _not_json(line: int, error: Exception) -> Fault:
    said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return Fault(line, f"not JSON ({TOO_DEEP if isinstance(error, RecursionError) else said})")
