"""What is known of every job that money may have been spent on: notes beside the audio, written once.

The notes are small JSON files in the folder `.nanogpt` of the folder where the audio goes, so they are as durable and
as shared as the audio itself. Prefect's results and caches play no part. A note is called

    <job>.<try>.<state>.json

where the job is a digest of what is asked for, and the state is one of

- `sent`: written the moment before the request leaves, by whoever creates the file and nobody else, and never removed;
- `answer`: the ticket, or the audio (its URL or its bytes) of a model that answers at once;
- `saved-<digest>`: a file with the audio, one note for each;
- `over-<why>`: the try came to nothing. `unsent` and `unaccepted` cost nothing as far as is known; `failed`, `refused`
  and `lost` were charged; of `uncertain` nobody knows.
- `plan`: where a text was split, so that another try splits it at the same places, also with another segmenter.

So one listing of the folder tells which jobs are open. A note that cannot be read is not a note that is not there: what
is torn counts as sent with an unknown outcome, and a storage that cannot be read is a `StorageError`.

All methods of `Ledger` block; `run` runs them in a thread, and makes `StorageError`s of what the storage raises.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from prefect_nanogpt.connections import split_login
from prefect_nanogpt.errors import NanoGPTError, StorageError, secrets_in
from prefect_nanogpt.events import RunReference, run_logger, this_run
from prefect_nanogpt.models import AudioContent, AudioFile, Completed, Submission, Ticket, TTSRequest
from prefect_nanogpt.storage import Destination, is_temporary, kept_name

__all__ = [
    "Entry",
    "Found",
    "Job",
    "Ledger",
    "Over",
    "Plan",
    "amounts",
    "by_currency",
    "charge_in",
    "run_in",
    "saved_as",
]

P = ParamSpec("P")
R = TypeVar("R")
FOLDER: Final = ".nanogpt"
IDENTITY: Final = "identity/digits"
SILENCE_SECONDS: Final = 600.0
"""A submission may take four minutes (see `NanoGPTClient.post`); the rest is for clocks that differ."""
CLOCKS_DIFFER_SECONDS: Final = 60.0
NOTE_ATTEMPTS: Final = 5
TORN_SECONDS: Final = 1.0
_NOTE: Final = re.compile(r"([0-9a-f]{32})\.(\d+)\.(sent|answer|plan|saved-[0-9a-f]{8}|over-[a-z]+)\.json")

End = Literal["failed", "refused", "lost", "uncertain"]
Over = Literal["unsent", "unaccepted"] | End


@dataclass(frozen=True)
class Job:
    """Something to be said, once.

    The same request to the same provider is the same job, whoever asks for it, when, and from where. Another rendition
    of the same text is another take.

    Args:
        provider: The base URL of the API: a sandbox's job is never taken for the provider's.
        request: What to say; None for a job that is known by its ticket or its notes alone.
        take: Which rendition.
        name: What to call the file, without extension; None for the run id.
        ticket: The ticket of a job that was submitted elsewhere.
        is_part: Whether it is a part of a longer text, whose audio stays in the ledger's folder.
        noted_as: The digest of a job that is known by its notes alone.
    """

    provider: str
    request: TTSRequest | None = None
    take: int = 1
    name: str | None = None
    ticket: Ticket | None = None
    is_part: bool = False
    noted_as: str | None = None

    @cached_property
    def id(self) -> str:
        """The digest that stands for the job, as 32 hexadecimal digits."""
        if self.noted_as is not None:
            return self.noted_as
        what: Any = {"ticket": self.ticket.run_id if self.ticket else None}
        if self.request is not None:
            # A number is the same however it is written: in a form, in CSV, or in Python.
            request = json.loads(self.request.content(), parse_float=lambda word: _whole(float(word)))
            what = {"request": request, "take": self.take}
        identity = json.dumps({"provider": self.provider.rstrip("/"), **what}, sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:32]


@dataclass
class Entry:
    """The notes of a job, told from their names: the states of each try, by its number, which counts from 1."""

    job: str
    states: dict[int, set[str]] = field(default_factory=dict)

    @property
    def last(self) -> int:
        """The number of the latest try that counts, 0 where none does: one that was not accepted changes nothing."""
        nothing = {"over-unsent", "over-unaccepted"}
        return max((number for number in self._tries if not self.states[number] & nothing), default=0)

    @property
    def next(self) -> int:
        """The number of the next try."""
        return max(self._tries, default=0) + 1

    @property
    def _tries(self) -> list[int]:
        return [number for number, states in self.states.items() if states - {"plan"}]

    @property
    def over(self) -> End | None:
        """How the latest try came to nothing, if it did: its gravest end; an end unknown here counts as uncertain."""
        ends = {state for state in self._latest if state[:5] == "over-"}
        if ends == {"over-uncertain"} and any(state == "answer" or state[:6] == "saved-" for state in self._latest):
            return None  # the answer came after all
        known: tuple[End, ...] = ("refused", "failed", "lost")
        return next((over for over in known if f"over-{over}" in ends), "uncertain" if ends else None)

    @property
    def saved(self) -> list[tuple[int, str]]:
        """The notes of files with its audio, as try and state."""
        return [(number, state) for number, states in self.states.items() for state in states if state[:6] == "saved-"]

    @property
    def charged(self) -> list[int]:
        """The tries that were, or may have been, charged, in their order."""
        ends = {"answer", "over-failed", "over-lost", "over-uncertain", *(state for _, state in self.saved)}
        return sorted(
            number for number, states in self.states.items() if states & ends or states - {"plan"} == {"sent"}
        )

    @property
    def is_saved(self) -> bool:
        """Whether the latest try has audio; where that is gone, the provider can be asked for it again."""
        return self.over is None and any(number == self.last for number, _ in self.saved)

    @property
    def is_answered(self) -> bool:
        """Whether the provider has answered the latest try, and nothing has ended it."""
        return "answer" in self._latest and self.over is None and not self.is_saved

    @property
    def is_in_the_air(self) -> bool:
        """Whether the latest try has left, and no answer is known."""
        return self._latest - {"plan"} == {"sent"}

    @property
    def is_open(self) -> bool:
        """Whether somebody should look at the job again: it was sent, and has neither audio nor another end."""
        return self.is_answered or self.is_in_the_air

    @property
    def is_paid(self) -> bool:
        """Whether the latest try is, or may be, paid for and not over, so that fetching it costs nothing."""
        return self.is_open or self.is_saved

    @property
    def _latest(self) -> set[str]:
        return self.states.get(self.last, set())


class Plan(BaseModel):
    """Where a text is split.

    Attributes:
        limit: The most that a part may have, in UTF-16 code units.
        spans: Where each part begins and ends, in characters of Python.
    """

    model_config = ConfigDict(frozen=True)

    limit: int
    spans: list[tuple[int, int]]


class Found(NamedTuple):
    """Audio that was saved before: where it is, which try it is of, who paid for it, and when that was saved."""

    audio: AudioFile
    place: Destination
    file_name: str
    number: int
    paid_by: RunReference
    paid_at: str


class Claim(NamedTuple):
    """A try that this process alone may submit."""

    job: str
    number: int
    token: str


class Ledger:
    """The notes in the folder `.nanogpt` of a folder of audio.

    Args:
        destination: The folder of the audio.
        beside: The folder that the notes are in instead, where it is another one.
    """

    # Of the whole process: attempts of one run, and threads, share what is not on disk yet.
    _under_way: Final[set[str]] = set()
    _never_sent: Final[set[str]] = set()
    _unwritten: Final[dict[str, dict[str, bytes]]] = {}
    _warned: Final[set[str]] = set()

    def __init__(self, destination: Destination, beside: Destination | None = None) -> None:
        self.destination = destination
        self._home = beside or destination
        self.place = self._home.shown
        self.folder = self._home.folder(FOLDER)
        self._remembered = self._unwritten.setdefault(self.folder.save_to, {})

    @classmethod
    def of(cls, destination: Destination, elsewhere: str | None = None) -> Ledger:
        """Find the ledger of a folder: beside the audio, or where `NANOGPT_LEDGER` or the credentials block say."""
        elsewhere = cls.elsewhere(elsewhere)
        return cls(destination, Destination(elsewhere) if elsewhere else None)

    @property
    def is_beside_audio(self) -> bool:
        """Whether the notes are in the folder of the audio, so that who can write them can write the audio."""
        return self._home is self.destination

    @staticmethod
    def elsewhere(setting: str | None) -> str | None:
        """Give the place that the credentials block (`setting`), or else `NANOGPT_LEDGER`, has for all ledgers."""
        return setting or os.environ.get("NANOGPT_LEDGER") or None

    async def run(self, method: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a method in a thread; whatever the storage raises becomes a `StorageError`."""
        return await self.folder.run(method, *args, **kwargs)

    def warnings(self) -> list[str]:
        """Say what is weak about this place, once in a process."""
        found = []
        if secrets_in(self.destination.save_to) and self.destination.save_to not in self._warned:
            self._warned.add(self.destination.save_to)
            found.append(
                f"The URL {self.destination.shown} was given with its password, and Prefect shows the parameters of a "
                "run to everybody who may see the run. Save a Remote File System block, or give the password in the "
                "environment (FSSPEC_FTP, FSSPEC_SFTP)."
            )
        if self.place in self._warned:
            return found
        if self._home.is_local and self._home is self.destination and is_temporary(Path(self.place)):
            found.append(
                f"{self.place} is in the system's temporary folder, and with it the record of what is paid for. Save "
                "elsewhere, or set NANOGPT_LEDGER to a folder that lasts."
            )
        if self._home is not self.destination and Ledger(self.destination).identity() is not None:
            found.append(
                f"{self.destination.shown} has a record of its own of what is paid for, which is not read while "
                f"another place is set for it ({self.place}): texts that are paid for there may be paid for again."
            )
        if not self.folder.claims_exclusively:
            found.append(
                f"{self.place} cannot create a file for one of several writers only. Two runs that say the same text "
                "there at the same moment may both pay for it; all else is kept as everywhere."
            )
        self._warned.add(self.place)
        return found

    # Reading

    def identity(self, *, create: bool = False) -> str | None:
        """Give what tells this ledger from any other, also at a place of the same name; None where it has none yet."""
        if (digits := self.folder.read(IDENTITY)) is None and create:
            digits = secrets.token_hex(16).encode()
            with suppress(Exception):  # whether anything may be submitted here is decided elsewhere
                if self.folder.create(IDENTITY, digits):
                    return digits.decode()
            digits = self.folder.read(IDENTITY)
        return (digits or b"").decode(errors="replace") or None

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        """List the jobs whose digests begin with `prefix`, with one listing of the folder."""
        entries: dict[str, Entry] = {}
        remembered = {name for name in list(self._remembered) if name.startswith(prefix)}
        for name in {*self.folder.list_files(prefix), *remembered}:
            if found := _NOTE.fullmatch(name):
                job, number, state = found[1], int(found[2]), found[3]
                entries.setdefault(job, Entry(job)).states.setdefault(number, set()).add(state)
        return entries

    def entry(self, job: str) -> Entry:
        """Look up one job."""
        return self.entries(f"{job}.").get(job) or Entry(job)

    def read_note(self, job: str, number: int, state: str) -> dict[str, Any]:
        """Read a note; an empty one where there is none, or only a torn one."""
        for pause in (TORN_SECONDS, 0.0):
            if (content := self._read(_name(job, number, state))) is None:
                break
            with suppress(ValueError, ArithmeticError, RecursionError):
                note = json.loads(content, parse_float=Decimal)
                return note if isinstance(note, dict) else {}
            time.sleep(pause)  # without hard links a note is there a moment before it is whole
        return {}

    def notes(self, entry: Entry) -> dict[int, dict[str, dict[str, Any]]]:
        """Read the notes of a job's tries, by number and state; an empty one is damaged, or gone by now."""
        return {
            number: {state: self.read_note(entry.job, number, state) for state in sorted(states - {"plan"})}
            for number, states in sorted(entry.states.items())
        }

    def _read(self, name: str) -> bytes | None:
        return self._remembered.get(name) or self.folder.read(name)

    def submission(self, entry: Entry, number: int | None = None) -> Submission | None:
        """Read what the provider answered to a try, by default the latest; an end has the ticket too.

        None where that is torn.
        """
        number = entry.last if number is None else number
        for state in sorted(entry.states.get(number, ())):
            with suppress(ValidationError, ValueError):
                match self.read_note(entry.job, number, state):
                    case {"ticket": dict() as ticket}:
                        return Ticket.model_validate(ticket)
                    case {"completed": dict() as completed}:
                        return Completed.model_validate(completed)
                    case {"base64": str() as encoded, "content_type": content_type}:
                        return AudioContent(content=b64decode(encoded, validate=True), content_type=content_type)
                    case {"audio": dict() as audio, "name": str() as name} as note:
                        place, name = self._locate(name, note)
                        content = place.read(name)
                        if content is not None and hashlib.sha256(content).hexdigest() == audio.get("sha256"):
                            return AudioContent(content=content, content_type=audio.get("content_type"))
                        if url := audio.get("source_url"):
                            return Completed(audio_url=url, cost=audio.get("cost"), currency=audio.get("currency"))
        return None

    def try_of(self, job: str, submission: Submission) -> int:
        """Find the number of the try that the provider gave this answer to."""
        entry = self.entry(job)
        numbers = sorted(entry.states, reverse=True)
        return next((number for number in numbers if self.submission(entry, number) == submission), entry.last)

    def audio(self, entry: Entry) -> Found | None:
        """Find intact audio of a job."""
        for number, state in entry.saved:
            note = self.read_note(entry.job, number, state)
            try:
                audio = AudioFile.model_validate(note.get("audio"))
            except ValidationError:
                continue
            place, name = self._locate(str(note.get("name")), note)
            for candidate in (name, kept_name(name, audio.sha256)):
                if place.has(candidate, audio.size_bytes, audio.sha256):
                    audio = audio.model_copy(update={"location": place.location_of(candidate)})
                    return Found(audio, place, candidate, number, run_in(note), str(note.get("at", "")))
        return None

    def seconds(self, entry: Entry) -> float | None:
        """Tell how long the audio of a job plays, as noted when it was saved; None where that is not known."""
        for number, state in sorted(entry.saved, reverse=True):
            with suppress(ValidationError):
                return AudioFile.model_validate(self.read_note(entry.job, number, state).get("audio")).duration_seconds
        return None

    def _locate(self, name: str, note: Mapping[str, Any]) -> tuple[Destination, str]:
        """Tell the folder of a file that a note names: that of a part is the ledger's own."""
        if name.startswith(f"{FOLDER}/"):
            return self.folder, name.removeprefix(f"{FOLDER}/")
        save_to = note.get("save_to", self.destination.shown)
        return (self.destination if save_to == self.destination.shown else Destination(save_to)), name

    def costs(self, *entries: Entry) -> dict[str | None, Decimal]:
        """Sum up what the provider said that the tries of jobs cost, by currency. Refunds are not known."""
        costs: dict[str | None, Decimal] = {}
        for entry in entries:
            for number in entry.charged:
                if (stated := self._stated(entry, number)) is not None:
                    currency, cost = stated
                    costs[currency] = costs.get(currency, Decimal(0)) + cost
        return costs

    def spent(self, entry: Entry, numbers: Collection[int]) -> dict[int, Decimal | None]:
        """Tell for a budget what tries of a job were, or may have been, charged in USD, by their numbers.

        Where the provider did not say, it is the price that was set aside before the try was sent; None where there
        was none. A try that somebody is still sending, or that certainly did not leave, is left out.
        """
        spent: dict[int, Decimal | None] = {}
        for number in numbers:
            if (stated := self._stated(entry, number)) is not None and stated[0] in (None, "USD"):
                spent[number] = stated[1]
                continue
            is_in_the_air = number == entry.last and entry.is_in_the_air
            if is_in_the_air and (self.may_still_be_answered(entry) or self.was_never_sent(entry)):
                continue
            price = self.read_note(entry.job, number, "sent").get("usd")
            spent[number] = None if price is None else Decimal(price)
        return spent

    def _stated(self, entry: Entry, number: int) -> tuple[str | None, Decimal] | None:
        """Read what the provider said that a try cost: the currency and the amount."""
        states = sorted(entry.states[number] - {"sent", "plan"})
        return charge_in(self.read_note(entry.job, number, state) for state in states)

    def that_left(self, entry: Entry) -> Entry:
        """Leave out the latest try of a job where it is one of this process that certainly did not leave."""
        if not (entry.is_in_the_air and self.was_never_sent(entry)):
            return entry
        return Entry(entry.job, {number: states for number, states in entry.states.items() if number < entry.last})

    def may_still_be_answered(self, entry: Entry) -> bool:
        """Whether whoever sent the latest try may still be waiting for the answer."""
        note = self.read_note(entry.job, entry.last, "sent")
        if note.get("token") in self._under_way:
            return True
        try:
            age = datetime.now(UTC) - datetime.fromisoformat(note["at"])
            return not _is_gone(note["sender"]) and -CLOCKS_DIFFER_SECONDS < age.total_seconds() < SILENCE_SECONDS
        except (KeyError, TypeError, ValueError):
            return False

    def was_never_sent(self, entry: Entry) -> bool:
        """Whether the latest try is one of this process that certainly did not leave."""
        return self.read_note(entry.job, entry.last, "sent").get("token") in self._never_sent

    # Writing

    def claim(self, job: Job, number: int, usd: Decimal | None = None) -> Claim | None:
        """Note that a try is about to be sent; None where another has noted it first.

        `usd` is what a budget has set aside for it, should the provider never say what it cost.

        Raises:
            StorageError: It is not known whether the note was written, and so nothing may be sent.
        """
        claim = Claim(job.id, number, secrets.token_hex(16))
        note = self._about(job) | {"token": claim.token, "sender": _this_process(), "is_part": job.is_part}
        if job.request is not None:
            note |= {"model": job.request.model, "text": job.request.text[:200], "take": job.take}
        if usd is not None:
            note["usd"] = str(usd)
        self._under_way.add(claim.token)
        try:
            if self.folder.create(_name(job.id, number, "sent"), _json(note)):
                return claim
        except Exception as error:
            self.release(claim, never_sent=True)
            if isinstance(error, NanoGPTError):
                raise
            raise self.folder.failure(error) from self.folder.cause(error)
        self.release(claim)
        return None

    def release(self, claim: Claim, *, never_sent: bool = False) -> None:
        """Say that this process has no request of the claim in the air any more, or that it never had."""
        if never_sent:
            self._never_sent.add(claim.token)
        self._under_way.discard(claim.token)

    def note_answer(self, claim: Claim, submission: Submission) -> StorageError | None:
        """Note what the provider answered; where that fails, remember it, and give the failure."""
        note: dict[str, Any] = {}
        match submission:
            case Ticket():
                note = _ticket_in(submission)
            case Completed():
                told = submission.model_copy(update={"audio_url": split_login(submission.audio_url)[0]})
                note["completed"] = told.model_dump(mode="json", exclude_none=True)
            case AudioContent():
                encoded = b64encode(submission.content).decode()
                note |= {"base64": encoded, "content_type": submission.content_type}
        return self._write(_name(claim.job, claim.number, "answer"), _json(note))[1]

    def note_over(self, job: str, number: int, over: Over, error: NanoGPTError) -> bool:
        """Note that a try came to nothing, and whether this call did."""
        note = {"code": error.code, "message": error.message, **_ticket_in(error.ticket)}
        return self._end(job, number, f"over-{over}", note)

    def note_saved(
        self,
        job: Job,
        number: int,
        audio: AudioFile,
        paid_by: RunReference | None = None,
        parts: int | None = None,
    ) -> bool:
        """Note a file that has the audio of a try, and whether this call did.

        `paid_by` is the run that had paid for it, where another one has; `parts` of how many parts it was joined, each
        of them a job that has its own cost.
        """
        folder, _, name = audio.location.rpartition("/")
        if f"{folder}/" == self.folder.location_of(""):
            name = f"{FOLDER}/{name}"
        told = audio.model_dump(mode="json", exclude_none=True)
        note: dict[str, Any] = {"provider": job.provider, "name": name, "audio": told}
        note |= self._elsewhere() | _ticket_in(audio.ticket)
        if paid_by is not None:
            note["run"] = paid_by.model_dump()
        if parts is not None:
            note["parts"] = parts
        state = saved_as(name, audio.sha256)
        is_new = self._end(job.id, number, state, note)
        is_only_copy = audio.ticket is None and audio.source_url is None and self._home is not self.destination
        if not is_only_copy and _name(job.id, number, state) not in self._remembered:
            answer = _name(job.id, number, "answer")
            self._remembered.pop(answer, None)
            try:
                self.folder.remove(answer)
            except Exception as error:  # not allowed to, or not now; the end counts all the same
                run_logger().debug("%s cannot be removed: %s", answer, error)
        return is_new

    def note_ticket(self, job: Job, ticket: Ticket) -> None:
        """Note the ticket of a job that was submitted elsewhere, so that it is open like any other."""
        note = self._about(job) | _ticket_in(ticket)
        self.folder.create(_name(job.id, 1, "answer"), _json(note))

    def open_job_of(self, provider: str, ticket: Ticket) -> Job | None:
        """Find the job of a text that is still open here and that this is the ticket of."""
        for entry in self.entries().values():
            if not entry.is_answered:
                continue
            match answer := self.read_note(entry.job, entry.last, "answer"):
                case {"ticket": {"runId": run_id}} if run_id == ticket.run_id:
                    note = answer | self.read_note(entry.job, entry.last, "sent")
                    if note.get("provider") == provider and not note.get("is_part"):
                        return Job(provider, name=note.get("name"), ticket=ticket, noted_as=entry.job)
        return None

    def plan(self, job: str) -> Plan | None:
        """Read where the text of a job was split; None where it was not, or where the note is damaged."""
        with suppress(ValidationError):
            return Plan.model_validate(self.read_note(job, 1, "plan"))
        return None

    def note_plan(self, job: str, plan: Plan) -> None:
        """Note where the text of a job is split."""
        self.folder.create(_name(job, 1, "plan"), _json(plan.model_dump()))

    async def catch_up(self) -> None:
        """Try again, in a thread, to write what could not be written; nothing where there is nothing."""
        if self._remembered:
            await self.run(self.flush)

    def flush(self) -> None:
        """Try again to write what could not be written."""
        for name, content in list(self._remembered.items()):
            self._write(name, content, attempts=1)

    def _about(self, job: Job) -> dict[str, Any]:
        """Give what the collector needs to know of a job."""
        return {"provider": job.provider, "name": job.name, **self._elsewhere()}

    def _elsewhere(self) -> dict[str, Any]:
        if self._home is self.destination:
            return {}
        return {"save_to": self.destination.shown, "machine": socket.gethostname()}

    def _end(self, job: str, number: int, state: str, note: Mapping[str, Any]) -> bool:
        is_new, failure = self._write(_name(job, number, state), _json(note))
        if failure is not None:
            run_logger().warning("The end of job %s cannot be noted now, and will be tried again: %s", job, failure)
        return is_new

    def _write(self, name: str, content: bytes, attempts: int = NOTE_ATTEMPTS) -> tuple[bool, StorageError | None]:
        """Write a note that must not be lost; as long as that fails, this process remembers it.

        Returns:
            Whether it is this call's, and not there already; and why it could not be written.
        """
        failure: Exception | None = None
        self._remembered[name] = content
        for attempt in range(attempts):
            try:
                is_new = self.folder.create(name, content)
                if not is_new and _is_torn(self.folder.read(name)):
                    self.folder.write(name, content)
                    is_new = True
            except Exception as error:
                failure = error
                time.sleep(0.05 * 2**attempt)
            else:
                self._remembered.pop(name, None)
                return is_new, None
        assert failure is not None
        return True, failure if isinstance(failure, StorageError) else self.folder.failure(failure)


def _whole(number: float) -> float:
    return int(number) if number.is_integer() else number


def run_in(note: Mapping[str, Any]) -> RunReference:
    """Give the run that a note names; one without id and name where that is damaged, since it is only for people."""
    with suppress(ValidationError):
        return RunReference.model_validate(note.get("run") or {})
    return RunReference()


def charge_in(notes: Iterable[Mapping[str, Any]]) -> tuple[str | None, Decimal] | None:
    """Give what the provider said that a try cost, currency and amount, by its notes; None where it did not say."""
    for note in notes:
        with suppress(AttributeError, ArithmeticError):  # of a note that was edited
            told = note.get("ticket") or note.get("completed") or note.get("audio") or {}
            # Every note of a try tells of the same charge.
            if told.get("cost") is not None and (cost := Decimal(str(told["cost"]))).is_finite():
                return told.get("paymentSource") or told.get("currency"), cost
    return None


def by_currency(charges: Iterable[tuple[str | None, Decimal]]) -> dict[str, Decimal]:
    """Sum up what was charged, each currency by itself; no unit means USD."""
    sums: dict[str, Decimal] = {}
    for currency, cost in charges:
        sums[currency or "USD"] = sums.get(currency or "USD", Decimal(0)) + cost
    return sums


def amounts(costs: Mapping[str | None, Decimal]) -> dict[str, Any]:
    """Give the fields of a row that tell what was charged: USD first, which is what no unit means."""
    others = dict(costs)
    if None in others and "USD" in others:
        others["USD"] += others.pop(None)
    first = next((currency for currency in ("USD", None, *others) if currency in others), None)
    return {"cost": others.pop(first, None), "currency": first, "other_costs": others or None}


def saved_as(name: str, sha256: str) -> str:
    """Give the state of a try whose audio is a file of that name and digest."""
    return f"saved-{hashlib.sha256(f'{name} {sha256}'.encode()).hexdigest()[:8]}"


def _this_process() -> dict[str, Any]:
    """Describe this process, so that others on the machine can tell whether it still lives."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def _is_gone(sender: Mapping[str, Any]) -> bool:
    """Whether a process that sent something is dead, or is this one, which would know of it."""
    if sender["machine"] != _machine() or os.name == "nt":  # where the signal 0 is Ctrl-C
        return False
    try:
        os.kill(sender["pid"], 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return bool(sender["pid"] == os.getpid() or _started(sender["pid"]) != sender["started"])


def _machine() -> str:
    """Name the machine, its boot and the space that its process ids are of."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process began, in the kernel's ticks, so that a number that is used again is another process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _ticket_in(ticket: Ticket | None) -> dict[str, Any]:
    """Give what a note says of a ticket."""
    return {} if ticket is None else {"ticket": ticket.model_dump(mode="json", exclude_none=True)}


def _is_torn(note: bytes | None) -> bool:
    """Whether a note is only begun: its writer, this process or another, met a full disk."""
    try:
        return not isinstance(json.loads(note or b""), dict)
    except (ValueError, RecursionError):
        return True


def _name(job: str, number: int, state: str) -> str:
    return f"{job}.{number}.{state}.json"


def _json(note: Mapping[str, Any]) -> bytes:
    """Write a note. Its time and run make it unlike another's, so that nobody takes that for its own."""
    told = {"at": datetime.now(UTC).isoformat(), "run": this_run().model_dump(), **note}
    # Half a character, should there be one in somebody's words, is escaped as JSON escapes it.
    return json.dumps(told, ensure_ascii=False, default=str).encode(errors="backslashreplace")
