"""A web server on which to hear what runs have saved to folders of this machine. It only reads, and only audio.

    /                      the folders
    /<folder>/             what was saved to a folder, with players: of a batch, its lines in their order
    /<folder>/page/<file>  the page of one file
    /<folder>/<file>       the file; with ?download to be kept
    /<folder>/all.zip      all that the page of the folder has

Where a folder is called by its id (see `folders`). Nothing else is there, whatever is asked for: no listing, no file
that is not audio, none that lies elsewhere. The pages work without scripts, and allow none.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import ipaddress
import math
import os
import re
import socket
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

import uvicorn
from jinja2 import Environment, PackageLoader
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prefect_nanogpt.audio import CONTENT_TYPES, EXTENSIONS, inspect
from prefect_nanogpt.errors import AudioError, NanoGPTError
from prefect_nanogpt.folders import HOST, LISTEN_URL, PORT, by_id, registered
from prefect_nanogpt.recordings import Folder, Recording, find_audio
from prefect_nanogpt.waveform import draw_waveform

__all__ = ["listener_on", "listening"]

SHOWN: Final = 50
"""How many recordings a page has."""
STOP_SECONDS: Final = 3.0
START_SECONDS: Final = 30.0
BLOCK_BYTES: Final = 256 * 1024
EARLIEST_IN_ZIP: Final = (1980, 1, 1, 0, 0, 0)

STYLE: Final = files("prefect_nanogpt").joinpath("pages", "style.css").read_text(encoding="utf-8")
_STYLE_DIGEST: Final = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; media-src 'self'; img-src data:; "
    f"style-src 'sha256-{_STYLE_DIGEST}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",  # the ids of folders can be guessed by who knows their paths
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "private, no-cache",
}


@contextmanager
def listening(
    port: int = PORT, host: str = HOST, folders: Sequence[str | os.PathLike[str]] | None = None
) -> Iterator[str]:
    """Serve what runs have saved to folders of this machine, from a thread of its own.

    Args:
        port: The port; 0 for a free one. Links in reports name it, so it should stay the same.
        host: The address to listen at. Whoever can reach it can hear everything: there is no login.
        folders: The folders to serve; None for all that runs on this machine have saved to, now and later.

    Yields:
        The address of the start page.

    Raises:
        NanoGPTError: The port is taken (code `PORT_TAKEN`; the message says by what, where that can be told), or the
            address is none of this machine (code `INVALID_REQUEST`).

    Example:
        >>> with listening(port=0) as url:
        ...     url.startswith("http://127.0.0.1:")
        True
    """
    with _bound(host, port) as listener:
        port = listener.getsockname()[1]
        app = _only_for(_Pages(folders).app(), host)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="critical",
                access_log=False,
                lifespan="off",
                ws="none",
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="prefect-nanogpt-listen", daemon=True
        )
        thread.start()
        try:
            deadline = time.monotonic() + START_SECONDS
            while not server.started and thread.is_alive() and time.monotonic() < deadline:
                time.sleep(0.01)
            yield f"http://{_shown(host)}:{port}"
        finally:
            server.should_exit = True
            thread.join(STOP_SECONDS)


def _bound(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            words = error.strerror or str(error)
            raise NanoGPTError(f"Nothing can be served at {host}:{port}: {words}", code="INVALID_REQUEST") from None
        by = f" by {what}" if (what := listener_on(port)) else ""
        raise NanoGPTError(
            f"The port {port}, at which audio can be heard, is taken{by}. Stop that, or take another port and set "
            f"{LISTEN_URL} for the runs, so that their reports link to it.",
            code="PORT_TAKEN",
        ) from None


def _shown(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def listener_on(port: int) -> str | None:
    """Name the process that listens on a port, where the system tells: Linux, of one's own processes."""
    sockets = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*") if sockets else ():
        with suppress(OSError):
            if any(os.readlink(opened) in sockets for opened in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                return f"process {process.name} ({' '.join(command.split())[:100]})"
    return None


# Who is answered


def _only_for(app: ASGIApp, host: str) -> ASGIApp:
    """Answer only to those who call this server by one of its names, and tell browsers to be careful.

    A page of somebody else's can make a browser ask for a name of its own that leads here (DNS rebinding). It cannot
    make it ask for an address, nor for a name of this machine.
    """
    names = {"localhost", host.lower(), (urlsplit(os.environ.get(LISTEN_URL) or "").hostname or "localhost").lower()}
    is_open = host in ("0.0.0.0", "::")
    if is_open:
        names.add(socket.gethostname().lower())

    def is_ours(name: str) -> bool:
        if name in names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return is_open or address.is_loopback

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        called = Headers(scope=scope).getlist("host")
        if len(called) != 1 or not is_ours(_name_in(called[0])):
            refusal = PlainTextResponse("This server is not known by that name.\n", 421)
            await refusal(scope, receive, send_with_headers)
            return
        await app(scope, receive, send_with_headers)

    return guarded


def _name_in(called: str) -> str:
    """Take the name out of a Host header; an empty one where there is none."""
    found = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::[0-9]+)?", called.lower())
    return (found[1] or found[2]).rstrip(".") if found else ""


# What there is


class _Pages:
    """The pages of folders.

    Args:
        folders: The folders; None for those that runs have saved to.
    """

    def __init__(self, folders: Sequence[str | os.PathLike[str]] | None) -> None:
        self._given = None if folders is None else by_id(map(Path, folders))
        self._known: dict[str, Folder] = {}
        self._templates = Environment(
            loader=PackageLoader("prefect_nanogpt", "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True
        )
        self._templates.globals["style"] = STYLE
        filters: dict[str, Callable[..., str]] = {
            "in_url": lambda name: quote(name, safe=""),
            "waveform": draw_waveform,
            "duration": _duration,
            "cost": lambda cost: f"{Decimal(cost).normalize():f}",
            "moment": _moment,
        }
        self._templates.filters.update(filters)

    def app(self) -> Starlette:
        """Make the application. What its functions do is reading, so they run in threads."""
        app = Starlette(
            routes=[
                Route("/", self._start, methods=["GET"]),
                Route("/{folder}/", self._folder, methods=["GET"]),
                Route("/{folder}/all.zip", self._all, methods=["GET"]),
                Route("/{folder}/page/{file}", self._recording, methods=["GET"]),
                Route("/{folder}/{file}", self._audio, methods=["GET"]),
            ]
        )
        app.router.redirect_slashes = False
        return app

    def _folders(self) -> Mapping[str, Path]:
        return registered() if self._given is None else self._given

    def _asked_for(self, request: Request) -> Folder:
        name = request.path_params["folder"]
        path = self._folders().get(name)
        if path is None:
            raise HTTPException(404, "There is no such folder here.")
        try:
            return self._known.setdefault(name, Folder(path))
        except NanoGPTError as error:
            raise HTTPException(404, error.message) from None

    def _page(self, template: str, **values: Any) -> HTMLResponse:
        return HTMLResponse(self._templates.get_template(template).render(values))

    def _start(self, request: Request) -> Response:
        return self._page("start.html", folders=self._folders())

    def _folder(self, request: Request) -> Response:
        folder = self._asked_for(request)
        contents = folder.contents()
        pages = max(1, math.ceil(len(contents) / SHOWN))
        wanted = request.query_params.get("page", "")
        page = min(pages, max(1, int(wanted))) if re.fullmatch("[0-9]{1,9}", wanted) else 1
        shown = list(contents)[(page - 1) * SHOWN : page * SHOWN]
        lines = sum(recording.line is not None for recording in shown)
        told = [folder.details(recording) for recording in shown]
        return self._page(
            "folder.html",
            folder=folder.path,
            lines=told[:lines],
            others=told[lines:],
            has_lines=bool(contents.lines),
            heard=sum(recording.file is not None for recording in contents),
            failed=sum(recording.file is None for recording in contents),
            seconds=sum(recording.duration_seconds or 0.0 for recording in contents if recording.file),
            problem=contents.problem,
            page=page,
            pages=pages,
        )

    def _recording(self, request: Request) -> Response:
        folder = self._asked_for(request)
        path = self._file(request)
        found = next((found for found in folder.contents() if found.file == path.name), Recording(file=path.name))
        recording, status = folder.details(found), path.stat()
        if not recording.peaks:
            recording = replace(recording, peaks=_outline(path, status.st_size, status.st_mtime_ns))
        return self._page("recording.html", folder=folder.path, recording=recording, size_bytes=status.st_size)

    def _file(self, request: Request) -> Path:
        folder = self._folders().get(request.path_params["folder"])
        path = find_audio(folder, request.path_params["file"]) if folder else None
        if path is None:
            raise HTTPException(404, "There is no such audio here.")
        return path

    def _audio(self, request: Request) -> Response:
        path = self._file(request)
        return FileResponse(
            path,
            media_type=CONTENT_TYPES[EXTENSIONS[path.suffix[1:].lower()]],
            filename=path.name,
            stat_result=path.stat(),
            content_disposition_type="attachment" if "download" in request.query_params else "inline",
        )

    def _all(self, request: Request) -> Response:
        folder = self._asked_for(request)
        name = quote(f"{folder.path.name or 'speech'}.zip")
        headers = {"Content-Disposition": f"attachment; filename*=utf-8''{name}"}
        if request.method == "HEAD":
            return Response(media_type="application/zip", headers=headers)
        names = [recording.file for recording in folder.contents() if recording.file]
        return StreamingResponse(_zipped(folder.path, names), media_type="application/zip", headers=headers)


@lru_cache(maxsize=256)
def _outline(path: Path, size_bytes: int, modified: int) -> tuple[int, ...]:
    """Draw the outline of a file that no note has one of."""
    try:
        return inspect(path).peaks
    except (AudioError, OSError):
        return ()


def _zipped(folder: Path, names: Iterable[str]) -> Iterator[bytes]:
    """Put files together as they are, block by block: audio does not get smaller by being packed."""
    out = _Passing()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in names:
            path = find_audio(folder, name)
            if path is None:
                continue
            try:
                source = path.open("rb")
            except OSError:
                continue
            with source:
                found = os.fstat(source.fileno())
                modified = time.localtime(found.st_mtime)[:6]
                entry = zipfile.ZipInfo(name, max(EARLIEST_IN_ZIP, modified))
                entry.external_attr = 0o644 << 16
                entry.file_size = found.st_size  # so that what is large is announced as such
                with archive.open(entry, "w") as packed:
                    while block := source.read(BLOCK_BYTES):
                        packed.write(block)
                        yield out.take()
            yield out.take()
    yield out.take()


class _Passing:
    """A file that is written to and never read: what was written is handed on."""

    def __init__(self) -> None:
        self._blocks: list[bytes] = []

    def write(self, block: bytes, /) -> int:
        """Take what is written."""
        self._blocks.append(bytes(block))
        return len(block)

    def flush(self) -> None:
        """Do nothing, as there is nothing behind this."""

    def close(self) -> None:
        """Do nothing, likewise."""

    def take(self) -> bytes:
        """Give what was written since the last time."""
        blocks, self._blocks = self._blocks, []
        return b"".join(blocks)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def _moment(at: str) -> str:
    return f"{at[:16].replace('T', ' ')} UTC"
