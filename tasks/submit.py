"""Submitting a job, as a task that pays once."""

from collections.abc import Collection
from decimal import Decimal
from os import PathLike
from typing import Annotated, Any, Final

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import Field, TypeAdapter, ValidationError

from prefect_nanogpt.budget import Budget
from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.job import Resubmit, submit, would_be_submitted
from prefect_nanogpt.ledger import Job
from prefect_nanogpt.models import LARGEST_TAKE, Money, Submission, TTSRequest, problems_in
from prefect_nanogpt.tasks.ledgers import open_ledger
from prefect_nanogpt.tasks.retries import JITTER, may_help

__all__ = ["submit_tts"]

RETRY_DELAYS_SECONDS: Final[list[float]] = [1, 2, 4, 8, 15]
_TAKE: Final = TypeAdapter(Annotated[int, Field(ge=1, le=LARGEST_TAKE)])
_LIMIT: Final[TypeAdapter[Any]] = TypeAdapter(Money | None)


@task(
    name="submit-tts",
    task_run_name="submit",
    description="Submit a text to NanoGPT, once, and keep the ticket beside the audio.",
    retries=len(RETRY_DELAYS_SECONDS),
    retry_delay_seconds=RETRY_DELAYS_SECONDS,
    retry_jitter_factor=JITTER,
    retry_condition_fn=may_help,
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def submit_tts(
    request: TTSRequest,
    save_to: str | PathLike[str] = "audio",
    credentials: NanoGPTCredentials | str | None = None,
    *,
    take: int = 1,
    resubmit: Collection[Resubmit] = (),
    max_cost: Decimal | float | str | None = None,
    name: str | None = None,
) -> Submission:
    """Submit a text, and pay for it once, whoever asks for it again, and whatever dies when.

    The ledger of `save_to` keeps the ticket: the same request saved to the same place is the same job, in a retry, in
    another run and in another process. Repeated is only what certainly was not accepted: no connection, or a
    throughput 429.

    Args:
        request: What to say, and how.
        save_to: The folder, URL or block that the audio is going to be saved to.
        credentials: The credentials, or the name of their block; None for the environment, or else the block `default`.
        take: Which rendition of the text; another number is another job.
        resubmit: Which jobs to submit anew although they may have been charged for: `uncertain` (it is not known
            whether an earlier submission was accepted), `lost` (the provider no longer knows the job) and `refused`
            (the provider refused the text).
        max_cost: Refuse before anything is sent if the text costs more than this, earlier tries included, in USD. A
            try of which the provider did not say what it cost counts with the price in its catalogue.
        name: What to call the audio, without extension, should `collect_open_tickets` save it; None for the run id.

    Returns:
        A ticket; or from models that answer at once the finished audio, as a URL (`Completed`) or bytes
        (`AudioContent`).

    Raises:
        SubmissionUncertain: The request left and its outcome is not known, now or in an earlier attempt.
        ContentPolicyViolation: The provider refused the text.
        ProviderError: The provider accepted nothing, or `max_cost` (code `COST_LIMIT_EXCEEDED`) does not allow it.
        StorageError: The ledger cannot be read or written, and so nothing was sent.
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.models import Submission, TTSRequest
        from prefect_nanogpt.tasks import submit_tts

        @flow
        async def order(text: str) -> Submission:
            return await submit_tts(TTSRequest(text=text, voice="Rachel"), save_to="audio")
        ```
    """
    try:
        take, limit = _TAKE.validate_python(take), _LIMIT.validate_python(max_cost)
    except ValidationError as error:
        problems = "; ".join(problems_in(error))
        raise NanoGPTError(f"take or max_cost: {problems}. Nothing was submitted.", code="INVALID_REQUEST") from None
    ledger, provider = await open_ledger(save_to, credentials)
    async with nanogpt_client(credentials) as client:
        job = Job(provider, TTSRequest.model_validate(request), take, name)
        assert job.request is not None
        entry = await ledger.run(ledger.entry, job.id)
        budget = None
        if limit is not None and not entry.is_answered:
            budget = Budget(limit, ledger, client)
            await budget.count([(job, entry)])
            await budget.read_prices([job])
            if would_be_submitted(entry, resubmit) and (refusal := budget.refusal_of([job])):
                raise refusal
        submitted = await submit(
            job,
            ledger,
            client,
            resubmit=resubmit,
            entry=entry,
            budget=budget,
        )
    return submitted.submission
