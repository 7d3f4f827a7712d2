"""How the audio host is connected to: the address that was checked is the address that is used.

The provider names the audio host, so its word decides where this process connects to. A name is resolved once, all of
its addresses have to be public, and the connection is made to one of them; nothing looks the name up a second time. TLS
still verifies the certificate against the name.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import httpcore
import httpx

from prefect_nanogpt.errors import AudioError, without_login

if TYPE_CHECKING:
    from prefect_nanogpt.aiohttp_transport import AiohttpTransport

__all__ = ["AudioHosts", "AudioTransport", "api_transport", "is_public", "split_login", "ssl_context"]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class _WithoutSecrets(logging.Filter):
    """Takes the heads of answers out of what httpcore logs, since there are logins, cookies and echoes in them."""

    def filter(self, record: logging.LogRecord) -> bool:
        event, _, _ = record.getMessage().partition(" ")
        if event.startswith("receive_response_headers"):
            record.msg, record.args = f"{event} ***", ()
        return True


logging.getLogger("httpcore.http11").addFilter(_WithoutSecrets())

LEAST_BYTES: Final = 30_000
LEAST_BYTES_SECONDS: Final = 30.0
"""A download gets at least `LEAST_BYTES` in this time, or is given up: 1 kB a second, the least that anything takes is
4 (MP3 of 32 kbit/s, as it plays)."""
LONGEST_DOWNLOAD_SECONDS: Final = 3600.0
SETTING: Final = "NANOGPT_AUDIO_HOSTS"

# The registries of special-purpose addresses (RFC 6890 and its updates), written down here since what `is_global` says
# differs between the patch releases of Python.
_NOT_PUBLIC: Final[tuple[Network, ...]] = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "2001::/23",  # Teredo among them
        "2001:db8::/32",
        "2002::/16",  # 6to4
        "3fff::/20",
    )
)
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_UNICAST: Final = ipaddress.ip_network("2000::/3")
"""All that is public in IPv6. Outside of it are IPv4 in IPv6, NAT64, link-local, site-local and multicast addresses."""


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, and not a way around that to an IPv4 address.

    Example:
        >>> is_public(ipaddress.ip_address("1.1.1.1")), is_public(ipaddress.ip_address("64:ff9b::7f00:1"))
        (True, False)
    """
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address.version == 6 and address not in _UNICAST:
        return False
    return not any(address in network for network in _NOT_PUBLIC)


class AudioHosts:
    """The hosts that audio may be fetched from although their addresses are not public.

    Args:
        allowed: Names, names with `*.` before them for all names below, addresses, and networks such as
            `198.18.0.0/15`.

    Raises:
        ValueError: One of them is none of these.

    Example:
        >>> AudioHosts(["*.audio.internal"]).allows("cdn.audio.internal", ipaddress.ip_address("10.1.2.3"))
        True
    """

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._names: set[str] = set()
        self._networks: list[Network] = []
        for entry in filter(None, map(str.strip, allowed)):
            try:
                self._networks.append(ipaddress.ip_network(entry.strip("[]"), strict=False))
            except ValueError:
                self._names.add(_name(entry))

    @staticmethod
    def in_environment() -> list[str]:
        """Give what `NANOGPT_AUDIO_HOSTS` lists, separated by commas or spaces."""
        return re.split(r"[,\s]+", os.environ.get(SETTING, "").strip())

    def allows(self, host: str, address: Address) -> bool:
        """Whether a host, by its name in ASCII, may be connected to at an address."""
        parts = host.rstrip(".").lower().split(".")
        names = {".".join(parts), *("*." + ".".join(parts[start:]) for start in range(1, len(parts)))}
        if names & self._names:
            return True
        if isinstance(address, ipaddress.IPv6Address):
            address = address.ipv4_mapped or address
        if address in _NAT64 and not is_public(behind := ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)):
            return self.allows(host, behind)
        return any(address in network for network in self._networks) or is_public(address)


def _name(entry: str) -> str:
    """Give the name of a host as it is resolved: in lower case, and in ASCII."""
    star, bare = ("*.", entry[2:]) if entry.startswith("*.") else ("", entry)
    try:
        name = httpx.URL(f"https://{bare}").raw_host.decode().rstrip(".").lower()
    except (httpx.InvalidURL, ValueError):
        name = ""
    if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name) or not re.fullmatch(r"[\w.-]+", bare):
        raise ValueError(f"{entry!r} is no name of a host, no address and no network")
    return star + name


def ssl_context() -> ssl.SSLContext:
    """Give what certificates are verified with: made once a process, since that takes longer than a request."""
    return _ssl_context(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@lru_cache
def _ssl_context(file: str | None, folder: str | None) -> ssl.SSLContext:
    context = httpx.create_ssl_context()  # which reads both variables itself
    context.set_alpn_protocols(["http/1.1"])  # as httpcore does and aiohttp does not
    return context


def refusal(host: str, address: Address) -> AudioError:
    """Make the error of a host that is not connected to."""
    at = f" ({address})" if str(address) != host.strip("[]") else ""
    return AudioError(
        f"The audio URL points at {host}{at}, which is not a public address, so it was not fetched. If that host is "
        "meant to be reached (one of your own network, or of a resolver that gives every name such an address), name "
        f"it or its network in `audio_hosts` of the credentials block, or in {SETTING}."
    )


def split_login(url: str) -> tuple[str, tuple[str, str] | None]:
    """Split a URL into one that may be shown, and the user and the password that it had."""
    try:
        parsed = httpx.URL(url)
        if not parsed.userinfo:
            return url, None
        return str(parsed.copy_with(username=None, password=None)), (parsed.username, parsed.password)
    except (httpx.InvalidURL, ValueError):
        return without_login(url), None


def _literal(host: str) -> Address | None:
    """Give the address that a host is, however it is written, and without its zone; None for a name."""
    if host == "localhost" or host.endswith(".localhost"):
        return ipaddress.IPv4Address("127.0.0.1")
    try:
        return ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        pass
    try:
        return ipaddress.IPv4Address(socket.inet_aton(host))  # such as 127.1, 0x7f000001 and 2130706433
    except OSError:
        return None


class _Checked(httpcore.AsyncNetworkBackend):
    """Connects to hosts at the addresses that their names were resolved to once, and only to those that are allowed."""

    def __init__(self, hosts: AudioHosts) -> None:
        self._hosts = hosts
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that answers, each with its share of the time.

        Raises:
            AudioError: One of the addresses is not allowed.
            httpx.ConnectError: The name cannot be resolved.
            httpcore.ConnectError: None of its addresses answers.
        """
        ends = time.monotonic() + timeout if timeout is not None else None
        addresses = await _addresses(self._hosts, host, port, timeout)
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            share = None if ends is None else max(0.0, ends - time.monotonic()) / left
            try:
                return await self._network.connect_tcp(str(address), port, share, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout):
                if left == 1:
                    raise
        raise httpcore.ConnectError(f"{host} has no address")

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Refuse: no URL means one."""
        raise httpcore.ConnectError("a host is not a socket of this machine")

    async def sleep(self, seconds: float) -> None:
        """Sleep."""
        await anyio.sleep(seconds)


async def _addresses(hosts: AudioHosts | None, host: str, port: int, timeout: float | None = None) -> list[Address]:
    """Look a host up, once, and make sure that it may be connected to at all of its addresses.

    Raises:
        AudioError: It may not be at one of them.
        httpx.ConnectError: There is no answer, or none that can be used.
    """
    _refuse_literal(hosts, host)
    try:
        with anyio.fail_after(timeout):
            found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except TimeoutError:
        raise httpx.ConnectTimeout(f"the name {host} was not resolved in time") from None
    except (OSError, OverflowError, UnicodeError) as error:
        raise httpx.ConnectError(f"the name {host} cannot be resolved: {error}") from None
    addresses = list(dict.fromkeys(ipaddress.ip_address(info[4][0]) for info in found))
    for address in addresses:
        if hosts is not None and not hosts.allows(host, address):
            raise refusal(host, address)
    return addresses


def _refuse_literal(hosts: AudioHosts | None, host: str) -> None:
    """Make sure of a host that is an address, without looking it up.

    Raises:
        AudioError: It may not be connected to.
    """
    if hosts is not None and (literal := _literal(host.rstrip("."))) and not hosts.allows(host, literal):
        raise refusal(host, literal)


def _over_aiohttp(verify: ssl.SSLContext, hosts: AudioHosts | None = None) -> AiohttpTransport | None:
    """Make the transport for GET requests of the extra `fast`; None where that is not installed, or is too old."""
    try:
        from prefect_nanogpt.aiohttp_transport import AiohttpTransport
    except ImportError:
        return None
    return AiohttpTransport(verify, partial(_addresses, hosts))


def _suits_aiohttp(host: str) -> bool:
    """Whether a host is a name, or an address as it is usually written: others aiohttp refuses, or reads in its way."""
    literal = _literal(host)
    return literal is None or host == "localhost" or host == str(literal)


def api_transport(verify: ssl.SSLContext, base_url: str) -> AiohttpTransport | None:
    """Make the transport for the GET requests to the API; None where httpx's own is to be used."""
    url = httpx.URL(base_url)
    if _proxy_for(url) is not None or not _suits_aiohttp(url.raw_host.decode()):
        return None
    return _over_aiohttp(verify)


class AudioTransport(httpx.AsyncBaseTransport):
    """Carries the requests to the audio host: to a checked address, or through the proxy of the environment.

    A proxy resolves names and connects by itself, so only it can check where a name leads; an address in the URL is
    checked before it is asked.

    Args:
        verify: What certificates are verified with.
        hosts: Which hosts may be connected to; None for all, where the API itself is one of this machine.
    """

    def __init__(self, verify: ssl.SSLContext, hosts: AudioHosts | None) -> None:
        self._verify = verify
        self._hosts = hosts
        backend = _Checked(hosts) if hosts is not None else None
        self._direct = httpcore.AsyncConnectionPool(
            ssl_context=verify,
            network_backend=backend,
            max_connections=None,
            max_keepalive_connections=20,
            keepalive_expiry=5.0,
        )
        self._over_aiohttp = _over_aiohttp(verify, hosts)
        self._proxied: dict[str, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; its answer ends in good time, or with an error."""
        response = await self._send(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        response.stream = _Paced(response.stream)
        return response

    async def _send(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        host = url.raw_host.decode()
        _refuse_literal(self._hosts, host)
        if (proxy := _proxy_for(url)) is not None:
            if proxy not in self._proxied:
                self._proxied[proxy] = httpx.AsyncHTTPTransport(verify=self._verify, proxy=proxy)
            return await self._proxied[proxy].handle_async_request(request)
        fast = self._over_aiohttp
        if fast is not None and host not in fast.misread and _suits_aiohttp(host):
            return await fast.handle_async_request(request)
        with _as_of_httpx():
            response = await self._direct.handle_async_request(
                httpcore.Request(
                    request.method,
                    httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        stream: Any = response.stream
        return httpx.Response(
            response.status, headers=response.headers, stream=_Stream(stream), extensions=response.extensions
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._direct.aclose()
        if self._over_aiohttp is not None:
            await self._over_aiohttp.aclose()
        for transport in self._proxied.values():
            await transport.aclose()


def _proxy_for(url: httpx.URL) -> str | None:
    """Give the proxy that the environment (or the system's settings) has for a URL; None for none."""
    proxies = urllib.request.getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


@contextmanager
def _as_of_httpx() -> Iterator[None]:
    """Make errors of httpcore the errors of httpx that have their names, as httpx's own transport does."""
    try:
        yield
    except (
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.ProxyError,
        httpcore.TimeoutException,
        httpcore.UnsupportedProtocol,
    ) as error:
        raise getattr(httpx, type(error).__name__)(str(error)) from error


class _Stream(httpx.AsyncByteStream):
    """The body of an answer that httpcore has."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_of_httpx():
            async for piece in self._stream:
                yield piece

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Paced(httpx.AsyncByteStream):
    """A body that comes at a least rate and within a time, or fails as one that has stopped coming does."""

    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        pieces = aiter(self._stream)
        last = time.monotonic() + LONGEST_DOWNLOAD_SECONDS
        ends, size = time.monotonic() + LEAST_BYTES_SECONDS, 0
        while True:
            try:
                with anyio.fail_after(min(ends, last) - time.monotonic()):
                    piece = await anext(pieces, None)
            except ssl.SSLError as error:  # which httpcore leaves as it is
                raise httpx.ReadError(str(error)) from None
            except TimeoutError:
                slow = f"less than {LEAST_BYTES:,} bytes came in {LEAST_BYTES_SECONDS:.0f} s"
                late = f"it was not whole after {LONGEST_DOWNLOAD_SECONDS:.0f} s"
                raise httpx.ReadTimeout(late if last < ends else slow) from None
            if piece is None:
                return
            size += len(piece)
            got = time.monotonic()
            yield piece
            if size >= LEAST_BYTES:
                ends, size = time.monotonic() + LEAST_BYTES_SECONDS, 0
            else:  # the time that whoever writes it takes is not the host's
                ends += time.monotonic() - got

    async def aclose(self) -> None:
        await self._stream.aclose()
