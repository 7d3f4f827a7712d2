"""NanoGPT's text-to-speech API over HTTP: submit, poll, download. Nothing of Prefect, and no retries.

Every failure becomes one of `prefect_nanogpt.errors`, which says whether repeating the call can help.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import ipaddress
import json
import math
import platform
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime
from decimal import Decimal
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import anyio
import httpx

from prefect_nanogpt import __version__
from prefect_nanogpt.errors import (
    CONTENT_POLICY_VIOLATION,
    AudioError,
    ContentPolicyViolation,
    CredentialsError,
    NothingSent,
    ProviderError,
    SubmissionUncertain,
    without_password,
)
from prefect_nanogpt.models import (
    AudioContent,
    SpeechModel,
    Submission,
    Ticket,
    TTSRequest,
    TTSStatus,
    error_in,
    parse_speech_model,
    parse_status,
    parse_submission,
)

__all__ = ["DEFAULT_BASE_URL", "NanoGPTClient", "in_own_thread", "split_login"]

R = TypeVar("R")
DEFAULT_BASE_URL: Final = "https://nano-gpt.com/api"

STATUS_TIMEOUT: Final = httpx.Timeout(30.0, connect=10.0, pool=None)
# Models that answer with the audio itself take as long as the speech takes to make.
SUBMIT_TIMEOUT: Final = httpx.Timeout(180.0, connect=10.0, write=30.0, pool=None)
LONGEST_ANSWER_SECONDS: Final = 240.0
REQUESTS_AT_ONCE: Final = 16
"""httpx's pool slows down with the square of the requests that wait in it, so they wait in front of it."""
DOWNLOADS_AT_ONCE: Final = 8
MAX_REDIRECTS: Final = 5
ODD_ANSWER_SHOWN: Final = 300

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
UNREACHABLE: Final = "PROVIDER_UNREACHABLE"
LAST_WORD_SECONDS: Final = 25.0
"""How long a process that is being stopped waits for the answer to a submission: Prefect kills it after 30 s."""
ONE_INTERRUPTION_SECONDS: Final = 1.0


class NanoGPTClient:
    """An asynchronous client of NanoGPT's text-to-speech API.

    The API key goes to `base_url` and nowhere else: audio is fetched from its third-party host through a connection
    of its own that carries no key and keeps no cookies.

    Args:
        api_key: The NanoGPT API key.
        base_url: The root of the API, with or without a trailing slash.
        key_source: Where the key comes from, to be named when it is refused.

    Attributes:
        base_url: The root of the API, without a trailing slash, and without the user and password it may have had.
        requests_per_second: How many requests to make to the API, at most; None for no limit.

    Raises:
        CredentialsError: The key is empty, or has characters that an HTTP header cannot carry.

    Example:
        >>> async with NanoGPTClient(api_key) as client:
        ...     status = await client.status(ticket)
    """

    def __init__(self, api_key: str, base_url: str = DEFAULT_BASE_URL, *, key_source: str | None = None) -> None:
        api_key = api_key.strip()
        if not api_key or not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
            raise CredentialsError("The NanoGPT API key is empty or has characters that no key has.")
        self.base_url, login = split_login(base_url.rstrip("/"))
        self._key_source = key_source
        user_agent = f"prefect-nanogpt/{__version__} Python/{platform.python_version()}"
        ssl_context = httpx.create_ssl_context()
        self._api = httpx.AsyncClient(
            headers={"x-api-key": api_key, "user-agent": user_agent, "accept": "application/json, audio/*"},
            timeout=STATUS_TIMEOUT,
            verify=ssl_context,
            auth=login,
        )
        self._submissions = httpx.Client(
            headers=self._api.headers, timeout=SUBMIT_TIMEOUT, verify=ssl_context, auth=login
        )
        self._audio = httpx.AsyncClient(
            headers={"user-agent": user_agent, "accept": "audio/*, */*;q=0.1", "accept-encoding": "identity"},
            timeout=STATUS_TIMEOUT,
            verify=ssl_context,
        )
        self._audio.cookies.jar.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self._posting = threading.Lock()
        self._posts = 0
        self._is_closed = False
        self.requests_per_second: float | None = None
        self._next_turn = 0.0
        self._api_gate = asyncio.Semaphore(REQUESTS_AT_ONCE)
        self._audio_gate = asyncio.Semaphore(DOWNLOADS_AT_ONCE)

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
        await self._api.aclose()
        await self._audio.aclose()
        with self._posting:
            self._is_closed = True
            if not self._posts:
                self._submissions.close()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a place among the requests to the API, which are evenly spaced where they are limited."""
        async with self._api_gate:
            if self.requests_per_second is not None:
                now = time.monotonic()
                turn = max(now, self._next_turn)
                self._next_turn = turn + 1 / self.requests_per_second
                await asyncio.sleep(turn - now)
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
        with self._posting:
            self._posts += 1
        try:
            response = self._send(built)
        except _NOTHING_SENT as error:
            raise NothingSent(
                f"{self.base_url} could not be reached ({_words(error)}).", code=UNREACHABLE, retryable=True
            ) from None
        except httpx.HTTPError as error:
            raise SubmissionUncertain(
                f"The connection to {self.base_url} broke after the request had left ({_words(error)})."
            ) from None
        finally:
            with self._posting:
                self._posts -= 1
                if self._is_closed and not self._posts:  # closed while its last answer was waited for
                    self._submissions.close()
        if 400 <= response.status_code < 500 and response.status_code != 408:
            refusal = self._answered(response)
            refusal.retryable = refusal.retryable and response.status_code == 429
            raise refusal
        if response.status_code in _MOVED:
            raise self._answered(response)
        if not response.is_success:
            said = self._answered(response)
            raise SubmissionUncertain(
                f"The provider answered the submission with HTTP {response.status_code}: {said.message}",
                http_status=response.status_code,
                request_id=said.request_id,
            )
        content_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        is_text = content_type.startswith("text/") or response.content.lstrip()[:1] in (b"", b"<", b"{", b"[")
        if not is_text and content_type != "application/json":
            return AudioContent(content=response.content, content_type=content_type or None)
        body = _json_in(response)
        try:
            if not isinstance(body, dict):
                raise ValueError("the answer is not a JSON object")
            return parse_submission(body, model)
        except ValueError as error:
            # Whatever else such an answer says, it does not say that nothing was charged.
            _, message = error_in(body)
            words = f" It says: {message}" if message else f" It begins with {response.text[:ODD_ANSWER_SHOWN]!r}."
            raise SubmissionUncertain(
                f"The provider answered HTTP {response.status_code}, but {_first_line(error)}.{words}",
                http_status=response.status_code,
                request_id=_request_id(response),
            ) from None

    def _send(self, built: httpx.Request) -> httpx.Response:
        begun = time.monotonic()
        with closing(self._submissions.send(built, stream=True)) as response:
            content = bytearray()
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() - begun > LONGEST_ANSWER_SECONDS:
                    raise httpx.ReadTimeout(f"the answer was not whole after {LONGEST_ANSWER_SECONDS:.0f} s")
        headers = [(name, value) for name, value in response.headers.raw if name.lower() != b"content-encoding"]
        return httpx.Response(response.status_code, headers=headers, content=bytes(content), request=built)

    async def submit(self, request: TTSRequest) -> Submission:
        """Submit a job, once, without a record of it. `submit_tts` keeps one.

        Raises:
            NanoGPTError: As `post` does.
        """
        built = self.build(request)
        async with self.turn():
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
            async with self.turn():
                response = await self._api.get(f"{self.base_url}/tts/status", params=params)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if not response.is_success:
            raise self._answered(response)
        body = _json_in(response)
        try:
            if not isinstance(body, dict):
                raise ValueError("the answer is not a JSON object")
            return parse_status(body)
        except ValueError as error:
            raise ProviderError(
                f"The provider answered HTTP {response.status_code}, but {_first_line(error)}.",
                code="UNEXPECTED_ANSWER",
                retryable=True,
                http_status=response.status_code,
                request_id=_request_id(response),
            ) from None

    async def speech_model(self, model: str) -> SpeechModel | None:
        """Look a model up in the provider's catalogue (`GET /v1/audio-models`); None where it is not in it.

        Raises:
            ProviderError: The catalogue could not be read.
        """
        try:
            async with self.turn():
                response = await self._api.get(
                    f"{self.base_url}/v1/audio-models", params={"detailed": "true", "type": "tts"}
                )
        except httpx.HTTPError as error:
            raise self._unreachable(error) from None
        if not response.is_success:
            raise self._answered(response)
        body = _json_in(response)
        rows = body.get("data") if isinstance(body, dict) else None
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict) and row.get("id") == model:
                return parse_speech_model(row)
        return None

    @asynccontextmanager
    async def download(self, url: str) -> AsyncIterator[httpx.Response]:
        """Open the audio at `url`, on whichever host it is, for streaming.

        Redirects are followed under the same rules: http or https, and where the API is https also https and a public
        address, so that an answer cannot point this process at a machine of its own network.

        Raises:
            AudioError: The URL is not allowed, cannot be reached, or does not answer with HTTP 200.
        """
        async with self._audio_gate:
            for _ in range(MAX_REDIRECTS + 1):
                await self._check_audio_url(url)
                begun = False
                # httpx logs the address of each request.
                address, login = split_login(url)
                try:
                    async with self._audio.stream("GET", address, auth=login) as response:
                        if response.has_redirect_location:
                            url = str(httpx.URL(url).join(response.headers["location"]))
                            continue
                        if response.status_code != httpx.codes.OK:
                            raise AudioError(
                                f"The audio host {response.url.host} answered HTTP {response.status_code}.",
                                retryable=True,
                                http_status=response.status_code,
                            )
                        begun = True
                        yield response
                        return
                except httpx.HTTPError as error:
                    raise AudioError(
                        f"The audio could not be read from {_host(url)} ({_words(error)}).",
                        code="AUDIO_TRUNCATED" if begun else None,
                        retryable=True,
                    ) from None
            raise AudioError(f"The audio host redirected more than {MAX_REDIRECTS} times.")

    async def _check_audio_url(self, url: str) -> None:
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            raise AudioError("The provider gave an audio URL that is not a URL.") from None
        strict = self.base_url.lower().startswith("https:")
        allowed = {"https"} if strict else {"https", "http"}
        if parsed.scheme not in allowed or not parsed.host:
            raise AudioError(
                f"The provider gave an audio URL that is not {' or '.join(sorted(allowed))}, so it was not fetched."
            )
        if strict and not await _is_public(parsed.host, parsed.port or 443):
            raise AudioError(
                f"The audio URL points at {parsed.host}, which is not a public address, so it was not fetched."
            )

    def _answered(self, response: httpx.Response) -> ProviderError | ContentPolicyViolation:
        error = _answered_error(response)
        if response.status_code == httpx.codes.UNAUTHORIZED and self._key_source:
            error.message += f" The key is from {self._key_source}, and was sent to {self.base_url}."
        return error

    def _unreachable(self, error: httpx.HTTPError) -> ProviderError:
        return ProviderError(
            f"{self.base_url} could not be reached ({_words(error)}).",
            code=UNREACHABLE,
            retryable=True,
        )


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


def _answered_error(response: httpx.Response) -> ProviderError | ContentPolicyViolation:
    """Turn an error answer into one exception, whatever the shape of its body."""
    code, message = error_in(_json_in(response))
    return _rejection(code, message or response.reason_phrase or "no reason given", response)


def _rejection(code: str | None, message: str, response: httpx.Response) -> ProviderError | ContentPolicyViolation:
    status = response.status_code
    details: dict[str, Any] = {"http_status": status, "request_id": _request_id(response)}
    if code == CONTENT_POLICY_VIOLATION:
        return ContentPolicyViolation(message, **details)
    retry_after = _retry_after_seconds(response)
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


def _json_in(response: httpx.Response) -> Any:
    try:
        # Money is exact: a JSON number becomes a Decimal without passing through binary floating point.
        return _without_half_characters(json.loads(response.content, parse_float=Decimal))
    except (ValueError, RecursionError):
        return None


def _without_half_characters(value: Any) -> Any:
    """Replace surrogates without their other half: JSON can have them, and nothing can write them anywhere."""
    match value:
        case str():
            return value.encode(errors="replace").decode()
        case list():
            return [_without_half_characters(item) for item in value]
        case dict():
            return {_without_half_characters(name): _without_half_characters(item) for name, item in value.items()}
    return value


def _request_id(response: httpx.Response) -> str | None:
    request_id: str | None = response.headers.get("x-request-id")
    return request_id


def _retry_after_seconds(response: httpx.Response) -> float | None:
    """Read `Retry-After`, which is a number of seconds or an HTTP date."""
    value = response.headers.get("retry-after", "").strip()
    if not value:
        return None
    try:
        seconds = float(value)
        return max(0.0, seconds) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


async def _is_public(host: str, port: int) -> bool:
    """Whether a name resolves to public addresses only. A name that this machine cannot resolve may pass a proxy."""
    try:
        infos = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError:
        return True
    return all(ipaddress.ip_address(str(info[4][0]).partition("%")[0]).is_global for info in infos)


def split_login(url: str) -> tuple[str, tuple[str, str] | None]:
    """Split a URL into one that may be shown, and the user and the password that it had."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return without_password(url), None
    if not parsed.userinfo:
        return url, None
    return str(parsed.copy_with(username=None, password=None)), (parsed.username, parsed.password)


def _host(url: str) -> str:
    return httpx.URL(url).host


def _words(error: Exception) -> str:
    """Name a transport error: httpx leaves the text of some of them empty."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
