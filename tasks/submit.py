"""Submitting a job, as a task that pays once.

A submission charges at once, and the provider knows no idempotency key. So the task leaves two records in Prefect's
result storage, under a key that is the same whenever the same flow run comes to the same submission again:

- the *intent*, written before the request leaves;
- the *result* (the ticket), which Prefect writes when the task returns, and which a later attempt gets instead of
  running the task.

An intent without a result means that the process died, or the answer was lost, in between: nobody knows whether the
provider charged, and so nobody submits again unasked.
"""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final
from uuid import UUID

from prefect import task
from prefect.cache_policies import CachePolicy
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger
from prefect.results import get_result_store

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import NanoGPTError, ProviderError, SubmissionUncertain
from prefect_nanogpt.models import Submission, Ticket, TTSRequest
from prefect_nanogpt.report import announce
from prefect_nanogpt.tasks.labels import named_by_step
from prefect_nanogpt.tasks.limits import stay_under_rate_limit
from prefect_nanogpt.tasks.retries import JITTER, may_help

__all__ = ["fingerprint", "refuse_above", "submit_tts"]

RETRY_DELAYS_SECONDS: Final[list[float]] = [1, 2, 4, 8, 15]
COST_LIMIT_EXCEEDED: Final = "COST_LIMIT_EXCEEDED"


def fingerprint(request: TTSRequest) -> str:
    """Give a digest that two requests share only if they ask for the same speech."""
    return hashlib.sha256(json.dumps(request.body(), sort_keys=True).encode()).hexdigest()


class OncePerFlowRun(CachePolicy):
    """The identity of a submission: the request, and where in which flow run it is made.

    Not the credentials (a rotated key must not pay again) and not the task's source (nor must an upgrade). A child
    flow run counts as a part of its parent, because Prefect gives it a new id when the parent is run again; a
    deployment's run stands for itself. The same request made twice in one run is two submissions, told apart by their
    order. An idempotency key takes the place of the flow run.
    """

    def compute_key(
        self,
        task_ctx: TaskRunContext,
        inputs: dict[str, Any],
        flow_parameters: dict[str, Any],
        **kwargs: Any,
    ) -> str:
        """Compute the key under which Prefect stores the ticket."""
        request = fingerprint(TTSRequest.model_validate(inputs["request"]))
        replaces = inputs.get("replaces")
        place: list[Any] = [request, replaces.run_id if replaces else None]
        context = FlowRunContext.get()
        flow_run = context.flow_run if context else None
        if (idempotency_key := inputs.get("idempotency_key")) is not None:
            place.append(idempotency_key)
        elif flow_run is None:
            place.append(str(task_ctx.task_run.id))
        else:
            claimant = task_ctx.task_run.id
            for run_id, run_count in _lineage(flow_run):
                place.append(_ordinal(run_id, run_count, tuple(place[:2]), claimant))
                claimant = root = run_id
            place.append(str(root))
        return f"nanogpt-submission-{hashlib.sha256(json.dumps(place).encode()).hexdigest()}"


def _lineage(flow_run: FlowRun) -> tuple[tuple[UUID, int], ...]:
    """List the flow run and its ancestors up to the one that was started by itself, each with its attempt."""
    own = (flow_run.id, flow_run.run_count)
    if flow_run.parent_task_run_id is None or flow_run.deployment_id is not None:
        return (own,)
    return own, *_ancestors(flow_run.parent_task_run_id, flow_run.id, flow_run.run_count)


@lru_cache(maxsize=1024)
def _ancestors(parent_task_run_id: UUID, child: UUID, child_run_count: int) -> tuple[tuple[UUID, int], ...]:
    # A cache key is computed synchronously, so this asks synchronously; once per attempt of a child flow run.
    with get_client(sync_client=True) as client:
        parent_id = client.read_task_run(parent_task_run_id).flow_run_id
        return () if parent_id is None else _lineage(client.read_flow_run(parent_id))


_claims: dict[tuple[UUID, int, tuple[Any, ...]], list[UUID]] = {}


def _ordinal(run_id: UUID, run_count: int, request: tuple[Any, ...], claimant: UUID) -> int:
    """Count the equal requests of one attempt of a run, in the order in which they were first made."""
    claims = _claims.setdefault((run_id, run_count, request), [])
    if claimant not in claims:
        claims.append(claimant)
    return claims.index(claimant)


@task(
    name="submit-tts",
    task_run_name=named_by_step("submit"),
    description="Submit a text to NanoGPT, once, and keep the ticket.",
    retries=len(RETRY_DELAYS_SECONDS),
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=may_help,
    cache_policy=OncePerFlowRun(),
    persist_result=True,
)
async def submit_tts(
    request: TTSRequest,
    credentials: NanoGPTCredentials | None = None,
    *,
    max_cost: Decimal | None = None,
    replaces: Ticket | None = None,
    resubmit_uncertain: bool = False,
    idempotency_key: str | None = None,
) -> Submission:
    """Submit a text, and pay for it once, whatever dies when.

    An attempt that comes to the same submission again (a retry, a restart, a rerun after a crash) gets the ticket of
    the first one. Repeated is only what certainly was not accepted: no connection, or a throughput 429.

    Args:
        request: What to say, and how.
        credentials: The credentials; None for the saved block `default`, or else the environment.
        max_cost: Refuse before anything is sent if the provider's catalogue prices the text above this, in USD.
        replaces: The ticket of a job that came to nothing, to submit the same text anew in its place.
        resubmit_uncertain: Submit even if an earlier attempt may already have been accepted, and pay twice if so.
        idempotency_key: What a submission of this text is for, whichever flow run makes it: with the same key it is
            made once. None for a submission of this flow run. The key is known to Prefect's result storage alone.

    Returns:
        A ticket; or from models that answer at once the finished audio, as a URL (`Completed`) or bytes
        (`AudioContent`).

    Raises:
        SubmissionUncertain: The request left and its outcome is not known, now or in an earlier attempt.
        ContentPolicyViolation: The provider refused the text. Nothing was charged.
        ProviderError: The provider accepted nothing, or `max_cost` (code `COST_LIMIT_EXCEEDED`) does not allow it.
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.models import TTSRequest
        from prefect_nanogpt.tasks import submit_tts

        @flow
        async def order(text: str):
            return await submit_tts(TTSRequest(text=text, voice="Rachel"))
        ```
    """
    logger = get_run_logger()
    request = TTSRequest.model_validate(request)
    intent = _Intent()
    async with nanogpt_client(credentials) as client:
        if not resubmit_uncertain:
            await intent.refuse_if_open()
        if max_cost is not None:
            await refuse_above(max_cost, request, client)
        await stay_under_rate_limit()
        await intent.open()
        try:
            submission = await client.submit(request)
        except SubmissionUncertain as error:
            error.message += " " + WHAT_TO_LOOK_AT
            raise
        except NanoGPTError:
            await intent.close()
            raise
    if isinstance(submission, Ticket):
        logger.info("Accepted and charged. Ticket: %s", submission.to_json())
        announce("submitted", submission)
    return submission


WHAT_TO_LOOK_AT: Final = (
    "If the provider accepted it, it was charged: compare your balance or your usage page. There is no way to ask for "
    "the job. To submit again, and perhaps pay twice, run it with resubmit_uncertain=True."
)


class _Intent:
    """The record that a submission is under way, beside its result in the result storage."""

    def __init__(self) -> None:
        context = TaskRunContext.get()
        if context is None:
            raise RuntimeError("submit_tts needs Prefect's result storage: call it as a task, not through .fn")
        key = OncePerFlowRun().compute_key(context, context.parameters, {})
        self._key = f"{key}-intent"
        self._store = get_result_store()

    async def open(self) -> None:
        await self._store.awrite(datetime.now(UTC).isoformat(), key=self._key)

    async def close(self) -> None:
        await self._store.awrite(None, key=self._key)

    async def refuse_if_open(self) -> None:
        if not await self._store.aexists(self._key):
            return
        record = await self._store.aread(self._key)
        if record.result is not None:
            raise SubmissionUncertain(
                f"This text was sent to the provider at {record.result}, and the run ended before the answer was kept. "
                + WHAT_TO_LOOK_AT
            )


async def refuse_above(max_cost: Decimal, request: TTSRequest, client: NanoGPTClient) -> None:
    """Refuse a request whose price in the provider's catalogue is above the limit.

    Raises:
        ProviderError: It is; code `COST_LIMIT_EXCEEDED`.
    """
    logger = get_run_logger()
    try:
        model = await client.speech_model(request.model)
    except NanoGPTError as error:
        logger.warning("The catalogue could not be read, so the price is only known afterwards: %s", error)
        return
    price = model.price(request.text) if model else None
    if price is None:
        logger.info("The catalogue has no price per character for %s, so the cost is known afterwards.", request.model)
    elif price > max_cost:
        raise ProviderError(
            f"{len(request.text)} characters on {request.model} cost {price:f} USD by the provider's catalogue, more "
            f"than max_cost={max_cost}. Nothing was submitted.",
            code=COST_LIMIT_EXCEEDED,
        )
