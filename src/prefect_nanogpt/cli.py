"""The command line: `prefect-nanogpt say`, `batch`, `wait`, `serve` and `sandbox`.

What is being done goes to standard error; standard output gets the location of the audio, or of the manifest of a
batch, and nothing else.
"""

from __future__ import annotations

import asyncio
import codecs
import io
import logging
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
from cyclopts import App, CycloptsError, Parameter, validators
from prefect import serve
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ParameterTypeError
from prefect.logging.configuration import setup_logging
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import SecretStr, ValidationError
from rich.console import Console
from rich.status import Status
from rich.text import Text

import prefect_nanogpt.flows
import prefect_nanogpt.tasks
from prefect_nanogpt import NanoGPTCredentials, __version__
from prefect_nanogpt.credentials import find_credentials
from prefect_nanogpt.errors import (
    AudioError,
    BatchPartial,
    ContentPolicyViolation,
    CredentialsError,
    NanoGPTError,
    SubmissionUncertain,
    TTSJobRejected,
    without_password,
)
from prefect_nanogpt.events import PASSWORD_LEFT_OUT
from prefect_nanogpt.flows import collect_open_tickets, text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.flows.forms import LONGEST_TIMEOUT_SECONDS
from prefect_nanogpt.job import RESUBMIT, Resubmit
from prefect_nanogpt.lines import COMPLETED, read_lines
from prefect_nanogpt.lines import FILE_NAME as MANIFEST
from prefect_nanogpt.models import DEFAULT_MODEL, AudioFile, Ticket, TTSRequest, field_of, options_of, request_with
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.sandbox import serve as serve_sandbox
from prefect_nanogpt.storage import Destination, absolute
from prefect_nanogpt.tables import option_value

__all__ = ["main"]

Seconds = Annotated[float, Parameter(validator=validators.Number(gt=0, lte=LONGEST_TIMEOUT_SECONDS))]
PositiveInt = Annotated[int, Parameter(validator=validators.Number(gte=1))]
SEVERAL: Final = Parameter(negative=(), consume_multiple=False, show_default=False)
NO_KEY: Final = "No NANOGPT_API_KEY: a local sandbox stands in for NanoGPT, with play money."
JOB_FAILED: Final = 1
BAD_USAGE: Final = 2
INTERRUPTED: Final = 130
TERMINATED: Final = 143
LONGEST_REASON: Final = 300
LONGEST_ARGUMENT: Final = 60
UTF_16_MARKS: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
GO_ON: Final = (
    "Whatever was submitted is paid for, and is found again; what was not, or has failed by then, is submitted and "
    "charged. To go on:"
)
WAIT_ON: Final = "The job goes on. To wait for it again, at no cost:"


class UsageError(Exception):
    """The command line cannot be followed."""


app = App(
    name="prefect-nanogpt",
    help="NanoGPT's asynchronous text-to-speech, tracked in Prefect.",
    version=__version__,
    exit_on_error=False,
    print_error=False,
)
console = Console(stderr=True, highlight=False, soft_wrap=True)


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
    """

    model: str = DEFAULT_MODEL
    voice: str | None = None
    option: Annotated[tuple[str, ...], SEVERAL] = ()
    save_to: str = "audio"
    timeout_seconds: Seconds = 600.0
    max_cost: Annotated[Decimal | None, Parameter(validator=validators.Number(gte=0))] = None
    take: PositiveInt = 1
    resubmit: Annotated[tuple[Resubmit, ...], SEVERAL] = ()

    @property
    def parameters(self) -> dict[str, Any]:
        """Give them as the flows take them."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {"options": _options(given.pop("option")), **given}


@app.command
def say(
    text: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    *,
    file: Path | None = None,
    speed: float | None = None,
    response_format: str | None = None,
    name: str | None = None,
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
    """
    said = _text_of(text, file)
    parameters = job.parameters | {"speed": speed, "response_format": response_format}
    named = {name: parameters[name] for name in ("model", "voice", "speed", "response_format")}
    given = {name: value for name, value in named.items() if value is not None}
    with _usage():
        request_with(parameters["options"], {**given, "text": said})

    async def run(credentials: NanoGPTCredentials) -> str:
        audio: AudioFile = await text_to_speech(said, name=name, credentials=credentials, **parameters)
        return audio.location

    return _run(run, job.save_to)


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
        content = file.read_bytes() if file is not None else sys.stdin.buffer.read()
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error}") from None
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
    return _decoded(content, f"The argument {number} ({without_password(shown)})")


@app.command
def batch(
    lines: str,
    *,
    max_in_flight: PositiveInt = 100,
    requests_per_second: Annotated[float, Parameter(validator=validators.Number(gte=0.01, lte=25))] = 20.0,
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
    model: str,
    cost: Decimal | None = None,
    payment_source: str | None = None,
    save_to: str = "audio",
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
    port: int = 8765,
    audio_port: int | None = None,
    job_seconds: Annotated[float, Parameter(help="How long a job takes, in seconds.")] = 3.0,
) -> int:
    """Serve a local stand-in for NanoGPT's API, until Ctrl-C.

    Args:
        port: The port of the API.
        audio_port: The port of the audio host; the next one by default.
    """
    serve_sandbox(port=port, audio_port=audio_port, job_seconds=job_seconds)
    return 0


@app.command(name="serve")
def serve_flows(*, port: int = 4200) -> int:
    """Put all flows into the Prefect UI and run them here, without a worker, until Ctrl-C.

    Starts a Prefect server unless PREFECT_API_URL names one, and without an API key also the sandbox.

    Args:
        port: The port of the server, if one is started.
    """
    with ExitStack() as stack:
        if not PREFECT_API_URL.value():
            stack.enter_context(_server(port))
        try:
            asyncio.run(find_credentials())
        except CredentialsError as error:
            _refuse_if_given(error)
            stand_in = stack.enter_context(Sandbox())
            # The runs have processes of their own, which find the sandbox there.
            os.environ.update(NANOGPT_API_KEY="sandbox", NANOGPT_BASE_URL=stand_in.base_url)
            console.print(NO_KEY)
        flows = (wait_for_tts, text_to_speech, text_to_speech_batch, collect_open_tickets)
        serve(
            *(RunnerDeployment.from_flow(flow, "local", tags=["nanogpt", "speech"]) for flow in flows),
            print_starting_message=False,
        )
    return 0


@contextmanager
def _server(port: int) -> Iterator[None]:
    """Run a Prefect server with its UI, and point this process and its children at it."""
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    # In a group of its own, so that Ctrl-C reaches it only after the runs have been told.
    server = subprocess.Popen(
        command,
        env={**os.environ, "PREFECT_SERVER_UI_API_URL": f"{url}/api"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        console.print("Starting Prefect…")
        while True:
            try:
                if httpx.get(f"{url}/api/health").is_success:
                    break
            except httpx.HTTPError:
                if server.poll() is not None:
                    raise NanoGPTError(
                        f"No Prefect server could be started on port {port}.", code="NO_SERVER"
                    ) from None
            time.sleep(0.2)
        os.environ["PREFECT_API_URL"] = f"{url}/api"
        with temporary_settings({PREFECT_API_URL: f"{url}/api"}):
            console.print(f"The flows are at {url}/deployments. Ctrl-C stops everything.")
            yield
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    """Run the command line and exit: 0, 1 for a job that failed, 2 for bad usage."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that the terminal has no characters for ends nothing
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.argv[1:] = [_argument(number, argument) for number, argument in enumerate(sys.argv[1:], 1)]
        sys.exit(app(sys.argv[1:]))
    except (CycloptsError, UsageError) as error:
        console.print(f"{error} (prefect-nanogpt --help)", markup=False)
    except ValidationError as error:
        for problem in error.errors():
            option = "".join(f"--{field}: " for field in problem["loc"][:1]).replace("_", "-")
            console.print(f"{option}{problem['msg'].removeprefix('Value error, ')}", markup=False)
    except NanoGPTError as error:
        console.print(str(error), style="red", markup=False)
        sys.exit(JOB_FAILED)
    sys.exit(BAD_USAGE)


def _refuse_if_given(error: CredentialsError) -> None:
    """Let the sandbox stand in where no credentials were given, and nowhere else."""
    if error.code != CredentialsError.default_code:
        raise UsageError(error.message) from None


def _run(flow_run: Callable[[NanoGPTCredentials], Awaitable[str]], save_to: str) -> int:
    """Run a flow with the credentials that there are, or else with the sandbox."""

    async def run() -> str:
        with ExitStack() as stack:
            try:
                credentials = await find_credentials()
            except CredentialsError as error:
                _refuse_if_given(error)
                sandbox = stack.enter_context(Sandbox())
                credentials = NanoGPTCredentials(api_key=SecretStr("sandbox"), base_url=sandbox.base_url)
                console.print(NO_KEY)
            return await flow_run(credentials)

    return _run_tracked(run, save_to)


def _run_tracked(flow_run: Callable[[], Coroutine[Any, Any, str]], save_to: str) -> int:
    # A server that Prefect starts for the occasion is nobody's to watch: what it has to say is said through the API.
    os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
    os.environ.setdefault("PREFECT_SERVER_LOGGING_LEVEL", "CRITICAL")
    signals: list[int] = []

    def terminated(number: int, frame: object) -> None:
        signals.append(number)
        signal.raise_signal(signal.SIGINT)  # which asyncio turns into a cancellation

    async def run() -> str:
        watch = asyncio.create_task(_keep_handler(terminated))
        try:
            return await flow_run()
        finally:
            watch.cancel()

    try:
        with _progress():
            location = asyncio.run(run())
    except ParameterTypeError as error:
        raise UsageError(str(error).partition("\n - ")[2]) from None
    except NanoGPTError as error:
        console.print(str(error), style="red", markup=False)
        if how := _how_to_go_on(error, save_to):
            console.print(how, markup=False)
        return JOB_FAILED
    except KeyboardInterrupt:
        console.print(f"Stopped. {_to_go_on(save_to)}", markup=False)
        return TERMINATED if signals else INTERRUPTED
    except (httpx.HTTPError, RuntimeError) as error:
        server = PREFECT_API_URL.value() or ""
        words = str(error).replace(server, without_password(server)) if server else str(error)
        words = textwrap.shorten(words, LONGEST_REASON, placeholder="…")
        console.print(f"Prefect cannot be used: {words}", style="red", markup=False)
        console.print(_to_go_on(save_to), markup=False)
        return JOB_FAILED
    print(location)
    return 0


async def _keep_handler(handler: Callable[[int, object], None]) -> None:
    """Keep the handler of SIGTERM in place.

    Prefect sets one when a flow begins that raises an exception in whatever happens to run, and asyncio swallows that.
    """
    while True:
        signal.signal(signal.SIGTERM, handler)
        await asyncio.sleep(0.1)


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
        [without_password(word) for word in given]
        if typed[:1] == ["batch"]
        else [*kept, "--save-to", without_password(place)]
    )
    notes = ["with the same text on standard input"] if "-" in kept else []
    notes += [PASSWORD_LEFT_OUT] if shown != given else []
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
        case TTSJobRejected():
            return None if _is_about_a_ticket() else f"To submit the text anew, and pay for it again:\n{again}"
        case _ if _is_about_a_ticket() and (error.ticket is not None or error.retryable):
            return _to_go_on(save_to)
        case _ if error.ticket is not None:
            how_to = _to_go_on(save_to)
            if error.http_status == httpx.codes.NOT_FOUND:
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
