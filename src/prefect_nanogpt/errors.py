"""Everything that can go wrong, as one family of exceptions.

Each exception has a `code`, the word a run is filtered by in the Prefect UI, and its text starts with it. All of
them survive pickling, because Prefect carries them from a task or a child flow run to whoever awaits it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Final
from urllib.parse import quote, unquote

if TYPE_CHECKING:
    from prefect_nanogpt.lines import ManifestRow
    from prefect_nanogpt.models import Ticket

__all__ = [
    "AudioError",
    "BatchPartial",
    "ContentPolicyViolation",
    "CredentialsError",
    "NanoGPTError",
    "NothingSent",
    "ProviderError",
    "StorageError",
    "SubmissionUncertain",
    "TTSJobRejected",
    "TTSTimeout",
]

CONTENT_POLICY_VIOLATION = "CONTENT_POLICY_VIOLATION"
TTS_FAILED = "TTS_FAILED"
_EXTRAS: Final = {"audio": ("av",), "long": ("av", "regex", "sentencex")}
_LOGIN: Final = re.compile(r"(?<=://)([^/?#:\[]*):(?:([^/?#]*)|(?!\d*(?:[/?#]|$))(.*))@", re.DOTALL)
"""The user, who may be called as in an e-mail address, and the password of a URL; also a password that has a character
which ends the host in a URL."""
_URL_IN_WORDS: Final = re.compile(r"(?<=://)[^\s/?#:\[]*:[^\s/?#]*@")
LONGEST_CODE: Final = 64


def normalize_code(code: object) -> str | None:
    """Reduce a provider's code to `A-Z`, `0-9` and `_`, at most 64 characters; None where nothing is left.

    Example:
        >>> normalize_code("content-policy violation")
        'CONTENT_POLICY_VIOLATION'
    """
    if not isinstance(code, str):
        return None
    code = re.sub(r"[^A-Z0-9]+", "_", code[: 16 * LONGEST_CODE].upper()).strip("_")
    return code[:LONGEST_CODE].rstrip("_") or None


def without_login(url: str) -> str:
    """Give a URL, or a path, as it may be shown and kept. A user without a password is a part of the address.

    Example:
        >>> without_login("ftp://speaker:secret@host/speech"), without_login("sftp://speaker@host/speech")
        ('ftp://host/speech', 'sftp://speaker@host/speech')
    """
    return _LOGIN.sub("", url)


def secrets_in(url: str) -> list[str]:
    """List the users and passwords in a URL, which may be one in another, as they are written there."""
    logins = [(found[1], found[2] or found[3]) for found in _LOGIN.finditer(url)]
    return [part for user, password in logins if password for part in (user, password) if part]


def hide(secrets: Iterable[str], words: str) -> str:
    """Take secrets out of what somebody says, however they are written there, and the logins of URLs in it."""
    for secret in filter(None, secrets):
        plain = unquote(secret)
        for spelled in (secret, plain, quote(plain), quote(plain, safe="")):
            words = re.sub(rf"(?<!\w){re.escape(spelled)}(?!\w)", "***", words)
    return _URL_IN_WORDS.sub("", words)


def require_extra(extra: str, purpose: str) -> None:
    """Make sure, before anything is paid for, that what an extra brings is installed.

    Args:
        extra: The extra.
        purpose: What it is needed for, as the beginning of a sentence.

    Raises:
        NanoGPTError: It is not (code `EXTRA_MISSING`).
    """
    try:
        for module in _EXTRAS[extra]:
            import_module(module)
    except ImportError as error:
        raise NanoGPTError(
            f"{purpose}, install prefect-nanogpt[{extra}] ({error}). Nothing was submitted.", code="EXTRA_MISSING"
        ) from None


class NanoGPTError(Exception):
    """Base class of all errors of this package.

    Args:
        message: What happened and what to do next, without the code.
        code: The code to report instead of the class's own.
        retryable: Whether the same call may succeed if it is repeated, at no cost.
        ticket: The ticket of the job concerned, where there is one.
        http_status: The HTTP status that the provider answered with.
        request_id: The provider's `X-Request-ID`, to quote to its support.
        retry_after_seconds: How long the provider asked to wait, in seconds.

    Example:
        >>> str(NanoGPTError("The voice is unknown.", code="invalid_voice"))
        'INVALID_VOICE: The voice is unknown.'
    """

    default_code: ClassVar[str] = TTS_FAILED

    def __init__(
        self,
        message: str = "",
        *,
        code: str | None = None,
        retryable: bool = False,
        ticket: Ticket | None = None,
        http_status: int | None = None,
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        # Pickle calls the class with `args` and then restores the attributes, so `args` holds the message alone.
        super().__init__(message)
        self.message = message
        self.code = normalize_code(code) or self.default_code
        self.retryable = retryable
        self.ticket = ticket
        self.http_status = http_status
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class CredentialsError(NanoGPTError):
    """There is no usable API key. Raised before any request is made."""

    default_code = "MISSING_CREDENTIALS"


class ProviderError(NanoGPTError):
    """The API could not be reached, or answered with an error instead of a job's status."""


class NothingSent(ProviderError):
    """No byte of a submission left this machine, so nothing can have been charged."""


class TTSJobRejected(NanoGPTError):
    """The provider gave up on a job: it will never have audio. `ticket` says which.

    Attributes:
        is_certain: Whether the provider's status word is known to mean that. Where it is not, and the answer only looks
            like an end, nothing is submitted anew unasked.
    """

    is_certain: bool = True


class ContentPolicyViolation(TTSJobRejected):
    """The provider refused the text itself. The same text would be refused again."""

    default_code = CONTENT_POLICY_VIOLATION


class TTSTimeout(NanoGPTError):
    """The deadline passed while the job was still under way. The job itself goes on: wait for its `ticket` again."""

    default_code = "TTS_TIMEOUT"


class AudioError(NanoGPTError):
    """The finished job's audio could not be fetched, or what came is not audio."""

    default_code = "AUDIO_UNAVAILABLE"


class StorageError(NanoGPTError):
    """The audio cannot be written where it was asked to go."""

    default_code = "STORAGE_FAILED"


class SubmissionUncertain(NanoGPTError):
    """A submission left, and whether the provider accepted (and charged) it is not known. Never retried by itself."""

    default_code = "SUBMISSION_UNCERTAIN"


class BatchPartial(NanoGPTError):
    """Some lines of a batch have no audio.

    Attributes:
        rows: What became of each line, in the order of the lines.
    """

    default_code = "TTS_BATCH_PARTIAL"
    rows: list[ManifestRow]
