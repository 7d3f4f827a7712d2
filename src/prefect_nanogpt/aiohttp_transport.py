"""GET requests over aiohttp, where the extra `fast` is installed: the same requests for half of the CPU time.

No POST goes this way: httpx says whether a request had left when its connection broke, aiohttp does not, and a
submission that has left must not be repeated.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Final
from weakref import WeakSet

import aiohttp
import httpx
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import Connection
from aiohttp.tracing import Trace
from yarl import URL

__all__ = ["AiohttpTransport", "Resolve"]

Resolve = Callable[[str, int], Awaitable[list[IPv4Address | IPv6Address]]]

KEPT_SECONDS: Final = 5.0
"""How long an idle connection is kept: as long as httpx keeps one."""
LARGEST_HEADER_BYTES: Final = 64 * 1024


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Carries GET requests, byte for byte as httpx's own transport does.

    Args:
        verify: What certificates are verified with.
        resolve: Gives the addresses that a host may be connected to at a port, or raises.

    Attributes:
        misread: Hosts whose answers aiohttp could not read. It is stricter than httpx, which is to be used for them.
    """

    def __init__(self, verify: ssl.SSLContext, resolve: Resolve) -> None:
        self._verify = verify
        self._resolver = _Resolver(resolve)
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answers: WeakSet[aiohttp.ClientResponse] = WeakSet()
        self._is_closed = False
        self.misread: set[str] = set()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, once.

        Raises:
            httpx.TransportError: There is no answer.
        """
        if request.method != "GET":
            raise httpx.UnsupportedProtocol("only GET goes over aiohttp")
        url, timeout = request.url, request.extensions["timeout"]
        host = url.raw_host.decode()
        session = self._opened()
        # As path is given all of the target, since yarl leaves out the question mark of an empty query.
        target = URL.build(
            scheme=url.scheme,
            host=f"[{host}]" if ":" in host else host,
            port=url.port,
            path=url.raw_path.decode(),
            encoded=True,
        )
        try:
            answer = await session.get(
                target,
                headers=[(name.decode(), value.decode("latin-1")) for name, value in request.headers.raw],
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(connect=timeout["connect"], sock_read=timeout["read"]),
            )
        except BaseException as error:
            if isinstance(error, httpx.RemoteProtocolError):
                self.misread.add(host)
            # The key is among the local variables of aiohttp's frames, and there are tracebacks that show those.
            raise error.with_traceback(None) from None
        if answer.status < 200:  # another protocol, which nobody has asked for
            answer.close()
            raise httpx.RemoteProtocolError(f"the answer is HTTP {answer.status}")
        self._answers.add(answer)
        return httpx.Response(answer.status, headers=answer.raw_headers, stream=_Body(answer))

    def _opened(self) -> aiohttp.ClientSession:
        """Give the session, which belongs to an event loop."""
        if self._is_closed:
            raise httpx.ConnectError("the client is closed")
        if self._session is None or self._loop is not asyncio.get_running_loop():
            if self._session is not None:
                self._session.detach()  # its loop has ended, and its connections with it
            self._loop = asyncio.get_running_loop()
            self._session = aiohttp.ClientSession(
                connector=_Connector(
                    ssl=self._verify,
                    resolver=self._resolver,
                    use_dns_cache=False,
                    limit=0,
                    keepalive_timeout=KEPT_SECONDS,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                max_line_size=LARGEST_HEADER_BYTES,
                max_field_size=LARGEST_HEADER_BYTES,
                middlewares=[_once],
            )
        return self._session

    async def aclose(self) -> None:
        """Close all connections."""
        self._is_closed = True
        for answer in list(self._answers):
            answer.close()  # which tells whoever waits for more of it; the session does not
        if self._session is not None:
            await self._session.close()


class _Connector(aiohttp.TCPConnector):
    """Keeps connections, but for those on which something came that nobody had asked for.

    aiohttp takes that for the answer to the next request, which is about another job.
    """

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        while True:
            connection = await super().connect(req, traces, timeout)
            if connection.protocol is None or not connection.protocol.should_close:
                return connection
            connection.close()


class _Resolver(AbstractResolver):
    """Gives aiohttp the addresses that it may connect to. It asks anew for each connection, and not for an address."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._resolve(host, port)
        ]

    async def close(self) -> None:
        pass


async def _once(request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Make the errors of a request those of httpx. aiohttp repeats a GET after some of its own, and not after these."""
    try:
        return await handler(request)
    except (aiohttp.ClientError, OSError) as error:
        fault = _as_of_httpx(error)
    raise fault  # outside, since aiohttp's error has the headers of the request, and would be its context


def _as_of_httpx(error: Exception) -> httpx.TransportError:
    """Give the error of httpx that means the same, without the URL, which may be signed."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            return httpx.ConnectTimeout("there was no connection in time")
        case TimeoutError():
            return httpx.ReadTimeout("nothing came in time")
        case aiohttp.ClientConnectorError():
            return httpx.ConnectError(str(error.__cause__))
        case aiohttp.ServerDisconnectedError():
            return httpx.ReadError("the connection was closed before there was an answer")
        case aiohttp.ClientResponseError():
            return httpx.RemoteProtocolError(error.message)
        case aiohttp.ClientPayloadError():
            return httpx.RemoteProtocolError(str(error))
    return httpx.ReadError(str(error))


class _Body(httpx.AsyncByteStream):
    """The body of an answer, in pieces as large as they come."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._answer.content.iter_any():
                yield piece
            return
        except (aiohttp.ClientError, OSError) as error:
            fault = _as_of_httpx(error)
        raise fault

    async def aclose(self) -> None:
        self._answer.release()  # which closes the connection where the body was not read to its end
