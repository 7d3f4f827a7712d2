"""The command line: `prefect-nanogpt say`, `batch`, `wait`, `models`, `voices`, `balance`, `ledger`, `listen`, `serve`,
`deploy` and `sandbox`.

What is being done goes to standard error. Standard output gets the location of the audio, or of the manifest of a
batch, or what was asked for (`models`, `voices`, `balance`, `ledger`, `--dry-run`), and nothing else.
"""

from __future__ import annotations

import asyncio
import codecs
import logging
import math
import os
import shlex
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
from cyclopts import App, CycloptsError, Parameter, validators
from prefect.exceptions import ParameterTypeError
from prefect.logging.configuration import setup_logging
from pydantic import TypeAdapter, ValidationError
from rich.status import Status
from rich.text import Text

import prefect_nanogpt.flows
import prefect_nanogpt.tasks
from prefect_nanogpt import NanoGPTCredentials, __version__
from prefect_nanogpt.accounting import ledger
from prefect_nanogpt.client import INVALID_CREDENTIALS
from prefect_nanogpt.deploying import deploy, serve
from prefect_nanogpt.errors import (
    AudioError,
    BatchPartial,
    ContentPolicyViolation,
    NanoGPTError,
    SubmissionUncertain,
    TTSJobRejected,
    without_login,
)
from prefect_nanogpt.events import LOGIN_LEFT_OUT
from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.flows.forms import LONGEST_TIMEOUT_SECONDS
from prefect_nanogpt.folders import HOST, PORT
from prefect_nanogpt.job import RESUBMIT, Resubmit
from prefect_nanogpt.lines import COMPLETED, read_lines
from prefect_nanogpt.lines import FILE_NAME as MANIFEST
from prefect_nanogpt.lookups import balance, dry_run, models, voices
from prefect_nanogpt.models import (
    DEFAULT_MODEL,
    AudioFile,
    Money,
    Ticket,
    TTSRequest,
    field_of,
    options_of,
    problems_in,
    request_with,
)
from prefect_nanogpt.playing import DESKTOP
from prefect_nanogpt.playing import play as play_audio
from prefect_nanogpt.pronunciation import read_pronunciation
from prefect_nanogpt.shell import (
    JOB_FAILED,
    PREFECT_FAILED,
    Port,
    UsageError,
    Words,
    check_environment,
    console,
    credentials_or_sandbox,
    prefect_api,
    prefect_failed,
    stop,
)
from prefect_nanogpt.storage import Destination, absolute
from prefect_nanogpt.subtitles import SubtitleFormat
from prefect_nanogpt.tables import option_value

__all__ = ["main", "stop"]


def _is_finite(_: Any, number: float | Decimal | None) -> None:
    if number is not None and not math.isfinite(number):
        raise ValueError("Must be a finite number.")


def _is_money(_: Any, usd: Decimal | None) -> None:
    try:
        MONEY.validate_python(usd)
    except ValidationError as error:
        raise ValueError(f"Must be an amount of money: {problems_in(error)[0]}.") from None


MOST: Final = 2**31 - 1
MONEY: Final[TypeAdapter[Any]] = TypeAdapter(Money | None)
Seconds = Annotated[float, Parameter(validator=[_is_finite, validators.Number(gt=0, lte=LONGEST_TIMEOUT_SECONDS)])]
PositiveInt = Annotated[int, Parameter(validator=validators.Number(gte=1, lte=MOST))]
Usd = Annotated[Decimal | None, Parameter(validator=_is_money)]
SEVERAL: Final = Parameter(negative=(), consume_multiple=False, show_default=False)
BAD_USAGE: Final = 2
LONGEST_USAGE: Final = 1_000
LONGEST_TEXT: Final = 16 * 1024 * 1024
"""In bytes. What is sent to Prefect as a parameter may be far shorter; this keeps an endless file out of the memory."""
LONGEST_ARGUMENT: Final = 60
UTF_16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
GO_ON: Final = (
    "Whatever was submitted is paid for, and is found again; what was not, or has failed by then, is submitted and "
    "charged. To go on:"
)
WAIT_ON: Final = "The job goes on. To wait for it again, at no cost:"


app = App(
    name="prefect-nanogpt",
    help="NanoGPT's asynchronous text-to-speech, tracked in Prefect.",
    version=__version__,
    exit_on_error=False,
    print_error=False,
)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What `say` and `batch` have in common.

    Attributes:
        model: The provider's model id; in a batch, of the lines that name none.
        voice: A voice of the model; in a batch, of the lines that name none.
        option: A further option of the model, as key=value, where the value may be JSON; any number of times.
        save_to: A folder, or an fsspec URL such as s3://bucket/speech.
        timeout_seconds: How long to wait for a job, in seconds.
        max_cost: The most that all may cost, in USD, earlier runs and failed tries included.
        take: Which rendition; another number is another job, and is paid for.
        resubmit: Submit anew what is uncertain, lost or refused, although it may have been charged for.
        subtitles: Write subtitles beside the audio, under its name; vtt is WebVTT.
        pronounce: A table (CSV) of what to say for words, with the columns word and say.
        strict: Refuse a model or voice that the provider's catalogue does not have.
        dry_run: Show what it would cost, by the catalogue and what is paid for, and submit nothing.
    """

    model: Words = DEFAULT_MODEL
    voice: Words | None = None
    option: Annotated[tuple[str, ...], SEVERAL] = ()
    save_to: Words = "audio"
    timeout_seconds: Seconds = 600.0
    max_cost: Usd = None
    take: PositiveInt = 1
    resubmit: Annotated[tuple[Resubmit, ...], SEVERAL] = ()
    subtitles: SubtitleFormat | None = None
    pronounce: Words | None = None
    strict: Annotated[bool, Parameter(negative=())] = False
    dry_run: Annotated[bool, Parameter(negative=())] = False

    @property
    def parameters(self) -> dict[str, Any]:
        """Give them as the flows take them.

        Raises:
            UsageError: Something is wrong with an option of the model, or with the pronunciation.
        """
        try:
            read_pronunciation(self.pronounce)
        except NanoGPTError as error:
            raise UsageError(f"--pronounce: {error.message.removeprefix('pronounce: ')}") from None
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "dry_run"}
        return {"options": _options(given.pop("option")), **given}


@app.command
def say(
    text: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    *,
    file: Path | None = None,
    speed: Annotated[float | None, Parameter(validator=_is_finite)] = None,
    response_format: Words | None = None,
    name: Words | None = None,
    play: Annotated[bool, Parameter(negative=())] = False,
    job: JobOptions = JobOptions(),
) -> int:
    """Say a text and save the audio. Without an API key, the sandbox says it.

    Run again, the same command finds what it has paid for, and pays nothing.

    Args:
        text: What to say; - for standard input.
        file: A UTF-8 file with what to say, in the place of a text.
        speed: The speaking rate, from 0.1 to 5.
        response_format: The container, for the models that offer a choice.
        name: What to call the file, without extension; the provider's run id by default.
        play: Play it then, with a player of this machine.
    """
    said = _text_of(text, file)
    parameters = job.parameters | {"speed": speed, "response_format": response_format}
    named = {name: parameters[name] for name in ("model", "voice", "speed", "response_format")}
    given = {name: value for name, value in named.items() if value is not None}
    with _usage():
        request_with(parameters["options"], {**given, "text": said})
    if job.dry_run:
        return dry_run(said, **_of_an_estimate(parameters))

    saved: list[str] = []

    async def run(credentials: NanoGPTCredentials) -> str:
        audio: AudioFile = await text_to_speech(said, name=name, credentials=credentials, **parameters)
        saved.append(audio.location)
        return audio.location

    code = _run(run, job.save_to)
    if play and saved:
        _play(saved[0], job.save_to)
    return code


def _of_an_estimate(parameters: dict[str, Any]) -> dict[str, Any]:
    """Give those parameters of a flow that an estimate takes."""
    return {name: parameters[name] for name in parameters if name not in ("timeout_seconds", "subtitles")}


def _play(location: str, save_to: str) -> None:
    """Play what is saved; that it cannot be played is said, and fails nothing."""
    temporary, player = Path(tempfile.mkdtemp()), None
    try:
        player = play_audio(Destination(save_to).fetch(location.rpartition("/")[2], temporary))
        reason = "there is no player here that can"
    except Exception as error:  # the drivers of buckets have families of errors of their own
        reason = str(error)
    if player != DESKTOP:
        shutil.rmtree(temporary, ignore_errors=True)
    if player is None:
        console.print(f"It is saved and cannot be played: {reason}. It is at {location}", markup=False)


@contextmanager
def _usage() -> Iterator[None]:
    """Make a fault in what was given one of the command line's."""
    try:
        yield
    except ValidationError:
        raise
    except ValueError as error:
        raise UsageError(f"--option: {error}.") from None


def _options(pairs: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    with _usage():
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not key or not equals:
                raise UsageError(f"--option {pair} is not key=value.")
            if key in options:
                raise ValueError(f"{key!r} is there twice")
            options[key] = value if field_of(key) in TTSRequest.model_fields else option_value(key, value)
        options = options_of(options)
    return options


def _text_of(text: str | None, file: Path | None) -> str:
    if (text is None) == (file is None):
        raise UsageError("Give a text, - for standard input, or --file, and only one of them.")
    if text is not None and text.startswith("-") and text != "-" and "--" not in sys.argv:
        raise UsageError(f"Unknown option: {text}.")
    if file is None and text != "-":
        return str(text)
    what = str(file or "Standard input")
    if file is None and sys.stdin is None:
        raise UsageError("Standard input cannot be read: it is closed.")
    try:
        with file.open("rb") if file is not None else nullcontext(sys.stdin.buffer) as stream:
            content = stream.read(LONGEST_TEXT + 1)
    except (OSError, ValueError) as error:  # such as a name with a zero byte
        raise UsageError(f"{what} cannot be read: {error}") from None
    if len(content) > LONGEST_TEXT:
        raise UsageError(f"{what} cannot be read: it has more than {LONGEST_TEXT:,} bytes. Nothing was submitted.")
    # The same text is the same job, wherever its lines were ended.
    return _decoded(content, f"{what} cannot be read: it").replace("\r\n", "\n").replace("\r", "\n")


def _decoded(content: bytes, what: str) -> str:
    """Decode UTF-8, whatever the locale says, without the mark that may be at its beginning."""
    if content.startswith(UTF_16_MARKS):
        raise UsageError(
            f"{what} is UTF-16, by the mark at its beginning, and UTF-8 is needed. Convert it, for instance "
            "with `iconv -f UTF-16 -t UTF-8`. Nothing was submitted."
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UsageError(
            f"{what} is not UTF-8: the byte 0x{content[error.start]:02x} at offset {error.start} (line {line}) begins "
            "no character. Convert it, for instance with `iconv -f ISO-8859-1 -t UTF-8`. Nothing was submitted."
        ) from None
    if "\0" in text:
        raise UsageError(
            f"{what} has a zero byte, as text in UTF-16 or UTF-32 has, and UTF-8 is needed. Convert it, for "
            "instance with `iconv -f UTF-16LE -t UTF-8`. Nothing was submitted."
        )
    return text


def _argument(number: int, argument: str) -> str:
    """Give an argument as it was meant: Python marks the bytes that are no characters of the locale."""
    if argument.isascii() or not any("\ud800" <= character <= "\udfff" for character in argument):
        return argument
    content = os.fsencode(argument)
    shown = textwrap.shorten(content.decode(errors="backslashreplace"), LONGEST_ARGUMENT, placeholder="…")
    return _decoded(content, f"The argument {number} ({without_login(shown)})")


@app.command
def batch(
    lines: str,
    *,
    max_in_flight: PositiveInt = 500,
    requests_per_second: Annotated[
        float, Parameter(validator=[_is_finite, validators.Number(gte=0.01, lte=25)])
    ] = 24.0,
    job: JobOptions = JobOptions(),
) -> int:
    """Say every line of a file, each into a file of its own. Run it again to do what is missing.

    Args:
        lines: A table (CSV) with the columns id and text, a JSON array or JSON Lines; a path or an fsspec URL.
        max_in_flight: How many lines to be at work on at once.
        requests_per_second: How many requests to make a second, at most 25.
    """
    parameters = job.parameters
    try:
        read_lines(lines, {"model": job.model, "voice": job.voice, **parameters["options"]}, job.take)
    except NanoGPTError as error:
        raise UsageError(str(error)) from None
    if job.dry_run:
        return dry_run(lines=lines, **_of_an_estimate(parameters))

    async def run(credentials: NanoGPTCredentials) -> str:
        await text_to_speech_batch(
            lines,
            credentials=credentials,
            max_in_flight=max_in_flight,
            requests_per_second=requests_per_second,
            **parameters,
        )
        return Destination(job.save_to).location_of(MANIFEST)

    return _run(run, job.save_to)


@app.command
def wait(
    run_id: str,
    *,
    model: Words,
    cost: Usd = None,
    payment_source: Words | None = None,
    save_to: Words = "audio",
    timeout_seconds: Seconds = 600.0,
) -> int:
    """Wait for a job that was submitted before, and save its audio.

    Args:
        run_id: The runId of the ticket.
        model: The model that the job was submitted to.
        cost: The cost on the ticket; it helps with an automatic refund.
        payment_source: The paymentSource on the ticket, such as USD.
        save_to: A folder, or an fsspec URL such as s3://bucket/speech.
        timeout_seconds: How long to wait in all, in seconds.
    """
    ticket = Ticket(run_id=run_id, model=model, cost=cost, payment_source=payment_source)

    async def run() -> str:
        return (await wait_for_tts(ticket, save_to=save_to, timeout_seconds=timeout_seconds)).location

    return _run_tracked(run, save_to)


@app.command
def sandbox(
    *,
    port: Port = 8765,
    audio_port: Port | None = None,
    job_seconds: Annotated[
        float,
        Parameter(
            help="How long a job takes, in seconds.",
            validator=[_is_finite, validators.Number(gte=0, lte=LONGEST_TIMEOUT_SECONDS)],
        ),
    ] = 3.0,
) -> int:
    """Serve a local stand-in for NanoGPT's API, until Ctrl-C.

    Args:
        port: The port of the API.
        audio_port: The port of the audio host; the next one by default.
    """
    from prefect_nanogpt.sandbox import serve as serve_sandbox

    try:
        serve_sandbox(port=port, audio_port=audio_port, job_seconds=job_seconds)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        console.print(f"The sandbox cannot start: {error}", style="red", markup=False)
        return JOB_FAILED
    return 0


@app.command
def listen(
    *,
    folder: Annotated[tuple[Path, ...], SEVERAL] = (),
    port: Port = PORT,
    host: Words = HOST,
) -> int:
    """Serve pages on which to hear what runs have saved to folders of this machine, until Ctrl-C.

    Args:
        folder: A folder to serve, any number of times; by default all that runs on this machine have saved to.
        port: The port; the links in reports name 4201, unless NANOGPT_LISTEN_URL names another one.
        host: The address to listen at. Whoever can reach it can hear everything: there is no login.
    """
    from prefect_nanogpt.listening import listening

    for given in folder:
        if not given.is_dir():
            raise UsageError(f"--folder {given} is not a folder.")
    with listening(port, host, folder or None) as url:
        console.print(f"What runs have saved can be heard at {url}. Ctrl-C stops it.", markup=False)
        with suppress(asyncio.CancelledError):
            stop.run(_until_stopped)
    return 0


async def _until_stopped() -> None:
    await asyncio.Event().wait()


for _command in (serve, deploy, models, voices, balance, ledger):
    app.command(_command)


def main() -> int:
    """Run the command line, and give the exit code: 0, 1 for a job that failed, 2 for bad usage, 128 + the signal."""
    stop.listen()
    try:
        sys.argv[1:] = [_argument(number, argument) for number, argument in enumerate(sys.argv[1:], 1)]
        app(sys.argv[1:])
    except SystemExit as end:  # how the parser hands on what a command has returned
        return end.code if isinstance(end.code, int) else 0
    except (CycloptsError, UsageError) as error:
        words = str(error)
        words = words if len(words) <= LONGEST_USAGE else f"{words[:LONGEST_USAGE]}…"
        console.print(f"{words} (prefect-nanogpt --help)", markup=False)
    except ValidationError as error:
        for problem in error.errors():
            option = "".join(f"--{field}: " for field in problem["loc"][:1]).replace("_", "-")
            console.print(f"{option}{problem['msg'].removeprefix('Value error, ')}", markup=False)
    except NanoGPTError as error:
        console.print(str(error), style="red", markup=False)
        return JOB_FAILED
    else:
        return 0
    return BAD_USAGE


def _run(flow_run: Callable[[NanoGPTCredentials], Awaitable[str]], save_to: str) -> int:
    """Run a flow with the credentials that there are, or else with the sandbox."""

    async def run() -> str:
        with ExitStack() as stack:
            return await flow_run(await credentials_or_sandbox(stack))

    return _run_tracked(run, save_to)


def _run_tracked(flow_run: Callable[[], Coroutine[Any, Any, str]], save_to: str) -> int:
    # A server that is started for the occasion is nobody's to watch: what it has to say is said through the API.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
    check_environment()
    stop.last_words = lambda: console.print(f"Stopped. {_to_go_on(save_to)}", markup=False)
    try:
        with _progress(), prefect_api():
            location = stop.run(flow_run)
    except ParameterTypeError as error:
        raise UsageError(str(error).partition("\n - ")[2]) from None
    except NanoGPTError as error:
        console.print(str(error), style="red", markup=False)
        if how := _how_to_go_on(error, save_to):
            console.print(how, markup=False)
        if error.code == INVALID_CREDENTIALS and not error.retryable:
            return BAD_USAGE
        return JOB_FAILED if stop.number is None else 128 + stop.number
    except (asyncio.CancelledError, *PREFECT_FAILED) as error:
        if stop.number is not None:
            stop.last_words()
            return 128 + stop.number
        code = prefect_failed(error)
        console.print(_to_go_on(save_to), markup=False)
        return code
    print(location)
    return 0


def _this_command(save_to: str, *more: str) -> str:
    """Give the command that was typed, for another working directory too, and with no leave to pay twice but `more`."""
    typed = sys.argv[1:]
    end = typed.index("--") if "--" in typed else len(typed)
    words, kept = iter(typed[:end]), ["prefect-nanogpt"]
    for word in words:
        option, is_whole, _ = word.partition("=")
        if option not in ("--save-to", "--resubmit"):
            kept.append(word)
        elif not is_whole:
            next(words, None)
    place = absolute(save_to)
    given = [*kept, "--save-to", place]
    # A text is left as it is: with another one the command would pay for another job.
    shown = (
        [without_login(word) for word in given]
        if typed[:1] == ["batch"]
        else [*kept, "--save-to", without_login(place)]
    )
    notes = ["with the same text on standard input"] if typed[:1] == ["say"] and "-" in kept else []
    notes += [LOGIN_LEFT_OUT] if shown != given else []
    command = shlex.join([*shown, *more, *typed[end:]])
    return f"{command}  # {' and '.join(notes)}" if notes else command


def _how_to_go_on(error: NanoGPTError, save_to: str) -> str | None:
    """Say how to go on after a failed run, as a whole command; None where another run would end in the same way."""
    again = _this_command(save_to)
    match error:
        case BatchPartial():
            done = (COMPLETED, ContentPolicyViolation.default_code)
            details = [row.detail or "" for row in error.rows if row.outcome not in done]
            how = [f"To do what is missing:\n{again}"] if details else []
            if any(f"{RESUBMIT}uncertain" in detail for detail in details):
                how.append(_to_resubmit("submit the uncertain lines too, and perhaps pay twice", "uncertain", save_to))
            if any(f"{RESUBMIT}lost" in detail for detail in details):
                how.append(_to_resubmit("submit the lost lines anew, and pay for them again", "lost", save_to))
            return "\n".join(how) or None
        case SubmissionUncertain():
            return _to_resubmit("submit it anew, and perhaps pay twice", "uncertain", save_to)
        case ContentPolicyViolation():
            return None
        case TTSJobRejected(is_certain=True):
            return None if _is_about_a_ticket() else f"To submit the text anew, and pay for it again:\n{again}"
        case _ if _is_about_a_ticket() and (error.ticket is not None or error.retryable):
            return _to_go_on(save_to)
        case _ if error.ticket is not None:
            how_to = _to_go_on(save_to)
            if error.http_status == httpx.codes.NOT_FOUND or isinstance(error, TTSJobRejected):
                how_to += "\n" + _to_resubmit("submit the text anew, and pay for it again", "lost", save_to)
            return how_to
        case AudioError() if not error.retryable and error.code != "AUDIO_NOT_JOINABLE":
            return _to_resubmit("submit the text anew, and pay for it again", "lost", save_to)
        case _ if error.retryable:
            return f"To try again:\n{again}"
        case _:
            return None


def _to_go_on(save_to: str) -> str:
    return f"{WAIT_ON if _is_about_a_ticket() else GO_ON}\n{_this_command(save_to)}"


def _is_about_a_ticket() -> bool:
    return sys.argv[1:2] == ["wait"]


def _to_resubmit(what: str, which: str, save_to: str) -> str:
    return f"To {what}:\n{_this_command(save_to, '--resubmit', which)}"


@contextmanager
def _progress() -> Iterator[None]:
    """Show what this package logs: as one line that changes on a terminal, as plain lines elsewhere."""
    setup_logging()
    prefect_logger = logging.getLogger("prefect")
    with ExitStack() as stack:
        status = console.status("Starting Prefect…")
        if console.is_terminal:
            stack.enter_context(status)
        else:
            console.print("Starting Prefect…")
        # Left in place until the process ends: Prefect has more to log on its way out.
        prefect_logger.handlers = [_OwnRecords(status)]
        prefect_logger.propagate = False
        for worker in ("EventsWorker", "APILogWorker"):  # on a busy machine they warn that they are still at work
            logging.getLogger(worker).setLevel(logging.CRITICAL)
        yield


class _OwnRecords(logging.Handler):
    """Passes on what this package logs. What Prefect logs of every run is on the run's page."""

    _folders = tuple(
        f"{Path(module.__file__ or '').resolve().parent}/"
        for module in (prefect_nanogpt, prefect_nanogpt.flows, prefect_nanogpt.tasks)
    )

    def __init__(self, status: Status) -> None:
        super().__init__()
        self._status = status

    def emit(self, record: logging.LogRecord) -> None:
        if not str(Path(record.pathname).resolve()).startswith(self._folders):
            return
        if console.is_terminal and record.levelno < logging.WARNING:
            self._status.update(Text(record.getMessage()))
        else:
            console.print(record.getMessage(), markup=False)
