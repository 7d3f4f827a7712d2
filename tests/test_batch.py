"""Many lines: each checked first, each on its own, each paid for once."""

import asyncio
import csv
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy
import pytest
from prefect import State
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun, TaskRun
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    TaskRunFilter,
)

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.client import SUBMISSIONS_AT_ONCE
from prefect_nanogpt.errors import BatchPartial, NanoGPTError
from prefect_nanogpt.flows import text_to_speech_batch
from prefect_nanogpt.ledger import Job, Ledger
from prefect_nanogpt.lines import ManifestRow, read_lines
from prefect_nanogpt.models import DEFAULT_MODEL, PollSchedule
from prefect_nanogpt.report import Artifact
from prefect_nanogpt.sandbox import Accept, Answer, Cut, Sandbox
from prefect_nanogpt.storage import Destination
from tests.conftest import API_KEY, PREFECT_SERVER, eventually, free_port, start, wait_for_server


def lines_of(count: int, text: str = "Line {} of many.") -> list[dict[str, Any]]:
    return [{"id": f"line-{number:03}", "text": text.format(number)} for number in range(count)]


def manifest_in(save_to: str) -> dict[str, ManifestRow]:
    rows = [ManifestRow.model_validate_json(line) for line in Path(save_to, "manifest.jsonl").read_text().splitlines()]
    return {row.id: row for row in rows}


def audio_in(save_to: str) -> dict[str, Path]:
    return {
        path.name.rpartition(".")[0]: path
        for path in Path(save_to).iterdir()
        if path.name not in ("manifest.jsonl", ".nanogpt")
    }


@pytest.fixture
def batch(credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule) -> dict[str, Any]:
    return {"credentials": credentials, "save_to": save_to, "poll": quick, "requests_per_second": 25}


async def partial(**parameters: Any) -> BatchPartial:
    with pytest.raises(BatchPartial) as caught:
        await text_to_speech_batch(**parameters)
    return caught.value


async def test_the_manifest_has_a_row_a_line_whatever_ends_lines_elsewhere(batch: dict[str, Any], save_to: str) -> None:
    text = "One\u2028two\u2029three\x85four\r\nfive."
    rows = await text_to_speech_batch([{"id": "a", "text": text}], **batch)
    assert manifest_in(save_to) == {"a": rows[0]}
    assert rows[0].text == text


async def test_rows_of_before_texts_were_kept_are_kept(batch: dict[str, Any], save_to: str) -> None:
    Path(save_to).mkdir()
    old = {"id": "old", "outcome": "completed", "location": "old.mp3", "job": "0"}
    Path(save_to, "manifest.jsonl").write_text(json.dumps(old) + "\n")
    await text_to_speech_batch([{"id": "a", "text": "Hello."}], **batch)
    assert manifest_in(save_to)["old"].location == "old.mp3"


async def test_lines_become_files_named_by_their_ids(batch: dict[str, Any], save_to: str, sandbox: Sandbox) -> None:
    rows = await text_to_speech_batch(lines_of(5), **batch)
    assert [row.id for row in rows] == [line["id"] for line in lines_of(5)]
    assert manifest_in(save_to) == {row.id: row for row in rows}
    for row in rows:
        assert row.ticket is not None
        assert row.cost == row.ticket.cost
        assert Path(str(row.location)) == audio_in(save_to)[row.id]
        assert Path(str(row.location)).read_bytes() == sandbox.audio_bytes(row.ticket.run_id)
    assert len(sandbox.ledger.charges) == 5


async def test_nothing_is_submitted_while_a_line_is_wrong(batch: dict[str, Any], sandbox: Sandbox) -> None:
    with pytest.raises(NanoGPTError, match="INVALID_LINES: line 6: text"):
        await text_to_speech_batch([*lines_of(5), {"id": "empty", "text": " "}], **batch)
    assert sandbox.requests() == []


async def test_lines_fail_one_by_one(batch: dict[str, Any], save_to: str, sandbox: Sandbox) -> None:
    lines = [*lines_of(3), {"id": "bad", "text": "[sandbox:reject] No."}, {"id": "ill", "text": "[sandbox:fail] No."}]
    state = await text_to_speech_batch(lines, **batch, return_state=True)
    assert state.name == "TTS_BATCH_PARTIAL"
    error = await state.aresult(raise_on_failure=False)
    assert isinstance(error, BatchPartial)
    assert Counter(row.outcome for row in error.rows) == {
        "completed": 3,
        "CONTENT_POLICY_VIOLATION": 1,
        "TTS_FAILED": 1,
    }
    assert "2 of 5 lines have no audio: 1 CONTENT_POLICY_VIOLATION, 1 TTS_FAILED" in str(error)
    assert sorted(audio_in(save_to)) == ["line-000", "line-001", "line-002"]

    again = await partial(lines=lines, **batch)
    assert [row.outcome for row in again.rows] == [row.outcome for row in error.rows]
    texts = Counter(request.json["text"] for request in sandbox.requests("submit"))
    assert texts.pop("[sandbox:fail] No.") == 2
    assert set(texts.values()) == {1}


async def ended_task_runs(state: State[Any], count: int) -> list[TaskRun]:
    """Read the task runs of a flow run, whose states the server writes a little later."""
    run = FlowRunFilter(id={"any_": [state.state_details.flow_run_id]})

    async def look() -> list[TaskRun] | None:
        async with get_client() as client:
            found = await client.read_task_runs(flow_run_filter=run, task_run_filter=TaskRunFilter())
        return found if len(found) >= count and all(step.state and step.state.is_final() for step in found) else None

    return await eventually(look)


async def test_one_task_run_a_line_named_by_its_end_and_the_failures_first_in_the_table(
    batch: dict[str, Any], sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [*lines_of(2, "[sandbox:wait 1] Line {}."), {"id": "bad", "text": "[sandbox:reject] No."}]
    state = await text_to_speech_batch(lines, **batch, artifact_key="tts-batch-steps", return_state=True)
    steps = await ended_task_runs(state, 3)
    async with get_client() as client:
        [table] = await client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["tts-batch-steps"]))
        )
    assert len(sandbox.requests("status")) > 4
    assert {(step.name, step.state_name) for step in steps} == {
        ("say line-000", "Completed"),
        ("say line-001", "Completed"),
        ("say bad", "CONTENT_POLICY_VIOLATION"),
    }
    assert len(steps) == 3
    told = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [line.partition("(")[0] for line in told] == [
        "Finished in state CONTENT_POLICY_VIOLATION",
        "Finished in state TTS_BATCH_PARTIAL",
    ]
    assert table.type == "markdown"
    shown = [row for row in str(table.data).splitlines() if row.startswith("| ")][1:]
    assert ["CONTENT\\_POLICY\\_VIOLATION" in row for row in shown] == [True, False, False]
    assert ["[Listen](http" in row for row in shown] == [False, True, True]
    assert str(table.data).startswith("[Listen to all](http")
    assert str(table.description).startswith("2 of 3 lines have audio, ")


async def test_a_rerun_does_only_what_is_missing_or_has_changed(
    batch: dict[str, Any], save_to: str, sandbox: Sandbox
) -> None:
    lines = lines_of(6)
    await text_to_speech_batch(lines, **batch)
    audio_in(save_to)["line-001"].unlink()
    before = audio_in(save_to)["line-002"].read_bytes()
    lines[2]["text"] = "Something else altogether."

    rows = await text_to_speech_batch(lines, **batch)

    assert len(sandbox.ledger.charges) == 7
    assert len(sandbox.requests("audio")) == 8
    kept = f"line-002.{hashlib.sha256(before).hexdigest()[:8]}"
    assert sorted(audio_in(save_to)) == sorted([kept, *(row.id for row in rows)])
    assert audio_in(save_to)[kept].read_bytes() == before
    for row in rows:
        assert hashlib.sha256(Path(str(row.location)).read_bytes()).hexdigest() == row.sha256


async def test_limits_hold_across_the_lines(batch: dict[str, Any], sandbox: Sandbox) -> None:
    await text_to_speech_batch(
        lines_of(12, "[sandbox:wait 1] Line {}."), **{**batch, "requests_per_second": 10}, max_in_flight=3
    )
    under_way = 0
    times = []
    for request in sorted(sandbox.requests(), key=lambda request: request.received_at):
        if request.kind != "audio":
            times.append(request.received_at)
        under_way += {"submit": 1, "audio": -1}.get(request.kind, 0)
        assert under_way <= 3
    for first, eleventh in zip(times, times[12:], strict=False):
        assert eleventh - first > 0.9  # a window of a second and the two requests at its edges


async def test_a_known_price_above_the_limit_is_refused_before_anything_is_sent(
    batch: dict[str, Any], sandbox: Sandbox
) -> None:
    with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED: By the provider's catalogue this costs"):
        await text_to_speech_batch(lines_of(50), **batch, max_cost=Decimal("0.01"))
    assert sandbox.ledger.charges == []


async def test_lines_stop_once_the_limit_is_reached_and_go_on_with_a_higher_one(
    batch: dict[str, Any], sandbox: Sandbox
) -> None:
    lines = [{**line, "model": "Qwen-3-TTS-1.7B"} for line in lines_of(8)]
    error = await partial(lines=lines, **batch, max_cost=Decimal("0.000001"), max_in_flight=2)
    outcomes = Counter(row.outcome for row in error.rows)
    assert outcomes == {"completed": 1, "NOT_SUBMITTED": 7}
    assert len(sandbox.ledger.charges) == 1
    await text_to_speech_batch(lines, **batch)
    assert len(sandbox.ledger.charges) == 8


async def test_what_would_stop_every_line_stops_the_batch(batch: dict[str, Any], sandbox: Sandbox) -> None:
    sandbox.on_submit([Answer(402, json={"error": "Insufficient balance"})] * 20)
    error = await partial(lines=lines_of(20), **batch, max_in_flight=1)
    assert error.rows[0].outcome != "NOT_SUBMITTED"
    assert Counter(row.outcome for row in error.rows)["NOT_SUBMITTED"] == 19
    assert len(sandbox.requests("submit")) == 1


async def test_a_folder_that_cannot_take_more_stops_the_batch_before_it_pays(
    batch: dict[str, Any], save_to: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("prefect_nanogpt.storage.os.fsync", full)
        error = await partial(lines=lines_of(4), **batch, max_in_flight=1)
    assert error.rows[0].outcome == "STORAGE_FAILED"
    assert "No space left" in str(error.rows[0].detail)
    assert sandbox.ledger.charges == []
    await text_to_speech_batch(lines_of(4), **batch)
    assert len(sandbox.ledger.charges) == 4
    assert len(audio_in(save_to)) == 4


async def test_the_deadline_of_a_line_does_not_stop_the_submission_of_others(
    batch: dict[str, Any], sandbox: Sandbox
) -> None:
    slow_down = Answer(429, json={"error": "Rate limit exceeded"}, headers={"retry-after": "20"})
    sandbox.on_status(None, [slow_down])
    error = await partial(lines=lines_of(4), **batch, max_in_flight=1, timeout_seconds=10)
    assert [row.outcome for row in error.rows] == ["TTS_FAILED", "completed", "completed", "completed"]


async def test_a_daily_cap_stops_the_submission_of_others(batch: dict[str, Any], sandbox: Sandbox) -> None:
    cap = Answer(429, json={"error": {"message": "Enough for today", "code": "daily_usd_limit_exceeded"}})
    sandbox.on_submit([cap])
    error = await partial(lines=lines_of(3), **batch, max_in_flight=1)
    assert [row.outcome for row in error.rows] == ["DAILY_USD_LIMIT_EXCEEDED", "NOT_SUBMITTED", "NOT_SUBMITTED"]
    assert sandbox.ledger.charges == []


async def test_lines_that_are_paid_for_are_told_as_such_where_they_cannot_be_fetched(
    batch: dict[str, Any], save_to: str, sandbox: Sandbox
) -> None:
    lines = lines_of(3, "[sandbox:wait 3] Line {}.")
    first = await partial(lines=lines, **batch, timeout_seconds=0.3)
    wrong_key = Answer(401, json={"error": {"message": "Invalid key", "code": "invalid_api_key"}})
    sandbox.on_status(None, [wrong_key] * 3)
    error = await partial(lines=lines, **batch, max_in_flight=1)
    assert [row.outcome for row in error.rows] == ["INVALID_API_KEY", "UNFINISHED", "UNFINISHED"]
    assert [(row.ticket, row.cost) for row in error.rows] == [(row.ticket, row.cost) for row in first.rows]
    assert manifest_in(save_to) == {row.id: row for row in error.rows}


async def test_lines_that_were_or_may_have_been_charged_are_told_as_such_where_submissions_stop(
    batch: dict[str, Any], sandbox: Sandbox
) -> None:
    lines = [{"id": "uncertain", "text": "Who knows."}, {"id": "failed", "text": "[sandbox:fail] No."}]
    sandbox.on_submit([Accept(then=Cut())])
    first = await partial(lines=lines, **batch, max_in_flight=1)
    sandbox.on_submit([Answer(402, json={"error": "Insufficient balance"})])
    error = await partial(lines=[*lines_of(2), *lines], **batch, max_in_flight=1)
    assert [row.outcome for row in error.rows] == ["TTS_FAILED", "NOT_SUBMITTED", "SUBMISSION_UNCERTAIN", "TTS_FAILED"]
    assert [(row.ticket, row.cost) for row in error.rows[2:]] == [(row.ticket, row.cost) for row in first.rows]
    assert first.rows[1].ticket is not None
    assert "resubmit" in str(error.rows[2].detail)
    assert "Insufficient balance" in str(error.rows[3].detail)
    assert "except for lines whose jobs failed (1)" in str(error)


async def test_a_line_that_failed_is_said_to_be_charged_anew(batch: dict[str, Any], sandbox: Sandbox) -> None:
    error = await partial(lines=[{"id": "failed", "text": "[sandbox:fail] No."}], **batch)
    assert "except for lines whose jobs failed (1): they are submitted, and charged, anew" in str(error)
    assert "The others are saved" not in str(error)
    error = await partial(lines=[{"id": "stuck", "text": "[sandbox:stuck] No."}], **batch, timeout_seconds=0.3)
    assert "anew" not in str(error)


async def test_an_uncertain_line_is_not_paid_for_twice(batch: dict[str, Any], sandbox: Sandbox) -> None:
    sandbox.on_submit([Accept(then=Cut())])
    error = await partial(lines=lines_of(2), **batch, max_in_flight=1)
    assert [row.outcome for row in error.rows] == ["SUBMISSION_UNCERTAIN", "completed"]
    error = await partial(lines=lines_of(2), **batch)
    assert [row.outcome for row in error.rows] == ["SUBMISSION_UNCERTAIN", "completed"]
    assert len(sandbox.requests("submit")) == 2
    await text_to_speech_batch(lines_of(2), **batch, resubmit=["uncertain"])
    assert len(sandbox.requests("submit")) == 3


@pytest.mark.parametrize(("seconds_a_line", "written"), [(0.0, 6), (1_000.0, 2)])
async def test_the_more_lines_there_are_the_more_rarely_their_table_is_written(
    seconds_a_line: float, written: int, batch: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefect_nanogpt.flows.batch.PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr("prefect_nanogpt.flows.batch.PROGRESS_SECONDS_A_LINE", seconds_a_line)
    show, tables = Artifact.show, list[str]()

    async def counting(self: Artifact, table: str, *words: Any) -> None:
        tables.append(table)
        await show(self, table, *words)

    monkeypatch.setattr(Artifact, "show", counting)
    await text_to_speech_batch(lines_of(5), **batch)
    assert len(tables) == written


@pytest.fixture
def in_this_process(
    batch: dict[str, Any], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> dict[int, dict[str, Any]]:
    """Have shards run one after another in this process, and give their parameters."""
    monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
    monkeypatch.setenv("NANOGPT_BASE_URL", sandbox.base_url)
    given: dict[int, dict[str, Any]] = {}

    async def run(parameters: dict[int, dict[str, Any]], _: str | None) -> dict[int, State[Any]]:
        given.clear()
        given.update(parameters)
        states = {}
        for number, its in parameters.items():
            states[number] = await text_to_speech_batch(**{**its, "poll": batch["poll"]}, return_state=True)
        return states

    monkeypatch.setattr("prefect_nanogpt.flows.batch.run_shards", run)
    return given


class TestShards:
    """What needs no workers; with workers, see test_scale_out.py."""

    async def test_a_key_that_no_worker_could_load_is_refused(self, batch: dict[str, Any], sandbox: Sandbox) -> None:
        with pytest.raises(NanoGPTError, match="CREDENTIALS_NOT_SAVED"):
            await text_to_speech_batch(lines_of(4), **batch, shards=2)
        assert sandbox.requests("submit") == []

    async def test_a_shard_beyond_the_last_is_refused(self, batch: dict[str, Any], sandbox: Sandbox) -> None:
        with pytest.raises(NanoGPTError, match="INVALID_REQUEST: There is no shard 3 of 2"):
            await text_to_speech_batch(lines_of(4), **batch, shards=2, shard=3)
        assert sandbox.requests() == []

    async def test_a_deployment_that_is_not_there_is_named(
        self, batch: dict[str, Any], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
        monkeypatch.setenv("NANOGPT_BASE_URL", sandbox.base_url)
        with pytest.raises(NanoGPTError, match="DEPLOYMENT_NOT_FOUND: There is no deployment no/where"):
            await text_to_speech_batch(
                lines_of(4), **{**batch, "credentials": None}, shards=2, shard_deployment="no/where"
            )
        assert sandbox.requests("submit") == []

    async def test_a_shard_whose_run_is_deleted_has_ended_and_its_lines_are_told(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
        monkeypatch.setenv("NANOGPT_BASE_URL", sandbox.base_url)
        here = {**batch, "credentials": None}
        async with get_client() as client:
            flow_id = await client.create_flow(text_to_speech_batch)
            deployment = await client.create_deployment(flow_id, "deleted")
            elsewhere = {"shards": 2, "shard_deployment": "text-to-speech-batch/deleted"}
            whole = asyncio.create_task(text_to_speech_batch(lines_of(4), **here, **elsewhere, return_state=True))

            async def both() -> list[FlowRun] | None:
                found = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
                runs = await client.read_flow_runs(deployment_filter=found)
                return runs if len(runs) == 2 else None

            runs = await eventually(both)
            await text_to_speech_batch(lines_of(4)[::2], **here, shards=2, shard=1)
            for run in runs:
                await client.delete_flow_run(run.id)
            error = await (await whole).aresult(raise_on_failure=False)
        assert isinstance(error, BatchPartial)
        outcomes = ["completed", "NOT_SUBMITTED", "completed", "NOT_SUBMITTED"]
        assert [row.outcome for row in error.rows] == outcomes
        assert [row.outcome for row in manifest_in(save_to).values()] == outcomes
        assert "was deleted" in str(error.rows[1].detail)

    async def test_lines_without_audio_are_told_with_their_tickets_and_as_uncertain_where_they_are(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox, in_this_process: dict[int, dict[str, Any]]
    ) -> None:
        lines = [{"id": "stuck", "text": "[sandbox:stuck] A."}, {"id": "failed", "text": "[sandbox:fail] B."}]
        lines.append({"id": "uncertain", "text": "C."})
        # As a process leaves it that was killed while the request was in the air.
        ledger = Ledger(Destination(save_to))
        [line] = read_lines(lines[2:], {"model": DEFAULT_MODEL})
        claim = ledger.claim(Job(sandbox.base_url, line.request, 1, line.id), 1)
        assert claim is not None
        ledger.release(claim)
        error = await partial(lines=lines, **{**batch, "credentials": None}, shards=3, timeout_seconds=0.5)
        assert [row.outcome for row in error.rows] == ["UNFINISHED", "TTS_FAILED", "SUBMISSION_UNCERTAIN"]
        tickets = {row.ticket.run_id for row in error.rows if row.ticket}
        assert tickets == {charge.run_id for charge in sandbox.ledger.charges}
        assert "resubmit" in str(error.rows[2].detail)

    async def test_a_limit_that_is_enough_for_the_whole_is_enough_for_its_shards(
        self, batch: dict[str, Any], sandbox: Sandbox, in_this_process: dict[int, dict[str, Any]]
    ) -> None:
        price, long = Decimal("0.06"), "{:01000d}"
        here = {**batch, "credentials": None, "shards": 2}
        # The lines of one shard are paid for.
        lines = lines_of(4, "[sandbox:wait 1] {:0983d}")
        await partial(lines=lines[::2], **{**batch, "credentials": None}, timeout_seconds=0.3)
        await text_to_speech_batch(lines, **here, max_cost=4 * price)
        # Two shards have the same text.
        equal = [{"id": "a", "text": long.format(7)}, {"id": "b", "text": long.format(7)}, *lines_of(1, long)]
        await text_to_speech_batch(equal, **here, max_cost=2 * price)
        assert [parameters["max_cost"] for parameters in in_this_process.values()] == ["0.12"]
        assert sandbox.ledger.charged_total == 6 * price

    async def test_each_shard_is_given_its_own_lines_as_they_were_written_and_says_all_of_them(
        self, batch: dict[str, Any], sandbox: Sandbox, in_this_process: dict[int, dict[str, Any]]
    ) -> None:
        lines = [
            {"ID": number, "Text ": f"NATO and {number % 5} more.", "#": "x" * 1_000, "option.seed": numpy.int64(7)}
            for number in range(12)
        ]
        here = {**batch, "credentials": None, "shards": 3}

        rows = await text_to_speech_batch(lines, **here, pronounce={"NATO": "nay-toh"})

        assert [row.id for row in rows] == [str(number) for number in range(12)]
        assert all(row.is_completed and row.said_as == row.text.replace("NATO", "nay-toh") for row in rows)
        given = {number: its["lines"] for number, its in in_this_process.items()}
        assert {number: {row["ID"] for row in its} for number, its in given.items()} == {
            1: {0, 3, 5, 8, 10},
            2: {1, 4, 6, 9, 11},
            3: {2, 7},
        }
        whole = [{**line, "option.seed": 7} for line in lines]
        assert sorted(itertools.chain(*given.values()), key=lambda row: row["ID"]) == whole
        assert sum(len(json.dumps(its)) for its in given.values()) <= len(json.dumps(whole)) + 3
        assert len(sandbox.ledger.charges) == 5

    async def test_each_shard_takes_its_own_lines_of_a_file(
        self, batch: dict[str, Any], tmp_path: Path, sandbox: Sandbox, in_this_process: dict[int, dict[str, Any]]
    ) -> None:
        file = tmp_path / "lines.json"
        file.write_text(json.dumps(lines_of(5)))
        rows = await text_to_speech_batch(file, **{**batch, "credentials": None, "shards": 2})
        assert all(row.is_completed for row in rows)
        assert [its["lines"] for its in in_this_process.values()] == [str(file)] * 2
        assert len(sandbox.ledger.charges) == 5

    async def test_a_rerun_starts_shards_only_where_lines_are_missing(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox, in_this_process: dict[int, dict[str, Any]]
    ) -> None:
        here = {**batch, "credentials": None, "shards": 3}
        await text_to_speech_batch(lines_of(6), **here)
        audio_in(save_to)["line-004"].unlink()
        await text_to_speech_batch(lines_of(6), **here)
        given = {number: [row["id"] for row in its["lines"]] for number, its in in_this_process.items()}
        assert given == {2: ["line-001", "line-004"]}
        assert len(sandbox.ledger.charges) == 6

    async def test_a_shard_of_a_file_does_its_own_lines_and_the_whole_gathers_them(
        self, batch: dict[str, Any], save_to: str, tmp_path: Path, sandbox: Sandbox
    ) -> None:
        lines, file = lines_of(5), tmp_path / "lines.json"
        file.write_text(json.dumps(lines))
        rows = await text_to_speech_batch(file, **batch, shards=2, shard=2)
        assert [row.id for row in rows] == ["line-001", "line-003"]
        assert not (Path(save_to) / "manifest.jsonl").exists()  # it is the whole's to write

        rows = await text_to_speech_batch(lines, **batch)

        assert [row.id for row in rows] == [line["id"] for line in lines]
        assert manifest_in(save_to).keys() == {line["id"] for line in lines}
        assert len(sandbox.ledger.charges) == 5

    async def test_a_line_that_was_paid_for_in_a_shard_is_not_paid_for_in_another(
        self, batch: dict[str, Any], tmp_path: Path, sandbox: Sandbox
    ) -> None:
        file = tmp_path / "lines.json"
        file.write_text(json.dumps(lines_of(4)))
        sandbox.on_audio(None, itertools.repeat(Answer(404)))
        await partial(lines=file, **batch, shards=2, shard=1)
        sandbox.on_audio(None, [None])
        await partial(lines=file, **batch, shards=4, shard=3)
        assert len(sandbox.ledger.charges) == 2

    async def test_shards_are_told_their_share_and_no_key_and_are_stopped_with_the_whole(
        self, batch: dict[str, Any], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
        monkeypatch.setenv("NANOGPT_BASE_URL", sandbox.base_url)
        async with get_client() as client:
            flow_id = await client.create_flow(text_to_speech_batch)
            deployment = await client.create_deployment(flow_id, "idle")
            whole = asyncio.create_task(
                text_to_speech_batch(
                    lines_of(4),
                    **{**batch, "credentials": None, "requests_per_second": 10.0},
                    max_in_flight=8,
                    max_cost=Decimal(2),
                    shards=2,
                    shard_deployment="text-to-speech-batch/idle",
                )
            )

            async def shards() -> list[FlowRun]:
                found = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
                return await client.read_flow_runs(deployment_filter=found)

            async def both() -> list[FlowRun] | None:
                runs = await shards()
                return runs if len(runs) == 2 else None

            runs = sorted(await eventually(both), key=lambda run: run.parameters["shard"])
            whole.cancel()
            with pytest.raises(asyncio.CancelledError):
                await whole
            stopped = {run.state_name for run in await shards()}

        assert stopped <= {"Cancelling", "Cancelled"}
        assert [run.parameters["shard"] for run in runs] == [1, 2]
        for run in runs:
            assert (run.parameters["max_in_flight"], run.parameters["requests_per_second"]) == (4, 5.0)
            assert Decimal(run.parameters["max_cost"]) == 1
            assert API_KEY not in str(run.parameters)

    async def test_the_shares_of_the_cost_limit_and_what_is_spent_add_up_to_it(
        self, batch: dict[str, Any], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
        monkeypatch.setenv("NANOGPT_BASE_URL", sandbox.base_url)
        lines = [{"id": str(number), "text": "x" * (number + 1)} for number in range(10)]
        given: dict[int, dict[str, Any]] = {}

        async def taken_down(parameters: dict[int, dict[str, Any]], _: str | None) -> dict[int, State[Any]]:
            given.update(parameters)
            return {}

        monkeypatch.setattr("prefect_nanogpt.flows.batch.run_shards", taken_down)
        await text_to_speech_batch(lines[:4], **batch)
        error = await partial(lines=lines, **{**batch, "credentials": None}, max_cost=Decimal(6), shards=3)

        assert Counter(row.outcome for row in error.rows) == {"completed": 4, "NOT_SUBMITTED": 6}
        assert list(given) == [1, 2, 3]
        assert sum(Decimal(parameters["max_cost"]) for parameters in given.values()) == pytest.approx(Decimal(6))
        spent = sum(charge.amount for charge in sandbox.ledger.charges if charge.text_length in (1, 4))
        left = 6 - sandbox.ledger.charged_total
        assert Decimal(given[1]["max_cost"]) == pytest.approx(spent + left * 17 / 45)  # texts of 7 and 10 of 45


def started(file: Path, save_to: str, sandbox: Sandbox, **parameters: Any) -> subprocess.Popen[bytes]:
    """Start a process that runs a batch, as a new flow run each time."""
    return start("tests.batching", str(file), save_to, json.dumps(parameters), sandbox=sandbox)


def table(file: Path, count: int, slow: int = 0) -> Path:
    """Write a table of lines of which one in ten is rejected and one in twenty meets a busy provider; the first so many
    take long enough to be all under way at once."""
    with file.open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["id", "text"])
        for number in range(count):
            fate = {3: "[sandbox:reject] ", 7: "[sandbox:busy 2] " if number % 20 == 7 else ""}.get(number % 10, "")
            fate += "[sandbox:wait 25] " if number < slow else ""
            rows.writerow([f"line-{number:03}", f"{fate}This is line number {number}."])
    return file


def outcomes_once_paid(save_to: str, sandbox: Sandbox) -> Counter[str]:
    """Check that no line was paid for twice and that the manifest tells of the files that there are, and count."""
    submitted = Counter(request.json["text"] for request in sandbox.requests("submit"))
    assert set(submitted.values()) == {1}
    rows = manifest_in(save_to)
    files = audio_in(save_to)
    assert set(files) == {row.id for row in rows.values() if row.is_completed}
    for line_id, file in files.items():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == rows[line_id].sha256
    return Counter(row.outcome for row in rows.values())


def test_two_hundred_lines_with_a_kill_in_the_middle(tmp_path: Path, save_to: str) -> None:
    file = table(tmp_path / "lines.csv", 200, slow=100)
    with Sandbox(job_seconds=1.0, speak=False) as sandbox:
        first = started(file, save_to, sandbox, max_in_flight=100)
        # All places are taken from the hundredth submission on until the first jobs are done, so none is uncertain.
        sandbox.wait_for_request("submit", count=100, timeout=120)
        time.sleep(2)
        first.kill()
        first.wait()

        assert started(file, save_to, sandbox).wait(timeout=180) == 0

        assert outcomes_once_paid(save_to, sandbox) == {"completed": 180, "CONTENT_POLICY_VIOLATION": 20}
        assert len(sandbox.ledger.charges) == 200


def serve_prefect(home: Path, port: int) -> subprocess.Popen[bytes]:
    """Start a Prefect server with its database in `home`, and wait until it answers."""
    uvicorn = ["uvicorn", "--factory", "prefect.server.api.server:create_app"]
    server = subprocess.Popen(
        [*PREFECT_SERVER, *uvicorn, "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "PREFECT_HOME": str(home)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_server(f"http://127.0.0.1:{port}/api/health")
    return server


@pytest.mark.timeout(420)
def test_an_outage_of_the_provider_and_a_restart_of_the_prefect_server(tmp_path: Path, save_to: str) -> None:
    file = table(tmp_path / "lines.csv", 40)
    port = free_port()

    def down_for_a_minute() -> Iterator[Answer]:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            yield Answer(503)

    server = serve_prefect(tmp_path / "server", port)
    try:
        with Sandbox(job_seconds=2.0, speak=False) as sandbox:
            sandbox.on_status(None, down_for_a_minute())
            process = start(
                "tests.batching",
                str(file),
                save_to,
                sandbox=sandbox,
                PREFECT_API_URL=f"http://127.0.0.1:{port}/api",
            )
            sandbox.wait_for_request("submit", count=40, timeout=120)
            server.terminate()
            server.wait()
            server = serve_prefect(tmp_path / "server", port)

            assert process.wait(timeout=240) == 0

            assert outcomes_once_paid(save_to, sandbox) == {"completed": 36, "CONTENT_POLICY_VIOLATION": 4}
            assert len(sandbox.ledger.charges) == 40
    finally:
        server.terminate()
        server.wait()


def in_the_air(save_to: str) -> set[str]:
    """The tries that were sent and of which no answer is noted."""
    notes = {note.name.removesuffix(".json") for note in Path(save_to, ".nanogpt").glob("*.json")}
    tries = Counter(note.rpartition(".")[0] for note in notes)
    return {note for note in notes if note.endswith(".sent") and tries[note.rpartition(".")[0]] == 1}


def test_kills_at_random_moments(tmp_path: Path, save_to: str, sandbox: Sandbox) -> None:
    """A process that dies while a submission is under way leaves a line of which nobody knows: it is not paid again."""
    count = 120
    file = table(tmp_path / "lines.csv", count)
    moments = random.Random(os.environ.get("SEED", "lines"))
    unanswered = 0
    for _ in range(int(os.environ.get("KILLS", "3"))):
        process = started(file, save_to, sandbox)
        had = len(sandbox.requests())
        deadline = time.monotonic() + 60
        while len(sandbox.requests()) == had and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        before, unanswered = unanswered, len(in_the_air(save_to))
        assert unanswered - before <= SUBMISSIONS_AT_ONCE

    assert started(file, save_to, sandbox).wait(timeout=180) == 0

    outcomes = outcomes_once_paid(save_to, sandbox)
    uncertain = outcomes.pop("SUBMISSION_UNCERTAIN", 0)
    assert outcomes.keys() == {"completed", "CONTENT_POLICY_VIOLATION"}
    assert uncertain == unanswered
    assert outcomes.total() + uncertain == count
    assert len(sandbox.ledger.charges) <= count
    assert not [path for path in Path(save_to).iterdir() if path.name.endswith(".part")]
