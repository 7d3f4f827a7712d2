"""Where the audio host may be: what is checked is what is connected to, over real sockets."""

import asyncio
import ipaddress
import os
import socket
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.connections import AudioHosts, is_public, split_login
from prefect_nanogpt.errors import AudioError, CredentialsError, NothingSent, ProviderError, SubmissionUncertain
from prefect_nanogpt.models import Ticket, TTSRequest
from tests.conftest import API_KEY
from tests.https_server import NAME, HttpsServer, https_server, ok, proxy

pytestmark = pytest.mark.usefixtures("transport")
BODY = b"ID3" + bytes(range(200)) * 100


@pytest.mark.parametrize(
    "address",
    ["1.1.1.1", "8.8.8.8", "172.15.255.255", "192.167.1.1", "198.17.0.1", "2606:4700::1111", "2a00:1450::1"],
)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *(
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "192.0.0.170",
            "192.0.2.1",
        ),
        *("192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "::7f00:1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:0:127.0.0.1"),
        *("64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1", "2001:2::1", "2001:10::1"),
        *("2001:db8::1", "2002:7f00:1::1", "3fff::1", "5f00::1", "fc00::1", "fd00::1", "fe80::1", "fe80::1%1"),
        *("fec0::1", "ff02::1", "ff0e::1"),
    ],
)
def test_what_is_not_of_the_internet_or_leads_around_it_is_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    ("allowed", "host", "address", "is_allowed"),
    [
        (["audio.internal"], "audio.internal", "10.0.0.1", True),
        (["audio.internal"], "AUDIO.Internal.", "10.0.0.1", True),
        (["audio.internal"], "cdn.audio.internal", "10.0.0.1", False),
        (["*.audio.internal"], "cdn.audio.internal", "10.0.0.1", True),
        (["*.audio.internal"], "a.b.audio.internal", "10.0.0.1", True),
        (["*.audio.internal"], "audio.internal", "10.0.0.1", False),
        (["*.audio.internal"], "otheraudio.internal", "10.0.0.1", False),
        (["198.18.0.0/15"], "any.example", "198.19.3.4", True),
        (["198.18.0.0/15"], "any.example", "10.0.0.1", False),
        (["10.0.0.1"], "10.0.0.1", "10.0.0.1", True),
        (["[fd00::1]"], "fd00::1", "fd00::1", True),
        (["64:ff9b::/96"], "any.example", "64:ff9b::808:808", True),
        (["10.0.0.0/8"], "any.example", "::ffff:10.0.0.1", True),
        (["64:ff9b::/96"], "any.example", "64:ff9b::7f00:1", False),
        (["64:ff9b::/96", "127.0.0.1"], "any.example", "64:ff9b::7f00:1", True),
        (["straße.internal"], "xn--strae-oqa.internal", "10.0.0.1", True),
        (["*.bücher.internal"], "a.xn--bcher-kva.internal", "10.0.0.1", True),
        (["bücher.internal"], "xn--bcher-kva.internal", "10.0.0.1", True),
        ([], "any.example", "8.8.8.8", True),
        (["audio.internal"], "any.example", "8.8.8.8", True),
    ],
)
def test_a_host_is_allowed_on_purpose_by_its_name_or_its_network(
    allowed: Sequence[str], host: str, address: str, is_allowed: bool
) -> None:
    assert AudioHosts(allowed).allows(host, ipaddress.ip_address(address)) is is_allowed


@pytest.mark.parametrize("entry", ["https://audio.internal", "audio.internal:443", "*", "10.0.0.0/99", "a b", "*.*.b"])
def test_what_is_no_host_is_refused_with_a_word(entry: str) -> None:
    with pytest.raises(CredentialsError, match="no name of a host") as caught:
        NanoGPTClient(API_KEY, audio_hosts=[entry])

    assert caught.value.code == "INVALID_CREDENTIALS"


# With an https server


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[HttpsServer]:
    async with https_server(tmp_path, ok(BODY)) as server:
        monkeypatch.setenv("SSL_CERT_FILE", str(server.authority))
        yield server


class Resolver:
    """A resolver that gives another answer each time, the last one for ever."""

    def __init__(self, *answers: str | None) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    def __call__(self, host: Any, port: int, *args: Any, **kwargs: Any) -> list[Any]:
        self.asked.append(host if isinstance(host, str) else host.decode())
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        families = {True: socket.AF_INET6, False: socket.AF_INET}
        return [(families[":" in it], socket.SOCK_STREAM, 6, "", (it, port)) for it in answer.split()]


def resolving(monkeypatch: pytest.MonkeyPatch, *answers: str | None) -> Resolver:
    resolver = Resolver(*answers)
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    return resolver


async def fetched(server: HttpsServer, *audio_hosts: str, url: str = f"https://{NAME}") -> bytes:
    async with (
        NanoGPTClient(API_KEY, "https://nano-gpt.test/api", audio_hosts=audio_hosts) as client,
        client.download(f"{url}:{server.port}/1.mp3") as response,
    ):
        return await response.aread()


async def test_a_resolver_that_changes_its_mind_leads_nowhere_else(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = resolving(monkeypatch, "127.0.0.1", "127.0.0.2")

    assert await fetched(server, "127.0.0.1") == BODY

    assert resolver.asked == [NAME]
    assert server.reached == ["127.0.0.1"]


async def test_a_name_that_leads_to_a_private_address_is_not_connected_to(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, "127.0.0.2", "127.0.0.1")

    with pytest.raises(AudioError, match=r"audio\.test \(127\.0\.0\.2\), which is not a public") as caught:
        await fetched(server, "127.0.0.1")

    assert not caught.value.retryable
    assert "`audio_hosts` of the credentials block, or in NANOGPT_AUDIO_HOSTS" in caught.value.message
    assert server.reached == []


async def test_one_private_address_among_public_ones_is_enough(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, "127.0.0.1 127.0.0.2")

    with pytest.raises(AudioError, match="not a public"):
        await fetched(server, "127.0.0.1")

    assert server.reached == []


async def test_the_next_address_is_tried_where_one_does_not_answer(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, "::1 127.0.0.2")  # the server has no address of IPv6

    assert await fetched(server, "::1", "127.0.0.2") == BODY

    assert server.reached == ["127.0.0.2"]


async def test_a_name_that_cannot_be_resolved_is_not_connected_to(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, None)

    with pytest.raises(AudioError, match="cannot be resolved") as caught:
        await fetched(server, "127.0.0.1")

    assert caught.value.retryable


async def test_a_redirect_is_checked_like_the_first_url(server: HttpsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = resolving(monkeypatch, "127.0.0.1", "127.0.0.2")
    server.answer = b"HTTP/1.1 302 Found\r\nlocation: https://cdn.audio.test:%d/2.mp3\r\n\r\n" % server.port

    with pytest.raises(AudioError, match=r"cdn\.audio\.test \(127\.0\.0\.2\), which is not a public"):
        await fetched(server, "127.0.0.1")

    assert resolver.asked == [NAME, f"cdn.{NAME}"]
    assert server.reached == ["127.0.0.1"]


async def test_a_host_is_allowed_on_purpose_by_the_environment(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, "127.0.0.2")
    monkeypatch.setenv("NANOGPT_AUDIO_HOSTS", f"elsewhere.test, {NAME}")

    assert await fetched(server) == BODY


async def test_a_certificate_is_verified_against_the_name_and_not_the_address(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, "127.0.0.1")

    with pytest.raises(AudioError, match="CERTIFICATE_VERIFY_FAILED"):
        await fetched(server, "127.0.0.1", url="https://another.test")


async def test_a_proxy_is_asked_for_the_name_and_never_for_a_private_address(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxy(server.port) as (url, asked):
        monkeypatch.setenv("HTTPS_PROXY", url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)

        assert await fetched(server) == BODY
        for address in ("127.0.0.1", "[::1]", "169.254.169.254", "127.1", "0x7f000001", "2130706433", "localhost."):
            with pytest.raises(AudioError, match="not a public"):
                await fetched(server, url=f"https://{address}")

    assert asked == [f"{NAME}:{server.port}"]


async def test_a_submission_that_a_proxy_does_not_pass_on_was_never_sent(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"this is no HTTP\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as broken:
        monkeypatch.setenv("HTTPS_PROXY", "http://{}:{}".format(*broken.sockets[0].getsockname()))
        async with NanoGPTClient(API_KEY, f"https://{NAME}:{server.port}/api") as client:
            with pytest.raises(NothingSent):
                await client.submit(TTSRequest(text="Hello."))

    assert server.reached == []


async def test_garbage_in_the_middle_of_tls_is_a_typed_error(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(ok(BODY)[:500])
        await writer.drain()
        socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())).send(b"\x16\x03\x01 garbage")
        await asyncio.sleep(0.2)
        writer.close()

    resolving(monkeypatch, "127.0.0.1")
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server.context) as broken:
        port = broken.sockets[0].getsockname()[1]
        async with NanoGPTClient(API_KEY, f"https://{NAME}:{port}/api", audio_hosts=[NAME]) as client:
            with pytest.raises(ProviderError) as of_the_status:
                await client.status(Ticket(run_id="98b0", model="m"))
            with pytest.raises(SubmissionUncertain):
                await client.submit(TTSRequest(text="Hello."))
            with pytest.raises(AudioError) as of_the_audio:
                async with client.download(f"https://{NAME}:{port}/1.mp3") as response:
                    await response.aread()

    assert of_the_status.value.retryable
    assert of_the_audio.value.retryable


async def test_a_host_that_no_proxy_is_for_is_checked(server: HttpsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with proxy(server.port) as (url, asked):
        monkeypatch.setenv("HTTPS_PROXY", url)
        monkeypatch.setenv("NO_PROXY", NAME)
        resolving(monkeypatch, "127.0.0.1")

        with pytest.raises(AudioError, match="not a public"):
            await fetched(server)

    assert asked == []


async def test_the_login_of_an_audio_url_goes_to_its_host_and_nowhere_else(
    server: HttpsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolving(monkeypatch, "127.0.0.1")

    await fetched(server, NAME, url=f"https://speaker:p%40ss@{NAME}")

    [request] = server.requests
    assert b" Basic c3BlYWtlcjpwQHNz\r\n" in request
    assert b"GET /1.mp3 " in request


@pytest.mark.parametrize(
    "url",
    [
        "https://a@@b/",
        "https://%@h/",
        "https://us%00er:p@h/",
        "https://u:p@ss@h/x",
        "https://\ud800:b@h/",
        "http://[::1",
    ],
)
def test_a_strange_login_is_taken_out_of_a_url_without_a_fault(url: str) -> None:
    shown, _ = split_login(url)

    assert "@" not in shown
