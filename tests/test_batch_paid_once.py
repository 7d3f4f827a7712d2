"""A batch pays for each line once, whatever happens around it; charges are counted at the provider."""

import asyncio
import csv
import errno
import hashlib
import json
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from decimal import Decimal
from itertools import repeat
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
)
from pydantic import SecretStr

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import BatchPartial, NanoGPTError, StorageError
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch
from prefect_nanogpt.ledger import Job, Ledger
from prefect_nanogpt.lines import ManifestRow, read_lines
from prefect_nanogpt.models import DEFAULT_MODEL
from prefect_nanogpt.sandbox import Accept, Answer, Cut, Sandbox
from tests.conftest import API_KEY, free_port, start
from tests.s3_server import S3Server, s3, s3_env
from tests.test_batch import (
    audio_in,
    batch,
    ended_task_runs,
    in_the_air,
    lines_of,
    manifest_in,
    partial,
    serve_prefect,
    started,
)

__all__ = ["batch", "s3", "s3_env"]

# 1,000 characters, for which the default model takes 0.06 USD.
LONG = "{:01000d}"
PRICE = Decimal("0.06")


def table_of(lines: list[dict[str, Any]], file: Path) -> Path:
    with file.open("w", newline="") as out:
        rows = csv.DictWriter(out, list(lines[0]))
        rows.writeheader()
        rows.writerows(lines)
    return file


def assert_complete(rows: list[ManifestRow], save_to: str, sandbox: Sandbox) -> None:
    """Check that each row tells of a file in the folder which is the audio of its ticket."""
    for row in rows:
        assert row.is_completed, row
        assert row.ticket is not None
        assert Path(str(row.location)).parent == Path(save_to)
        assert Path(str(row.location)).stem == row.id
        assert Path(str(row.location)).read_bytes() == sandbox.audio_bytes(row.ticket.run_id)


class TestAtOnce:
    async def test_in_two_processes_it_is_charged_once_and_both_complete(
        self, tmp_path: Path, save_to: str, sandbox: Sandbox
    ) -> None:
        file = table_of(lines_of(20), tmp_path / f"at-once-{free_port()}.csv")
        sandbox.on_submit([Accept(delay=0.5)] * 20)
        both = [started(file, save_to, sandbox) for _ in range(2)]
        assert [process.wait(timeout=120) for process in both] == [0, 0]
        async with get_client() as client:
            runs = await client.read_flow_runs(flow_run_filter=FlowRunFilter(name={"any_": [f"tts-batch-{file.name}"]}))
        assert [run.state_name for run in runs] == ["Completed", "Completed"]
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 20
        assert_complete(list(manifest_in(save_to).values()), save_to, sandbox)
        assert in_the_air(save_to) == set()

    async def test_twice_in_one_process_it_is_charged_once_and_both_complete(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        sandbox.on_submit([Accept(delay=0.5)] * 20)
        both = await asyncio.gather(*(text_to_speech_batch(lines_of(20), **batch) for _ in range(2)))
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 20
        for rows in both:
            assert_complete(rows, save_to, sandbox)

    def test_two_shards_begun_twice_are_charged_once(self, tmp_path: Path, save_to: str, sandbox: Sandbox) -> None:
        file = table_of(lines_of(12), tmp_path / "lines.csv")
        sandbox.on_submit([Accept(delay=0.5)] * 12)
        shards = [started(file, save_to, sandbox, shards=2, shard=shard) for shard in (1, 2, 1, 2)]
        assert [process.wait(timeout=120) for process in shards] == [0, 0, 0, 0]
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 12
        assert sorted(audio_in(save_to)) == [line["id"] for line in lines_of(12)]
        assert in_the_air(save_to) == set()

    async def test_lines_that_swap_texts_each_have_the_audio_of_their_own(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        lines = lines_of(60)
        for _ in range(4):
            assert_complete(await text_to_speech_batch(lines, **batch), save_to, sandbox)
            texts = [line["text"] for line in lines]
            lines = [{"id": line["id"], "text": texts[index ^ 1]} for index, line in enumerate(lines)]
        assert len(sandbox.ledger.charges) == 60


class TestEqualLines:
    async def test_they_are_one_job_and_several_files(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        lines = [{"id": line_id, "text": "The jingle."} for line_id in "abc"] + lines_of(2)
        rows = await text_to_speech_batch(lines, **batch)
        assert_complete(rows, save_to, sandbox)
        assert len(sandbox.ledger.charges) == 3
        assert sum(row.cost or 0 for row in rows) == sandbox.ledger.charged_total
        assert len({row.job for row in rows[:3]}) == 1

        more = await text_to_speech_batch([*lines, {"id": "d", "text": "The jingle."}], **batch)
        assert_complete(more, save_to, sandbox)
        assert len(sandbox.requests("submit")) == 3

    async def test_they_fail_together_and_are_charged_once(self, batch: dict[str, Any], sandbox: Sandbox) -> None:
        error = await partial(lines=[{"id": line_id, "text": "[sandbox:reject] No."} for line_id in "abc"], **batch)
        assert [row.outcome for row in error.rows] == ["CONTENT_POLICY_VIOLATION"] * 3
        assert sum(row.cost or 0 for row in error.rows) == sandbox.ledger.charged_total
        assert len(sandbox.ledger.charges) == 1

    async def test_another_take_is_another_job(self, batch: dict[str, Any], sandbox: Sandbox) -> None:
        lines = [{"id": "a", "text": "The jingle."}, {"id": "b", "text": "The jingle.", "take": 2}]
        rows = await text_to_speech_batch(lines, **batch)
        assert len({row.job for row in rows}) == len(sandbox.ledger.charges) == 2

    async def test_another_voice_is_another_job(self, batch: dict[str, Any], save_to: str, sandbox: Sandbox) -> None:
        await text_to_speech_batch(lines_of(2), **batch, voice="Rachel")
        await text_to_speech_batch(lines_of(2), **batch, voice="Adam")
        assert len(sandbox.ledger.charges) == 4
        rows = await text_to_speech_batch(lines_of(2), **batch, voice="Rachel")
        assert len(sandbox.ledger.charges) == 4
        assert_complete(rows, save_to, sandbox)


class TestFullDisk:
    async def test_it_fills_while_submissions_are_in_the_air(
        self,
        batch: dict[str, Any],
        save_to: str,
        sandbox: Sandbox,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        in_the_air_at_once, lines = 16, lines_of(20)
        sandbox.on_submit([Accept(delay=1.0)] * in_the_air_at_once)
        fsync = os.fsync

        def fills_up(descriptor: int) -> None:
            if len(sandbox.requests("submit")) >= in_the_air_at_once:
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        with patch("os.fsync", fills_up):
            error = await partial(lines=lines, **batch, max_in_flight=in_the_air_at_once)
        charged = {charge.run_id for charge in sandbox.ledger.charges}
        assert len(charged) == in_the_air_at_once
        assert {row.ticket.run_id for row in error.rows if row.ticket} == charged
        assert {row.outcome for row in error.rows} == {"STORAGE_FAILED", "NOT_SUBMITTED"}
        for run_id in charged:
            assert run_id in caplog.text

        rows = await text_to_speech_batch(lines, **batch)
        assert_complete(rows, save_to, sandbox)
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 20

    async def test_it_is_full_for_a_moment_when_the_answers_come(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        link, refused = os.link, Counter[str]()

        def full_for_a_moment(source: Any, target: Any) -> None:
            if str(target).endswith(".answer.json") and not refused[str(target)]:
                refused[str(target)] += 1
                raise OSError(errno.ENOSPC, "No space left on device")
            link(source, target)

        with patch("os.link", full_for_a_moment):
            rows = await text_to_speech_batch(lines_of(16), **batch)
        assert len(refused) == 16
        assert_complete(rows, save_to, sandbox)
        assert len(sandbox.ledger.charges) == 16

    async def test_the_manifest_cannot_be_written_while_submissions_are_in_the_air(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("prefect_nanogpt.lines.REWRITE_SECONDS", 0.0)
        sandbox.on_submit([None, *[Accept(delay=0.5)] * 16])
        replace, refused = os.replace, []

        def full(source: Any, target: Any) -> None:
            if str(target).endswith("manifest.jsonl"):
                refused.append(target)
                raise OSError(errno.ENOSPC, "No space left on device")
            replace(source, target)

        with patch("os.replace", full):
            rows = await text_to_speech_batch(lines_of(20), **batch, max_in_flight=17)
        assert len(refused) > 1
        assert_complete(rows, save_to, sandbox)
        asked = len(sandbox.requests())
        assert await text_to_speech_batch(lines_of(20), **batch) == rows
        assert len(sandbox.requests()) == asked
        assert len(sandbox.ledger.charges) == 20

    async def test_equal_lines_have_their_audio_also_where_that_of_the_first_cannot_be_noted(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        link = os.link

        def full(source: Any, target: Any) -> None:
            if ".saved-" in str(target):
                raise OSError(errno.ENOSPC, "No space left on device")
            link(source, target)

        lines = [{"id": "a", "text": "Same."}, {"id": "b", "text": "Same."}, *lines_of(2)]
        with patch("os.link", full):
            assert_complete(await text_to_speech_batch(lines, **batch, max_in_flight=1), save_to, sandbox)
        Ledger._unwritten.clear()  # as in another process
        assert_complete(await text_to_speech_batch(lines, **batch), save_to, sandbox)
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 3


class TestStorageThatCannotBeRead:
    @pytest.mark.parametrize("what", [".nanogpt", "audio"])
    async def test_nothing_is_submitted_while_the_folders_cannot_be_listed(
        self, what: str, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        await text_to_speech_batch(lines_of(3), **batch)
        asked = len(sandbox.requests())

        def unreadable(listing: Callable[..., Any]) -> Callable[..., Any]:
            def listed(path: Any = ".") -> Any:
                if str(path).endswith(what):
                    raise OSError(errno.EIO, "Input/output error")
                return listing(path)

            return listed

        with (
            patch("os.scandir", unreadable(os.scandir)),
            patch("os.listdir", unreadable(os.listdir)),
            pytest.raises(StorageError, match="Input/output error"),
        ):
            await text_to_speech_batch(lines_of(4), **batch)
        assert len(sandbox.requests()) == asked
        rows = await text_to_speech_batch(lines_of(4), **batch)
        assert_complete(rows, save_to, sandbox)
        assert len(sandbox.ledger.charges) == 4

    @pytest.mark.parametrize("what", ["manifest.jsonl", ".answer.json"])
    async def test_nothing_is_submitted_while_the_manifest_or_the_notes_cannot_be_read(
        self, what: str, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        stuck = lines_of(3, "[sandbox:wait 3] Line {}.")
        await partial(lines=stuck, **batch, timeout_seconds=0.5)
        asked = len(sandbox.requests())
        read = Path.read_bytes

        def unreadable(path: Path) -> bytes:
            if path.name.endswith(what):
                raise OSError(errno.EIO, "Input/output error")
            return read(path)

        with patch.object(Path, "read_bytes", unreadable):
            state = await text_to_speech_batch(stuck, **batch, return_state=True)
        error = await state.aresult(raise_on_failure=False)
        assert isinstance(error, NanoGPTError)
        assert "STORAGE_FAILED" in str(error)
        assert "Input/output" in (str(error.rows) if isinstance(error, BatchPartial) else str(error))
        assert len(sandbox.requests()) == asked
        rows = await text_to_speech_batch(stuck, **batch)
        assert_complete(rows, save_to, sandbox)
        assert len(sandbox.ledger.charges) == 3

    async def test_a_retry_goes_on_once_a_remote_folder_can_be_read_again(
        self, batch: dict[str, Any], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        into_memory = {**batch, "save_to": "memory://speech/paid-once"}
        try:
            first = await text_to_speech_batch(lines_of(3), **into_memory)
            ls, failures = MemoryFileSystem.ls, [ConnectionError("The store does not answer")]

            def out_of_reach(self: MemoryFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
                if failures and path.endswith(".nanogpt"):
                    raise failures.pop()
                return ls(self, path, *args, **kwargs)

            monkeypatch.setattr(MemoryFileSystem, "ls", out_of_reach)
            asked = len(sandbox.requests())
            again = await text_to_speech_batch.with_options(retries=1)(lines_of(3), **into_memory)
        finally:
            MemoryFileSystem.store.clear()
        assert (failures, again) == ([], first)
        assert len(sandbox.requests()) == asked


def renamed(folder: Path) -> Path:
    return folder.rename(folder.with_name("moved"))


def symlinked(folder: Path) -> Path:
    link = folder.with_name("link")
    link.symlink_to(folder)
    return link


def behind_a_symlink(folder: Path) -> Path:
    folder.rename(folder.with_name("elsewhere"))
    folder.symlink_to(folder.with_name("elsewhere"))
    return folder


def spelled_with_dots(folder: Path) -> Path:
    return folder / ".." / folder.name


def copied_to_another_machine(folder: Path) -> Path:
    (there := folder.parent / "mounted" / "deeper").mkdir(parents=True)
    return folder.rename(there / "audio")


class TestFolders:
    @pytest.mark.parametrize(
        "change", [renamed, symlinked, behind_a_symlink, spelled_with_dots, copied_to_another_machine]
    )
    async def test_a_folder_under_another_name_is_complete_without_a_request(
        self, change: Callable[[Path], Path], batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        lines = [*lines_of(3), {"id": "same", "text": "Line 0 of many."}]
        await text_to_speech_batch(lines, **batch)
        asked = len(sandbox.requests())
        now = change(Path(save_to))
        rows = await text_to_speech_batch(lines, **{**batch, "save_to": now})
        assert len(sandbox.requests()) == asked
        assert_complete(rows, os.path.abspath(now), sandbox)
        assert [row.id for row in rows] == [line["id"] for line in lines]

    @pytest.mark.parametrize(
        "harm",
        [
            lambda content: content[: len(content) // 2],
            lambda content: b"",
            lambda content: b"\xff\x00{}\n[]\nnull\n" + content[10:],
            None,
        ],
        ids=["torn", "empty", "garbage", "deleted"],
    )
    async def test_a_harmed_manifest_costs_nothing(
        self, harm: Callable[[bytes], bytes] | None, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        rows = await text_to_speech_batch(lines_of(6), **batch)
        asked = len(sandbox.requests())
        manifest = Path(save_to, "manifest.jsonl")
        before = manifest.read_bytes()
        if harm:
            manifest.write_bytes(harm(before))
        else:
            manifest.unlink()
        assert await text_to_speech_batch(lines_of(6), **batch) == rows
        assert manifest.read_bytes() == before
        assert len(sandbox.requests()) == asked

    async def test_other_texts_under_the_same_ids_are_told_and_the_old_audio_is_kept(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox, caplog: pytest.LogCaptureFixture
    ) -> None:
        before = await text_to_speech_batch(lines_of(3), **batch)
        lines = [*lines_of(2, "Another table, line {}."), lines_of(3)[2]]
        rows = await text_to_speech_batch(lines, **batch, artifact_key="tts-other-texts")
        assert_complete(rows, save_to, sandbox)
        assert len(sandbox.ledger.charges) == 5
        for row in before[:2]:
            kept = audio_in(save_to)[f"{row.id}.{str(row.sha256)[:8]}"]
            assert hashlib.sha256(kept.read_bytes()).hexdigest() == row.sha256
        assert len(audio_in(save_to)) == 5
        async with get_client() as client:
            [table] = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["tts-other-texts"]))
            )
        for said in (caplog.text, str(table.description)):
            assert "2 lines have another text than" in said

        asked = len(sandbox.requests())
        rows = await text_to_speech_batch(lines_of(3), **batch)
        assert_complete(rows, save_to, sandbox)
        assert len(sandbox.requests()) == asked

    async def test_rows_of_another_table_that_ended_meanwhile_are_kept(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        slow = asyncio.create_task(
            text_to_speech_batch([{"id": "slow", "text": "[sandbox:wait 4] Slow."}], **{**batch, "save_to": save_to})
        )
        await asyncio.to_thread(sandbox.wait_for_request, "submit")
        await text_to_speech_batch(lines_of(2), **batch)
        await slow
        assert manifest_in(save_to).keys() == {"slow", "line-000", "line-001"}

    async def test_audio_of_another_text_is_not_taken_for_that_of_a_line_because_of_its_size(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        lines = [{"id": "a", "text": "Line one."}]
        [first] = await text_to_speech_batch(lines, **batch)
        other = bytearray(Path(str(first.location)).read_bytes())
        other[-50] ^= 0xFF  # a recording of the same length
        sandbox.on_audio(None, [Answer(body=bytes(other), headers={"content-type": "audio/mpeg"})])
        how = {name: batch[name] for name in ("credentials", "save_to", "poll")}
        await text_to_speech("Line two.", name="a", **how)
        assert Path(str(first.location)).read_bytes() == other
        [again] = await text_to_speech_batch(lines, **batch)
        assert_complete([again], save_to, sandbox)
        assert len(sandbox.ledger.charges) == 2

    async def test_a_row_that_does_not_say_where_the_audio_is_settles_nothing(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        [row] = await text_to_speech_batch(lines_of(1), **batch)
        bare = {"id": row.id, "text": row.text, "outcome": "completed", "job": row.job}
        Path(save_to, "manifest.jsonl").write_text(json.dumps(bare) + "\n")
        assert await text_to_speech_batch(lines_of(1), **batch) == [row]

    async def test_a_sandbox_is_not_taken_for_the_provider(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        await text_to_speech_batch(lines_of(3), **batch)
        with Sandbox(job_seconds=0.0, speak=False) as provider:
            real = NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url=provider.base_url)
            rows = await text_to_speech_batch(lines_of(3), **{**batch, "credentials": real})
            assert len(provider.ledger.charges) == 3
            assert_complete(rows, save_to, provider)
        assert len(sandbox.ledger.charges) == 3


class TestInterruption:
    async def test_cancellation_keeps_the_tickets_of_what_is_in_the_air(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        sandbox.on_submit([Accept(delay=1.0)] * 8)
        run = asyncio.create_task(text_to_speech_batch(lines_of(20), **batch, max_in_flight=8))
        await asyncio.to_thread(sandbox.wait_for_request, "submit", 8)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert len(sandbox.ledger.charges) == 8
        assert in_the_air(save_to) == set()
        rows = await text_to_speech_batch(lines_of(20), **batch)
        assert_complete(rows, save_to, sandbox)
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 20

    def test_sigterm_keeps_the_tickets_of_what_is_in_the_air(
        self, tmp_path: Path, save_to: str, sandbox: Sandbox
    ) -> None:
        file = table_of(lines_of(20), tmp_path / "lines.csv")
        sandbox.on_submit([Accept(delay=3.0)] * 8)
        process = started(file, save_to, sandbox, max_in_flight=8)
        sandbox.wait_for_request("submit", count=8, timeout=60)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) != 0
        assert len(sandbox.ledger.charges) == 8
        assert in_the_air(save_to) == set()
        assert started(file, save_to, sandbox).wait(timeout=120) == 0
        assert_complete(list(manifest_in(save_to).values()), save_to, sandbox)
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 20

    def test_a_kill_with_a_queue_behind_a_rate_limit_leaves_uncertain_only_what_was_in_the_air(
        self, tmp_path: Path, save_to: str, sandbox: Sandbox
    ) -> None:
        file = table_of(lines_of(20, "[sandbox:wait 60] Line {}."), tmp_path / "lines.csv")
        sandbox.on_submit([None, None, Accept(delay=60)])
        process = started(file, save_to, sandbox, requests_per_second=1)
        sandbox.wait_for_request("submit", count=3, timeout=60)
        process.kill()
        process.wait()
        answered = {note.name.split(".")[0] for note in Path(save_to, ".nanogpt").glob("*.answer.json")}
        assert (len(answered), len(in_the_air(save_to))) == (2, 1)

        assert started(file, save_to, sandbox, timeout_seconds=1).wait(timeout=120) == 0
        outcomes = Counter(row.outcome for row in manifest_in(save_to).values())
        assert outcomes == {"SUBMISSION_UNCERTAIN": 1, "TTS_TIMEOUT": 19}
        assert len(sandbox.ledger.charges) == len(sandbox.requests("submit")) == 20


class TestLimitOfCost:
    async def test_failed_tries_of_earlier_runs_count(self, batch: dict[str, Any], sandbox: Sandbox) -> None:
        lines = lines_of(3, "[sandbox:fail] {:0985d}")
        limit = 7 * PRICE
        outcomes = []
        for _ in range(4):
            state = await text_to_speech_batch(lines, **batch, max_cost=limit, return_state=True)
            outcomes.append(state.name)
            assert sandbox.ledger.charged_total <= limit
        assert outcomes == ["TTS_BATCH_PARTIAL"] * 2 + ["COST_LIMIT_EXCEEDED"] * 2
        assert sandbox.ledger.charged_total == 6 * PRICE

    async def test_it_holds_without_the_manifest_too(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        await text_to_speech_batch(lines_of(3, LONG), **batch)
        Path(save_to, "manifest.jsonl").unlink()
        with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED"):
            await text_to_speech_batch(lines_of(5, LONG), **batch, max_cost=4 * PRICE)
        assert len(sandbox.ledger.charges) == 3

    async def test_what_is_paid_for_is_fetched_under_the_limit_that_it_was_paid_under(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        attempts = 4
        sandbox.on_audio(None, [Answer(404)] * (3 * attempts))
        limit = 3 * PRICE
        await partial(lines=lines_of(3, LONG), **batch, max_cost=limit)
        assert sandbox.ledger.charged_total == limit
        rows = await text_to_speech_batch(lines_of(3, LONG), **batch, max_cost=limit)
        assert_complete(rows, save_to, sandbox)
        Path(str(rows[0].location)).unlink()
        rows = await text_to_speech_batch(lines_of(3, LONG), **batch, max_cost=Decimal(0))
        assert_complete(rows, save_to, sandbox)
        assert sandbox.ledger.charged_total == limit

    async def test_a_price_by_generation_counts(self, batch: dict[str, Any], sandbox: Sandbox) -> None:
        pricing = {"currency": "USD", "per_generation": float(PRICE)}
        sandbox.on_models(repeat(Answer(json={"data": [{"id": DEFAULT_MODEL, "pricing": pricing}]})))
        with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED"):
            await text_to_speech_batch(lines_of(6, LONG), **batch, max_cost=Decimal("0.20"))
        assert sandbox.ledger.charges == []
        await text_to_speech_batch(lines_of(3, LONG), **batch, max_cost=Decimal("0.20"))
        assert sandbox.ledger.charged_total == 3 * PRICE

    @pytest.mark.parametrize(
        "answer",
        [Answer(503), Answer(json={"data": [{"id": DEFAULT_MODEL}]}), Answer(body="<html>")],
        ids=["down", "without a price", "no JSON"],
    )
    async def test_without_a_price_not_more_than_one_job_goes_beyond_it(
        self, answer: Answer, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        sandbox.on_models(repeat(answer))
        limit = Decimal("0.20")
        sandbox.on_submit([Accept(delay=0.2)] * 6)
        for _ in range(2):
            error = await partial(lines=lines_of(6, LONG), **batch, max_cost=limit)
            outcomes = Counter(row.outcome for row in error.rows)
            assert outcomes == {"completed": 4, "NOT_SUBMITTED": 2}
            assert sandbox.ledger.charged_total == 4 * PRICE <= limit + PRICE
        await text_to_speech_batch(lines_of(6, LONG), **batch)
        assert len(sandbox.ledger.charges) == 6

    async def test_what_the_provider_did_not_state_counts_by_its_price_in_the_next_run(
        self, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        limit = Decimal("0.045")  # three texts, by a model that answers at once
        rows = await text_to_speech_batch(lines_of(3, LONG), **batch, model="tts-1", max_cost=limit)
        assert [row.cost for row in rows] == [None] * 3
        sandbox.on_models(repeat(Answer(json={"data": [{"id": "tts-1", "pricing": {"per_generation": 0.001}}]})))
        with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED"):
            await text_to_speech_batch(lines_of(6, LONG), **batch, model="tts-1", max_cost=limit)
        assert sandbox.ledger.charged_total == limit

    async def test_what_an_earlier_run_without_a_limit_was_not_told_counts_by_the_catalogue(
        self, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        await text_to_speech_batch(lines_of(2, LONG), **batch, model="tts-1")
        with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED"):
            await text_to_speech_batch(lines_of(4, LONG), **batch, model="tts-1", max_cost=Decimal("0.045"))
        assert len(sandbox.ledger.charges) == 2

    async def test_uncertain_submissions_count_in_the_next_run(self, batch: dict[str, Any], sandbox: Sandbox) -> None:
        sandbox.on_submit([Accept(then=Cut())] * 3)
        limit = {"max_cost": 4 * PRICE, "max_in_flight": 1}
        await partial(lines=lines_of(4, LONG), **batch, **limit)
        with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED"):
            await text_to_speech_batch(lines_of(4, LONG), **batch, **limit, resubmit=["uncertain"])
        assert sandbox.ledger.charged_total == 4 * PRICE

    async def test_an_uncertain_submission_that_has_no_price_is_the_last(
        self, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        sandbox.on_submit([Accept(then=Cut())] * 10)
        for _ in range(2):
            error = await partial(
                lines=lines_of(5, LONG), **batch, model="Qwen-3-TTS-1.7B", max_cost=Decimal("0.01"), max_in_flight=1
            )
            assert Counter(row.outcome for row in error.rows) == {"SUBMISSION_UNCERTAIN": 1, "NOT_SUBMITTED": 4}
        assert len(sandbox.ledger.charges) == 1

    async def test_what_is_paid_for_is_fetched_where_the_limit_refuses_the_rest(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        lines = [{"id": "slow", "text": "[sandbox:wait 2] " + "x" * 983}, {"id": "ill", "text": "[sandbox:fail] no"}]
        first = await partial(lines=lines, **batch, timeout_seconds=0.5)
        limit = sandbox.ledger.charged_total
        await asyncio.sleep(2)
        with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED"):
            await text_to_speech_batch([*lines, *lines_of(1)], **batch, max_cost=limit)
        told = manifest_in(save_to)
        assert [row.outcome for row in told.values()] == ["completed", "TTS_FAILED", "NOT_SUBMITTED"]
        assert told["ill"].ticket == first.rows[1].ticket
        assert_complete([told["slow"]], save_to, sandbox)
        assert sum(row.cost or 0 for row in told.values()) == sandbox.ledger.charged_total == limit

    async def test_lines_that_would_not_be_submitted_are_not_counted_as_to_be_paid(
        self, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        lines = lines_of(3, LONG)
        limit = 3 * PRICE
        sandbox.on_status(None, [Answer(404)] * 4)
        await partial(lines=lines[:1], **batch, max_cost=limit)
        sandbox.on_status(sandbox.ledger.charges[0].run_id, [Answer(404)] * 4)
        error = await partial(lines=lines, **batch, max_cost=limit)
        assert [row.outcome for row in error.rows] == ["TTS_FAILED", "completed", "completed"]
        assert sandbox.ledger.charged_total == limit

    async def test_an_equal_line_neither_counts_again_nor_takes_its_cost_with_it(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        a, b, c = ({"id": line_id, "text": LONG.format(1)} for line_id in "abc")
        await text_to_speech_batch([a, b], **batch)
        for lines in ([a, b, c], [b, c], [c, a]):
            rows = await text_to_speech_batch(lines, **batch)
            assert [row.cost for row in rows] == [PRICE, *[0] * (len(rows) - 1)]
            assert sum(row.cost or 0 for row in manifest_in(save_to).values()) == sandbox.ledger.charged_total
        with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED"):
            await text_to_speech_batch([b, *lines_of(1, LONG)], **batch, max_cost=PRICE)
        await text_to_speech_batch([a, b, c, *lines_of(1, LONG)], **batch, max_cost=2 * PRICE)
        assert sandbox.ledger.charged_total == 2 * PRICE

    async def test_of_several_currencies_all_are_told_and_usd_count(
        self, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        text = "[sandbox:fail] " + "x" * 985
        paid_in_nano = {**sandbox.add_job(text), "cost": 5.0, "paymentSource": "XNO"}
        sandbox.on_submit([Answer(202, json=paid_in_nano), Answer(202, json=sandbox.add_job("x" * 1000))])
        await partial(lines=[{"id": "a", "text": text}], **batch)
        rows = await text_to_speech_batch([{"id": "a", "text": text}], **batch)
        assert (rows[0].cost, rows[0].currency, rows[0].other_costs) == (PRICE, "USD", {"XNO": 5})
        assert await text_to_speech_batch([{"id": "a", "text": text}], **batch) == rows
        with pytest.raises(NanoGPTError, match="COST_LIMIT_EXCEEDED"):
            await text_to_speech_batch([{"id": "a", "text": text}, *lines_of(1, LONG)], **batch, max_cost=PRICE)

    async def test_an_answer_that_another_run_paid_for_meanwhile_counts(
        self, batch: dict[str, Any], sandbox: Sandbox
    ) -> None:
        lines, limited = lines_of(2, LONG), {"model": "Qwen-3-TTS-1.7B", "max_cost": Decimal("0.02")}
        sandbox.on_submit([Accept(delay=4)])
        other = asyncio.create_task(text_to_speech_batch(lines[:1], **batch, model="Qwen-3-TTS-1.7B"))
        await asyncio.to_thread(sandbox.wait_for_request, "submit")
        error = await partial(lines=lines, **batch, **limited, max_in_flight=1)
        await other
        assert [row.outcome for row in error.rows] == ["completed", "NOT_SUBMITTED"]
        assert len(sandbox.ledger.charges) == 1

    async def test_other_currencies_are_not_added_to_it(
        self, batch: dict[str, Any], save_to: str, sandbox: Sandbox
    ) -> None:
        paid_in_nano = {**sandbox.add_job("Elsewhere."), "cost": 5.0, "paymentSource": "XNO"}
        sandbox.on_submit([Answer(202, json=paid_in_nano)])
        rows = await text_to_speech_batch(lines_of(1, LONG), **batch, max_cost=3 * PRICE)
        assert (rows[0].cost, rows[0].currency) == (5, "XNO")
        rows = await text_to_speech_batch(lines_of(3, LONG), **batch, max_cost=3 * PRICE, artifact_key="tts-nano")
        assert_complete(rows, save_to, sandbox)
        async with get_client() as client:
            [table] = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["tts-nano"]))
            )
        assert "5" in str(table.description)
        for sum_of in ("XNO", f"{2 * PRICE} USD"):
            assert sum_of in str(table.description)


@pytest.mark.parametrize("words", ["\ud800", "a\x00b", "x" * 100_000], ids=["half a character", "NUL", "too many"])
async def test_a_bad_answer_harms_one_line_only(
    words: str, batch: dict[str, Any], save_to: str, sandbox: Sandbox
) -> None:
    sandbox.on_status(None, [{"status": "error", "error": words}])
    error = await partial(lines=lines_of(4), **batch, max_in_flight=1)
    assert [row.outcome for row in error.rows] == ["TTS_FAILED", "completed", "completed", "completed"]
    assert_complete(error.rows[1:], save_to, sandbox)
    assert manifest_in(save_to) == {row.id: row for row in error.rows}
    # A job that failed is submitted anew by another run.
    rows = await text_to_speech_batch(lines_of(4), **batch)
    assert_complete(rows, save_to, sandbox)
    assert len(sandbox.ledger.charges) == 5


async def test_the_end_of_a_line_names_its_task_run_and_leaves_no_traceback(
    batch: dict[str, Any], sandbox: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    lines = {
        "good": "Good.",
        "refused": "[sandbox:reject] No.",
        "failed": "[sandbox:fail] No.",
        "slow": "[sandbox:stuck] Never.",
        "page": "[sandbox:html] A page.",
        "gone": "[sandbox:gone] No file.",
    }
    sandbox.on_submit([Accept(then=Cut())])
    state = await text_to_speech_batch(
        [{"id": "uncertain", "text": "Who knows?"}, *({"id": name, "text": text} for name, text in lines.items())],
        **batch,
        timeout_seconds=5,
        max_in_flight=1,
        return_state=True,
    )
    steps = await ended_task_runs(state, 7)
    assert {step.name: step.state_name for step in steps} == {
        "say good": "Completed",
        "say uncertain": "SUBMISSION_UNCERTAIN",
        "say refused": "CONTENT_POLICY_VIOLATION",
        "say failed": "TTS_FAILED",
        "say slow": "TTS_TIMEOUT",
        "say page": "AUDIO_INVALID",
        "say gone": "AUDIO_UNAVAILABLE",
    }
    assert len(steps) == 7
    assert [record.getMessage() for record in caplog.records if record.exc_info and record.exc_info[0]] == []
    assert "Traceback" not in caplog.text


# What it costs


def rows_in(database: Path) -> int:
    """Count the rows of all tables once the server has written what it was sent."""
    before = -1
    while True:
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            now = sum(int(connection.execute(f'SELECT count(*) FROM "{name}"').fetchone()[0]) for name in tables)
        if now == before:
            return now
        before = now
        time.sleep(2)  # events are written in batches, and nothing tells when the last one is


async def test_two_hundred_lines_are_one_task_run_and_at_most_28_rows_each(
    tmp_path: Path, save_to: str, sandbox: Sandbox
) -> None:
    lines, port = 200, free_port()
    server = serve_prefect(tmp_path / "server", port)
    database = tmp_path / "server" / "prefect.db"
    try:
        before = rows_in(database)
        batch = start(
            "tests.batching",
            str(table_of(lines_of(lines), tmp_path / "lines.csv")),
            save_to,
            sandbox=sandbox,
            PREFECT_API_URL=f"http://127.0.0.1:{port}/api",
        )
        assert batch.wait(timeout=200) == 0
        written = rows_in(database) - before
        with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
            [(task_runs,)] = connection.execute("SELECT count(*) FROM task_run")
    finally:
        server.terminate()
        server.wait()
    assert len(manifest_in(save_to)) == len(sandbox.ledger.charges) == lines
    assert task_runs == lines
    assert written / lines <= 28


def settled(count: int, save_to: str, provider: str) -> Iterator[tuple[str, bytes]]:
    """Give the files of a batch whose lines have all been said, as name and content."""
    audio = b"ID3" + bytes(100)
    digest = hashlib.sha256(audio).hexdigest()
    manifest = []
    for line in read_lines(lines_of(count), {"model": DEFAULT_MODEL, "voice": None}):
        job = Job(provider, line.request, line.take, line.id).id
        file = {"location": f"{save_to}/{line.id}.mp3", "sha256": digest, "size_bytes": len(audio)}
        row = ManifestRow(
            id=line.id,
            text=line.request.text,
            outcome="completed",
            cost=Decimal("0.001"),
            currency="USD",
            job=job,
            **file,
        )
        manifest.append(row.model_dump_json(exclude_none=True))
        note = {"name": f"{line.id}.mp3", "audio": {**file, "container": "mp3", "content_type": "audio/mpeg"}}
        key = hashlib.sha256(f"{line.id}.mp3 {digest}".encode()).hexdigest()[:8]
        yield f"{line.id}.mp3", audio
        yield f".nanogpt/{job}.1.saved-{key}.json", json.dumps(note).encode()
    yield "manifest.jsonl", "".join(f"{row}\n" for row in manifest).encode()


async def test_ten_thousand_settled_lines_are_a_listing_and_the_manifest(
    batch: dict[str, Any], tmp_path: Path, save_to: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 10_000
    Path(save_to, ".nanogpt").mkdir(parents=True)
    for name, content in settled(count, save_to, sandbox.base_url):
        Path(save_to, name).write_bytes(content)
    read_note, read = Ledger.read_note, []

    def reading(self: Ledger, *note: Any) -> Any:
        read.append(note)
        return read_note(self, *note)

    monkeypatch.setattr(Ledger, "read_note", reading)
    lines = table_of(lines_of(count), tmp_path / "lines.csv")

    rows = await text_to_speech_batch(str(lines), **batch)

    assert len(rows) == count
    assert all(row.is_completed for row in rows)
    assert (sandbox.requests(), read) == ([], [])
    # The notes are real ones: a line whose file is gone is looked up, and is known to be paid for.
    Path(str(rows[0].location)).unlink()
    await partial(lines=lines_of(count)[:2], **batch)
    assert read
    assert sandbox.ledger.charges == []


async def test_settled_lines_in_a_bucket_are_as_few_requests_however_many_they_are(
    batch: dict[str, Any], sandbox: Sandbox, s3_env: S3Server
) -> None:
    requests = {}
    for count in (20, 300):  # a page of a listing has a thousand
        for name, content in settled(count, f"s3://speech/{count}", sandbox.base_url):
            s3_env.client("s3").put_object(Bucket="speech", Key=f"{count}/{name}", Body=content)
        s3_env.requests.clear()
        rows = await text_to_speech_batch(lines_of(count), **{**batch, "save_to": f"s3://speech/{count}"})
        assert len(rows) == count
        requests[count] = Counter(request.split()[0] for request in s3_env.requests)
    assert sandbox.requests() == []
    assert requests[20] == requests[300]
    assert requests[300].total() <= 15, requests  # two of them only where a place is new, and one for signed links
