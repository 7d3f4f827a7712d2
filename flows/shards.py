"""A batch in shards: each a run of the deployment on a worker of its own, and one parent that gathers what they did."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from itertools import compress
from os import fspath
from os.path import abspath
from typing import Any, Final
from uuid import UUID

import anyio
import httpx
from prefect import State
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.context import FlowRunContext
from prefect.deployments import arun_deployment
from prefect.exceptions import ObjectNotFound, TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import deployment as this_deployment
from prefect.runtime import flow_run as this_flow_run
from prefect.states import Cancelled, Cancelling
from pydantic_core import to_jsonable_python

from prefect_nanogpt.credentials import NanoGPTCredentials
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.models import python_value
from prefect_nanogpt.storage import absolute

__all__ = ["DEPLOYMENT", "parameters_of_shards", "run_shards"]

DEPLOYMENT: Final = "text-to-speech-batch/text-to-speech-batch"
"""The deployment in `prefect.yaml`, for a batch that is not started as a deployment itself."""
LOOK_SECONDS: Final = 3.0
MORE_TRIES: Final = 2
"""How often a shard is begun again whose run crashed, as it does when its worker is lost."""
LAST_WORD_SECONDS: Final = 5.0


def credentials_for_workers(credentials: NanoGPTCredentials | str | None) -> dict[str, Any] | str | None:
    """Give credentials as a parameter that has no key in it: the name or the reference of a saved block.

    Raises:
        NanoGPTError: The block is not saved, so no worker could load it (code `CREDENTIALS_NOT_SAVED`).
    """
    if credentials is None or isinstance(credentials, str):
        return credentials
    if credentials._block_document_id is None:
        raise NanoGPTError(
            "The shards run elsewhere and can only load a saved block: save the credentials, or leave them out so that "
            "each worker finds its own. Nothing was submitted.",
            code="CREDENTIALS_NOT_SAVED",
        )
    return {"$ref": {"block_document_id": str(credentials._block_document_id)}}


def parameters_of_shards(
    limits: Mapping[int, Decimal | None],
    numbers: Sequence[int],
    shards: int,
    credentials: NanoGPTCredentials | str | None,
) -> dict[int, dict[str, Any]]:
    """Give the parameters of each shard's run: those of this run, with its own lines and its share of what is limited.

    The place of a file of lines stays as it is, and each shard takes its share of what is there.

    Args:
        limits: What each shard may spend in all, in USD, by its number.
        numbers: Which shard each line is of.
        shards: How many shards there are, whether or not all have something to do.
        credentials: The credentials of this run.
    """
    context = FlowRunContext.get()
    assert context is not None
    whole = {name: value for name, value in (context.parameters or {}).items() if name != "credentials"}
    # A shard's process runs in another folder.
    whole["save_to"] = absolute(fspath(whole["save_to"]))
    for name in ("lines", "pronounce"):
        place = whole.get(name)
        if isinstance(place, str) and "://" not in place:
            whole[name] = abspath(place)
    whole["credentials"] = credentials_for_workers(credentials)
    # Values of NumPy and pandas come with rows of a data frame; those that are no JSON were refused or passed over.
    plain: dict[str, Any] = to_jsonable_python(whole, inf_nan_mode="null", fallback=_as_python)
    lines = plain["lines"]
    return {
        number: {
            **plain,
            "lines": lines if isinstance(lines, str) else [*compress(lines, (its == number for its in numbers))],
            "max_in_flight": max(1, plain["max_in_flight"] // len(limits)),
            "requests_per_second": plain["requests_per_second"] / len(limits),
            "max_cost": None if limit is None else str(limit),
            "shards": shards,
            "shard": number,
        }
        for number, limit in limits.items()
    }


def _as_python(value: Any) -> Any:
    plain = python_value(value)
    return None if plain is value else plain


async def run_shards(parameters: Mapping[int, Mapping[str, Any]], deployment: str | None) -> dict[int, State[Any]]:
    """Run the deployment once for each shard, all at once, and give the states they ended in.

    A shard whose run crashes is begun again. Another attempt of this flow run finds the runs that are still under way
    and waits for them instead of starting more.

    Args:
        parameters: The parameters of each shard's run, by its number.
        deployment: The deployment; None for this run's own, or else the one in `prefect.yaml`.

    Raises:
        NanoGPTError: There is no such deployment (code `DEPLOYMENT_NOT_FOUND`).
    """
    target = deployment or this_deployment.id or DEPLOYMENT
    open_runs: dict[int, UUID] = {}
    try:
        states = await asyncio.gather(*(_run(number, parameters[number], target, open_runs) for number in parameters))
    except (asyncio.CancelledError, TerminationSignal):
        with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_WORD_SECONDS):
            await _cancel(list(open_runs.values()))
        raise
    return dict(zip(parameters, states, strict=True))


async def _run(number: int, parameters: Mapping[str, Any], target: str, open_runs: dict[int, UUID]) -> State[Any]:
    attempt = tries = 0
    state: State[Any] | None = None
    while True:
        try:
            run = await arun_deployment(
                target,
                parameters=dict(parameters),
                timeout=0,
                idempotency_key=f"{this_flow_run.id}-shard-{number}-{attempt}",
            )
        except ObjectNotFound:
            if state is not None:  # the deployment was deleted meanwhile
                return state
            raise NanoGPTError(
                f"There is no deployment {target}, so shard {number} was not begun. Deploy the flow, or name its "
                "deployment in shard_deployment.",
                code="DEPLOYMENT_NOT_FOUND",
            ) from None
        attempt += 1
        if run.state is not None and run.state.is_final():
            continue  # what has just been started cannot have ended: it is of an earlier attempt
        open_runs[number] = run.id
        state = await _end_of(run)
        del open_runs[number]
        if state.is_crashed() and tries < MORE_TRIES:
            tries += 1
            get_run_logger().warning("Shard %d crashed and is begun again: %s", number, state.message)
            continue
        get_run_logger().info("Shard %d ended as %s.", number, state.name)
        return state


async def _end_of(run: FlowRun) -> State[Any]:
    async with get_client() as client:
        while True:
            try:
                state = (await client.read_flow_run(run.id)).state
            except ObjectNotFound:
                return Cancelled(name="Deleted", message=f"The flow run {run.name} was deleted.")
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                get_run_logger().warning("Prefect cannot be asked about %s: %s", run.name, error)
            else:
                if state is not None and state.is_final():
                    return state
            await asyncio.sleep(LOOK_SECONDS)


async def _cancel(runs: Sequence[UUID]) -> None:
    async with get_client() as client:
        for run in runs:
            with suppress(ObjectNotFound):  # it was deleted
                await client.set_flow_run_state(run, Cancelling(message="The batch that it is a part of was stopped."))
