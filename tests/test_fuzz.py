"""Whatever bytes the provider answers with: a result that can be shown and kept, or a typed error, and paid once.

Each run of the tests tries the same answers. To try others for as long as wished, and be shown the first that fails:

    FUZZ_SECONDS=600 python -m pytest tests/test_fuzz.py
"""

import asyncio
import gzip
import json
import os
import pickle
import re
import time
import unicodedata
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from decimal import Decimal
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final, TypeVar

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from prefect import State
from pydantic import BaseModel, SecretStr

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.errors import NanoGPTError, NothingSent, SubmissionUncertain
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.lines import ManifestRow
from prefect_nanogpt.models import Completed, PollSchedule, Ticket, TTSRequest
from prefect_nanogpt.sandbox import Answer, Sandbox
from prefect_nanogpt.storage import Destination
from prefect_nanogpt.tasks.audio import download_to
from tests.conftest import API_KEY
from tests.raw_server import PLACE, RawServer, raw_server
from tests.sounds import tone

T = TypeVar("T")
FUZZ_SECONDS: Final = float(os.environ.get("FUZZ_SECONDS", "0"))
"""How long each test that composes answers goes on with new ones."""
pytestmark = [pytest.mark.timeout(300 + 2 * FUZZ_SECONDS), pytest.mark.usefixtures("transport")]
MODEL: Final = "Elevenlabs-Turbo-V2.5"
REQUEST: Final = TTSRequest(text="Hello there.", model=MODEL)
LONGEST_TEXT: Final = {"run_id": 512, "message": 2_000, "audio_url": 65_536}
"""How long the provider's words may be, in characters; others are words such as USD."""
LONGEST_WORD: Final = 200
OWN_WORDS: Final = 1_000
"""How many characters our own words around the provider's may have."""
LARGEST_NUMBER: Final = 10**15
MOST_DIGITS: Final = 100
CONTROL: Final[Collection[str]] = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode's categories of what moves a cursor, ends a line, or is half a character."""


# What is answered: values, in the words of JSON, which has more of them than Python can write

HOSTILE_VALUES: Final = {
    "half a character": r'"\ud800"',
    "halves in the wrong order": r'"a\udfff\ud800b"',
    "a NUL": r'"a\u0000b"',
    "an escape sequence": r'"\u001b[31mred\u001b]0;title\u0007"',
    "several lines": r'"one\ntwo\r\nthree\u2028four\u0085five"',
    "a raw line end": '"one\ntwo"',
    "blanks": '" \\t\\n "',
    "nothing but marks": r'"\u200b\ufeff"',
    "a long text": f'"{"x" * 10_000}"',
    "a long text of dots": f'"{". " * 5_000}"',
    "a path": '"../../etc/passwd"',
    "markup": '"</td>`|<img src=x onerror=alert(1)>"',
    "a format": '"{0.__class__} %s %(x)d {ticket.model}"',
    "digits": "9" * 5_000,
    "digits with a point": f"0.{'1' * 5_000}",
    "digits as text": f'"{"9" * 5_000}"',
    "a huge number": "1e1000000",
    "a tiny number": "1e-1000000",
    "a number beyond all": "1e99999999999999999999",
    "a huge number as text": '"1e1000000"',
    "a large number": "1e400",
    "a large whole number": "1" + "0" * 400,
    "a negative number": "-1",
    "a negative zero": "-0.0",
    "no number": "NaN",
    "no number as text": '"NaN"',
    "infinity": "Infinity",
    "negative infinity": "-Infinity",
    "null": "null",
    "true": "true",
    "false": "false",
    "zero": "0",
    "an empty text": '""',
    "an empty list": "[]",
    "an empty object": "{}",
    "a deep list": "[" * 100_000 + "]" * 100_000,
    "a list as deep as Python goes": "[" * 900 + "]" * 900,
    "a deep object": '{"a":' * 900 + "1" + "}" * 900,
    "a list of texts": r'["\ud800", null, 5]',
}
PROPER_VALUES: Final = {
    "runId": ['"98b0-d593"'],
    "model": [f'"{MODEL}"'],
    "cost": ["0.005", "0"],
    "paymentSource": ['"USD"', '"XNO"'],
    "status": ['"pending"', '"completed"', '"error"', '"content_policy_violation"', '"queued"'],
    "queuePosition": ["3", "0"],
    "audioUrl": [f'"http://{PLACE.decode()}/audio.mp3"'],
    "audioUrls": [f'["http://{PLACE.decode()}/audio.mp3"]'],
    "contentType": ['"audio/mpeg"'],
    "duration": ["1.5"],
    "currency": ['"USD"'],
    "isApiRequest": ["true"],
    "code": ['"voice_unavailable"', '"content_policy_violation"', '"daily_usd_limit_exceeded"'],
    "message": ['"The provider\'s own words."'],
    "type": ['"rate_limit_error"'],
    "error": ['"The voice is not available"', "400"],
    "data": ["[]"],
}

any_text: Final = st.text(max_size=30).map(json.dumps)
values: Final = st.one_of(
    st.sampled_from(sorted(HOSTILE_VALUES)).map(lambda name: HOSTILE_VALUES[name]),
    any_text,
    st.decimals(allow_nan=False, allow_infinity=False).map(str),
)


def json_object(fields: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


def objects(names: list[str]) -> st.SearchStrategy[str]:
    """Objects of the protocol, with a proper value in a field, or another one."""
    proper = {name: st.one_of(st.sampled_from(PROPER_VALUES[name]), values) for name in names}
    return st.fixed_dictionaries({}, optional=proper).map(json_object)


errors: Final = st.one_of(
    objects(["message", "type", "code"]).map(lambda error: f'{{"error": {error}}}'),
    objects(["error", "message", "code", "status", "type"]),
)
tickets: Final = objects(["runId", "status", "model", "cost", "paymentSource", "isApiRequest"])
statuses: Final = objects(
    ["status", "queuePosition", "audioUrl", "audioUrls", "contentType", "duration", "cost", "currency", "error", "code"]
)
rows: Final = st.fixed_dictionaries(
    {"id": st.just(f'"{MODEL}"')},
    optional={
        "pricing": st.fixed_dictionaries(
            {}, optional={"per_thousand_chars": values, "per_generation": values, "currency": st.just('"USD"')}
        ).map(json_object),
        "supported_parameters": st.fixed_dictionaries({}, optional={"max_chars": values}).map(json_object),
    },
).map(json_object)
catalogues: Final = st.lists(rows, max_size=2).map(lambda rows: f'{{"data": [{", ".join(rows)}]}}')
json_bodies: Final = st.one_of(tickets, statuses, errors, catalogues, values, objects(sorted(PROPER_VALUES)))


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A JSON body, mostly whole and in UTF-8."""
    text = draw(json_bodies)
    match draw(st.sampled_from([*["whole"] * 6, "cut", "BOM", "Latin-1", "UTF-16", "bytes", "sound", "empty"])):
        case "cut":
            return text.encode()[: draw(st.integers(0, min(len(text), 300)))]
        case "BOM":
            return b"\xef\xbb\xbf" + text.encode()
        case "Latin-1":
            return text.encode("latin-1", "replace").replace(b"p", b"\xe9")
        case "UTF-16":
            return text.encode("utf-16")
        case "bytes":
            return draw(st.binary(max_size=60))
        case "sound":
            return tone()
        case "empty":
            return b""
    return text.encode()


# What is answered: HTTP

STATUS_LINES: Final = [
    *[b"HTTP/1.1 200 OK"] * 8,
    *(b"HTTP/1.1 %d Some words" % status for status in (202, 204, 206, 299, 300, 301, 302, 303, 304, 307, 308)),
    *(b"HTTP/1.1 %d Some words" % status for status in (400, 401, 402, 403, 404, 408, 413, 429, 451, 499)),
    *(b"HTTP/1.1 %d Some words" % status for status in (500, 501, 502, 503, 504, 520, 599, 600, 999, 101, 199, 0)),
    b"HTTP/1.0 200",
    b"HTTP/1.1 200",
    b"HTTP/1.1 200 \x1b[31m\xe9",
    b"HTTP/1.1 500 \x1b[31m\xe9 " + b"x" * 10_000,
    b"HTTP/1.1 404 \x1b]0;title\x07",
    b"HTTP/1.1 429 ",
    b"HTTP/1.1 2000 OK",
    b"HTTP/1.1 -1 OK",
    b"HTTP/1.1 2\xb2\xb2 OK",
    b"HTTP/2 200",
    b"HTTP/1.1  200 OK",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK",
    b"HTTP/1.1 103 Early\r\nlink: x\r\n\r\n" * 50 + b"HTTP/1.1 200 OK",
    b"\r\nHTTP/1.1 200 OK",
    b"ICY 200 OK",
    b"SSH-2.0-OpenSSH_9.6",
    b"\x16\x03\x01\x02\x00",
    b"",
]
DATE: Final = b"Mon, 01 Jan 2024 00:00:00 "
LOCATIONS: Final = [
    *(b"/elsewhere", b"http://HERE/elsewhere", b"//HERE", b"", b" ", b"?", b"mailto:x", b"data:audio/mpeg,x", b"x:"),
    *(b"http://127.0.0.1:%s/" % port for port in (b"0", b"1", b"65536", b"99999999", b"-1", b"x", b"9" * 5_000)),
    *(
        b"http://HERE:1/",
        b"http://",
        b"http:///x",
        b"http://[::1",
        b"http://[x]/",
        b"http://a..b/",
        b"http://./",
    ),
    *(b"http://%s/" % host for host in (b"a" * 64, b"xn--", b"xn--a", b"\xc3\xa4" * 70, b"\xe2\x92\x88com", b"%00")),
    *(
        b"http://%ff@HERE/",
        b"http://a:b@HERE/",
        b"http://:@HERE/",
        b"\xff",
        b"http://\xff/",
        b"http://HERE/" * 9_000,
    ),
    *(
        b"ftp://HERE/",
        b"file:///etc/passwd",
        b"javascript:x",
        b"HTTP://HERE/",
        b"\\\\HERE\\x",
        b"http://\xed\xa0\x80/",
    ),
]
"""Addresses, in which HERE is where the server is."""
HEADERS: Final = {
    b"retry-after": [
        *(
            b"0",
            b"1",
            b"-1",
            b"30000",
            b"1e308",
            b"1e-400",
            b"nan",
            b"inf",
            b"-inf",
            b"9" * 400,
            b"1_0",
            b"0x10",
            b"1,5",
        ),
        *(b"\xd9\xa1", b"Mon", b"\xff", DATE + b"GMT", DATE + b"+9999", DATE + b"-9999", DATE + b"+99999999999999"),
        *(b"Mon, 01 Jan 99999 00:00:00 GMT", b"Mon, 01 Jan 0001 00:00:00 +2359", b"Fri, 31 Dec 9999 23:59:59 -2359"),
        *(b"Mon, 99 Jan 2024 99:99:99 GMT", b"1 2 3 4 5 6 7", b"Mon, 01 Jan " + b"9" * 5_000 + b" 00:00:00 GMT"),
    ],
    b"content-type": [
        *(b"application/json", b"audio/mpeg", b"text/html; charset=utf-8", b"application/octet-stream", b"AUDIO/WAV"),
        *(b"application/json; charset=" + name for name in (b"utf-16", b"latin-1", b"nonsense", b"idna", b"undefined")),
        *(b"text/plain; charset=" + name for name in (b"hex", b"base64", b"rot13", b"unicode_escape", b"punycode")),
        *(b"audio/\x1b[31m\xe9", b"audio/" + b"x" * 10_000, b";;;", b"\xff", b"multipart/form-data; boundary="),
        b'text/plain; charset="utf-8',
    ],
    b"content-encoding": [
        *(b"gzip", b"deflate", b"br", b"zstd", b"identity", b"gzip, gzip", b"gzip, deflate, br", b",,,", b"\xff"),
        b", ".join([b"gzip"] * 200),
    ],
    b"content-length": [
        *(
            b"0",
            b"1",
            b"5",
            b"100000",
            b"-1",
            b"1e3",
            b"5, 5",
            b"5, 6",
            b"9" * 19,
            b"9" * 30,
            b"9" * 5_000,
            b"0x5",
            b"",
        ),
        *(b" 5", b"+5", b"\xd9\xa5"),
    ],
    b"transfer-encoding": [b"chunked", b"gzip, chunked", b"chunked, chunked", b"identity", b"\xff", b""],
    b"location": [location.replace(b"HERE", PLACE) for location in LOCATIONS],
    b"set-cookie": [
        *(
            b"a=b",
            b"a=\xe9",
            b"\xff=\x1b",
            b"a=" + b"x" * 10_000,
            b"=",
            b";",
            b"a=b; expires=Mon, 99 Jan 99999 00:00:00",
        ),
        *(b"a=b; max-age=" + b"9" * 5_000, b"a=b; domain=..; path=\xe9", b"a=b; port=x", b"a=b; version=\xe9"),
    ],
    b"x-request-id": [b"r-1", b"\x1b[31mred\x07", b"\xff", b"x" * 10_000, b"", b"one\ttwo", b"\xc2\x85\xe2\x80\xa8"],
    b"connection": [b"close", b"keep-alive", b"upgrade", b"\xff"],
    b"upgrade": [b"h2c", b"websocket"],
    b"trailer": [b"content-length"],
    b"www-authenticate": [b"Digest", b"Basic realm=\xff", b"Digest nonce=x, qop=auth"],
}
BROKEN_HEADERS: Final = [
    *(b"no colon", b": no name", b"a b: c", b" folded: x", b"a: b\r\n continued", b"a\x00: b", b"a: b\x00", b"\xff: b"),
    *(b"a: b\rc: d", b"a: b\nc: d", b"x: " + b"y" * 200_000, b"a:" * 5_000),
]
ENCODERS: Final[dict[bytes, Callable[[bytes], bytes]]] = {
    b"gzip": gzip.compress,
    b"deflate": zlib.compress,
    b"gzip, gzip": lambda body: gzip.compress(gzip.compress(body)),
}


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    if draw(st.integers(0, 19)) == 0:
        return draw(st.sampled_from(BROKEN_HEADERS))
    name = draw(st.sampled_from(sorted(HEADERS)))
    value = draw(st.one_of(st.sampled_from(HEADERS[name]), st.binary(max_size=20)))
    return name + b": " + value


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """An answer whose parts may each be odd, and mostly are not all."""
    status_line = draw(st.sampled_from(STATUS_LINES))
    head = draw(st.lists(headers(), max_size=3))
    body = draw(bodies())
    if draw(st.integers(0, 4)) == 0:
        encoding = draw(st.sampled_from(sorted(ENCODERS)))
        head.append(b"content-encoding: " + encoding)
        body = ENCODERS[encoding](body)
    match draw(st.sampled_from([*["length"] * 5, "chunks", "broken chunks", "until the end", "cut"])):
        case "length":
            head.append(b"content-length: %d" % len(body))
        case "chunks":
            head.append(b"transfer-encoding: chunked")
            body = b"%x;a=b\r\n%b\r\n0\r\na: b\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        case "broken chunks":
            head.append(b"transfer-encoding: chunked")
            body = (
                draw(st.sampled_from([b"%b", b"-1\r\n%b", b"ffffffffffffffff\r\n%b", b"3\r\n%b", b"zz\r\n%b"])) % body
            )
        case "cut":
            head.append(b"content-length: %d" % (len(body) + 7))
    return b"\r\n".join([status_line, *head, b"", body])


def answer(
    body: str | bytes = b"{}", status: str | bytes = b"200 OK", headers: dict[bytes, bytes] | None = None
) -> bytes:
    """Write an answer that is in order but for what it is given."""
    body = body.encode() if isinstance(body, str) else body
    head = {b"content-type": b"application/json", b"content-length": b"%d" % len(body), b"connection": b"close"}
    head |= headers or {}
    return b"\r\n".join([b"HTTP/1.1 " + status, *(b": ".join(field) for field in head.items()), b"", body])


# What may come of it


def is_clean(text: str, without: Collection[str] = CONTROL) -> bool:
    return not any(unicodedata.category(character) in without for character in text)


def faults_of(what: str, value: Any, name: str = "") -> Iterator[str]:
    """Tell what is wrong with a result: text that cannot be shown everywhere, and numbers that nothing can bear."""
    if isinstance(value, BaseModel):
        for field, inner in value:
            yield from faults_of(f"{what}.{field}", inner, field)
    elif isinstance(value, str):
        if len(value) > LONGEST_TEXT.get(name, LONGEST_WORD):
            yield f"{what} has {len(value)} characters"
        # An address is shown when it has been requested, and none with other such characters can be.
        if not is_clean(value, {"Cs"} if name == "audio_url" else CONTROL):
            yield f"{what} cannot be shown: {value[:80]!a}"
    elif isinstance(value, Decimal):
        if not value.is_finite() or value < 0 or abs(value.adjusted()) + len(value.as_tuple().digits) > MOST_DIGITS:
            yield f"{what} is {str(value)[:40]}"
    elif isinstance(value, int | float) and not 0 <= value <= LARGEST_NUMBER:
        yield f"{what} is {str(value)[:40] if isinstance(value, float) else f'of {value.bit_length()} bits'}"


def faults_of_error(what: str, error: Exception) -> Iterator[str]:
    """Tell what is wrong with an error: its class, or what it says and how."""
    if not isinstance(error, NanoGPTError):
        yield f"{what}: {type(error).__name__}: {str(error)[:80]!a}"
        return
    if not re.fullmatch(r"[A-Z0-9_]{1,64}", error.code):
        yield f"{what}: the code is {error.code!a}"
    if len(str(error)) > LONGEST_TEXT["message"] + OWN_WORDS:
        yield f"{what}: the message has {len(str(error))} characters"
    if not is_clean(str(error)):
        yield f"{what}: the message cannot be shown: {str(error)[:120]!a}"
    yield from faults_of(f"{what}: the request id", error.request_id)
    yield from faults_of(f"{what}: retry_after_seconds", error.retry_after_seconds)
    copy = pickle.loads(pickle.dumps(error))
    if (type(copy), vars(copy)) != (type(error), vars(error)):
        yield f"{what}: another error comes out of a pickle"


def faults_of_submission(error: Exception, answer: bytes) -> Iterator[str]:
    """Tell where an error says that nothing was charged, and the answer does not."""
    final = re.match(rb"(?:HTTP/1\.1 1\d\d[^\n]*\n(?:[^\n]+:[^\n]*\n)*\r\n)*HTTP/1\.[01] (\d\d\d)\b", answer)
    status = int(final[1]) if final else 0
    if isinstance(error, NothingSent):
        yield "submit: NothingSent, after the request was received"
    if isinstance(error, NanoGPTError) and error.retryable and status != 429:
        yield f"submit: {type(error).__name__} to be tried again, after the answer {status}"
    if status not in {301, 307, 308, *range(400, 408), *range(409, 500)} and not isinstance(error, SubmissionUncertain):
        yield f"submit: {type(error).__name__} that lets the text be submitted again, after the answer {status}"


async def faults_in(calls: dict[str, Callable[[], Awaitable[Any]]], answer: bytes) -> list[str]:
    """Make calls one after the other, and tell what is wrong with what comes of them."""
    faults = []
    for what, call in calls.items():
        try:
            async with asyncio.timeout(60):
                result = await call()
        except Exception as error:
            faults += faults_of_error(what, error)
            if what == "submit":
                faults += faults_of_submission(error, answer)
        else:
            faults += faults_of(what, result)
    return faults


async def faults_of_calls(answer: bytes, server: RawServer, save_to: Path) -> list[str]:
    """Let every call of a client be answered with the same bytes, in an order in which one may spoil the next."""
    server.answer = answer
    async with NanoGPTClient(API_KEY, f"http://{server.place}/api") as client:
        ticket = Ticket(run_id="98b0-d593", model=MODEL, cost="0.005", payment_source="USD")
        audio = Completed(audio_url=f"http://{server.place}/audio.mp3")

        return await faults_in(
            {
                "submit": lambda: client.submit(REQUEST),
                "status": lambda: client.status(ticket),
                "find_model": lambda: client.find_model(MODEL),
                "get_balance": client.get_balance,
                "download": lambda: download_to(Destination(save_to), client, audio, "audio"),
            },
            answer,
        )


def explore(check: Callable[[T], None], cases: st.SearchStrategy[T], count: int = 0) -> None:
    """Check so many cases, the same ones each time, and then others for as long as `FUZZ_SECONDS` says."""
    rules = settings(
        max_examples=count or 10,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    if count:
        rules(given(cases)(check))()
    end = time.monotonic() + FUZZ_SECONDS
    while time.monotonic() < end:
        settings(rules, derandomize=False)(given(cases)(check))()


@pytest.fixture(autouse=True)
def certificates_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them takes longer than everything else that a client does here."""
    monkeypatch.setattr(httpx, "create_ssl_context", cache(httpx.create_ssl_context))


@pytest.fixture(scope="module")
def server() -> Iterator[RawServer]:
    with raw_server() as server:
        yield server


plain_answers: Final = st.builds(
    answer, json_bodies, st.sampled_from([*[b"200 OK"] * 4, b"202 Accepted", b"400 No", b"429 Later", b"500 Oh"])
)


def odd_answers() -> Iterator[bytes]:
    """Write an answer for every oddity that is listed above, which is otherwise in order."""
    for line in STATUS_LINES:
        yield line + b"\r\ncontent-length: 2\r\n\r\n{}"
    statuses = {b"retry-after": b"429 Later", b"location": b"302 Found", b"x-request-id": b"500 Oh"}
    for name, odd in HEADERS.items():
        for value in odd:
            for body in ("[]", "Hello.") if name == b"content-type" else ("[]",):
                yield answer(body, statuses.get(name, b"200 OK"), {name: value})
    for header in BROKEN_HEADERS:
        yield answer("{}", b"200 OK\r\n" + header)
    for value in HOSTILE_VALUES.values():
        everywhere = dict.fromkeys(PROPER_VALUES, value)
        details = json_object(dict.fromkeys(("message", "type", "code"), value))
        prices = json_object(dict.fromkeys(("per_thousand_chars", "per_generation"), value))
        limits = json_object({"max_chars": value})
        row = json_object({"id": f'"{MODEL}"', "pricing": prices, "supported_parameters": limits})
        yield answer(value)
        yield answer(json_object(everywhere), b"500 Oh")
        yield answer(json_object({"error": details}), b"400 No")
        yield answer(json_object({"data": f"[{row}]"}))
        yield answer(json_object({"runId": '"98b0-d593"', "cost": value}))
        for word in ('"pending"', '"completed"', '"error"'):
            yield answer(json_object(everywhere | {"status": word}))


@pytest.mark.parametrize("cases", [plain_answers, answers()], ids=["JSON", "bytes"])
def test_whatever_is_answered_makes_a_clean_result_or_a_typed_error(
    cases: st.SearchStrategy[bytes], server: RawServer, tmp_path: Path
) -> None:
    def check(answer: bytes) -> None:
        assert asyncio.run(faults_of_calls(answer, server, tmp_path)) == []

    explore(check, cases, 40)


def test_every_oddity_makes_a_clean_result_or_a_typed_error(server: RawServer, tmp_path: Path) -> None:
    async def check() -> dict[bytes, list[str]]:
        return {odd[:200]: faults for odd in odd_answers() if (faults := await faults_of_calls(odd, server, tmp_path))}

    assert asyncio.run(check()) == {}


IN_ORDER: Final = json_object({name: proper[0] for name, proper in PROPER_VALUES.items()} | {"status": '"pending"'})
TICKETS: Final = {
    f"{name} everywhere else": json_object(dict.fromkeys(PROPER_VALUES, value) | {"runId": '"98b0-d593"'}).encode()
    for name, value in HOSTILE_VALUES.items()
    if name != "a deep list"
} | {
    "a BOM before it": b"\xef\xbb\xbf" + IN_ORDER.encode(),
    "UTF-16": IN_ORDER.encode("utf-16"),
    "a word in Latin-1": IN_ORDER.replace("own words", "\xe9").encode("latin-1"),
    "blanks around it": b"\n\n" + IN_ORDER.encode() + b"\r\n",
    "its own id twice": IN_ORDER.replace("{", '{"runId": "98b0-d593", ', 1).encode(),
}


@pytest.mark.parametrize("content_type", ["application/json", "application/octet-stream", "text/html"])
def test_a_run_id_is_paid_for_and_kept_whatever_stands_beside_it(content_type: str, server: RawServer) -> None:
    async def submissions() -> dict[str, Any]:
        ends = {}
        async with NanoGPTClient(API_KEY, f"http://{server.place}/api") as client:
            for name, body in TICKETS.items():
                server.answer = answer(body, headers={b"content-type": content_type.encode()})
                try:
                    ends[name] = getattr(await client.submit(REQUEST), "run_id", None)
                except Exception as error:
                    ends[name] = error
        return ends

    assert {name: end for name, end in asyncio.run(submissions()).items() if end != "98b0-d593"} == {}


ADDRESSES: Final = [
    *(location.decode("utf-8", "surrogateescape") for location in LOCATIONS),
    *("https://127.0.0.1/", "https://[::1]/", "https://[::ffff:127.0.0.1]/", "https://[fe80::1%25lo]/", "https://0/"),
    *("https://2130706433/", "https://0x7f.1/", "https://127.1:99999/", "https://localhost:-1/", "https://\ud800/"),
    *("http://HERE/\x1b[31m", "http://HERE/\ud800", "http://HERE/a b\n", "http://HERE/" + "x" * 70_000, "x", "\x00"),
    *("http://\u2028/", "http://HERE/\u202e", "http://user:pass\ud800@HERE/", "http://[::1]:x/", "http://HERE\\@x/"),
]


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_address_of_audio_makes_anything_but_audio_or_a_typed_error(
    scheme: str, server: RawServer, tmp_path: Path
) -> None:
    async def faults() -> dict[str, list[str]]:
        found = {}
        server.answer = answer(tone(), headers={b"content-type": b"audio/mpeg"})
        async with NanoGPTClient(API_KEY, f"{scheme}://{server.place}/api") as client:
            for address in ADDRESSES:
                audio = Completed(audio_url=address.replace("HERE", server.place))
                calls = {"download": lambda: download_to(Destination(tmp_path), client, audio, "audio")}  # noqa: B023
                found[ascii(address)[:80]] = await faults_in(calls, server.answer)
        return found

    assert {address: faults for address, faults in asyncio.run(faults()).items() if faults} == {}


# Runs


QUICK: Final = PollSchedule(min_seconds=0.25, max_seconds=0.25, jitter=0)
MAY_BE_SUBMITTED_AGAIN: Final = {301, 307, 308, *range(400, 408), *range(409, 500)}
"""The HTTP statuses that say that nothing was accepted."""


def credentials_for(sandbox: Sandbox) -> NanoGPTCredentials:
    return NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url=sandbox.base_url)


def scripted(body: str | bytes, status: int = 200, retry_after: str | None = None) -> Answer:
    """Have the sandbox answer so; the address of audio in it is one that does not answer."""
    body = body.encode() if isinstance(body, str) else body
    headers = {"content-type": "application/json"} | ({"retry-after": retry_after} if retry_after else {})
    return Answer(status, body=body.replace(PLACE, b"127.0.0.1:1"), headers=headers)


async def faults_of_run(what: str, state: State[Any]) -> list[str]:
    """Tell where a run has ended otherwise than as completed or with a code for a name."""
    faults = []
    if state.is_completed():
        faults += faults_of(what, await state.aresult())
    elif not (state.is_failed() and re.fullmatch(r"[A-Z0-9_]{1,64}", state.name or "")):
        faults.append(f"{what}: {state.type} {state.name}: {str(state.message)[:160]!a}")
    else:
        faults += faults_of_error(what, await state.aresult(raise_on_failure=False))
    return faults


async def faults_of_wait(look: Answer, folder: Path) -> list[str]:
    """Wait for a job, the first look at which is answered so, and the others as usual."""
    with Sandbox(job_seconds=0.0, speak=False) as sandbox:
        ticket = sandbox.add_job()
        sandbox.on_status(ticket["runId"], [look])
        state = await wait_for_tts(
            ticket, str(folder), credentials_for(sandbox), timeout_seconds=20, poll=QUICK, return_state=True
        )
        return await faults_of_run("wait_for_tts", state)


async def faults_of_speech(submitted: Answer, folder: Path) -> list[str]:
    """Have a text said twice, the submission of which is answered so, once."""
    with Sandbox(job_seconds=0.0, speak=False) as sandbox:
        sandbox.on_submit([submitted])
        say = {"save_to": str(folder), "credentials": credentials_for(sandbox), "timeout_seconds": 20, "poll": QUICK}
        faults = []
        for what in ("text_to_speech", "text_to_speech again"):
            state = await text_to_speech("Hello there.", **say, return_state=True)
            faults += await faults_of_run(what, state)
        posts = len(sandbox.requests("submit"))
    if posts > 1 and submitted.status not in MAY_BE_SUBMITTED_AGAIN:
        faults.append(f"text_to_speech: submitted {posts} times, after HTTP {submitted.status}")
    return faults


async def faults_of_batch(kind: str, odd: Answer, folder: Path) -> list[str]:
    """Have five lines said twice, one of which is answered so, once."""
    lines = [{"id": f"line-{number}", "text": f"Line {number}."} for number in range(5)]
    with Sandbox(job_seconds=0.0, speak=False) as sandbox:
        batch = {"save_to": str(folder), "credentials": credentials_for(sandbox), "poll": QUICK, "timeout_seconds": 20}
        if kind == "submission":
            sandbox.on_submit([odd])
        else:
            sandbox.on_status(None, [odd])
        faults, posts = [], []
        for what in (f"batch with an odd {kind}", f"batch with an odd {kind} again"):
            state = await text_to_speech_batch(lines, **batch, requests_per_second=25, return_state=True)
            faults += await faults_of_run(what, state)
            if state.name not in ("Completed", "TTS_BATCH_PARTIAL"):
                faults.append(f"{what}: the run ended as {state.name}")
            rows = [
                ManifestRow.model_validate_json(row) for row in (folder / "manifest.jsonl").read_text().splitlines()
            ]
            faults += faults_of_rows(what, rows)
            posts.append([request.json["text"] for request in sandbox.requests("submit")])
        looks = sandbox.requests("status")
    failed = kind == "status" and b'"error"' in (odd.body or b"")
    hostile = posts[0][0] if kind == "submission" else None
    twice = [text for text, count in Counter(posts[1]).items() if count > 1 and text != hostile]
    if len(twice) > failed:
        faults.append(f"batch with an odd {kind}: submitted twice {twice}")
    may_be_charged = odd.status not in MAY_BE_SUBMITTED_AGAIN
    if hostile is not None and may_be_charged and posts[1].count(hostile) > 1:
        faults.append(f"batch with an odd {kind}: the odd line submitted again")
    assert looks
    return faults


def faults_of_rows(what: str, rows: list[ManifestRow]) -> Iterator[str]:
    if len(rows) != 5:
        yield f"{what}: {len(rows)} rows in the manifest"
    saved = [row for row in rows if row.is_completed and row.location and Path(row.location).exists()]
    if len(saved) < 4:
        yield f"{what}: {len(saved)} lines saved: {[(row.id, row.outcome) for row in rows]}"
    for row in rows:
        if not is_clean(row.detail or "") or len(row.detail or "") > LONGEST_TEXT["message"] + OWN_WORDS:
            yield f"{what}: the detail of a row cannot be shown: {str(row.detail)[:120]!a}"
        yield from faults_of(f"{what}: the cost of a row", row.cost)
        yield from faults_of(f"{what}: the currency of a row", row.currency)


def odd(names: Iterable[str], http: int = 200, **fields: str) -> dict[str, Answer]:
    """Write answers that have a hostile value in every field but for these."""
    values = {name: HOSTILE_VALUES[name] for name in names}
    return {
        f"{name} beside {fields} in HTTP {http}": scripted(
            json_object(dict.fromkeys(PROPER_VALUES, value) | fields), http
        )
        for name, value in values.items()
    }


LOOKS: Final = {
    **odd(("a negative number", "a large whole number"), status='"pending"'),
    **odd(("an escape sequence",), status='"error"'),
    **odd(("a number beyond all",), http=400),
    "an address of no host": scripted('{"status": "completed", "audioUrl": "http://xn--/"}'),
    "a zone beyond all": scripted("{}", 429, f"{DATE.decode()}+99999999999999"),
}
SUBMISSIONS: Final = {
    "a cost beyond reason": scripted('{"runId": "98b0-d593", "cost": 1e1000000}'),
    "a cost beyond all": scripted('{"runId": "98b0-d593", "cost": 1e99999999999999999999}'),
    "an address of no host": scripted('{"audioUrl": "http://xn--/", "cost": 1e1000000}'),
}
IN_BATCHES: Final = {
    "a cost beyond reason": ("submission", scripted('{"audioUrl": "http://127.0.0.1:1/", "cost": 1e1000000}')),
    "a zone beyond all": ("status", LOOKS["a zone beyond all"]),
}

any_look: Final = st.builds(scripted, statuses | errors, st.sampled_from([200, 200, 200, 400, 429, 500]))
any_submission: Final = st.builds(
    scripted, tickets | statuses | errors, st.sampled_from([200, 200, 202, 400, 429, 500])
)
any_reply_in_a_batch: Final = st.one_of(
    st.tuples(st.just("submission"), st.builds(scripted, tickets | statuses)),
    st.tuples(st.just("status"), st.builds(scripted, statuses)),
)


def test_a_wait_ends_completed_or_by_a_code_whatever_its_first_look_sees(tmp_path: Path) -> None:
    def faults(look: Answer) -> list[str]:
        return asyncio.run(faults_of_wait(look, Path(mkdtemp(dir=tmp_path))))

    def check(look: Answer) -> None:
        assert faults(look) == []

    assert {name: found for name, look in LOOKS.items() if (found := faults(look))} == {}
    explore(check, any_look)


def test_a_text_is_paid_for_once_whatever_its_submission_is_answered(tmp_path: Path) -> None:
    def faults(submitted: Answer) -> list[str]:
        return asyncio.run(faults_of_speech(submitted, Path(mkdtemp(dir=tmp_path))))

    def check(submitted: Answer) -> None:
        assert faults(submitted) == []

    assert {name: found for name, said in SUBMISSIONS.items() if (found := faults(said))} == {}
    explore(check, any_submission)


def test_a_line_of_a_batch_costs_the_others_nothing_whatever_it_is_answered(tmp_path: Path) -> None:
    def faults(reply: tuple[str, Answer]) -> list[str]:
        return asyncio.run(faults_of_batch(*reply, Path(mkdtemp(dir=tmp_path))))

    def check(reply: tuple[str, Answer]) -> None:
        assert faults(reply) == []

    assert {name: found for name, reply in IN_BATCHES.items() if (found := faults(reply))} == {}
    explore(check, any_reply_in_a_batch)
