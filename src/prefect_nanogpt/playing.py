"""Playing audio on the machine in front of somebody, with whatever player there is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["DESKTOP", "play"]

DESKTOP: Final = "the desktop"


class _Player(NamedTuple):
    """A command that plays a file and ends; of which files, by their extensions: none for all."""

    command: tuple[str, ...]
    extensions: frozenset[str] = frozenset()


PLAYERS: Final = (
    _Player(("afplay",), frozenset({"mp3", "wav", "flac", "m4a", "mp4", "aac"})),
    _Player(("ffplay", "-nodisp", "-autoexit", "-loglevel", "error")),
    _Player(("mpv", "--no-video", "--really-quiet")),
    _Player(("paplay",), frozenset({"wav", "flac", "ogg", "oga"})),
    _Player(("aplay", "--quiet"), frozenset({"wav"})),
)


def play(path: Path) -> str | None:
    """Play a file to its end, and give what has played it; None where nothing can.

    Where no player is found, or none succeeds, it is `DESKTOP`, which opens the file with what it has for such files,
    and does not tell when that ends.
    """
    if sys.platform == "win32":
        os.startfile(path)
        return DESKTOP
    for command, extensions in PLAYERS:
        takes_it = not extensions or path.suffix[1:].lower() in extensions
        if takes_it and shutil.which(command[0]) and _succeeds([*command, str(path)]):
            return command[0]
    has_desktop = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if has_desktop and shutil.which("xdg-open") and _succeeds(["xdg-open", str(path)]):
        return DESKTOP
    return None


def _succeeds(command: list[str]) -> bool:
    quiet = subprocess.DEVNULL
    try:
        return subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, check=False).returncode == 0
    except OSError:
        return False
