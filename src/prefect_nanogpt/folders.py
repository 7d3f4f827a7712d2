"""The local folders that audio was saved to on this machine, which `prefect-nanogpt listen` serves.

They are noted in Prefect's home, a small file each, called by the id that stands for the folder in a URL.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote

from prefect.settings import PREFECT_HOME

__all__ = ["HOST", "LISTEN_URL", "PORT", "folder_id", "page_url", "register", "registered"]

HOST: Final = "127.0.0.1"
PORT: Final = 4201
LISTEN_URL: Final = "NANOGPT_LISTEN_URL"
"""The environment variable with the address that links in reports begin with."""


def folder_id(folder: str | os.PathLike[str]) -> str:
    """Give the id that stands for a folder, by whatever path it is reached.

    Example:
        >>> folder_id("/tmp/..") == folder_id("/")
        True
    """
    return hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:16]


def page_url(folder: str | os.PathLike[str], *path: str) -> str:
    """Give the address of the page of a folder, or of something of it."""
    base = (os.environ.get(LISTEN_URL) or f"http://127.0.0.1:{PORT}").rstrip("/")
    return "/".join([base, folder_id(folder), *(quote(part, safe="") for part in path or [""])])


def register(folder: str | os.PathLike[str]) -> None:
    """Note a folder, so that it is served. Where that fails it is not served, and nothing else comes of it."""
    entry = _noted() / folder_id(folder)
    with suppress(OSError):
        if not entry.exists():
            entry.parent.mkdir(parents=True, exist_ok=True)
            part = entry.with_name(f".{entry.name}.{os.getpid()}")
            part.write_bytes(os.fsencode(os.path.realpath(folder)))
            part.replace(entry)


def registered() -> dict[str, Path]:
    """Give the folders that were noted and that are there, by their ids, those that were noted last first."""
    found = []
    with suppress(OSError):
        for entry in os.scandir(_noted()):
            with suppress(OSError):
                folder = Path(os.fsdecode(Path(entry.path).read_bytes()))
                if entry.name == folder_id(folder) and folder.is_dir():
                    found.append((entry.stat().st_mtime, folder))
    return by_id(folder for _, folder in sorted(found, reverse=True))


def by_id(folders: Iterable[Path]) -> dict[str, Path]:
    """Give folders by their ids, with their paths resolved."""
    return {folder_id(folder): Path(os.path.realpath(folder)) for folder in folders}


def _noted() -> Path:
    return Path(PREFECT_HOME.value()) / "nanogpt" / "folders"
