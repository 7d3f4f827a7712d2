"""What `prefect-nanogpt` runs first, while importing Prefect still takes its seconds.

It stands outside of the package, whose own import takes them. From here on Ctrl-C ends the process without a traceback,
and what nobody can take of the output ends nothing: a job that is paid for goes on.
"""

from __future__ import annotations

import io
import os
import signal
import sys

TYPE_CHECKING = False  # `typing` takes longer to import than all of this
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import TextIO

__all__ = ["STOP_SIGNALS", "main"]

FAILED = 1
BAD_USAGE = 2
STOP_SIGNALS = tuple(
    number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := getattr(signal, name, None)) is not None
)
LONGEST_REASON = 300


class Output(io.RawIOBase):
    """Standard output or error, which takes what it can.

    Args:
        raw: The stream; None where it was closed when the process began.

    Attributes:
        failure: Why something could not be written.
        lost: What could not be written.
    """

    def __init__(self, raw: io.RawIOBase | None) -> None:
        self._raw = raw
        self.failure: str | None = None
        self.lost = b""

    def writable(self) -> bool:
        """Whether it can be written to, as `io` asks."""
        return True

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        return self._raw is not None and self._raw.isatty()

    def fileno(self) -> int:
        """Give the file descriptor."""
        return self._raw.fileno() if self._raw is not None else super().fileno()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write what can be written, and make a note of the rest."""
        try:
            if self._raw is None:
                raise OSError(0, "it is closed")
            while (written := self._raw.write(data)) is None:  # somebody has made it non-blocking
                import select

                select.select((), (self._raw,), ())
            return written
        except OSError as error:
            self.failure = error.strerror or str(error)
            self.lost += bytes(data)
            return len(data)


def main() -> int:
    """Run the command line, and give the exit code."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    import atexit

    for descriptor in range(3):
        _keep_open(descriptor)
    output, errors = Output(_raw(sys.stdout)), Output(_raw(sys.stderr))
    sys.stdout, sys.stderr = _text(output, sys.stdout), _text(errors, sys.stderr)
    code = FAILED

    def leave() -> None:
        # Python's own end says what it could not write, with a traceback, and takes Ctrl-C for the signal that it is.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # the first one that is registered is the last one that is called
    code, settled = _run()
    sys.stdout.flush()
    if output.failure is not None:
        code = code or FAILED
        print(f"Standard output cannot be written: {output.failure}.{_in_one_line(output.lost)}", file=sys.stderr)
    settled(code)
    return code


def _leave(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)  # nothing has begun that would have to be ended


def _keep_open(descriptor: int) -> None:
    """Open what is closed, or else the next file or connection would be taken for it."""
    try:
        os.fstat(descriptor)
    except OSError:
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _raw(stream: TextIO | None) -> io.RawIOBase | None:
    buffer = getattr(stream, "buffer", None)
    return getattr(buffer, "raw", buffer)  # with PYTHONUNBUFFERED there is nothing in between


def _text(output: Output, stream: TextIO | None) -> io.TextIOWrapper:
    return io.TextIOWrapper(
        io.BufferedWriter(output),  # type: ignore[type-var]
        encoding=stream.encoding if stream is not None else "utf-8",
        errors="backslashreplace",  # a name that the terminal has no characters for ends nothing
        line_buffering=True,
    )


def _in_one_line(lost: bytes) -> str:
    lines = lost.decode(sys.stdout.encoding, errors="replace").splitlines()
    return f" It was to get: {lines[0]}" if len(lines) == 1 else ""


def _run() -> tuple[int, Callable[[int], None]]:
    if sys.argv[1:] == ["--version"]:
        from prefect_nanogpt import __version__

        print(__version__)
        return 0, lambda _: None
    try:
        from prefect_nanogpt import cli
    except Exception as error:  # such as a setting of Prefect, which reads all of them when it is imported
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        print(f"prefect-nanogpt cannot start: {type(error).__name__}: {reason}", file=sys.stderr)
        return BAD_USAGE if isinstance(error, ValueError) else FAILED, lambda _: None
    return cli.main(), cli.stop.settle
