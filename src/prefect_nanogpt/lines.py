"""The lines of a batch, as they are read, and what became of each, as it is kept beside the audio."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from decimal import Decimal
from typing import Any, Final, NamedTuple

import fsspec
from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_nanogpt.errors import NanoGPTError, hide, passwords_in, without_password
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.models import Ticket, TTSRequest, problems_in
from prefect_nanogpt.storage import Destination, file_stem

__all__ = ["FILE_NAME", "Line", "Manifest", "ManifestRow", "costs_once", "read_lines", "shards_of"]

FILE_NAME: Final = "manifest.jsonl"
COMPLETED: Final = "completed"
PROBLEMS_SHOWN: Final = 100
REWRITE_SECONDS: Final = 30.0
LONGEST_ID: Final = 100


class Line(NamedTuple):
    """One line of a batch: its id, what to say, and which rendition of it."""

    id: str
    request: TTSRequest
    take: int = 1


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
        cost: What was charged in all tries, in `currency`, where the provider said; 0 for a line that shares the job
            of an earlier one.
        currency: The unit of `cost`: USD, if anything was charged in it.
        other_costs: What was charged besides, by currency, where tries were charged in several.
        ticket: The job, where there is one.
        job: The job's digest in the ledger: a line that has changed since is another job.
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


def read_lines(lines: Iterable[Mapping[str, Any]] | str, defaults: Mapping[str, Any], take: int = 1) -> list[Line]:
    """Read the lines of a batch and check every one of them.

    Args:
        lines: Mappings with `id`, `text`, and where wanted `voice`, `model`, `take` and `options`; or the path or
            fsspec URL of a CSV file with these columns, or of a JSON Lines file (`.jsonl`, `.ndjson`) with these names.
            What else a line has is an option of the model. Files are UTF-8.
        defaults: What applies to lines that do not say otherwise: `model`, `voice`, and options.
        take: The take of lines that do not say which.

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
        line_id = str(_given(fields.get("id"), "")).strip()
        here = [f"{place}: {problem}" for problem in _problems_of(line_id, place, seen)]
        options = _given(fields.get("options"), {})
        try:
            options = json.loads(options) if isinstance(options, str) else options
            own = {
                name: value
                for name, value in fields.items()
                if name not in ("id", "options", "take") and value not in (None, "")
            }
            line_take = _take(_given(fields.get("take"), take))
            request = TTSRequest.model_validate({"text": "", **defaults, **options, **own})
        except ValidationError as invalid:
            here += [f"{place}: {problem}" for problem in problems_in(invalid)]
        except (ValueError, TypeError):
            here.append(f"{place}: options or take: options must be a JSON object, take a whole number from 1")
        else:
            good.append(Line(line_id, request, line_take))
        problems += here
    if not good and not problems:
        problems.append("there are no lines")
    if problems:
        more = f"; and {len(problems) - PROBLEMS_SHOWN} more" if len(problems) > PROBLEMS_SHOWN else ""
        raise NanoGPTError(
            f"{'; '.join(problems[:PROBLEMS_SHOWN])}{more}. Nothing was submitted.", code="INVALID_LINES"
        )
    return good


def _given(value: object, default: Any) -> Any:
    """Give what a line says, or the default where it says nothing; 0 is something."""
    return default if value is None or value == "" else value


def _take(value: object) -> int:
    take = int(str(value))
    if take < 1:
        raise ValueError("the first take is 1")
    return take


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
        words = hide(passwords_in(lines), str(error))
        raise NanoGPTError(
            f"{without_password(lines)} cannot be read: {words}. Nothing was submitted.", code="LINES_UNREADABLE"
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
        self._written = time.monotonic()

    def read(self) -> dict[str, ManifestRow]:
        """Read the rows of earlier runs, by id. What cannot be read as a row is passed over."""
        for line in (self._destination.read(FILE_NAME) or b"").split(b"\n"):
            with suppress(ValidationError):
                row = ManifestRow.model_validate_json(line)
                self._others[row.id] = row
        return dict(self._others)

    def write(self, lines: Iterable[Line], rows: Mapping[str, ManifestRow]) -> None:
        """Write a row for each line that has one, then the rows of lines that are not of this batch.

        Another batch may have written rows of its own since this one began, so the file is read again before.
        """
        self._written = time.monotonic()
        told = {line.id: rows[line.id] for line in lines if line.id in rows}
        try:
            others = {line_id: row for line_id, row in self.read().items() if line_id not in told}
            everything = costs_once([*told.values(), *others.values()])
            self._destination.write(FILE_NAME, "".join(map(_as_json, everything)).encode())
        except Exception as error:  # the drivers of buckets have families of errors of their own
            run_logger().warning("The manifest cannot be written; the ledger has all that it would say: %s", error)

    @property
    def is_due(self) -> bool:
        """Whether it is time to bring the file up to date."""
        return time.monotonic() - self._written > REWRITE_SECONDS


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
    return json.dumps(row.model_dump(mode="json", exclude_none=True), ensure_ascii=False) + "\n"
