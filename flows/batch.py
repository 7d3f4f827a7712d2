"""Many lines, each paid for once, whatever becomes of the others."""

import asyncio
import json
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import PurePath
from typing import Annotated, Any, Final, cast

import anyio
import httpx
from prefect import flow
from prefect.runtime import flow_run as this_flow_run
from pydantic import Field

from prefect_nanogpt.budget import COST_LIMIT_EXCEEDED, Budget, usd_in
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import (
    BatchPartial,
    ContentPolicyViolation,
    CredentialsError,
    NanoGPTError,
    StorageError,
)
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.flows.ending import PLAIN_JSON, failed, keep_result, may_go_better
from prefect_nanogpt.flows.forms import (
    ArtifactKey,
    CostLimit,
    Credentials,
    DocumentedModel,
    Resubmitted,
    SaveTo,
    Schedule,
    Take,
    TimeoutSeconds,
    titled,
)
from prefect_nanogpt.flows.shards import parameters_of_shards, run_shards
from prefect_nanogpt.job import Said, Terms, find
from prefect_nanogpt.ledger import Entry, Job
from prefect_nanogpt.lines import COMPLETED, FILE_NAME, Line, Manifest, ManifestRow, read_lines
from prefect_nanogpt.models import DEFAULT_MODEL, AudioFile, PollSchedule
from prefect_nanogpt.report import Artifact
from prefect_nanogpt.storage import absolute
from prefect_nanogpt.tasks.ledgers import open_ledger
from prefect_nanogpt.tasks.say import PlainSteps, say_in_one_task

__all__ = ["text_to_speech_batch"]

NOT_SUBMITTED: Final = "NOT_SUBMITTED"
UNFINISHED: Final = "UNFINISHED"
"""A job that is paid for and that nobody has seen to its end: another run does."""
ROWS_SHOWN: Final = 100
DETAIL_SHOWN: Final = 200
PROGRESS_SECONDS: Final = 5.0
LAST_WORD_SECONDS: Final = 5.0
KEPT_BESIDE: Final = (
    "another text than the audio that was here under their names. That audio is kept, as <id>.<first letters of its "
    "digest>.<extension>."
)


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
    persist_result=False,
    result_serializer=PLAIN_JSON,
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
    requests_per_second: Annotated[float, titled("Requests a second"), Field(ge=0.01, le=25)] = 20.0,
    max_cost: CostLimit = None,
    take: Take = 1,
    resubmit: Resubmitted = (),
    artifact_key: ArtifactKey = "tts-batch",
    shards: Annotated[int, titled("Shards"), Field(ge=1, le=100)] = 1,
    shard_deployment: Annotated[str | None, titled("Deployment of the shards")] = None,
    shard: Annotated[int | None, titled("Shard"), Field(ge=1)] = None,
) -> list[ManifestRow]:
    """Say many lines, each into a file named by its id, and keep a manifest of them beside the audio.

    Every line is checked before anything is submitted. Then each goes its own way: one that fails stops no other.
    Run again with the same `save_to`, whether as a retry or as a new run, it does and pays for only what is missing.
    Equal lines are one job and several files.

    Args:
        lines: A list of lines with `id`, `text` and, where wanted, `voice`, `model`, `take` and `options`; or the path
            or fsspec URL of a CSV file with such columns or a JSON Lines file (`.jsonl`). Further fields are options.
        model: The model of the lines that name none.
        voice: The voice of the lines that name none.
        options: Options of the lines that do not set them; `TTSRequest` lists the documented ones.
        save_to: A folder, an fsspec URL such as `s3://bucket/speech`, or a block as `remote-file-system/NAME`. The
            manifest is `manifest.jsonl` there.
        credentials: The credentials; None for the environment, or else the saved block `default`.
        timeout_seconds: How long to wait for each job, in seconds.
        poll: The pauses between two status calls about a job.
        max_in_flight: How many lines to be at work on at once.
        requests_per_second: How many requests to make a second, over all lines; the provider documents a limit of 25.
        max_cost: The most that all the lines may cost, earlier runs and failed tries included, in USD. Nothing is
            submitted where the provider's catalogue has prices above it; where it has none, lines go one after another
            until the tickets tell, and no line is submitted once the limit is reached.
        take: Which rendition of the lines that do not say which: another number is another job, and is paid for.
        resubmit: Which jobs to submit anew although they may have been charged for: `uncertain`, `lost`, `refused`.
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
        async def dialogue() -> list[str | None]:
            rows = await text_to_speech_batch(
                [{"id": "hello", "text": "Hello."}, {"id": "bye", "text": "Good-bye.", "voice": "Adam"}],
                voice="Rachel",
                save_to="audio/dialogue",
            )
            return [row.location for row in rows]
        ```
    """
    keep_result()
    save_to = absolute(save_to)
    try:
        defaults = {"model": model, "voice": voice, **(options or {})}
        wanted = await asyncio.to_thread(read_lines, lines, defaults, take)
        if shard is not None:
            if shard > shards:
                raise NanoGPTError(f"There is no shard {shard} of {shards}.", code="INVALID_REQUEST")
            wanted = wanted[shard - 1 :: shards]
        ledger, provider = await open_ledger(save_to, credentials)
        terms = Terms(ledger, timeout_seconds, poll, resubmit)
        batch = _Batch(wanted, provider, terms, artifact_key, is_shard=shard is not None)
        await batch.look_up()
        if batch.todo:
            async with nanogpt_client(credentials) as client:
                client.requests_per_second = requests_per_second
                budget = await batch.budget(max_cost, client)
                if shards > 1 and shard is None:
                    await _run_in_shards(batch, budget, shards, shard_deployment, credentials)
                else:
                    await batch.run(PlainSteps(terms, client, budget), max_in_flight)
        rows = await batch.finish()
        if all(row.is_completed for row in rows):
            return rows
        return cast(list[ManifestRow], await failed(_partial(rows), final=not batch.may_go_better))
    except BatchPartial:
        raise
    except NanoGPTError as error:
        return cast(list[ManifestRow], await failed(error, final=not error.retryable))


async def _run_in_shards(
    batch: "_Batch", budget: Budget | None, shards: int, deployment: str | None, credentials: NanoGPTCredentials | None
) -> None:
    """Have the lines said by runs of the deployment, then look in the ledger what became of them."""
    weights: Counter[int] = Counter()
    for index, (line, job) in enumerate(zip(batch.lines, batch.jobs, strict=True)):
        if job.id in batch.todo:
            weights[index % shards + 1] += len(line.request.text)
    limits: dict[int, Decimal | None] = dict.fromkeys(sorted(weights))
    if budget is not None:
        for number in limits:
            spent = await batch.spent_on({job.id for job in batch.jobs[number - 1 :: shards]})
            limits[number] = spent + (budget.limit - budget.spent) * weights[number] / weights.total()
    states = await run_shards(parameters_of_shards(limits, shards, credentials), deployment)
    ended = {number: f"Shard {number} ended as {state.name}: {state.message}" for number, state in states.items()}
    await batch.tell_from_ledger([ended.get(index % shards + 1) for index in range(len(batch.lines))])


class _Batch:
    """The lines of a batch on their way.

    Args:
        lines: The lines.
        provider: The base URL of the API.
        terms: What their jobs have in common.
        key: The key of the table of lines.
        is_shard: Whether others are at work on the same manifest, which is then left to the run that started them.
    """

    def __init__(self, lines: list[Line], provider: str, terms: Terms, key: str, *, is_shard: bool) -> None:
        self.lines = lines
        self.jobs = [Job(provider, line.request, line.take, line.id) for line in lines]
        self.todo: dict[str, list[int]] = {}
        """The lines without audio, by their job: equal lines are one job."""
        self.may_go_better = False
        self._terms = terms
        self._ledger = terms.ledger
        self._manifest = Manifest(terms.ledger.destination)
        self._is_shard = is_shard
        self._table = Artifact("table", key)
        self._progress = Artifact("progress", f"{key}-progress")
        self._shown_at = time.monotonic()
        self._entries: dict[str, Entry] = {}
        self._rows: dict[str, ManifestRow] = {}
        self._replaced = 0
        self._stopped_by: NanoGPTError | None = None

    async def look_up(self) -> None:
        """Find out which lines are done: with the manifest, the ledger and one listing of each folder."""
        destination = self._ledger.destination
        earlier = await destination.run(self._manifest.read)
        self._entries = await self._ledger.run(self._ledger.entries)
        sizes = await destination.run(destination.list_files)
        for index, (line, job) in enumerate(zip(self.lines, self.jobs, strict=True)):
            row = earlier.get(line.id)
            if row is not None and row.job == job.id and self._is_settled(row, sizes):
                # The folder may have moved since.
                here = destination.location_of(row.file_name) if row.location else None
                self._rows[line.id] = row.model_copy(update={"location": here})
            else:
                self._replaced += row is not None and row.is_completed and row.job != job.id
                self.todo.setdefault(job.id, []).append(index)
        run_logger().info("%d lines, of which %d are to do.", len(self.lines), len(self.lines) - len(self._rows))
        if self._replaced:
            run_logger().warning("%d lines have %s", self._replaced, KEPT_BESIDE)
        await self._show()

    def _is_settled(self, row: ManifestRow, sizes: Mapping[str, int]) -> bool:
        """Whether an earlier run has done all for a line that can be done: saved it, or had its text refused."""
        entry = self._entries.get(row.job) or Entry(row.job)
        if row.is_completed:
            return sizes.get(row.file_name) == row.size_bytes and bool(entry.saved)
        was_refused = entry.over == "refused" and row.outcome == ContentPolicyViolation.default_code
        return was_refused and "refused" not in self._terms.resubmit

    async def budget(self, limit: Decimal | None, client: NanoGPTClient) -> Budget | None:
        """Make the budget of the batch, None where it has no limit.

        Raises:
            ProviderError: The catalogue's prices put the lines above the limit (code `COST_LIMIT_EXCEEDED`).
        """
        if limit is None:
            return None
        budget = Budget(limit, await self.spent_on({job.id for job in self.jobs}))
        unpaid = [self.lines[indices[0]].request for job, indices in self.todo.items() if not self._is_paid(job)]
        await budget.read_prices([request.model for request in unpaid], client)
        budget.refuse_unless_affordable(unpaid)
        return budget

    async def spent_on(self, jobs: set[str]) -> Decimal:
        """Sum up what jobs were charged so far, in USD, each once with all its tries."""
        rows = [row for row in self._rows.values() if row.job in jobs and row.currency in (None, "USD")]
        known = [self._entries[job] for job in jobs & self.todo.keys() & self._entries.keys()]
        costs = await self._ledger.run(self._ledger.costs, *known)
        return usd_in(costs) + sum((row.cost for row in rows if row.cost is not None), Decimal(0))

    def _is_paid(self, job: str) -> bool:
        return job in self._entries and self._entries[job].is_paid

    async def run(self, steps: PlainSteps, at_once: int) -> None:
        """See every job to its end, so many at once."""
        waiting = iter(list(self.todo.items()))
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(at_once, len(self.todo))):
                    workers.create_task(self._work(waiting, steps))
        except BaseException as stopped:
            with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_WORD_SECONDS):
                run_logger().warning("Stopped. What is submitted is paid for; run the batch again to fetch it.")
                await self.finish()
            if isinstance(stopped, BaseExceptionGroup):  # a signal that was raised in one of the workers
                raise stopped.exceptions[0] from None
            raise

    async def _work(self, jobs: Iterator[tuple[str, list[int]]], steps: PlainSteps) -> None:
        for job, (first, *others) in jobs:
            await self._add(await self._row_of(first, steps))
            for index in others:
                await self._add(await self._row_like(self.lines[first].id, index, job))

    async def _add(self, row: ManifestRow) -> None:
        self._rows[row.id] = row
        if time.monotonic() - self._shown_at >= PROGRESS_SECONDS or len(self._rows) == len(self.lines):
            self._shown_at = time.monotonic()
            failed = sum(not row.is_completed for row in self._rows.values())
            what = f"{len(self._rows)} of {len(self.lines)} lines, {failed} without audio"
            run_logger().info("%s.", what)
            await self._progress.show(100.0 * len(self._rows) / len(self.lines), what)
            if len(self._rows) < len(self.lines):
                await self._show()
        if self._manifest.is_due and not self._is_shard:
            await self._ledger.run(self._manifest.write, self.lines, self._rows)

    async def _row_of(self, index: int, steps: PlainSteps) -> ManifestRow:
        """Say a line."""
        line, job = self.lines[index], self.jobs[index]
        if self._stopped_by is not None and (_stops_everything(self._stopped_by) or not self._is_paid(job.id)):
            return ManifestRow(id=line.id, outcome=NOT_SUBMITTED, detail=str(self._stopped_by), job=job.id)
        try:
            entry = self._entries.get(job.id) or Entry(job.id)
            return await self._tell(line.id, job, await say_in_one_task(line.id, job, self._terms, steps, entry))
        except NanoGPTError as error:
            return await self._tell(line.id, job, error)
        except Exception as error:
            run_logger().exception("Line %s met an unexpected error.", line.id)
            unexpected = NanoGPTError(f"{type(error).__name__}: {error}", code="UNEXPECTED_ERROR", retryable=True)
            return await self._tell(line.id, job, unexpected)

    async def _row_like(self, equal: str, index: int, job: str) -> ManifestRow:
        """Give a line what became of an equal one: a copy of its audio, or its failure."""
        row, line = self._rows[equal], self.lines[index]
        shared = row.model_copy(update={"id": line.id, "cost": None if row.cost is None else Decimal(0)})
        if not row.is_completed:
            return shared
        try:
            said = await find(self.jobs[index], self._terms, await self._ledger.run(self._ledger.entry, job))
        except NanoGPTError as error:
            return await self._tell(line.id, self.jobs[index], error)
        assert said is not None
        return shared.model_copy(update={"location": said.audio.location})

    async def _tell(self, line: str, job: Job, end: Said | NanoGPTError) -> ManifestRow:
        """Make the row of a line, with what its job has cost in all its tries."""
        if isinstance(end, NanoGPTError):
            self.may_go_better |= may_go_better(end)
            if end.code == COST_LIMIT_EXCEEDED:
                return ManifestRow(id=line, outcome=NOT_SUBMITTED, detail=end.message, job=job.id)
            if self._stopped_by is None and _stops_submissions(end):
                self._stopped_by = end
                run_logger().warning("No further lines are submitted: %s", end)
        elif job.id not in self._entries:  # there was no try before
            return _completed(line, job.id, end.audio, end.audio.cost, end.audio.currency)
        cost, currency = None, None
        try:
            entry = await self._ledger.run(self._ledger.entry, job.id)
            currency, cost = _main(await self._ledger.run(self._ledger.costs, entry))
        except StorageError as unreadable:
            run_logger().warning("What line %s has cost cannot be read: %s", line, unreadable)
        if isinstance(end, Said):
            return _completed(line, job.id, end.audio, cost, currency)
        return ManifestRow(
            id=line,
            outcome=end.code,
            detail=end.message,
            cost=cost,
            currency=currency,
            ticket=end.ticket,
            job=job.id,
        )

    async def tell_from_ledger(self, reasons: Sequence[str | None]) -> None:
        """Tell from the ledger what others have done about the lines; where it knows nothing, why that may be."""
        self.may_go_better = True
        entries = await self._ledger.run(self._ledger.entries)
        for job_id, (first, *others) in self.todo.items():
            line, job, entry = self.lines[first].id, self.jobs[first], entries.get(job_id) or Entry(job_id)
            currency, cost = _main(await self._ledger.run(self._ledger.costs, entry))
            if (said := await find(job, self._terms, entry)) is not None:
                self._rows[line] = _completed(line, job_id, said.audio, cost, currency)
            else:
                note: dict[str, Any] = {
                    "code": UNFINISHED if entry.is_open else NOT_SUBMITTED,
                    "message": reasons[first],
                }
                if entry.over is not None:
                    note = await self._ledger.run(self._ledger.read_note, job_id, entry.last, f"over-{entry.over}")
                outcome = note.get("code", NanoGPTError.default_code)
                self._rows[line] = ManifestRow(
                    id=line, outcome=outcome, detail=note.get("message"), cost=cost, currency=currency, job=job_id
                )
            for index in others:
                self._rows[self.lines[index].id] = await self._row_like(line, index, job_id)

    async def finish(self) -> list[ManifestRow]:
        """Write the manifest and the table, and give the rows in the order of the lines."""
        if not self._is_shard:
            await self._ledger.run(self._manifest.write, self.lines, self._rows)
        await self._show()
        return [self._rows[line.id] for line in self.lines if line.id in self._rows]

    async def _show(self) -> None:
        """Write the table of lines: failures first, and not more than a page can take."""
        rows = [self._rows[line.id] for line in self.lines if line.id in self._rows]
        shown = sorted(rows, key=lambda row: row.is_completed)[:ROWS_SHOWN]
        destination = self._ledger.destination
        completed = sum(row.is_completed for row in rows)
        parts = [f"{completed} of {len(self.lines)} lines have audio, {_charged(rows)} charged."]
        if len(shown) < len(rows):
            parts.append(f"The first {len(shown)} are shown; {destination.location_of(FILE_NAME)} has them all.")
        if self._replaced:
            parts.append(f"{self._replaced} lines have {KEPT_BESIDE}")
        if completed < len(self.lines):
            parts.append(
                f"To do what is missing, run the batch again with save_to={destination.save_to}: what is paid for is "
                "found, and not paid for again."
            )
        await self._table.show(json.dumps([_shown(row) for row in shown]), " ".join(parts))


def _completed(line: str, job: str, audio: AudioFile, cost: Decimal | None, currency: str | None) -> ManifestRow:
    told = audio.model_dump(include={"location", "sha256", "size_bytes", "duration_seconds"})
    return ManifestRow(
        id=line, outcome=COMPLETED, cost=cost, currency=currency or audio.currency, ticket=audio.ticket, job=job, **told
    )


def _main(costs: Mapping[str | None, Decimal]) -> tuple[str | None, Decimal | None]:
    """Give the currency of a row and what was charged in it; the ledger has the others."""
    return next(iter(costs.items()), (None, None))


def _shown(row: ManifestRow) -> dict[str, str]:
    return {
        "line": row.id,
        "outcome": row.outcome,
        "audio or reason": row.location or textwrap.shorten(row.detail or "", DETAIL_SHOWN, placeholder="…"),
        "seconds": f"{row.duration_seconds:.1f}" if row.duration_seconds is not None else "",
        "cost": f"{row.cost:f} {row.currency or ''}".strip() if row.cost is not None else "",
        "run id": row.ticket.run_id if row.ticket else "",
    }


def _stops_everything(error: NanoGPTError) -> bool:
    """Whether not even what is paid for can be fetched: no key, or no place for the audio."""
    return isinstance(error, CredentialsError | StorageError) or error.http_status == httpx.codes.UNAUTHORIZED


def _stops_submissions(error: NanoGPTError) -> bool:
    """Whether every further submission would meet the same error: no key, no place, no money or no quota."""
    over_quota = error.http_status == httpx.codes.TOO_MANY_REQUESTS and not error.retryable
    return _stops_everything(error) or over_quota or error.http_status == httpx.codes.PAYMENT_REQUIRED


def _charged(rows: Sequence[ManifestRow]) -> str:
    """Sum up what was charged, each currency by itself. Refunds are not counted: only the balance tells of them."""
    sums: dict[str, Decimal] = {}
    for row in rows:
        if row.cost is not None:
            sums[row.currency or "USD"] = sums.get(row.currency or "USD", Decimal(0)) + row.cost
    return ", ".join(f"{cost:f} {currency}" for currency, cost in sums.items()) or "nothing known to be"


def _partial(rows: list[ManifestRow]) -> BatchPartial:
    codes = Counter(row.outcome for row in rows if not row.is_completed)
    counted = ", ".join(f"{count} {code}" for code, count in codes.most_common())
    error = BatchPartial(
        f"{codes.total()} of {len(rows)} lines have no audio: {counted}. The others are saved. Run the batch again "
        "with the same save_to to do what is missing; what is paid for is not paid for again."
    )
    error.rows = rows
    return error
