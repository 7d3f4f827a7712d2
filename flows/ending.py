"""How a run of this package ends when it fails: in one place, because Prefect makes it easy to get wrong."""

from __future__ import annotations

from typing import Any

from prefect import State
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.states import Failed

from prefect_nanogpt.errors import NanoGPTError

__all__ = ["failed"]


async def failed(error: NanoGPTError, *, final: bool) -> State[Any]:
    """Give the state to return from the flow: failed, named by the error's code, with the error as its data.

    Returning a failed state while the flow has `retries` left strands the run: the server answers with AwaitingRetry,
    but the engine starts again only after an exception. So with retries left a final error first takes them away, and
    any other error is raised; the last attempt always returns.

    Args:
        error: Why the run failed.
        final: Whether another attempt is bound to fail in the same way.

    Raises:
        NanoGPTError: `error` itself, where Prefect is to try the flow again.
    """
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        async with get_client() as client:
            flow_run = await client.read_flow_run(context.flow_run.id)
            policy = flow_run.empirical_policy
            if (policy.retries or 0) >= flow_run.run_count:
                if not final:
                    raise error
                await client.update_flow_run(flow_run.id, empirical_policy=policy.model_copy(update={"retries": 0}))
    return Failed(name=error.code, message=str(error), data=error)
