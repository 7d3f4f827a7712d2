"""Words that are said otherwise than they are written: names, abbreviations, foreign words."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, Final, NamedTuple, TypeAlias

from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.models import REMARK, plain_name
from prefect_nanogpt.tables import Fault, Row, read_rows

__all__ = ["Pronunciation", "Spoken", "read_pronunciation"]

COLUMNS: Final = ("word", "say")
CASE: Final = "case"
YES: Final = frozenset({"yes", "true", "1", "x"})
NO: Final = frozenset({"", "no", "false", "0"})
SHOWN: Final = 60
PROBLEMS_SHOWN: Final = 20
LONGEST_WORD: Final = 100
LONGEST_SAY: Final = 1_000
"""Of what is said for one word, in characters."""
UNSPACED: Final = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Scripts that put no space between words, as a part of a pattern: Thai, Lao, Burmese, Khmer, kana, Han."""
FLAGS: Final = "\U0001f1e6-\U0001f1ff"
SKINS: Final = "\U0001f3fb-\U0001f3ff"


class _Entry(NamedTuple):
    word: str
    say: str
    keeps_case: bool


class _Token(NamedTuple):
    """A word, a character of a script without spaces, white space, or a mark.

    Attributes:
        start: Where it begins.
        end: Where it ends.
        exact: How it is told from others.
        folded: The same, with case left out.
    """

    start: int
    end: int
    exact: str
    folded: str


_Key: TypeAlias = tuple[bool | str, ...]


@dataclass(frozen=True)
class Spoken:
    """A text as it is said.

    Attributes:
        text: What is said.
        written: What was written.
        changes: For each replaced word, where it is in `text` (start and end) and where it was in `written`.
    """

    text: str
    written: str
    changes: tuple[tuple[int, int, int, int], ...] = ()

    def written_between(self, start: int, end: int) -> str:
        """Give what was written for `text` from `start` to `end`; a word that is cut in two is all in the first."""
        return self.written[self._written_at(start) : self._written_at(end)]

    def _written_at(self, position: int) -> int:
        index = bisect_right(self.changes, position, key=lambda change: change[0])
        start, end, written_start, written_end = self.changes[index - 1] if index else (0, 0, 0, 0)
        if position == start:
            return written_start
        return written_end + max(0, position - end)


class Pronunciation:
    """What to say for words, found as whole words, the longest first.

    A text is read once, and what was put into it is not looked at again: `a` for `b` and `b` for `a` exchange the two.
    Case makes no difference, unless an entry asks for it; any white space is as good as another. A hyphen or an
    apostrophe ends a word. In scripts without spaces between words, a word is found wherever it stands.

    Args:
        entries: Words, what to say for them, and whether case counts; each word once.
    """

    def __init__(self, entries: Iterable[_Entry] = ()) -> None:
        self._says: dict[_Key, str] = {}
        kinds: dict[str, set[tuple[int, bool]]] = {}
        for entry in entries:
            tokens = list(_tokens(entry.word))
            self._says[_key(tokens, entry.keeps_case)] = entry.say
            kinds.setdefault(tokens[0].folded, set()).add((len(tokens), entry.keeps_case))
        # How many tokens the words have that begin with one, and whether their case counts: which to look for first.
        self._kinds = {first: sorted(its, reverse=True) for first, its in kinds.items()}

    def __bool__(self) -> bool:
        """Whether there is a word in it."""
        return bool(self._says)

    def apply(self, text: str) -> Spoken:
        """Give a text as it is said.

        Example:
            >>> read_pronunciation({"Nguyen": "win", "NASA": "nassa"}).apply("Mr. Nguyen, of NASA.").text
            'Mr. win, of nassa.'
        """
        if not self:
            return Spoken(text, text)
        tokens = list(_tokens(text))
        said: list[str] = []
        changes: list[tuple[int, int, int, int]] = []
        length = position = index = 0
        while index < len(tokens):
            count, say = self._at(tokens, index)
            if not count:
                index += 1
                continue
            start, end = tokens[index].start, tokens[index + count - 1].end
            said += [text[position:start], say]
            length += start - position
            changes.append((length, length + len(say), start, end))
            length, position, index = length + len(say), end, index + count
        said.append(text[position:])
        return Spoken("".join(said), text, tuple(changes))

    def _at(self, tokens: list[_Token], index: int) -> tuple[int, str]:
        """Find the longest word that begins with a token: how many tokens it has, and what to say for it."""
        for count, keeps_case in self._kinds.get(tokens[index].folded, ()):
            its = tokens[index : index + count]
            if len(its) == count and (say := self._says.get(_key(its, keeps_case))):
                return count, say
        return 0, ""


def read_pronunciation(given: Mapping[str, Any] | str | os.PathLike[str] | None) -> Pronunciation:
    """Read what to say for words.

    Args:
        given: Words and what to say for them; or the path or fsspec URL of a table (CSV) with the columns `word` and
            `say`, or of such rows in JSON. Case counts for a row whose column `case` says yes, and in a mapping where
            the value is `{"say": …, "case": True}`. None for nothing.

    Raises:
        NanoGPTError: Something is wrong with it (code `INVALID_PRONUNCIATION`, with all the problems), or it cannot be
            read (code `PRONUNCIATION_UNREADABLE`).

    Example:
        >>> read_pronunciation({"US": {"say": "U. S.", "case": True}}).apply("US and us").text
        'U. S. and us'
    """
    if given is None:
        return Pronunciation()
    problems: list[str] = []
    entries: dict[_Key, _Entry] = {}
    for where, fields in _rows(given, problems):
        try:
            entry = _entry(fields)
        except ValueError as error:
            problems.append(f"{where}: {error}")
            continue
        known = entries.setdefault(_key(_tokens(entry.word), entry.keeps_case), entry)
        if known.say != entry.say:
            problems.append(f"{where}: {entry.word[:SHOWN]!r} is there twice, as {known.say[:SHOWN]!r} too")
    if problems:
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise NanoGPTError(
            f"pronounce: {'; '.join(problems[:PROBLEMS_SHOWN])}{more}. Nothing was submitted.",
            code="INVALID_PRONUNCIATION",
        )
    return Pronunciation(entries.values())


def _rows(given: Any, problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the rows with where they are, and note what is none."""
    if isinstance(given, Mapping):
        for word, say in given.items():
            more = say if isinstance(say, Mapping) else {"say": say}
            yield repr(str(word)[:SHOWN]), {"word": word, **more}
        return
    if not isinstance(given, str | os.PathLike):
        problems.append("this is neither a mapping of words to what to say for them nor the path of a table")
        return
    try:
        for row in read_rows(os.fspath(given), COLUMNS):
            if isinstance(row, Fault):
                problems.append(f"line {row.line}: {row.what}")
            else:
                yield f"line {row.line}", _named(row)
    except NanoGPTError as error:
        error.code = "PRONUNCIATION_UNREADABLE"
        raise


def _named(row: Row) -> dict[str, Any]:
    named = ((plain_name(name), value) for name, value in row.fields)
    return {name: value for name, value in named if name and not name.startswith(REMARK)}


def _entry(fields: Mapping[str, Any]) -> _Entry:
    """Check a row.

    Raises:
        ValueError: Something is wrong with it.
    """
    if unknown := sorted(fields.keys() - {*COLUMNS, CASE}):
        raise ValueError(f"{unknown[0]!r} is unknown: there are word, say and case")
    word, say = (_text(fields.get(name), name) for name in COLUMNS)
    if len(word) > LONGEST_WORD or len(say) > LONGEST_SAY:
        raise ValueError(f"word has at most {LONGEST_WORD} characters, and say {LONGEST_SAY}")
    case = str(fields.get(CASE) or "").strip().casefold()
    if case not in YES | NO:
        raise ValueError(f"case: {case[:SHOWN]!r} is neither yes nor no")
    return _Entry(word, say, case in YES)


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"there is no {name}" if value is None or value == "" else f"{name}: {value!r} is no text")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value.strip()):
        raise ValueError(f"{name}: there is a control character, or half a character, in it")
    return value.strip()


def _key(tokens: Iterable[_Token], keeps_case: bool) -> _Key:
    """Give what a word is looked up by."""
    return keeps_case, *(token.exact if keeps_case else token.folded for token in tokens)


def _tokens(text: str) -> Iterator[_Token]:
    for found in _pattern().finditer(text):
        exact = found[0]
        if exact.isspace():
            exact = " "
        elif not exact.isascii():
            # The selector of an emoji's looks makes no difference, nor does the shape of an apostrophe.
            exact = unicodedata.normalize("NFC", exact).replace("\u2019", "'").replace("\ufe0f", "")
        yield _Token(found.start(), found.end(), exact, exact.casefold())


@cache
def _pattern() -> re.Pattern[str]:
    """Make the pattern of a token. Marks that combine with a letter are a part of its word, and no letters to `re`."""
    marks = _marks()
    letter = rf"(?:[^\W{UNSPACED}]|[{marks}])"
    # A number is one word, so that nothing is said for the 3 of 3.50.
    word = rf"{letter}(?:{letter}+|(?<=\d)[.,](?=\d))*"
    # A flag, a hand with its colour and a family are one sign each.
    sign = rf"[{FLAGS}]{{2}}|.(?:\u200d[^\w\s]|[{marks}{SKINS}])*"
    return re.compile(rf"[{UNSPACED}][{marks}]*|{word}|\s+|{sign}", re.DOTALL)


def _marks() -> str:
    """List the characters that combine with another, and the joiners, as a part of a pattern."""
    points = [point for point in range(sys.maxunicode + 1) if unicodedata.category(chr(point))[0] == "M"]
    points = sorted({*points, 0x200C, 0x200D})
    runs = [[point for _, point in run] for _, run in groupby(enumerate(points), key=lambda item: item[1] - item[0])]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in runs)
