"""The lines of a batch, as they are read, and what became of each, as it is kept beside the audio."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple

import fsspec
from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.models import Ticket, TTSRequest
from prefect_nanogpt.storage import Destination, file_stem

__all__ = ["FILE_NAME", "Line", "Manifest", "ManifestRow", "Shard", "read_lines"]

FILE_NAME: Final = "manifest.jsonl"
COMPLETED: Final = "completed"
PROBLEMS_SHOWN: Final = 100
REWRITE_SECONDS: Final = 10.0
"""An object in a bucket cannot be appended to, so there the manifest is written again, at most so often."""
LONGEST_ID: Final = 100


class Line(NamedTuple):
    """One line of a batch: its id and what to say."""

    id: str
    request: TTSRequest


class ManifestRow(BaseModel):
    """What became of a line.

    Attributes:
        id: The line.
        outcome: `completed`, or the code of why there is no audio.
        detail: The reason, where there is no audio.
        location: Where the audio is.
        sha256: The SHA-256 digest of the file, in hexadecimal.
        size_bytes: The size in bytes.
        duration_seconds: The length in seconds, where it is known.
        cost: What was charged, in `currency`, where the provider said.
        currency: The unit of `cost`, such as USD.
        ticket: The job, where there is one.
        is_lost: Whether the job will never have audio, so that another try needs a new one.
        request: A digest of what was asked for: a line that has changed since is another line.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    outcome: str
    detail: str | None = None
    location: str | None = None
    sha256: str | None = None
    size_bytes: int | None = None
    duration_seconds: float | None = None
    cost: Decimal | None = None
    currency: str | None = None
    ticket: Ticket | None = None
    is_lost: bool = False
    request: str

    @property
    def is_completed(self) -> bool:
        """Whether there is audio."""
        return self.outcome == COMPLETED


def read_lines(lines: Iterable[Mapping[str, Any]] | str, defaults: Mapping[str, Any]) -> list[Line]:
    """Read the lines of a batch and check every one of them.

    Args:
        lines: Mappings with `id`, `text`, and where wanted `voice`, `model` and `options`; or the path or fsspec URL of
            a CSV file with these columns, or of a JSON Lines file (`.jsonl`, `.ndjson`) with these names. What else a
            line has is an option of the model. Files are UTF-8.
        defaults: What applies to lines that do not say otherwise: `model`, `voice`, and options.

    Raises:
        NanoGPTError: Code `INVALID_LINES`, with every problem and where it is, or `LINES_UNREADABLE`.

    Example:
        >>> read_lines([{"id": "greeting", "text": "Hello!"}], {"model": "Kokoro-82m"})[0].request.model
        'Kokoro-82m'
    """
    good: list[Line] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for place, fields in _rows(lines):
        if isinstance(fields, str):
            problems.append(f"{place}: {fields}")
            continue
        line_id = str(fields.get("id") or "").strip()
        here = [f"{place}: {problem}" for problem in _problems_of(line_id, place, seen)]
        options = fields.get("options") or {}
        try:
            options = json.loads(options) if isinstance(options, str) else options
            own = {
                name: value
                for name, value in fields.items()
                if name not in ("id", "options") and value not in (None, "")
            }
            request = TTSRequest.model_validate({"text": "", **defaults, **options, **own})
        except ValidationError as invalid:
            here += [
                f"{place}: {'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
                for problem in invalid.errors()
            ]
        except (ValueError, TypeError):
            here.append(f"{place}: options: not a JSON object")
        else:
            good.append(Line(line_id, request))
        problems += here
    if not good and not problems:
        problems.append("there are no lines")
    if problems:
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise NanoGPTError(
            f"{'; '.join(problems[:PROBLEMS_SHOWN])}{more}. Nothing was submitted.", code="INVALID_LINES"
        )
    return good


def _problems_of(line_id: str, place: str, seen: dict[str, str]) -> Iterator[str]:
    if not line_id:
        yield "there is no id"
        return
    if len(line_id) > LONGEST_ID or not line_id.isprintable() or {"/", "\\"} & set(line_id) or line_id.strip(".") == "":
        yield f"the id {line_id[:LONGEST_ID]!r} cannot be the name of a file"
    # There are file systems that do not tell upper from lower case.
    first = seen.setdefault(file_stem(line_id).casefold(), place)
    if first != place:
        yield f"the id {line_id[:LONGEST_ID]!r} is that of {first} too"


def _rows(lines: Iterable[Mapping[str, Any]] | str) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Give every line with its place; a line that cannot be read is a string that says why."""
    if not isinstance(lines, str):
        for number, fields in enumerate(lines, 1):
            yield f"line {number}", fields if isinstance(fields, Mapping) else "not an object with an id and a text"
        return
    try:
        with fsspec.open(lines, "rt", encoding="utf-8-sig", newline="") as file:
            yield from _json_rows(file) if lines.endswith((".jsonl", ".ndjson")) else _csv_rows(file)
    except (OSError, ValueError, ImportError, csv.Error) as error:
        raise NanoGPTError(
            f"{lines} cannot be read: {error}. Nothing was submitted.", code="LINES_UNREADABLE"
        ) from None


def _csv_rows(file: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.DictReader(file, skipinitialspace=True)
    if not {"id", "text"} <= set(rows.fieldnames or ()):
        yield "line 1", "the columns id and text are needed, named in the first line"
        return
    end = rows.line_num
    for fields in rows:
        place, end = f"line {end + 1}", rows.line_num
        if None in fields:
            yield place, "there are more fields than columns"
        else:
            yield place, fields


def _json_rows(file: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except ValueError as error:
            yield f"line {number}", f"not JSON ({error})"
        else:
            yield f"line {number}", fields if isinstance(fields, dict) else "not an object with an id and a text"


class Shard(NamedTuple):
    """A part of a batch: every so manieth line, beginning with the line of its number, which counts from 1."""

    number: int
    of: int


class Manifest:
    """The file `manifest.jsonl` beside the audio: a row for each line that came to an end, the last one counts.

    A shard writes a file of its own, since two processes cannot write the same one.

    Args:
        destination: The folder of the audio.
        shard: The shard that writes it; None for the whole batch.
    """

    def __init__(self, destination: Destination, shard: Shard | None = None) -> None:
        self._destination = destination
        self._name = f"manifest-{shard.number}-of-{shard.of}.jsonl" if shard else FILE_NAME
        self._rows: dict[str, ManifestRow] = {}
        self._written = time.monotonic()

    @property
    def location(self) -> str:
        """The path or URL of the manifest of the whole batch, known once it was read."""
        return self._destination.location_of(FILE_NAME)

    async def read(self) -> dict[str, ManifestRow]:
        """Read the rows of earlier runs, by id. A last row that a killed process left cut off is passed over.

        Raises:
            StorageError: The manifest cannot be read, or the folder cannot be written.
        """
        await self._destination.check()
        self._rows = await self._read(self._name)
        if self._rows:
            await self.write()
        if self._name == FILE_NAME:
            return dict(self._rows)
        return {**await self._read(FILE_NAME), **self._rows}

    async def gather(self) -> dict[str, ManifestRow]:
        """Take the rows of all shards into this manifest, remove theirs, and give all rows, by id.

        Raises:
            StorageError: A manifest cannot be read, written or removed.
        """
        names = [location.rpartition("/")[2] for location in await self._destination.sizes()]
        parts = sorted(name for name in names if re.fullmatch(r"manifest-\d+-of-\d+\.jsonl", name))
        for name in parts:
            self._rows |= await self._read(name)
        if parts:
            await self.write()
        for name in parts:
            await self._destination.remove(name)
        return dict(self._rows)

    async def _read(self, name: str) -> dict[str, ManifestRow]:
        rows = {}
        for line in (await self._destination.read_text(name) or "").split("\n"):
            try:
                row = ManifestRow.model_validate_json(line)
            except ValidationError:
                continue
            rows[row.id] = row
        return rows

    async def add(self, row: ManifestRow) -> None:
        """Keep a row: at once in a local folder, and within seconds in a bucket.

        Raises:
            StorageError: It cannot be written.
        """
        self._rows[row.id] = row
        if self._destination.is_local:
            await self._destination.append_text(self._name, _as_json(row))
        elif time.monotonic() - self._written > REWRITE_SECONDS:
            await self.write()

    async def write(self) -> None:
        """Write the whole manifest anew, with one row for each line.

        Raises:
            StorageError: It cannot be written.
        """
        self._written = time.monotonic()
        await self._destination.write_text(self._name, "".join(map(_as_json, self._rows.values())))


def _as_json(row: ManifestRow) -> str:
    return json.dumps(row.model_dump(mode="json", exclude_none=True), ensure_ascii=False) + "\n"
