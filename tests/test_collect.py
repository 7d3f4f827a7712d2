"""Tickets whose runs ended too early are settled once."""

from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.states import Cancelled, Crashed, Running

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.flows import collect_open_tickets, text_to_speech, wait_for_tts
from prefect_nanogpt.models import PollSchedule
from prefect_nanogpt.report import OPEN_UNTIL
from prefect_nanogpt.sandbox import Answer, Sandbox

PENDING = {"status": "pending"}


async def test_every_open_ticket_is_settled_once_and_the_rest_is_left_alone(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule
) -> None:
    jobs = {
        name: sandbox.add_job(text=text)
        for name, text in {
            "timed out": "Done meanwhile.",
            "crashed": "Done meanwhile, too.",
            "cancelled": "And this one.",
            "lost": "Its process was killed.",
            "no audio": "Its audio could not be fetched.",
            "refused": "[sandbox:reject] Refused meanwhile.",
            "slow": "[sandbox:stuck] Still under way.",
            "finished": "Finished.",
            "rejected": "[sandbox:reject] Rejected.",
        }.items()
    }
    for name, ticket in jobs.items():
        if name == "no audio":
            sandbox.on_audio(ticket["runId"], [Answer(404)] * 4)
        elif name not in {"finished", "rejected"}:
            sandbox.on_status(ticket["runId"], [PENDING])
        state = await wait_for_tts.with_options(flow_run_name=f"collect: {name}")(
            ticket, save_to, credentials, timeout_seconds=0.01, poll=quick, return_state=True
        )
        assert state.is_completed() == (name == "finished")
    async with get_client() as client:
        runs = await client.read_flow_runs(flow_run_filter=FlowRunFilter(name={"like_": "collect: "}))
        for run in runs:
            for name, ended in {"crashed": Crashed(), "cancelled": Cancelled(), "lost": Running()}.items():
                if run.name == f"collect: {name}":
                    await client.set_flow_run_state(run.id, ended, force=True)
        lost = next(run for run in runs if run.name == "collect: lost")
        await _backdate(lost.id)
    asked = len(_looks_at(jobs, sandbox))

    first = await collect_open_tickets(credentials)
    mine = {row.flow_runs[0].removeprefix("collect: "): row for row in first if row.run_id in _ids(jobs)}

    saved = {"timed out", "crashed", "cancelled", "lost", "no audio"}
    assert {name: row.outcome for name, row in mine.items()} == {
        **dict.fromkeys(saved, "saved"),
        "refused": "rejected",
        "slow": "pending",
    }
    assert "CONTENT_POLICY_VIOLATION" in mine["refused"].detail
    for name in saved:
        assert Path(mine[name].detail).read_bytes() == sandbox.audio_bytes(jobs[name]["runId"])
    assert len(_looks_at(jobs, sandbox)) - asked == 7
    assert len(sandbox.ledger.refunds) == 2

    second = await collect_open_tickets(credentials)
    assert [(row.flow_runs, row.outcome) for row in second if row.run_id in _ids(jobs)] == [
        (["collect: slow"], "pending")
    ]


def _looks_at(jobs: dict[str, dict[str, str]], sandbox: Sandbox) -> list[str | None]:
    """List the status calls about these jobs; other tests on the same server may have left open tickets of theirs."""
    return [request.run_id for request in sandbox.requests("status") if request.run_id in _ids(jobs)]


def _ids(jobs: dict[str, dict[str, str]]) -> set[str]:
    return {ticket["runId"] for ticket in jobs.values()}


async def _backdate(flow_run_id: object) -> None:
    """Let the deadline of a run be long past, as it is once somebody wonders about a run that never ends."""

    async with get_client() as client:
        [artifact] = await client.read_artifacts(
            artifact_filter=ArtifactFilter(type={"any_": ["markdown"]}),
            flow_run_filter=FlowRunFilter(id={"any_": [flow_run_id]}),
        )
        metadata = {**(artifact.metadata_ or {}), OPEN_UNTIL: "2026-01-01T00:00:00+00:00"}
        await client.update_artifact(artifact.id, ArtifactUpdate(data=artifact.data, metadata_=metadata))


async def test_a_run_that_is_still_waiting_is_left_alone(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule
) -> None:
    ticket = sandbox.add_job(text="Somebody is waiting for this.")
    sandbox.on_status(ticket["runId"], [PENDING])
    state = await wait_for_tts.with_options(flow_run_name="collect: alive")(
        ticket, save_to, credentials, timeout_seconds=0.01, poll=quick, return_state=True
    )
    async with get_client() as client:
        await client.set_flow_run_state(state.state_details.flow_run_id, Running(), force=True)
    assert ticket["runId"] not in {row.run_id for row in await collect_open_tickets(credentials)}


async def test_the_report_of_a_collected_run_tells_where_the_audio_is(
    sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str, quick: PollSchedule
) -> None:
    sandbox.on_status(None, [PENDING])
    state = await text_to_speech(
        "A text worth keeping.", save_to=save_to, credentials=credentials, timeout_seconds=0.01, poll=quick,
        return_state=True,
    )  # fmt: skip
    assert state.name == "TTS_TIMEOUT"
    rows = await collect_open_tickets(credentials)
    [file] = Path(save_to).iterdir()
    assert str(file) in [row.detail for row in rows]
    async with get_client() as client:
        [report] = await client.read_artifacts(
            artifact_filter=ArtifactFilter(type={"any_": ["markdown"]}),
            flow_run_filter=FlowRunFilter(id={"any_": [state.state_details.flow_run_id]}),
        )
    assert str(file) in str(report.data)
    assert "A text worth keeping" in str(report.data)


async def test_without_a_key_nothing_is_settled_and_the_run_says_why() -> None:
    with pytest.raises(NanoGPTError, match="NANOGPT_API_KEY") as caught:
        await collect_open_tickets()
    assert caught.value.code == "MISSING_CREDENTIALS"
