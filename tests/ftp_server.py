"""A real FTP server on loopback, with one user, and open to whoever has no name."""

import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer as Listener

USER = "speaker"
MAIL_USER = "speaker@example.org"
PASSWORD = "s3cret/of the@test"
EVERYTHING = "elradfmwMT"


class FTPServer:
    """A server whose root is a local folder.

    Attributes:
        root: The folder.
        address: Host and port.
        answers: What to answer to a command, such as `MLSD`, without a look at it.
        breaks: A part of the name of files: the next upload of one ends with the connection, in the middle.
        renames_over: Whether a file can be renamed to the name of another.
        idle_seconds: After how many seconds a connection is ended that asks for nothing.
        most_connections: How many connections an address may have; 0 for any number.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.answers: dict[str, str] = {}
        self.breaks: str | None = None
        self.renames_over = True
        self._users = DummyAuthorizer()
        for user in (USER, MAIL_USER):
            self._users.add_user(user, PASSWORD, str(root), perm=EVERYTHING)
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # who has no name may write here
            self._users.add_user("anonymous", "", str(root), perm=EVERYTHING)
        self._listener = Listener(("127.0.0.1", 0), self._handler())
        self.address = "{}:{}".format(*self._listener.address)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._is_over = False

    def refuse_nameless(self) -> None:
        """Let nobody in who has no name."""
        self._users.remove_user("anonymous")

    def _handler(self) -> type[FTPHandler]:
        server = self

        class Handler(FTPHandler):  # type: ignore[misc]
            authorizer = self._users

            def pre_process_command(self, line: str, cmd: str, arg: str) -> None:
                if cmd in server.answers:
                    self.respond(server.answers[cmd])
                else:
                    super().pre_process_command(line, cmd, arg)

            def ftp_STOR(self, file: str, mode: str = "w") -> None:
                super().ftp_STOR(file, mode)
                if server.breaks is not None and server.breaks in Path(file).name:
                    server.breaks = None
                    Path(file).write_bytes(b'{"at": "20')
                    self.close()

            def ftp_RNTO(self, path: str) -> None:
                if Path(path).exists() and not server.renames_over:
                    self.respond("550 The file exists.")
                else:
                    super().ftp_RNTO(path)

        return Handler

    @property
    def idle_seconds(self) -> float:
        return float(self._listener.handler.timeout)

    @idle_seconds.setter
    def idle_seconds(self, seconds: float) -> None:
        self._listener.handler.timeout = seconds

    @property
    def most_connections(self) -> int:
        return int(self._listener.max_cons_per_ip)

    @most_connections.setter
    def most_connections(self, number: int) -> None:
        self._listener.max_cons_per_ip = number

    def _serve(self) -> None:
        while not self._is_over:
            self._listener.ioloop.loop(timeout=0.05, blocking=False)

    def __enter__(self) -> "FTPServer":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._is_over = True
        self._thread.join(30)
        self._listener.close_all()


@pytest.fixture
def ftp(tmp_path: Path) -> Iterator[FTPServer]:
    """An FTP server whose root is empty."""
    root = tmp_path / "ftp"
    root.mkdir()
    with FTPServer(root) as server:
        yield server
