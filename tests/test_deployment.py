"""The flows as the people at the UI run them: deployed, scheduled, and picked up by a worker's process."""

import asyncio
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import pytest
from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import FlowRunFilter
from prefect.exceptions import FailedRun
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Scheduled

from prefect_nanogpt.sandbox import Answer, Sandbox
from prefect_nanogpt.tasks import get_tts_status
from tests.conftest import API_KEY, eventually

ROOT = Path(__file__).parent.parent
POOL = "nanogpt"


def prefect(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *arguments],
        cwd=ROOT,
        env={**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()},
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.fixture(scope="module")
def deployed() -> None:
    prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
    prefect("deploy", "--all")


@pytest.fixture
def worker(deployed: None, sandbox: Sandbox, tmp_path: Path) -> Iterator[None]:
    """A worker in a folder of its own, which knows the sandbox from its environment."""
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL],
        cwd=tmp_path,
        env={
            **os.environ,
            "PREFECT_API_URL": PREFECT_API_URL.value(),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "NANOGPT_API_KEY": API_KEY,
            "NANOGPT_BASE_URL": sandbox.base_url,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield
    process.terminate()
    process.wait(30)


async def start(client: PrefectClient, deployment: str, parameters: dict[str, object]) -> UUID:
    """Start a run as the UI does: with JSON, for the server to check against the parameters' schema."""
    found = await client.read_deployment_by_name(deployment)
    response = await client.request(
        "POST", "/deployments/{id}/create_flow_run", path_params={"id": found.id}, json={"parameters": parameters}
    )
    return UUID(response.json()["id"])


async def ended(client: PrefectClient, run: UUID) -> FlowRun:
    async def final() -> FlowRun | None:
        flow_run = await client.read_flow_run(run)
        return flow_run if flow_run.state and flow_run.state.is_final() else None

    return await eventually(final, seconds=90)


async def report_of(client: PrefectClient, run: UUID) -> str:
    artifacts = await client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": [run]}))
    return str(next(artifact.data for artifact in artifacts if artifact.key == "tts-audio"))


async def test_a_worker_saves_the_audio_of_a_pasted_ticket(worker: None, sandbox: Sandbox, tmp_path: Path) -> None:
    ticket = sandbox.add_job(text="From the UI to a file.")
    async with get_client() as client:
        run = await start(client, "wait-for-tts/wait-for-tts", {"ticket": ticket, "save_to": str(tmp_path / "audio")})
        flow_run = await ended(client, run)
        report = await report_of(client, run)
        assert flow_run.state is not None
        result = await flow_run.state.aresult()
    assert flow_run.state_name == "Completed"
    saved = tmp_path / "audio" / f"{ticket['runId']}.mp3"
    assert saved.read_bytes() == sandbox.audio_bytes(ticket["runId"])
    assert str(saved) in report
    assert (result["location"], result["ticket"]["runId"]) == (str(saved), ticket["runId"])


async def test_a_rejection_on_a_worker_names_the_state_and_outlives_retries(
    worker: None, sandbox: Sandbox, tmp_path: Path
) -> None:
    async with get_client() as client:
        run = await start(
            client,
            "text-to-speech/text-to-speech",
            {"text": "[sandbox:reject] Hm.", "save_to": str(tmp_path), "poll": {"min_seconds": 0.25}},
        )
        flow_run = await ended(client, run)
        assert flow_run.state is not None
        # The result is plain JSON, for callers that do not have this package.
        with pytest.raises(FailedRun, match=r"^CONTENT_POLICY_VIOLATION: "):
            await flow_run.state.aresult()
    assert flow_run.state_name == "CONTENT_POLICY_VIOLATION"
    assert flow_run.run_count == 1
    assert len(sandbox.ledger.charges) == 1


@pytest.fixture(scope="module")
def deployed_with_retries(deployed: None) -> str:
    flow = Flow.from_source(str(ROOT / "tests"), "retrying.py:retrying_wait")
    assert isinstance(flow, Flow)
    flow.deploy("retrying", work_pool_name=POOL, print_next_steps=False)
    return "retrying-wait/retrying"


async def test_retries_of_a_deployment_end_at_a_rejection(
    deployed_with_retries: str, worker: None, sandbox: Sandbox, tmp_path: Path
) -> None:
    ticket = sandbox.add_job(text="[sandbox:fail] Hm.")
    async with get_client() as client:
        run = await start(client, deployed_with_retries, {"ticket": ticket, "save_to": str(tmp_path)})
        flow_run = await ended(client, run)
    assert (flow_run.state_name, flow_run.run_count) == ("TTS_FAILED", 1)
    assert len(sandbox.requests("status")) == 1


async def test_retries_of_a_deployment_outlast_an_outage_or_name_it(
    deployed_with_retries: str, worker: None, sandbox: Sandbox, tmp_path: Path
) -> None:
    short, long = sandbox.add_job(text="One outage."), sandbox.add_job(text="No end of it.")
    attempts = 1 + get_tts_status.retries
    sandbox.on_status(short["runId"], [Answer(503)] * (attempts + 2))
    sandbox.on_status(long["runId"], itertools.repeat(Answer(503)))
    async with get_client() as client:
        runs = [
            await start(client, deployed_with_retries, {"ticket": ticket, "save_to": str(tmp_path)})
            for ticket in (short, long)
        ]
        back, gone = [await ended(client, run) for run in runs]
    assert (back.state_name, back.run_count) == ("Completed", 2)
    assert (gone.state_name, gone.run_count) == ("TTS_FAILED", 3)


async def test_a_run_cancelled_in_the_ui_says_how_to_resume_and_retry_resumes_it(
    worker: None, sandbox: Sandbox, tmp_path: Path
) -> None:
    sandbox.on_status(None, itertools.repeat({"status": "pending"}))
    async with get_client() as client:
        run = await start(
            client,
            "text-to-speech/text-to-speech",
            {"text": "Cancelled, but paid for.", "save_to": str(tmp_path), "poll": {"min_seconds": 0.25}},
        )
        await asyncio.to_thread(sandbox.wait_for_request, "status", 2, 60)
        await client.set_flow_run_state(run, Cancelling())
        assert (await ended(client, run)).state_name == "Cancelled"
        assert "prefect-nanogpt wait" in await report_of(client, run)

        run_id = sandbox.ledger.charges[0].run_id
        sandbox.on_status(run_id, [sandbox.completed_body(run_id)])
        await client.set_flow_run_state(run, Scheduled(), force=True)
        flow_run = await ended(client, run)
    assert flow_run.state_name == "Completed"
    assert len(sandbox.ledger.charges) == 1
    assert (tmp_path / f"{run_id}.mp3").read_bytes() == sandbox.audio_bytes(run_id)
