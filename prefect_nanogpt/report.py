"""What people look at: one markdown artifact a run, which tells from the first moment how to get at what was paid for.

The provider's words and the text are escaped: in the artifact they are text, whatever they contain.
"""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Awaitable, Iterable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, Literal, TypeVar
from urllib.parse import quote, urlsplit
from uuid import UUID

from prefect.artifacts import acreate_progress_artifact, aupdate_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import Artifact
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.logging import get_run_logger

from prefect_nanogpt.errors import ContentPolicyViolation, NanoGPTError, SubmissionUncertain, TTSJobRejected, TTSTimeout
from prefect_nanogpt.models import AudioFile, Pending, Ticket
from prefect_nanogpt.waveform import draw_steps, draw_waveform

__all__ = ["OPEN_TICKET", "OPEN_UNTIL", "SAVE_TO", "Report", "announce", "escaped", "quietly", "resume_command"]

R = TypeVar("R")

OPEN_TICKET: Final = "nanogpt_open_ticket"
"""The artifact's metadata hold the ticket under this name for as long as neither audio nor a rejection is known."""
OPEN_UNTIL: Final = "nanogpt_open_until"
"""When the deadline of the run passes, in ISO 8601; a run cannot be alive long after."""
SAVE_TO: Final = "nanogpt_save_to"
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


def announce(what: Literal["submitted", "completed", "rejected", "timed-out"], ticket: Ticket, **details: Any) -> None:
    """Emit the event `nanogpt.tts.<what>` about a job, for automations. Neither the text nor the key is in it.

    Prefect adds the flow run, the task run, the deployment and their tags as related resources.
    """
    payload = {"run_id": ticket.run_id, "model": ticket.model, "currency": ticket.payment_source, **details}
    if ticket.cost is not None:
        payload["cost"] = f"{ticket.cost:f}"
    emit_event(
        event=f"nanogpt.tts.{what}",
        resource={
            "prefect.resource.id": f"nanogpt.tts.{ticket.run_id}",
            "prefect.resource.name": ticket.run_id,
            "nanogpt.model": ticket.model,
        },
        payload={name: value for name, value in payload.items() if value is not None},
    )


class Report:
    """The artifacts of one run. A report that cannot be written is a warning: the job matters more.

    Args:
        key: The key of the markdown artifact; the progress artifact has `-progress` behind it.
        save_to: Where the audio is to go.
        ticket: The job that the run is about, where it is known from the start.
        text: What is said, where it is known.

    Attributes:
        ticket: The job that the run is about, once there is one.
    """

    def __init__(self, key: str, save_to: str, ticket: Ticket | None = None, text: str | None = None) -> None:
        self.ticket = ticket
        self._key = key
        self._save_to = save_to
        self._text = text
        self._artifact: UUID | None = None
        self._progress: UUID | None = None
        self._positions: list[tuple[float, int]] = []
        self._started = time.monotonic()
        self._open_until = datetime.now(UTC)

    @classmethod
    def of(cls, artifact: Artifact, save_to: str, ticket: Ticket, text: str | None) -> Report:
        """Take up the report of another run, to bring it up to date."""
        report = cls(artifact.key or "tts-audio", save_to, ticket, text)
        report._artifact = artifact.id
        return report

    async def waiting(self, timeout_seconds: float) -> None:
        """Show the ticket, before anything can happen to this process."""
        now = datetime.now(UTC)
        self._started = time.monotonic()
        self._open_until = now + timedelta(seconds=timeout_seconds)
        await self._write(
            "Speech under way",
            f"Waiting since {now:%Y-%m-%d %H:%M:%S} UTC. If this run ends without audio, nothing is lost: see below.",
            self._job_facts(),
            is_open=True,
        )

    async def progress(self, pending: Pending) -> None:
        """Show a job that is under way, by its place in the queue, which is all that the provider tells of it."""
        done, what = 0.0, "Waiting for the audio."
        if (position := pending.queue_position) is not None:
            self._positions.append((time.monotonic() - self._started, position))
            highest = max(position for _, position in self._positions)
            done, what = 100.0 * (highest - position) / (highest + 1), f"Queue position {position}."
        if self._progress is None:
            self._progress = await quietly(
                acreate_progress_artifact(progress=done, key=f"{self._key}-progress", description=what)
            )
        else:
            await quietly(aupdate_progress_artifact(self._progress, done, what))

    async def finished(self, audio: AudioFile, note: str = "The audio is saved and verified.") -> None:
        """Show where the audio is, and what it is."""
        facts = [
            ("Audio", _code(audio.location)),
            ("Duration", f"{audio.duration_seconds:.2f} s" if audio.duration_seconds is not None else None),
            ("Size", f"{audio.size_bytes:,} bytes, {audio.container} ({audio.content_type})"),
            ("SHA-256", _code(audio.sha256)),
            *self._job_facts(audio.cost, audio.currency),
            ("Waited", f"{audio.waited_seconds:.1f} s, {audio.polls} status calls" if audio.polls else None),
            ("Listen", _link(audio.source_url)),
        ]
        pictures = []
        if audio.peaks:
            pictures.append(f"![Waveform]({draw_waveform(audio.peaks)})")
        if len(self._positions) > 1:
            pictures.append(f"![Queue position over time]({draw_steps(self._positions, audio.waited_seconds)})")
        await self._write("Speech ready", note, facts, pictures)
        if self.ticket is not None:
            announce(
                "completed",
                self.ticket,
                location=audio.location,
                sha256=audio.sha256,
                duration_seconds=audio.duration_seconds,
            )
        if self._progress is not None:
            await quietly(aupdate_progress_artifact(self._progress, 100.0, "The audio is saved."))

    async def failed(self, error: NanoGPTError) -> None:
        """Show the code, the provider's words, what became of the money, and what to do next."""
        facts = [
            ("Code", _code(error.code)),
            ("Reason", escaped(error.message)),
            ("HTTP status", str(error.http_status) if error.http_status else None),
            ("Request id", escaped(error.request_id) if error.request_id else None),
            *self._job_facts(),
        ]
        title = f"No speech: {error.code}"
        await self._write(
            title, _money_at_stake(error, self.ticket), facts, is_open=not isinstance(error, TTSJobRejected)
        )
        if self.ticket is not None and isinstance(error, TTSJobRejected):
            announce("rejected", self.ticket, code=error.code)
        elif self.ticket is not None and isinstance(error, TTSTimeout):
            announce("timed-out", self.ticket, code=error.code)

    async def interrupted(self) -> None:
        """Say, while the process is being stopped, that the job goes on without it."""
        await self._write(
            "Stopped while waiting",
            "The run was stopped. The job goes on at the provider and stays paid for.",
            self._job_facts(),
            is_open=True,
        )

    def _job_facts(self, cost: Decimal | None = None, currency: str | None = None) -> list[tuple[str, str | None]]:
        text = ("Text", escaped(self._text) if self._text else None)
        if self.ticket is None:
            return [text, ("Cost", _money(cost, currency))]
        return [
            text,
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
    ) -> None:
        rows = [f"| {name} | {value} |" for name, value in facts if value]
        parts = [f"# {escaped(title)}", note, *pictures, "\n".join(["| | |", "|---|---|", *rows])]
        metadata = {}
        if self.ticket is not None:
            parts.append(_how_to_resume(self.ticket) if is_open else f"## Ticket\n\n{_as_json(self.ticket)}")
        if is_open and self.ticket is not None:
            metadata = {
                OPEN_TICKET: self.ticket.to_json(),
                OPEN_UNTIL: self._open_until.isoformat(),
                SAVE_TO: self._save_to,
            }
        await quietly(self._put("\n\n".join(parts) + "\n", title, metadata))

    async def _put(self, markdown: str, description: str, metadata: dict[str, str]) -> None:
        """Write the artifact: one for a run, which later attempts and later news change."""
        context = FlowRunContext.get()
        flow_run = context.flow_run if context else None
        async with get_client() as client:
            if self._artifact is None and flow_run is not None and flow_run.run_count > 1:
                earlier = await client.read_artifacts(
                    artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[self._key])),
                    flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])),
                )
                self._artifact = earlier[0].id if earlier else None
            if self._artifact is None:
                artifact = ArtifactCreate(
                    type="markdown",
                    key=self._key,
                    description=description,
                    data=markdown,
                    metadata_=metadata,
                    flow_run_id=flow_run.id if flow_run else None,
                )
                self._artifact = (await client.create_artifact(artifact)).id
            else:
                update = ArtifactUpdate(data=markdown, description=description, metadata_=metadata)
                await client.update_artifact(self._artifact, update)


async def quietly(call: Awaitable[R]) -> R | None:
    """Await something that is only to look at: if it fails, that is a warning."""
    try:
        return await call
    except Exception as error:
        get_run_logger().warning("The report could not be written to Prefect: %s", error)
        return None


def _code(words: str) -> str:
    """Set plain words in code type; what could end the code or the table cell is escaped text instead."""
    return f"`{words}`" if re.fullmatch(r"[\w./:+=@~ -]+", words) else escaped(words)


def _link(url: str | None) -> str | None:
    if url is None or urlsplit(url).scheme not in {"http", "https"}:
        return None
    # The V1 UI shows the backslashes of escapes within a link.
    host = re.sub(r"[^A-Za-z0-9.-]", "", urlsplit(url).hostname or "")
    return f"[at {host or 'the provider'}]({quote(url, safe=':/?#@!$&*+,;=%~-._')}), for as long as it is kept there"


def _money(cost: Decimal | None, currency: str | None) -> str | None:
    return None if cost is None else escaped(f"{cost.normalize():f} {currency or ''}")


def resume_command(ticket: Ticket) -> str:
    """Write the shell command that waits for a ticket again."""
    words = ["prefect-nanogpt", "wait", ticket.run_id, "--model", ticket.model]
    if ticket.cost is not None:
        words += ["--cost", f"{ticket.cost:f}"]
    if ticket.payment_source:
        words += ["--payment-source", ticket.payment_source]
    return shlex.join(words)


def _as_json(ticket: Ticket) -> str:
    return f"```json\n{ticket.to_json(indent=2)}\n```"


def _how_to_resume(ticket: Ticket) -> str:
    return (
        "## To get the audio\n\n"
        "Press *Retry* on this run, or run `wait-for-tts` with this ticket:\n\n"
        f"{_as_json(ticket)}\n\n"
        f"or, in a shell:\n\n```sh\n{resume_command(ticket)}\n```"
    )


def _money_at_stake(error: NanoGPTError, ticket: Ticket | None) -> str:
    match error:
        case SubmissionUncertain():
            return "It is not known whether the provider accepted this job. If it did, it was charged."
        case _ if ticket is None:
            return "No job is known to be under way, and nothing was charged for one."
        case ContentPolicyViolation():
            refund = (
                "The provider documents an automatic refund for this, requested by the status calls, which carried the "
                "ticket's cost; whether it was paid, only your balance tells."
                if ticket.cost is not None
                else "The ticket came without its cost, which the provider's automatic refund is said to go by."
            )
            return f"The provider refused the text, and would refuse the same text again. {refund}"
        case TTSJobRejected():
            return (
                "The provider gave up on the job. Whether it refunds such a failure is not documented; your balance "
                "tells. Submitting the text anew starts, and charges, a new job."
            )
        case _:
            return "The job is paid for, and as far as is known the provider still has it."
