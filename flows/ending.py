"""How a run of this package begins and ends: in one place, because Prefect makes it easy to get wrong."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, Final

import anyio
from prefect import State
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.logging.handlers import APILogHandler
from prefect.runtime import flow_run as this_flow_run
from prefect.serializers import JSONSerializer
from prefect.states import Completed, Failed

from prefect_nanogpt.errors import ContentPolicyViolation, NanoGPTError, TTSJobRejected
from prefect_nanogpt.events import resume_command, run_logger
from prefect_nanogpt.report import Report

__all__ = ["PLAIN_JSON", "completed", "failed", "given_name", "keep_result", "may_go_better", "reporting_interruption"]

LAST_WORD_SECONDS: Final = 5.0
"""A process that is told to stop is killed soon: Prefect gives a cancelled run 30 s, of which a submission that waits
for its answer may have taken 25."""
PLAIN_JSON: Final = JSONSerializer(object_encoder="prefect_nanogpt.models.plain", object_decoder=None)
"""Results that can be read where this package is not installed."""

# The forms of the UI fill in a name that they make up. Prefect's server makes up others, of the words of coolname.
_MADE_UP: Final = re.compile(
    # V2: an adjective of products and an animal of six letters at most
    r"(Awesome|Rustic|Small|Gorgeous|Fantastic|Sleek|Intelligent|Unbranded|Refined|Licensed|Generic|Practical|Ergonomic"
    r"|Handcrafted|Tasty|Handmade|Incredible)-[A-Z][a-zñ]{1,5}"
    # V1: a star, by its letter, one of a thousand constellations and places, and perhaps one of a few words more
    r"|(alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon|phi|chi"
    r"|psi|omega)\d*-[a-z]+(-(majoris|minoris|venaticorum|berenices|australis|borealis|austrini|dur))?"
    r"(-([a-hkmnpqrvxyz]|adjunct|anomaly|band|boundary|cloud|cluster|collapse|conflux|expanse|field|fringe|instability"
    r"|manifold|mass|nebula|point|quadrant|reach|ring|sector|shift|tensor|terminus|vector|void|warp))?"
)
_ADJECTIVES: Final = ("adjective", "adjective_near", "noun_adjective", "size", "prefix", "adjective_first")
_ANIMALS: Final = ("animal", "animal_breed", "animal_legendary")


def given_name() -> str | None:
    """Give the name that somebody has given to this run; None where it has one that was made up."""
    name = this_flow_run.name
    if not name or _MADE_UP.fullmatch(name):
        return None
    adjective, _, animal = name.partition("-")
    return None if adjective in _words(_ADJECTIVES) and animal in _words(_ANIMALS) else str(name)


@cache
def _words(kinds: tuple[str, ...]) -> frozenset[str]:
    from coolname.data import config

    lists: dict[str, Any] = config
    return frozenset(word for kind in kinds for word in lists.get(kind, {}).get("words", ()))


def keep_result() -> None:
    """Keep the result of a deployment's run for whoever started it, and no other result.

    Prefect would hand the kept results of child runs to a parent that is retried by their position, whatever their
    parameters; without them the child runs again, and finds in the ledger what is paid for.
    """
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None:
        context.persist_result = True


def may_go_better(error: NanoGPTError) -> bool:
    """Whether another attempt of the run may end otherwise; a job that failed is submitted anew by it."""
    return error.retryable or (isinstance(error, TTSJobRejected) and not isinstance(error, ContentPolicyViolation))


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
    if (flow_run := await _this_run_as_stored()) is not None:
        policy = flow_run.empirical_policy
        if (policy.retries or 0) >= flow_run.run_count:
            if not final:
                raise error
            async with get_client() as client:
                await client.update_flow_run(flow_run.id, empirical_policy=policy.model_copy(update={"retries": 0}))
    return Failed(name=error.code, message=str(error), data=error)


async def completed(result: Any, message: str) -> Any:
    """Give what to return from the flow for a completed state with a message.

    Where an earlier attempt has raised, Prefect's engine raises that again instead of a returned state's result (seen
    on 3.9.1), so then the result is returned without words.
    """
    flow_run = await _this_run_as_stored()
    if flow_run is not None and flow_run.run_count > 1:
        return result
    return Completed(data=result, message=message)


async def _this_run_as_stored() -> FlowRun | None:
    """Read this run, of which only the server knows the attempts; None outside of a run."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return None
    async with get_client() as client:
        return await client.read_flow_run(context.flow_run.id)


@asynccontextmanager
async def reporting_interruption(report: Report, save_to: str) -> AsyncIterator[None]:
    """Where the run is cancelled or its process told to stop, make how to resume its last word."""
    try:
        yield
    except (asyncio.CancelledError, TerminationSignal):
        if report.is_begun:
            with anyio.CancelScope(shield=True), anyio.move_on_after(LAST_WORD_SECONDS):
                how = f", or: {resume_command(report.ticket, save_to)}" if report.ticket else "."
                run_logger().warning(
                    "Stopped while waiting. What is submitted is paid for and goes on. Retry this run%s", how
                )
                await report.interrupted()
                # What ends the process next may be a signal, which leaves nobody to send the logs.
                await APILogHandler.aflush()
        raise
