"""The sandbox's answers to HTTP requests: one ASGI application for the API, one for the audio host."""

import asyncio
import contextlib
import ipaddress
import json
import logging
import math
import re
import sys
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Final, Generic, Literal, TypeVar
from urllib.parse import parse_qsl

from .jobs import DEFAULT_MODEL, MODELS, InsufficientBalance, Job, Ledger, catalogue, new_job
from .script import (
    Accept,
    Answer,
    Cut,
    DirectiveError,
    Hang,
    Reply,
    Scripts,
    Slow,
    Stall,
    Surface,
    parse_directives,
)
from .speech import CONTENT_TYPES, Studio, can_encode

logger = logging.getLogger("prefect_nanogpt.sandbox")

Kind = Surface | Literal["other"]
Message = MutableMapping[str, Any]
Key = TypeVar("Key")
Item = TypeVar("Item")

_MAX_BODY: Final = 4_500_000  # bytes; reported of the provider's website edge
_MAX_CHARS: Final = 20_000  # where a model's own limit is not known
_LONGEST_STRING: Final = 1000  # characters of any other field; the sandbox's own limit
_KEPT: Final = 20_000  # requests, and jobs
_KEPT_BYTES: Final = 100_000_000  # of requests, and of jobs
_LOGGED_PATH: Final = 300  # characters
_CHUNK: Final = 2000  # bytes
_RANGES: Final = {"speed": (0.1, 5), "stability": (0, 1), "similarity_boost": (0, 1), "style": (0, 1)}
_STRINGS: Final = ("model", "voice", "language", "response_format")
_SECRET_NAME: Final = r"key|token|secret|passw|auth|cookie|credential|signature"
_NAMES_A_SECRET: Final = re.compile(_SECRET_NAME, re.IGNORECASE)
# A parameter of a URL within a text, and a key of the provider's. The repetition has a limit, for long texts' sake.
_SECRET: Final = re.compile(rf"((?:{_SECRET_NAME})[\w-]{{0,40}}=)[^&;\s]+|\bsk-[\w-]{{8,}}", re.IGNORECASE)
# Half of a character, which only JSON's escapes can name, and the end of a string in C.
_NOT_TEXT: Final = re.compile("[\0\ud800-\udfff]")
_AUTHORITY: Final = re.compile(r"(\[[^\[\]]*\]|[^:\[\]]*)(:[0-9]*)?")
_ERROR_TYPES: Final = {401: "authentication_error", 402: "insufficient_balance", 429: "rate_limit_error"}
_TO_ENCODE: Final = "install the extra `audio` of prefect-nanogpt, or ffmpeg."
_ABOUT: Final = "This is the sandbox of prefect-nanogpt, a local stand-in. It is not NanoGPT."


@dataclass(slots=True)
class RecordedRequest:
    """A request as it arrived.

    Args:
        host: Which of the two ports it came to.
        received_at: When the request had arrived, on the monotonic clock in seconds.
        at: The same in seconds since the epoch.
        run_id: The job it is about, where one can be told.
        status: What it was answered with; None before, and where no answer was begun.
        body: The body of a submission.
    """

    kind: Kind
    host: Literal["api", "audio"]
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes = b""
    run_id: str | None = None
    status: int | None = None
    received_at: float = field(default_factory=time.monotonic)
    at: float = field(default_factory=time.time)

    @property
    def json(self) -> Any:
        """The body of a submission, where it is JSON."""
        return _parse(self.body)

    @property
    def size(self) -> int:
        """Roughly what it takes of memory, in bytes."""
        texts = (self.path, self.run_id, *self.query, *self.query.values(), *self.headers, *self.headers.values())
        return 1000 + len(self.body) + sum(map(sys.getsizeof, texts))

    def masked(self) -> dict[str, Any]:
        """The request for people to see: no body, and `***` where a key, a cookie or a password was."""
        shown = {attribute.name: getattr(self, attribute.name) for attribute in fields(self)}
        del shown["body"]
        return shown | {
            "path": _masked(self.path),
            "run_id": self.run_id and _masked(self.run_id),
            "query": {_masked(name): _masked(value, name) for name, value in self.query.items()},
            "headers": {name: _masked(value, name) for name, value in self.headers.items()},
        }


class _Newest(Generic[Key, Item]):
    """The newest items by their keys: no more than so many, and in all than so many bytes; the oldest go first."""

    def __init__(self) -> None:
        self._items: OrderedDict[Key, tuple[Item, int]] = OrderedDict()
        self._bytes = 0

    def add(self, key: Key, item: Item, size: int) -> list[Key]:
        """Keep one more, and return the keys of those that had to go for it."""
        self._bytes += size - self._items.pop(key, (item, 0))[1]
        self._items[key] = item, size
        dropped = []
        while len(self._items) > _KEPT or self._bytes > _KEPT_BYTES:
            oldest, (_, freed) = self._items.popitem(last=False)
            self._bytes -= freed
            dropped.append(oldest)
        return dropped

    def get(self, key: Key) -> Item | None:
        """Return an item, or None where it is not kept."""
        kept = self._items.get(key)
        return kept[0] if kept else None

    def __getitem__(self, key: Key) -> Item:
        return self._items[key][0]

    def __iter__(self) -> Iterator[Item]:
        return (item for item, _ in self._items.values())


class Api:
    """The behaviour of both hosts. Requests run on the event loop; the rest may be called from any thread."""

    def __init__(
        self,
        *,
        job_seconds: float,
        balance: Decimal,
        hex_run_ids: bool,
        qualified_models: bool,
        refund_needs_ticket: bool,
        speak: bool,
    ) -> None:
        self.job_seconds = job_seconds
        self.hex_run_ids = hex_run_ids
        self.qualified_models = qualified_models
        self.refund_needs_ticket = refund_needs_ticket
        self.ledger = Ledger(balance)
        self.studio = Studio(speak)
        self.audio_url = ""
        self.jobs: _Newest[str, Job] = _Newest()
        self.scripts = Scripts()
        self.log: _Newest[int, RecordedRequest] = _Newest()
        self.arrived: Counter[Kind] = Counter()
        self.changed = threading.Condition()  # guards scripts, log and arrived
        self._routes: dict[tuple[str, str], tuple[Kind, Callable[[RecordedRequest], Awaitable[Answer]]]] = {
            ("POST", "/api/tts"): ("submit", self._submit),
            ("POST", "/api/v1/audio/speech"): ("submit", self._submit),
            ("GET", "/api/tts/status"): ("status", self._status),
            ("POST", "/api/check-balance"): ("balance", self._balance),
            ("GET", "/api/v1/audio-models"): ("models", self._models),
            ("GET", "/_sandbox/ledger"): ("other", self._show_ledger),
            ("GET", "/_sandbox/requests"): ("other", self._show_requests),
            ("GET", "/"): ("other", self._about),
        }

    async def api(self, scope: Message, receive: Any, send: Any) -> None:
        """The API's ASGI application."""
        kind, handler = self._routes.get((scope["method"], scope["path"]), ("other", self._not_found))
        await self._handle(kind, "api", handler, _Connection(scope, receive, send))

    async def audio_host(self, scope: Message, receive: Any, send: Any) -> None:
        """The audio host's ASGI application."""
        await self._handle("audio", "audio", self._audio, _Connection(scope, receive, send))

    async def _handle(
        self,
        kind: Kind,
        host: Literal["api", "audio"],
        handler: Callable[[RecordedRequest], Awaitable[Answer]],
        connection: "_Connection",
    ) -> None:
        try:
            body = await connection.body()
            if body is None:
                return
            request = connection.request = self._record(kind, host, connection.scope, body)
            try:
                refusal = self._refusal(request, connection.scope, len(body))
                await self._play(refusal or self._next_scripted(request), request, handler, connection)
            except Exception:
                logger.exception("%s %s failed", request.method, _printable(request.path))
                if not connection.begun:
                    await connection.deliver(_error(request, 500, "The sandbox failed. Its log says how."))
        except asyncio.CancelledError:
            pass  # The sandbox is stopping; the connection is closed below.
        finally:
            if not connection.finished:
                await connection.close()
            if logger.isEnabledFor(logging.INFO) and connection.request:
                _log(connection.request)

    def _record(self, kind: Kind, host: Literal["api", "audio"], scope: Message, body: bytes) -> RecordedRequest:
        request = RecordedRequest(
            kind=kind,
            host=host,
            method=scope["method"],
            path=scope["path"],
            query=dict(parse_qsl(scope["query_string"].decode("latin-1"))),
            headers={name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]},
            body=body if kind == "submit" and len(body) <= _MAX_BODY else b"",
        )
        if kind == "status":
            request.run_id = request.query.get("runId")
        elif kind == "audio":
            request.run_id = request.path.removeprefix("/audio/").rpartition(".")[0]
        with self.changed:
            self.arrived[kind] += 1
            self.log.add(self.arrived.total(), request, request.size)
            self.changed.notify_all()
        return request

    def _refusal(self, request: RecordedRequest, scope: Message, length: int) -> Answer | None:
        """The answer to a request that nobody is to look at: not meant for this host, too large, or without a key."""
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or not _names_loopback(hosts[0]):
            # A page in a browser whose own name was pointed at 127.0.0.1 comes under that name.
            return _error(
                request, 421, "The Host must be localhost, 127.0.0.1 or [::1]: others are not this sandbox's."
            )
        if length > _MAX_BODY:
            return _error(request, 413, "Request body too large.")
        return self._check_key(request) if request.kind in ("submit", "status", "balance") else None

    def _next_scripted(self, request: RecordedRequest) -> Reply | None:
        # A HEAD must not use up what is meant for the download.
        if request.kind == "other" or request.method == "HEAD":
            return None
        with self.changed:
            return self.scripts.take(request.kind, request.run_id)

    async def _play(
        self,
        reply: Reply | None,
        request: RecordedRequest,
        handler: Callable[[RecordedRequest], Awaitable[Answer]],
        connection: "_Connection",
    ) -> None:
        """Give the scripted reply, or the handler's normal answer with or without a fault in its delivery."""
        match reply:
            case Hang(seconds):
                await connection.pause(seconds)
            case Cut(after_bytes=None):
                pass
            case Accept():
                answer = await self._submit(request, reply)

                async def accepted(_: RecordedRequest) -> Answer:
                    return answer

                await connection.pause(reply.delay)
                await self._play(reply.then, request, accepted, connection)
            case Answer():
                self._refund_if_rejected(request, reply)
                await connection.deliver(reply)
            case _:
                answer = await handler(request)
                self._refund_if_rejected(request, answer)
                if reply is None and request.kind == "submit" and answer.body is not None:
                    # The audio of a binary answer takes the faults that the text asks of the download.
                    with self.changed:
                        reply = self.scripts.take("audio", request.run_id)
                    if isinstance(reply, Answer):
                        answer = replace(reply, delay=answer.delay + reply.delay)
                await connection.deliver(answer, reply)

    # Submission

    async def _submit(self, request: RecordedRequest, accept: Accept | None = None) -> Answer:
        fields = request.json
        if not isinstance(fields, dict):
            return _error(request, 400, "The body must be a JSON object.")
        text = fields.get("text", fields.get("input"))
        if not isinstance(text, str) or not text.strip():
            return _error(request, 400, "Missing required parameter: text")
        if _NOT_TEXT.search(text):
            return _error(request, 400, "text must be whole Unicode characters, without NUL")
        for name, (low, high) in _RANGES.items():
            value = fields.get(name, low)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                return _error(request, 400, f"{name} must be a number from {low} to {high}")
        for name in _STRINGS:
            value = fields.get(name, "")
            if not isinstance(value, str) or len(value) > _LONGEST_STRING or _NOT_TEXT.search(value):
                return _error(request, 400, f"{name} must be a string, {_LONGEST_STRING} characters at most, no NUL")
        model = MODELS.get(fields.get("model") or DEFAULT_MODEL)
        if model is None:
            known = ", ".join(MODELS)
            return _error(request, 404, f"Model not found. Known here: {known}", "model_not_found")
        longest = model.max_chars or _MAX_CHARS
        if len(text) > longest:
            return _error(request, 413, f"Text exceeds {longest} characters", "input_too_long")
        format = fields.get("response_format", model.format)
        if model.is_openai and format not in CONTENT_TYPES:
            return _error(request, 400, f"The sandbox makes {', '.join(CONTENT_TYPES)}.", "unsupported_format")
        if model.is_openai and not can_encode(format):
            return _error(
                request, 400, f"The sandbox has no encoder for {format} here: {_TO_ENCODE}", "unsupported_format"
            )
        try:
            directives = parse_directives(text)
        except DirectiveError as error:
            return _error(request, 400, str(error))
        is_streamed = model.streams and fields.get("stream") is True and request.path == "/api/v1/audio/speech"
        answers = "binary" if is_streamed else model.answers
        if answers != "ticket" and directives.outcome == "reject":
            return _error(request, 400, "Content rejected by provider.", "content_policy_violation")
        if answers != "ticket" and directives.outcome == "fail":
            return _error(request, 500, "TTS generation failed. Please try again.")
        accept = accept or Accept()
        job = new_job(
            model,
            directives,
            fields,
            characters=len(text),
            seconds=self.job_seconds,
            hex_run_id=accept.hex_run_id or self.hex_run_ids,
            qualified_model=(accept.qualified_model or self.qualified_models) and not accept.minimal,
        )
        try:
            self.ledger.charge(job, len(text))
        except InsufficientBalance:
            return _error(request, 402, "Insufficient balance", requiredBalance=float(job.cost))
        request.run_id = job.run_id
        self.add(job)
        if answers == "ticket":
            ticket = job.ticket()
            if accept.minimal:
                ticket = {"status": "pending", "runId": job.run_id}
            return Answer(accept.status_code, ticket)
        delay = math.inf if directives.outcome == "stuck" else directives.seconds or 0
        if answers == "url" and request.path == "/api/tts":
            body = self.completed_body(job.run_id) | {
                "text": directives.spoken,
                "voice": job.utterance.voice,
                "speed": job.utterance.speed,
                "cost": float(job.cost),
                "currency": "USD",
            }
            del body["status"]
            return Answer(json=body, delay=delay)
        return replace(await self._audio_of(job), delay=delay, chunked=is_streamed)

    def add(self, job: Job) -> None:
        """Take a job in, with what its text asks for."""
        with self.changed:
            for dropped in self.jobs.add(job.run_id, job, job.size):
                self.scripts.forget(dropped)
            for surface, replies in job.directives.scripts:
                self.scripts.add(surface, job.run_id, replies)

    # Status

    async def _status(self, request: RecordedRequest) -> Answer:
        run_id, model = request.query.get("runId"), request.query.get("model")
        if not run_id or not model:
            return _error(request, 400, "runId and model are required")
        if request.query.get("isApiRequest", "true").lower() not in ("true", "false"):
            return _error(request, 400, "isApiRequest must be true or false")
        job = self.jobs.get(run_id)
        if job is None or job.known_as != model:
            return _error(request, 404, "TTS run not found")
        return Answer(json=job.status(self.completed_body(run_id)))

    def completed_body(self, run_id: str) -> dict[str, Any]:
        """The status body of a completed job."""
        job = self.jobs[run_id]
        return {
            "status": "completed",
            "audioUrl": f"{self.audio_url}/audio/{job.file_name}",
            "contentType": CONTENT_TYPES[job.utterance.format],
            "model": job.known_as,
        }

    def _refund_if_rejected(self, request: RecordedRequest, answer: Answer) -> None:
        if request.kind != "status" or not request.run_id or not isinstance(answer.json, dict):
            return
        rejected = str(answer.json.get("code")).upper() == "CONTENT_POLICY_VIOLATION"
        has_ticket = bool(request.query.get("cost") and request.query.get("paymentSource"))
        if rejected and (has_ticket or not self.refund_needs_ticket):
            self.ledger.refund(request.run_id)

    # Audio

    async def _audio(self, request: RecordedRequest) -> Answer:
        job = self.jobs.get(request.run_id or "")
        if job is None or request.path != f"/audio/{job.file_name}":
            return _error(request, 404, "No such file")
        if request.method not in ("GET", "HEAD"):
            return _error(request, 405, "Method not allowed")
        return await self._audio_of(job)

    async def _audio_of(self, job: Job) -> Answer:
        audio = await asyncio.wrap_future(self.studio.record(job.utterance))
        headers = {"content-type": audio.content_type, "x-sandbox-voice": audio.voice}
        if self.studio.hums:
            headers["x-sandbox-hums"] = "true"
        return Answer(body=audio.data, headers=headers)

    # Neighbours

    def _check_key(self, request: RecordedRequest) -> Answer | None:
        key = request.headers.get("x-api-key", "").strip()
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not key and scheme.lower() == "bearer":
            key = token.strip()
        if not key:
            return _error(request, 401, "Missing API key", "missing_api_key")
        if key == "invalid" or key.startswith("bad-"):
            return _error(request, 401, "Invalid API key", "invalid_api_key")
        return None

    async def _balance(self, _: RecordedRequest) -> Answer:
        usd = f"{self.ledger.balance:f}"  # str() would write small amounts with an exponent
        return Answer(json={"usd_balance": usd, "nano_balance": "0", "nanoDepositAddress": "nano_1sandbox"})

    async def _models(self, request: RecordedRequest) -> Answer:
        rows = catalogue() if request.query.get("type", "all") in ("tts", "all") else []
        if request.query.get("detailed", "true").lower() == "false":
            rows = [{name: row[name] for name in ("id", "object", "created", "owned_by")} for row in rows]
        meta = {"count": len(rows), "generated_at": datetime.now(UTC).isoformat(timespec="milliseconds")}
        return Answer(json={"object": "list", "data": rows, "meta": meta})

    async def _show_ledger(self, _: RecordedRequest) -> Answer:
        entries = self.ledger.entries
        return Answer(
            json={
                "balance": str(self.ledger.balance),
                "charged_total": str(self.ledger.charged_total),
                "counts": Counter(entry.kind for entry in entries),
                "entries": [asdict(entry) | {"amount": str(entry.amount)} for entry in entries],
            }
        )

    async def _show_requests(self, _: RecordedRequest) -> Answer:
        with self.changed:
            log, counts = list(self.log), dict(self.arrived)
        # In a thread: a full log takes a second or two.
        shown = await asyncio.to_thread(lambda: [request.masked() for request in log])
        return Answer(json={"counts": counts, "requests": shown})

    async def _about(self, _: RecordedRequest) -> Answer:
        pages = [f"{method} {path}" for method, path in self._routes]
        return Answer(json={"sandbox": True, "about": _ABOUT, "audio_host": self.audio_url, "routes": pages})

    async def _not_found(self, request: RecordedRequest) -> Answer:
        return _error(request, 404, "Not found")


class _Connection:
    """One request on a TCP connection that can be closed at any point of the answer."""

    def __init__(self, scope: Message, receive: Any, send: Any) -> None:
        self.scope = scope
        self.request: RecordedRequest | None = None
        self.begun = self.finished = False
        self._receive = receive
        self._send = send
        self._transport: asyncio.Transport = scope["state"]["transport"]

    async def body(self) -> bytes | None:
        """Read the request's body, or None where the client left; of too large a one, enough to tell."""
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self.finished = True
                return None
            if len(body) <= _MAX_BODY:
                body += message.get("body", b"")
            if not message.get("more_body"):
                return bytes(body)

    async def pause(self, seconds: float) -> bool:
        """Let so many seconds pass, or fewer where the client leaves; return whether it is still there."""
        try:
            async with asyncio.timeout(seconds):
                while (await self._receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            return True
        return False

    async def deliver(self, answer: Answer, fault: Reply | None = None) -> None:
        """Send an answer, cut or slowed down where the fault says so."""
        if answer.delay and not await self.pause(answer.delay):
            return
        body, content_type = _encode(answer)
        length = {} if answer.chunked else {"content-length": str(len(body))}
        headers = {
            "content-type": content_type,
            **length,
            "x-nanogpt-sandbox": "true",
            "x-request-id": uuid.uuid4().hex,
        } | {name.lower(): value for name, value in answer.headers.items()}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        if self.request:
            self.request.status = answer.status
        self.begun = True
        await self._send({"type": "http.response.start", "status": answer.status, "headers": raw})
        pieces = _slices(body, _CHUNK, 0) if answer.chunked else [(body, 0.0)]
        match fault:
            case Cut(after_bytes=int(count)):
                await self._send({"type": "http.response.body", "body": body[:count], "more_body": True})
                return
            case Stall(after_bytes=count, seconds=seconds):
                pieces = [(body[:count], seconds), (body[count:], 0.0)]
            case Slow(bytes_per_second=rate):
                step = max(1, int(rate / 20))
                pieces = _slices(body, step, step / rate)
        for piece, pause in pieces[:-1]:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            if not await self.pause(pause):
                return
        await self._send({"type": "http.response.body", "body": pieces[-1][0]})
        self.finished = True

    async def close(self) -> None:
        """Close the TCP connection, after the bytes that are under way, and wait until it is gone."""
        self.finished = True
        self._transport.close()
        with contextlib.suppress(asyncio.CancelledError):  # the sandbox is stopping, and has cut all connections
            while (await self._receive())["type"] != "http.disconnect":
                pass


def _slices(body: bytes, size: int, pause: float) -> list[tuple[bytes, float]]:
    """A body in pieces, with the seconds of silence after each."""
    return [(body[start : start + size], pause) for start in range(0, len(body), size)] or [(b"", pause)]


def _encode(answer: Answer) -> tuple[bytes, str]:
    if answer.json is not None:
        return json.dumps(answer.json).encode(), "application/json"
    if isinstance(answer.body, str):
        return answer.body.encode(), "text/plain; charset=utf-8"
    return answer.body or b"", "application/octet-stream"


def _parse(body: bytes) -> Any:
    """The JSON of a body; None where it is none, or nested too deeply."""
    try:
        return json.loads(body.decode("utf-8-sig"), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        return None


def _finite(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError("JSON has no such number.")
    return number


def is_loopback(host: str) -> bool:
    """Whether it is an IP address of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _names_loopback(host: str) -> bool:
    """Whether a Host header, with or without a port, means this machine for every client."""
    authority = _AUTHORITY.fullmatch(host.lower())
    name = authority[1].strip("[]") if authority else ""
    return name == "localhost" or name.endswith(".localhost") or is_loopback(name)


def _masked(text: str, name: str = "") -> str:
    """A text of a request, which may have a name, without what may be secret in it."""
    if _NAMES_A_SECRET.search(name):
        return "***"
    before, at, after = text.rpartition("@")
    if at and (user := re.search("//|:", before)):  # a URL's user and password, which may hold any character
        text = f"{before[: before.rfind('/', 0, user.end()) + 1]}***@{after}"
    return _SECRET.sub(lambda found: f"{found[1] or ''}***", text)


def _printable(path: str) -> str:
    """A path on a line of a log, whatever characters a client put into it."""
    shown = ascii(_masked(path))[1:-1]
    return shown if len(shown) <= _LOGGED_PATH else f"{shown[:_LOGGED_PATH]}…"


def _error(request: RecordedRequest, status: int, message: str, code: str | None = None, **extra: Any) -> Answer:
    """An error in the shape of the route: OpenAI's under /api/v1, the legacy one elsewhere."""
    if request.path.startswith("/api/v1/"):
        kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        error: dict[str, Any] = {"message": message, "type": kind, "code": code, "param": None}
        return Answer(status, {"error": error | extra})
    legacy: dict[str, Any] = {"error": message, "status": status} | extra
    return Answer(status, legacy | {"code": code} if code else legacy)


def _log(request: RecordedRequest) -> None:
    run_id = request.run_id if request.run_id and request.run_id not in request.path else None
    about = f" run {_printable(run_id)}" if run_id else ""
    logger.info("%s %s -> %s%s", request.method, _printable(request.path), request.status or "no answer", about)
