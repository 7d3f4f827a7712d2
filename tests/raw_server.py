"""A server on loopback that answers each request with the bytes that it was given, whether they are HTTP or not."""

import re
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

PLACE = b"127.0.0.1:_HERE"
"""Stands in an answer for the server's own host and port, and is as long: an answer may say how long it is."""


class RawServer(socketserver.ThreadingTCPServer):
    """A server that closes each connection after its answer.

    Attributes:
        answer: What every request is answered with.
        requests: The requests as they came, head and body.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.answer = b""
        self.requests: list[bytes] = []

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.server_address[1]:05}"


class _Connection(socketserver.StreamRequestHandler):
    server: RawServer
    timeout = 30

    def handle(self) -> None:
        with suppress(OSError):  # the client may leave at any time
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                if not (line := self.rfile.readline()):
                    return
                head += line
            length = re.search(rb"(?i)\ncontent-length: *([0-9]+)", head)
            self.server.requests.append(head + self.rfile.read(int(length[1]) if length else 0))
            self.wfile.write(self.server.answer.replace(PLACE, self.server.place.encode()))


@contextmanager
def raw_server() -> Iterator[RawServer]:
    with RawServer() as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        serving.start()
        try:
            yield server
        finally:
            server.shutdown()
            serving.join()
