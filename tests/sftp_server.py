"""A real SFTP server on loopback, for a file system that cannot create a file for one of several writers only."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import asyncssh
import fsspec
import pytest
from fsspec.implementations.sftp import SFTPFileSystem

USER = "speaker"
PASSWORD = "only-for-this-test"


class Gate(asyncssh.SSHServer):
    """Lets one user in."""

    def __init__(self, connections: list[asyncssh.SSHServerConnection]) -> None:
        self._connections = connections

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connections.append(conn)

    def begin_auth(self, username: str) -> bool:
        return True

    def password_auth_supported(self) -> bool:
        return True

    def validate_password(self, username: str, password: str) -> bool:
        return (username, password) == (USER, PASSWORD)


class SFTPServer:
    """A server whose root is a local folder.

    Attributes:
        url: The address of its root.
        options: What its driver has to know besides.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._connections: list[asyncssh.SSHServerConnection] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "SFTPServer":
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)
        self.url = "sftp://127.0.0.1"
        self.options = {"username": USER, "password": PASSWORD, "port": self._server.get_port()}
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    @contextmanager
    def silence(self) -> Iterator[None]:
        """Let the server read and answer nothing, without ending a connection."""
        is_over = threading.Event()
        self._loop.call_soon_threadsafe(is_over.wait, 60)
        try:
            yield
        finally:
            is_over.set()

    async def _listen(self) -> asyncssh.SSHAcceptor:
        return await asyncssh.listen(
            "127.0.0.1",
            0,
            server_factory=lambda: Gate(self._connections),
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            sftp_factory=lambda connection: asyncssh.SFTPServer(connection, chroot=str(self._root).encode()),
        )

    async def _close(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.abort()
            await connection.wait_closed()


@pytest.fixture
def sftp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SFTPServer]:
    """An SFTP server that fsspec's configuration, here and in processes started from here, has the password of."""
    root = tmp_path / "sftp"
    root.mkdir()
    with SFTPServer(root) as server:
        monkeypatch.setitem(fsspec.config.conf, "sftp", server.options)
        monkeypatch.setenv("FSSPEC_SFTP", json.dumps(server.options))
        yield server
    SFTPFileSystem.clear_instance_cache()
