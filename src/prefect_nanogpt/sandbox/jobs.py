"""The sandbox's models, jobs and money."""

import math
import sys
import threading
import time
import uuid
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any, Final, Literal

from .script import Directives
from .speech import CONTENT_TYPES, Format, Utterance


@dataclass(frozen=True, slots=True)
class Model:
    """A text-to-speech model as the catalogue describes it.

    Args:
        id: The name used in requests.
        answers: With a ticket to poll, the audio itself, or JSON with its URL.
        price: US dollars for what `priced_by` names.
        max_chars: Longest text, or None where no figure is known.
        voices: Names of some, space-separated. Any other is accepted too: cloned voices have their own.
        assumed_price: The price is the sandbox's own guess, so the catalogue gives none.
        priced_by: What the price is for, in the catalogue's words.
        format: What it answers in; OpenAI's models, unless `response_format` says otherwise.
        languages: Values of `language` in the catalogue, space-separated, the default first.
        has_flag: Whether its row has the capability `text_to_speech`. Some of the provider's rows lack it.
        is_listed: Whether the catalogue has the model.
        qualified_id: Its id at the provider behind, which a ticket may name instead. FAL's own names; which ones
            NanoGPT's tickets for speech have is not known.
    """

    id: str
    answers: Literal["ticket", "binary", "url"]
    price: Decimal
    max_chars: int | None
    voices: str
    assumed_price: bool = False
    priced_by: Literal["per_thousand_chars", "per_generation"] = "per_thousand_chars"
    format: Format = "mp3"
    languages: str = ""
    has_flag: bool = True
    is_listed: bool = True
    qualified_id: str | None = None

    @property
    def is_openai(self) -> bool:
        """Whether `response_format` is honoured."""
        return self.id in ("tts-1", "tts-1-hd", "gpt-4o-mini-tts")

    @property
    def streams(self) -> bool:
        """Whether `stream` is honoured."""
        return self.is_openai or self.id.startswith("Elevenlabs-")

    def cost(self, characters: int) -> Decimal:
        """What a text of that length costs, in US dollars."""
        return self.price if self.priced_by == "per_generation" else self.price * characters / 1000

    def row(self) -> dict[str, Any]:
        """The model's row in the detailed catalogue."""
        parameters: dict[str, Any] = {"voices": self.voices.split()}
        if self.max_chars is not None:
            parameters["max_chars"] = self.max_chars
        if self.languages:
            values = self.languages.split()
            parameters["language"] = {"default": values[0], "values": values}
        if self.is_openai:
            parameters["response_formats"] = list(CONTENT_TYPES)
        priced: dict[str, Any] = {}
        if not self.assumed_price:
            priced["pricing"] = {"currency": "USD", self.priced_by: float(self.price)}
        return _row(
            self.id,
            **priced,
            capabilities={"text_to_speech": True} if self.has_flag else {},
            supported_parameters=parameters,
            category="audio_tts",
        )


def _row(id: str, takes: Literal["text", "audio"] = "text", **details: Any) -> dict[str, Any]:
    return {
        "id": id,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "sandbox",
        "name": id,
        "description": "Sandbox stand-in.",
        "architecture": {"modality": f"{takes}->audio", "input_modalities": [takes], "output_modalities": ["audio"]},
        **details,
    }


_ELEVENLABS: Final = (
    "Adam Alice Antoni Aria Arnold Bella Bill Brian Callum Charlie Charlotte Chris Daniel Domi Dorothy Drew "
    "Elli Emily Eric Ethan Fin Freya George Gigi Giovanni Grace James Jeremy Jessica Joseph Josh Laura Liam Lily "
    "Matilda Matthew Michael Nicole Rachel River Roger Ryan Sam Sarah Thomas Will"
)
_OPENAI: Final = "alloy ash ballad coral echo fable onyx nova sage shimmer verse"

_KEPT_ENTRIES: Final = 40_000  # a charge and a refund for each of the jobs that are kept

DEFAULT_MODEL: Final = "Kokoro-82m"
MODELS: Final = {
    model.id: model
    for model in (
        Model("Kokoro-82m", "url", Decimal("0.001"), 10_000, "af_bella am_adam bf_emma bm_george", format="wav"),
        Model(
            "Elevenlabs-Turbo-V2.5",
            "ticket",
            Decimal("0.06"),
            10_000,
            _ELEVENLABS,
            qualified_id="fal-ai/elevenlabs/tts/turbo-v2.5",
        ),
        Model(
            "Elevenlabs-V3",
            "ticket",
            Decimal("0.17"),
            None,
            _ELEVENLABS,
            qualified_id="fal-ai/elevenlabs/tts/eleven-v3",
        ),
        Model(
            "Qwen-3-TTS-1.7B",
            "ticket",
            Decimal("0.02"),
            None,
            "Vivian Ryan",
            assumed_price=True,
            is_listed=False,
            qualified_id="fal-ai/qwen-3-tts/text-to-speech/1.7b",
        ),
        Model(
            "Minimax-Speech-2.8-HD",
            "ticket",
            Decimal("0.1"),
            None,
            "Deep_Voice_Man Wise_Woman",
            assumed_price=True,
            languages="Auto English Chinese Japanese",
            has_flag=False,
            qualified_id="fal-ai/minimax/speech-2.8-hd",
        ),
        Model(
            "microsoft/vibevoice",
            "ticket",
            Decimal("0.15"),
            None,
            "",
            priced_by="per_generation",
            has_flag=False,
            qualified_id="fal-ai/vibevoice",
        ),
        Model("tts-1", "binary", Decimal("0.015"), 4096, _OPENAI),
        Model("tts-1-hd", "binary", Decimal("0.03"), 4096, _OPENAI),
        Model("gpt-4o-mini-tts", "binary", Decimal("0.0006"), 4096, _OPENAI),
        Model("xai-tts", "binary", Decimal("0.0165"), 5000, "Eve Ara Leo Rex Sal", has_flag=False),
        Model(
            "gemini-2.5-flash-preview-tts",
            "binary",
            Decimal("0.01"),
            None,
            "Zephyr Puck Kore",
            assumed_price=True,
            format="wav",
        ),
    )
}


def catalogue() -> list[dict[str, Any]]:
    """The detailed rows for `type=tts`. The provider's are not all speech either."""
    music = {"currency": "USD", "per_second": 0.01, "minimum": 0.1}
    clone = {"currency": "USD", "per_generation": 1.0}
    nothing: dict[str, Any] = {"capabilities": {}, "supported_parameters": {}}
    return [
        *(model.row() for model in MODELS.values() if model.is_listed),
        _row("Elevenlabs-Music-V1", **nothing, pricing=music, category="audio_music"),
        _row("minimax-voice-clone", takes="audio", **nothing, pricing=clone),
    ]


@dataclass(slots=True)
class Job:
    """One accepted text on its way to audio. Times are seconds on the monotonic clock.

    `known_as` is the model in the ticket, which status calls must name.
    """

    model: Model
    known_as: str
    directives: Directives
    utterance: Utterance
    cost: Decimal
    seconds: float
    run_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    submitted_at: float = field(default_factory=time.monotonic)

    @property
    def file_name(self) -> str:
        """Name of the audio file on the audio host."""
        return f"{self.run_id}.{self.utterance.format}"

    @property
    def size(self) -> int:
        """Roughly what it takes of memory, in bytes."""
        texts = (self.utterance.text, self.utterance.voice, self.utterance.language)
        return 1000 * (1 + len(self.directives.scripts)) + sum(map(sys.getsizeof, texts))

    def ticket(self, charged: bool = True) -> dict[str, Any]:
        """The provider's answer to the submission."""
        return {
            "status": "pending",
            "runId": self.run_id,
            "model": self.known_as,
            "charged": charged,
            "cost": float(self.cost),
            "paymentSource": "USD",
            "isApiRequest": True,
        }

    def status(self, completed: dict[str, Any]) -> dict[str, Any]:
        """The answer to a status call now, `completed` being the one for a finished job.

        A job queues for the first 60 % of its time, at positions 3, 2, 1, and runs for the rest,
        without a position. (Where the provider's count begins is not known.)
        """
        elapsed = time.monotonic() - self.submitted_at
        total = math.inf if self.directives.outcome == "stuck" else self.seconds
        if elapsed < total:
            pending: dict[str, Any] = {"status": "pending", "runId": self.run_id}
            share = elapsed / total
            return pending | {"queuePosition": 3 - int(5 * share)} if share < 0.6 else pending
        if self.directives.outcome == "reject":
            message = "Content rejected by provider. Please modify your prompt and try again."
            return {"status": "error", "code": "CONTENT_POLICY_VIOLATION", "error": message}
        if self.directives.outcome == "fail":
            return {"status": "error", "error": "TTS generation failed. Please try again."}
        return completed


def new_job(
    model: Model,
    directives: Directives,
    fields: dict[str, Any],
    *,
    characters: int,
    seconds: float,
    hex_run_id: bool,
    qualified_model: bool,
) -> Job:
    """Make a job of a checked request. The characters as sent are billed, directives included."""
    speed = 1.0 if model.id == "gpt-4o-mini-tts" else float(fields.get("speed", 1))  # documented to ignore it
    format: Format = fields.get("response_format", model.format) if model.is_openai else model.format
    job = Job(
        model=model,
        known_as=(model.qualified_id if qualified_model else None) or model.id,
        directives=directives,
        utterance=Utterance(
            directives.spoken,
            format,
            fields.get("voice", ""),
            speed,
            fields.get("language", ""),
        ),
        cost=model.cost(characters),
        seconds=seconds if directives.seconds is None else directives.seconds,
    )
    if hex_run_id:
        job.run_id = job.run_id.replace("-", "")
    return job


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the ledger: a charge or a refund, in US dollars, at `at` seconds since the epoch."""

    kind: Literal["charge", "refund"]
    run_id: str
    model: str
    amount: Decimal
    text_length: int
    at: float


class InsufficientBalance(Exception):
    """The balance does not cover the job."""


class Ledger:
    """The account's money, in US dollars. Safe to read from any thread. The newest 40,000 lines are kept."""

    def __init__(self, balance: Decimal) -> None:
        self._balance = balance
        self._charged_total = Decimal(0)
        self._entries: deque[Entry] = deque(maxlen=_KEPT_ENTRIES)
        self._refundable: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def charge(self, job: Job, characters: int) -> None:
        """Take the job's cost.

        Raises:
            InsufficientBalance: If there is less than that.
        """
        with self._lock:
            if job.cost > self._balance:
                raise InsufficientBalance
            entry = Entry("charge", job.run_id, job.model.id, job.cost, characters, time.time())
            self._balance -= job.cost
            self._charged_total += job.cost
            self._entries.append(entry)
            self._refundable[job.run_id] = entry
            if len(self._refundable) > _KEPT_ENTRIES:
                self._refundable.popitem(last=False)

    def refund(self, run_id: str) -> bool:
        """Give back what the job cost, once; return whether anything was."""
        with self._lock:
            charge = self._refundable.pop(run_id, None)
            if charge is None:
                return False
            self._balance += charge.amount
            self._entries.append(Entry("refund", run_id, charge.model, charge.amount, charge.text_length, time.time()))
            return True

    @property
    def entries(self) -> list[Entry]:
        """The lines that are kept, oldest first."""
        with self._lock:
            return list(self._entries)

    @property
    def charges(self) -> list[Entry]:
        """The charges among them, oldest first."""
        return [entry for entry in self.entries if entry.kind == "charge"]

    @property
    def refunds(self) -> list[Entry]:
        """The refunds among them, oldest first."""
        return [entry for entry in self.entries if entry.kind == "refund"]

    @property
    def charged_total(self) -> Decimal:
        """Sum of all charges since the start, refunded ones included."""
        with self._lock:
            return self._charged_total

    @property
    def balance(self) -> Decimal:
        """What is left."""
        with self._lock:
            return self._balance
