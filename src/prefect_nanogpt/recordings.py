"""What there is to hear in a local folder, as its manifest and its ledger tell of it. Nothing is written."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from prefect_nanogpt.audio import EXTENSIONS
from prefect_nanogpt.ledger import FOLDER, Entry, Ledger, saved_as
from prefect_nanogpt.lines import FILE_NAME, Manifest, ManifestRow
from prefect_nanogpt.models import AudioFile
from prefect_nanogpt.storage import Destination, kept_name

__all__ = ["Contents", "Folder", "Recording", "find_audio"]

NOTED_TEXT: Final = 200
"""How much of a text a note has, in characters."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A file of audio, or a line of a batch that has none, and what is known of it.

    Attributes:
        file: The file's name in the folder; None where there is none, or no longer.
        size_bytes: Its size in bytes.
        sha256: The SHA-256 digest of its bytes.
        line: The id of the line of a batch.
        text: What is said, or was to be.
        code: Why there is no audio.
        reason: The same in words.
        model: The provider's model id.
        duration_seconds: How long it plays, in seconds.
        cost: What was charged.
        currency: The unit of `cost`.
        saved_at: When it was saved, in ISO 8601.
        run: The name of the run that saved it.
        peaks: Its outline: peaks from 0 to 100.
        note: Where the ledger tells of it: job, try and state.
    """

    file: str | None = None
    size_bytes: int = 0
    sha256: str = ""
    line: str | None = None
    text: str = ""
    code: str | None = None
    reason: str | None = None
    model: str | None = None
    duration_seconds: float | None = None
    cost: Decimal | None = None
    currency: str | None = None
    saved_at: str = ""
    run: str | None = None
    peaks: tuple[int, ...] = ()
    note: tuple[str, int, str] | None = None


@dataclass(frozen=True)
class Contents:
    """What a folder has.

    Attributes:
        lines: The lines of the manifest, in its order.
        others: What else the ledger says was saved here, and is still here, newest first.
        problem: Why the ledger cannot be read.
    """

    lines: list[Recording]
    others: list[Recording]
    problem: str | None = None

    def __iter__(self) -> Iterator[Recording]:
        yield from self.lines
        yield from self.others

    def __len__(self) -> int:
        return len(self.lines) + len(self.others)


def find_audio(folder: Path, name: str) -> Path | None:
    """Find a file of audio that lies in a folder itself, and not behind a link that leads elsewhere.

    Args:
        folder: The folder, as an absolute path without links.
        name: A name, which is somebody else's word.
    """
    if not _is_audio(name) or name.startswith(".") or set(name) & set("/\\:\0"):
        return None
    try:
        path = Path(os.path.realpath(folder / name, strict=True))
        is_file = stat.S_ISREG(path.stat().st_mode)
    except (OSError, ValueError):
        return None
    return path if is_file and path.parent == folder and _is_audio(path.name) else None


def _is_audio(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


class Folder:
    """A folder, looked at again and again: notes are written once, so what they say is kept.

    Args:
        path: The folder, as an absolute path without links.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._destination = Destination(path)
        self._ledger = Ledger.of(self._destination)
        self._rows: dict[str, ManifestRow] = {}
        self._rows_are_of: tuple[int, int] | None = None
        self._told: dict[tuple[str, int, str], Recording | None] = {}
        self._one_reader = threading.Lock()

    def contents(self) -> Contents:
        """List what there is. Of the lines of a manifest, `details` tells the rest."""
        with self._one_reader:
            problem = None
            entries: dict[str, Entry] = {}
            try:
                entries = self._ledger.entries()
            except Exception as error:  # the drivers of buckets, which a ledger may be in, have errors of their own
                problem = str(self._ledger.folder.failure(error))
            sizes = self._sizes()
            lines = [self._of_line(row, entries, sizes) for row in self._manifest().values()]
            others = self._others(entries, sizes, lines)
        return Contents(lines, others, problem)

    def _others(
        self, entries: Mapping[str, Entry], sizes: Mapping[str, int], lines: Sequence[Recording]
    ) -> list[Recording]:
        told = {line.note for line in lines}
        notes = [
            self._of_note(note)
            for entry in entries.values()
            for number, state in entry.saved
            if (note := (entry.job, number, state)) not in told
        ]
        found = [_in_place(noted, sizes) for noted in notes if noted is not None]
        found.sort(key=lambda other: other.saved_at, reverse=True)
        by_file = {other.file: other for other in reversed(found)}  # equal audio may have been saved more than once
        used = {None, *(line.file for line in lines)}
        return [other for other in found if other.file not in used and by_file[other.file] is other]

    def details(self, recording: Recording) -> Recording:
        """Tell of a line what its notes say: when it was saved, by which run, and its outline."""
        if recording.line is None or recording.note is None:
            return recording
        told = self._read(recording.note)
        if told is None:
            return recording
        return replace(
            recording,
            model=recording.model or told.model,
            saved_at=told.saved_at,
            run=told.run,
            peaks=told.peaks,
        )

    def _sizes(self) -> dict[str, int]:
        sizes = {}
        for entry in os.scandir(self.path):
            with suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    sizes[entry.name] = entry.stat().st_size
        return sizes

    def _manifest(self) -> Mapping[str, ManifestRow]:
        try:
            found = (self.path / FILE_NAME).stat()
        except OSError:
            return {}
        if self._rows_are_of != (found.st_mtime_ns, found.st_size):
            self._rows = Manifest(self._destination).read()
            self._rows_are_of = found.st_mtime_ns, found.st_size
        return self._rows

    def _of_line(self, row: ManifestRow, entries: Mapping[str, Entry], sizes: Mapping[str, int]) -> Recording:
        line = Recording(
            line=row.id,
            text=row.text,
            model=row.ticket.model if row.ticket else None,
            duration_seconds=row.duration_seconds,
            cost=row.cost,
            currency=row.currency,
        )
        if not row.is_completed:
            return replace(line, code=row.outcome, reason=row.detail)
        state = saved_as(row.file_name, row.sha256 or "")
        entry = entries.get(row.job) or Entry(row.job)
        number = next((number for number, other in entry.saved if other == state), None)
        line = replace(
            line,
            file=row.file_name,
            size_bytes=row.size_bytes or 0,
            sha256=row.sha256 or "",
            note=(row.job, number, state) if number is not None else None,
        )
        return _in_place(line, sizes)

    def _of_note(self, note: tuple[str, int, str]) -> Recording | None:
        if note not in self._told:
            self._told[note] = self._read(note)
        return self._told[note]

    def _read(self, where: tuple[str, int, str]) -> Recording | None:
        """Read a note of audio that is in this folder; None of other audio, of a part, and where it is damaged."""
        job, number, state = where
        note = self._json(f"{job}.{number}.{state}.json")
        name = str(note.get("name", ""))
        is_here = note.get("save_to", self._destination.shown) == self._destination.shown
        if not is_here or name.startswith(f"{FOLDER}/"):
            return None
        try:
            audio = AudioFile.model_validate(note.get("audio"))
        except ValidationError:
            return None
        sent = self._json(f"{job}.{number}.sent.json")
        text = str(sent.get("text") or "")
        run = note.get("run")
        return Recording(
            file=name,
            size_bytes=audio.size_bytes,
            sha256=audio.sha256,
            text=text + "…" if len(text) >= NOTED_TEXT else text,
            model=audio.ticket.model if audio.ticket else sent.get("model"),
            duration_seconds=audio.duration_seconds,
            cost=audio.cost,
            currency=audio.currency,
            saved_at=str(note.get("at", "")),
            run=run.get("name") if isinstance(run, dict) else None,
            peaks=audio.peaks,
            note=where,
        )

    def _json(self, name: str) -> dict[str, Any]:
        with suppress(ValueError, RecursionError):
            note = json.loads(self._ledger.folder.read(name) or b"{}", parse_float=Decimal)
            return note if isinstance(note, dict) else {}
        return {}


def _in_place(told: Recording, sizes: Mapping[str, int]) -> Recording:
    """Give a recording with the name that its file has by now: other audio may have taken its own."""
    name = told.file or ""
    names = [name for name in (kept_name(name, told.sha256), name) if sizes.get(name) == told.size_bytes]
    return replace(told, file=next(filter(_is_audio, names), None))
