"""NanoGPT's text-to-speech API over HTTP: submit, poll, download. Nothing of Prefect, and no retries.

Every failure becomes one of `prefect_nanogpt.errors`, which says whether repeating the call can help. What comes from
the provider is bounded here: how long an answer takes, how large it is, packed and unpacked, and how large its numbers
are; `prefect_nanogpt.models` bounds its words.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import json
import math
import os
import platform
import re
import threading
import time
import zlib
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar
from urllib.parse import quote, unquote

import anyio
import httpx
from pydantic import SecretStr

from prefect_nanogpt import __version__
from prefect_nanogpt.connections import AudioHosts, AudioTransport, api_transport, split_login, ssl_context
from prefect_nanogpt.errors import (
    CONTENT_POLICY_VIOLATION,
    AudioError,
    ContentPolicyViolation,
    CredentialsError,
    NothingSent,
    ProviderError,
    SubmissionUncertain,
    hide,
    without_login,
)
from prefect_nanogpt.models import (
    LONGEST_WORD,
    AudioContent,
    AudioModel,
    Balance,
    Submission,
    Ticket,
    TTSRequest,
    TTSStatus,
    error_in,
    one_line,
    parse_balance,
    parse_models,
    parse_status,
    parse_submission,
    perhaps,
)
from prefect_nanogpt.turns import Turns

__all__ = [
    "DEFAULT_BASE_URL",
    "INVALID_CREDENTIALS",
    "OTHER_BASE_URL",
    "NanoGPTClient",
    "in_own_thread",
    "problem_with_base_url",
]

R = TypeVar("R")
DEFAULT_BASE_URL: Final = "https://nano-gpt.com/api"
OTHER_BASE_URL: Final = "https://api.nano-gpt.com/api"
"""NanoGPT's other host, which its page on hosts recommends for requests with a key."""
INVALID_CREDENTIALS: Final = "INVALID_CREDENTIALS"
"""Something was given, and it cannot be used: that is not the same as nothing."""

STATUS_TIMEOUT: Final = httpx.Timeout(30.0, connect=10.0, pool=None)
# Models that answer with the audio itself take as long as the speech takes to make.
SUBMIT_TIMEOUT: Final = httpx.Timeout(180.0, connect=10.0, write=30.0, pool=None)
# The timeouts above begin anew with each byte. These are for the whole.
LONGEST_LOOK_SECONDS: Final = 30.0
LONGEST_ANSWER_SECONDS: Final = 240.0
LARGEST_JSON_BYTES: Final = 8 * 1024**2
LARGEST_CATALOGUE_BYTES: Final = 32 * 1024**2
LONGEST_CATALOGUE_SECONDS: Final = 10.0
"""Runs go on without it, and are not to wait for it for long."""
CATALOGUE_KEPT_SECONDS: Final = 300.0
LARGEST_ANSWER_BYTES: Final = 128 * 1024**2
"""Of a submission, which some models answer with the audio."""
LARGEST_UNPACKED_BYTES: Final = 1024**2
"""Of audio that comes packed, at once."""
REQUESTS_AT_ONCE: Final = 16
"""httpx's pool slows down with the square of the requests that wait in it, so they wait in front of it."""
SUBMISSIONS_AT_ONCE: Final = 32
"""Beside them: what has not begun to say how long it takes does not wait for what has."""
DOWNLOADS_AT_ONCE: Final = 8
MAX_REDIRECTS: Final = 5
ODD_ANSWER_SHOWN: Final = 300
LONGEST_FAULT: Final = 300
"""How much is shown of the text of a transport error, which may quote what came, in characters."""
LONGEST_RETRY_AFTER_SECONDS: Final = 366 * 86_400.0
MOST_DIGITS: Final = 40
"""Of a number: an amount of XNO has thirty decimals. Beyond, nothing can be meant by it."""
SHORTEST_TO_MASK: Final = 9
"""What is secret is masked where the provider repeats it. What is shorter is that of a sandbox, and may be a word like
others."""

_RETRYABLE_STATUSES: Final = frozenset({404, 408, 429})
# A redirect with one of these says that the resource is elsewhere, so nothing was done about the request here.
_MOVED: Final = frozenset({301, 307, 308})
_NOTHING_SENT: Final = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.LocalProtocolError,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)
# What httpx raises for an answer that is none: of its own kind, of a redirect's URL, of the codecs.
_FAULTS: Final = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError)
UNREACHABLE: Final = "PROVIDER_UNREACHABLE"
MODEL_NOT_FOUND: Final = "MODEL_NOT_FOUND"
_UNPACKED: Final = frozenset({"gzip", "x-gzip", "deflate"})
_PACKINGS: Final = _UNPACKED | {"br", "zstd", "compress"}
"""Others are said of what is not packed: `aws-chunked`, `utf-8`, `none`."""
_GZIP_TRAILER_BYTES: Final = 8
LAST_WORD_SECONDS: Final = 25.0
"""How long a process that is being stopped waits for the answer to a submission: Prefect kills it after 30 s."""
ONE_INTERRUPTION_SECONDS: Final = 1.0
_catalogues: Final[dict[str, tuple[float, list[AudioModel]]]] = {}
"""What this process has read, by base URL, and when, on the monotonic clock."""
_RUN_ID: Final = re.compile(rb'"runId"\s*:\s*("(?:[^"\\]|\\.){1,600}"|\d{1,600})')


@dataclass(frozen=True, repr=False)
class _Answer:
    """What the API has answered.

    Attributes:
        status: The HTTP status.
        headers: The headers.
        content: The body, unpacked, or what there is of it.
        problem: Why that is not all, as the end of a sentence.
        secrets: What is not to be repeated of it.
    """

    status: int
    headers: httpx.Headers
    content: bytes
    problem: str | None
    secrets: tuple[SecretStr, ...]

    @property
    def json(self) -> Any:
        """The body as JSON; None where it is none, too much of it, or not all."""
        if len(self.content) > LARGEST_CATALOGUE_BYTES:
            return None
        try:
            text = self.content.decode(json.detect_encoding(self.content))
        except UnicodeDecodeError:
            text = self.content.decode(errors="replace")
        try:
            # Money is exact: a JSON number becomes a Decimal without passing through binary floating point.
            body = json.loads(
                _without(self.secrets, text),
                parse_float=_number,
                parse_int=_number,
                parse_constant=lambda _: None,
                strict=False,
            )
            return self._masked(body) if "\\u" in text else body  # an escape may hide what is secret
        except (ValueError, RecursionError):
            return None

    def _masked(self, value: Any) -> Any:
        match value:
            case str():
                return _without(self.secrets, value)
            case list():
                return [self._masked(item) for item in value]
            case dict():
                return {name: self._masked(item) for name, item in value.items()}
        return value

    @property
    def request_id(self) -> str | None:
        """The provider's `X-Request-ID`."""
        return self.words(self.headers.get("x-request-id", ""), LONGEST_WORD) or None

    @property
    def beginning(self) -> str:
        """The beginning of the body, for people."""
        return self.words(repr(self.content[:ODD_ANSWER_SHOWN].decode(errors="replace")), 2 * ODD_ANSWER_SHOWN)

    @property
    def run_id(self) -> str:
        """A sentence with what the body, however broken, seems to say that the run id is, escaped, or nothing."""
        if (found := _RUN_ID.search(self.content)) is None:
            return ""
        run_id = self.words(ascii(found[1].decode(errors="replace").strip('"')), 2 * ODD_ANSWER_SHOWN)
        return f" The run id in it is {run_id}."

    def words(self, words: str, limit: int) -> str:
        """Give somebody's words as they can be shown."""
        return _shown(words, self.secrets, limit)


class NanoGPTClient:
    """An asynchronous client of NanoGPT's text-to-speech API.

    The API key goes to `base_url` and nowhere else: audio is fetched from its third-party host through a connection
    of its own that carries no key and keeps no cookies.

    Args:
        api_key: The NanoGPT API key.
        base_url: The root of the API, with or without a trailing slash.
        key_source: Where the key comes from, to be named when it is refused.
        audio_hosts: The hosts that audio may be fetched from although their addresses are not public: names, names
            with `*.` before them for all names below, addresses, and networks such as `198.18.0.0/15`.

    Attributes:
        base_url: The root of the API, without a trailing slash, and without the user and password it may have had.
        turns: When a request to the API may leave.

    Raises:
        CredentialsError: The key is empty or has characters that an HTTP header cannot carry, or the base URL or an
            audio host is none (code `INVALID_CREDENTIALS`).
        ProviderError: The proxy that the environment names cannot be used.

    Example:
        >>> async with NanoGPTClient(api_key) as client:
        ...     status = await client.status(ticket)
    """

    def __init__(
        self,
        api_key: str | SecretStr,
        base_url: str | SecretStr = DEFAULT_BASE_URL,
        *,
        key_source: str | None = None,
        audio_hosts: Iterable[str] = (),
    ) -> None:
        # There are tracebacks that show variables.
        api_key, base_url = _hidden(api_key), _hidden(base_url)
        if not re.fullmatch("[!-~]+", api_key.get_secret_value()):
            source = f" from {key_source}" if key_source else ""
            raise CredentialsError(
                f"The NanoGPT API key{source} is empty or has characters that no key has.", code=INVALID_CREDENTIALS
            )
        if problem := problem_with_base_url(base_url.get_secret_value()):
            raise CredentialsError(f"{problem}.", code=INVALID_CREDENTIALS)
        try:
            hosts = AudioHosts([*audio_hosts, *AudioHosts.in_environment()])
        except ValueError as error:
            raise CredentialsError(f"{error}.", code=INVALID_CREDENTIALS) from None
        self.base_url, _ = split_login(base_url.get_secret_value().rstrip("/"))
        self._key_source = key_source
        self._secrets = tuple(_to_be_masked(api_key, base_url))
        user_agent = f"prefect-nanogpt/{__version__} Python/{platform.python_version()}"
        verify = ssl_context()
        make = partial(
            httpx.AsyncClient,
            headers={
                "x-api-key": api_key.get_secret_value(),
                "user-agent": user_agent,
                "accept": "application/json, audio/*",
                "accept-encoding": "gzip",
            },
            verify=verify,
            auth=split_login(base_url.get_secret_value())[1],
        )
        try:
            self._api, self._submissions = make(timeout=STATUS_TIMEOUT), make(timeout=SUBMIT_TIMEOUT)
            self._fast = api_transport(verify, self.base_url)
            self._gets = make(timeout=STATUS_TIMEOUT, transport=self._fast) if self._fast else self._api
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ProviderError(
                f"The proxy that the environment names, or its NO_PROXY, cannot be used ({self._words(error)}).",
                code=UNREACHABLE,
            ) from None
        self._is_strict = self.base_url.lower().startswith("https:")
        self._audio = AudioTransport(verify, hosts if self._is_strict else None)
        self._audio_headers = {
            "user-agent": user_agent,
            "accept": "audio/*, */*;q=0.1",
            "accept-encoding": "identity",
            "connection": "keep-alive",
        }
        self._has_posted = False
        self._is_closed = False
        self._posts = 0  # counted in the background, where all submissions are sent
        self.turns = Turns()
        self._api_gate = asyncio.Semaphore(REQUESTS_AT_ONCE)
        self._submission_gate = asyncio.Semaphore(SUBMISSIONS_AT_ONCE)
        self._audio_gate = asyncio.Semaphore(DOWNLOADS_AT_ONCE)
        self._catalogue_lock = asyncio.Lock()
        self._no_catalogue: tuple[float, ProviderError | None] = (0.0, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        self._is_closed = True
        await self._api.aclose()
        await self._gets.aclose()
        await self._audio.aclose()
        if self._has_posted:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._close_submissions(), _background()))

    async def _close_submissions(self) -> None:
        if not self._posts:
            await self._submissions.aclose()

    @asynccontextmanager
    async def turn(self, *, submits: bool = False) -> AsyncIterator[None]:
        """Wait for a place among the requests to the API; submissions go first, and have places of their own."""
        async with self._submission_gate if submits else self._api_gate:
            await self.turns.wait(first=submits)
            yield

    def build(self, request: TTSRequest) -> httpx.Request:
        """Make the HTTP request of a submission, so that whatever is wrong with it is known before it is sent."""
        return self._submissions.build_request(
            "POST",
            f"{self.base_url}/tts",
            content=request.content(),
            headers={"content-type": "application/json"},
        )

    def post(self, built: httpx.Request, model: str) -> Submission:
        """Send a submission, once, and block until it is answered.

        It blocks because nothing in the event loop may interrupt it: whoever gives up waiting for the answer loses a
        ticket that is paid for. What is accepted is charged at once, and the provider knows no idempotency key.

        Args:
            built: The request that `build` made.
            model: The model asked for, for answers that do not name it.

        Returns:
            A ticket, or the finished audio (as a URL, or as bytes) from models that answer at once.

        Raises:
            SubmissionUncertain: It is not known whether the provider accepted the job: the connection broke after the
                request had left, the answer was a server error, or it could not be understood.
            ContentPolicyViolation: The provider refused the text; nothing was accepted.
            NothingSent: No byte of the request left.
            ProviderError: Nothing was accepted. `retryable` only on a throughput 429.
        """
        self._has_posted = True
        try:
            answer = asyncio.run_coroutine_threadsafe(self._send(built), _background()).result()
        except _NOTHING_SENT as error:
            raise NothingSent(
                f"{self.base_url} could not be reached ({self._words(error)}).", code=UNREACHABLE, retryable=True
            ) from None
        except Exception as error:  # whatever it is, the request may have left
            raise SubmissionUncertain(
                f"The connection to {self.base_url} broke after the request had left ({self._words(error)})."
            ) from None
        if 400 <= answer.status < 500 and answer.status != 408:
            refusal = self._refusal(answer)
            refusal.retryable = refusal.retryable and answer.status == 429
            raise refusal
        if answer.status in _MOVED:
            raise self._refusal(answer)
        if not 200 <= answer.status < 300:
            said = self._refusal(answer)
            raise SubmissionUncertain(
                f"The provider answered the submission with HTTP {answer.status}: {said.message}{answer.run_id}",
                http_status=answer.status,
                request_id=said.request_id,
            )
        content_type = answer.words(answer.headers.get("content-type", "").partition(";")[0].lower(), LONGEST_WORD)
        is_text = content_type.startswith("text/") or answer.content.lstrip()[:1] in (b"", b"<", b"{", b"[")
        body = answer.json if is_text or not content_type.startswith("audio/") else None
        if not (is_text or content_type == "application/json" or answer.problem or isinstance(body, dict)):
            return AudioContent(content=answer.content, content_type=content_type or None)
        try:
            if not isinstance(body, dict):
                raise ValueError(answer.problem or "the answer is not a JSON object")
            return parse_submission(body, model)
        except ValueError as error:
            # Whatever else such an answer says, it does not say that nothing was charged.
            _, message = error_in(body)
            words = f" It says: {message}" if message else f" It begins with {answer.beginning}."
            raise SubmissionUncertain(
                f"The provider answered HTTP {answer.status}, but {_first_line(error)}.{answer.run_id}{words}",
                http_status=answer.status,
                request_id=answer.request_id,
            ) from None

    async def _send(self, built: httpx.Request) -> _Answer:
        if self._is_closed:  # while this was about to be sent
            raise httpx.ConnectError("the client is closed")
        has_left = False

        async def trace(event: str, details: Mapping[str, Any]) -> None:
            nonlocal has_left
            # A proxy is asked to connect before.
            has_left |= event.endswith("send_request_headers.started") and details["request"].method != b"CONNECT"

        built.extensions["trace"] = trace
        self._posts += 1
        try:
            return await self._read(self._submissions, built, LARGEST_ANSWER_BYTES, LONGEST_ANSWER_SECONDS)
        except Exception as error:
            if not has_left and not isinstance(error, _NOTHING_SENT):
                raise httpx.ConnectError(f"{type(error).__name__}: {error}") from None
            raise
        finally:
            self._posts -= 1
            if self._is_closed and not self._posts:  # closed while its last answer was waited for
                await self._submissions.aclose()

    async def _read(self, client: httpx.AsyncClient, request: httpx.Request, largest: int, seconds: float) -> _Answer:
        """Send a request and read the answer, no longer than so many seconds and no more than so many bytes."""
        response = None
        packed, problem = bytearray(), None
        try:
            async with asyncio.timeout(seconds):
                response = await client.send(request, stream=True)
                async for piece in response.aiter_raw():
                    packed += piece
                    if len(packed) > largest:
                        problem = f"its answer is larger than {largest:,} bytes"
                        break
        except (OSError, httpx.HTTPError) as error:  # of TLS there are errors that httpx leaves as they are
            is_late = isinstance(error, TimeoutError)
            if response is None:
                raise httpx.ReadTimeout(f"no answer after {seconds:.0f} s") if is_late else error from None
            problem = "its answer " + (
                f"was not whole after {seconds:.0f} s" if is_late else f"broke off ({self._words(error)})"
            )
        finally:
            if response is not None:
                await response.aclose()
        del packed[largest:]
        content, odd = _unpacked(bytes(packed), response.headers, largest)
        return _Answer(response.status_code, response.headers, content, problem or odd, self._secrets)

    async def submit(self, request: TTSRequest) -> Submission:
        """Submit a job, once, without a record of it. `submit_tts` keeps one.

        Raises:
            NanoGPTError: As `post` does.
        """
        built = self.build(request)
        async with self.turn(submits=True):
            return await in_own_thread(lambda: self.post(built, request.model))

    async def status(self, ticket: Ticket) -> TTSStatus:
        """Look at a job, once. Free of charge.

        The ticket's cost, payment source and origin go along: they drive the provider's automatic refund.

        Raises:
            ProviderError: There was no status. `retryable` on transport errors, 404 (a job accepted just now may not
                be visible yet), 408, throughput 429, server errors and bodies that are not a status.
        """
        params = {"runId": ticket.run_id, "model": ticket.model}
        if ticket.cost is not None:
            params["cost"] = format(ticket.cost, "f")
        if ticket.payment_source:
            params["paymentSource"] = ticket.payment_source
        params["isApiRequest"] = "true" if ticket.is_api_request else "false"
        try:
            return await self._read_from("GET", "/tts/status", parse_status, params=params)
        except ProviderError as error:
            if error.http_status == httpx.codes.NOT_FOUND:
                error.message += (
                    f" It was asked for as a job of {ticket.model}: the provider may know it only by the model that "
                    "its ticket names."
                )
            raise

    async def list_models(self) -> list[AudioModel]:
        """Read the provider's catalogue of audio models (`GET /v1/audio-models`), at most every five minutes.

        Its prices and models change, so this process keeps it for minutes only; that it could not be read, this client
        does. It has rows that are no speech: see `AudioModel.kind`.

        Raises:
            ProviderError: The catalogue could not be read.
        """
        async with self._catalogue_lock:
            read_at, models = _catalogues.get(self.base_url, (-math.inf, []))
            if time.monotonic() - read_at <= CATALOGUE_KEPT_SECONDS:
                return models
            failed_at, failure = self._no_catalogue
            if failure is not None and time.monotonic() - failed_at <= CATALOGUE_KEPT_SECONDS:
                raise failure
            params = {"detailed": "true", "type": "tts"}
            bounds = LARGEST_CATALOGUE_BYTES, LONGEST_CATALOGUE_SECONDS
            try:
                models = await self._read_from("GET", "/v1/audio-models", parse_models, *bounds, params=params)
            except ProviderError as error:
                self._no_catalogue = time.monotonic(), error
                raise
            _catalogues[self.base_url] = time.monotonic(), models
            return models

    async def find_model(self, model: str) -> AudioModel | None:
        """Look a model up in the provider's catalogue; None where it is not in it.

        Raises:
            ProviderError: The catalogue could not be read.
        """
        return next((found for found in await self.list_models() if found.id == model), None)

    async def list_voices(self, model: str) -> list[str]:
        """List the voices that the catalogue names for a model; none where it names none.

        There may be more: voices that were cloned have ids of their own.

        Raises:
            ProviderError: The catalogue could not be read, or does not have the model (code `MODEL_NOT_FOUND`; the
                message has the nearest ids).
        """
        known = {one.id: one for one in await self.list_models()}
        if (found := known.get(model)) is None:
            meant = perhaps(model, known)
            raise ProviderError(
                f"The catalogue of {self.base_url} has no model {_shown(model, self._secrets, LONGEST_WORD)!r}.{meant}",
                code=MODEL_NOT_FOUND,
            )
        return list(found.voices)

    async def get_balance(self) -> Balance:
        """Ask what is left on the account (`POST /check-balance`). Free of charge.

        Raises:
            ProviderError: There was no balance in the answer, or no answer.
        """
        return await self._read_from("POST", "/check-balance", parse_balance, json={})

    async def _read_from(
        self,
        method: Literal["GET", "POST"],
        path: str,
        parse: Callable[[dict[str, Any]], R],
        largest: int = LARGEST_JSON_BYTES,
        seconds: float | None = None,
        **sent: Any,
    ) -> R:
        """Read something from the API with a request that changes nothing, and parse its JSON.

        Raises:
            ProviderError: It could not be read, or is not what it should be.
        """
        async with self.turn():
            try:
                is_misread = self._fast is not None and bool(self._fast.misread)
                client = self._gets if method == "GET" and not is_misread else self._api
                request = client.build_request(method, f"{self.base_url}{path}", **sent)
                answer = await self._read(client, request, largest, seconds or LONGEST_LOOK_SECONDS)
            except _FAULTS as error:
                raise ProviderError(
                    f"{self.base_url} could not be reached ({self._words(error)}).", code=UNREACHABLE, retryable=True
                ) from None
        if not 200 <= answer.status < 300:
            raise self._refusal(answer)
        body = answer.json
        try:
            if not isinstance(body, dict):
                raise ValueError(answer.problem or "the answer is not a JSON object")
            return parse(body)
        except ValueError as error:
            raise ProviderError(
                f"The provider answered HTTP {answer.status}, but {_first_line(error)}.",
                code="UNEXPECTED_ANSWER",
                retryable=True,
                http_status=answer.status,
                request_id=answer.request_id,
            ) from None

    @asynccontextmanager
    async def download(self, url: str) -> AsyncIterator[httpx.Response]:
        """Open the audio at `url`, on whichever host it is, for streaming: its raw bytes are not packed.

        Redirects are followed under the same rules: http or https, and where the API is https also https and a public
        address, or one that is allowed on purpose, so that an answer cannot point this process at a machine of its own
        network. The host has 30 s to begin its answer, and has to send at least 30 kB in any 30 s, or the rest.

        Raises:
            AudioError: The URL is not allowed, cannot be reached, or does not answer with HTTP 200.
        """
        async with self._audio_gate:
            for _ in range(MAX_REDIRECTS + 1):
                audio_url = self._checked(url)
                response = await self._opened(audio_url)
                try:
                    if response.has_redirect_location:
                        url = _joined(audio_url, response.headers["location"])
                        continue
                    _check_answer(response, audio_url.host)
                    _unpack_on_the_way(response)
                    yield response
                    return
                except (httpx.HTTPError, httpx.StreamError) as error:
                    raise self._unread(audio_url, error, code="AUDIO_TRUNCATED") from None
                finally:
                    await response.aclose()
            raise AudioError(f"The audio host redirected more than {MAX_REDIRECTS} times.")

    def _checked(self, url: str) -> httpx.URL:
        """Check an audio URL, as far as that can be done before its host is connected to."""
        if _without(self._secrets, unquote(url)) != unquote(url):
            raise AudioError("The provider gave an audio URL that has the API key in it, so it was not fetched.")
        allowed = ["https"] if self._is_strict else ["http", "https"]
        what = "a URL"
        try:
            parsed = httpx.URL(url)
            if _can_be_a_port(parsed.port):
                what = " or ".join(allowed)
                if parsed.host and parsed.scheme in allowed:
                    return parsed
        except (httpx.InvalidURL, ValueError):
            pass
        raise AudioError(f"The provider gave an audio URL that is not {what}, so it was not fetched.")

    async def _opened(self, url: httpx.URL) -> httpx.Response:
        """Send the request of a download, which carries nothing but the login that the URL has."""
        try:
            with anyio.fail_after(LONGEST_LOOK_SECONDS):
                return await self._audio.handle_async_request(self._request_of(url))
        except (*_FAULTS, ImportError) as error:
            raise self._unread(url, error) from None

    def _request_of(self, url: httpx.URL) -> httpx.Request:
        address, login = split_login(str(url))
        request = httpx.Request(
            "GET", address, headers=self._audio_headers, extensions={"timeout": STATUS_TIMEOUT.as_dict()}
        )
        return next(httpx.BasicAuth(*login).sync_auth_flow(request)) if login else request

    def _unread(self, url: httpx.URL, error: Exception, code: str | None = None) -> AudioError:
        return AudioError(
            f"The audio could not be read from {url.host} ({self._words(error)}).", code=code, retryable=True
        )

    def _refusal(self, answer: _Answer) -> ProviderError | ContentPolicyViolation:
        """Turn an error answer into one exception, whatever the shape of its body."""
        code, message = error_in(answer.json)
        reason = httpx.codes.get_reason_phrase(answer.status)
        error = _rejection(code, message or reason or "no reason given", answer)
        if answer.status == httpx.codes.UNAUTHORIZED and self._key_source:
            error.message += f" The key is from {self._key_source}, and was sent to {self.base_url}."
        return error

    def _words(self, error: BaseException) -> str:
        """Name a transport error: httpx leaves the text of some of them empty, and others quote what came."""
        words = _shown(str(error), self._secrets, LONGEST_FAULT)
        return f"{type(error).__name__}: {words}" if words else type(error).__name__


@lru_cache(maxsize=1)
def _background_of(process: int) -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="nanogpt-submissions", daemon=True).start()
    return loop


_starting: Final = threading.Lock()


def _background() -> asyncio.AbstractEventLoop:
    """Give the event loop that submissions are sent in, in a thread of this process that nothing interrupts."""
    with _starting:
        return _background_of(os.getpid())


async def in_own_thread(call: Callable[[], R], on_interruption: Callable[[], None] | None = None) -> R:
    """Run what must not be interrupted in a thread of its own, and see it through if the waiting is cancelled.

    The thread is a daemon, so that a second Ctrl-C ends the process without it.

    Args:
        call: What to run.
        on_interruption: Told when the waiting is cancelled while the call is under way.
    """
    done: concurrent.futures.Future[R] = concurrent.futures.Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            done.set_result(context.run(call))
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="nanogpt-submission", daemon=True).start()
    waiting = asyncio.wrap_future(done)
    try:
        return await asyncio.shield(waiting)
    except BaseException:
        if not waiting.done():
            if on_interruption is not None:
                on_interruption()
            with anyio.CancelScope(shield=True):
                await _see_through(waiting)
        if waiting.done():
            waiting.exception()  # looked at, so that asyncio does not complain that nobody did
        raise


async def _see_through(waiting: asyncio.Future[Any]) -> None:
    begun = time.monotonic()
    while not waiting.done() and (left := begun + LAST_WORD_SECONDS - time.monotonic()) > 0:
        try:
            await asyncio.wait([waiting], timeout=left)
        except asyncio.CancelledError:
            # One interruption cancels several times over: asyncio.run every task, then each task group its own. What
            # comes later is a second one, of somebody who does not want to wait.
            if time.monotonic() - begun > ONE_INTERRUPTION_SECONDS:
                raise


def _rejection(code: str | None, message: str, answer: _Answer) -> ProviderError | ContentPolicyViolation:
    status = answer.status
    details: dict[str, Any] = {"http_status": status, "request_id": answer.request_id}
    if code == CONTENT_POLICY_VIOLATION:
        return ContentPolicyViolation(message, **details)
    retry_after = _retry_after_seconds(answer.headers)
    daily_cap = status == 429 and (code or "").startswith("DAILY_")
    message = message if message.endswith((".", "!", "?")) else f"{message}."
    if retry_after is not None and daily_cap:
        message += f" Come back in {retry_after:.0f} s."
    return ProviderError(
        f"{message} (HTTP {status})",
        code=code,
        retryable=(status in _RETRYABLE_STATUSES or status >= 500) and status != 501 and not daily_cap,
        retry_after_seconds=retry_after,
        **details,
    )


def _without(secrets: Iterable[SecretStr], words: str) -> str:
    for secret in secrets:
        words = words.replace(secret.get_secret_value(), "***")
    return words


def _shown(words: str, secrets: Iterable[SecretStr], limit: int) -> str:
    """Give somebody's words as they can be shown: one line, without secrets and without logins of URLs."""
    return one_line(hide((), _without(secrets, words)), limit)


def _number(written: str) -> Decimal | int | None:
    """Read a number of JSON exactly; None for one that nobody can mean."""
    digits, _, exponent = written.lower().partition("e")
    if len(digits) > 2 * MOST_DIGITS or len(exponent) > 4 or abs(int(exponent or 0)) > MOST_DIGITS:
        return None
    return Decimal(written) if "." in written or exponent else int(written)


def _packings(headers: httpx.Headers) -> list[str]:
    """List how a body is said to be packed."""
    said = headers.get("content-encoding", "").lower().split(",")
    return [packing for packing in map(str.strip, said) if packing in _PACKINGS]


def _odd_packing(headers: httpx.Headers) -> str | None:
    """Say how a body is packed that is packed otherwise than once in a way that can be unpacked within bounds."""
    packings = _packings(headers)
    if len(packings) <= 1 and _UNPACKED.issuperset(packings):
        return None
    return ", ".join(packings)[:ODD_ANSWER_SHOWN]


def _unpacked(content: bytes, headers: httpx.Headers, largest: int) -> tuple[bytes, str | None]:
    """Unpack a body, and say what is wrong with it, if anything is, as the end of a sentence.

    What cannot be unpacked is given as it is, and what is damaged as far as it goes: there may be a ticket in it.
    """
    if not _packings(headers) or not content:
        return content, None
    if odd := _odd_packing(headers):
        return content, f"its answer is packed as {odd}, which was not asked for"
    unpacking = zlib.decompressobj(zlib.MAX_WBITS | 32)
    unpacked = bytearray()
    try:
        for piece in (content[:-_GZIP_TRAILER_BYTES], content[-_GZIP_TRAILER_BYTES:]):
            unpacked += unpacking.decompress(unpacking.unconsumed_tail + piece, largest + 1 - len(unpacked))
            if len(unpacked) > largest:
                return bytes(unpacked[:LARGEST_JSON_BYTES]), f"its answer is larger than {largest:,} bytes"
    except zlib.error as error:
        return bytes(unpacked) or content, f"its answer cannot be unpacked ({error})"
    return bytes(unpacked), None if unpacking.eof else "its answer ends too early"


def _unpack_on_the_way(response: httpx.Response) -> None:
    """Unpack the body of a download as it comes: some hosts pack it though that was not asked for."""
    if _packings(response.headers):
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Unpacked(response.stream)
        del response.headers["content-encoding"]
        response.headers.pop("content-length", None)  # of what is packed


class _Unpacked(httpx.AsyncByteStream):
    """A body unpacked in pieces of a bounded size, which httpx does not do: a thousand times as much may be in one."""

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        unpacking = zlib.decompressobj(zlib.MAX_WBITS | 32)
        try:
            async for packed in self._stream:
                while packed and not unpacking.eof:
                    yield unpacking.decompress(packed, LARGEST_UNPACKED_BYTES)
                    packed = unpacking.unconsumed_tail
                if unpacking.eof:
                    return
            yield unpacking.flush()
        except zlib.error as error:
            raise httpx.DecodingError(str(error)) from None
        if not unpacking.eof:
            raise httpx.DecodingError("what is packed ends too early")

    async def aclose(self) -> None:
        await self._stream.aclose()


def _retry_after_seconds(headers: httpx.Headers) -> float | None:
    """Read `Retry-After`, which is a number of seconds or an HTTP date; nothing is as long as a year."""
    value = headers.get("retry-after", "").strip()[:ODD_ANSWER_SHOWN]
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
            seconds = (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
        except (OverflowError, TypeError, ValueError):
            return None
    return min(max(0.0, seconds), LONGEST_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else None


def problem_with_base_url(base_url: str) -> str | None:
    """Say why an address cannot be one of an API, if it cannot."""
    base_url = base_url.strip()
    try:
        parsed = httpx.URL(base_url)
        parsed.host.encode("idna")
        is_one = parsed.scheme in ("http", "https") and bool(parsed.host) and _can_be_a_port(parsed.port)
        if is_one and not re.search(r"\s", base_url):
            return None
    except (httpx.InvalidURL, ValueError):
        pass
    return f"the base URL {without_login(base_url)[:ODD_ANSWER_SHOWN]!r} is not an http or https URL"


def _hidden(words: str | SecretStr) -> SecretStr:
    return SecretStr((words if isinstance(words, str) else words.get_secret_value()).strip())


def _to_be_masked(api_key: SecretStr, base_url: SecretStr) -> Iterator[SecretStr]:
    """Give what the provider, or a proxy in front of it, may repeat of a request and nobody is to read."""
    _, login = split_login(base_url.get_secret_value())
    known = [api_key.get_secret_value()]
    if login:
        password = login[1]
        known += [password, quote(password, safe=""), password.replace("/", "\\/")]  # the last as JSON may have it
        known.append(b64encode(":".join(login).encode()).decode())
    return (SecretStr(secret) for secret in known if len(secret) >= SHORTEST_TO_MASK)


def _can_be_a_port(port: int | None) -> bool:
    return port is None or 0 < port < 2**16


def _joined(url: httpx.URL, location: str) -> str:
    """Give the URL that a redirect leads to; where it is none, that is found out when it is checked."""
    try:
        return str(url.join(location))
    except (httpx.InvalidURL, ValueError):
        return location


def _check_answer(response: httpx.Response, host: str) -> None:
    """Make sure that an answer is audio, as far as its head tells.

    Raises:
        AudioError: It is not.
    """
    if response.status_code != httpx.codes.OK:
        raise AudioError(
            f"The audio host {host} answered HTTP {response.status_code}.",
            retryable=True,
            http_status=response.status_code,
        )
    if odd := _odd_packing(response.headers):
        raise AudioError(f"The audio host {host} packed the audio as {odd}, which was not asked for.", retryable=True)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
