"""What people look at: the artifacts of a run, which tell from the first moment how to get at what was paid for.

The provider's words and the text are escaped: in the artifact they are text, whatever they contain.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from functools import wraps
from typing import Final, Literal, ParamSpec, TypeVar
from urllib.parse import quote, urlsplit
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
from prefect.context import FlowRunContext
from pydantic import SecretStr

from prefect_nanogpt.connections import split_login
from prefect_nanogpt.errors import (
    AudioError,
    ContentPolicyViolation,
    NanoGPTError,
    NothingSent,
    SubmissionUncertain,
    TTSJobRejected,
)
from prefect_nanogpt.events import resume_command, run_logger
from prefect_nanogpt.job import Said
from prefect_nanogpt.models import HUMMED, Pending, Ticket
from prefect_nanogpt.storage import Destination, Links
from prefect_nanogpt.waveform import draw_steps, draw_waveform

__all__ = ["Artifact", "Report", "escaped", "link", "links_to", "only_to_look_at", "quietly", "to_hear_and_keep"]

P = ParamSpec("P")
R = TypeVar("R")

GO_ON: Final = (
    "Press *Retry* on this run, or start another one with the same parameters (*Copy to new run*): it finds what is "
    "paid for."
)
RESUBMIT: Final = (
    "start another run with the same parameters (*Copy to new run* or *Custom run*) and *Resubmit* set to "
)
OURS: Final = {"written-by": "prefect-nanogpt"}
"""Tells our artifacts from those that the flows of others make in the same run."""
EARLIER: Final = "\n---\n\nWhat an earlier attempt of this run had reported:"
LONGEST_QUOTE: Final = 500
"""How much of the text or of the provider's words is shown, in characters."""


def escaped(words: str, limit: int = LONGEST_QUOTE) -> str:
    """Make text safe inside markdown: one line, cut, and with no character left that could mean markup.

    Example:
        >>> escaped("[a](http://b) <img>")
        '\\\\[a\\\\]\\\\(http\\\\:\\\\/\\\\/b\\\\) \\\\<img\\\\>'
    """
    words = " ".join("".join(c if c.isprintable() else " " for c in words).split())
    if len(words) > limit:
        words = words[: limit - 1].rstrip() + "…"
    return re.sub(r"([!-/:-@\[-`{-~])", r"\\\1", words)


async def quietly(call: Awaitable[R]) -> R | None:
    """Await something that is only to look at: if it fails, that is a warning."""
    try:
        return await call
    except Exception as error:
        run_logger().warning("The report could not be written to Prefect: %s: %s", type(error).__name__, error)
        return None


def only_to_look_at(method: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """Make a method one that ends nothing, whatever it meets in what it is to show."""

    @wraps(method)
    async def show(*args: P.args, **kwargs: P.kwargs) -> None:
        await quietly(method(*args, **kwargs))

    return show


class Artifact:
    """One artifact of a run, which later news and later attempts of the run change.

    Where it cannot be written, that is a warning: the job matters more. Nothing reads back what it says.

    Args:
        kind: What Prefect shows it as.
        key: Its key.
        artifact: Its id, where it is there already.
    """

    def __init__(self, kind: Literal["markdown", "table"], key: str, artifact: UUID | None = None) -> None:
        self._kind = kind
        self._key = key
        self._artifact = artifact
        self._earlier = ""

    @only_to_look_at
    async def show(self, data: str, description: str, *, keep_earlier: bool = False) -> None:
        """Write it.

        Args:
            data: The markdown, or the table as JSON.
            description: The words beside it.
            keep_earlier: Whether what an earlier attempt had written is kept below the markdown.
        """
        context = FlowRunContext.get()
        flow_run = context.flow_run if context else None
        async with get_client() as client:
            if self._artifact is None and flow_run is not None and flow_run.run_count > 1:
                for earlier in await client.read_artifacts(
                    artifact_filter=ArtifactFilter(key={"any_": [self._key]}),
                    flow_run_filter=FlowRunFilter(id={"any_": [flow_run.id]}),
                    limit=1,
                ):
                    self._artifact = earlier.id
                    self._earlier = str(earlier.data or "").rpartition(EARLIER)[2].lstrip("\n")
            if keep_earlier and self._earlier:
                data = f"{data}{EARLIER}\n\n{self._earlier}"
            if self._artifact is not None:
                await client.update_artifact(self._artifact, ArtifactUpdate(data=data, description=description))
                return
            artifact = ArtifactCreate(
                type=self._kind, key=self._key, description=description, data=data, metadata_=OURS
            )
            artifact.flow_run_id = flow_run.id if flow_run else None
            self._artifact = (await client.create_artifact(artifact)).id


SOUND_UNCHECKED: Final = (
    "The audio is saved. Its sound was not checked, and its duration may not be known: that takes a decoder, which "
    "comes with the extra `audio` of prefect-nanogpt."
)


class Report:
    """The report of a run about one text. What is paid for is in the ledger; this only tells of it.

    Args:
        key: The key of the markdown artifact.
        save_to: Where the audio is to go.
        text: What is said, where it is known.

    Attributes:
        ticket: The job that the run is about, once there is one.
        paid: What is paid for, in words, where that is more than the one ticket.
        said_as: What is said for the text, where a pronunciation has changed it.
    """

    def __init__(self, key: str, save_to: str, text: str | None = None) -> None:
        self.ticket: Ticket | None = None
        self.paid: str | None = None
        self.said_as: str | None = None
        self._save_to = SecretStr(save_to)  # it may have a password
        self._text = text
        self._artifact = Artifact("markdown", key)
        self._is_done = False
        self._positions: list[tuple[float, int]] = []
        self._started, self._since = time.monotonic(), datetime.now(UTC)

    @classmethod
    async def of_run(cls, flow_run_id: str, save_to: str, text: str | None) -> Report | None:
        """Take up the report of another run, to bring it up to date; None where it has none."""
        async with get_client() as client:
            found = await client.read_artifacts(
                artifact_filter=ArtifactFilter(type={"any_": ["markdown"]}),
                flow_run_filter=FlowRunFilter(id={"any_": [UUID(flow_run_id)]}),
            )
        found = [artifact for artifact in found if artifact.metadata_ == OURS]
        if len(found) != 1:
            return None
        key = found[0].key or "tts-audio"
        report = cls(key, save_to, text)
        report._artifact = Artifact("markdown", key, found[0].id)
        return report

    @property
    def is_begun(self) -> bool:
        """Whether there is something that a reader can go on with."""
        return self.ticket is not None or self.paid is not None

    @only_to_look_at
    async def waiting(self) -> None:
        """Show what is paid for, before anything can happen to this process."""
        self._started, self._since = time.monotonic(), datetime.now(UTC)
        await self._tell_of_the_wait("")

    async def _tell_of_the_wait(self, how_far: str) -> None:
        since = f"Waiting since {self._since:%Y-%m-%d %H:%M:%S} UTC.{how_far}"
        note = f"{since} If this run ends without audio, nothing is lost: see below."
        await self._write("Speech under way", note, self._job_facts(), is_open=True)

    @only_to_look_at
    async def progress(self, pending: Pending) -> None:
        """Show a job that is under way, by its place in the queue, which is all that the provider tells of it."""
        if (position := pending.queue_position) is None:
            return
        self._positions.append((time.monotonic() - self._started, position))
        await self._tell_of_the_wait(f" The job has place {position} in the queue.")

    @only_to_look_at
    async def finished(self, said: Said, place: Destination) -> None:
        """Show where to hear the audio, where it is, what it is, and who paid for it.

        Args:
            said: The audio.
            place: The folder that it is in.
        """
        audio = said.audio
        self.ticket = audio.ticket or self.ticket
        self._is_done = True
        note = "The audio is saved and verified." if audio.is_decoded else SOUND_UNCHECKED
        if not said.is_new:
            note = "The audio was there already, so nothing was sent and nothing was charged now."
            if said.paid_by is not None and said.paid_by.name:
                at = f" at {said.paid_at[:19].replace('T', ' ')} UTC" if said.paid_at else ""
                note += f" It was saved by the run {escaped(said.paid_by.name)}{escaped(at)}."
        if audio.is_hummed:
            note += f" {HUMMED}"
        facts = [
            ("Audio", _code(audio.location)),
            ("Duration", f"{audio.duration_seconds:.2f} s" if audio.duration_seconds is not None else None),
            ("Size", f"{audio.size_bytes:,} bytes, {audio.container} ({audio.content_type})"),
            ("SHA-256", _code(audio.sha256)),
            *self._job_facts(audio.cost, audio.currency),
            ("Waited", f"{audio.waited_seconds:.1f} s, {audio.polls} status calls" if audio.polls else None),
            ("At the provider", _provider_link(audio.source_url)),
        ]
        pictures = []
        if audio.peaks:
            pictures.append(f"![Waveform]({draw_waveform(audio.peaks)})")
        if len(self._positions) > 1:
            pictures.append(f"![Queue position over time]({draw_steps(self._positions, audio.waited_seconds)})")
        file_name = audio.location.rpartition("/")[2]
        links = (await links_to(place, [file_name])).get(file_name)
        await self._write("Speech ready", note, facts, pictures, links=links)

    @only_to_look_at
    async def failed(self, error: NanoGPTError) -> None:
        """Show the code, the provider's words, what became of the money, and what to do next."""
        if error.ticket is not None:
            self.ticket = error.ticket
        facts = [
            ("Code", _code(error.code)),
            ("Reason", escaped(error.message)),
            ("HTTP status", str(error.http_status) if error.http_status else None),
            ("Request id", escaped(error.request_id) if error.request_id else None),
            *self._job_facts(),
        ]
        note = " ".join(filter(None, [self.paid, self._money_at_stake(error)]))
        await self._write(f"No speech: {error.code}", note, facts, is_open=_is_open(error, self.ticket))

    @only_to_look_at
    async def interrupted(self) -> None:
        """Say, while the process is being stopped, that the job goes on without it."""
        await self._write(
            "Stopped while waiting",
            "The run was stopped. What was submitted goes on at the provider and stays paid for.",
            self._job_facts(),
            is_open=True,
        )

    def _money_at_stake(self, error: NanoGPTError) -> str:
        ticket = self.ticket
        match error:
            case SubmissionUncertain():
                return (
                    "It is not known whether the provider accepted this job. If it did, it was charged: compare your "
                    f"balance. To submit it anew, and perhaps pay twice, {RESUBMIT}`uncertain`."
                )
            case NothingSent():
                return "The request never left, so nothing was charged for it. Press *Retry*."
            case _ if ticket is None and isinstance(error, ContentPolicyViolation):
                return "The provider refused the text, and would refuse the same text again."
            case AudioError() if ticket is None:
                return (
                    f"{'' if self.paid else 'It is paid for. '}What can be done about its audio is said in the reason."
                )
            case _ if ticket is None:
                return "" if self.paid else "This attempt is not known to have been charged for anything."
            case ContentPolicyViolation():
                refund = (
                    "The provider documents an automatic refund for this, requested by the status calls, which carried "
                    "the ticket's cost; whether it was paid, only your balance tells."
                    if ticket.cost is not None
                    else "The ticket came without its cost, which the provider's automatic refund is said to go by."
                )
                return f"The provider refused the text, and would refuse the same text again. {refund}"
            case TTSJobRejected(is_certain=False):
                return "The job was paid for. The provider says that this is its end, in words that are not known."
            case TTSJobRejected():
                return (
                    "The provider gave up on the job. Whether it refunds such a failure is not documented; your "
                    "balance tells. Submitting the text anew starts, and charges, a new job."
                )
            case _ if error.http_status == httpx.codes.NOT_FOUND:
                return (
                    "The job was paid for, and the provider does not know it, or no longer. Another run asks again, at "
                    f"no cost.{f' To pay for the text anew, {RESUBMIT}`lost`.' if self._text else ''}"
                )
            case _:
                return "The job is paid for, and as far as is known the provider still has it."

    def _job_facts(self, cost: Decimal | None = None, currency: str | None = None) -> list[tuple[str, str | None]]:
        texts = [
            ("Text", escaped(self._text) if self._text else None),
            ("Said as", escaped(self.said_as) if self.said_as else None),
        ]
        if self.ticket is None:
            return [*texts, ("Cost", _money(cost, currency))]
        return [
            *texts,
            ("Model", escaped(self.ticket.model)),
            ("Run id", _code(self.ticket.run_id)),
            ("Cost", _money(self.ticket.cost, self.ticket.payment_source)),
        ]

    async def _write(
        self,
        title: str,
        note: str,
        facts: Iterable[tuple[str, str | None]],
        pictures: Iterable[str] = (),
        *,
        is_open: bool = False,
        links: Links | None = None,
    ) -> None:
        rows = [f"| {name} | {value} |" for name, value in facts if value]
        parts = [f"# {escaped(title)}", *to_hear_and_keep(links), note, *pictures]
        parts.append("\n".join(["| | |", "|---|---|", *rows]))
        if self.ticket is not None and self.paid is None:
            parts.append(
                _how_to_resume(self.ticket, self._save_to.get_secret_value())
                if is_open
                else f"## Ticket\n\n{_as_json(self.ticket)}"
            )
        elif is_open and self.paid is not None:
            parts.append(f"## To get the audio\n\n{self.paid} {GO_ON}")
        # An attempt that failed before it knew of the job takes nothing away.
        keep_earlier = not self.is_begun and not self._is_done
        await self._artifact.show("\n\n".join(parts) + "\n", title, keep_earlier=keep_earlier)


def _code(words: str) -> str:
    """Set plain words in code type; what could end the code or the table cell is escaped text instead."""
    return f"`{words}`" if re.fullmatch(r"[\w./:+=@~ -]+", words) else escaped(words)


def link(label: str, url: str | None) -> str | None:
    """Write a link, without the login that the URL may have; None where it is none that the UI would follow."""
    try:
        parts = urlsplit(split_login(url or "")[0])
    except ValueError:
        return None
    if parts.scheme not in {"http", "https"}:
        return None
    return f"[{label}]({quote(parts.geturl(), safe=':/?#@!$&*+,;=%~-._')})"


def _provider_link(url: str | None) -> str | None:
    with suppress(ValueError):
        # The V1 UI shows the backslashes of escapes within a link.
        host = re.sub(r"[^A-Za-z0-9.-]", "", urlsplit(url or "").hostname or "")
        if found := link(f"at {host or 'the provider'}", url):
            return f"{found}, for as long as it is kept there"
    return None


def to_hear_and_keep(links: Links | None, *, all_of_it: bool = False) -> list[str]:
    """Write the paragraph with the links to audio; none where there are no links.

    Args:
        links: The links.
        all_of_it: Whether they lead to all that a folder has.
    """
    labels = ("Listen to all", "Download all") if all_of_it else ("Listen", "Download")
    found = [link(label, url) for label, url in zip(labels, links[:2], strict=True)] if links else []
    written = " · ".join(filter(None, found))
    if not links or not written:
        return []
    return [f"{written}, {links.lasts}." if links.lasts else written]


async def links_to(place: Destination, names: Iterable[str]) -> dict[str, Links]:
    """Find the links to files in a folder, by their names; of those that have any."""
    try:
        found = await asyncio.to_thread(lambda: {name: place.links(name) for name in names})
    except ValueError as error:
        run_logger().warning("%s", error)
        return {}
    return {name: links for name, links in found.items() if links is not None}


def _money(cost: Decimal | None, currency: str | None) -> str | None:
    return None if cost is None else escaped(f"{cost.normalize():f} {currency or ''}")


def _as_json(ticket: Ticket) -> str:
    return f"```json\n{ticket.to_json(indent=2)}\n```"


def _how_to_resume(ticket: Ticket, save_to: str) -> str:
    return (
        f"## To get the audio\n\n{GO_ON} Or run `wait-for-tts` with this ticket:\n\n"
        f"{_as_json(ticket)}\n\n"
        f"or, in a shell:\n\n```sh\n{resume_command(ticket, save_to)}\n```"
    )


def _is_open(error: NanoGPTError, ticket: Ticket | None) -> bool:
    """Whether another run may get the audio of what is paid for."""
    is_only_answer = isinstance(error, AudioError) and ticket is None and not error.retryable
    has_ended = isinstance(error, TTSJobRejected) and error.is_certain
    return not (is_only_answer or has_ended or isinstance(error, SubmissionUncertain))
