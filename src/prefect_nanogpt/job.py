"""A job, from its text to its audio, paid for once.

    found saved and intact   -> return it, without a request
    answered before          -> wait for its ticket
    else                     -> claim it in the ledger, submit it, note the answer
    then                     -> wait, save, note that it is saved, announce it

Nothing here knows how a step is made: as a task run of its own, or as a plain call.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias

from prefect_nanogpt.budget import Budget, Reserved
from prefect_nanogpt.client import LAST_WORD_SECONDS, NanoGPTClient, in_own_thread
from prefect_nanogpt.errors import (
    AudioError,
    ContentPolicyViolation,
    NanoGPTError,
    NothingSent,
    ProviderError,
    SubmissionUncertain,
    TTSJobRejected,
    TTSTimeout,
)
from prefect_nanogpt.events import RunReference, announce, resume_command, run_logger
from prefect_nanogpt.ledger import Entry, Found, Job, Ledger, Over
from prefect_nanogpt.models import (
    AudioContent,
    AudioFile,
    Completed,
    Pending,
    PollSchedule,
    Rejected,
    Submission,
    Ticket,
    TTSStatus,
)
from prefect_nanogpt.polling import DeadlinePassed, Outcome, poll
from prefect_nanogpt.storage import Destination, file_stem

__all__ = [
    "RESUBMIT",
    "Resubmit",
    "Said",
    "Steps",
    "Submitted",
    "Terms",
    "find",
    "save_whole",
    "say",
    "settle",
    "submit",
    "would_be_submitted",
]

Resubmit: TypeAlias = Literal["uncertain", "lost", "refused"]
LONGEST_PAUSE_SECONDS: Final = 2.0
"""Between two readings of the ledger, while another process waits for the answer to a submission."""
UNKNOWN_END: Final = "This text was sent to the provider, and how that ended is not known."
SLOW_NOTE_SECONDS: Final = 1.0
RESUBMIT: Final = "set `resubmit` (in the form Resubmit, in a shell --resubmit) to "
WHAT_TO_LOOK_AT: Final = (
    "If the provider accepted it, it was charged: compare your balance or your usage page. There is no way to ask for "
    f"the job. Nothing is submitted again by itself; to submit it anew, and perhaps pay twice, {RESUBMIT}uncertain."
)


@dataclass(frozen=True)
class Terms:
    """What the jobs of a run have in common.

    Args:
        ledger: The record of what is paid for, and the folder of the audio.
        timeout_seconds: How long to wait for a job, in seconds.
        schedule: The pauses between two polls.
        resubmit: Which jobs to submit anew although they may have been charged for.
    """

    ledger: Ledger
    timeout_seconds: float = 600.0
    schedule: PollSchedule = field(default_factory=PollSchedule)
    resubmit: Collection[Resubmit] = ()


class Submitted(NamedTuple):
    """The provider's answer to a try of a job."""

    submission: Submission
    number: int


class Said(NamedTuple):
    """The audio of a job; where it was found, the run that had paid for it, and when it was saved, in ISO 8601."""

    audio: AudioFile
    is_new: bool = True
    paid_by: RunReference | None = None
    paid_at: str | None = None


class Steps(Protocol):
    """How each step of a job is made."""

    async def submit(self, job: Job, entry: Entry) -> Submitted:
        """Submit a job of which the ledger knows `entry`, or find that another has."""

    async def waits(self, ticket: Ticket) -> None:
        """Take note that a job is paid for and is being waited for."""

    async def poll(self, ticket: Ticket, seconds_left: float) -> TTSStatus:
        """Ask for the status of a job once, with retries of the call."""

    async def save(self, audio: Completed | AudioContent, stem: str, place: Destination) -> AudioFile:
        """Save finished audio, with retries of the download."""


async def find(job: Job, terms: Terms, entry: Entry) -> Said | None:
    """Find the audio of a job where it is saved already; None where it is not, or no longer intact."""
    if _is_untouched(job, entry):
        return None
    return await terms.ledger.run(_find, job, terms.ledger, entry, terms.resubmit)


def _is_untouched(job: Job, entry: Entry) -> bool:
    """Whether nothing is known of a job, so that there is nothing to read, and no thread needed to read it in.

    The claim finds out if somebody has touched it since.
    """
    return not entry.states and job.ticket is None


def _find(job: Job, ledger: Ledger, entry: Entry, resubmit: Collection[str]) -> Said | None:
    while found := ledger.audio(entry):
        if said := _under_its_name(job, ledger, found):
            return said
    if job.name is not None or job.is_part or entry.saved:
        return None
    known = _paid_for(job, ledger, entry, resubmit)
    if known is None or not isinstance(known.submission, Ticket):
        return None
    # Only verified audio of that job is ever called by its run id: the process died before it could note it.
    if (saved := ledger.destination.find(file_stem(known.submission.run_id))) is None:
        return None
    audio = _of_ticket(saved, known.submission)
    # A job that was never noted here was announced by whoever saved it.
    _note_saved(job, ledger, known.number, audio, is_told=not entry.last)
    return Said(audio, is_new=False)


def _under_its_name(job: Job, ledger: Ledger, found: Found) -> Said | None:
    """Give audio that was found, as a copy where it is wanted under another name; None where it has moved meanwhile."""
    audio, here = found.audio, ledger.destination
    stem = _stem(job, audio.ticket)
    is_in_place = found.place is here and (job.name is None or found.file_name == f"{stem}.{audio.container}")
    if not job.is_part and not is_in_place:
        location = here.copy_from(found.place, found.file_name, stem, audio)
        if location is None:
            return None
        audio = audio.model_copy(update={"location": location})
        ledger.note_saved(job, found.number, audio, found.paid_by)
    return Said(audio, False, found.paid_by, found.paid_at)


async def say(job: Job, terms: Terms, steps: Steps, entry: Entry | None = None) -> Said:
    """Get the audio of a job, submitting it only where the ledger says that nobody has.

    `entry` is what the ledger knows of the job, where the caller has just listed it.

    Raises:
        NanoGPTError: There is no audio; the class and the code say why.
    """
    ledger = terms.ledger
    await ledger.catch_up()
    entry = entry if entry is not None else await ledger.run(ledger.entry, job.id)
    is_submitted = False
    given_up = 0
    while True:
        if said := await find(job, terms, entry):
            return said
        known = None
        if not _is_untouched(job, entry) and not (given_up and entry.last == given_up):
            known = await ledger.run(_paid_for, job, ledger, entry, terms.resubmit)
        if known is None:
            known = await steps.submit(job, entry)
            is_submitted = True
        try:
            return Said(await _fetch(job, terms, steps, known, poll_at_once=not is_submitted))
        except NanoGPTError as error:
            over = await ledger.run(_note_end, job, terms, known, error, is_submitted)
            if is_submitted or job.ticket is not None or not (over == "failed" or over in terms.resubmit):
                raise
            run_logger().info("The job of an earlier attempt came to nothing (%s). Submitting anew.", error)
            given_up = known.number
        entry = await ledger.run(ledger.entry, job.id)


async def settle(job: Job, terms: Terms, steps: Steps, entry: Entry) -> AudioFile | None:
    """Ask once about a job that is paid for, and save its audio where it is ready; None while it is under way.

    Raises:
        NanoGPTError: As `say` does; what the provider has ended is noted as such.
    """
    if entry.is_in_the_air:  # the answer may have come since it was listed
        entry = await terms.ledger.run(terms.ledger.entry, job.id)
    if said := await find(job, terms, entry):
        return said.audio
    known = await terms.ledger.run(_paid_for, job, terms.ledger, entry)
    if known is None:
        raise _recorded(terms.ledger, entry, "uncertain")
    try:
        return await _fetch(job, Terms(terms.ledger, timeout_seconds=0.0), steps, known, poll_at_once=True)
    except TTSTimeout:
        return None
    except NanoGPTError as error:
        await terms.ledger.run(_note_end, job, terms, known, error, True)
        raise


async def submit(
    job: Job,
    ledger: Ledger,
    client: NanoGPTClient,
    *,
    resubmit: Collection[str] = (),
    entry: Entry | None = None,
    budget: Budget | None = None,
    log_ticket: bool = True,
) -> Submitted:
    """Submit a job, once over all processes that use the ledger, or give the answer that another one got.

    Args:
        job: What to say.
        ledger: The record of what is paid for.
        client: The client.
        resubmit: Which ends of earlier tries to submit after.
        entry: What the ledger knows of the job, where the caller has just listed it.
        budget: What may be spent.
        log_ticket: Whether to log the ticket although the ledger has it: of one job, not of a thousand.

    Raises:
        SubmissionUncertain: The request left and its outcome is not known, now or in an earlier try.
        ContentPolicyViolation: The provider refused the text.
        ProviderError: Nothing was accepted, or the budget does not allow it.
        StorageError: The ledger cannot be read or written.
    """
    assert job.request is not None
    request, built = job.request, client.build(job.request)
    for attempt in itertools.count():
        if attempt:
            await asyncio.sleep(min(LONGEST_PAUSE_SECONDS, 0.25 * 1.5**attempt))
        entry = entry if entry is not None else await ledger.run(ledger.entry, job.id)
        if budget:  # what other runs have paid for meanwhile
            await budget.count([(job, entry)])
        step: Submitted | int | None = entry.next
        if not _is_untouched(job, entry):
            step = await ledger.run(_answer_or_next_try, job, ledger, entry, resubmit)
        if isinstance(step, Submitted):
            return step
        if step is not None:
            reserved = await budget.reserve(job, step) if budget else None
            send = partial(_send, job, step, ledger, partial(client.post, built, request.model), reserved, log_ticket)
            submission = None
            may_be_charged = False
            try:
                async with client.turn(submits=True):
                    submission = await in_own_thread(send, _say_what_is_in_the_air)
            except SubmissionUncertain:
                may_be_charged = True
                raise
            finally:
                if budget and reserved:
                    await budget.settle(reserved, submission, may_be_charged=may_be_charged)
            if submission is not None:
                return Submitted(submission, step)
        elif attempt == 0:
            run_logger().info("Another run is submitting the same text. Waiting for its ticket.")
        entry = None
    raise AssertionError


def _answer_or_next_try(job: Job, ledger: Ledger, entry: Entry, resubmit: Collection[str]) -> Submitted | int | None:
    """Give the answer that there is, or the number of the try to make; None while another's is in the air."""
    if (entry.is_answered or entry.is_saved) and (known := _paid_for(job, ledger, entry, resubmit)):
        return known
    if entry.is_in_the_air and ledger.may_still_be_answered(entry):
        return None
    return _next_try(ledger, entry, resubmit)


def _send(
    job: Job,
    number: int,
    ledger: Ledger,
    post: Callable[[], Submission],
    reserved: Reserved | None,
    log_ticket: bool,
) -> Submission | None:
    """Claim a try, send it and note what came of it, in one go that nothing interrupts."""
    claim = ledger.claim(job, number, reserved.usd if reserved else None)
    if claim is None:
        return None
    never_sent = False
    try:
        submission = post()
    except NanoGPTError as error:
        never_sent = isinstance(error, NothingSent)
        ledger.note_over(job.id, number, _how_it_ended(error), error)
        if isinstance(error, SubmissionUncertain):
            error.message += f" {WHAT_TO_LOOK_AT}"
        if isinstance(error, ContentPolicyViolation):
            announce("rejected", job.id, _model_of(job, None), None, code=error.code)
        raise
    else:
        ticket = submission if isinstance(submission, Ticket) else None
        told = f"Accepted and charged. Ticket: {ticket.to_json()}" if ticket else "Accepted, with the audio."
        logger = run_logger()
        # Said before a storage can hang; of a thousand tickets only those that it takes long to note.
        slow = threading.Timer(SLOW_NOTE_SECONDS, logger.info, [told])
        if log_ticket and ticket:
            logger.info(told)
        else:
            slow.start()
        failure = ledger.note_answer(claim, submission)
        slow.cancel()
        if failure is not None:
            logger.error("The answer cannot be noted, and will be tried again: %s %s", failure, told)
        announce("submitted", job.id, _model_of(job, ticket), ticket)
        return submission
    finally:
        ledger.release(claim, never_sent=never_sent)


def _say_what_is_in_the_air() -> None:
    run_logger().warning(
        "A submission has left and is being charged for. Waiting for its ticket, at most %.0f s.", LAST_WORD_SECONDS
    )


def _how_it_ended(error: NanoGPTError) -> Over:
    match error:
        case SubmissionUncertain():
            return "uncertain"
        case NothingSent():
            return "unsent"
        case ContentPolicyViolation():
            return "refused"
        case _:
            return "unaccepted"


def would_be_submitted(entry: Entry, resubmit: Collection[str]) -> bool:
    """Whether `say` would submit a job, as far as the names of its notes tell."""
    if entry.is_in_the_air:
        return "uncertain" in resubmit
    return not entry.is_paid and entry.over in (None, "failed", *resubmit)


def _next_try(ledger: Ledger, entry: Entry, resubmit: Collection[str]) -> int | None:
    """Give the number of the try to make, or raise why there is none to make; None where the answer has come after all.

    Whoever sent the latest try may have noted the answer, and ended, after `entry` was read.
    """
    if entry.is_in_the_air and not ledger.entry(entry.job).is_in_the_air:
        return None
    over: Over | None = entry.over
    if entry.is_in_the_air:
        over = "unsent" if ledger.was_never_sent(entry) else "uncertain"
    elif entry.is_saved:
        over = "lost"
    elif entry.is_answered:  # and its note is damaged
        over = "uncertain"
    if over not in (None, "unsent", "failed") and over not in resubmit:
        raise _recorded(ledger, entry, over)
    if over is not None and entry.is_in_the_air:
        gone = SubmissionUncertain("The process that sent it ended before the answer was noted.")
        ledger.note_over(entry.job, entry.last, over, gone)
    return entry.next


def _recorded(ledger: Ledger, entry: Entry, over: Over) -> NanoGPTError:
    """Make the exception of a try that ended in an earlier run."""
    if entry.is_saved:
        return AudioError(
            "The audio of this text was paid for and saved. The file is gone or changed, or its note is damaged, and "
            f"nobody can be asked for it again. To pay for the text anew, {RESUBMIT}lost."
        )
    if entry.over is None:
        sent = ledger.read_note(entry.job, entry.last, "sent").get("at", "an unknown time")
        return SubmissionUncertain(
            f"This text was sent to the provider at {sent}, and no answer was noted. {WHAT_TO_LOOK_AT}"
        )
    note = ledger.read_note(entry.job, entry.last, f"over-{over}")
    code, message, at = note.get("code"), note.get("message", ""), note.get("at", "an unknown time")
    if over == "uncertain":
        return SubmissionUncertain(f"{message or UNKNOWN_END} {WHAT_TO_LOOK_AT}", code=code)
    ticket = Ticket.model_validate(note["ticket"]) if note.get("ticket") else None
    kind = ContentPolicyViolation if over == "refused" else ProviderError if ticket else AudioError
    return kind(
        f"{message} This is the provider's answer of {at}; nothing was sent now. To submit the text again, "
        f"{RESUBMIT}{over}.",
        code=code,
        ticket=ticket,
    )


def _paid_for(job: Job, ledger: Ledger, entry: Entry, resubmit: Collection[str] = ()) -> Submitted | None:
    """Give the job of an earlier attempt; None where there is none, or none that could still have audio.

    A lost job counts: asking for it costs nothing, and what the provider does not know now it may know tomorrow.

    Raises:
        SubmissionUncertain: There is an answer, and its note is damaged.
    """
    if job.ticket is not None:
        return Submitted(job.ticket, entry.last or 1)
    if not (entry.is_answered or entry.is_saved or entry.over == "lost"):
        return None
    submission = ledger.submission(entry)
    if submission is None and entry.is_answered and "uncertain" not in resubmit:
        now = ledger.entry(entry.job)
        if now.states != entry.states:  # somebody has saved the audio, and tidied the answer up
            return _paid_for(job, ledger, now, resubmit)
        raise SubmissionUncertain(
            f"The provider has answered this job, and the note of the answer ({entry.job}.{entry.last} in the ledger) "
            f"is damaged. {WHAT_TO_LOOK_AT}"
        )
    return None if submission is None else Submitted(submission, entry.last)


async def _fetch(job: Job, terms: Terms, steps: Steps, known: Submitted, *, poll_at_once: bool) -> AudioFile:
    """Wait for a job, save its audio, and note that."""
    ledger = terms.ledger
    submission = known.submission
    place = ledger.folder if job.is_part else ledger.destination
    stem = _stem(job, submission)
    if not isinstance(submission, Ticket):
        audio = await steps.save(submission, stem, place)
    else:
        await steps.waits(submission)
        try:
            outcome = await _until_completed(submission, terms, steps, poll_at_once)
            audio = await steps.save(outcome.status, stem, place)
        except NanoGPTError as error:
            error.ticket = submission
            raise
        audio = _of_ticket(audio, submission).model_copy(
            update={"polls": outcome.polls, "waited_seconds": outcome.seconds}
        )
    await ledger.run(_note_saved, job, ledger, known.number, audio)
    return audio


async def _until_completed(ticket: Ticket, terms: Terms, steps: Steps, poll_at_once: bool) -> Outcome[Completed]:
    async def look(seconds_left: float) -> TTSStatus:
        await terms.ledger.catch_up()
        return await steps.poll(ticket, seconds_left)

    try:
        outcome = await poll(
            look,
            is_final=lambda status: not isinstance(status, Pending),
            schedule=terms.schedule,
            timeout_seconds=terms.timeout_seconds,
            look_at_once=poll_at_once,
        )
    except DeadlinePassed as passed:
        raise TTSTimeout(
            f"Job {ticket.run_id} was still under way after {passed.seconds:.0f} s and {passed.polls} status calls. "
            f"It is paid for and goes on: {resume_command(ticket, terms.ledger.destination.save_to)}",
            retryable=True,
        ) from None
    status = outcome.status
    if isinstance(status, Rejected):
        rejected = (ContentPolicyViolation if status.is_content_policy else TTSJobRejected)(
            status.message, code=status.code
        )
        rejected.is_certain = status.is_certain
        raise rejected
    assert isinstance(status, Completed)
    return Outcome(status, outcome.polls, outcome.seconds)


def _note_saved(
    job: Job, ledger: Ledger, number: int, audio: AudioFile, *, is_told: bool = False, parts: int | None = None
) -> None:
    """Note that a job is saved, and announce it if nobody has."""
    ledger.flush()
    if ledger.note_saved(job, number, audio, parts=parts) and not is_told:
        details: dict[str, Any] = {} if parts is None else {"parts": parts}
        details |= {"location": audio.location, "sha256": audio.sha256, "duration_seconds": audio.duration_seconds}
        announce("completed", job.id, _model_of(job, audio.ticket), audio.ticket, **details)


def _note_end(job: Job, terms: Terms, known: Submitted, error: NanoGPTError, is_new: bool) -> Over | None:
    """Note the end of a job where the provider has ended it, and give it; None where the job stays open."""
    submission, number = known
    ticket = submission if isinstance(submission, Ticket) else None
    over: Over | None = None
    terms.ledger.flush()
    match error:
        case TTSTimeout():
            announce("timed-out", job.id, _model_of(job, ticket), ticket, code=error.code)
        case ContentPolicyViolation():
            over = "refused"
        case TTSJobRejected():
            # What was saved once, and is gone, is not submitted anew unasked.
            saved = terms.ledger.entry(job.id).saved
            is_gone = any(number == saved_number for saved_number, _ in saved)
            over = "lost" if is_gone or not error.is_certain else "failed"
            if not error.is_certain:
                error.message += " Another run asks for the job again, at no cost."
                error.message += f" To pay for the text anew, {RESUBMIT}lost." if job.ticket is None else ""
        case ProviderError(http_status=404) if ticket is not None:
            over = "lost"
            error.message += " The provider does not know this job, or no longer."
            if job.ticket is None:
                error.message += f" To pay for the text anew, {RESUBMIT}lost."
        case AudioError() if ticket is None:
            # Bytes that came as the answer will not get better. A URL may, and nobody can be asked for another one.
            if isinstance(submission, AudioContent) or (not is_new and "lost" in terms.resubmit):
                over = "lost"
            again = " Another run cannot help." if over else " Run it again to try the URL again."
            error.message += f" The job is paid for, and the provider gave nothing else.{again}"
            error.message += f" To pay for it anew, {RESUBMIT}lost."
    if over is not None and terms.ledger.note_over(job.id, number, over, error) and isinstance(error, TTSJobRejected):
        announce("rejected", job.id, _model_of(job, ticket), ticket, code=error.code)
    return over


async def save_whole(job: Job, terms: Terms, chunks: AsyncIterator[bytes], parts: Sequence[AudioFile]) -> AudioFile:
    """Save audio that was joined of the parts of a text, and note it as that of the whole.

    Equal parts are one file, and were paid for once.
    """
    ledger = terms.ledger
    saved = await ledger.destination.save(chunks, _stem(job, None), largest_bytes=math.inf)
    costs = [part.cost for part in {part.location: part for part in parts}.values() if part.cost is not None]
    audio = saved.model_copy(
        update={
            "cost": sum(costs, Decimal(0)) if costs else None,
            "currency": next((part.currency for part in parts if part.currency), None),
        }
    )
    await ledger.run(_note_saved, job, ledger, 1, audio, parts=len(parts))
    return audio


def _stem(job: Job, submission: Submission | None) -> str:
    """Name the file of a job, without extension."""
    if job.is_part:
        return job.id
    if job.name is not None:
        return file_stem(job.name)
    return file_stem(submission.run_id) if isinstance(submission, Ticket) else f"speech-{job.id[:16]}"


def _model_of(job: Job, ticket: Ticket | None) -> str:
    return ticket.model if ticket else job.request.model if job.request else "unknown"


def _of_ticket(audio: AudioFile, ticket: Ticket) -> AudioFile:
    """Add to audio which job it is of, and what that cost."""
    cost = audio.cost if ticket.cost is None else ticket.cost
    return audio.model_copy(
        update={"ticket": ticket, "cost": cost, "currency": ticket.payment_source or audio.currency}
    )
