"""No secret stands anywhere but where it is sent: all that runs leave behind is searched, byte by byte."""

import asyncio
import json
import os
import pickle
import re
import sqlite3
import subprocess
import sys
import time
from base64 import b64encode, encodebytes
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from secrets import token_hex
from traceback import TracebackException
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import SecretStr, ValidationError

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.credentials import find_credentials, nanogpt_client
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.job import Terms
from prefect_nanogpt.ledger import Job, Ledger
from prefect_nanogpt.models import AudioFile, Ticket, TTSRequest
from prefect_nanogpt.report import Report, escaped
from prefect_nanogpt.sandbox import Answer, Cut, Hang, Redirect, Sandbox
from prefect_nanogpt.storage import Destination
from tests.conftest import eventually, free_port, wait_for_server
from tests.ftp_server import PASSWORD, USER, FTPServer, ftp

__all__ = ["ftp"]

pytestmark = pytest.mark.xdist_group("secrets")  # for one server of their own

ROOT = Path(__file__).parent.parent
SHOWN = 70
LEAST_PIECE = 6


def spellings(secret: str) -> set[bytes]:
    """Give the pieces of a secret that no quoting or escaping changes, and what base64 and hexadecimal make of it."""
    pieces = {piece for piece in re.findall(r"[A-Za-z0-9]+", secret) if len(piece) >= LEAST_PIECE}
    halves = {half for piece in pieces for half in (piece[: len(piece) // 2], piece[len(piece) // 2 :])}
    found = {piece.encode() for piece in pieces | {half for half in halves if len(half) >= 2 * LEAST_PIECE}}
    for before in range(3):  # where in a group of three bytes it may begin
        encoded = b64encode(b"." * before + secret.encode()).rstrip(b"=")
        found.add(encoded[4 if before else 0 : -2])
    return found | {secret.encode().hex().encode()}


def leaks(content: bytes | str, where: str = "", **hidden: str) -> list[str]:
    """Find secrets in something, by their names, and say what stands around them."""
    content = content.encode() if isinstance(content, str) else content
    content = content.replace(b"\\n", b"").replace(b"\n", b"")  # base64 is written in lines
    found = []
    for name, secret in hidden.items():
        for at in sorted(content.find(spelling) for spelling in spellings(secret) if spelling in content)[:1]:
            around = content[max(0, at - SHOWN) : at + SHOWN].decode(errors="replace")
            found.append(f"{where}: {name} in {around!r}")
    return found


def assert_none(found: list[str]) -> None:
    assert not found, "\n".join(["", *found])


@pytest.mark.parametrize(
    "written",
    [
        str,
        repr,
        lambda secret: repr({"headers": [(b"x-api-key", secret.encode())]}),
        lambda secret: json.dumps({"detail": json.dumps(f"{secret}\n")}),
        lambda secret: f"http://me:{quote(secret, safe='')}@host",
        lambda secret: escaped(secret),
        lambda secret: secret[: len(secret) // 2 + 6],
        lambda secret: b64encode(secret.encode()).decode(),
        lambda secret: b64encode(f"me:{secret}".encode()).decode(),
        lambda secret: encodebytes(pickle.dumps({"why": ["because", secret] * 9})).decode(),
        lambda secret: secret.encode().hex(),
    ],
)
def test_the_search_finds_a_secret_however_it_is_written(written: Callable[[str], str]) -> None:
    secret = f"sk-nano/{token_hex(16)}"
    assert leaks(f"Before. {written(secret)} After.", key=secret)
    assert not leaks(f"Before. {written(secret)} After.", key=f"sk-nano/{token_hex(16)}")


@dataclass
class Machine:
    """A machine of its own: a home, a working directory, a temporary folder, and what processes print."""

    root: Path

    def __post_init__(self) -> None:
        for folder in ("home", "prefect", "work", "tmp"):
            (self.root / folder).mkdir(parents=True)

    def start(self, *command: str, **environment: str) -> "subprocess.Popen[bytes]":
        """Start a module, which is told to log all that there is to log."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "NANOGPT_"))}
        own = {
            "HOME": str(self.root / "home"),
            "TMPDIR": str(self.root / "tmp"),
            "PREFECT_HOME": str(self.root / "prefect"),
            "PREFECT_LOGGING_LEVEL": "DEBUG",
            "PREFECT_LOGGING_INTERNAL_LEVEL": "DEBUG",
            "PREFECT_LOGGING_EXTRA_LOGGERS": "httpx",
            "PREFECT_SERVER_LOGGING_LEVEL": "DEBUG",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL": "1",
            "PYTHONPATH": str(ROOT),
        }
        with (self.root / "stdout").open("ab") as stdout, (self.root / "stderr").open("ab") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self.root / "work",
                env=kept | own | environment,
                stdin=subprocess.PIPE,
                stdout=stdout,
                stderr=stderr,
            )

    @property
    def database(self) -> Path:
        return self.root / "prefect" / "prefect.db"

    def leaks(self, *, but: Collection[str] = (), **hidden: str) -> list[str]:
        """Search every file, and of the database every column, except for some, of which its file has the content."""
        found = []
        for path in sorted(path for path in self.root.rglob("*") if path.is_file()):
            if not (but and path.name.startswith(self.database.name)):
                found += leaks(path.read_bytes(), str(path.relative_to(self.root)), **hidden)
        for column, values in columns(self.database) if self.database.exists() else ():
            if column not in but:
                found += leaks(values, column, **hidden)
        return found


def columns(database: Path) -> Iterator[tuple[str, bytes]]:
    """Read all that is in a database, column by column."""
    with closing(sqlite3.connect(database)) as opened:
        for (table,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            rows = opened.execute(f'SELECT * FROM "{table}"')
            names = [f"{table}.{column[0]}" for column in rows.description]
            for name, values in zip(names, zip(*rows, strict=True), strict=False):
                yield name, b" ".join(value if isinstance(value, bytes) else str(value).encode() for value in values)


class Runs:
    """A process that makes runs one after another, and is killed in the end."""

    def __init__(self, machine: Machine, server: str, source: str, **fields: str) -> None:
        environment = {"PREFECT_API_URL": server, "PYTHONASYNCIODEBUG": "1"}
        if source == "environment":
            environment |= {"NANOGPT_API_KEY": fields["api_key"], "NANOGPT_BASE_URL": fields["base_url"]}
        self._told, self._log = machine.root / "stdout", machine.root / "stderr"
        self._process = machine.start("tests.leaking", **environment)
        self._tell({"from": source, "fields": fields})
        self._made = 0

    def __enter__(self) -> "Runs":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()

    def __call__(self, **parameters: Any) -> str:
        """Make a run, and give what came of it."""
        self.begin(**parameters)
        self._made += 1
        deadline = time.monotonic() + 60
        while len(answers := self._told.read_text().splitlines()) < self._made:
            assert self._process.poll() is None
            assert time.monotonic() < deadline, self._log.read_text()[-10_000:]
            time.sleep(0.05)
        return answers[-1]

    def begin(self, **parameters: Any) -> None:
        self._tell({"save_to": "audio", **parameters})

    def _tell(self, what: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what).encode() + b"\n")
        self._process.stdin.flush()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """The machine of the Prefect server."""
    return Machine(tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def server(host: Machine) -> Iterator[str]:
    port = free_port()
    process = host.start("tests.prefect_server", "prefect", "server", "start", "--port", str(port))
    try:
        wait_for_server(f"http://127.0.0.1:{port}/api/health")
        yield f"http://127.0.0.1:{port}/api"
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """The machine of the runs."""
    return Machine(tmp_path / "machine")


@dataclass
class Provider:
    """How to reach the sandbox, by a key and behind a proxy with a login, none of which was used before."""

    sandbox: Sandbox
    key: str = field(default_factory=lambda: f"sk-nano-{token_hex(16)}")
    user: str = field(default_factory=lambda: f"gate-{token_hex(8)}")
    password: str = field(default_factory=lambda: f"{token_hex(8)}/{token_hex(8)}")

    @property
    def base_url(self) -> str:
        return with_login(self.sandbox.base_url, self.user, self.password)

    @property
    def authorization(self) -> str:
        return f"Basic {b64encode(f'{self.user}:{self.password}'.encode()).decode()}"

    @property
    def hidden(self) -> dict[str, str]:
        return {"key": self.key, "user": self.user, "password": self.password}

    @property
    def fields(self) -> dict[str, str]:
        return {"api_key": self.key, "base_url": self.base_url}


def with_login(url: str, user: str, password: str) -> str:
    return url.replace("://", f"://{user}:{quote(password, safe='')}@", 1)


@pytest.fixture
def provider(sandbox: Sandbox) -> Provider:
    return Provider(sandbox)


@pytest.mark.parametrize("source", ["environment", "block", "parameter"])
async def test_the_key_and_the_login_of_the_api_stand_nowhere_but_in_the_requests_to_it(
    source: str, provider: Provider, sandbox: Sandbox, server: str, host: Machine, machine: Machine
) -> None:
    refusal = Answer(401, {"error": f"Invalid API key: {provider.key}", "code": "invalid_api_key"})
    with Runs(machine, server, source, **provider.fields) as run:
        ends = [run(text="Said."), run(text="[sandbox:reject] Rejected.")]
        sandbox.on_submit([refusal])
        ends += [run(text="Refused.")]
        sandbox.on_status(None, [refusal])
        ends += [run(text="Refused after all.")]
        ends += [run(text="[sandbox:stuck] Too late.", timeout_seconds=0.5)]
        asked = len(sandbox.requests("status"))
        run.begin(text="[sandbox:stuck] Killed.")
        sandbox.wait_for_request("status", asked + 2)
    await kept(host, "nanogpt.tts.timed-out", sandbox.ledger.charges[-2].run_id)

    assert ends == ["Completed", "CONTENT_POLICY_VIOLATION", "INVALID_API_KEY", "INVALID_API_KEY", "TTS_TIMEOUT"]
    assert_sent_to_the_api_alone(provider)
    assert_all_is_logged(machine, host)
    assert_none(host.leaks(**provider.hidden) + machine.leaks(**provider.hidden))


async def test_what_the_provider_repeats_of_the_key_is_not_repeated(
    provider: Provider, sandbox: Sandbox, server: str, host: Machine, machine: Machine
) -> None:
    said = f"Refused: x-api-key: {provider.key}, authorization: {provider.authorization}"
    with Runs(machine, server, "parameter", **provider.fields) as run:
        ends = []
        for number, answer in enumerate(
            (
                Answer(200, body=f"<html>{said}</html>", headers={"content-type": "text/html"}),
                Answer(200, json={"message": said}),
                Answer(500, json={"error": {"message": said}}),
                Answer(400, json={"error": said, "code": "content_policy_violation"}),
            )
        ):
            sandbox.on_submit([answer])
            ends.append(run(text=f"Answered {number}."))
        sandbox.on_status(None, [{"status": "error", "error": said}])
        ends.append(run(text="Rejected."))
        sandbox.on_submit([Answer(400, json={"error": said})])
        ends.append(run(lines=[{"id": "one", "text": "A line."}]))
        ends.append(run(text="Said."))
    await kept(host, "nanogpt.tts.completed", sandbox.ledger.charges[-1].run_id)

    uncertain = ["SUBMISSION_UNCERTAIN"] * 3
    assert ends == [*uncertain, "CONTENT_POLICY_VIOLATION", "TTS_FAILED", "TTS_BATCH_PARTIAL", "Completed"]
    assert_none(host.leaks(**provider.hidden) + machine.leaks(**provider.hidden))


@dataclass
class AudioHost:
    """Where the provider has put audio, behind a login and with a signature that is as good as a login."""

    user: str = field(default_factory=lambda: f"guest-{token_hex(8)}")
    password: str = field(default_factory=lambda: f"{token_hex(8)}/{token_hex(8)}")
    signature: str = field(default_factory=lambda: token_hex(32))
    token: str = field(default_factory=lambda: f"tok.{token_hex(16)}")

    def url(self, plain: str) -> str:
        url = with_login(plain, self.user, self.password)
        return f"{url}?X-Amz-Signature={self.signature}&token={self.token}"

    @property
    def login(self) -> dict[str, str]:
        return {"user": self.user, "password": self.password}


async def test_the_login_in_the_address_of_audio_is_shown_to_nobody(
    provider: Provider, sandbox: Sandbox, server: str, host: Machine, machine: Machine
) -> None:
    there = AudioHost()

    def finish(text: str) -> tuple[str, str]:
        """Let the next job be finished, and give its run id and the plain address of its audio."""
        ticket = sandbox.add_job(text)
        body = sandbox.completed_body(ticket["runId"])
        sandbox.on_submit([Answer(202, ticket)])
        sandbox.on_status(ticket["runId"], [body | {"audioUrl": there.url(body["audioUrl"])}])
        return ticket["runId"], body["audioUrl"]

    with Runs(machine, server, "environment", **provider.fields) as run:
        finish("Behind a login.")
        ends = [run(text="Behind a login.")]
        run_id, address = finish("Elsewhere.")
        sandbox.on_audio(run_id, [Redirect(there.url(address))])
        ends.append(run(text="Elsewhere."))
        run_id, address = finish("Nowhere.")
        bad = address.replace("://", f"://{there.user}:{there.password}@")  # a slash ends the host
        sandbox.on_audio(run_id, [Redirect(bad)] * 4)
        ends.append(run(text="Nowhere."))
        finish("In a batch.")
        ends.append(run(lines=[{"id": "one", "text": "In a batch."}]))
    await kept(host, "nanogpt.tts.completed", sandbox.requests("audio")[-1].run_id)

    assert ends == ["Completed", "Completed", "AUDIO_UNAVAILABLE", "Completed"]
    login = f"Basic {b64encode(f'{there.user}:{there.password}'.encode()).decode()}"
    assert sandbox.requests("audio")[0].headers["authorization"] == login
    assert sandbox.requests("audio")[0].query["token"] == there.token
    assert_none(host.leaks(**there.login) + machine.leaks(**there.login))
    for name in ("stderr", "work/log"):  # the signature is in the report's link, and in no request that is logged
        assert not re.search(rf"(HTTP Request|location).*{there.signature}", (machine.root / name).read_text())


async def test_the_password_of_an_ftp_server_stands_in_the_parameter_that_it_was_given_as_and_nowhere_else(
    provider: Provider, sandbox: Sandbox, ftp: FTPServer, server: str, host: Machine, machine: Machine
) -> None:
    save_to = with_login(f"ftp://{ftp.address}/speech", USER, PASSWORD)
    with Runs(machine, server, "environment", **provider.fields) as run:
        ends = [
            run(text="Saved there.", save_to=save_to),
            run(text="[sandbox:stuck] Too late.", save_to=save_to, timeout_seconds=0.5),
            run(text="Nowhere.", save_to=save_to.replace(USER, "nobody")),
            run(lines=[{"id": "one", "text": "In a batch."}], save_to=save_to),
        ]
    await kept(host, "nanogpt.tts.completed", sandbox.ledger.charges[-1].run_id)

    assert ends == ["Completed", "TTS_TIMEOUT", "STORAGE_FAILED", "Completed"]
    there = "".join(path.read_text(errors="replace") for path in ftp.root.rglob("*") if path.is_file())
    assert "Saved there." in there
    assert_none(leaks(there, "there", password=PASSWORD))
    assert leaks(dict(columns(host.database))["flow_run.parameters"], password=PASSWORD)
    assert_none(host.leaks(but=["flow_run.parameters"], password=PASSWORD) + machine.leaks(password=PASSWORD))


async def kept(host: Machine, event: str, run_id: str | None) -> None:
    """Wait until the server has written what is announced last."""

    async def look() -> bool | None:
        with closing(sqlite3.connect(host.database)) as opened:
            found = opened.execute("SELECT resource_id FROM events WHERE event = ?", [event]).fetchall()
        return (f"nanogpt.tts.{run_id}",) in found or None

    await eventually(look)


def assert_sent_to_the_api_alone(provider: Provider) -> None:
    """Make sure that there was something to find, and that the audio host did not get it."""
    asked = provider.sandbox.requests("submit") + provider.sandbox.requests("status")
    assert {request.headers["x-api-key"] for request in asked} == {provider.key}
    assert {request.headers["authorization"] for request in asked} == {provider.authorization}
    assert provider.sandbox.requests("audio")
    assert_none(leaks(str(list(map(asdict, provider.sandbox.requests("audio")))), "the audio host", **provider.hidden))


def assert_all_is_logged(machine: Machine, host: Machine) -> None:
    """Make sure that the places that are searched have in them what could have a secret in it."""
    for name in ("stderr", "work/log"):
        log = (machine.root / name).read_text()
        assert "receive_response_headers.complete" in log
        assert "Using selector" in log
    kept = {column for column, value in columns(host.database) if b"Too late" in value}
    assert {"flow_run.parameters", "flow_run.name", "artifact.data"} <= kept


# What debuggers, test runners and collectors of errors show of objects and of local variables


def as_seen(thing: object) -> str:
    return f"{thing!r} {thing} {vars(thing)}"


def test_no_object_shows_a_secret(provider: Provider, ftp: FTPServer) -> None:
    save_to, there = with_login(f"ftp://{ftp.address}/speech", USER, PASSWORD), AudioHost()
    credentials = NanoGPTCredentials(api_key=SecretStr(provider.key), base_url=provider.base_url, ledger=save_to)
    client = credentials.get_client()
    destination = Destination(save_to)
    ledger = Ledger.of(destination, save_to)
    ticket = Ticket(run_id="98b0", model="m")
    request = TTSRequest(text="Hello.")
    audio = AudioFile(
        location=destination.location_of("hello.mp3"),
        container="mp3",
        content_type="audio/mpeg",
        size_bytes=1,
        sha256="0" * 64,
        source_url=there.url("https://host/hello.mp3"),
    )
    things = [credentials, client, ledger, Terms(ledger), Job(client.base_url, request, ticket=ticket), request, ticket]
    things += [audio, Report("tts-audio", save_to)]
    hidden = {**provider.hidden, "storage": PASSWORD, "audio": there.password}

    # What says where to save must have the password in it; it is not shown all the same.
    shown = {"Destination": f"{destination!r} {destination} {destination.folder('.nanogpt')!r}"}
    shown |= {type(thing).__name__: as_seen(thing) for thing in things}
    shown |= {f"JSON of {type(model).__name__}": model.model_dump_json() for model in (credentials, audio)}
    assert_none([leak for name, text in shown.items() for leak in leaks(text, name, **hidden)])


@pytest.mark.parametrize(
    "fields",
    [
        {"apikey": "{secret}"},
        {"api_key": ["{secret}"]},
        {"api_key": "{secret}", "base_url": "nano-gpt.com"},
        {"api_key": "key", "base_url": "ftp://gate:{secret}@nano-gpt.com"},
        {"api_key": "key", "ledger": ["ftp://speaker:{secret}@host"]},
    ],
    ids=str,
)
def test_fields_of_the_block_that_are_refused_are_not_repeated(fields: dict[str, Any]) -> None:
    secret = token_hex(6)  # of a long one only the ends would be shown
    given = json.loads(json.dumps(fields).replace("{secret}", secret))
    with pytest.raises(ValidationError) as caught:
        NanoGPTCredentials.model_validate(given)
    assert_none(leaks(f"{caught.value} {caught.value!r}", "the exception", secret=secret))


@pytest.fixture
def nobody_listens() -> str:
    return f"http://127.0.0.1:{free_port()}/api"


@pytest.mark.usefixtures("transport")
async def test_no_traceback_shows_a_secret_among_its_local_variables(
    provider: Provider, sandbox: Sandbox, nobody_listens: str, save_to: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = NanoGPTCredentials(api_key=SecretStr(provider.key), base_url=provider.base_url)
    broken = good.model_copy(update={"api_key": SecretStr(f"{provider.key}\nX-Injected: yes")})
    silent = good.model_copy(update={"base_url": nobody_listens})
    ticket, request = Ticket(run_id="98b0", model="m"), TTSRequest(text="Hello.")
    refusal = Answer(401, {"error": "Invalid API key"})

    async def status(credentials: NanoGPTCredentials) -> None:
        async with nanogpt_client(credentials) as client, asyncio.timeout(1):
            await client.status(ticket)

    async def submission(credentials: NanoGPTCredentials) -> None:
        async with nanogpt_client(credentials) as client:
            await client.submit(request)

    async def flow() -> None:
        await text_to_speech("Hello.", save_to=save_to, credentials=good)

    sandbox.on_status(None, [refusal, Hang(5), Answer(200, body="nothing")])
    sandbox.on_submit([refusal, Cut(), Answer(200, body="nothing"), refusal])
    tracebacks = {
        "a key that no header can carry": await traceback_of(lambda: status(broken)),
        "a refused status call": await traceback_of(lambda: status(good)),
        "a status call that is given up": await traceback_of(lambda: status(good)),
        "a status call without an answer": await traceback_of(lambda: status(good)),
        "a status call that reaches nobody": await traceback_of(lambda: status(silent)),
        "a refused submission": await traceback_of(lambda: submission(good)),
        "a submission that is cut off": await traceback_of(lambda: submission(good)),
        "a submission without an answer": await traceback_of(lambda: submission(good)),
        "a submission that reaches nobody": await traceback_of(lambda: submission(silent)),
        "a flow": await traceback_of(flow),
    }
    monkeypatch.setenv("NANOGPT_API_KEY", provider.key)
    monkeypatch.setenv("NANOGPT_BASE_URL", with_login("ftp://host", provider.user, provider.password))
    tracebacks["a bad address in the environment"] = await traceback_of(find_credentials)

    assert all(" = " in text for text in tracebacks.values())
    assert_none([leak for name, text in tracebacks.items() for leak in leaks(text, name, **provider.hidden)])


async def traceback_of(call: Callable[[], Awaitable[object]]) -> str:
    """Give the traceback of a failing call, with the local variables of each frame."""
    try:
        await call()
    except Exception as error:
        return "".join(TracebackException.from_exception(error, capture_locals=True).format())
    raise AssertionError
