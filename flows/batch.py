"""Many lines, each paid for once, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import textwrap
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from pathlib import Path, PurePath
from typing import Annotated, Any, Final, NamedTuple, cast
from uuid import UUID

import anyio
from prefect import State, flow
from prefect.artifacts import acreate_progress_artifact, acreate_table_artifact, aupdate_progress_artifact
from prefect.logging import get_run_logger
from prefect.runtime import flow_run as this_flow_run
from pydantic import Field

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import (
    AudioError,
    BatchPartial,
    ContentPolicyViolation,
    CredentialsError,
    NanoGPTError,
    ProviderError,
    StorageError,
    TTSJobRejected,
    TTSTimeout,
)
from prefect_nanogpt.flows.ending import failed
from prefect_nanogpt.flows.forms import (
    ArtifactKey,
    Credentials,
    DocumentedModel,
    SaveTo,
    Schedule,
    TimeoutSeconds,
    titled,
)
from prefect_nanogpt.flows.generate import speak
from prefect_nanogpt.flows.shards import credentials_for_workers, run_shards
from prefect_nanogpt.flows.wait import of_ticket
from prefect_nanogpt.manifest import COMPLETED, Line, Manifest, ManifestRow, Shard, read_lines
from prefect_nanogpt.models import DEFAULT_MODEL, AudioFile, PollSchedule, Ticket
from prefect_nanogpt.report import announce, quietly
from prefect_nanogpt.storage import BLOCK, Destination
from prefect_nanogpt.tasks.audio import save_audio
from prefect_nanogpt.tasks.labels import labelled
from prefect_nanogpt.tasks.status import wait_for_job
from prefect_nanogpt.tasks.submit import COST_LIMIT_EXCEEDED, fingerprint

__all__ = ["text_to_speech_batch"]

NOT_SUBMITTED: Final = "NOT_SUBMITTED"
ROWS_SHOWN: Final = 100
DETAIL_SHOWN: Final = 200
PROGRESS_SECONDS: Final = 5.0
SUBMISSIONS_AT_ONCE: Final = 16
"""A thousand begun together would keep the process busy while the first of them are finished and nobody looks."""
LAST_WORD_SECONDS: Final = 5.0


def run_name() -> str:
    """Name a run by its file, or by how many lines it has."""
    lines = this_flow_run.parameters.get("lines", ())
    what = PurePath(lines).name if isinstance(lines, str) else f"{len(lines)}-lines"
    shard = f"-shard-{number}" if (number := this_flow_run.parameters.get("shard")) else ""
    return f"tts-batch-{what}{shard}"


@flow(
    name="text-to-speech-batch",
    description="Turn many lines into speech with NanoGPT, each into a file of its own.",
    flow_run_name=run_name,
    persist_result=True,
)
async def text_to_speech_batch(
    lines: Annotated[list[dict[str, Any]] | str, titled("Lines")],
    model: Annotated[DocumentedModel | str, titled("Model")] = DEFAULT_MODEL,
    voice: Annotated[str | None, titled("Voice")] = None,
    options: Annotated[dict[str, Any] | None, titled("Further options")] = None,
    save_to: SaveTo = "audio",
    credentials: Credentials = None,
    timeout_seconds: TimeoutSeconds = 600.0,
    poll: Schedule = PollSchedule(),  # noqa: B008 - immutable
    max_in_flight: Annotated[int, titled("Jobs at the provider at once"), Field(ge=1)] = 100,
    requests_per_second: Annotated[float, titled("Requests a second"), Field(gt=0, le=25)] = 20.0,
    max_cost: Annotated[Decimal | None, titled("Cost limit for the whole, in USD")] = None,
    resubmit_uncertain: Annotated[bool, titled("Resubmit what is uncertain")] = False,
    artifact_key: ArtifactKey = "tts-batch",
    shards: Annotated[int, titled("Shards"), Field(ge=1, le=100)] = 1,
    shard_deployment: Annotated[str | None, titled("Deployment of the shards")] = None,
    shard: Annotated[int | None, titled("Shard"), Field(ge=1)] = None,
) -> list[ManifestRow]:
    """Say many lines, each into a file named by its id, and keep a manifest of them beside the audio.

    Every line is checked before anything is submitted. Then each goes its own way: one that fails stops no other.
    Run again with the same `save_to`, whether as a retry or as a new run, it does and pays for only what is missing.

    Args:
        lines: A list of lines with `id`, `text` and, where wanted, `voice`, `model` and `options`; or the path or
            fsspec URL of a CSV file with such columns or a JSON Lines file (`.jsonl`). Further fields are options.
        model: The model of the lines that name none.
        voice: The voice of the lines that name none.
        options: Options of the lines that do not set them; `TTSRequest` lists the documented ones.
        save_to: A folder, an fsspec URL such as `s3://bucket/speech`, or a block as `remote-file-system/NAME`. The
            manifest is `manifest.jsonl` there.
        credentials: The credentials; None for the saved block `default`, or else the environment.
        timeout_seconds: How long to wait for each job, in seconds.
        poll: The pauses between two status calls about a job.
        max_in_flight: How many lines to be at work on at once.
        requests_per_second: How many requests to make a second, over all lines; the provider documents a limit of 25.
        max_cost: The most that all the lines may cost, earlier runs included, in USD. Refused before anything is sent
            where the provider's catalogue has the prices; otherwise no line is submitted once it is reached.
        resubmit_uncertain: Submit even lines that may already have been accepted, and pay twice for those that were.
        artifact_key: The key of the table of lines; lower-case letters, digits and dashes.
        shards: In how many runs of the deployment to do it, on as many workers as there are. Each has its share of
            `max_in_flight`, `requests_per_second` and `max_cost`.
        shard_deployment: The deployment that runs the shards, as `flow/deployment`; None for this run's own, or else
            the one in `prefect.yaml`.
        shard: Which shard this run is. The run that starts the shards sets it; leave it empty.

    Returns:
        What became of each line, in the order of the lines.

    Raises:
        BatchPartial: Some lines have no audio; the state is named `TTS_BATCH_PARTIAL`, and `rows` tells of each line.
        NanoGPTError: The lines are not in order (code `INVALID_LINES`, with all the problems) or cannot be read.
        ProviderError: `max_cost` does not allow it.
        StorageError: `save_to` cannot be used.
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.flows import text_to_speech_batch

        @flow
        async def dialogue() -> list[str]:
            rows = await text_to_speech_batch(
                [{"id": "hello", "text": "Hello."}, {"id": "bye", "text": "Good-bye.", "voice": "Adam"}],
                voice="Rachel",
                save_to="audio/dialogue",
            )
            return [row.location for row in rows]
        ```
    """
    logger = get_run_logger()
    try:
        defaults = {"model": model, "voice": voice, **(options or {})}
        wanted = await asyncio.to_thread(read_lines, lines, defaults)
        if shard is not None:
            if shard > shards:
                raise NanoGPTError(f"There is no shard {shard} of {shards}.", code="INVALID_REQUEST")
            wanted = wanted[shard - 1 :: shards]
        destination = Destination(save_to)
        manifest = Manifest(destination, Shard(shard, shards) if shard is not None else None)
        earlier = await manifest.read()
        if shard is None:
            earlier = await manifest.gather()
        sizes = await destination.sizes()
        todo = [line for line in wanted if not _is_settled(line, earlier.get(line.id), sizes)]
        logger.info("%d lines, of which %d are to do.", len(wanted), len(todo))
        async with nanogpt_client(credentials) as client:
            client.requests_per_second = requests_per_second
            budget = _Budget(max_cost, spent=_charged(earlier[line.id] for line in wanted if line.id in earlier))
            if max_cost is not None:
                await budget.refuse_or_estimate(todo, client)
            if shards > 1 and shard is None and todo:
                shares = _shares(wanted, {line.id for line in todo}, earlier, shards)
                states = await run_shards(
                    {
                        number: {
                            "lines": _anywhere(lines) if isinstance(lines, str) else lines,
                            "model": model,
                            "voice": voice,
                            "options": options,
                            "save_to": _anywhere(save_to),
                            "credentials": credentials_for_workers(credentials),
                            "timeout_seconds": timeout_seconds,
                            "poll": poll.model_dump(),
                            "max_in_flight": max(1, max_in_flight // len(shares)),
                            "requests_per_second": requests_per_second / len(shares),
                            "max_cost": None if max_cost is None else str(share.of(max_cost - budget.spent)),
                            "resubmit_uncertain": resubmit_uncertain,
                            "artifact_key": artifact_key,
                            "shards": shards,
                            "shard": number,
                        }
                        for number, share in shares.items()
                    },
                    shard_deployment,
                )
                rows = await manifest.gather()
                rows |= {row.id: row for row in _untold(wanted, rows, states, shards)}
                may_go_better = True
            else:
                batch = _Batch(
                    manifest,
                    earlier,
                    budget,
                    save_to=save_to,
                    credentials=credentials,
                    timeout_seconds=timeout_seconds,
                    schedule=poll,
                    resubmit_uncertain=resubmit_uncertain,
                    progress=_Progress(artifact_key, len(wanted), len(wanted) - len(todo)),
                )
                rows = {**earlier, **await batch.run(todo, max_in_flight)}
                may_go_better = batch.may_go_better
        result = [rows[line.id] for line in wanted]
        await _show(artifact_key, result)
        if all(row.is_completed for row in result):
            return result
        return cast(list[ManifestRow], await failed(_partial(result), final=not may_go_better))
    except BatchPartial:
        raise
    except NanoGPTError as error:
        return cast(list[ManifestRow], await failed(error, final=not error.retryable))


def _is_settled(line: Line, row: ManifestRow | None, sizes: dict[str, int]) -> bool:
    """Whether an earlier run has done all for a line that can be done: saved it, or had its text refused."""
    if row is None or row.request != fingerprint(line.request):
        return False
    if row.is_completed:
        return row.location is not None and sizes.get(row.location) == row.size_bytes
    return row.outcome == ContentPolicyViolation.default_code


def _charged(rows: Iterable[ManifestRow]) -> Decimal:
    """Sum up what was charged. Refunds are not counted, since only the balance tells of them."""
    return sum((row.cost for row in rows if row.cost is not None), Decimal(0))


class _Share(NamedTuple):
    """What a shard has of the whole: what its lines have cost so far, and its part of the characters still to say."""

    spent: Decimal
    part: Decimal

    def of(self, left: Decimal) -> Decimal:
        """Give the limit of the shard's cost, where so much is left for all."""
        return self.spent + left * self.part


def _shares(wanted: list[Line], todo: set[str], earlier: Mapping[str, ManifestRow], shards: int) -> dict[int, _Share]:
    """Give the share of each shard that has something to do."""
    characters: Counter[int] = Counter()
    for index, line in enumerate(wanted):
        if line.id in todo:
            characters[index % shards + 1] += len(line.request.text)
    return {
        number: _Share(
            _charged(earlier[line.id] for line in wanted[number - 1 :: shards] if line.id in earlier),
            Decimal(characters[number]) / characters.total(),
        )
        for number in sorted(characters)
    }


def _untold(
    wanted: list[Line], rows: Mapping[str, ManifestRow], states: Mapping[int, State[Any]], shards: int
) -> Iterator[ManifestRow]:
    """Give a row to each line that its shard has not come to."""
    for index, line in enumerate(wanted):
        request = fingerprint(line.request)
        row = rows.get(line.id)
        if row is not None and row.request == request:
            continue
        number = index % shards + 1
        state = states.get(number)
        detail = f"Shard {number} ended as {state.name}: {state.message}" if state else None
        yield ManifestRow(id=line.id, outcome=NOT_SUBMITTED, detail=detail, request=request)


def _anywhere(place: str) -> str:
    """Make a path absolute: a shard's process runs in another folder."""
    return place if "://" in place or place.startswith(BLOCK) else str(Path(place).absolute())


class _Budget:
    """What the whole batch may cost, and what of it is spent or promised."""

    def __init__(self, limit: Decimal | None, spent: Decimal) -> None:
        self._limit = limit
        self.spent = spent
        self._prices: dict[str, Decimal | None] = {}

    async def refuse_or_estimate(self, lines: list[Line], client: NanoGPTClient) -> None:
        """Look the prices up, and refuse where they tell that the lines cost too much."""
        logger = get_run_logger()
        for model in sorted({line.request.model for line in lines}):
            try:
                found = await client.speech_model(model)
            except NanoGPTError as error:
                logger.warning("The catalogue could not be read, so prices are only known afterwards: %s", error)
                return
            self._prices[model] = found.usd_per_thousand_chars if found else None
            if self._prices[model] is None:
                logger.info("The catalogue has no price per character for %s, so its cost is known afterwards.", model)
        whole = self.spent + sum(map(self._price, lines))
        if self._limit is not None and whole > self._limit:
            raise ProviderError(
                f"The batch costs {whole:f} USD by the provider's catalogue, {self.spent:f} USD of which are spent; "
                f"that is more than max_cost={self._limit}. Nothing was submitted.",
                code=COST_LIMIT_EXCEEDED,
            )

    def _price(self, line: Line) -> Decimal:
        return (self._prices.get(line.request.model) or Decimal(0)) * len(line.request.text) / 1000

    def promise(self, line: Line) -> Decimal | None:
        """Set the price of a line aside; None where that is more than there is left."""
        price = self._price(line)
        if self._limit is not None and (self.spent + price > self._limit or self.spent >= self._limit):
            return None
        self.spent += price
        return price

    def settle(self, promised: Decimal, cost: Decimal | None) -> None:
        """Put what was charged in the place of what was set aside."""
        self.spent += (cost or Decimal(0)) - promised


class _Batch:
    """The lines on their way."""

    def __init__(
        self,
        manifest: Manifest,
        earlier: dict[str, ManifestRow],
        budget: _Budget,
        *,
        save_to: str,
        credentials: NanoGPTCredentials | None,
        timeout_seconds: float,
        schedule: PollSchedule,
        resubmit_uncertain: bool,
        progress: _Progress,
    ) -> None:
        self._manifest = manifest
        self._earlier = earlier
        self._budget = budget
        self._save_to = save_to
        self._credentials = credentials
        self._timeout_seconds = timeout_seconds
        self._schedule = schedule
        self._resubmit_uncertain = resubmit_uncertain
        self._progress = progress
        self._submissions = asyncio.Semaphore(SUBMISSIONS_AT_ONCE)
        self._rows: dict[str, ManifestRow] = {}
        self._stopped_by: str | None = None
        self.may_go_better = False

    async def run(self, lines: list[Line], at_once: int) -> dict[str, ManifestRow]:
        """See every line to its end, so many at once, and give its row."""
        waiting = iter(lines)
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(at_once, len(lines))):
                    workers.create_task(self._work(waiting))
        except ExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_WORD_SECONDS):
                await self._manifest.write()
        return self._rows

    async def _work(self, lines: Iterator[Line]) -> None:
        for line in lines:
            with labelled(line.id):
                row = await self._row_of(line)
            self._rows[line.id] = row
            await self._manifest.add(row)
            await self._progress.step(failed=not row.is_completed)

    async def _row_of(self, line: Line) -> ManifestRow:
        request = fingerprint(line.request)
        before = self._earlier.get(line.id)
        if before is not None and before.request != request:
            before = None
        known = before.ticket if before and not before.is_lost else None
        ticket = known
        promised = Decimal(0)
        if self._stopped_by is None and known is None:
            reserved = self._budget.promise(line)
            if reserved is None:
                self._stop("max_cost is reached")
            else:
                promised = reserved
        if self._stopped_by is not None:
            return ManifestRow(
                id=line.id, outcome=NOT_SUBMITTED, detail=self._stopped_by, ticket=known, request=request
            )

        async def fetch(submitted: Ticket, is_new: bool) -> AudioFile:
            nonlocal ticket
            ticket = submitted
            completed = await wait_for_job(
                submitted,
                self._credentials,
                timeout_seconds=self._timeout_seconds,
                schedule=self._schedule,
                look_at_once=not is_new,
            )
            saved = await save_audio(completed, name=line.id, save_to=self._save_to, credentials=self._credentials)
            return of_ticket(saved, submitted)

        try:
            audio = await speak(
                line.request,
                fetch,
                name=line.id,
                save_to=self._save_to,
                credentials=self._credentials,
                resubmit_uncertain=self._resubmit_uncertain,
                idempotency_key=f"{self._manifest.location}#{line.id}",
                ticket=known,
                replaces=before.ticket if before and before.is_lost else None,
                gate=self._submissions,
            )
        except Exception as error:
            if not isinstance(error, NanoGPTError):
                get_run_logger().exception("Line %s met an unexpected error.", line.id)
                error = NanoGPTError(f"{type(error).__name__}: {error}", code="UNEXPECTED_ERROR", retryable=True)
            if _stops_all(error):
                self._stop(str(error))
            self.may_go_better |= error.retryable
            if ticket is not None and isinstance(error, TTSJobRejected | TTSTimeout):
                announce("rejected" if isinstance(error, TTSJobRejected) else "timed-out", ticket, code=error.code)
            self._budget.settle(promised, ticket.cost if ticket else None)
            return ManifestRow(
                id=line.id,
                outcome=error.code,
                detail=error.message,
                is_lost=isinstance(error, TTSJobRejected) or (isinstance(error, AudioError) and not error.retryable),
                cost=ticket.cost if ticket else None,
                currency=ticket.payment_source if ticket else None,
                ticket=ticket,
                request=request,
            )
        self._budget.settle(promised, audio.cost)
        if ticket is not None:
            announce(
                "completed",
                ticket,
                location=audio.location,
                sha256=audio.sha256,
                duration_seconds=audio.duration_seconds,
            )
        return ManifestRow(
            id=line.id,
            outcome=COMPLETED,
            location=audio.location,
            sha256=audio.sha256,
            size_bytes=audio.size_bytes,
            duration_seconds=audio.duration_seconds,
            cost=audio.cost,
            currency=audio.currency,
            ticket=audio.ticket,
            request=request,
        )

    def _stop(self, reason: str) -> None:
        if self._stopped_by is None:
            self._stopped_by = reason
            get_run_logger().warning("No further lines are submitted: %s", reason)


class _Progress:
    """The progress artifact, brought up to date every few seconds."""

    def __init__(self, key: str, lines: int, done: int) -> None:
        self._key = key
        self._lines = lines
        self._done = done
        self._failed = 0
        self._artifact: UUID | None = None
        self._shown = -PROGRESS_SECONDS

    async def step(self, *, failed: bool) -> None:
        """Count a line."""
        self._done += 1
        self._failed += failed
        now = time.monotonic()
        if now - self._shown < PROGRESS_SECONDS and self._done < self._lines:
            return
        self._shown = now
        what = f"{self._done} of {self._lines} lines, {self._failed} without audio"
        get_run_logger().info("%s.", what)
        share = 100.0 * self._done / self._lines
        if self._artifact is None:
            self._artifact = await quietly(
                acreate_progress_artifact(progress=share, key=f"{self._key}-progress", description=what)
            )
        else:
            await quietly(aupdate_progress_artifact(self._artifact, share, what))


def _stops_all(error: NanoGPTError) -> bool:
    """Whether every further line would meet the same error: no key, no money, no quota or no place for the audio."""
    if isinstance(error, CredentialsError | StorageError):
        return True
    return error.http_status in (401, 402) or (error.http_status == 429 and not error.retryable)


def _partial(rows: list[ManifestRow]) -> BatchPartial:
    codes = Counter(row.outcome for row in rows if not row.is_completed)
    counted = ", ".join(f"{count} {code}" for code, count in codes.most_common())
    error = BatchPartial(
        f"{codes.total()} of {len(rows)} lines have no audio: {counted}. The others are saved. Run the batch again "
        "with the same save_to to do what is missing; what is paid for is not paid for again."
    )
    error.rows = rows
    return error


async def _show(key: str, rows: list[ManifestRow]) -> None:
    """Write the table of lines: failures first, and not more than a page can take."""
    shown = sorted(rows, key=lambda row: row.is_completed)[:ROWS_SHOWN]
    table = [
        {
            "line": row.id,
            "outcome": row.outcome,
            "audio or reason": row.location or textwrap.shorten(row.detail or "", DETAIL_SHOWN, placeholder="…"),
            "seconds": f"{row.duration_seconds:.1f}" if row.duration_seconds is not None else "",
            "cost": f"{row.cost:f} {row.currency or ''}".strip() if row.cost is not None else "",
            "run id": row.ticket.run_id if row.ticket else "",
        }
        for row in shown
    ]
    completed = sum(row.is_completed for row in rows)
    rest = f" The first {len(shown)} are shown; the manifest has them all." if len(shown) < len(rows) else ""
    await quietly(
        acreate_table_artifact(
            table,
            key=key,
            description=f"{completed} of {len(rows)} lines have audio, {_charged(rows):f} charged.{rest}",
        )
    )
