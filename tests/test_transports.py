"""What requests go over: GET over aiohttp where the extra `fast` is installed, everything else over httpx."""

import asyncio
import gc
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import certifi
import httpx
import pytest

from prefect_nanogpt.aiohttp_transport import AiohttpTransport
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.connections import ssl_context
from prefect_nanogpt.errors import AudioError, ProviderError, SubmissionUncertain
from prefect_nanogpt.models import Pending, Ticket, TTSRequest
from tests.conftest import API_KEY, TRANSPORTS, eventually

TICKET = Ticket(run_id="98 b0/ä", model="microsoft/mai voice+")
PENDING = b'{"status": "pending"}'
SIGNED = "/a%2Fb/%7Ec?X-Amz-Signature=a%2Bb+c%20d&e=%C3%A4"
TARGETS = [
    SIGNED,
    "/a?",
    "/",
    "?a",
    "/ä b/../c?ü=1",
    "/a//b?x=1#fragment",
    "/%E2%82%AC;v=1?a=/&a=%2f",
    "/a?b?c[]=|{}^`",
]

without_aiohttp = pytest.mark.parametrize("transport", ["httpx"], indirect=True)
with_aiohttp = pytest.mark.parametrize("transport", ["aiohttp"], indirect=True)


class Server:
    """A server that keeps its connections open.

    Attributes:
        place: Its host and port.
        requests: The requests as they came, head and body.
        connections: How many were made.
        answers: What the requests are answered with, in turn, the last one for ever; None closes the connection.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self.requests: list[bytes] = []
        self.connections = 0
        self.answers: list[bytes | None] = [ok(PENDING)]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]
                self.requests.append(head + await reader.readexactly(int(length or 0)))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if answer is None:
                    break
                writer.write(answer)
                await writer.drain()
        writer.close()


def ok(body: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 200 OK", b"content-length: %d" % len(body), *headers, b"", body])


@asynccontextmanager
async def serving(host: str = "127.0.0.1") -> AsyncIterator[Server]:
    server = Server("")
    async with await asyncio.start_server(server.serve, host, 0, limit=2**20) as listening:
        port = listening.sockets[0].getsockname()[1]
        server.place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        yield server


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as server:
        yield server


def client_of(server: Server) -> NanoGPTClient:
    return NanoGPTClient(API_KEY, f"http://{server.place}/api")


async def fetched(client: NanoGPTClient, url: str) -> bytes:
    async with client.download(url) as response:
        return await response.aread()


@pytest.fixture
def over_aiohttp(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The methods of all that went over aiohttp."""
    methods: list[str] = []
    connect = aiohttp.TCPConnector.connect

    def watched(self: aiohttp.TCPConnector, request: aiohttp.ClientRequest, *args: object, **kwargs: object) -> object:
        methods.append(request.method)
        return connect(self, request, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(aiohttp.TCPConnector, "connect", watched)
    return methods


# What goes over which


@with_aiohttp
async def test_status_calls_the_catalogue_and_downloads_go_over_aiohttp_and_nothing_else_does(
    server: Server, over_aiohttp: list[str], transport: str
) -> None:
    server.answers = [ok(PENDING), ok(PENDING), ok(b"ID3"), ok(PENDING), ok(b'{"runId": "98b0"}')]
    async with client_of(server) as client:
        await client.status(TICKET)
        with suppress(ProviderError):
            await client.list_models()
        await fetched(client, f"http://{server.place}/1.mp3")
        with suppress(ProviderError):
            await client.get_balance()
        await client.submit(TTSRequest(text="Hello."))

    assert over_aiohttp == ["GET", "GET", "GET"]
    assert [request.split()[0] for request in server.requests] == [b"GET", b"GET", b"GET", b"POST", b"POST"]


async def test_the_transport_over_aiohttp_sends_no_post(server: Server) -> None:
    carrier = AiohttpTransport(ssl_context(), lambda host, port: asyncio.sleep(0, []))
    async with httpx.AsyncClient(transport=carrier) as client:
        with pytest.raises(httpx.UnsupportedProtocol):
            await client.post(f"http://{server.place}/api/tts")

    assert server.connections == 0


@pytest.mark.usefixtures("transport")
async def test_a_submission_that_was_read_and_not_answered_is_uncertain_and_sent_once(server: Server) -> None:
    server.answers = [ok(PENDING), None]
    async with client_of(server) as client:
        await client.status(TICKET)
        with pytest.raises(SubmissionUncertain):
            await client.submit(TTSRequest(text="Hello."))

    assert [request.split()[0] for request in server.requests] == [b"GET", b"POST"]


@pytest.mark.usefixtures("transport")
async def test_a_status_call_is_one_request_also_where_a_connection_that_was_kept_breaks(server: Server) -> None:
    server.answers = [ok(PENDING), None]
    async with client_of(server) as client:
        await client.status(TICKET)
        with pytest.raises(ProviderError) as caught:
            await client.status(TICKET)

    assert caught.value.retryable
    assert (len(server.requests), server.connections) == (2, 1)


@without_aiohttp
async def test_without_the_extra_nothing_goes_over_aiohttp(
    server: Server, over_aiohttp: list[str], transport: str
) -> None:
    async with client_of(server) as client:
        await client.status(TICKET)
        await fetched(client, f"http://{server.place}/1.mp3")

    assert over_aiohttp == []
    assert len(server.requests) == 2


@with_aiohttp
@pytest.mark.parametrize("name", ["HTTP_PROXY", "ALL_PROXY"])
async def test_where_a_proxy_is_to_be_used_it_is(
    name: str, server: Server, over_aiohttp: list[str], monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    for other in ("NO_PROXY", "no_proxy", "http_proxy"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, f"http://{server.place}")

    async with NanoGPTClient(API_KEY, "http://api.test/api") as client:
        await client.status(TICKET)
        await fetched(client, "http://audio.test/1.mp3")

    assert [request.split()[1].partition(b"?")[0] for request in server.requests] == [
        b"http://api.test/api/tts/status",
        b"http://audio.test/1.mp3",
    ]
    assert over_aiohttp == []


def test_aiohttp_is_not_imported_before_there_is_a_client() -> None:
    code = "import prefect_nanogpt.flows, prefect_nanogpt.client, sys; sys.exit('aiohttp' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# What is sent


async def test_requests_are_the_same_bytes_over_both(server: Server) -> None:
    sent: dict[str, list[bytes]] = {}
    for transport in TRANSPORTS:
        with pytest.MonkeyPatch.context() as patch:
            if transport == "httpx":
                patch.setitem(sys.modules, "prefect_nanogpt.aiohttp_transport", None)
            for login in ("", "speaker:p%40ss@"):
                async with NanoGPTClient(API_KEY, f"http://{login}{server.place}/api/a%2Fb") as client:
                    await client.status(TICKET)
                    for target in TARGETS:
                        await fetched(client, f"http://{login}{server.place}{target}")
        sent[transport], server.requests = server.requests, []

    assert len(sent["httpx"]) == 2 * (1 + len(TARGETS))
    assert sent["aiohttp"] == sent["httpx"]
    assert b"GET " + SIGNED.encode() + b" HTTP/1.1\r\n" in sent["aiohttp"][1]


@pytest.mark.usefixtures("transport")
async def test_an_audio_host_gets_no_cookie_back_and_nothing_from_netrc(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login speaker password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    server.answers = [ok(b"ID3", b"set-cookie: id=1; path=/")]
    async with client_of(server) as client:
        for _ in range(2):
            await fetched(client, f"http://{server.place}/1.mp3")

    assert server.requests[0] == server.requests[1]
    assert b"authorization" not in server.requests[0].lower()
    assert API_KEY.encode() not in server.requests[0]


# What comes


@pytest.mark.usefixtures("transport")
async def test_an_answer_may_have_long_headers(server: Server) -> None:
    server.answers = [ok(PENDING, b"content-security-policy: " + b"a" * 20_000)]
    async with client_of(server) as client:
        assert await client.status(TICKET) == Pending(word="pending")


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"this is no HTTP\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nID3",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nID3",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nID3\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nID3\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * 200_000,
    ],
    ids=lambda answer: repr(answer)[-25:],
)
async def test_what_breaks_off_or_is_no_http_is_a_typed_error_without_the_query_of_the_url(
    answer: bytes | None, server: Server
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer or b"")
        with suppress(OSError):
            await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        server.place = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        async with client_of(server) as client:
            with pytest.raises(ProviderError) as of_the_status:
                await client.status(TICKET)
            with pytest.raises(AudioError) as of_the_audio:
                await fetched(client, f"http://{server.place}/1.mp3?signature=secret")

    assert of_the_status.value.retryable
    assert of_the_audio.value.retryable
    assert "secret" not in str(of_the_audio.value)
    assert API_KEY not in str(of_the_status.value)


@with_aiohttp
async def test_a_host_that_only_httpx_can_read_is_asked_over_httpx_from_then_on(
    server: Server, over_aiohttp: list[str], transport: str
) -> None:
    server.answers = [ok(PENDING, b"content-length: %d" % len(PENDING))]
    url = f"http://{server.place}/1.mp3"
    async with client_of(server) as client:
        with pytest.raises(ProviderError) as of_the_status:
            await client.status(TICKET)
        with pytest.raises(AudioError) as of_the_audio:
            await fetched(client, url)
        assert await client.status(TICKET) == Pending(word="pending")
        assert await fetched(client, url) == PENDING

    assert of_the_status.value.retryable
    assert of_the_audio.value.retryable
    assert over_aiohttp == ["GET", "GET"]


@pytest.mark.usefixtures("transport")
async def test_a_change_of_protocol_is_no_answer_and_may_pass(server: Server) -> None:
    server.answers = [b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n", ok(PENDING)]
    async with client_of(server) as client:
        with pytest.raises(ProviderError) as caught:
            await client.status(TICKET)
        assert await client.status(TICKET) == Pending(word="pending")

    assert caught.value.retryable


@pytest.mark.usefixtures("transport")
async def test_a_host_that_does_not_take_the_connection_is_a_typed_error() -> None:
    async with serving() as server:
        pass  # and then nothing listens there
    async with client_of(server) as client:
        with pytest.raises(ProviderError, match="ConnectError"):
            await client.status(TICKET)
        with pytest.raises(AudioError, match="ConnectError"):
            await fetched(client, f"http://{server.place}/1.mp3")


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("listening_at", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("spelling", ["plain", "odd"])
async def test_a_host_may_be_an_address_however_it_is_spelt(listening_at: str, spelling: str) -> None:
    odd = {"127.0.0.1": "127.1", "[::1]": "[0:0::1]"}
    async with serving(listening_at) as server:
        server.answers = [ok(PENDING)]
        if spelling == "odd":
            for plain, other in odd.items():
                server.place = server.place.replace(plain, other)
        async with client_of(server) as client:
            assert await client.status(TICKET) == Pending(word="pending")
            assert await fetched(client, f"http://{server.place}/1.mp3") == PENDING


# Connections


@pytest.mark.usefixtures("transport")
async def test_a_connection_is_kept(server: Server) -> None:
    async with client_of(server) as client:
        for _ in range(3):
            await client.status(TICKET)

    assert (len(server.requests), server.connections) == (3, 1)


@pytest.mark.usefixtures("transport")
async def test_what_was_given_up_half_read_is_not_read_by_the_next(server: Server) -> None:
    server.answers = [b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + PENDING, ok(b'{"status": "queued"}')]
    url = f"http://{server.place}/1.mp3"
    async with client_of(server) as client:
        async with client.download(url) as response:
            reading = asyncio.create_task(response.aread())
            await asyncio.sleep(0.1)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        assert await fetched(client, url) == b'{"status": "queued"}'

    assert server.connections == 2


@pytest.mark.usefixtures("transport")
async def test_what_comes_unasked_on_a_kept_connection_is_not_the_answer_to_the_next_request() -> None:
    came = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(ok(PENDING))
                await asyncio.sleep(0.05)
                writer.write(ok(b'{"status": "failed", "error": "The job of somebody else"}'))
                came.set()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        async with NanoGPTClient(API_KEY, f"http://127.0.0.1:{port}/api") as client:
            assert await client.status(TICKET) == Pending(word="pending")
            await came.wait()
            await asyncio.sleep(0.05)
            assert await client.status(TICKET) == Pending(word="pending")


@pytest.mark.usefixtures("transport")
@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nID3"], ids=["head", "body"])
async def test_a_client_that_is_closed_ends_what_is_under_way(answer: bytes, server: Server) -> None:
    server.answers = [answer]
    client = client_of(server)
    reading = asyncio.create_task(fetched(client, f"http://{server.place}/1.mp3"))
    await eventually(lambda: asyncio.sleep(0.05, server.requests or None))
    await client.aclose()

    with pytest.raises(AudioError):
        await asyncio.wait_for(reading, 5)


@pytest.mark.usefixtures("transport")
@pytest.mark.filterwarnings("error")
async def test_nothing_is_left_open(server: Server) -> None:
    with warnings.catch_warnings(action="ignore"):
        gc.collect()  # what tests before this one have left
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    try:
        client_of(server)  # made and never used
        async with client_of(server):
            pass
        async with client_of(server) as client:
            await client.status(TICKET)
            await fetched(client, f"http://{server.place}/1.mp3")
        with warnings.catch_warnings(record=True) as caught:
            del client
            gc.collect()
    finally:
        asyncio.get_running_loop().set_exception_handler(None)

    assert complaints == []
    assert [str(one.message) for one in caught if "aiohttp" in str(one.message) or "lient" in str(one.message)] == []


@with_aiohttp
def test_a_client_may_be_used_in_one_loop_after_another(transport: str) -> None:
    async def ask(*then: Callable[[], Awaitable[None]]) -> None:
        assert await client.status(TICKET) == Pending(word="pending")
        for step in then:
            await step()

    loop = asyncio.new_event_loop()
    serving_thread = threading.Thread(target=loop.run_forever, daemon=True)
    serving_thread.start()
    try:
        opened = serving()
        server = asyncio.run_coroutine_threadsafe(opened.__aenter__(), loop).result()
        server.answers = [ok(PENDING, b"connection: close")]
        client = client_of(server)
        asyncio.run(ask())
        asyncio.run(ask(client.aclose))
        asyncio.run_coroutine_threadsafe(opened.__aexit__(None, None, None), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        serving_thread.join()
        loop.close()

    assert (len(server.requests), server.connections) == (2, 2)


# TLS


@pytest.mark.usefixtures("transport")
def test_the_certificates_are_loaded_once_a_process_and_anew_where_others_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[object] = []
    load = ssl.SSLContext.load_verify_locations

    def watched(self: ssl.SSLContext, *args: object, **kwargs: object) -> None:
        loaded.append(args or kwargs)
        load(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", watched)
    for name in ("one.pem", "other.pem"):
        (tmp_path / name).write_bytes(Path(certifi.where()).read_bytes())
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / name))
        for _ in range(3):
            NanoGPTClient(API_KEY)

    assert len(loaded) == 2
