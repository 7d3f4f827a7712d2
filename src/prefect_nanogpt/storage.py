"""Where audio goes: a local folder, any fsspec URL or a saved block, and never half a file.

Audio is streamed to a temporary local file, hashed on the way, checked, and only then moved or uploaded to its name.
"Cannot be read" is never taken for "not there": not there is `FileNotFoundError`, anything else is a `StorageError`.
"""

from __future__ import annotations

import asyncio
import errno
import ftplib
import hashlib
import os
import random
import re
import secrets
import socket
import stat
import tempfile
import threading
import time
import unicodedata
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Final, NamedTuple, ParamSpec, TypeVar
from urllib.parse import quote, unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import known_implementations
from prefect.settings import PREFECT_HOME

from prefect_nanogpt.audio import CONTENT_TYPES, EXTENSIONS, Sound, inspect
from prefect_nanogpt.errors import (
    AudioError,
    NanoGPTError,
    StorageError,
    hide,
    secrets_in,
    without_login,
)
from prefect_nanogpt.folders import LISTEN_URL, page_url
from prefect_nanogpt.models import AudioFile

try:
    import fcntl
except ImportError:  # Windows, which refuses by itself to delete a file that is open
    fcntl = None  # type: ignore[assignment]

__all__ = ["BLOCK", "Destination", "Links", "absolute", "file_stem", "problem_with_public_url"]

P = ParamSpec("P")
R = TypeVar("R")
LARGEST_AUDIO_BYTES: Final = 1024**3
# An upload to these shows under its name only once it is whole. Elsewhere it goes to another name first.
_BUCKETS: Final = frozenset({"s3", "gs", "abfs", "memory"})
# Their drivers create an object only where there is none, as one operation.
_EXCLUSIVE: Final = frozenset({"s3", "gs", "abfs", "memory"})
BLOCK: Final = "remote-file-system/"
PROBE: Final = "probe"
CREATE_ATTEMPTS: Final = 5
_ONE_THREAD: Final = threading.RLock()
_CONNECTING: Final = threading.Lock()
IDLE_SECONDS: Final = 20.0
SILENCE_SECONDS: Final = 30.0
FTP_BLOCK_BYTES: Final = 8 * 1024**2
"""Of a longer file the driver makes several transfers, each with an offset, which not every server takes."""
# The answers of an FTP server that say something about a file, or that a command is not known.
_ABOUT_THE_FILE: Final = frozenset({"450", "500", "501", "502", "504", "550", "553"})
# How S3 stores say that they do not know a header that botocore sends with an upload, or the body that goes with it.
_CHECKSUM_REFUSED: Final = frozenset({"NotImplemented", "XAmzContentSHA256Mismatch", "MissingContentLength"})
_UNUSABLE_HEADER: Final = frozenset({"InvalidArgument", "InvalidRequest", "BadRequest"})
_CHECKSUM_WORDS: Final = re.compile("checksum|aws-chunked|content-sha256|trailer", re.IGNORECASE)
_SIGNATURE: Final = re.compile(r"[?&](X-Amz-Signature|X-Goog-Signature|Signature|sig)=")
_TEMPORARY_KEY: Final = re.compile(r"[?&]x-amz-security-token=", re.IGNORECASE)
# What trying again does not mend.
_FINAL: Final = (FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError, ftplib.error_perm)
_BLOCK_BYTES: Final = 1024**2
_PART: Final = ".part"
# What a file system says that has no hard links.
_NO_LINKS: Final = frozenset({errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
# The devices of Windows, with any extension. Those with other characters in them get another name anyway.
_RESERVED: Final = re.compile(r"con|prn|aux|nul|(com|lpt)[0-9]", re.IGNORECASE)
# Settings of a block that no message may show.
_SECRET: Final = re.compile("user|pass|secret|token|key|credential", re.IGNORECASE)
PUBLIC_URL: Final = "NANOGPT_PUBLIC_URL"
PUBLIC_URL_FIELDS: Final = frozenset({"path", "bucket", "name"})
LONGEST_SIGNATURE: Final = timedelta(days=7)
"""What S3 and Google allow."""
SUBTITLES: Final = ("srt", "vtt")
"""The extensions of what has the name of the audio and goes where it goes."""
_OTHER_TYPES: Final = {"jsonl": "application/jsonl", "srt": "application/x-subrip", "vtt": "text/vtt"}
_AUDIO_NAME: Final = re.compile(rf"\.({'|'.join(EXTENSIONS)})$", re.IGNORECASE)


def file_stem(name: str) -> str:
    """Make a file name, without extension, of an id, which is somebody else's word and may hold anything.

    Names that differ give file names that differ. One that no system minds, in any folder, stays as it is.

    Example:
        >>> file_stem("98b0d593-fe8d-49b8-89c9-233022232297")
        '98b0d593-fe8d-49b8-89c9-233022232297'
        >>> file_stem("Übung 1: früh")
        'Ubung-1-fruh-8f3d09dca8536807'
    """
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name) and not _RESERVED.fullmatch(name):
        return name
    letters = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", letters).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:16]}".lstrip("-")


def absolute(save_to: str | os.PathLike[str]) -> str:
    """Give the place that `save_to` means, as an absolute path, a URL or the reference of a block.

    A relative folder is relative to the working directory. Prefect's process worker gives the run of a deployment a
    temporary one and removes it afterwards, audio included; there it is relative to `NANOGPT_HOME` instead, by default
    `nanogpt`, which if relative is relative to Prefect's home.

    Example:
        >>> absolute("s3://bucket/speech")
        's3://bucket/speech'
    """
    save_to = os.fspath(save_to)
    if "://" in save_to or "::" in save_to or save_to.startswith(BLOCK) or _problem_with(save_to):
        return save_to
    folder = Path(save_to).expanduser()
    if not folder.is_absolute() and _is_lost_with_the_run(Path.cwd()):
        folder = PREFECT_HOME.value() / Path(os.environ.get("NANOGPT_HOME") or "nanogpt").expanduser() / folder
    return os.path.abspath(folder)


def _problem_with(save_to: str) -> str | None:
    """Say why no folder can be meant, although the system might make one that is called so."""
    if not save_to.strip():
        return "save_to is empty: give a folder or a URL such as s3://bucket/speech."
    if "\0" in save_to:
        return f"save_to={without_login(save_to)!r} has a zero byte in it."
    scheme = re.match(r"([a-z][a-z0-9+.-]*):(?!//)", save_to)
    if scheme and scheme[1] in known_implementations and "::" not in save_to:
        return (
            f"save_to begins with {scheme[0]}, and a URL begins with {scheme[0]}//. Give a URL as a string: Path() "
            "takes a slash away."
        )
    if os.name != "nt" and re.match(r"[A-Za-z]:[\\/](?!/)|\\\\", save_to):
        return f"save_to={save_to!r} is a folder of Windows, and this machine is none: it would be a file name here."
    if save_to.startswith("~") and os.path.expanduser(save_to) == save_to:
        return f"save_to={save_to!r} begins with the home folder of a user who is not known on this machine."
    return None


def _is_lost_with_the_run(folder: Path) -> bool:
    # Prefect sets the variable in the process of a deployment's run, and in no other.
    return "PREFECT__FLOW_RUN_ID" in os.environ and is_temporary(folder)


def is_temporary(folder: Path) -> bool:
    """Whether a folder is in the system's temporary folder."""
    temporary = Path(tempfile.gettempdir()).resolve()
    return temporary in (folder.resolve(), *folder.resolve().parents)


def _how_it_is_served() -> str:
    """Say what has to run for the audio pages to be there; nothing where somebody has said where they are."""
    if os.environ.get(LISTEN_URL):
        return ""
    return f"served by `prefect-nanogpt listen`, or `serve`, on the machine {socket.gethostname()}, to browsers on it"


class Links(NamedTuple):
    """Where people can hear a file, and get it.

    Attributes:
        listen: Where a browser plays it.
        download: Where a browser keeps it; None where it can only be had in the first way.
        lasts: Until when, or through what, in words; empty where there is nothing to say.
    """

    listen: str
    download: str | None = None
    lasts: str = ""


def problem_with_public_url(template: str) -> str | None:
    """Say why a template of addresses at which people reach what is saved cannot be meant.

    Example:
        >>> problem_with_public_url("https://cdn.example.org/{path}") is None
        True
    """
    fields = set(re.findall(r"\{([^{}]*)\}", template))
    try:
        parts = urlsplit(template)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        is_address = False
    if not is_address:
        return "it is not an http or https URL"
    if parts.username is not None:
        return "it has a login, which would stand in every report"
    if unknown := sorted(fields - PUBLIC_URL_FIELDS):
        return f"{{{unknown[0]}}} is none of {{path}}, {{bucket}} and {{name}}"
    if not fields & {"path", "name"} or "{" in parts.netloc.replace("{bucket}", ""):
        return "it has neither {path} nor {name} behind its host, so every file would have the same address"
    return None


class _OneThread:
    """A file system for one thread at a time: drivers that are not asynchronous talk over one connection, if any.

    It is the same for all that this process does with an account, since many servers let few connections in. Servers
    end a connection that is idle while a job is waited for, and drivers keep it all the same, so it is looked at before
    it is used after a pause, and made anew after a failure.
    """

    def __init__(self, fs: Any) -> None:
        self._fs = fs
        self._is_lost = False
        self._used_at = float("-inf")
        self._can_be_lost = hasattr(fs, "_connect") and hasattr(fs, "ftp")  # FTP and SFTP
        if self._can_be_lost:
            _tame(fs)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._fs, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.turn():
                return found(*args, **kwargs)

        return call

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Have the file system to oneself, for several calls or to read a file of it."""
        with _ONE_THREAD:
            self._connect_again_if_lost()
            try:
                yield
            except (*_FINAL, NotImplementedError):
                raise
            except BaseException:
                self._is_lost = True
                raise
            finally:
                self._used_at = time.monotonic()

    def _connect_again_if_lost(self) -> None:
        if not self._can_be_lost:
            return
        if not self._is_lost and time.monotonic() - self._used_at > IDLE_SECONDS:
            connection = self._fs.ftp
            try:
                connection.voidcmd("NOOP") if isinstance(connection, ftplib.FTP) else connection.stat("/")
            except Exception:
                self._is_lost = True
        if self._is_lost:
            self._fs._connect()
            self._is_lost = False


def _tame(fs: Any) -> None:
    """Make the driver of FTP tell what is not there from what cannot be had, and that of SFTP not wait for ever.

    FTP's takes all that the server refuses for "not there", a lost connection and a login that has ended included. It
    also moves a long file in several pieces.
    """
    connect = fs._connect

    def listen() -> None:
        if hasattr(fs.ftp, "get_channel"):
            fs.ftp.get_channel().settimeout(SILENCE_SECONDS)
            return
        answer = fs.ftp.getresp

        def getresp() -> Any:
            try:
                return answer()
            except ftplib.Error as error:
                if str(error)[:3] in _ABOUT_THE_FILE:
                    raise
                raise ConnectionError(str(error)) from None

        fs.ftp.getresp = getresp

    def connect_and_listen() -> None:
        connect()
        listen()

    fs.blocksize = FTP_BLOCK_BYTES
    fs._connect = connect_and_listen
    listen()


_connections: Final[dict[str, _OneThread]] = {}
"""By the process (connections do not survive a fork), the driver, the server and the options."""


def _file_system(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Give the file system of a URL, connected, and the path in it."""
    protocol = fsspec.core.split_protocol(url)[0] or "file"
    driver = fsspec.get_filesystem_class(protocol)
    if driver.async_impl or issubclass(driver, LocalFileSystem) or "::" in url:
        fs, path = fsspec.core.url_to_fs(url, **options)
        return (fs if fs.async_impl or isinstance(fs, LocalFileSystem) else _OneThread(fs)), path
    asked = fsspec.config.apply_config(driver, options)
    key = repr((os.getpid(), driver, urlsplit(url).netloc, sorted(asked.items())))
    with _CONNECTING:
        if key not in _connections:
            _connections[key] = _OneThread(fsspec.core.url_to_fs(url, **options)[0])
    return _connections[key], driver._strip_protocol(url)


def _secrets_in(settings: Mapping[str, Any]) -> list[str]:
    """List what is secret in the settings of a driver, which may be in groups."""
    found = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += _secrets_in(value)
        elif isinstance(value, str) and _SECRET.search(name):
            found.append(value)
    return found


class _Place(NamedTuple):
    """A file system, the folder as its driver spells it, the host of its URL, and what is secret in URL or settings."""

    fs: Any
    root: str
    host: str
    secrets: list[str]


def _split_login(url: str) -> tuple[str, dict[str, str]]:
    """Take the user and the password out of a URL whose driver would take them from it without decoding them."""
    driver = fsspec.get_filesystem_class(fsspec.core.split_protocol(url)[0] or "file")
    found = {} if "::" in url else driver._get_kwargs_from_urls(url)
    login = {name: unquote(found[name]) for name in ("username", "password") if found.get(name)}
    return url.replace(f"{urlsplit(url).netloc.rpartition('@')[0]}@", "", 1) if login else url, login


class Destination:
    """A folder for audio: local, behind an fsspec URL such as `s3://bucket/speech`, or in a saved block.

    A URL's credentials are found as its driver does, in the environment and the usual files. A block is Prefect's
    Remote File System, which has URL and credentials together, referred to as `remote-file-system/BLOCK_NAME`.

    Args:
        save_to: A path, a URL, or the reference of a block.
        displaces: Whether audio that is saved here takes its name from other audio that has it. Otherwise the new
            audio gets the name `<name>.<digest>.<extension>`.

    Raises:
        StorageError: The URL's protocol is not known, or its driver is not installed.
        NanoGPTError: It is the name of an audio file (code `INVALID_REQUEST`).

    Example:
        >>> Destination("audio").is_local
        True
    """

    displaces: bool = True
    public_url: str | None = None
    """A template of the addresses at which people reach what is saved here; None for that of the environment."""
    _proven: ClassVar[set[str]] = set()
    """The places that this process has written to and read from."""

    def __init__(self, save_to: str | os.PathLike[str], *, displaces: bool = True) -> None:
        save_to = os.fspath(save_to)
        self.displaces = displaces
        if problem := _problem_with(save_to):
            raise StorageError(f"{problem} Nothing was submitted.")
        if _AUDIO_NAME.search(save_to):
            raise NanoGPTError(
                f"save_to={without_login(save_to)!r} is a folder, and this looks like a file. Give the folder, and "
                "the name of the file without its extension as `name`. Nothing was submitted.",
                code="INVALID_REQUEST",
            )
        self.save_to = absolute(save_to)
        """The place as it was given: it is never shown nor kept, since it may have a password in it."""
        # A block is loaded when it is needed, in a thread, because that asks the Prefect server.
        self.is_local = not save_to.startswith(BLOCK) and isinstance(self.fs, LocalFileSystem)

    def folder(self, name: str) -> Destination:
        """Give the folder of that name in this one."""
        folder = object.__new__(Destination)
        folder.save_to = f"{self.save_to.rstrip('/')}/{name}"
        folder.is_local = self.is_local
        folder._parent = (self, name)
        return folder

    @property
    def shown(self) -> str:
        """The place without the login that its URL may have, for messages and notes."""
        return without_login(self.save_to)

    async def save(
        self,
        chunks: AsyncIterator[bytes],
        stem: str,
        *,
        expected_bytes: int | None = None,
        largest_bytes: float | None = None,
        extension: str | None = None,
    ) -> AudioFile:
        """Stream audio to its place. Other audio that has the name is kept beside, as `<name>.<digest>.<extension>`,
        or keeps the name, if nothing is to be displaced here.

        Args:
            chunks: The bytes of the audio.
            stem: The name of the file, without its extension.
            expected_bytes: The announced size, where there is one.
            largest_bytes: The most that is accepted; None for what a download may have.
            extension: The extension of the file; None for what the bytes are.

        Returns:
            Location, container, size, digest and, with the extra `audio`, duration and outline.

        Raises:
            AudioError: The audio is empty, cut short, too large, or not audio at all. Nothing is left behind.
            StorageError: It cannot be written.
        """
        largest_bytes = LARGEST_AUDIO_BYTES if largest_bytes is None else largest_bytes
        _remove_leftovers(self._staging, "*" if self.is_local else stem)
        digest = hashlib.sha256()
        size = 0
        block = bytearray()
        writing: asyncio.Future[None] | None = None
        with self._explained(), _temporary_file(self._staging, stem) as (file, part):

            def write(block: bytearray) -> None:
                digest.update(block)
                file.write(block)

            try:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > largest_bytes:
                        raise AudioError(f"The audio is larger than {largest_bytes} bytes.")
                    block += chunk
                    if len(block) >= _BLOCK_BYTES:  # written while the next one comes in
                        if writing is not None:
                            await writing
                        writing = asyncio.ensure_future(asyncio.to_thread(write, block))
                        block = bytearray()
            finally:
                if writing is not None:
                    await writing
            if expected_bytes is not None and size not in (0, expected_bytes):
                raise AudioError(
                    f"The audio was cut short: {size} of {expected_bytes} bytes.",
                    code="AUDIO_TRUNCATED",
                    retryable=True,
                )

            def finish() -> tuple[Sound, str]:
                write(block)
                file.flush()
                with ThreadPoolExecutor(1) as disk:  # which may take as long over a large file as the decoder
                    synced = disk.submit(os.fsync, file.fileno())
                    sound = inspect(part)
                synced.result()
                if fcntl is None:
                    file.close()
                name = f"{stem}.{extension or sound.container}"
                return sound, self._publish(part, name, digest.hexdigest())

            sound, location = await self.run(finish)
        return _audio_file(location, sound, size, digest.hexdigest())

    def location_of(self, name: str) -> str:
        """Give the path or URL of a file here. A block must have been used before, since asking for it blocks."""
        return self._location(f"{self.root}/{name}")

    # What follows blocks: `run` runs it in a thread.

    def links(self, name: str) -> Links | None:
        """Give the addresses at which people can hear and get a file from here; None where there are none.

        They are public ones, if there is a template of those; else signed ones of a bucket; else, of a local folder,
        those of the audio pages.

        Raises:
            ValueError: The template cannot be used.
        """
        path = f"{self.root}/{name}"
        if template := self.public_url or os.environ.get(PUBLIC_URL):
            if problem := problem_with_public_url(template):
                raise ValueError(f"The public URL {without_login(template)} ({PUBLIC_URL}) is not used: {problem}.")
            bucket, _, rest = path.strip("/").partition("/") if self.is_bucket else ("", "", path.lstrip("/"))
            fields = {"path": quote(rest), "bucket": quote(bucket, safe=""), "name": quote(name, safe="")}
            return Links(re.sub(r"\{(\w+)\}", lambda field: fields[field[1]], template))
        if self.is_local:
            return Links(
                page_url(self.root, "page", name), f"{page_url(self.root, name)}?download", _how_it_is_served()
            )
        return self._signed(path, name)

    def links_to_all(self) -> Links | None:
        """Give the addresses of the page of a local folder and of all that it has; None elsewhere."""
        if not self.is_local or self.public_url or os.environ.get(PUBLIC_URL):
            return None
        return Links(page_url(self.root), page_url(self.root, "all.zip"), _how_it_is_served())

    @cached_property
    def _signer_for_s3(self) -> Any:
        """A file system like that of this place, which signs addresses as every bucket takes them.

        AWS's library signs them in the old way by default, which newer buckets refuse. The present way has the region
        in it, which is looked up, once: a signed address is not led on to the right one, as other requests are.
        """
        fs = self.fs
        options = dict(fs.storage_options)
        options["config_kwargs"] = {"signature_version": "s3v4", **(options.get("config_kwargs") or {})}
        finder = type(fs)(*fs.storage_args, **{**options, "cache_regions": True})
        finder.connect()
        client = fsspec.asyn.sync(finder.loop, finder.get_s3, self.root.partition("/")[0])
        region = {"region_name": client.meta.region_name}
        client_options = {**region, **(options.get("client_kwargs") or {})}
        return type(fs)(*fs.storage_args, **{**options, "cache_regions": False, "client_kwargs": client_options})

    def _signed(self, path: str, name: str) -> Links | None:
        """Give signed addresses; None where the driver has none, or no key to sign with."""
        attachment = f"attachment; filename*=utf-8''{quote(name, safe='')}"
        seconds = int(LONGEST_SIGNATURE.total_seconds())
        until = f"until {datetime.now(UTC) + LONGEST_SIGNATURE:%Y-%m-%d %H:%M} UTC"
        try:
            if "s3" in self._protocols:
                fs, as_heard, as_kept = self._signer_for_s3, {}, {"ResponseContentDisposition": attachment}
            elif "gs" in self._protocols:
                fs, as_heard = self.fs, {"version": "v4"}
                as_kept = {**as_heard, "response_disposition": attachment}
            elif "abfs" in self._protocols:
                # Older drivers store no type with a file.
                fs, as_heard = self.fs, {"content_type": CONTENT_TYPES[EXTENSIONS[name.rpartition(".")[2].lower()]]}
                as_kept = {**as_heard, "content_disposition": attachment}
            else:
                return None
            listen = str(fs.sign(path, expiration=seconds, **as_heard))
            download = str(fs.sign(path, expiration=seconds, **as_kept))
        except Exception:  # the drivers have families of errors of their own, and a link is only for convenience
            return None
        if not _SIGNATURE.search(listen):  # as anybody would ask, who has no key
            return None
        if _TEMPORARY_KEY.search(listen):
            until += " at most: the key that it is signed with is a temporary one, and ends it earlier"
        return Links(listen, download, until)

    def list_files(self, prefix: str = "") -> dict[str, int]:
        """List the files here whose names begin with `prefix`: name and size in bytes."""
        sizes = {}
        if self.is_local:
            try:
                names = os.listdir(self.root)
            except FileNotFoundError:
                return {}
            for name in names:
                if not name.startswith(prefix):
                    continue
                try:
                    found = os.stat(f"{self.root}/{name}")
                except FileNotFoundError:
                    if os.path.islink(f"{self.root}/{name}"):
                        raise  # something is there, and cannot be read
                    continue  # removed by another process in between
                if stat.S_ISREG(found.st_mode):
                    sizes[name] = found.st_size
            return sizes
        self.fs.invalidate_cache()
        with suppress(FileNotFoundError):
            if prefix and self.is_bucket:  # one request, however many objects there are
                files = self.fs.find(self.root, prefix=prefix, detail=True).values()
            else:
                files = self.fs.ls(self.root, detail=True)
            for file in files:
                folder, _, name = file["name"].rpartition("/")
                if file["type"] == "file" and name.startswith(prefix) and folder.strip("/") == self.root.strip("/"):
                    sizes[name] = file["size"]
        return sizes

    def read(self, name: str) -> bytes | None:
        """Read a small file from here; None where there is none."""
        for _ in range(2):
            try:
                if self.is_local:
                    return Path(self.root, name).read_bytes()
                return bytes(self.fs.cat_file(f"{self.root}/{name}"))
            except FileNotFoundError:
                # FTP has one answer for a file that is not there and for one that may not be read.
                if self.is_local or self.is_bucket or name not in self.list_files(name):
                    return None
        raise StorageError(f"{name} in {self.shown} is there and cannot be read.")

    def create(self, name: str, content: bytes) -> bool:
        """Create a small file, durably, where there is none; whether this call has created it.

        The content must be the caller's alone: a driver that tries again by itself after a lost answer is told that
        the file is there, and then only the content says by whom.

        Raises:
            StorageError: It is not known whether the file was created.
        """
        path = f"{self.root}/{name}"
        if self.is_local:
            return _create(Path(path), content)
        if not self.claims_exclusively:
            with _ONE_THREAD:
                if self.read(name) is not None:
                    return False
                try:
                    self.write(name, content)
                except StorageError:
                    if self.read(name) != content:  # else only the answer was lost
                        raise
            return True
        for attempt in range(CREATE_ATTEMPTS):
            try:
                self.fs.pipe_file(path, content, mode="create")
                return True
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:
                # Besides "it is there" this may be a lost answer, or a 409, which only says that somebody is at it.
                if (found := self.read(name)) is not None:
                    return found == content
                _pause(attempt, self.failure(error))
        raise AssertionError

    @cached_property
    def claims_exclusively(self) -> bool:
        """Whether a file can be created here by one of several that try at once. Some stores ignore the condition.

        Raises:
            StorageError: What is written here is not listed, or cannot be read.
        """
        if self.is_local:
            return True
        is_exclusive = not self._protocols.isdisjoint(_EXCLUSIVE) and self._creates_once()
        if not is_exclusive:
            self._write_probe(PROBE)
        return is_exclusive

    def _write_probe(self, name: str) -> None:
        self.write(name, b"What is written here must be seen here.")
        self._see_probe(name)

    def _see_probe(self, name: str = PROBE) -> None:
        # Whether a bucket can be listed is known by now.
        if self.read(name) is None or not (self.is_bucket or name in self.list_files(name)):
            raise StorageError(
                f"{self.shown} does not show what is written to it, so what is paid for could not be found again."
            )

    def _creates_once(self) -> bool:
        probe = f"{self.root}/{PROBE}"
        created = 0
        for attempt in range(CREATE_ATTEMPTS):
            try:
                self.fs.pipe_file(probe, b"Two writers cannot both create this.", mode="create")
                created += 1
                if created == 2:
                    return False
            except (FileNotFoundError, PermissionError):
                raise
            except Exception as error:
                if _says_it_exists(error):
                    if created:  # by this call: the place is new
                        self._see_probe()
                    return True
                if isinstance(error, OSError) and error.errno == errno.ENOSYS:
                    return False
                _pause(attempt, self.failure(error))
        raise AssertionError

    def remove(self, name: str) -> None:
        """Remove a file from here, if it is there."""
        with suppress(FileNotFoundError):
            if self.is_local:
                os.unlink(f"{self.root}/{name}")
            else:
                self.fs.rm_file(f"{self.root}/{name}")

    def copy_from(self, place: Destination, name: str, stem: str, audio: AudioFile) -> str | None:
        """Copy a file from a folder to this one, and give its location. Other audio is kept as `save` does.

        None where the file is gone, or has other bytes by now.
        """
        digest = hashlib.sha256()
        with _temporary_file(self._staging, stem) as (file, part):
            try:
                with place._turn(), place.fs.open(f"{place.root}/{name}", "rb") as source:
                    while block := source.read(_BLOCK_BYTES):
                        digest.update(block)
                        file.write(block)
            except FileNotFoundError:
                return None
            if digest.hexdigest() != audio.sha256:
                return None
            _sync(file)
            if fcntl is None:
                file.close()
            return self._publish(part, f"{stem}.{audio.container}", audio.sha256)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all, over what is there."""
        with _temporary_file(self._staging, file_stem(name)) as (file, part):
            file.write(content)
            _sync(file)
            self._move(part, name)

    def check(self) -> None:
        """Make sure that a local folder exists and can be written, or that a bucket exists and can be read."""
        if self.is_local:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        elif self.is_bucket:
            self.fs.find(self.root, prefix=_PART)

    def prove(self) -> None:
        """Make sure of a place that is not a local folder that what is written here can be read again.

        Raises:
            StorageError: It cannot.
        """
        if self.is_local or self.save_to in self._proven:
            return
        name = f"{PROBE}-{secrets.token_hex(8)}"  # nobody else's, who looks at the same moment
        self._write_probe(name)
        with suppress(Exception):  # to delete is no right that is needed
            self.remove(name)
        self._proven.add(self.save_to)

    def find(self, stem: str) -> AudioFile | None:
        """Look for finished audio of that name, whatever its extension; None also where it is damaged."""
        for name, size in self._audio_called(stem).items():
            path = f"{self.root}/{name}"
            with tempfile.TemporaryDirectory() as temporary, suppress(AudioError):
                sound = inspect(self.fetch(name, Path(temporary)))
                return _audio_file(self._location(path), sound, size, self._digest(path))
        return None

    def fetch(self, name: str, into: Path) -> Path:
        """Give the path of a file here, or where this is not a local folder, of a copy of it in the folder `into`."""
        if self.is_local:
            path = Path(self.root, name)
            path.stat()  # it must be there
            return path
        into.mkdir(exist_ok=True)
        path = into / name
        with self._turn():
            self.fs.get_file(f"{self.root}/{name}", str(path))
        return path

    def _audio_called(self, stem: str, *extensions: str) -> dict[str, int]:
        """List the audio of that name, with the extension of a container or one of these: file name, size in bytes."""
        names = [f"{stem}.{extension}" for extension in {**CONTENT_TYPES, **dict.fromkeys(extensions)}]
        if self.is_local:  # listing a folder of thousands for each file is slow
            return {name: os.path.getsize(path) for name in names if (path := Path(self.root, name)).is_file()}
        here = self.list_files(f"{stem}.")
        return {name: here[name] for name in names if name in here}

    def has(self, name: str, size_bytes: int, sha256: str) -> bool:
        """Whether a file is here with these bytes."""
        path = f"{self.root}/{name}"
        try:
            self.fs.invalidate_cache()
            if int(self.fs.info(path)["size"]) != size_bytes:
                return False
            return self._digest(path) == sha256
        except FileNotFoundError:
            return False

    def _digest(self, path: str) -> str:
        digest = hashlib.sha256()
        with self._turn(), self.fs.open(path, "rb") as file:
            while chunk := file.read(_BLOCK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def _publish(self, part: Path, wanted: str, sha256: str) -> str:
        """Move audio to its name. Other audio that has the name was paid for, and is kept."""
        stem, _, extension = wanted.rpartition(".")
        while True:
            is_there = False
            for name in self._audio_called(stem, extension):
                with suppress(FileNotFoundError):  # somebody else has moved it
                    old = self._digest(f"{self.root}/{name}")
                    is_there |= old == sha256
                    if old != sha256 and not self.displaces:
                        return self._move(part, kept_name(wanted, sha256))
                    if old != sha256:
                        self._keep(name, old)
            if not self.is_local or is_there:
                return self._move(part, wanted)
            try:
                os.link(part, f"{self.root}/{wanted}")  # never over audio that another run has saved in between
            except FileExistsError:
                continue
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return self._move(part, wanted)
            _sync_folder(Path(self.root))
            return f"{self.root}/{wanted}"

    def _keep(self, name: str, sha256: str) -> None:
        """Move audio that is displaced aside, and its subtitles with it."""
        stem = name.rpartition(".")[0]
        beside = {f"{stem}.{extension}" for extension in SUBTITLES} & self.list_files(f"{stem}.").keys()
        for one in [name, *sorted(beside)]:
            self.fs.mv(f"{self.root}/{one}", f"{self.root}/{kept_name(one, sha256)}")

    def _move(self, part: Path, name: str) -> str:
        path = f"{self.root}/{name}"
        if self.is_local:
            os.replace(part, path)
            _sync_folder(Path(self.root))
            return path
        try:
            if self.is_bucket:
                self.fs.put_file(str(part), path, **self._content_type(name))
            else:
                self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
                self.fs.put_file(str(part), path + _PART)
                self._rename(path + _PART, path)
        except Exception as error:  # the drivers of buckets have families of errors of their own
            raise self.failure(error) from self.cause(error)
        return self._location(path)

    def _rename(self, path: str, to: str) -> None:
        """Rename a file, over what is there: some servers refuse that, and want it to be deleted first."""
        try:
            self.fs.mv(path, to)
        except Exception:
            name = to.rpartition("/")[2]
            if name not in self.list_files(name):
                raise
            self.fs.rm_file(to)
            self.fs.mv(path, to)

    def __getstate__(self) -> dict[str, Any]:
        # A connection stays in its process.
        return {name: value for name, value in vars(self).items() if name != "_place"}

    _parent: tuple[Destination, str] | None = None

    @cached_property
    def _place(self) -> _Place:
        if self._parent is not None:
            parent, name = self._parent
            return parent._place._replace(root=f"{parent.root}/{name}")
        url, settings = self.save_to, {}
        secrets: list[str] = []
        if any(set("/?#") & set(secret) for secret in secrets_in(url)):
            raise StorageError(
                f"The password in save_to={self.shown!r} has a character that ends the host in a URL: write / as %2F, "
                "? as %3F, # as %23 and @ as %40. Nothing was submitted."
            )
        try:
            if url.startswith(BLOCK):
                from prefect.filesystems import RemoteFileSystem

                # In a thread there is no loop to await in, but the flow's context may still say so.
                block: Any = RemoteFileSystem.load(url.removeprefix(BLOCK), _sync=True)  # type: ignore[call-arg]
                url, settings = block.basepath, block.settings
            secrets += secrets_in(url)
            bare, login = _split_login(url)
            secrets += _secrets_in({**fsspec.config.conf, "settings": settings})
            fs, root = _file_system(bare, login | settings)
        except Exception as error:  # some drivers log in at once
            is_final = isinstance(error, (ImportError, ValueError, ftplib.error_perm))
            words = hide(secrets, str(error))
            raise StorageError(f"save_to={self.shown!r} cannot be used: {words}", retryable=not is_final) from None
        return _Place(fs, root.rstrip("/"), urlsplit(without_login(url)).netloc, secrets)

    def _turn(self) -> AbstractContextManager[Any]:
        return self.fs.turn() if isinstance(self.fs, _OneThread) else nullcontext()

    @property
    def _staging(self) -> Path:
        """The folder in which a file is written before it is moved into place."""
        return Path(self.root) if self.is_local else Path(tempfile.gettempdir())

    @property
    def fs(self) -> Any:
        """The fsspec file system."""
        return self._place.fs

    @property
    def root(self) -> str:
        """The folder as its driver spells it."""
        return self._place.root

    @property
    def _protocols(self) -> set[str]:
        protocol = self.fs.protocol
        return {protocol} if isinstance(protocol, str) else set(protocol)

    @property
    def is_bucket(self) -> bool:
        """Whether an upload shows under its name only once it is whole, and folders are parts of names."""
        return not self._protocols.isdisjoint(_BUCKETS)

    def _content_type(self, name: str) -> dict[str, Any]:
        """Name the MIME type as the driver wants it; drivers guess from the temporary name, which says nothing."""
        option = {"s3": "ContentType", "gs": "content_type"}
        extension = name.rpartition(".")[2].lower()
        content_type = CONTENT_TYPES.get(EXTENSIONS.get(extension, "")) or _OTHER_TYPES.get(extension, "text/plain")
        if "abfs" in self._protocols:
            from azure.storage.blob import ContentSettings

            return {"content_settings": ContentSettings(content_type=content_type)}
        return {option[protocol]: content_type for protocol in self._protocols & option.keys()}

    def _location(self, path: str) -> str:
        if self.is_local:
            return path
        location = without_login(str(self.fs.unstrip_protocol(path)))
        # The drivers of other machines, SFTP's for one, leave out which machine it is.
        return location.replace(":///", f"://{self._place.host}/", 1) if hasattr(self.fs, "host") else location

    async def run(self, look: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run what blocks in a thread; whatever the driver raises becomes a `StorageError`."""
        try:
            return await asyncio.to_thread(look, *args, **kwargs)
        except NanoGPTError:
            raise
        except Exception as error:
            if self.is_local and not isinstance(error, OSError):
                raise
            raise self.failure(error) from self.cause(error)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self.failure(error) from self.cause(error)

    def failure(self, error: Exception) -> StorageError:
        """Make the error of a failed access."""
        words = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        words = hide(self._secrets, words).rstrip(".")
        hint = _hint_about_checksums(error)
        is_final = bool(hint) or isinstance(error, _FINAL)
        return StorageError(f"{self.shown} cannot be used: {words}.{hint}", retryable=not is_final)

    def cause(self, error: Exception) -> Exception | None:
        """Give what to name as the cause of a failed access: nothing where a traceback could show a password."""
        return None if self._secrets else error

    @property
    def _secrets(self) -> list[str]:
        place: _Place | None = vars(self).get("_place")  # without loading a block
        return place.secrets if place else secrets_in(self.save_to)


def _audio_file(location: str, sound: Sound, size: int, sha256: str) -> AudioFile:
    return AudioFile(
        location=location,
        container=sound.container,
        content_type=CONTENT_TYPES[sound.container],
        size_bytes=size,
        sha256=sha256,
        duration_seconds=sound.duration_seconds,
        peaks=sound.peaks,
        is_decoded=sound.is_decoded,
    )


def kept_name(name: str, sha256: str) -> str:
    """Give the name under which audio is kept once other audio has taken its own.

    Example:
        >>> kept_name("line-7.mp3", "0a1b2c3d4e5f")
        'line-7.0a1b2c3d.mp3'
    """
    stem, _, extension = name.rpartition(".")
    return f"{stem}.{sha256[:8]}.{extension}"


def _says_it_exists(error: Exception) -> bool:
    """Whether a driver was told that a file exists: s3fs says so only where the store names the failed condition."""
    status = _s3_answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return isinstance(error, FileExistsError) or status == 412


def _s3_answer(error: Exception) -> dict[str, Any]:
    """Give what an S3 store has answered, of whose error the driver has made one of its own."""
    return getattr(error, "response", None) or getattr(error.__cause__, "response", None) or {}


def _hint_about_checksums(error: Exception) -> str:
    """Say what helps where a store refuses the checksums that botocore adds to each upload since 1.36."""
    said = _s3_answer(error).get("Error", {})
    code, words = str(said.get("Code")), str(said.get("Message"))
    names_them = code in _UNUSABLE_HEADER and _CHECKSUM_WORDS.search(words)
    if os.environ.get("AWS_REQUEST_CHECKSUM_CALCULATION") == "when_required":
        return ""
    if code not in _CHECKSUM_REFUSED and not names_them:
        return ""
    return (
        " Some stores refuse the checksums that AWS's library sends with every upload. Set "
        "AWS_REQUEST_CHECKSUM_CALCULATION=when_required and AWS_RESPONSE_CHECKSUM_VALIDATION=when_required in the "
        "environment."
    )


def _pause(attempt: int, failure: StorageError) -> None:
    """Wait before another attempt; after the last one, fail."""
    if attempt == CREATE_ATTEMPTS - 1:
        raise failure
    time.sleep(0.1 * 2**attempt * (1 + random.random()))


def _create(path: Path, content: bytes) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{secrets.token_hex(8)}{_PART}")
    try:
        _write_durably(part, content)
        try:
            os.link(part, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # Others may see it empty for a moment, and take that for a submission of unknown outcome, as they should.
            try:
                _write_durably(path, content)
            except FileExistsError:
                raise
            except OSError:
                path.unlink(missing_ok=True)  # half a note, of a full disk
                raise
    except FileExistsError:
        return path.read_bytes() == content  # a network file system may have done it, and lost the answer
    finally:
        part.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system has a way."""
    with suppress(PermissionError):  # Windows opens no folders, and needs no such thing
        opened = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


@contextmanager
def _temporary_file(folder: Path, stem: str) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a temporary file that is locked for as long as its process lives."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{stem}.{secrets.token_hex(4)}{_PART}"
    try:
        with part.open("xb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            # Between the opening and the lock it looked like a leftover.
            if part.exists():
                yield file, part
                return
        with _temporary_file(folder, stem) as another:
            yield another
    finally:
        part.unlink(missing_ok=True)


@lru_cache(maxsize=1024)
def _remove_leftovers(folder: Path, stem: str) -> None:
    """Remove the temporary files whose process was killed: those that nobody holds a lock on.

    Once in a process is enough, and looking through a folder of thousands for each new file is slow.
    """
    for leftover in folder.glob(f".{stem}.????????{_PART}"):
        with suppress(OSError), leftover.open("rb") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink()
