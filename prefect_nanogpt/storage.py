"""Where audio goes: a local folder, any fsspec URL or a saved block, and never half a file.

Audio is streamed to a temporary local file, hashed on the way, checked, and only then moved or uploaded to its name.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Final, ParamSpec, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from prefect_nanogpt.errors import AudioError, StorageError
from prefect_nanogpt.models import AudioFile
from prefect_nanogpt.waveform import measure

try:
    import fcntl
except ImportError:  # Windows, which refuses by itself to delete a file that is open
    fcntl = None  # type: ignore[assignment]

__all__ = ["BLOCK", "Destination", "container_of", "file_stem", "is_intact"]

P = ParamSpec("P")
R = TypeVar("R")
LARGEST_AUDIO_BYTES: Final = 1024**3
CONTENT_TYPES: Final = {
    "mp3": "audio/mpeg",
    "wav": "audio/wav",
    "ogg": "audio/ogg",
    "flac": "audio/flac",
    "mp4": "audio/mp4",
    "aac": "audio/aac",
}
# An upload to these shows under its name only once it is whole. Elsewhere it goes to another name first.
_BUCKETS: Final = frozenset({"s3", "gs", "abfs", "memory"})
BLOCK: Final = "remote-file-system/"
_HEAD_BYTES: Final = 12
_BLOCK_BYTES: Final = 1024**2
_PART: Final = ".part"


def container_of(head: bytes) -> str | None:
    """Tell the container from the first bytes of a file (12 are enough); None where they are not audio.

    Example:
        >>> container_of(b"ID3\\x04\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00")
        'mp3'
    """
    if head.startswith(b"ID3"):
        return "mp3"
    if head.startswith(b"RIFF") and head[8:12] == b"WAVE":
        return "wav"
    if head.startswith(b"OggS"):
        return "ogg"
    if head.startswith(b"fLaC"):
        return "flac"
    if head[4:8] == b"ftyp":
        return "mp4"
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xF6 == 0xF0:
        return "aac"
    # An MPEG frame header: sync word, a version that exists, layer II or III, a bit rate that is not the forbidden one.
    # Layer I is as good as extinct, and UTF-16 text begins like it.
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        version, layer, bit_rate = head[1] >> 3 & 3, head[1] >> 1 & 3, head[2] >> 4
        if version != 1 and layer in (1, 2) and bit_rate != 15:
            return "mp3"
    return None


def file_stem(run_id: str) -> str:
    """Make a file name, without extension, of a run id, which is the provider's word and may hold anything.

    Ids that differ give names that differ.

    Example:
        >>> file_stem("98b0d593-fe8d-49b8-89c9-233022232297")
        '98b0d593-fe8d-49b8-89c9-233022232297'
    """
    if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", run_id):
        return run_id
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", run_id).strip("-")[:60]
    return f"{readable}-{hashlib.sha256(run_id.encode()).hexdigest()[:16]}".lstrip("-")


async def is_intact(audio: AudioFile, save_to: str | None = None) -> bool:
    """Whether audio is still where it was saved, with the same bytes.

    Args:
        audio: The audio.
        save_to: Where to look first, since a location in a bucket does not say which block has its credentials.

    Raises:
        StorageError: The bucket cannot be asked now. Whoever would pay for new audio instead had better not.
    """
    folder, _, name = audio.location.rpartition("/")
    for place in (save_to, folder):
        try:
            found = await Destination(place).find(name.rpartition(".")[0]) if place else None
        except StorageError as error:
            if error.retryable:
                raise
        else:
            if found is not None and (found.location, found.sha256) == (audio.location, audio.sha256):
                return True
    return False


class Destination:
    """A folder for audio: local, behind an fsspec URL such as `s3://bucket/speech`, or in a saved block.

    A URL's credentials are found as its driver does, in the environment and the usual files. A block is Prefect's
    Remote File System, which has URL and credentials together, referred to as `remote-file-system/BLOCK_NAME`.

    Args:
        save_to: A path, a URL, or the reference of a block.

    Raises:
        StorageError: The URL's protocol is not known, or its driver is not installed.

    Example:
        >>> Destination("audio").is_local
        True
    """

    def __init__(self, save_to: str) -> None:
        if not save_to.strip():
            raise StorageError("save_to is empty: give a folder or a URL such as s3://bucket/speech.")
        self._save_to = save_to
        # A block is loaded when it is needed, in a thread, because that asks the Prefect server.
        self.is_local = not save_to.startswith(BLOCK) and isinstance(self._fs, LocalFileSystem)

    async def check(self) -> None:
        """Make sure that a local folder exists and can be written, or that a bucket exists and can be read.

        Whether a bucket can be written to is only known once that is done.

        Raises:
            StorageError: The folder cannot be made or written, or the bucket cannot be reached.
        """
        await self._in_thread(self._try_folder if self.is_local else self._try_bucket)

    async def find(self, stem: str) -> AudioFile | None:
        """Look for finished audio of that name, whatever its extension. Nothing but finished audio ever has it.

        Raises:
            StorageError: It cannot be looked for.
        """
        return await self._in_thread(self._find, stem)

    async def save(self, chunks: AsyncIterator[bytes], stem: str, *, expected_bytes: int | None = None) -> AudioFile:
        """Stream audio to its place.

        Args:
            chunks: The bytes of the audio.
            stem: The name of the file; the extension follows from the bytes.
            expected_bytes: The announced size, where there is one.

        Returns:
            Location, container, size, digest and, where it can be told, duration.

        Raises:
            AudioError: The audio is empty, cut short, too large, or not audio at all. Nothing is left behind.
            StorageError: It cannot be written.
        """
        folder = Path(self._root) if self.is_local else Path(tempfile.gettempdir())
        _remove_leftovers(folder, "*" if self.is_local else stem)
        digest = hashlib.sha256()
        size = 0
        head = b""
        block = bytearray()
        writing: asyncio.Future[None] | None = None
        with self._explained(), _temporary_file(folder, stem) as (file, part):

            def write(block: bytearray) -> None:
                digest.update(block)
                file.write(block)

            try:
                async for chunk in chunks:
                    size += len(chunk)
                    if size > LARGEST_AUDIO_BYTES:
                        raise AudioError(f"The audio is larger than {LARGEST_AUDIO_BYTES} bytes.")
                    if len(head) < _HEAD_BYTES:
                        head += chunk[: _HEAD_BYTES - len(head)]
                    block += chunk
                    if len(block) >= _BLOCK_BYTES:  # written while the next one comes in
                        if writing is not None:
                            await writing
                        writing = asyncio.ensure_future(asyncio.to_thread(write, block))
                        block = bytearray()
            finally:
                if writing is not None:
                    await writing
            container = _checked(head, size, expected_bytes)

            def finish() -> tuple[float | None, tuple[int, ...], str]:
                write(block)
                file.flush()
                os.fsync(file.fileno())
                duration, peaks = measure(part, container)
                if fcntl is None:
                    file.close()
                return duration, peaks, self._publish(part, f"{stem}.{container}")

            duration, peaks, location = await asyncio.to_thread(finish)
        return AudioFile(
            location=location,
            container=container,
            content_type=CONTENT_TYPES[container],
            size_bytes=size,
            sha256=digest.hexdigest(),
            duration_seconds=duration,
            peaks=peaks,
        )

    def location_of(self, name: str) -> str:
        """Give the path or URL of a file here. A block must have been used before, since asking for it blocks."""
        return self._location(f"{self._root}/{name}")

    async def sizes(self) -> dict[str, int]:
        """List the files here: location and size in bytes.

        Raises:
            StorageError: They cannot be listed.
        """
        return await self._in_thread(self._sizes)

    async def read_text(self, name: str) -> str | None:
        """Read a small text file from here; None where there is none.

        Raises:
            StorageError: It cannot be read.
        """
        return await self._in_thread(self._read_text, name)

    async def append_text(self, name: str, text: str) -> None:
        """Add to a text file in a local folder.

        Raises:
            StorageError: It cannot be written.
        """
        await self._in_thread(self._append_text, name, text)

    async def write_text(self, name: str, text: str) -> None:
        """Write a text file, whole or not at all.

        Raises:
            StorageError: It cannot be written.
        """
        await self._in_thread(self._write_text, name, text)

    async def remove(self, name: str) -> None:
        """Remove a file from here.

        Raises:
            StorageError: It cannot be removed.
        """
        await self._in_thread(lambda: self._fs.rm_file(f"{self._root}/{name}"))

    def _sizes(self) -> dict[str, int]:
        self._fs.invalidate_cache()
        try:
            here = self._fs.ls(self._root, detail=True)
        except FileNotFoundError:
            return {}
        return {self._location(file["name"]): file["size"] for file in here if file["type"] == "file"}

    def _read_text(self, name: str) -> str | None:
        try:
            return bytes(self._fs.cat_file(f"{self._root}/{name}")).decode()
        except FileNotFoundError:
            return None

    def _append_text(self, name: str, text: str) -> None:
        with open(f"{self._root}/{name}", "a", encoding="utf-8") as file:
            file.write(text)

    def _write_text(self, name: str, text: str) -> None:
        folder = Path(self._root) if self.is_local else Path(tempfile.gettempdir())
        with _temporary_file(folder, name) as (file, part):
            file.write(text.encode())
            file.flush()
            self._publish(part, name)

    def _try_folder(self) -> None:
        folder = Path(self._root)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass

    def _try_bucket(self) -> None:
        if self._is_bucket:
            self._fs.find(self._root, prefix=_PART)

    def _find(self, stem: str) -> AudioFile | None:
        paths = {f"{self._root}/{stem}.{container}": container for container in CONTENT_TYPES}
        if self._is_bucket:  # one request instead of two for each container
            here = set(self._fs.find(self._root, prefix=f"{stem}."))
        else:
            here = {path for path in paths if self._fs.isfile(path)}
        for path, container in paths.items():
            if path not in here:
                continue
            digest = hashlib.sha256()
            with self._fs.open(path, "rb") as file:
                while chunk := file.read(1024**2):
                    digest.update(chunk)
            duration, peaks = measure(Path(path), container) if self.is_local else (None, ())
            return AudioFile(
                location=self._location(path),
                container=container,
                content_type=CONTENT_TYPES[container],
                size_bytes=self._fs.size(path),
                sha256=digest.hexdigest(),
                duration_seconds=duration,
                peaks=peaks,
            )
        return None

    def _publish(self, part: Path, name: str) -> str:
        path = f"{self._root}/{name}"
        if self.is_local:
            os.replace(part, path)
            return path
        try:
            if self._is_bucket:
                self._fs.put_file(str(part), path, **self._content_type(name))
            else:
                self._fs.makedirs(self._root, exist_ok=True)
                self._fs.put_file(str(part), path + _PART)
                self._fs.mv(path + _PART, path)
        except Exception as error:  # the drivers of buckets have families of errors of their own
            raise self._failure(error) from error
        return self._location(path)

    @cached_property
    def _place(self) -> tuple[Any, str]:
        url, settings = self._save_to, {}
        try:
            if url.startswith(BLOCK):
                from prefect.filesystems import RemoteFileSystem

                # In a thread there is no loop to await in, but the flow's context may still say so.
                block: Any = RemoteFileSystem.load(url.removeprefix(BLOCK), _sync=True)  # type: ignore[call-arg]
                url, settings = block.basepath, block.settings
            return fsspec.core.url_to_fs(url, **settings)  # type: ignore[no-any-return]
        except (ImportError, ValueError) as error:
            raise StorageError(f"save_to={self._save_to!r} cannot be used: {error}") from None

    @property
    def _fs(self) -> Any:
        return self._place[0]

    @property
    def _root(self) -> str:
        return self._place[1]

    @property
    def _protocols(self) -> set[str]:
        protocol = self._fs.protocol
        return {protocol} if isinstance(protocol, str) else set(protocol)

    @property
    def _is_bucket(self) -> bool:
        return not self._protocols.isdisjoint(_BUCKETS)

    def _content_type(self, name: str) -> dict[str, str]:
        """Name the MIME type as the driver wants it; drivers guess from the temporary name, which says nothing."""
        option = {"s3": "ContentType", "gs": "content_type"}
        content_type = CONTENT_TYPES.get(name.rpartition(".")[2], "application/jsonl")
        return {option[protocol]: content_type for protocol in self._protocols & option.keys()}

    def _location(self, path: str) -> str:
        return path if self.is_local else str(self._fs.unstrip_protocol(path))

    async def _in_thread(self, look: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await asyncio.to_thread(look, *args, **kwargs)
        except StorageError:
            raise
        except Exception as error:
            if self.is_local and not isinstance(error, OSError):
                raise
            raise self._failure(error) from error

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> StorageError:
        words = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        is_final = self.is_local or isinstance(error, (FileNotFoundError, PermissionError))
        return StorageError(f"{self._save_to} cannot be used: {words.rstrip('.')}.", retryable=not is_final)


def _checked(head: bytes, size: int, expected_bytes: int | None) -> str:
    if size == 0:
        raise AudioError("The audio is empty.", code="AUDIO_EMPTY", retryable=True)
    if expected_bytes is not None and size != expected_bytes:
        raise AudioError(
            f"The audio was cut short: {size} of {expected_bytes} bytes.",
            code="AUDIO_TRUNCATED",
            retryable=True,
        )
    container = container_of(head)
    if container is None:
        looks_like = "a web page" if head.lstrip()[:1] == b"<" else "JSON" if head.lstrip()[:1] in b"{[" else "data"
        raise AudioError(
            f"What the provider calls audio is {looks_like} that begins with {head!r}.",
            code="AUDIO_INVALID",
            retryable=True,
        )
    return container


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
