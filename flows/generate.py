"""From text to verified audio, paid for once."""

from __future__ import annotations

import asyncio
import tempfile
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final, cast

from prefect import flow
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger
from prefect.results import ResultStore, get_result_store
from prefect.runtime import flow_run as this_flow_run
from pydantic import ValidationError

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import AudioError, ContentPolicyViolation, NanoGPTError, ProviderError, TTSJobRejected
from prefect_nanogpt.flows.ending import failed
from prefect_nanogpt.flows.forms import (
    ArtifactKey,
    Credentials,
    DocumentedFormat,
    DocumentedModel,
    SaveTo,
    Schedule,
    TimeoutSeconds,
    titled,
)
from prefect_nanogpt.flows.wait import fetch_audio, of_ticket, reporting_interruption
from prefect_nanogpt.long_text import can_be_said_in_parts, join, split
from prefect_nanogpt.models import DEFAULT_MODEL, AudioFile, PollSchedule, Submission, Ticket, TTSRequest
from prefect_nanogpt.report import Report
from prefect_nanogpt.storage import Destination, file_stem, is_intact
from prefect_nanogpt.tasks.audio import save_audio
from prefect_nanogpt.tasks.labels import labelled
from prefect_nanogpt.tasks.status import wait_for_job
from prefect_nanogpt.tasks.submit import COST_LIMIT_EXCEEDED, fingerprint, refuse_above, submit_tts

__all__ = ["speak", "text_to_speech"]

PARTS_AT_ONCE: Final = 8
EVERY_MODEL_TAKES: Final = 500
"""In characters. The least that the provider's catalogue was seen to name is 512."""


def run_name() -> str:
    """Name a run by its model and first words."""
    parameters = this_flow_run.parameters
    words = " ".join(str(parameters.get("text", "")).split())
    return f"tts-{parameters.get('model', DEFAULT_MODEL)}-{textwrap.shorten(words, 40, placeholder='…') or 'nothing'}"


@flow(
    name="text-to-speech",
    description="Turn text into speech with NanoGPT and save the audio.",
    flow_run_name=run_name,
    persist_result=True,
)
async def text_to_speech(
    text: Annotated[str, titled("Text")],
    model: Annotated[DocumentedModel | str, titled("Model")] = DEFAULT_MODEL,
    voice: Annotated[str | None, titled("Voice", examples=["Rachel"])] = None,
    speed: Annotated[float | None, titled("Speed")] = None,
    response_format: Annotated[DocumentedFormat | str | None, titled("Format")] = None,
    options: Annotated[dict[str, Any] | None, titled("Further options")] = None,
    save_to: SaveTo = "audio",
    credentials: Credentials = None,
    timeout_seconds: TimeoutSeconds = 600.0,
    poll: Schedule = PollSchedule(),  # noqa: B008 - immutable
    max_cost: Annotated[Decimal | None, titled("Cost limit, in USD")] = None,
    reuse: Annotated[bool, titled("Reuse")] = False,
    resubmit_uncertain: Annotated[bool, titled("Resubmit what is uncertain")] = False,
    max_chars: Annotated[int | None, titled("Longest part, in characters", ge=1)] = None,
    artifact_key: ArtifactKey = "tts-audio",
) -> AudioFile:
    """Say a text: submit it, wait for the job, save the audio.

    However often a run is retried, restarted or run again, it pays for its text once: it finds its ticket again and
    goes on from there. Only a job that came to nothing for a reason other than its text is submitted anew, once an
    attempt.

    Args:
        text: What to say.
        model: The provider's model id.
        voice: A voice of the model; None leaves the choice to the provider.
        speed: The speaking rate, from 0.1 to 5; 1 is normal.
        response_format: The container, for the models that offer a choice (OpenAI's); raw PCM is refused.
        options: Further options of the model, passed on as they are; `TTSRequest` lists the documented ones.
        save_to: A folder, an fsspec URL such as `s3://bucket/speech`, or a block as `remote-file-system/NAME`.
        credentials: The credentials; None for the saved block `default`, or else the environment.
        timeout_seconds: How long to wait for the job in all, in seconds.
        poll: The pauses between two status calls.
        max_cost: The most that the job may cost, in USD. Refused before anything is sent where the provider's
            catalogue has a price; otherwise the run fails after saving the audio that was charged for.
        reuse: Return the audio of an equal earlier request, if it is still where it was saved, and pay nothing.
        resubmit_uncertain: Submit even where an earlier attempt may have been accepted, and pay twice if it was.
        max_chars: Say a text that is longer than this in parts, each a job, and join their audio. None for the model's
            limit in the provider's catalogue, where it has one.
        artifact_key: The key of the report; lower-case letters, digits and dashes.

    Returns:
        Where the audio is, and what it is.

    Raises:
        ContentPolicyViolation: The provider refused the text. Final, whatever `retries` says.
        TTSJobRejected: The provider gave up on the job for another reason.
        SubmissionUncertain: It is not known whether the provider accepted the job. Nothing is submitted again.
        TTSTimeout: The job was still under way at the deadline. Another attempt waits on.
        ProviderError: The provider accepted nothing, or could not be asked; or `max_cost` does not allow it.
        AudioError: The audio could not be fetched, or is not audio.
        StorageError: The audio cannot be written to `save_to`.
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.flows import text_to_speech

        @flow
        async def intro() -> str:
            audio = await text_to_speech("Welcome back.", voice="Rachel", max_cost="0.05")
            return audio.location
        ```
    """
    report = Report(artifact_key, save_to, text=text)

    async def fetch(ticket: Ticket, is_new: bool) -> AudioFile:
        report.ticket = ticket
        return await fetch_audio(
            ticket,
            report,
            save_to=save_to,
            credentials=credentials,
            timeout_seconds=timeout_seconds,
            schedule=poll,
            look_at_once=not is_new,
        )

    try:
        named = {"voice": voice, "speed": speed, "response_format": response_format}
        named = {name: value for name, value in named.items() if value is not None}
        request = request_of({**(options or {}), **named, "text": text, "model": model})
        if reuse and (audio := await _earlier_audio(request, save_to)):
            await report.finished(audio, "An equal request was made before; nothing was charged for this run.")
            return audio
        await Destination(save_to).check()
        async with nanogpt_client(credentials) as client, reporting_interruption(report):
            limit = max_chars or await _longest_text(request, client)
            if limit is not None and len(text.strip()) > limit:
                if max_cost is not None:
                    await refuse_above(max_cost, request, client)
                audio = await speak_in_parts(
                    request,
                    limit,
                    report,
                    name=_name_of_run(),
                    save_to=save_to,
                    credentials=credentials,
                    timeout_seconds=timeout_seconds,
                    schedule=poll,
                    resubmit_uncertain=resubmit_uncertain,
                )
            else:
                audio = await speak(
                    request,
                    fetch,
                    name=_name_of_run(),
                    save_to=save_to,
                    credentials=credentials,
                    max_cost=max_cost,
                    resubmit_uncertain=resubmit_uncertain,
                )
            if report.ticket is None:
                await report.finished(audio)
        await _remember(request, audio)
        _refuse_if_above(max_cost, audio)
        return audio
    except NanoGPTError as error:
        await report.failed(error)
        may_submit_anew = isinstance(error, TTSJobRejected) and not isinstance(error, ContentPolicyViolation)
        return cast(AudioFile, await failed(error, final=not (error.retryable or may_submit_anew)))


async def speak(
    request: TTSRequest,
    fetch: Callable[[Ticket, bool], Awaitable[AudioFile]],
    *,
    name: str,
    save_to: str,
    credentials: NanoGPTCredentials | None,
    max_cost: Decimal | None = None,
    resubmit_uncertain: bool = False,
    idempotency_key: str | None = None,
    ticket: Ticket | None = None,
    replaces: Ticket | None = None,
    gate: AbstractAsyncContextManager[Any] = nullcontext(),  # noqa: B008 - stateless
) -> AudioFile:
    """Get the audio of a request: of the job that an earlier attempt submitted, or else of a new one.

    Args:
        request: What to say.
        fetch: Waits for a job and saves its audio; it is told whether the job is new.
        name: What to call the audio of a model that answers at once.
        save_to: Where that audio goes.
        credentials: The credentials, or None to find them.
        max_cost: As in `submit_tts`.
        resubmit_uncertain: As in `submit_tts`.
        idempotency_key: As in `submit_tts`.
        ticket: The job of an earlier attempt, where the caller knows it.
        replaces: A job that came to nothing, to submit anew in its place.
        gate: What to hold while submitting.
    """
    while True:
        is_new = False
        submission: Submission
        if ticket is not None:
            submission, ticket = ticket, None
        else:
            async with gate:
                # Prefect's types do not know that an asynchronous task gives its state asynchronously too.
                call: Any = submit_tts(
                    request,
                    credentials,
                    max_cost=max_cost,
                    replaces=replaces,
                    resubmit_uncertain=resubmit_uncertain,
                    idempotency_key=idempotency_key,
                    return_state=True,
                )
                state = await call
            submission = await state.aresult()
            is_new = state.name != "Cached"
        if not isinstance(submission, Ticket):
            return await save_audio(submission, name=name, save_to=save_to, credentials=credentials)
        try:
            return await fetch(submission, is_new)
        except ContentPolicyViolation:
            raise
        except TTSJobRejected as rejection:
            if is_new:
                raise
            get_run_logger().info("The job of an earlier attempt came to nothing (%s). Submitting anew.", rejection)
            replaces = submission


async def speak_in_parts(
    request: TTSRequest,
    limit: int,
    report: Report,
    *,
    name: str,
    save_to: str,
    credentials: NanoGPTCredentials | None,
    timeout_seconds: float,
    schedule: PollSchedule,
    resubmit_uncertain: bool,
) -> AudioFile:
    """Say a text that is too long for its model: each part a job, joined in order.

    A part that fails fails the whole. Those under way are seen to their end, no further one is begun, and the tickets
    of all of them are found again by the next attempt.
    """
    can_be_said_in_parts(request.response_format)
    texts = await asyncio.to_thread(split, request.text, limit, request.language)
    logger = get_run_logger()
    logger.info("%d characters are said in %d parts of at most %d.", len(request.text), len(texts), limit)
    places = asyncio.Semaphore(PARTS_AT_ONCE)
    failures: list[NanoGPTError] = []

    async def say(number: int, text: str, folder: str) -> AudioFile | None:
        label = f"part-{number:04}"

        async def fetch(ticket: Ticket, is_new: bool) -> AudioFile:
            completed = await wait_for_job(
                ticket, credentials, timeout_seconds=timeout_seconds, schedule=schedule, look_at_once=not is_new
            )
            try:
                return of_ticket(
                    await save_audio(completed, name=label, save_to=folder, credentials=credentials), ticket
                )
            except NanoGPTError as error:
                error.ticket = ticket
                raise

        async with places:
            if failures:
                return None
            try:
                with labelled(label):
                    part = await speak(
                        request.model_copy(update={"text": text}),
                        fetch,
                        name=label,
                        save_to=folder,
                        credentials=credentials,
                        resubmit_uncertain=resubmit_uncertain,
                    )
            except NanoGPTError as error:
                error.message = f"Part {number} of {len(texts)}: {error.message}"
                failures.append(error)
                return None
            logger.info("Part %d of %d is here.", number, len(texts))
            return part

    with tempfile.TemporaryDirectory() as folder:
        parts = await asyncio.gather(*(say(number, text, folder) for number, text in enumerate(texts, 1)))
        if failures:
            report.ticket = failures[0].ticket
            raise failures[0]
        return await _joined([part for part in parts if part is not None], Path(folder), name, save_to)


async def _joined(parts: list[AudioFile], folder: Path, name: str, save_to: str) -> AudioFile:
    containers = {part.container for part in parts}
    if len(containers) > 1:
        raise AudioError(f"The parts came as {', '.join(sorted(containers))}.", code="AUDIO_NOT_JOINABLE")
    whole = folder / "whole"
    await asyncio.to_thread(join, [Path(part.location) for part in parts], containers.pop(), whole)

    async def chunks() -> AsyncIterator[bytes]:
        with whole.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, 1024**2):
                yield chunk

    saved = await Destination(save_to).save(chunks(), file_stem(name))
    costs = [part.cost for part in parts if part.cost is not None]
    durations = [part.duration_seconds for part in parts if part.duration_seconds is not None]
    return saved.model_copy(
        update={
            "cost": sum(costs, Decimal(0)) if costs else None,
            "currency": next((part.currency for part in parts if part.currency), None),
            "duration_seconds": sum(durations) if len(durations) == len(parts) else saved.duration_seconds,
        }
    )


async def _longest_text(request: TTSRequest, client: NanoGPTClient) -> int | None:
    """Look up how long a text the model takes, unless it is one that every model takes."""
    if len(request.text) <= EVERY_MODEL_TAKES:
        return None
    try:
        model = await client.speech_model(request.model)
    except NanoGPTError as error:
        get_run_logger().warning("The catalogue could not be read for the longest text: %s", error)
        return None
    return model.max_chars if model else None


def request_of(fields: dict[str, Any]) -> TTSRequest:
    try:
        return TTSRequest.model_validate(fields)
    except ValidationError as invalid:
        problems = "; ".join(
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in invalid.errors()
        )
        raise NanoGPTError(f"{problems}. Nothing was submitted.", code="INVALID_REQUEST") from None


def _name_of_run() -> str:
    """Name the audio of a model that gives no run id: by the flow run, which has one such job."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    return f"speech-{context.flow_run.id}"


def _records() -> ResultStore:
    """Open the flow's result storage; the store of a flow itself can write records but not find them by key."""
    return ResultStore(result_storage=get_result_store().result_storage)


def _reuse_key(request: TTSRequest) -> str:
    return f"nanogpt-audio-{fingerprint(request)}"


async def _remember(request: TTSRequest, audio: AudioFile) -> None:
    """Note the audio for requests that may reuse it. The audio is there, whether or not it can be noted."""
    try:
        await _records().awrite(audio, key=_reuse_key(request))
    except Exception as error:
        get_run_logger().warning("The audio cannot be noted for reuse: %s", error)


async def _earlier_audio(request: TTSRequest, save_to: str) -> AudioFile | None:
    store = _records()
    if not await store.aexists(_reuse_key(request)):
        return None
    record = await store.aread(_reuse_key(request))
    audio = cast(AudioFile, record.result)
    if not await is_intact(audio, save_to):
        get_run_logger().info("An equal request was made before, but %s is gone or changed.", audio.location)
        return None
    get_run_logger().info("An equal request was made before: %s.", audio.location)
    return audio


def _refuse_if_above(max_cost: Decimal | None, audio: AudioFile) -> None:
    """Stop a pipeline whose jobs cost more than it allows, although this one is already charged and saved."""
    if max_cost is None or audio.cost is None or audio.currency not in (None, "USD") or audio.cost <= max_cost:
        return
    raise ProviderError(
        f"The job was charged {audio.cost:f} USD, more than max_cost={max_cost}, and the provider's catalogue did not "
        f"tell before. Its audio is saved at {audio.location}.",
        code=COST_LIMIT_EXCEEDED,
    )
