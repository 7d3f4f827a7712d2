"""The provider's words as types: what is sent, what is answered, and what is kept of it.

Sources: NanoGPT's documentation of `POST /tts` and `GET /tts/status`, and what clients of the live API report. Fields
that only some answers carry are optional, unknown ones are ignored, and an unknown status word means "still waiting".
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import suppress
from decimal import Decimal
from difflib import get_close_matches
from enum import Enum
from functools import lru_cache
from itertools import chain
from typing import Annotated, Any, Final, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import to_jsonable_python

from prefect_nanogpt.connections import split_login
from prefect_nanogpt.errors import CONTENT_POLICY_VIOLATION, TTS_FAILED, hide, normalize_code
from prefect_nanogpt.polling import PollSchedule

__all__ = [
    "AudioContent",
    "AudioFile",
    "AudioModel",
    "Balance",
    "Completed",
    "Money",
    "Pending",
    "PollSchedule",
    "Rejected",
    "Submission",
    "TTSRequest",
    "TTSStatus",
    "Ticket",
    "check_option",
    "decimal_of",
    "field_of",
    "one_line",
    "options_of",
    "parse_balance",
    "parse_models",
    "parse_status",
    "parse_submission",
    "perhaps",
    "plain",
    "plain_name",
    "problems_in",
    "python_value",
    "request_with",
]

DEFAULT_MODEL: Final = "Elevenlabs-Turbo-V2.5"

_SUCCESS_WORDS: Final = frozenset({"completed", "succeeded"})
_FAILURE_WORDS: Final = frozenset({"error", "failed", "cancelled", "canceled", "content_policy_violation"})
_KNOWN_WORDS: Final = _SUCCESS_WORDS | {"pending", "processing", "queued", "in_queue", "in_progress"}
_POLICY: Final = re.compile(
    r"\W*(content[_-]policy[_-]violation(?![a-z])|content policy violation\s*([:.!]|$))", re.IGNORECASE
)
"""A message that begins with the code of a refusal, or with its words as one part of it."""
LONGEST_MESSAGE: Final = 2_000
"""How much of the provider's words is kept, in characters: they become state messages."""
LONGEST_WORD: Final = 200
"""Of a status word, a model, a unit or a type, in characters."""
LARGEST_COST: Final = 10**9
LARGEST_TAKE: Final = 2**31 - 1
LAST_PLACE: Final = -40
"""Of an amount of money, as a power of ten. XNO has thirty decimals."""
MOST_IN_QUEUE: Final = 10**9
LONGEST_TEXT: Final = 10**9
LONGEST_DURATION_SECONDS: Final = 10**7
_TERMINAL_SEQUENCE: Final = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"
    r"|\x1b[ -/]*[0-~]"
)
"""What terminals obey: colours and movements, titles and links, and the rest of what ESC begins."""
_CLONES: Final = re.compile(r"(?<![a-z])clon")
_NAME_KEYS: Final = ("id", "voice_id", "voice", "value", "name")
_ZERO_BYTE: Final = re.compile(rb"(?<!\\)(\\\\)*\\u0000")
"""As JSON has it: not the one whose backslash is itself escaped."""
_JOINERS: Final = "\u200c\u200d"
"""They have no shape, and are a part of Persian words and of emoji."""
_FENCED: Final = re.compile(r"\s*```[a-z]*\s*(.*?)\s*```\s*", re.DOTALL)
"""As Markdown has what is to be copied."""
_PATH_STEP: Final = re.compile(r"(^|[\\/])\.\.?([\\/]|$)")
_INVISIBLE: Final = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})
"""Unicode's categories of what has no shape of its own: spaces, line ends, marks such as U+200B and U+FEFF."""

M = TypeVar("M", bound=BaseModel)


def one_line(words: str, limit: int) -> str:
    """Give somebody's words as they can be shown and kept anywhere: one line of printable characters.

    Args:
        words: The words, which may hold anything.
        limit: How long they may be, in characters; what is longer is cut.

    Example:
        >>> one_line("Not\\x1b[31m now.\\r\\nLater", 60)
        'Not now. Later'
    """
    words = _TERMINAL_SEQUENCE.sub("", words[: 16 * limit])
    if not (words.isascii() and words.isprintable()):
        words = "".join(c if c.isprintable() or c in _JOINERS else " " for c in words)
    words = " ".join(words.split())
    return words if len(words) <= limit else words[: limit - 1].rstrip() + "…"


def _is_one_line(words: str) -> str:
    if words != one_line(words, LONGEST_WORD):
        raise ValueError(f"this is no single line of plain text of at most {LONGEST_WORD} characters")
    return words


def _can_be_meant(amount: Decimal) -> Decimal:
    exponent = amount.as_tuple().exponent
    if not amount.is_finite() or amount > LARGEST_COST or (isinstance(exponent, int) and exponent < LAST_PLACE):
        raise ValueError(f"an amount of money is at most {LARGEST_COST}, with at most {-LAST_PLACE} decimals")
    return amount


Word = Annotated[str, AfterValidator(_is_one_line)]
Money = Annotated[Decimal, Field(ge=0, allow_inf_nan=False), AfterValidator(_can_be_meant)]
_MONEY: Final[TypeAdapter[Decimal]] = TypeAdapter(Money)


class Ticket(BaseModel):
    """A job that the provider has accepted and charged for. Whoever holds it can fetch the audio.

    Takes the provider's JSON as it is, also as a text, or snake_case names. Only the run id and the model are needed,
    but `cost`, `paymentSource` and `isApiRequest` go on every status call, where they drive the provider's automatic
    refund.

    Example:
        >>> Ticket.model_validate({"runId": "98b0d593", "model": "Elevenlabs-V3", "cost": 0.005}).cost
        Decimal('0.005')
    """

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True, frozen=True, protected_namespaces=())

    run_id: str = Field(
        validation_alias="runId",
        serialization_alias="runId",
        min_length=1,
        max_length=512,
        title="Run id",
        description="The provider's identifier of the job, `runId` in its answer.",
    )
    model: Word = Field(
        min_length=1,
        title="Model",
        description="The model as the ticket has it, which may be more than the id that was asked for, such as "
        "fal-ai/…: the provider may know the job by no other. Where the ticket has none, the id that was asked for.",
    )
    cost: Money | None = Field(
        default=None, title="Cost", description="What was charged, in the unit of the payment source."
    )
    payment_source: Word | None = Field(
        default=None,
        validation_alias="paymentSource",
        serialization_alias="paymentSource",
        title="Payment source",
        description="What was charged from, such as USD or XNO.",
    )
    is_api_request: bool = Field(
        default=True,
        validation_alias="isApiRequest",
        serialization_alias="isApiRequest",
        title="API request",
        description="Whether the job was submitted through the API.",
    )

    @model_validator(mode="before")
    @classmethod
    def _as_clients_read_it(cls, given: object) -> object:
        if isinstance(given, str):
            fenced = _FENCED.fullmatch(given)
            try:
                given = json.loads(fenced[1] if fenced else given)
                given = json.loads(given) if isinstance(given, str) else given  # as other systems may have quoted it
            except (ValueError, RecursionError):
                raise ValueError("this text is not the ticket's JSON") from None
        if isinstance(given, Mapping) and not given.keys() & {"runId", "run_id"} and "id" in given:
            return {**given, "runId": given["id"]}
        return given

    @field_validator("run_id", "model", mode="before")
    @classmethod
    def _strip(cls, value: object) -> object:
        return value.strip() if isinstance(value, str) else value

    @field_validator("run_id")
    @classmethod
    def _is_an_id(cls, run_id: str) -> str:
        if _PATH_STEP.search(run_id) or not run_id.isprintable():
            raise ValueError("a run id is a plain identifier, not a path")
        return run_id

    @field_validator("is_api_request", mode="before")
    @classmethod
    def _default_is_api_request(cls, value: object) -> object:
        return True if value is None else value

    def to_json(self, indent: int | None = None) -> str:
        """Write the ticket as the provider's JSON, ready to be pasted into `wait_for_tts`."""
        return json.dumps(self.model_dump(exclude_none=True), default=float, indent=indent)


class TTSRequest(BaseModel):
    """What to say, and how. Options that are not listed here are passed on to the model as they are.

    An option that is listed is recognized in any case, and with spaces, `-` or nothing in the place of `_`. The ranges
    are the provider's documented ones; each model reads only some of the options.

    Example:
        >>> TTSRequest(text="Hello!", voice="Rachel", emotion="calm").body()["emotion"]
        'calm'
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    text: str = Field(description="What to say.")
    model: Word = Field(default=DEFAULT_MODEL, min_length=1, description="The provider's model id.")
    voice: str | None = Field(
        default=None, description="A voice of the model; the provider chooses where it is left out."
    )
    speed: float | None = Field(default=None, ge=0.1, le=5, description="Speaking rate, 1 is normal.")
    response_format: str | None = Field(default=None, description="mp3, opus, aac, flac or wav; OpenAI models only.")
    instructions: str | None = Field(default=None, description="How to say it, in words; few models follow it.")
    stability: float | None = Field(default=None, ge=0, le=1, description="ElevenLabs: evenness of the voice.")
    similarity_boost: float | None = Field(default=None, ge=0, le=1, description="ElevenLabs: closeness to the voice.")
    style: float | None = Field(default=None, ge=0, le=1, description="ElevenLabs: exaggeration of the style.")
    language: str | None = Field(default=None, description="The language, in the model's own vocabulary.")
    prompt: str | None = Field(default=None, description="Qwen: a style prompt.")
    reference_text: str | None = Field(default=None, description="Qwen: what the reference voice says.")
    speaker_voice_embedding_file_url: str | None = Field(default=None, description="Qwen: URL of a cloned voice.")

    @model_validator(mode="before")
    @classmethod
    def _by_their_names(cls, fields: object) -> object:
        if not isinstance(fields, Mapping):
            return fields
        named = _named(fields)
        for name in named.keys() - cls.model_fields.keys():
            check_option(name)
        return named

    @field_validator("speed", "stability", "similarity_boost", "style", mode="before")
    @classmethod
    def _with_decimal_point(cls, value: object) -> object:
        return (decimal_of(value) or value) if isinstance(value, str) else value

    @field_validator("model", "voice", "language", "response_format", mode="before")
    @classmethod
    def _without_spaces_around(cls, value: object) -> object:
        return value.strip() if isinstance(value, str) else value

    @field_validator("text")
    @classmethod
    def _says_something(cls, text: str) -> str:
        if all(unicodedata.category(character) in _INVISIBLE for character in text):
            raise ValueError("the text is empty: there is nothing to say")
        return text

    @field_validator("response_format")
    @classmethod
    def _can_be_verified(cls, response_format: str | None) -> str | None:
        if response_format is not None and response_format.casefold() == "pcm":
            raise ValueError("raw PCM has no header to verify it by; ask for wav instead")
        return response_format

    @model_validator(mode="after")
    def _can_be_sent(self) -> TTSRequest:
        try:
            content = self.content()
        except (TypeError, ValueError, RecursionError):
            name, error = next(filter(None, map(_why_not_json, self.body().items())))
            if isinstance(error, UnicodeEncodeError):
                half = "there is half a character in it (an unpaired surrogate), which cannot be sent"
                raise ValueError(f"{name!a}: {half}") from None
            raise ValueError(f"the option {name!a} is no JSON value: {error}") from None
        if _ZERO_BYTE.search(content):
            raise ValueError("there is a zero byte in it, which no model reads")
        return self

    def body(self) -> dict[str, Any]:
        """Give the JSON body of the request: every option that was set."""
        # Not as pydantic's JSON, which makes null of NaN, and of a set a list whose order is another in each process.
        return self.model_dump(exclude_none=True)

    def content(self) -> bytes:
        """Give the body as it is sent."""
        return _as_json(self.body())


OF_THE_LINE: Final = ("id", "text", "model", "voice", "take", "options")
"""What a line of a batch has beside options."""
OPTION_PREFIXES: Final = ("option", "options")
"""What stands before the point in the name of a column that is an option."""
REMARK: Final = "#"
"""What the names of columns begin with that are passed over."""


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """Reduce a name to what tells it from others, which case, spaces, `-` and `_` do not.

    Example:
        >>> plain_name(" Response-Format")
        'responseformat'
    """
    return re.sub(r"[\s_\-\u200b\ufeff]+", "", name).casefold()


@lru_cache(maxsize=4096)
def field_of(name: str) -> str:
    """Give the field of a line or a request that a name means, or the name of an option that is not listed.

    Example:
        >>> field_of("Response-Format"), field_of(" emotion")
        ('response_format', 'emotion')
    """
    return _FIELDS.get(plain_name(name)) or name.strip()


_FIELDS: Final = {plain_name(name): name for name in (*OF_THE_LINE, *TTSRequest.model_fields)}


def check_option(name: str) -> None:
    """Refuse a name that is no option's.

    Raises:
        ValueError: A line or a flow has a place of its own for it, or it is how a column of a table would be called.
    """
    if name in OF_THE_LINE:
        raise ValueError(f"{name} is no option but a field of its own, {name!r}")
    if not name or name.startswith(REMARK) or plain_name(name.partition(".")[0]) in OPTION_PREFIXES:
        raise ValueError(f"{name!r} is no option; one called mood is given as 'mood'")


def options_of(given: Mapping[str, object]) -> dict[str, Any]:
    """Check options of a model that somebody wrote, and give them by their names.

    Raises:
        ValueError: An option is there twice, or as `check_option` does.
    """
    options = _named(given)
    for name in options:
        check_option(name)
    return options


def request_with(options: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> TTSRequest:
    """Make a request of fields that were given by themselves and further options.

    Raises:
        ValueError: Something is wrong with one of them, or an option is one of the fields.
    """
    further = options_of(options or {})
    if twice := sorted(further.keys() & fields.keys()):
        raise ValueError(f"{twice[0]!r} is there twice, by itself and among the options")
    return TTSRequest.model_validate({**further, **fields})


def decimal_of(written: str) -> str | None:
    """Give a number with a decimal point that was written otherwise; None for what is none, or has one already.

    Example:
        >>> decimal_of("1,5"), decimal_of("1.234,5"), decimal_of("1.5")
        ('1.5', '1234.5', None)
    """
    number = written.strip().replace("\u2212", "-")
    if re.fullmatch(r"[+-]?([0-9]{1,3}([.\s][0-9]{3})+|[0-9]*),[0-9]+", number):
        number = re.sub(r"[.\s]", "", number).replace(",", ".")
    if number == written.strip() and not number.lstrip("+-").startswith("."):
        return None
    return str(Decimal(number)) if re.fullmatch(r"[+-]?[0-9]*\.?[0-9]+", number) else None


def _named(fields: Mapping[Any, object]) -> dict[str, Any]:
    named: dict[str, Any] = {}
    spelt: dict[str, object] = {}
    for given, value in fields.items():
        name = field_of(str(given))
        if (plain := plain_name(name)) in spelt:
            raise ValueError(f"{name!r} is there twice, as {spelt[plain]!r} and as {given!r}")
        spelt[plain] = given
        named[name] = python_value(value)
    return named


def _as_json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()


def _why_not_json(option: tuple[str, Any]) -> tuple[str, Exception] | None:
    try:
        _as_json(dict([option]))
    except (TypeError, ValueError, RecursionError) as error:
        return option[0], error
    return None


class Pending(BaseModel):
    """The job is still under way.

    Attributes:
        word: The provider's status word, in lower case.
        queue_position: Its place in the queue, where the provider says.
    """

    model_config = ConfigDict(frozen=True)

    word: str
    queue_position: int | None = None

    @property
    def is_known(self) -> bool:
        """Whether the word is one that the provider or its clients are known to use for a job under way."""
        return self.word in _KNOWN_WORDS


class Completed(BaseModel):
    """The audio is ready at `audio_url`.

    Attributes:
        audio_url: Where the provider put the audio, on a host of somebody else's.
        content_type: The announced MIME type, where given.
        duration_seconds: The announced length, in seconds; only answers without a ticket carry it.
        cost: What was charged, in `currency`; only answers without a ticket carry it reliably.
        currency: The unit of `cost`.
    """

    model_config = ConfigDict(frozen=True)

    audio_url: str
    content_type: Word | None = None
    duration_seconds: float | None = Field(default=None, ge=0, le=LONGEST_DURATION_SECONDS, allow_inf_nan=False)
    cost: Money | None = None
    currency: Word | None = None


class Rejected(BaseModel):
    """The provider gave up on the job.

    Attributes:
        code: The provider's code in upper case, `TTS_FAILED` where it gave none.
        message: The provider's own words.
        is_certain: Whether the status word is one that is known to mean this.
    """

    model_config = ConfigDict(frozen=True)

    code: str = TTS_FAILED
    message: str = ""
    is_certain: bool = True

    @property
    def is_content_policy(self) -> bool:
        """Whether the text itself was refused, so that the same text would be refused again."""
        return self.code == CONTENT_POLICY_VIOLATION


class AudioModel(BaseModel):
    """What the provider's catalogue says of a model; what it does not say, or says oddly, is None or empty.

    Attributes:
        id: The model id, as requests name it.
        kind: `speech`; `music`; `clone`, which makes a voice and no audio; `other`. The catalogue of speech models has
            rows of all kinds.
        name: The name for people.
        usd_per_thousand_chars: The price in USD of a thousand characters of text, where it is priced by them.
        usd_per_generation: The price in USD of a job, however long its text, where it is priced so.
        max_chars: The longest text it takes, in characters.
        voices: The voices. There may be more: a cloned voice has an id of its own.
        response_formats: The containers that can be asked for.
    """

    model_config = ConfigDict(frozen=True)

    id: Word = Field(min_length=1)
    kind: Literal["speech", "music", "clone", "other"] = "speech"
    name: Word | None = None
    usd_per_thousand_chars: Money | None = None
    usd_per_generation: Money | None = None
    max_chars: int | None = Field(default=None, gt=0, lt=LONGEST_TEXT, strict=True)
    voices: tuple[str, ...] = ()
    response_formats: tuple[str, ...] = ()

    def price(self, text: str) -> Decimal | None:
        """Give the price of a text in USD, where the catalogue has it."""
        if self.usd_per_thousand_chars is None:
            return self.usd_per_generation
        return self.usd_per_thousand_chars * len(text) / 1000 + (self.usd_per_generation or 0)


class Balance(BaseModel):
    """What is left on the account. What the provider does not say, or says oddly, is None and not zero.

    Attributes:
        usd: US dollars.
        xno: Nano.
    """

    model_config = ConfigDict(frozen=True)

    usd: Decimal | None = None
    xno: Decimal | None = None


HUMMED: Final = (
    "The sandbox hummed, since it cannot speak here: install the extra `sandbox` of prefect-nanogpt to hear the words."
)

TTSStatus: TypeAlias = Pending | Completed | Rejected


class AudioContent(BaseModel):
    """Finished audio that came as the very answer to a submission, as some models do."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    content: bytes
    content_type: str | None = None


Submission: TypeAlias = Ticket | Completed | AudioContent


class AudioFile(BaseModel):
    """Verified audio at rest, and how it came about.

    Attributes:
        location: The absolute path of the file, or its fsspec URL.
        container: What the bytes are: `mp3`, `wav`, `ogg`, `flac`, `mp4` or `aac`.
        content_type: The MIME type of the container.
        size_bytes: The size in bytes.
        sha256: The SHA-256 digest of the file, in hexadecimal.
        duration_seconds: How long it plays, in seconds, measured; None where that is not known.
        peaks: Its outline: up to 120 peaks from 0 to 100 over its length; empty where it was not decoded, or is very
            large.
        is_decoded: Whether a decoder has played it from beginning to end, which takes the extra `audio`.
        source_url: Where the provider had it, without a login; None where it was found already saved, or came without a
            URL.
        ticket: The ticket of the job; None for models that answer at once.
        cost: What was charged, in `currency`, where the provider said.
        currency: The unit of `cost`, such as USD.
        polls: How many status calls it took.
        waited_seconds: How long the run waited for the job, in seconds.
        is_hummed: Whether it is a tone, of a sandbox that is to speak and cannot.
    """

    model_config = ConfigDict(frozen=True)

    location: str
    container: str
    content_type: str
    size_bytes: int
    sha256: str
    duration_seconds: float | None = None
    peaks: tuple[int, ...] = Field(default=(), repr=False)
    is_decoded: bool = False
    source_url: str | None = None
    ticket: Ticket | None = None
    cost: Decimal | None = None
    currency: str | None = None
    polls: int = 0
    waited_seconds: float = 0.0
    is_hummed: bool = False

    @field_validator("source_url")
    @classmethod
    def _without_login(cls, url: str | None) -> str | None:
        return url and split_login(url)[0]


def parse_status(body: Mapping[str, Any]) -> TTSStatus:
    """Read the JSON of a status answer.

    `completed` without a URL counts as still waiting, since the provider's own sample waits on. So does any word that
    is not known, unless the answer says that it is the end: by `"terminal": true`, whatever the word, or by an error.

    Raises:
        ValueError: The body has no status and so is not an answer of this protocol.

    Example:
        >>> parse_status({"status": "pending", "queuePosition": 3}).queue_position
        3
    """
    told = body.get("status")
    word = one_line(told, LONGEST_WORD).lower() if isinstance(told, str) else ""
    is_end = body.get("terminal") is True
    if not (word or is_end):
        raise ValueError("the answer has no status")
    code, message = error_in(body)
    if word in _FAILURE_WORDS:
        if code is None and word == "content_policy_violation":
            code = CONTENT_POLICY_VIOLATION
        return Rejected(code=code or TTS_FAILED, message=message or "The provider gave no reason.")
    if word not in _KNOWN_WORDS and any(error_in({"error": body.get("error")})):
        reason = f"{message or 'The provider gave no reason.'} (The status is {word!r}, which is not known.)"
        return Rejected(code=code or TTS_FAILED, message=reason, is_certain=code == CONTENT_POLICY_VIOLATION)
    if (is_end or word in _SUCCESS_WORDS) and (completed := _completed(body)):
        return completed
    if is_end and word not in _SUCCESS_WORDS:
        reason = message or f"The provider says that this is the end, with the status {word!r} and without audio."
        return Rejected(code=code or TTS_FAILED, message=reason, is_certain=code == CONTENT_POLICY_VIOLATION)
    position = body.get("queuePosition")
    is_one = type(position) is int and 0 <= position <= MOST_IN_QUEUE
    return Pending(word=word, queue_position=position if is_one else None)


def parse_submission(body: Mapping[str, Any], model: str) -> Ticket | Completed:
    """Read the JSON of an accepted submission: a ticket, or a URL where the model answers at once.

    A ticket has been paid for, so whatever is odd about its other fields, a run id is enough to keep it. As published
    clients read it, that is `runId`, or else `id` where the answer has neither audio nor an error.

    Args:
        body: The answer.
        model: The model asked for, where the answer names none.

    Raises:
        ValueError: The body has neither a run id nor a URL.
    """
    completed = _completed(body)
    is_under_way = str(body.get("status") or "completed").strip().lower() not in _SUCCESS_WORDS
    may_be_id = not body.get("error") and (completed is None or is_under_way)
    if run_id := body.get("runId") or (body.get("id") if may_be_id else None):
        try:
            told = {**body, "runId": _text_of(run_id), "model": body.get("model") or model}
            return _of_what_is_sound(Ticket, told, model=model)
        except ValidationError:
            raise ValueError("its run id is none that can be asked for") from None
    if completed is not None:
        return completed
    raise ValueError("the answer has neither a run id nor an audio URL")


def parse_models(body: Mapping[str, Any]) -> list[AudioModel]:
    """Read the provider's catalogue of audio models; a row without an id, or with one that was there, is passed over.

    Raises:
        ValueError: It is not a list of models.
    """
    rows = body.get("data")
    if not isinstance(rows, list):
        raise ValueError("the answer is not a list of models")
    models: dict[str, AudioModel] = {}
    for row in rows:
        with suppress(ValidationError):
            if isinstance(row, Mapping) and (model := _model_in(row)).id not in models:
                models[model.id] = model
    if not models:
        raise ValueError("the list of models is empty")
    return list(models.values())


def _model_in(row: Mapping[str, Any]) -> AudioModel:
    parameters = _mapping(row.get("supported_parameters"))
    return _of_what_is_sound(
        AudioModel,
        {
            "id": row.get("id"),
            "kind": _kind_of(row),
            "name": row.get("name"),
            **_prices_in(_mapping(row.get("pricing"))),
            "max_chars": parameters.get("max_chars"),
            "voices": _names_in(parameters.get("voices")),
            "response_formats": _names_in(parameters.get("response_formats")),
        },
    )


def _prices_in(pricing: Mapping[str, Any]) -> dict[str, Decimal]:
    """Read a model's prices; none where it has, besides, a price that nothing here can count by or that is odd."""
    told = {name: price for name, price in pricing.items() if name.startswith("per_") and price is not None}
    counted = {name: told.pop(name) for name in ("per_thousand_chars", "per_generation") if name in told}
    if any(told.values()) or str(pricing.get("currency", "USD")).upper() != "USD":
        return {}
    try:
        return {f"usd_{name}": _MONEY.validate_python(price) for name, price in counted.items()}
    except ValidationError:
        return {}


def _kind_of(row: Mapping[str, Any]) -> str:
    """Tell speech from the other rows. Of many only the category tells, or the id: their flags are not set."""
    capabilities = _mapping(row.get("capabilities"))
    says_speech = capabilities.get("text_to_speech")
    category, model = str(row.get("category") or "").lower(), str(row.get("id")).lower()
    makes_voices = any(has_it and "clon" in str(name) for name, has_it in capabilities.items())
    if "music" in category:
        return "music"
    if says_speech is True:
        return "speech"
    is_tts = category in ("audio_tts", "tts", "text-to-speech", "text_to_speech")
    if _CLONES.search(f"{category} {model}") or (makes_voices and not is_tts):
        return "clone"
    if is_tts:
        return "speech"
    if "music" in model:
        return "music"
    return "other" if category or says_speech is False else "speech"


def _names_in(listed: object) -> tuple[str, ...]:
    """List the names that a parameter can have, each once, whether they are texts, or objects that have them."""
    if isinstance(listed, Mapping):
        groups = [group for group in listed.values() if isinstance(group, list)]  # such as those of a language each
        listed = listed["values"] if "values" in listed else [*chain(*groups)] if groups else list(listed)
    names: dict[str, None] = {}
    for item in listed if isinstance(listed, list) else ():
        name = next(filter(None, map(item.get, _NAME_KEYS)), None) if isinstance(item, Mapping) else item
        if isinstance(name, str) and (name := one_line(name, LONGEST_WORD)):
            names[name] = None
    return tuple(names)


def perhaps(name: str, known: Iterable[str]) -> str:
    """Give a sentence with the known names that are most like one that is not known; nothing where none is like it.

    Example:
        >>> perhaps("elevenlabs v3", ["Elevenlabs-V3", "tts-1"])
        ' Perhaps Elevenlabs-V3 is meant.'
    """
    plain = {plain_name(one): one for one in known}
    near = [plain[one] for one in get_close_matches(plain_name(name), plain, cutoff=0.7)]
    return f" Perhaps {' or '.join(near)} is meant." if near else ""


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def parse_balance(body: Mapping[str, Any]) -> Balance:
    """Read the answer about the account's balance, whose amounts are numbers or decimal texts.

    Raises:
        ValueError: There is no amount in it.

    Example:
        >>> parse_balance({"usd_balance": "129.46956147", "nano_balance": "26.7"}).usd
        Decimal('129.46956147')
    """
    balance = _of_what_is_sound(Balance, {"usd": body.get("usd_balance"), "xno": body.get("nano_balance")})
    if balance == Balance():
        raise ValueError("the answer has no balance")
    return balance


def error_in(body: object) -> tuple[str | None, str | None]:
    """Find the code and the message in an error body, whatever its shape.

    Covers `{"error": {"message", "type", "code"}}`,
    `{"error": "text", "code"?, "status"?}`, `{"error": 400, "message"}`
    and bare `{"message", "type"}`. A refusal's code counts wherever it is, also at the beginning of the message: what
    is refused must not be taken for what may be repeated.
    """
    if not isinstance(body, Mapping):
        return None, None
    error = body.get("error")
    inner: Mapping[str, Any] = error if isinstance(error, Mapping) else {}
    messages = (inner.get("message"), error, body.get("message"))
    codes = (inner.get("code"), body.get("code"), inner.get("type"), body.get("type"))
    lines = [one_line(hide((), text), LONGEST_MESSAGE) for text in messages if isinstance(text, str)]
    message = next(filter(None, lines), None)
    known = [code for code in map(normalize_code, codes) if code]
    if CONTENT_POLICY_VIOLATION in known or any(map(_POLICY.match, lines)):
        return CONTENT_POLICY_VIOLATION, message
    return next(iter(known), None), message


def _text_of(run_id: object) -> object:
    return str(run_id) if type(run_id) is int else run_id


def _completed(body: Mapping[str, Any]) -> Completed | None:
    data = body.get("data")
    urls: list[object] = []
    for place in (body, data if isinstance(data, Mapping) else {}):
        several = place.get("audioUrls")
        urls += [place.get("audioUrl"), *(several if isinstance(several, list) else ()), place.get("url")]
    url = next((url for url in urls if isinstance(url, str) and url), None)
    if url is None:
        return None
    details = {
        # Nothing can write half a character; in a URL it is escaped, so that whoever looks sees it.
        "audio_url": url.encode(errors="backslashreplace").decode(),
        "content_type": body.get("contentType"),
        "duration_seconds": body.get("duration"),
        "cost": body.get("cost"),
        "currency": body.get("currency") or body.get("paymentSource"),
    }
    return _of_what_is_sound(Completed, details)


def _of_what_is_sound(kind: type[M], told: Mapping[str, Any], **instead: Any) -> M:
    """Make a model of the provider's words; a field that holds something odd counts as not said, or is `instead`.

    Raises:
        ValidationError: A field that it needs is odd.
    """
    try:
        return kind.model_validate(told)
    except ValidationError as error:
        odd = {problem["loc"][0] for problem in error.errors()}
        sound = {name: value for name, value in told.items() if name not in odd}
        return kind.model_validate(sound | {name: value for name, value in instead.items() if name in odd})


def problems_in(invalid: ValidationError) -> list[str]:
    """Say what is wrong with a model's fields, one line each, beginning with the field where it is about one."""
    return [
        ": ".join([*([".".join(map(str, problem["loc"]))] if problem["loc"] else []), problem["msg"]]).replace(
            "Value error, ", ""
        )
        for problem in invalid.errors()
    ]


def python_value(value: Any) -> Any:
    """Give the value of a member of an enumeration, or of a NumPy scalar, which the rows of a data frame hold.

    Anything else is given as it is.
    """
    if isinstance(value, Enum):
        value = value.value
    return value.item() if hasattr(value, "dtype") and getattr(value, "ndim", None) == 0 else value


def plain(thing: object) -> Any:
    """Make plain JSON of a result, for readers that do not have this package; of an exception, its text."""
    return str(thing) if isinstance(thing, BaseException) else to_jsonable_python(thing, fallback=str)
