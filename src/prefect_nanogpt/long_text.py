"""Texts that are longer than a model takes: where to cut them."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from typing import Final

from prefect_nanogpt.errors import NanoGPTError

__all__ = ["can_be_split", "split"]

PARAGRAPH: Final = re.compile(r"\n\s*\n\s*")
SPACE: Final = re.compile(r"\s+")


def can_be_split() -> None:
    """Make sure, before anything is paid for, that a text can be split.

    Raises:
        NanoGPTError: The extra `long` is not installed (code `EXTRA_MISSING`).
    """
    try:
        import sentencex  # noqa: F401
    except ImportError as error:
        raise NanoGPTError(
            f"The text is longer than the model takes. To say it in parts, install prefect-nanogpt[long] ({error}). "
            "Nothing was submitted.",
            code="EXTRA_MISSING",
        ) from None


def split(text: str, limit: int, language: str | None = None) -> list[str]:
    """Cut a text into parts of at most `limit` characters, at the end of a paragraph, else a sentence, else a word.

    A paragraph that ends in the first half of what a part can hold is passed over, since every part costs a job.

    Args:
        text: The text.
        limit: The longest part, in characters.
        language: An ISO 639-1 code such as `de`, whose abbreviations then end no sentence; English otherwise.

    Returns:
        The parts, in order, without the white space around them. No other character is lost or repeated.

    Example:
        >>> split("Dr. No waits. He paid 3.50 for it.", 20)
        ['Dr. No waits.', 'He paid 3.50 for it.']
    """
    if language is None or not re.fullmatch(r"[a-z]{2}", language):
        language = "en"
    paragraphs = [found.end() for found in PARAGRAPH.finditer(text)]
    sentences = list(_sentence_ends(text, language))
    words = [found.end() for found in SPACE.finditer(text)]
    parts = []
    start = len(text) - len(text.lstrip())
    end = len(text.rstrip())
    while end - start > limit:
        # White space after the last word need not fit.
        cut = (
            _last(paragraphs, text, start, limit, least=limit // 2)
            or _last(sentences, text, start, limit)
            or _last(words, text, start, limit)
            or start + limit
        )
        parts.append(text[start:cut].strip())
        start = cut + len(text[cut:]) - len(text[cut:].lstrip())
    parts.append(text[start:end])
    return parts


def _sentence_ends(text: str, language: str) -> Iterator[int]:
    """Find where sentences end, paragraph by paragraph: the segmenter loses its place in a text of many thousands."""
    import sentencex

    start = 0
    for end in [*(found.end() for found in PARAGRAPH.finditer(text)), len(text)]:
        for sentence in sentencex.segment(language, text[start:end]):
            start = text.index(sentence, start) + len(sentence)
            if start == len(text) or text[start - 1].isspace() or text[start].isspace() or not text[start].isascii():
                yield start
        start = end


def _last(ends: list[int], text: str, start: int, limit: int, least: int = 1) -> int | None:
    """Find the last boundary up to which the text from `start` fits, and is not less than `least` characters."""
    found = None
    for end in ends[bisect_right(ends, start) :]:
        length = len(text[start:end].strip())
        if length > limit:
            break
        if length >= least:
            found = end
    return found
