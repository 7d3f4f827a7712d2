"""Many lines, each paid for once, whatever becomes of the others."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import PurePath
from typing import Annotated, Any, Final, cast

import anyio
import httpx
from prefect.runtime import flow_run as this_flow_run
from pydantic import Field

from prefect_nanogpt.budget import COST_LIMIT_EXCEEDED, Budget
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import (
    BatchPartial,
    ContentPolicyViolation,
    CredentialsError,
    NanoGPTError,
    StorageError,
    SubmissionUncertain,
    TTSJobRejected,
    without_login,
)
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.flows.ending import PLAIN_JSON, completed, failed, given_name, keep_result, may_go_better
from prefect_nanogpt.flows.forms import (
    ArtifactKey,
    CostLimit,
    Credentials,
    DocumentedModel,
    Lines,
    Options,
    Pronounced,
    Resubmitted,
    SaveTo,
    Schedule,
    Subtitles,
    Take,
    TimeoutSeconds,
    flow,
    has_form,
    titled,
)
from prefect_nanogpt.flows.shards import parameters_of_shards, run_shards
from prefect_nanogpt.job import RESUBMIT, WHAT_TO_LOOK_AT, Said, Terms, find, would_be_submitted
from prefect_nanogpt.ledger import Entry, Job, Ledger, amounts, by_currency, saved_as
from prefect_nanogpt.lines import (
    COMPLETED,
    FILE_NAME,
    ID_SHOWN,
    Line,
    Manifest,
    ManifestRow,
    costs_once,
    read_lines,
    shards_of,
)
from prefect_nanogpt.models import (
    DEFAULT_MODEL,
    LONGEST_MESSAGE,
    LONGEST_WORD,
    AudioFile,
    PollSchedule,
    Ticket,
    one_line,
    options_of,
)
from prefect_nanogpt.pronunciation import read_pronunciation
from prefect_nanogpt.report import Artifact, escaped, link, links_to, only_to_look_at, to_hear_and_keep
from prefect_nanogpt.storage import Links, absolute, kept_name
from prefect_nanogpt.subtitles import SubtitleFormat
from prefect_nanogpt.tasks.catalogue import check_names
from prefect_nanogpt.tasks.ledgers import open_ledger
from prefect_nanogpt.tasks.retries import is_worth_another_try
from prefect_nanogpt.tasks.say import PlainSteps, say_in_one_task
from prefect_nanogpt.tasks.subtitles import can_write_subtitles, write_beside
from prefect_nanogpt.turns import Turns

__all__ = ["text_to_speech_batch"]

UNEXPECTED: Final = "UNEXPECTED_ERROR"
NOT_SUBMITTED: Final = "NOT_SUBMITTED"
UNFINISHED: Final = "UNFINISHED"
"""A job that is paid for and that nobody has seen to its end: another run does."""
COSTS: Final = ("cost", "currency", "other_costs")
ROWS_SHOWN: Final = 100
TABLE_HEAD: Final = ("| Line | Audio | Text | Seconds | Cost |", "|---|---|---|---|---|")
TEXT_SHOWN: Final = 80
DETAIL_SHOWN: Final = 200
PROGRESS_SECONDS: Final = 5.0
PROGRESS_SECONDS_A_LINE: Final = 0.0005
"""To tell how far a batch is takes a look at every line, which is about two microseconds: half a percent of this."""
LAST_WORD_SECONDS: Final = 5.0
KEPT_BESIDE: Final = (
    "another text than the audio that was here under their names. That audio is kept, as <id>.<first letters of its "
    "digest>.<extension>."
)


def run_name() -> str:
    """Name a run by its file, or by how many lines it has."""
    lines = this_flow_run.parameters.get("lines", ())
    what = (
        one_line(PurePath(without_login(lines)).name, LONGEST_WORD) if isinstance(lines, str) else f"{len(lines)}-lines"
    )
    shard = f"-shard-{number}" if (number := this_flow_run.parameters.get("shard")) else ""
    return given_name() or f"tts-batch-{what}{shard}"


@has_form("lines", "model", "voice", "save_to", "allow_partial", "credentials", left_out=("shard",))
@flow(
    name="text-to-speech-batch",
    description="Turn many lines into speech with NanoGPT, each into a file of its own.",
    flow_run_name=run_name,
    persist_result=False,
    result_serializer=PLAIN_JSON,
)
async def text_to_speech_batch(
    lines: Lines,
    model: Annotated[DocumentedModel | str, titled("Model")] = DEFAULT_MODEL,
    voice: Annotated[str | None, titled("Voice")] = None,
    options: Options = None,
    save_to: SaveTo = "audio",
    credentials: Credentials = None,
    timeout_seconds: TimeoutSeconds = 600.0,
    poll: Schedule = PollSchedule(),  # noqa: B008 - immutable
    max_in_flight: Annotated[int, titled("Jobs at the provider at once"), Field(ge=1)] = 500,
    requests_per_second: Annotated[float, titled("Requests a second"), Field(ge=0.01, le=25)] = 24.0,
    max_cost: CostLimit = None,
    take: Take = 1,
    resubmit: Resubmitted = (),
    strict: Annotated[bool, titled("Only known models and voices")] = False,
    allow_partial: Annotated[bool, titled("Allow lines without audio")] = False,
    subtitles: Subtitles = None,
    pronounce: Pronounced = None,
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
        lines: A list of lines with `id`, `text` and, where wanted, `voice`, `model`, `take`, documented options such as
            `speed`, and others as `option.<name>`; or the path or fsspec URL of a table (CSV) with such columns, of a
            JSON array or of JSON Lines.
        model: The model of the lines that name none.
        voice: The voice of the lines that name none.
        options: Options of the lines that do not set them; `TTSRequest` lists the documented ones.
        save_to: A folder, an fsspec URL such as `s3://bucket/speech`, or a block as `remote-file-system/NAME`. The
            manifest is `manifest.jsonl` there.
        credentials: The credentials, or the name of their block; None for the environment, or else the block `default`.
        timeout_seconds: How long to wait for each job, in seconds.
        poll: The pauses between two status calls about a job.
        max_in_flight: How many lines to be at work on at once.
        requests_per_second: How many requests to make a second, over all lines; the provider documents a limit of 25.
        max_cost: The most that all the lines may cost, earlier runs and failed tries included, in USD. Nothing is
            submitted where the provider's catalogue has prices above it; where it has none, lines go one after another
            until the tickets tell, and no line is submitted once the limit is reached. What is paid for is fetched all
            the same.
        take: Which rendition of the lines that do not say which: another number is another job, and is paid for.
        resubmit: Which jobs to submit anew although they may have been charged for: `uncertain`, `lost`, `refused`.
        strict: Whether to refuse models and voices that the provider's catalogue does not have, instead of warning of
            them. Where the catalogue cannot be read, the run goes on and says so.
        allow_partial: Whether a run some of whose lines have no audio after its last attempt is completed all the same,
            and returns its rows. One that a refused key, an empty balance or a limit has stopped is not.
        subtitles: Write subtitles beside the audio of each line, under its name: `srt`, or `vtt` for WebVTT. The time
            of a line is shared out by characters.
        pronounce: What to say for words, or the path or URL of a table (CSV) with the columns `word` and `say`. Rows
            and subtitles keep the texts as they are written; what is said is what is priced.
        artifact_key: The key of the table of lines; lower-case letters, digits and dashes.
        shards: In how many runs of the deployment to do it, on as many workers as there are. Each has its share of
            `max_in_flight`, `requests_per_second` and `max_cost`.
        shard_deployment: The deployment that runs the shards, as `flow/deployment`; None for this run's own, or else
            the one in `prefect.yaml`.
        shard: Which shard this run is. The run that starts the shards sets it, and gives it its own lines of a list; of
            a file it takes its share. Leave it empty.

    Returns:
        What became of each line, in the order of the lines.

    Raises:
        BatchPartial: Some lines have no audio, and `allow_partial` is not set; the state is named `TTS_BATCH_PARTIAL`,
            and `rows` tells of each line.
        NanoGPTError: The lines are not in order (code `INVALID_LINES`, with all the problems) or cannot be read; or,
            with `strict`, the catalogue does not have a model or a voice (code `NOT_IN_CATALOGUE`); or all lines have
            audio and some have no subtitles (code `SUBTITLES_MISSING`).
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
        if subtitles is not None:
            can_write_subtitles()
        defaults = {"model": model, "voice": voice, **_options(options)}
        wanted = await asyncio.to_thread(_read, lines, defaults, take, pronounce)
        if shard is not None:
            wanted = _its_own(wanted, shard, shards, are_all=not isinstance(lines, str))
        ledger, provider = await open_ledger(save_to, credentials)
        terms = Terms(ledger, timeout_seconds, poll, resubmit)
        batch = _Batch(wanted, provider, terms, artifact_key, is_shard=shard is not None)
        await batch.look_up()
        if batch.todo:
            async with nanogpt_client(credentials) as client:
                client.turns.per_second = requests_per_second
                if shard is None:
                    await batch.check_names(client, strict=strict)
                budget = await batch.budget(cast(Decimal | None, max_cost), client)
                if shards > 1 and shard is None and batch.refusal is None:
                    await _run_in_shards(batch, budget, shards, shard_deployment, credentials)
                else:
                    await batch.run(PlainSteps(terms, client, budget), max_in_flight, client.turns)
        rows = await batch.finish()
        missing = await batch.write_subtitles(subtitles)
        if all(row.is_completed for row in rows):
            if missing is not None:
                raise missing
            return rows
        error = batch.refusal or batch.partial(rows)
        end = await failed(error, final=not batch.may_go_better)
        if allow_partial and batch.stopped_by is None and missing is None:
            run_logger().warning(error.message)
            return cast(list[ManifestRow], await completed(rows, error.message))
        return cast(list[ManifestRow], end)
    except BatchPartial:
        raise
    except NanoGPTError as error:
        return cast(list[ManifestRow], await failed(error, final=not error.retryable))


def _read(lines: Any, defaults: Mapping[str, Any], take: int, pronounce: Any) -> list[Line]:
    """Read the lines as they are said."""
    pronunciation = read_pronunciation(pronounce)
    return [line.said_with(pronunciation) for line in read_lines(lines, defaults, take)]


def _its_own(lines: list[Line], shard: int, shards: int, *, are_all: bool) -> list[Line]:
    """Give the lines of a shard: all of a list, which has only its own, and its share of a file."""
    if shard > shards:
        raise NanoGPTError(f"There is no shard {shard} of {shards}.", code="INVALID_REQUEST")
    if are_all:
        return lines
    return [line for line, its in zip(lines, shards_of(lines, shards), strict=True) if its == shard]


def _options(given: Options) -> dict[str, Any]:
    try:
        return options_of(given or {})
    except ValueError as error:
        raise NanoGPTError(f"options: {error}. Nothing was submitted.", code="INVALID_REQUEST") from None


async def _run_in_shards(
    batch: "_Batch",
    budget: Budget | None,
    shards: int,
    deployment: str | None,
    credentials: NanoGPTCredentials | str | None,
) -> None:
    """Have the lines said by runs of the deployment, then look in the ledger what became of them."""
    numbers = shards_of(batch.lines, shards)
    jobs: dict[int, dict[str, Job]] = {numbers[first]: {} for first, *_ in batch.todo.values()}
    for number, job in zip(numbers, batch.jobs, strict=True):
        if number in jobs:
            jobs[number].setdefault(job.id, job)
    limits: dict[int, Decimal | None] = dict.fromkeys(sorted(jobs))
    if budget is not None:
        limits.update(budget.shares({number: jobs[number].values() for number in limits}, batch.new_jobs().keys()))
    states = await run_shards(parameters_of_shards(limits, numbers, shards, credentials), deployment)
    ended = {number: f"Shard {number} ended as {state.name}: {state.message}" for number, state in states.items()}
    await batch.tell_from_ledger([ended.get(number) for number in numbers])


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
        self.refusal: NanoGPTError | None = None
        """Why nothing is submitted at all, such as prices above the limit. What is paid for is fetched."""
        self._terms = terms
        self._ledger = terms.ledger
        self._manifest = Manifest(terms.ledger.destination)
        self._is_shard = is_shard
        self._table = Artifact("markdown", key)
        self._shown_at = time.monotonic()
        self._entries: dict[str, Entry] = {}
        self._rows: dict[str, ManifestRow] = {}
        self._failed: set[str] = set()
        """The jobs that the provider has ended, which another run submits anew."""
        self._replaced = 0
        self.stopped_by: NanoGPTError | None = None

    async def look_up(self) -> None:
        """Find out which lines are done: with the manifest, the ledger and one listing of each folder."""
        destination = self._ledger.destination
        earlier = await destination.run(self._manifest.read)
        self._entries = await self._ledger.run(self._ledger.entries)
        sizes = await destination.run(destination.list_files)
        # What a job has cost is told on one of its lines, which need not be of this batch.
        costs = {row.job: _costs_of(row) for row in earlier.values() if row.cost}
        for index, (line, job) in enumerate(zip(self.lines, self.jobs, strict=True)):
            row = earlier.get(line.id)
            if row is not None and row.job == job.id and self._is_settled(row, sizes):
                # The folder may have moved since.
                here = destination.location_of(row.file_name) if row.location else None
                told = {**_texts(line), "location": here, **costs.get(job.id, {})}
                self._rows[line.id] = row.model_copy(update=told)
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
            name, digest = row.file_name, row.sha256 or ""
            is_noted = saved_as(name, digest) in {state for _, state in entry.saved}
            # Where audio was moved aside, other audio has taken its name.
            return is_noted and sizes.get(name) == row.size_bytes and kept_name(name, digest) not in sizes
        was_refused = entry.over == "refused" and row.outcome == ContentPolicyViolation.default_code
        return was_refused and "refused" not in self._terms.resubmit

    async def budget(self, limit: Decimal | None, client: NanoGPTClient) -> Budget | None:
        """Make the budget of the batch, None where it has no limit."""
        if limit is None:
            return None
        budget = Budget(limit, self._ledger, client)
        jobs = {job.id: job for job in self.jobs}
        # The manifest may not know of all tries, nor of what was set aside for one.
        told = {
            row.job: row.cost
            for row in self._rows.values()
            if row.cost and row.currency in (None, "USD") and len(self._entry(row.job).charged) == 1
        }
        await budget.count([(job, self._entry(job.id)) for job in jobs.values()], told)
        new = self.new_jobs().values()
        await budget.read_prices(new)
        self.refusal = self.stopped_by = self.refusal or budget.refusal_of(new)
        return budget

    async def check_names(self, client: NanoGPTClient, *, strict: bool) -> None:
        """Warn of models and voices that the catalogue does not have, or submit nothing because of them."""
        try:
            if requests := [job.request for job in self.new_jobs().values() if job.request]:
                await check_names(requests, client, strict=strict)
        except NanoGPTError as error:
            self.refusal = self.stopped_by = error

    def new_jobs(self) -> dict[str, Job]:
        """Give the jobs that would be submitted, by their digests."""
        return {
            job: self.jobs[indices[0]]
            for job, indices in self.todo.items()
            if would_be_submitted(self._entry(job), self._terms.resubmit)
        }

    def _entry(self, job: str) -> Entry:
        """Give what the ledger knew of a job when the run began."""
        return self._entries.get(job) or Entry(job)

    async def run(self, steps: PlainSteps, at_once: int, turns: Turns) -> None:
        """See every job to its end, so many at once."""
        waiting = iter(list(self.todo.items()))
        try:
            async with asyncio.TaskGroup() as workers:
                for _ in range(min(at_once, len(self.todo))):
                    workers.create_task(self._work(waiting, steps))
                    # A task run that begins before its request may leave only keeps others from leaving.
                    await asyncio.sleep(1 / turns.per_second if turns.per_second else 0)
        except BaseException as stopped:
            with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_WORD_SECONDS):
                run_logger().warning("Stopped. What is submitted is paid for; run the batch again to fetch it.")
                await self.finish()
            if isinstance(stopped, BaseExceptionGroup):  # a signal that was raised in one of the workers
                raise stopped.exceptions[0] from None
            raise

    async def _work(self, jobs: Iterator[tuple[str, list[int]]], steps: PlainSteps) -> None:
        for _, (first, *others) in jobs:
            await self._add(await self._by_itself(first, self._row_of(first, steps)))
            for index in others:
                await self._add(await self._by_itself(index, self._row_like(self.lines[first].id, index)))

    async def _by_itself(self, index: int, row: Awaitable[ManifestRow]) -> ManifestRow:
        """Give the row of a line, also where it cannot be made: what is wrong with one line stops no other."""
        try:
            return await row
        except Exception as error:
            line, job = self.lines[index], self.jobs[index]
            end = _unexpected(line, error)
            self.may_go_better = True
            return ManifestRow(**_texts(line), job=job.id, outcome=end.code, detail=end.message)

    async def _add(self, row: ManifestRow) -> None:
        self._rows[row.id] = row
        pause = max(PROGRESS_SECONDS, PROGRESS_SECONDS_A_LINE * len(self._rows))
        if time.monotonic() - self._shown_at >= pause or len(self._rows) == len(self.lines):
            self._shown_at = time.monotonic()
            failed = sum(not row.is_completed for row in self._rows.values())
            what = f"{len(self._rows)} of {len(self.lines)} lines, {failed} without audio"
            run_logger().info("%s.", what)
            if len(self._rows) < len(self.lines):
                await self._show()
        if not self._is_shard and self._manifest.falls_due(len(self._rows)):
            await self._ledger.run(self._manifest.write, self.lines, self._rows)

    async def _row_of(self, index: int, steps: PlainSteps) -> ManifestRow:
        """Say a line."""
        line, job = self.lines[index], self.jobs[index]
        entry = self._entry(job.id)
        if self.stopped_by is not None and (_stops_everything(self.stopped_by) or not entry.is_paid):
            return await self._row_from_ledger(index, entry, str(self.stopped_by))
        # Audio of which the manifest does not tell, as after a kill, is not worth a task run.
        if entry.saved and (row := await self._row_from_ledger(index, entry, None)).is_completed:
            return row
        try:
            return await self._tell(index, await say_in_one_task(line.id, job, self._terms, steps, entry))
        except NanoGPTError as error:
            return await self._tell(index, error)
        except Exception as error:
            return await self._tell(index, _unexpected(line, error))

    async def _row_like(self, equal: str, index: int) -> ManifestRow:
        """Give a line what became of an equal one: a copy of its audio, or its failure."""
        row = self._rows[equal].model_copy(update=_texts(self.lines[index]))
        if not row.is_completed:
            return row
        return await self._row_from_ledger(index, None, "The ledger does not say where the audio of an equal line is.")

    async def _tell(self, index: int, end: Said | NanoGPTError) -> ManifestRow:
        """Make the row of a line that this run has seen to its end."""
        job = self.jobs[index].id
        entry = self._entry(job)
        if isinstance(end, Said) and not entry.states:  # all that is charged is this try
            return _completed(self.lines[index], job, end.audio, {"cost": end.audio.cost})
        if isinstance(end, NanoGPTError):
            self._take_note_of(end, job)
            if end.code == COST_LIMIT_EXCEEDED:  # to look for each line that the limit refuses would take long
                return await self._row_from_ledger(index, None if entry.states else entry, end.message)
        return await self._row_from_ledger(index, None, None, end)

    def _take_note_of(self, error: NanoGPTError, job: str) -> None:
        """Draw from the end of a line what it means for the others and for another run."""
        self.may_go_better |= may_go_better(error)
        if isinstance(error, TTSJobRejected) and not isinstance(error, ContentPolicyViolation) and error.is_certain:
            self._failed.add(job)
        is_news = self.stopped_by is None or (_stops_everything(error) and not _stops_everything(self.stopped_by))
        if is_news and _stops_submissions(error):
            self.stopped_by = error
            run_logger().warning("No further lines are submitted: %s", error)

    async def _row_from_ledger(
        self, index: int, entry: Entry | None, reason: str | None, end: Said | NanoGPTError | None = None
    ) -> ManifestRow:
        """Make the row of a line from what the ledger knows of its job.

        Args:
            index: Which line.
            entry: What the ledger knows; None to look.
            reason: Why this run has not seen it to an end.
            end: How it ended, where this run has seen that.
        """
        line, job = self.lines[index], self.jobs[index]
        told: dict[str, Any] = {"outcome": NOT_SUBMITTED, "detail": reason}
        try:
            entry = entry if entry is not None else await self._ledger.run(self._ledger.entry, job.id)
            if entry.saved and end is None:
                end = await find(job, self._terms, entry)
            if isinstance(end, Said):
                told = amounts(await self._ledger.run(self._ledger.costs, entry))
            elif entry.states:
                told = await self._ledger.run(_standing, self._ledger, entry, reason, self._entry(job.id).last)
        except NanoGPTError as unreadable:
            run_logger().warning("What is known of line %s cannot be read: %s", line.id, unreadable)
            told |= {"outcome": unreadable.code, "detail": unreadable.message}
        if told.pop("is_failed", False):
            self._failed.add(job.id)
        if isinstance(end, Said):
            return _completed(line, job.id, end.audio, told)
        if end is not None:
            told |= {"outcome": end.code, "detail": end.message, "ticket": end.ticket or told.get("ticket")}
        return ManifestRow(**_texts(line), job=job.id, **told)

    async def tell_from_ledger(self, reasons: Sequence[str | None]) -> None:
        """Tell from the ledger what others have done about the lines; where it knows nothing, why that may be."""
        self.may_go_better = True
        entries = await self._ledger.run(self._ledger.entries)
        for job, (first, *others) in self.todo.items():
            line, entry = self.lines[first].id, entries.get(job) or Entry(job)
            self._rows[line] = await self._by_itself(first, self._row_from_ledger(first, entry, reasons[first]))
            for index in others:
                self._rows[self.lines[index].id] = await self._by_itself(index, self._row_like(line, index))

    async def finish(self) -> list[ManifestRow]:
        """Write the manifest and the table, and give the rows in the order of the lines."""
        if not self._is_shard:
            await self._ledger.run(self._manifest.write, self.lines, self._rows)
        await self._show()
        return self._told()

    async def write_subtitles(self, kind: SubtitleFormat | None) -> NanoGPTError | None:
        """Write subtitles beside the audio of each line that has some, if any are wanted; give what went wrong."""
        if kind is None:
            return None
        place = self._ledger.destination
        there = await place.run(place.list_files)
        failures: list[tuple[str, NanoGPTError]] = []

        async def write(line: Line, row: ManifestRow) -> None:
            parts, language = [(line.text, row.duration_seconds)], line.request.language
            try:
                await write_beside(place, row.file_name, kind, parts, language=language, there=there)
            except NanoGPTError as error:
                failures.append((line.id, error))

        rows = [(line, self._rows[line.id]) for line in self.lines if line.id in self._rows]
        await asyncio.gather(*(write(line, row) for line, row in rows if row.is_completed))
        if not failures:
            return None
        line_id, error = failures[0]
        missing = NanoGPTError(
            f"{len(failures)} of {len(self.lines)} lines have audio and no subtitles, one of them "
            f"{line_id[:ID_SHOWN]}: {error} Run the batch again with the same save_to to write them; nothing is paid "
            "for again.",
            code="SUBTITLES_MISSING",
            retryable=any(error.retryable for _, error in failures),
        )
        run_logger().warning(missing.message)
        return missing

    def _told(self) -> list[ManifestRow]:
        return costs_once(self._rows[line.id] for line in self.lines if line.id in self._rows)

    def partial(self, rows: list[ManifestRow]) -> BatchPartial:
        """Make the error of a batch some of whose lines have no audio."""
        codes = Counter(row.outcome for row in rows if not row.is_completed)
        counted = ", ".join(f"{count} {code}" for code, count in codes.most_common())
        saved = " The others are saved." if codes.total() < len(rows) else ""
        stuck = sum(RESUBMIT in (row.detail or "") for row in rows if not row.is_completed)
        error = BatchPartial(
            f"{codes.total()} of {len(rows)} lines have no audio: {counted}.{saved} Run the batch again with the same "
            f"save_to to do what is missing; {self._what_is_paid_again(rows)}"
            + (
                f" Lines whose rows name `resubmit` ({stuck}) may end in the same way again without it."
                if stuck
                else ""
            )
        )
        error.rows = rows
        return error

    def _what_is_paid_again(self, rows: Sequence[ManifestRow]) -> str:
        failed = sum(row.job in self._failed for row in rows)
        again = f", except for lines whose jobs failed ({failed}): they are submitted, and charged, anew"
        return f"what is paid for is not paid for again{again if failed else ''}."

    @only_to_look_at
    async def _show(self) -> None:
        """Write the table of lines: failures first, and not more than a page can take."""
        rows = self._told()
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
                f"To do what is missing, run the batch again with save_to={destination.shown}: "
                + self._what_is_paid_again(rows)
            )
        links = await links_to(destination, [row.file_name for row in shown if row.file_name])
        page = to_hear_and_keep(destination.links_to_all(), all_of_it=True) if completed else []
        table = [*TABLE_HEAD, *(_shown(row, links.get(row.file_name)) for row in shown)]
        await self._table.show("\n\n".join([*page, "\n".join(table)]) + "\n", " ".join(parts))


def _unexpected(line: Line, error: Exception) -> NanoGPTError:
    """Make the end of a line of an error that nobody has thought of, and log where it arose."""
    run_logger().exception("Line %s met an unexpected error.", line.id)
    words = one_line(f"{type(error).__name__}: {error}", LONGEST_MESSAGE)
    return NanoGPTError(words, code=UNEXPECTED, retryable=True)


def _completed(line: Line, job: str, audio: AudioFile, told: Mapping[str, Any]) -> ManifestRow:
    costs = {name: told.get(name) for name in COSTS}
    costs["currency"] = costs["currency"] or audio.currency
    file = audio.model_dump(include={"location", "sha256", "size_bytes", "duration_seconds"})
    return ManifestRow(**_texts(line), outcome=COMPLETED, ticket=audio.ticket, job=job, **costs, **file)


def _texts(line: Line) -> dict[str, Any]:
    """Give the fields of a row that say which line it is, and what is said."""
    return {"id": line.id, "text": line.text, "said_as": line.request.text if line.written is not None else None}


def _costs_of(row: ManifestRow) -> dict[str, Any]:
    return {name: getattr(row, name) for name in COSTS}


def _standing(ledger: Ledger, entry: Entry, reason: str | None, had: int) -> dict[str, Any]:
    """Tell how a job stands that nobody has seen to its end: outcome, detail, ticket, and what was charged.

    What counts is the latest try that was, or may have been, charged, or that the provider refused, or that was made
    since there were `had` tries. A job without one was not submitted.
    """
    entry = ledger.that_left(entry)
    told: dict[str, Any] = amounts(ledger.costs(entry)) | {"outcome": NOT_SUBMITTED, "detail": reason}
    tries = [*entry.charged, *([entry.last] if entry.over == "refused" or entry.last > had else [])]
    if not tries:
        return told
    number = max(tries)
    states = entry.states[number] - {"plan"}
    note: dict[str, Any] = {}
    for state in sorted(states, key="sent".__ne__):
        note |= ledger.read_note(entry.job, number, state)
    if note.get("ticket"):
        told["ticket"] = Ticket.model_validate(note["ticket"])
    is_over = any(state.startswith("over-") for state in states)
    if is_over and not (number == entry.last and entry.over is None):  # where a late answer is not the end of it
        message, code = note.get("message", ""), NanoGPTError.default_code
        if "over-uncertain" in states:
            message, code = f"{message} {WHAT_TO_LOOK_AT}".strip(), SubmissionUncertain.default_code
        if reason and number <= had and "over-failed" in states:
            message += f" It was not submitted anew: {reason}"
        told |= {"outcome": note.get("code", code), "detail": message, "is_failed": "over-failed" in states}
    elif states != {"sent"}:
        detail = f"It is paid for, and the next run goes on with it. {reason or ''}"
        told |= {"outcome": UNFINISHED, "detail": detail.strip()}
    elif ledger.may_still_be_answered(entry):
        told |= {"outcome": UNFINISHED, "detail": "Another run is submitting it."}
    else:
        at = note.get("at", "an unknown time")
        detail = f"It was sent at {at}, and no answer is known. {WHAT_TO_LOOK_AT}"
        told |= {"outcome": SubmissionUncertain.default_code, "detail": detail}
    return told


def _shown(row: ManifestRow, links: Links | None) -> str:
    """Write the row of a line in the table of a report: what to look for first, since the UI's tables are narrow."""
    said_as = f" (said as: {escaped(row.said_as, TEXT_SHOWN)})" if row.said_as is not None else ""
    text, audio = escaped(row.text, TEXT_SHOWN) + said_as, link("Listen", links.listen) if links else None
    if not row.is_completed:
        audio, text = f"**{escaped(row.outcome)}**", f"{text} — {escaped(row.detail or '', DETAIL_SHOWN)}"
    cells = [
        escaped(row.id, ID_SHOWN),
        audio or escaped(row.location or ""),
        text,
        f"{row.duration_seconds:.1f}" if row.duration_seconds is not None else "",
        escaped(", ".join(f"{cost:f} {currency or ''}".strip() for currency, cost in _charges(row))),
    ]
    return f"| {' | '.join(cells)} |"


def _stops_everything(error: NanoGPTError) -> bool:
    """Whether not even what is paid for can be fetched: no key, or no place for the audio."""
    return isinstance(error, CredentialsError | StorageError) or error.http_status == httpx.codes.UNAUTHORIZED


def _stops_submissions(error: NanoGPTError) -> bool:
    """Whether every further submission would meet the same error: no key, no place, no money or no quota."""
    # Of a status call only a daily cap says anything about submissions: the deadline of its line is another line's no
    # more than its job is.
    over_quota = error.http_status == httpx.codes.TOO_MANY_REQUESTS and (
        error.code.startswith("DAILY_") or (error.ticket is None and not is_worth_another_try(error, 0))
    )
    return _stops_everything(error) or over_quota or error.http_status == httpx.codes.PAYMENT_REQUIRED


def _charges(row: ManifestRow) -> list[tuple[str | None, Decimal]]:
    first = [] if row.cost is None else [(row.currency, row.cost)]
    return [*first, *(row.other_costs or {}).items()]


def _charged(rows: Sequence[ManifestRow]) -> str:
    """Sum up what was charged, each currency by itself. Refunds are not counted: only the balance tells of them."""
    sums = by_currency(charge for row in rows for charge in _charges(row))
    return ", ".join(f"{cost:f} {currency}" for currency, cost in sums.items()) or "nothing known to be"
