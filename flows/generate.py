"""From text to verified audio, paid for once."""

import asyncio
import textwrap
from decimal import Decimal
from typing import Annotated, Any, cast

from prefect.runtime import flow_run as this_flow_run
from pydantic import ValidationError

from prefect_nanogpt.credentials import nanogpt_client
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.flows.ending import (
    PLAIN_JSON,
    failed,
    given_name,
    keep_result,
    may_go_better,
    reporting_interruption,
)
from prefect_nanogpt.flows.forms import (
    ArtifactKey,
    CostLimit,
    Credentials,
    DocumentedFormat,
    DocumentedModel,
    FileName,
    Options,
    Pronounced,
    Resubmitted,
    SaveTo,
    Schedule,
    Subtitles,
    Take,
    TimeoutSeconds,
    flow,
    has_form,
    titled,
)
from prefect_nanogpt.job import Terms, find, say, would_be_submitted
from prefect_nanogpt.ledger import Job, Ledger
from prefect_nanogpt.long_text import LEAST_PART, units
from prefect_nanogpt.models import (
    DEFAULT_MODEL,
    LONGEST_WORD,
    AudioFile,
    PollSchedule,
    TTSRequest,
    one_line,
    problems_in,
    request_with,
)
from prefect_nanogpt.pronunciation import Spoken, read_pronunciation
from prefect_nanogpt.report import Report
from prefect_nanogpt.storage import absolute
from prefect_nanogpt.subtitles import SubtitleFormat
from prefect_nanogpt.tasks.catalogue import check_names
from prefect_nanogpt.tasks.ledgers import open_ledger
from prefect_nanogpt.tasks.parts import longest_part, say_in_parts, timed_parts
from prefect_nanogpt.tasks.say import TaskSteps

__all__ = ["text_to_speech"]


def run_name() -> str:
    """Name a run by its model and first words."""
    parameters = this_flow_run.parameters
    words = textwrap.shorten(one_line(str(parameters.get("text", "")), LONGEST_WORD), 40, placeholder="…")
    return (
        given_name()
        or f"tts-{one_line(str(parameters.get('model', DEFAULT_MODEL)), LONGEST_WORD)}-{words or 'nothing'}"
    )


@has_form("text", "model", "voice", "speed", "save_to", "name", "credentials")
@flow(
    name="text-to-speech",
    description="Turn text into speech with NanoGPT and save the audio.",
    flow_run_name=run_name,
    persist_result=False,
    result_serializer=PLAIN_JSON,
)
async def text_to_speech(
    text: Annotated[str, titled("Text")],
    model: Annotated[DocumentedModel | str, titled("Model")] = DEFAULT_MODEL,
    voice: Annotated[str | None, titled("Voice", examples=["Rachel"])] = None,
    speed: Annotated[float | None, titled("Speed")] = None,
    response_format: Annotated[DocumentedFormat | str | None, titled("Format")] = None,
    options: Options = None,
    save_to: SaveTo = "audio",
    credentials: Credentials = None,
    timeout_seconds: TimeoutSeconds = 600.0,
    poll: Schedule = PollSchedule(),  # noqa: B008 - immutable
    max_cost: CostLimit = None,
    take: Take = 1,
    resubmit: Resubmitted = (),
    max_chars: Annotated[int | None, titled("Longest part, in characters", ge=LEAST_PART)] = None,
    strict: Annotated[bool, titled("Only known models and voices")] = False,
    name: FileName = None,
    subtitles: Subtitles = None,
    pronounce: Pronounced = None,
    artifact_key: ArtifactKey = "tts-audio",
) -> AudioFile:
    """Say a text: submit it, wait for the job, save the audio.

    The same request saved to the same place is the same job: a retry, a restart and a new run tomorrow find its ticket
    or its audio, and pay nothing. Only a job that came to nothing for a reason other than its text is submitted anew,
    once an attempt.

    Args:
        text: What to say.
        model: The provider's model id.
        voice: A voice of the model; None leaves the choice to the provider.
        speed: The speaking rate, from 0.1 to 5; 1 is normal.
        response_format: The container, for the models that offer a choice (OpenAI's); raw PCM is refused.
        options: Further options of the model, passed on as they are; `TTSRequest` lists the documented ones.
        save_to: A folder, an fsspec URL such as `s3://bucket/speech`, or a block as `remote-file-system/NAME`.
        credentials: The credentials, or the name of their block; None for the environment, or else the block `default`.
        timeout_seconds: How long to wait for the job in all, in seconds.
        poll: The pauses between two status calls.
        max_cost: The most that the text may cost, failed tries included, in USD. Nothing is submitted where the
            provider's catalogue has a price above it; what is paid for is fetched all the same.
        take: Which rendition of the text: another number is another job, and is paid for.
        resubmit: Which jobs to submit anew although they may have been charged for: `uncertain` (it is not known
            whether an earlier submission was accepted), `lost` (the provider no longer knows the job) and `refused`
            (the provider refused the text).
        max_chars: Split a text that is longer than this into parts, each a job, and join their audio; at least 20, in
            UTF-16 code units. None for the model's limit in the provider's catalogue, where it has one.
        strict: Whether to refuse a model or voice that the provider's catalogue does not have, instead of warning of
            it. Where the catalogue cannot be read, the run goes on and says so.
        name: What to call the file, without extension; None for the provider's run id.
        subtitles: Write subtitles beside the audio, under its name: `srt`, or `vtt` for WebVTT. Where a text is said in
            parts, each is shown when it is heard; inside of a part the time is shared out by characters.
        pronounce: What to say for words, or the path or URL of a table (CSV) with the columns `word` and `say`. Words
            are found whole, the longest first, in any case. What is said is what is priced, and what tells the job from
            others; subtitles keep the text as it is written.
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
        StorageError: The audio, or its subtitles, cannot be written to `save_to`.
        NanoGPTError: The audio is saved, and there can be no subtitles of it (code `SUBTITLES_IMPOSSIBLE`).
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.flows import text_to_speech

        @flow
        async def intro() -> str:
            audio = await text_to_speech("Welcome back.", voice="Rachel", name="intro")
            return audio.location
        ```
    """
    keep_result()
    save_to, cost_limit = absolute(save_to), cast(Decimal | None, max_cost)
    report = Report(artifact_key, save_to, text=text)
    try:
        spoken = await asyncio.to_thread(lambda: read_pronunciation(pronounce).apply(text))
        report.said_as = spoken.text if spoken.text != text else None
        named = {"voice": voice, "speed": speed, "response_format": response_format}
        named = {name: value for name, value in named.items() if value is not None}
        request = _request(options, {**named, "text": spoken.text, "model": model})
        if subtitles is not None:
            from prefect_nanogpt.tasks.subtitles import can_write_subtitles

            can_write_subtitles()
        async with reporting_interruption(report, save_to):
            ledger, provider = await open_ledger(save_to, credentials)
            job = Job(provider, request, take, name)
            terms = Terms(ledger, timeout_seconds, poll, resubmit)
            entry = await ledger.run(ledger.entry, job.id)
            said = await find(job, terms, entry)
            if said is None:
                async with nanogpt_client(credentials) as client:
                    plan = await ledger.run(ledger.plan, job.id)
                    limit = await longest_part(job, plan, ledger, entry, max_chars, client)
                    if limit is not None and units(spoken.text.strip()) > limit:
                        said = await say_in_parts(job, terms, limit, plan, client, cost_limit, report, strict=strict)
                    else:
                        if would_be_submitted(entry, resubmit):
                            await check_names([request], client, strict=strict)
                        said = await say(job, terms, TaskSteps(terms, credentials, report, cost_limit))
            run_logger().info("The audio is at %s.", said.audio.location)
            await report.finished(said, ledger.destination)
    except NanoGPTError as error:
        await report.failed(error)
        return cast(AudioFile, await failed(error, final=not may_go_better(error)))
    try:
        if subtitles is not None:
            await _write_subtitles(job, ledger, spoken, said.audio, subtitles)
        return said.audio
    except NanoGPTError as error:
        error.message += f" The audio is saved: {said.audio.location}"
        return cast(AudioFile, await failed(error, final=not error.retryable))


async def _write_subtitles(job: Job, ledger: Ledger, spoken: Spoken, audio: AudioFile, kind: SubtitleFormat) -> None:
    """Write subtitles of a text beside its audio, timed by its parts where it has any and their lengths are known.

    Another limit may have split it after the one that is noted, and then the time is shared out over all of it.
    """
    from prefect_nanogpt.tasks.subtitles import write_beside

    assert job.request is not None
    timed = await ledger.run(timed_parts, job, ledger)
    parts = [(spoken.written_between(*span), seconds) for span, seconds in timed]
    total_seconds = audio.duration_seconds
    if total_seconds is None or not parts or any(seconds is None for _, seconds in parts):
        parts = [(spoken.written, total_seconds)]
    place, file_name = ledger.destination, audio.location.rpartition("/")[2]
    language = job.request.language
    name = await write_beside(place, file_name, kind, parts, total_seconds=total_seconds, language=language)
    run_logger().info("The subtitles are at %s.", place.location_of(name))


def _request(options: Options, fields: dict[str, Any]) -> TTSRequest:
    try:
        return request_with(options, fields)
    except ValueError as error:
        what = "; ".join(problems_in(error)) if isinstance(error, ValidationError) else error
        raise NanoGPTError(f"{what}. Nothing was submitted.", code="INVALID_REQUEST") from None
