"""Files of lines, read into rows: tables as spreadsheets save them, JSON arrays, and JSON Lines.

What a row means is checked in `lines`. Here every value is what the file says, and what cannot be read is told with the
number of its line, as an editor shows it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, NamedTuple

import fsspec

from prefect_nanogpt.errors import NanoGPTError, hide, secrets_in, without_login
from prefect_nanogpt.models import REMARK, decimal_of, plain_name

__all__ = ["NO_OBJECT", "Fault", "Row", "option_value", "read_json", "read_pasted", "read_rows"]

OF_LINES: Final = ("id", "text")
NO_OBJECT: Final = "not an object with an id and a text"
SEPARATORS: Final = {",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar"}
TOO_DEEP: Final = "it is nested too deeply"
SHOWN: Final = 40
COLUMNS_SHOWN: Final = 10
MOST_FAULTS: Final = 100
"""After so many things that are no JSON nothing more is looked for: each costs a look at all that is before it."""
ESCAPE: Final = "\x1b"
SAVE_AS_UTF8: Final = "Save it as UTF-8; in Excel, that is 'CSV UTF-8'"
_BYTE_ORDER_MARKS: Final = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_NO_TABLES: Final = {
    b"PK\x03\x04": "a workbook or an archive",
    b"\xd0\xcf\x11\xe0": "a workbook",
    b"\x1f\x8b": "an archive",
    b"%PDF-": "a PDF",
    b"{\\rtf": "an RTF document",
    b"<": "a web page or XML",
}
"""What files are that are taken for tables, by their first bytes."""
_CONTROL: Final = re.compile("[\0-\x08\x0e-\x1f\x7f]")
_MARKS: Final = re.compile("(?:^|(?<=[\r\n]))\ufeff+")
_LINE_END: Final = re.compile(r"\r\n?|\n")
_BLANK_LINES: Final = re.compile(r"[\r\n]*")
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_SEPARATOR_LINE: Final = re.compile(r"sep=([^\r\n\"])[ ]*(?:\r\n?|\n)", re.IGNORECASE)
# Possessive, so that a text whose end is missing is not taken for a shorter one that ends at a doubled mark.
_QUOTED: Final = re.compile(r' *+"((?:[^"]++|"")*+)(" *+)?')
_FORMULA: Final = re.compile(
    r"""\s*\{?(?:of:)?=[\s@(+-]*(?:
        [^\W\d][\w.]*\(                 # a function, in whatever language
        |(?:\$?(?:'[^']*'|\[[^\]]*\][\w.]*|[\w.-]+)[!.])?  # a cell, also of another sheet
            \$?[A-Z]{1,3}\$?[0-9]+\s*(?:$|[-+*/^&:=<>,;)}])
        |[^\W\d]\w*\[|\[[.@]            # a column of a table
        |"(?:[^"]|"")*"\s*&|\#REF!)""",
    re.VERBOSE,
)
_TEXT_FORMULA: Final = re.compile(r'="((?:[^"]|"")*)"')
_NEXT_OBJECT: Final = re.compile(r"(?:\r\n?|\n)(?=\{)")
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


def read_json(text: str) -> Any:
    """Read JSON in which no object has the same name twice.

    Raises:
        ValueError: It is no JSON, or has such an object.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(TOO_DEEP) from None


def option_value(name: str, written: str) -> Any:
    """Read an option of a model that somebody wrote as text: as JSON where it is JSON, as it is where it is not.

    Raises:
        ValueError: It would be sent as a text, and is meant as a number.

    Example:
        >>> option_value("loud", "TRUE"), option_value("emotion", "calm")
        (True, 'calm')
    """
    if number := decimal_of(written):
        raise ValueError(f"{name}: {written!r} is no number: write {number}, or for a text {json.dumps(written)}")
    if (word := written.strip()).casefold() in ("true", "false"):  # as spreadsheets and Python write them
        return word.casefold() == "true"
    try:
        return read_json(word)
    except ValueError:
        return word


def _object(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found = dict[str, Any]()
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name[:SHOWN]!r} is there twice")
        found[name] = value
    return found


def read_rows(place: str, needed: tuple[str, str] = OF_LINES) -> Iterator[Row | Fault]:
    """Read the rows of a file: as JSON where it looks like JSON, whatever its name, and else as a table.

    Args:
        place: The path or fsspec URL of the file.
        needed: The names that each row has to have; what is below columns of these names is a table.

    Raises:
        NanoGPTError: It cannot be read, or is neither UTF-8 nor UTF-16 with a byte order mark (code
            `LINES_UNREADABLE`).
    """
    try:
        with fsspec.open(place, "rb") as file:
            text = _decoded(file.read())
    except Exception as error:  # the drivers of buckets have families of errors of their own
        words = hide(secrets_in(place), str(error)).rstrip(".") or type(error).__name__
        raise NanoGPTError(
            f"{without_login(place)} cannot be read: {words}. Nothing was submitted.", code="LINES_UNREADABLE"
        ) from None
    yield from _rows_in(text, needed, is_json=place.lower().endswith((".json", ".jsonl", ".ndjson")))


def read_pasted(text: str) -> list[dict[str, Any]]:
    """Read what is in a file as `read_rows` does, where it was given in the place of the file.

    Raises:
        ValueError: It is neither a table nor JSON, with the line that is wrong first.

    Example:
        >>> read_pasted('{"id": "a", "text": "Hello!"} {"id": "b", "text": "Bye."}')
        [{'id': 'a', 'text': 'Hello!'}, {'id': 'b', 'text': 'Bye.'}]
    """
    rows = []
    for row in _rows_in(_MARKS.sub("", text), OF_LINES):
        if isinstance(row, Fault):
            raise ValueError(f"line {row.line}: {row.what}")
        rows.append(_object(row.fields))
    return rows


def _rows_in(text: str, needed: tuple[str, str], *, is_json: bool = False) -> Iterator[Row | Fault]:
    is_json = is_json or text.lstrip()[:1] in ("[", "{")
    return _json_rows(text, needed) if is_json else _table_rows(text, needed)


def _decoded(data: bytes) -> str:
    """Decode a file. An encoding is never guessed: texts that are wrongly read would be paid for.

    Raises:
        ValueError: It is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    mark, encoding = next((item for item in _BYTE_ORDER_MARKS.items() if data.startswith(item[0])), (b"", "utf-8"))
    body = data.removeprefix(mark)
    stripped = body.lstrip() if encoding == "utf-8" else b""
    for beginning, what in _NO_TABLES.items():
        if stripped.startswith(beginning):
            raise ValueError(f"it is {what}, and not a table. Save the sheet as 'CSV UTF-8'")
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
    if control := _CONTROL.search(text):
        line = _lines_in(text, 0, control.start()) + 1
        as_in = ", as text in ISO-2022-JP has" if control[0] == ESCAPE else ""
        raise ValueError(
            f"it has a control character in it, 0x{ord(control[0]):02X} in line {line}{as_in}. {SAVE_AS_UTF8}"
        )
    return _MARKS.sub("", text)  # which are also where files were put together


def _lines_in(text: str, start: int, end: int) -> int:
    return len(_LINE_END.findall(text, start, end))


# Tables


def _table_rows(text: str, needed: tuple[str, str]) -> Iterator[Row | Fault]:
    line, position, separator = _header(text, needed)
    records = _records(text, position, line, separator)
    columns_needed = f"the columns {' and '.join(needed)} are needed, named in the first line"
    header = next(records, Fault(line, columns_needed))
    if isinstance(header, Fault):
        yield header
        return
    line, names = header[0], [" ".join(name.split()) for name in header[1]]
    if not _is_header(names, needed):
        found = ", ".join(repr(name[:SHOWN]) for name in names[:COLUMNS_SHOWN])
        yield Fault(line, f"{columns_needed}; found: {found}")
        return
    untitled = {column for column, name in enumerate(names) if not plain_name(name)}
    titled = [
        (column, name) for column, name in enumerate(names) if column not in untitled and not name.startswith(REMARK)
    ]
    for record in records:
        if isinstance(record, Fault):
            yield record
            continue
        at, values = record
        if _is_header(values, needed):  # once more, where tables were put together
            if _without_empty(values) != _without_empty(names):
                yield Fault(
                    at, f"these are names of columns again, and not those of line {line}: give it as a table of its own"
                )
                return
            continue
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
        fields = [(name, values[column] if column < len(values) else "") for column, name in titled]
        if formula := next((field for field in fields if _FORMULA.match(field[1])), None):
            name, value = formula
            yield Fault(
                at,
                f"{name}: {value[:SHOWN]!r} is a formula, and nothing to say: save the sheet with its values, or "
                'write it as ="…" if it is a text',
            )
            continue
        yield Row(at, [(name, _cell(value)) for name, value in fields], line)


def _header(text: str, needed: tuple[str, str]) -> tuple[int, int, str]:
    """Find the header: its line, where it begins, and what separates its names."""
    line, position, separators = 1, 0, list(SEPARATORS)
    if first := _SEPARATOR_LINE.match(text):  # as Excel writes it for itself
        line, position, separators = 2, first.end(), [first[1]]
    best = (0, 0), line, position, separators[0]
    while True:
        start = _BLANK_LINES.match(text, position)
        if start and start[0]:
            line, position = line + _lines_in(text, position, start.end()), start.end()
        # Only the header can tell which one it is: in the texts stands any of them.
        found = {one: _names_in(next(_records(text, position, line, one), None), needed) for one in separators}
        separator = max(found, key=lambda one: found[one])
        is_better = found[separator][0] == len(needed) or best[0][0] < len(needed)
        if is_better:
            best = found[separator], line, position, separator
        end = _LINE_END.search(text, position)
        # Before it there may be remarks, such as "# Columns: id, text", and a column may be called # too.
        if end is None or not text.startswith(("#", '"#'), position):
            return best[1:]
        line, position = line + 1, end.end()


def _is_header(values: Sequence[str], needed: tuple[str, str]) -> bool:
    return set(needed).issubset(plain_name(value) for value in values if len(value) <= SHOWN)


def _without_empty(values: Sequence[str]) -> list[str]:
    """Give the names that titles come down to, without those that are missing at the end."""
    names = [plain_name(value) for value in values]
    while names and not names[-1]:
        names.pop()
    return names


def _cell(value: str) -> str:
    """Give a value, also one that is written as a formula so that spreadsheets leave it as it is, such as `="007"`."""
    text = _TEXT_FORMULA.fullmatch(value)
    return text[1].replace('""', '"') if text else value


def _names_in(header: tuple[int, list[str]] | Fault | None, needed: tuple[str, str]) -> tuple[int, int]:
    """Tell how good a reading of the header is: how many of the names that are needed it gives, and how many in all."""
    if header is None or isinstance(header, Fault):
        return 0, 0
    return len({*needed} & {plain_name(name) for name in header[1]}), len(header[1])


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
            if separator == "\t" and separator in quoted[1] and _LINE_END.search(quoted[1]):
                yield Fault(
                    opened,
                    "a quotation mark opens a text here that has whole rows in it: one of the text has to be written "
                    "twice, and quotation marks put around the text",
                )
                return
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


def _json_rows(text: str, needed: tuple[str, str]) -> Iterator[Row | Fault]:
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
            yield Fault(line, NO_OBJECT if needed == OF_LINES else f"not an object with {' and '.join(needed)}")
        elif needed[1] not in map(plain_name, fields) and any(isinstance(value, list) for value in fields.values()):
            names = " and ".join(needed)
            yield Fault(
                line, f"an object with a list in it. Needed is the list itself, or one object a line with {names}"
            )
        else:
            yield Row(line, list(fields.items()), line)


def _json_items(text: str) -> Iterator[tuple[int, str] | Fault]:
    """Cut JSON into its items, each with the number of its line: of an array, or one behind the other."""
    position = _past_space(text, 0)
    if text.startswith("[", position):
        yield from _array_items(text, position)
        return
    counted, line, faults = 0, 1, 0
    while position < len(text):
        line += _lines_in(text, counted, position)
        counted = position
        try:
            _, end = _DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            end = _end_of_object(text, position)
            last = position + len(text[position:end].rstrip()) - 1
            at = min(error.pos, last) if isinstance(error, json.JSONDecodeError) else position
            yield _not_json(line + _lines_in(text, position, at), error)
            faults += 1
            if faults == MOST_FAULTS:
                return
        else:
            yield line, text[position:end]
        position = _past_space(text, end)


def _end_of_object(text: str, position: int) -> int:
    """Find where an object that is no JSON ends: before the next one that begins a line, else at the end of its own."""
    pattern = _NEXT_OBJECT if text.startswith("{", position) else _LINE_END
    end = pattern.search(text, position)
    return end.start() if end else len(text)


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
