"""Subtitles of speech: what is shown when, as SRT (SubRip) and as WebVTT.

The provider tells no times of words, so what is known is how long each part of the speech plays. Inside a part the time
is shared out by the columns that its characters take on a screen: two for wide ones such as those of Chinese, none for
marks over others.
"""

from __future__ import annotations

import re
import textwrap
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate, pairwise
from math import ceil, isfinite
from typing import Final, Literal, NamedTuple, TypeAlias

from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.long_text import NO_BREAK_SPACE, Ending, pieces

__all__ = ["Cue", "SubtitleFormat", "cues", "srt", "subtitles", "vtt"]

SubtitleFormat: TypeAlias = Literal["srt", "vtt"]

LINE_COLUMNS: Final = 42
LINES: Final = 2
USUAL_COLUMNS: Final = 76
"""What two lines hold, where the first one has to end at the end of a word."""
SHORTEST_MS: Final = 1_000
LONGEST_MS: Final = 7_000
MOST_PADDING_SECONDS: Final = 0.5
"""What an encoder adds to a part at most: two or three frames, which are long where the sample rate is low."""
DETOURS: Final = {Ending.WORD: 24, Ending.BETWEEN_WORDS: 24, Ending.NO_BREAK_SPACE: 48, Ending.IN_WORD: 96}
"""By how many columns another cut may be farther from where it should be, and is still the better one."""
TEXT_SHOWN: Final = 40
NO_TEXT: Final = re.compile(r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
"""Control characters that end no line, and halves of characters, which cannot be written."""
SPACE: Final = re.compile(rf"[^\S{NO_BREAK_SPACE}]+")
SRT_MARKUP: Final = re.compile(r"--(?=>)|<(?=[A-Za-z/!?])|\{(?=[\\A-Za-z])")
"""What players take for an arrow between two times, a tag or a style. The format has no way to escape it."""
WITH_WORD_JOINER: Final = "\\g<0>\u2060"
RIGHT_TO_LEFT: Final = "\u202b"
END_OF_DIRECTION: Final = "\u202c"


class Cue(NamedTuple):
    """What is shown at a time.

    Attributes:
        start_ms: When it appears, in milliseconds from the beginning.
        end_ms: When it goes, in milliseconds from the beginning.
        lines: One or two lines, as plain text, each of at most 42 columns.
    """

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


def cues(
    parts: Iterable[tuple[str, float | None]],
    gap_seconds: float = 0.0,
    total_seconds: float | None = None,
    language: str | None = None,
) -> list[Cue]:
    """Make the cues of speech whose parts are laid end to end.

    A part is cut at the ends of its sentences, and a sentence that two lines do not hold, or that takes more than 7
    seconds, behind clause marks, else between words, into cues of similar length. What would be shown for less than a
    second is joined with a neighbour of the same part if two lines hold both, and else takes the time from its
    neighbours. Cues follow one another without a pause; the first one of a part begins with it, and the last one ends
    with it. Where there is too little time for a second each, each has its share. Marks without a word are text like
    any other, and a part without anything to show is a time without cues.

    Args:
        parts: The text of each part, and how long it plays, in seconds.
        gap_seconds: The pause between two parts, in seconds.
        total_seconds: How long the whole plays, in seconds, where it is known. What encoders have added to the parts is
            shared out among them.
        language: A code such as `de` or `de-AT`, whose abbreviations then end no sentence; English otherwise.

    Raises:
        NanoGPTError: It is not known how long a part plays, it is too short for its text, or the whole is not made of
            these parts (code `SUBTITLES_IMPOSSIBLE`).

    Example:
        >>> cues([("Hello there.", 1.5), ("Good-bye.", 1.25)], gap_seconds=0.5)
        [Cue(start_ms=0, end_ms=1500, lines=('Hello there.',)), Cue(start_ms=2000, end_ms=3250, lines=('Good-bye.',))]
    """
    parts = list(parts)
    known = [_known(number, *part) for number, part in enumerate(parts, 1)]
    padding = 0.0
    if total_seconds is not None and known:
        padding = (total_seconds - sum(known) - gap_seconds * (len(known) - 1)) / len(known)
        if abs(padding) > MOST_PADDING_SECONDS:
            raise _impossible(f"the whole plays for {total_seconds:.3f} s, which is not how long its parts play")
    made: list[Cue] = []
    start = 0.0
    for number, ((text, _), seconds) in enumerate(zip(parts, known, strict=True), 1):
        end = start + seconds + padding
        if plain := _plain(text):
            start_ms, end_ms = round(start * 1000), round(end * 1000)
            try:
                made += _Part(plain, start_ms, end_ms, language).cues()
            except ValueError:
                raise _impossible(f"{_shown(number, text)} plays for {end_ms - start_ms} ms, too short") from None
        start = end + gap_seconds
    return made


def srt(cues: Iterable[Cue]) -> str:
    """Write cues as SRT: numbered, with lines that end in a line feed.

    The format has no standard and no way to escape anything. Where a text has what players take for an arrow, a tag or
    a style, an invisible word joiner (U+2060) is put into it.

    Example:
        >>> print(srt([Cue(0, 1500, ("Hello there.",))]), end="")
        1
        00:00:00,000 --> 00:00:01,500
        Hello there.
    """
    return "\n".join(
        f"{number}\n{_timing(cue, ',')}\n{SRT_MARKUP.sub(WITH_WORD_JOINER, _directed(cue.lines))}\n"
        for number, cue in enumerate(cues, 1)
    )


def vtt(cues: Iterable[Cue]) -> str:
    """Write cues as WebVTT.

    Example:
        >>> print(vtt([Cue(0, 1500, ("Salt & pepper.",))]), end="")
        WEBVTT
        <BLANKLINE>
        00:00:00.000 --> 00:00:01.500
        Salt &amp; pepper.
    """
    escapes = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
    blocks = (f"{_timing(cue, '.')}\n{_directed(cue.lines).translate(escapes)}\n" for cue in cues)
    return "\n".join(["WEBVTT\n", *blocks])


def subtitles(cues: Iterable[Cue], kind: SubtitleFormat) -> bytes:
    """Write cues as the content of a file: UTF-8, without a byte order mark."""
    return (srt if kind == "srt" else vtt)(cues).encode()


def _known(number: int, text: str, seconds: float | None) -> float:
    if seconds is None or not isfinite(seconds) or seconds <= 0:
        raise _impossible(f"it is not known how long {_shown(number, text)} plays. The extra `audio` measures it")
    return seconds


def _impossible(why: str) -> NanoGPTError:
    return NanoGPTError(f"There can be no subtitles: {why}.", code="SUBTITLES_IMPOSSIBLE")


def _shown(number: int, text: str) -> str:
    return f"part {number} ({textwrap.shorten(text, TEXT_SHOWN, placeholder='…')!r})"


def _plain(text: str) -> str:
    """Take out what cannot be shown; white space is left as single spaces, ends of lines and of paragraphs."""
    lines = (SPACE.sub(" ", NO_TEXT.sub("", line)).strip(" ") for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


@cache
def _columns(character: str) -> int:
    """Tell how many columns a character takes on a screen."""
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _timing(cue: Cue, mark: str) -> str:
    return f"{_clock(cue.start_ms, mark)} --> {_clock(cue.end_ms, mark)}"


def _clock(ms: int, mark: str) -> str:
    seconds, ms = divmod(ms, 1000)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{mark}{ms:03}"


def _directed(lines: Sequence[str]) -> str:
    """Put lines into one text, marked where it is written from right to left.

    It stays in the order in which it is read. Players that take every line for one from left to right, as FFmpeg does
    with SRT, would show a full stop at the wrong end of it.
    """
    text = "\n".join(lines)
    strong = (direction for direction in map(unicodedata.bidirectional, text) if direction in ("L", "R", "AL"))
    if next(strong, "L") == "L":
        return text
    return "\n".join(f"{RIGHT_TO_LEFT}{line}{END_OF_DIRECTION}" for line in lines)


class _Part:
    """A part, as pieces of its text, which are counted from 0. A range of them is the first one, and the end.

    Args:
        text: The text, with something in it.
        start_ms: When it begins.
        end_ms: When it ends.
        language: The language that it is in.
    """

    def __init__(self, text: str, start_ms: int, end_ms: int, language: str | None) -> None:
        self._text = text
        columns = list(accumulate(map(_columns, text), initial=0))
        self._pieces = pieces(text, lambda start, end: columns[end] - columns[start] > LINE_COLUMNS, language)
        self._starts = [columns[piece.start] for piece in self._pieces]
        self._ends = [columns[piece.end] for piece in self._pieces]
        self._bounds = [*self._starts, self._ends[-1]]
        self._start_ms, self._end_ms = start_ms, end_ms
        per_ms = max(1, columns[-1]) / max(1, end_ms - start_ms)
        self._shortest, self._longest = SHORTEST_MS * per_ms, (LONGEST_MS - 1) * per_ms  # times are rounded

    def cues(self) -> list[Cue]:
        """Make the cues.

        Raises:
            ValueError: There is less than a millisecond for each.
        """
        ranges = self._merged(self._cut())
        times = self._times([first for first, _ in ranges])
        return [Cue(start, end, self._lines(*its)) for (start, end), its in zip(pairwise(times), ranges, strict=True)]

    def _width(self, first: int, end: int) -> int:
        return self._ends[end - 1] - self._starts[first]

    def _reach(self, first: int) -> int:
        """Give the end of the longest cue that begins with a piece: as much as lines hold, and not for too long."""
        end = first
        for _ in range(LINES):
            if end < len(self._pieces):
                end = max(end + 1, bisect_right(self._ends, self._starts[end] + LINE_COLUMNS))
        return max(first + 1, min(end, bisect_right(self._bounds, self._bounds[first] + self._longest) - 1))

    def _cut(self) -> Iterable[tuple[int, int]]:
        """Cut the part at the ends of sentences, and sentences that are too long into cues of similar length."""
        first = 0
        for number, piece in enumerate(self._pieces, 1):
            if piece.ending > Ending.SENTENCE and number < len(self._pieces):
                continue
            while (reach := self._reach(first)) < number:
                width = self._width(first, number)
                aim = width / max(2, ceil(width / min(USUAL_COLUMNS, self._longest)))
                end = min(range(first + 1, reach + 1), key=self._detour_from(first, aim))
                yield first, end
                first = end
            yield first, number
            first = number

    def _detour_from(self, first: int, aim: float) -> Callable[[int], float]:
        def detour(end: int) -> float:
            return abs(self._width(first, end) - aim) + DETOURS.get(self._pieces[end - 1].ending, 0)

        return detour

    def _merged(self, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Join what would be shown for less than a second with its neighbour, where lines hold both."""
        merged: list[tuple[int, int]] = []
        for first, end in ranges:
            if merged:
                before = merged[-1]
                lengths = [self._bounds[last] - self._bounds[start] for start, last in (before, (first, end))]
                if min(lengths) < self._shortest and end <= self._reach(before[0]):
                    first = merged.pop()[0]
            merged.append((first, end))
        return merged

    def _times(self, firsts: Sequence[int]) -> list[int]:
        """Share the time out: give when each cue begins, and when the last one ends."""
        length, count = self._end_ms - self._start_ms, len(firsts)
        if length < count:
            raise ValueError
        least = SHORTEST_MS if length >= SHORTEST_MS * count else 1
        total = max(1, self._bounds[-1])
        times = [round(length * self._bounds[first] / total) for first in firsts]
        for number in range(1, count):
            times[number] = max(times[number], times[number - 1] + least)
        times.append(length)
        for number in range(count - 1, 0, -1):
            times[number] = min(times[number], times[number + 1] - least)
        return [self._start_ms + time for time in times]

    def _lines(self, first: int, end: int) -> tuple[str, ...]:
        """Set a cue in one line, or else in two of similar length."""
        if self._width(first, end) > LINE_COLUMNS:
            breaks = [
                place
                for place in range(first + 1, end)
                if max(self._width(first, place), self._width(place, end)) <= LINE_COLUMNS
            ]
            if breaks:
                place = min(breaks, key=lambda place: self._unevenness(first, place, end))
                return self._line(first, place), self._line(place, end)
        return (self._line(first, end),)

    def _unevenness(self, first: int, place: int, end: int) -> float:
        detour = DETOURS.get(self._pieces[place - 1].ending, 0) / 2
        return abs(self._width(first, place) - self._width(place, end)) + detour

    def _line(self, first: int, end: int) -> str:
        return re.sub(r"\n+", " ", self._text[self._pieces[first].start : self._pieces[end - 1].end])
