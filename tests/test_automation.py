"""An automation from a file, set off by the event of a real rejection."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import ContentPolicyViolation
from prefect_nanogpt.flows import wait_for_tts
from prefect_nanogpt.models import PollSchedule
from prefect_nanogpt.sandbox import Sandbox
from tests.conftest import eventually

EXAMPLE = Path(__file__).parent.parent / "examples" / "on_rejection.yaml"


@flow
def tell_the_editor(run_id: str, code: str) -> None:
    """Stands for whatever somebody wants to be started."""


async def test_a_rejection_starts_the_deployment_of_the_automation(
    sandbox: Sandbox, credentials: NanoGPTCredentials, quick: PollSchedule, save_to: str, tmp_path: Path
) -> None:
    async with get_client() as client:
        flow_id = await client.create_flow(tell_the_editor)
        deployment = await client.create_deployment(flow_id, "by-automation", entrypoint="editor.py:tell_the_editor")
        file = tmp_path / "on_rejection.yaml"
        file.write_text(EXAMPLE.read_text().replace("00000000-0000-0000-0000-000000000000", str(deployment)))
        subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "automation", "create", "--from-file", str(file)],
            env={**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value()},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        ticket = sandbox.add_job(text="[sandbox:reject] Not this.")
        with pytest.raises(ContentPolicyViolation):
            await wait_for_tts(ticket, save_to, credentials, poll=quick)

        async def started() -> FlowRun | None:
            runs = await client.read_flow_runs(
                deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
            )
            return runs[0] if runs else None

        run = await eventually(started, seconds=60)
    assert run.parameters == {"run_id": ticket["runId"], "code": "CONTENT_POLICY_VIOLATION"}
