"""Texts that are longer than a model takes, or a line of subtitles holds: where to cut them."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from enum import IntEnum
from fractions import Fraction
from typing import Final, NamedTuple

__all__ = ["LEAST_PART", "NO_BREAK_SPACE", "Ending", "Piece", "pieces", "spans", "split", "units"]

LEAST_PART: Final = 20
"""In UTF-16 code units: room for the longest word of most texts with its marks. Each part is a job, and is paid for."""
BLOCK_CHARS: Final = 4_000
"""The segmenter loses its place in texts of tens of thousands of characters, and takes long for them."""
PARAGRAPH: Final = re.compile(r"\s*\n\s*\n\s*")
NO_BREAK_SPACE: Final = "\u00a0\u2007\u202f"
NO_BREAK: Final = frozenset(NO_BREAK_SPACE + "\u2060\ufeff")
WORD_END: Final = re.compile(rf"(?:[^\S{NO_BREAK_SPACE}]|\u200b)+")
NO_BREAK_END: Final = re.compile(rf"[{NO_BREAK_SPACE}]+")
LINE_END: Final = re.compile(r"[\n\r\x85\u2028\u2029]")
CLOSING: Final = "\"'”’»›)]}）］｝〉》」』】〕〗〙"
OPENING: Final = "“„‚‘«‹([{¿¡（［｛〈《「『【〔〖〘"
IDEOGRAPHIC: Final = r"\u3040-\u30ff\u3400-\u9fff"
# With marks of scripts that put no space behind them, or that the segmenter takes for those of another language.
SENTENCE_END: Final = re.compile(rf"(?:[。！？｡։؟۔।॥།။។።៕፧፨]|[!?](?=[{IDEOGRAPHIC}])|(?<!\d)．|．(?!\d))+")
CLAUSE_END: Final = re.compile(
    # Without a space behind it a comma or colon may be in a number, a time or a URL; between digits, any may be.
    rf"[,;:](?=[\s{re.escape(CLOSING)}{IDEOGRAPHIC}])|(?<!\d)[，：]|[，：](?!\d)|[、；､﹐﹑﹔﹕،؛՝၊៖፡፣፤፥፦᠂᠈]+"
    # A dash with a space before it alone opens what follows, as in Spanish.
    r"|(?<!\s)[—…]+|(?<=\S\s)[—–…-]+(?=\s)|\s(?=[—–]\w)"
)
SIGNS: Final = re.compile(
    r"(?:\s*\n(?:[^\w\n]|_)+(?=\n)|[^\S\n]+[\u2600-\u27bf\u200d\ufe0f\U0001f000-\U0001faff]+(?=\s))+"
)
"""Lines without a word, and emoji: they belong to the sentence before them rather than to the one behind."""
DASHES: Final = "—–-"
NOT_FIRST: Final = frozenset(
    f"{CLOSING},.;:!?%，．。、；：！？…‥・％ー々〻ゝゞヽヾぁぃぅぇぉっゃゅょゎゕゖァィゥェォッャュョヮヵヶｰะาๅๆฯະາໆຯ"
)
"""What no line, and so no part, begins with: closing marks, by the Japanese rules (JIS X 4051) small kana, and the
vowels of Thai and Lao that are written behind their consonant."""
NOT_LAST: Final = frozenset(f"{OPENING}เแโใไເແໂໃໄ")
"""What no line ends with: opening marks, and the vowels of Thai and Lao that are written before their consonant."""


class Ending(IntEnum):
    """What a text can be cut behind, the best first."""

    PARAGRAPH = 0
    SENTENCE = 1
    CLAUSE = 2
    LINE = 3
    WORD = 4
    NO_BREAK_SPACE = 5
    BETWEEN_WORDS = 6
    """Two words with nothing between them, as in Chinese, Japanese and Thai."""
    IN_WORD = 7


class Piece(NamedTuple):
    """A piece of a text that is to stay whole: where it begins and ends, as indices, and what ends there."""

    start: int
    end: int
    ending: Ending


def units(text: str) -> int:
    """Count the UTF-16 code units of a text.

    The provider is written in JavaScript, where this is the length of a string. How it counts is not documented; code
    points are fewer, so this is the safe way.
    """
    return len(text) + sum(character > "\uffff" for character in text)


def split(text: str, limit: int, language: str | None = None) -> list[str]:
    """Cut a text into parts of at most `limit` UTF-16 code units, each with something to say.

    The places are those of `spans`.

    Example:
        >>> split("Dr. No waits. He paid 3.50 for it.", 20)
        ['Dr. No waits.', 'He paid 3.50 for it.']
    """
    return [text[start:end] for start, end in spans(text, limit, language)]


def spans(text: str, limit: int, language: str | None = None) -> list[tuple[int, int]]:
    """Tell where to cut a text into parts.

    A part ends at the end of a paragraph, else of a sentence, else behind a clause mark, else at the end of a line,
    else between words, else between two characters as readers see them (the extended grapheme clusters of UAX #29). A
    paragraph that ends in the first half of what a part can hold, or a clause or line in its first quarter, is
    passed over, since every part costs a job. Marks without a word, such as `* * *`, go with a neighbour.

    Args:
        text: The text.
        limit: The longest part, in UTF-16 code units.
        language: A code such as `de` or `de-AT`, whose abbreviations then end no sentence; English otherwise.

    Returns:
        Where each part begins and ends, as indices into `text`. The white space between parts is in none of them, and
        every other character is in one.

    Example:
        >>> spans("One. Two.", 5)
        [(0, 4), (5, 9)]
    """
    cuts = _Cuts(text, language)
    start, end = _behind_space(text, 0), len(text.rstrip())
    parts = []
    while cuts.units(start, end) > limit:
        cut = cuts.best(start, end, limit)
        parts.append((start, start + len(text[start:cut].rstrip())))
        start = _behind_space(text, cut)
    parts.append((start, end))
    return parts


def pieces(text: str, is_too_wide: Callable[[int, int], bool], language: str | None = None) -> list[Piece]:
    """Take a text apart at every place where a line of it may end.

    Words are cut only where they are too wide, and so are texts that put no space between them, there by the rules of
    typesetters: no line begins with a closing mark or ends with an opening one.

    Args:
        text: The text.
        is_too_wide: Whether what is between two indices is too wide for a line.
        language: A code such as `de` or `de-AT`, whose abbreviations then end no sentence; English otherwise.

    Returns:
        The pieces, in order. The white space between them is in none, and every other character is in one.

    Example:
        >>> text = "Dr. No waits. He paid."
        >>> [text[start:end] for start, end, ending in pieces(text, lambda start, end: end - start > 20)]
        ['Dr.', 'No', 'waits.', 'He', 'paid.']
    """
    return _Cuts(text, language).pieces(is_too_wide)


def _behind_space(text: str, place: int) -> int:
    """Give the first index from a place on where there is no white space."""
    while place < len(text) and text[place].isspace():
        place += 1
    return place


class _Cuts:
    """The places where a text can be cut, by kind. A place is the index behind the last character before the cut."""

    def __init__(self, text: str, language: str | None) -> None:
        import regex

        found = re.match(r"([a-z]{2})(?![a-z])", (language or "").lower())
        self._language = found[1] if found else "en"
        self._text = text
        self._clusters = regex.compile(r"\X")
        self._word_bounds = regex.compile(r"(?w)\b")
        self._wide = array("l", (index for index, character in enumerate(text) if character > "\uffff"))
        self._words = array("l", (index for index, character in enumerate(text) if character.isalnum()))
        self._kinds: list[tuple[list[int], Fraction]] = [
            (self._usable(found.start() for found in PARAGRAPH.finditer(text)), Fraction(1, 2)),
            (self._usable(self._behind_signs(self._usable(self._sentence_ends()))), Fraction(0)),
            (self._usable(self._behind(CLAUSE_END)), Fraction(1, 4)),
            (self._usable(found.start() for found in LINE_END.finditer(text)), Fraction(1, 4)),
            (self._usable(found.start() for found in WORD_END.finditer(text)), Fraction(0)),
            ([found.start() for found in NO_BREAK_END.finditer(text) if self._is_clean(found.start())], Fraction(1, 2)),
        ]

    def units(self, start: int, end: int) -> int:
        """Count the UTF-16 code units between two indices."""
        return end - start + bisect_left(self._wide, end) - bisect_left(self._wide, start)

    def best(self, start: int, end: int, limit: int) -> int:
        """Give the best place to end the part that begins at `start`."""
        farthest = self._farthest(start, end, limit)
        for ranges in (self._with_words(start, farthest, limit), [(start + 1, farthest)]):
            for places, least in self._kinds:
                for first, last in ranges:
                    index = bisect_right(places, last) - 1
                    if index >= 0 and places[index] >= first and self.units(start, places[index]) >= least * limit:
                        return places[index]
            for first, last in ranges:
                if (cut := self._between_characters(start, first, last)) is not None:
                    return cut
        return farthest

    def _with_words(self, start: int, farthest: int, limit: int) -> list[tuple[int, int]]:
        """Give the ranges of places with a word before them and, no farther than a part is long, one behind them."""
        words = self._words
        here, behind = bisect_left(words, start), bisect_left(words, farthest)
        if here == len(words):
            return []
        first, last = words[here] + 1, farthest
        ranges = []
        if behind < len(words):
            # From here on, the next word is not too far away for a part that begins with what comes before it.
            near = self._nearest(words[behind] + 1, limit)
            ranges.append((max(first, near), last))
        if behind > 0:
            ranges.append((first, min(last, words[behind - 1])))
        return [(first, last) for first, last in ranges if first <= last]

    def _nearest(self, end: int, limit: int) -> int:
        """Give the first index from which on the text up to `end` fits."""
        low = max(0, end - limit)
        return low + bisect_left(range(low, end - 1), -limit, key=lambda start: -self.units(start, end))

    def _farthest(self, start: int, end: int, limit: int) -> int:
        """Give the last index up to which the text fits, at least one character on."""
        places = range(start + 1, min(end, start + limit) + 1)
        return start + max(1, bisect_right(places, limit, key=lambda place: self.units(start, place)))

    def _between_characters(self, start: int, first: int, last: int) -> int | None:
        """Cut between grapheme clusters, and in the second half of the part rather not where a typesetter would not."""
        places = [place for place in self._ends_of_characters(start, last) if place >= first]
        half = start + (last - start) // 2
        bounds = self._bounds_of_words(half, last)
        lines = [place for place in places if place >= half and self._may_part(place)]
        between_words = [place for place in lines if place in bounds]
        found = between_words or lines or places
        return found[-1] if found else None

    def _ends_of_characters(self, start: int, last: int) -> list[int]:
        """List where grapheme clusters end, from a place at which one begins to another one."""
        return [
            place
            for found in self._clusters.finditer(self._text[start : last + 64])
            if (place := start + found.end()) <= last and self._is_clean(place)
        ]

    def _bounds_of_words(self, start: int, last: int) -> set[int]:
        return {found.start() for found in self._word_bounds.finditer(self._text, start, last + 64)}

    def _may_part(self, place: int) -> bool:
        """Whether a line may end between two words without a space; numbers and addresses are in one line."""
        before, after = self._text[place - 1], self._text[place]
        return self._may_end_line(place) and not ("!" <= before <= "~" and "!" <= after <= "~")

    def _may_end_line(self, place: int) -> bool:
        before, after = self._text[place - 1], self._text[place]
        return not (before in NO_BREAK or after in NO_BREAK or before in NOT_LAST or after in NOT_FIRST)

    def pieces(self, is_too_wide: Callable[[int, int], bool]) -> list[Piece]:
        """Take the text apart."""
        endings = {
            place: Ending(kind) for kind, (places, _) in reversed(list(enumerate(self._kinds))) for place in places
        }
        end = len(self._text.rstrip())
        whole = Piece(_behind_space(self._text, 0), end, Ending.PARAGRAPH)
        found = self._parted(whole, sorted(endings), endings.__getitem__) if end else []
        for ending, may_end in (
            (Ending.BETWEEN_WORDS, self._may_part),
            (Ending.IN_WORD, self._may_end_line),
            (Ending.IN_WORD, lambda _: True),
        ):
            found = [
                part
                for piece in found
                for part in (self._parted_wide(piece, ending, may_end) if is_too_wide(*piece[:2]) else [piece])
            ]
        return found

    def _parted_wide(self, piece: Piece, ending: Ending, may_end: Callable[[int], bool]) -> list[Piece]:
        places = [place for place in self._ends_of_characters(piece.start, piece.end - 1) if may_end(place)]
        if ending is Ending.BETWEEN_WORDS:
            bounds = self._bounds_of_words(piece.start, piece.end)
            places = [place for place in places if place in bounds]
        return self._parted(piece, places, lambda _: ending)

    def _parted(self, piece: Piece, places: Iterable[int], ending_at: Callable[[int], Ending]) -> list[Piece]:
        start, parts = piece.start, []
        for place in places:
            parts.append(Piece(start, place, ending_at(place)))
            start = _behind_space(self._text, place)
        return [*parts, piece._replace(start=start)]

    def _is_clean(self, place: int) -> bool:
        """Whether what follows the white space here is a character of its own."""
        after = _behind_space(self._text, place)
        return after == place or not self._extends(after)

    def _extends(self, index: int) -> bool:
        """Whether a character belongs to the one before it, as an accent does even to a space."""
        return self._clusters.fullmatch(self._text[index - 1 : index + 1]) is not None

    def _usable(self, places: Iterable[int]) -> list[int]:
        """Give the places, before the white space that is there, at which nothing is parted that belongs together."""
        return sorted({place for place in map(self._checked, places) if place})

    def _checked(self, place: int) -> int:
        """Give the end of what is before a place; 0 where that belongs together with what is behind it."""
        text = self._text
        before = after = place
        while before > 0 and text[before - 1].isspace():
            before -= 1
        while after < len(text) and (text[after].isspace() or text[after] == "\u200b"):
            after += 1
        if before == 0 or after == len(text):
            return 0
        left, gap, right = text[before - 1], text[before:after], text[after]
        if "\n" not in gap and not NO_BREAK.isdisjoint(left + gap + right):
            return 0
        if left in OPENING or (left in DASHES and text[before - 2 : before - 1] in ("", "\n")):
            return 0  # it opens what follows; a dash at the beginning of a line opens a speech
        return 0 if self._extends(after) else before

    def _behind_signs(self, places: Iterable[int]) -> Iterator[int]:
        """Give each place, and the one behind the signs that follow it."""
        for place in places:
            yield place
            if signs := SIGNS.match(self._text, place):
                yield signs.end()

    def _behind(self, marks: re.Pattern[str]) -> Iterator[int]:
        """Find the places behind marks."""
        for found in marks.finditer(self._text):
            yield self._closed(found.end())

    def _closed(self, place: int) -> int:
        """Go on behind the quotation marks and brackets that close what has ended, in French after a no-break space."""
        text, end = self._text, place
        while end < len(text):
            if text[end] in CLOSING:
                end += 1
            elif text[end] in NO_BREAK_SPACE and text[end + 1 : end + 2] in ("»", "›"):
                end += 2
            else:
                break
        # The mark that closes is also the one that opens, and here it does.
        opens = end > place and text[end - 1] in "\"'" and end < len(text) and text[end].isalnum()
        return place if opens else end

    def _sentence_ends(self) -> Iterator[int]:
        """Find where sentences end: by the segmenter, block by block, and by marks that mean nothing else."""
        yield from self._behind(SENTENCE_END)
        text = self._text
        bounds = [found.end() for found in PARAGRAPH.finditer(text)]
        start = 0
        for bound in [*bounds, len(text)]:
            while bound - start > BLOCK_CHARS:
                space = text.rfind(" ", start + BLOCK_CHARS // 2, start + BLOCK_CHARS) + 1
                cut = space or start + BLOCK_CHARS
                yield from (end for end in self._segmented(start, cut) if end < cut - 1)
                start = cut
            yield from self._segmented(start, bound)
            start = bound

    def _segmented(self, start: int, end: int) -> Iterator[int]:
        import sentencex

        # The segmenter takes white space for one byte, and panics where it is not.
        text = re.sub(r"(?![\x00-\x7f])\s", " ", self._text[start:end])
        try:
            sentences = list(sentencex.segment(self._language, text))
        except BaseException as error:
            # A fault of the segmenter comes as a PanicException, which is no Exception.
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return
        found = 0
        for sentence in sentences:
            if (found := text.find(sentence, found)) < 0:
                return
            found += len(sentence)
            place = self._closed(start + found)
            around = self._text[place - 1 : place + 1]
            if len(around) < 2 or around[0].isspace() or around[1].isspace() or not around[1].isascii():
                yield place
