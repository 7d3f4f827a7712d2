"""What the sandbox can be told to do: replies and faults from Python, directives in the text of a job."""

import re
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, Final, Literal, get_args

Surface = Literal["submit", "status", "audio", "balance", "models"]


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer in place of the normal one.

    Args:
        status: HTTP status code.
        json: Body as JSON; takes precedence over `body`.
        body: Body as it is, sent as `application/octet-stream`, or a text as `text/plain`, unless `headers`
            say otherwise.
        headers: Added to the answer; they win over what the sandbox would send.
        delay: Seconds before the first byte.
        chunked: Sent in pieces, by the chunked transfer encoding, without a Content-Length.
    """

    status: int = 200
    json: Any = None
    body: bytes | str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    chunked: bool = False


def Redirect(url: str, status: int = 302) -> Answer:  # named like the replies beside it
    """An answer that sends the client to another address."""
    return Answer(status=status, headers={"location": url})


@dataclass(frozen=True, slots=True)
class Cut:
    """Close the TCP connection.

    Args:
        after_bytes: Body bytes of the normal answer to send first, its full Content-Length being announced
            unless it is chunked.
            None: the request is not even looked at, and no answer begins. A submission is then not accepted;
            for one that is accepted and lost, see `Accept`.
    """

    after_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Hang:
    """Take the request, answer nothing for so many seconds, then close the connection."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Stall:
    """Give the normal answer with a silence of `seconds` after the first `after_bytes` bytes of its body."""

    after_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Slow:
    """Give the normal answer at so many body bytes per second."""

    bytes_per_second: float


@dataclass(frozen=True, slots=True)
class Accept:
    """Accept a submission and charge for it at once, then answer late, otherwise, or never.

    Args:
        delay: Seconds between the charge and what follows.
        then: What the client gets instead of the normal answer, e.g. `Cut()` or `Answer(status=500)`.
        status_code: Status of the ticket; 202 by the documentation, 200 by reports.
        minimal: The ticket has only `status` and `runId`.
        hex_run_id: The run id is 32 hexadecimal digits without dashes.
        qualified_model: The ticket names the model as the provider behind does, `fal-ai/…`, and status calls must
            too. A minimal ticket has no model, so it is asked for by the one that was sent.
    """

    delay: float = 0.0
    then: "Answer | Cut | Hang | Stall | Slow | None" = None
    status_code: int = 202
    minimal: bool = False
    hex_run_id: bool = False
    qualified_model: bool = False


Reply = Answer | Cut | Hang | Stall | Slow | Accept
"""Everything that a request can be answered with."""


class Scripts:
    """Replies waiting for the next requests, by surface and run id; None is for whichever comes."""

    def __init__(self) -> None:
        self._waiting: defaultdict[tuple[Surface, str | None], deque[Iterator[Reply | None]]] = defaultdict(deque)

    def add(self, surface: Surface, run_id: str | None, replies: Iterable[Reply | Mapping[str, Any] | None]) -> None:
        """Queue replies; a mapping is the JSON of a 200, None is the normal behaviour."""
        self._waiting[surface, run_id].append(map(_as_reply, replies))

    def forget(self, run_id: str) -> None:
        """Drop what waits for a job."""
        for surface in get_args(Surface):
            self._waiting.pop((surface, run_id), None)

    def take(self, surface: Surface, run_id: str | None) -> Reply | None:
        """Return the next reply for this request, or None for the normal behaviour."""
        if not self._waiting:
            return None
        for key in ((surface, run_id), (surface, None)):
            while queue := self._waiting.get(key):
                try:
                    return next(queue[0])
                except StopIteration:
                    queue.popleft()
            self._waiting.pop(key, None)
        return None


def _as_reply(reply: Reply | Mapping[str, Any] | None) -> Reply | None:
    return Answer(json=dict(reply)) if isinstance(reply, Mapping) else reply


@dataclass(slots=True)
class Directives:
    """What the text of a job asks of the sandbox.

    Args:
        spoken: The text without its directives.
        outcome: How the job ends; `stuck` never does.
        seconds: How long the job takes, where the text says it.
        scripts: Replies to queue for the job's status calls and downloads.
    """

    spoken: str
    outcome: Literal["complete", "reject", "fail", "stuck"] = "complete"
    seconds: float | None = None
    scripts: list[tuple[Surface, Iterable[Reply]]] = field(default_factory=list)


class DirectiveError(ValueError):
    """The text holds a directive that is not known, or lacks its number or has a wrong one, or holds too many."""


_KNOWN: Final = "reject, fail, stuck, wait N, busy N, throttle N, html, truncate, empty, gone"
_MOST_DIRECTIVES: Final = 100  # in a text
_LARGEST_NUMBER: Final = 86_400  # a day in seconds
_DIRECTIVE: Final = re.compile(r"\[sandbox:([^\]]*)\]\s?", re.IGNORECASE)
_HTML: Final = Answer(
    body="<!doctype html><title>Sandbox</title><p>A web page where audio was expected.",
    headers={"content-type": "text/html; charset=utf-8"},
)


def parse_directives(text: str) -> Directives:
    """Read the `[sandbox:…]` directives of a text.

    Raises:
        DirectiveError: If one is not understood; the message names the known ones.
    """
    found = Directives(spoken=_DIRECTIVE.sub("", text).strip() or "This is the sandbox.")
    directives = _DIRECTIVE.findall(text)
    if len(directives) > _MOST_DIRECTIVES:
        raise DirectiveError(f"A text may hold {_MOST_DIRECTIVES} directives of the sandbox at most.")
    for directive in directives:
        match [_number(word) for word in directive.lower().split()]:
            case [("reject" | "fail" | "stuck") as outcome]:
                found.outcome = outcome
            case ["wait", float(seconds)]:
                found.seconds = seconds
            case ["busy", float(times)]:
                found.scripts.append(("status", repeat(_legacy_error(503, "Service unavailable"), int(times))))
            case ["throttle", float(seconds)]:
                retry_after = {"retry-after": f"{seconds:g}"}
                found.scripts.append(("status", [_legacy_error(429, "Rate limit exceeded", retry_after)]))
            case ["html"]:
                found.scripts.append(("audio", repeat(_HTML)))
            case ["truncate"]:
                found.scripts.append(("audio", repeat(Cut(after_bytes=1000))))
            case ["empty"]:
                found.scripts.append(("audio", repeat(Answer(headers={"content-type": "audio/mpeg"}))))
            case ["gone"]:
                found.scripts.append(("audio", repeat(_legacy_error(404, "The file is gone"))))
            case _:
                known = f"{_KNOWN} (N a number up to {_LARGEST_NUMBER})"
                raise DirectiveError(f"[sandbox:{directive}] is not a directive. Known: {known}.")
    return found


def _number(word: str) -> str | float:
    is_number = re.fullmatch(r"\d+(\.\d+)?", word) and float(word) <= _LARGEST_NUMBER
    return float(word) if is_number else word


def _legacy_error(status: int, message: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, {"error": message, "status": status}, headers=headers or {})
