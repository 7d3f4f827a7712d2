"""The command line, as a person uses it: in a process of its own."""

import itertools
import os
import pty
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt.sandbox import Accept, Answer, Cut, Hang, Sandbox
from tests.conftest import API_KEY


def run(
    *arguments: str, cwd: Path, server: bool = True, stdin: str = "", **env: str
) -> subprocess.CompletedProcess[str]:
    if server:
        env["PREFECT_API_URL"] = PREFECT_API_URL.value()
    return subprocess.run(
        [str(Path(sys.executable).parent / "prefect-nanogpt"), *arguments],
        cwd=cwd,
        env={**os.environ, **env},
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # "\udce9" is the byte 0xE9, there and back
        timeout=120,
    )


def files_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def key(sandbox: Sandbox) -> dict[str, str]:
    return {"NANOGPT_API_KEY": API_KEY, "NANOGPT_BASE_URL": sandbox.base_url}


def test_say_without_a_key_speaks_through_the_sandbox_and_says_so(tmp_path: Path) -> None:
    done = run("say", "Hello from the shell.", cwd=tmp_path)
    assert done.returncode == 0
    [location] = done.stdout.splitlines()
    assert Path(location).parent == tmp_path / "audio"
    assert Path(location).stat().st_size > 1_000
    assert done.stderr.count("sandbox stands in for NanoGPT") == 1
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


def test_say_without_a_server_leaves_no_noise_behind(tmp_path: Path) -> None:
    (tmp_path / "temporary").mkdir()
    done = run(
        *("say", "Hello again."),
        cwd=tmp_path,
        server=False,
        PREFECT_HOME=str(tmp_path / "prefect"),
        TMPDIR=str(tmp_path / "temporary"),
    )
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 1
    assert [line for line in done.stderr.splitlines() if not line[0].isalpha() or "Error" in line] == []


def test_wait_fetches_a_ticket_and_prints_nothing_but_where(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    ticket = sandbox.add_job(text="Fetched by hand.")
    done = run(
        *("wait", ticket["runId"], "--model", ticket["model"], "--cost", str(ticket["cost"])),
        *("--payment-source", "USD", "--save-to", "here"),
        cwd=tmp_path,
        **key,
    )
    assert done.stdout == f"{tmp_path}/here/{ticket['runId']}.mp3\n"
    assert (tmp_path / "here" / f"{ticket['runId']}.mp3").read_bytes() == sandbox.audio_bytes(ticket["runId"])
    [request] = sandbox.requests("status")
    assert (request.query["cost"], request.query["paymentSource"]) == (str(ticket["cost"]), "USD")
    assert API_KEY not in done.stdout + done.stderr


def test_a_failed_job_exits_with_1_and_its_code(tmp_path: Path, sandbox: Sandbox, key: dict[str, str]) -> None:
    done = run("say", "[sandbox:reject] Not this.", cwd=tmp_path, **key)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("CONTENT_POLICY_VIOLATION: ")
    assert "Traceback" not in done.stderr
    assert API_KEY not in done.stderr
    assert "with the key from the environment variable NANOGPT_API_KEY" in done.stderr
    assert f"Asking {sandbox.base_url}," in done.stderr


def test_say_reads_standard_input_and_files(tmp_path: Path, sandbox: Sandbox, key: dict[str, str]) -> None:
    (tmp_path / "text").write_text("Read from a file.", encoding="utf-8-sig")
    assert run("say", "-", cwd=tmp_path, stdin="Piped in.\n", **key).returncode == 0
    assert run("say", "--file", "text", cwd=tmp_path, **key).returncode == 0
    assert [request.json["text"] for request in sandbox.requests("submit")] == ["Piped in.\n", "Read from a file."]


LATIN_1 = "Un caf\udce9, s'il vous pla\udceet."
LOCALES = [{"LC_ALL": "C.UTF-8"}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}]


@pytest.mark.parametrize("locale", LOCALES, ids=["UTF-8", "C", "ASCII"])
def test_texts_are_utf_8_in_every_locale_and_have_no_mark_at_their_beginning(
    locale: dict[str, str], tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    (tmp_path / "text").write_text("Grüße, 世界, aus einer Datei.", encoding="utf-8-sig")
    for arguments, stdin in (
        (["-", "--name", "Café"], "\ufeffGrüße, 世界,\r\nvon außen.\r"),
        (["--file", "text"], ""),
        (["Grüße, 世界.", "--voice", "Zoë"], ""),
    ):
        done = run("say", *arguments, cwd=tmp_path, stdin=stdin, **key, **locale)
        assert done.returncode == 0, done.stderr
    submitted = [request.json for request in sandbox.requests("submit")]
    assert [body["text"] for body in submitted] == [
        "Grüße, 世界,\nvon außen.\n",
        "Grüße, 世界, aus einer Datei.",
        "Grüße, 世界.",
    ]
    assert submitted[2]["voice"] == "Zoë"


@pytest.mark.parametrize("by", ["standard input", "text"])
@pytest.mark.parametrize(
    ("text", "what"),
    [
        (LATIN_1, "not utf-8: the byte 0xe9 at offset 6 (line 1)"),
        ("Cut in a character: \udce4\udcb8", "not utf-8: the byte 0xe4 at offset 20 (line 1)"),
        ("\ufeffGrüße.".encode("utf-16-le").decode(errors="surrogateescape"), "utf-16"),
        ("\ufeffGrüße.".encode("utf-16-be").decode(errors="surrogateescape"), "utf-16"),
        ("No mark.".encode("utf-16-le").decode(), "zero byte"),
    ],
    ids=["Latin-1", "cut", "UTF-16", "UTF-16 of the other order", "UTF-16 without a mark"],
)
def test_a_text_that_is_not_utf_8_is_an_error_that_says_what_it_is(
    text: str, what: str, by: str, tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    (tmp_path / "text").write_text(text, errors="surrogateescape", newline="")
    arguments = ["-"] if by == "standard input" else ["--file", by]
    done = run("say", *arguments, cwd=tmp_path, stdin=text if arguments == ["-"] else "", **key, LC_ALL="C")
    assert (done.returncode, done.stdout) == (2, "")
    said = " ".join(done.stderr.split())
    assert f"{by} cannot be read: it " in said.lower()
    assert what in said.lower()
    assert "Nothing was submitted." in said
    assert len(done.stderr.splitlines()) <= 5
    assert sandbox.requests("submit") == []


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        (["say", LATIN_1], 2),
        (["say", "Hello.", "--voice", LATIN_1], 4),
        (["say", "Hello.", "--option", f"emotion={LATIN_1}"], 4),
        (["say", "Hello.", "--name", LATIN_1], 4),
        (["say", "Hello.", f"--save-to={LATIN_1}"], 3),
        (["batch", f"{LATIN_1}.csv"], 2),
    ],
    ids=lambda value: " ".join(value[:-1]) if isinstance(value, list) else "",
)
def test_an_argument_that_is_not_utf_8_is_an_error_that_shows_it(
    arguments: list[str], number: int, tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    done = run(*arguments, cwd=tmp_path, **key, LC_ALL="C")
    assert (done.returncode, done.stdout) == (2, "")
    said = " ".join(done.stderr.split())
    assert f"The argument {number} (" in said
    assert r"caf\xe9" in said
    assert "is not UTF-8" in said
    assert "Traceback" not in said
    assert sandbox.ledger.charges == []


def test_an_argument_that_is_not_utf_8_is_shown_without_the_password_of_its_url(tmp_path: Path) -> None:
    done = run("say", "Hello.", "--save-to", "ftp://speaker:mistyped@host/caf\udce9", cwd=tmp_path)
    assert done.returncode == 2
    assert "ftp://host/caf" in done.stderr
    assert "mistyped" not in done.stderr


def test_a_closed_standard_input_is_an_error(tmp_path: Path, key: dict[str, str]) -> None:
    command = Path(sys.executable).parent / "prefect-nanogpt"
    done = subprocess.run(
        ["sh", "-c", f"{command} say - <&-"], cwd=tmp_path, env={**os.environ, **key}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "Standard input cannot be read: it is closed." in done.stderr


def test_batch_says_every_line_and_prints_where_the_manifest_is(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    (tmp_path / "lines.csv").write_text("id,text\nhello,Hello.\nbye,Bye.\n")
    done = run("batch", "lines.csv", "--save-to", "here", cwd=tmp_path, **key)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/here/manifest.jsonl\n")
    assert "2 of 2 lines" in done.stderr
    assert files_in(tmp_path / "here") == {"hello.mp3", "bye.mp3", "manifest.jsonl"}

    with (tmp_path / "lines.csv").open("a") as file:
        file.write("bad,[sandbox:reject] No.\n")
    done = run("batch", "lines.csv", "--save-to", "here", cwd=tmp_path, **key)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("TTS_BATCH_PARTIAL: 1 of 3 lines have no audio")
    assert len(sandbox.requests("submit")) == 3


def test_say_takes_a_name_a_format_and_options_of_the_model(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    done = run(
        *("say", "Hello.", "--model", "gpt-4o-mini-tts", "--name", "greeting", "--response-format", "wav"),
        *("--option", "instructions=Cheerfully.", "--option", "seed=7"),
        cwd=tmp_path,
        **key,
    )
    assert done.stdout == f"{tmp_path}/audio/greeting.wav\n"
    [request] = sandbox.requests("submit")
    assert request.json == {
        "text": "Hello.",
        "model": "gpt-4o-mini-tts",
        "response_format": "wav",
        "instructions": "Cheerfully.",
        "seed": 7,
    }


def test_the_same_command_pays_once_and_another_take_is_another_job(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    first, again, other = (
        run("say", "Hello.", *more, cwd=tmp_path, **key).stdout for more in ([], [], ["--take", "2"])
    )
    assert first == again != other
    assert [Path(said.strip()).exists() for said in (first, other)] == [True, True]
    assert len(sandbox.ledger.charges) == 2


def test_an_uncertain_submission_is_submitted_anew_only_by_the_command_that_is_printed(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    sandbox.on_submit([Accept(then=Cut())])
    failed = run("say", "It's paid, or is it?", cwd=tmp_path, **key)
    again = run("say", "It's paid, or is it?", cwd=tmp_path, **key)
    for done in (failed, again):
        said, *how = done.stderr.splitlines()[-3:]
        assert (done.returncode, done.stdout) == (1, "")
        assert said.startswith("SUBMISSION_UNCERTAIN: ")
        assert how[0] == "To submit it anew, and perhaps pay twice:"
        assert shlex.split(how[1]) == [
            *("prefect-nanogpt", "say", "It's paid, or is it?"),
            *("--save-to", str(tmp_path / "audio"), "--resubmit", "uncertain"),
        ]
    assert len(sandbox.requests("submit")) == 1

    done = run(*shlex.split(how[1])[1:], cwd=tmp_path, **key)
    assert done.returncode == 0
    assert len(sandbox.requests("submit")) == 2


def test_an_uncertain_line_of_a_batch_is_told_with_its_command(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    (tmp_path / "lines.csv").write_text("id,text\nhello,Hello.\n")
    sandbox.on_submit([Accept(then=Cut())])
    done = run("batch", "lines.csv", cwd=tmp_path, **key)
    assert done.returncode == 1
    command = f"prefect-nanogpt batch lines.csv --save-to {tmp_path}/audio"
    assert done.stderr.splitlines()[-4:] == [
        "To do what is missing:",
        command,
        "To submit the uncertain lines too, and perhaps pay twice:",
        f"{command} --resubmit uncertain",
    ]
    assert run(*shlex.split(command)[1:], "--resubmit", "uncertain", cwd=tmp_path, **key).returncode == 0
    assert files_in(tmp_path / "audio") == {"hello.mp3", "manifest.jsonl"}


def test_a_run_that_times_out_prints_the_command_that_waits_on(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    sandbox.on_status(None, [{"status": "processing"}] * 2)
    done = run("say", "Not yet.", "--timeout-seconds", "0.1", cwd=tmp_path, **key)
    command = f"prefect-nanogpt say 'Not yet.' --timeout-seconds 0.1 --save-to {tmp_path}/audio"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2].startswith("Whatever was submitted is paid for, and is found again;")
    assert done.stderr.splitlines()[-1] == command

    run_id = sandbox.ledger.charges[0].run_id
    sandbox.on_status(run_id, [sandbox.completed_body(run_id)])
    done = run(*shlex.split(command)[1:], cwd=tmp_path, **key)
    assert done.stdout == f"{tmp_path}/audio/{run_id}.mp3\n"
    assert len(sandbox.ledger.charges) == 1


def test_a_job_that_the_provider_no_longer_knows_is_submitted_anew_only_by_the_command_that_is_printed(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    sandbox.on_status(None, [Answer(404)] * 4)
    done = run("say", "Forgotten.", cwd=tmp_path, **key)
    command = f"prefect-nanogpt say Forgotten. --save-to {tmp_path}/audio --resubmit lost"
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == ["To submit the text anew, and pay for it again:", command]

    sandbox.on_status(None, [Answer(404)] * 4)
    assert run(*shlex.split(command)[1:], cwd=tmp_path, **key).returncode == 0
    assert len(sandbox.ledger.charges) == 2


def test_what_is_no_audio_is_paid_for_anew_only_by_the_command_that_is_printed(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    sandbox.on_submit([Answer(body=b"not audio", headers={"content-type": "audio/mpeg"})])
    done = run("say", "Hello.", "--model", "tts-1", cwd=tmp_path, **key)
    command = f"prefect-nanogpt say Hello. --model tts-1 --save-to {tmp_path}/audio --resubmit lost"
    assert "AUDIO_INVALID: " in done.stderr
    assert done.stderr.splitlines()[-2:] == ["To submit the text anew, and pay for it again:", command]

    assert run(*shlex.split(command)[1:], cwd=tmp_path, **key).returncode == 0
    assert len(sandbox.requests("submit")) == 2


def test_a_job_that_failed_for_another_reason_prints_the_command_that_submits_it_anew(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    done = run("say", "[sandbox:fail] Hm.", cwd=tmp_path, **key)
    assert done.stderr.splitlines()[-2:] == [
        "To submit the text anew, and pay for it again:",
        f"prefect-nanogpt say '[sandbox:fail] Hm.' --save-to {tmp_path}/audio",
    ]


class Interrupted:
    """A command that somebody stops with Ctrl-C."""

    def __init__(self, *arguments: str, cwd: Path, **env: str) -> None:
        self._process = subprocess.Popen(
            [str(Path(sys.executable).parent / "prefect-nanogpt"), *arguments],
            cwd=cwd,
            env={**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []

    def press(self, number: signal.Signals = signal.SIGINT) -> None:
        self._process.send_signal(number)

    def read_until(self, words: str) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self.lines.append(line.rstrip("\n"))
            if words in line:
                return
        raise AssertionError(self.lines)

    def end(self) -> tuple[int, str]:
        printed, rest = self._process.communicate(timeout=60)
        self.lines += rest.splitlines()
        return self._process.returncode, printed


@pytest.mark.parametrize("command", ["say", "batch"])
def test_ctrl_c_while_a_submission_is_in_the_air_waits_for_its_ticket_and_says_how_to_go_on(
    command: str, tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    (tmp_path / "lines.csv").write_text("id,text\nhello,Hello.\n")
    arguments = [command, "lines.csv" if command == "batch" else "Hello.", "--save-to", "here"]
    sandbox.on_submit([Accept(delay=5)])
    interrupted = Interrupted(*arguments, cwd=tmp_path, **key)
    sandbox.wait_for_request("submit")
    interrupted.press()
    interrupted.read_until("A submission has left and is being charged for. Waiting for its ticket")

    assert interrupted.end() == (130, "")
    if command == "say":  # the tickets of a batch are in the ledger alone
        assert any(line.startswith("Accepted and charged. Ticket: ") for line in interrupted.lines)
    assert interrupted.lines[-2].startswith("Stopped. Whatever was submitted is paid for, and is found again;")
    assert shlex.split(interrupted.lines[-1]) == ["prefect-nanogpt", *arguments[:-1], f"{tmp_path}/here"]
    assert "Traceback" not in "".join(interrupted.lines)
    assert run(*shlex.split(interrupted.lines[-1])[1:], cwd=tmp_path, **key).returncode == 0
    assert len(sandbox.ledger.charges) == 1


def test_a_second_ctrl_c_waits_for_nothing_and_the_submission_is_uncertain(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    sandbox.on_submit([Accept(then=Hang(600))])
    interrupted = Interrupted("say", "Hello.", cwd=tmp_path, **key)
    sandbox.wait_for_request("submit")
    interrupted.press()
    interrupted.read_until("Waiting for its ticket")
    interrupted.press()

    code, _ = interrupted.end()
    assert code == 130
    done = run("say", "Hello.", cwd=tmp_path, **key)
    assert "SUBMISSION_UNCERTAIN" in done.stderr
    assert len(sandbox.requests("submit")) == 1


def test_ctrl_c_while_a_job_is_waited_for_says_how_to_go_on(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    sandbox.on_status(None, itertools.repeat({"status": "pending"}))
    interrupted = Interrupted("say", "Hello.", cwd=tmp_path, **key)
    sandbox.wait_for_request("status")
    interrupted.press()

    assert interrupted.end() == (130, "")
    assert interrupted.lines[-1] == f"prefect-nanogpt say Hello. --save-to {tmp_path}/audio"
    run_id = sandbox.ledger.charges[0].run_id
    sandbox.on_status(run_id, itertools.repeat(sandbox.completed_body(run_id)))
    assert run(*shlex.split(interrupted.lines[-1])[1:], cwd=tmp_path, **key).returncode == 0
    assert len(sandbox.ledger.charges) == 1


@pytest.mark.parametrize("command", ["say", "batch", "wait"])
def test_a_terminated_command_says_how_to_go_on(
    command: str, tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    (tmp_path / "lines.csv").write_text("id,text\nhello,Hello.\n")
    ticket = sandbox.add_job(text="Elsewhere.") if command == "wait" else {"runId": "", "model": ""}
    arguments = {
        "say": ["say", "Hello.", "--resubmit", "uncertain"],
        "batch": ["batch", "--resubmit=lost", "lines.csv"],
        "wait": ["wait", ticket["runId"], "--model", ticket["model"]],
    }[command]
    sandbox.on_status(None, itertools.repeat({"status": "pending"}))
    stopped = Interrupted(*arguments, cwd=tmp_path, **key)
    sandbox.wait_for_request("status")
    stopped.press(signal.SIGTERM)

    assert stopped.end() == (143, "")
    assert "Traceback" not in "".join(stopped.lines)
    kept = [word for word in arguments if word not in ("--resubmit", "uncertain", "--resubmit=lost")]
    assert shlex.split(stopped.lines[-1]) == ["prefect-nanogpt", *kept, "--save-to", f"{tmp_path}/audio"]
    assert ("at no cost" in stopped.lines[-2]) == (command == "wait")


def test_the_printed_command_works_in_another_folder_and_pays_nothing_anew(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    sandbox.on_status(None, itertools.repeat({"status": "processing"}))
    late = ["--timeout-seconds", "0.1", "--save-to", "here"]
    done = run("say", *late, "--", "--Dashes, it says.", cwd=tmp_path, **key)
    run_id = sandbox.ledger.charges[0].run_id
    # As its first answer: on a slow machine there is no second one before the deadline.
    sandbox.on_status(run_id, itertools.repeat(sandbox.completed_body(run_id)))
    (tmp_path / "elsewhere").mkdir()
    again = run(*shlex.split(done.stderr.splitlines()[-1])[1:], cwd=tmp_path / "elsewhere", **key)

    assert again.stdout == f"{tmp_path}/here/{run_id}.mp3\n"
    assert len(sandbox.ledger.charges) == 1

    piped = run("say", "-", *late, cwd=tmp_path, stdin="Piped in.", **key)
    assert piped.stderr.splitlines()[-1].endswith("  # with the same text on standard input")


def test_a_terminal_shows_words_as_they_are_and_keeps_warnings(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    sandbox.on_status(None, [{"status": "warming [/gpu]"}])
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "prefect-nanogpt"), "say", "Hello.", "--save-to", "here [/b]"],
        cwd=tmp_path,
        env={**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), "TERM": "xterm", "COLUMNS": "200", **key},
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(terminal, 65_536):
            shown += piece
    os.close(terminal)

    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert printed.decode() == f"{tmp_path}/here [/b]/{sandbox.ledger.charges[0].run_id}.mp3\n"
    warning = "The provider calls the job 'warming [/gpu]', which is not documented. Waiting on."
    assert f"{warning}\r\n" in shown.decode()


def test_what_prefect_refuses_is_said_without_a_traceback(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    (tmp_path / "long").write_text("A sentence of a long text. " * 23_000)
    done = run("say", "--file", "long", cwd=tmp_path, **key)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Prefect cannot be used: " in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 2_000
    assert sandbox.requests("submit") == []


def test_no_key_at_all_is_said_before_any_request(tmp_path: Path, sandbox: Sandbox) -> None:
    done = run("wait", "98b0d593", "--model", "Elevenlabs-V3", cwd=tmp_path, NANOGPT_BASE_URL=sandbox.base_url)
    assert (done.returncode, done.stdout) == (2, "")
    assert "NANOGPT_API_KEY" in done.stderr
    assert sandbox.requests() == []


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NANOGPT_BASE_URL": "http://127.0.0.1:1/api"}, "NANOGPT_API_KEY is not"),
        ({"NANOGPT_API_KEY": API_KEY, "NANOGPT_BASE_URL": "nano-gpt.com/api"}, "not an http or https URL"),
    ],
)
@pytest.mark.parametrize("command", [["say", "Hello."], ["serve", "--port", "0"]])
def test_credentials_that_cannot_be_used_are_not_answered_by_the_sandbox(
    command: list[str], environment: dict[str, str], words: str, tmp_path: Path
) -> None:
    done = run(*command, cwd=tmp_path, **environment)

    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert API_KEY not in done.stderr
    assert not (tmp_path / "audio").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["say"], "text"),
        (["say", " "], "nothing to say"),
        (["say", "Hello", "--file", "x"], "only one of them"),
        (["say", "--voic"], "--voic"),
        (["say", "--file", "not-there"], "not-there"),
        (["batch", "not-there.csv"], "lines_unreadable: not-there.csv"),
        (["batch", "x.csv", "--requests-per-second", "26"], "requests-per-second"),
        (["say", "Hello", "--speed", "9"], "speed"),
        (["say", "Hello", "--timeout-seconds", "-1"], "timeout"),
        (["wait", "98b0d593"], "model"),
        (["wait", "../98b0d593", "--model", "m"], "run-id"),
        (["wait", "98b0d593", "--model", "m", "--cost", "a lot"], "cost"),
        (["sing"], "sing"),
        (["say", "Hello", "--option", "emotion"], "--option emotion is not key=value"),
        (["say", "Hello", "--option", "stability=2"], "stability"),
        (["say", "Hello", "--option", "Model=tts-1"], "--option: model is no option but a field of its own"),
        (["say", "Hello", "--option", "mood=a", "--option", "mood=b"], "--option: 'mood' is there twice"),
        (["batch", "x.csv", "--option", "mood=a", "--option", "Mood=b"], "--option: 'mood' is there twice"),
        (["say", "Hello", "--speed", "1", "--option", "Speed=2"], "--option: 'speed' is there twice"),
        (["say", "Hello", "--option", "option.mood=calm"], "--option: 'option.mood' is no option"),
        (["say", "Hello", "--option", "Stability=1,5"], "stability: input should be less than or equal to 1"),
        (["say", "Hello", "--option", "pitch=1,5"], "--option: pitch: '1,5' is no number: write 1.5"),
        (["say", "Hello", "--take", "0"], "take"),
        (["say", "Hello", "--resubmit", "everything"], "resubmit"),
        (["say", "Hello", "--response-format", "pcm"], "response-format"),
        (["say", "Hello", "--max-cost", "-1"], "max-cost"),
        (["say", "Hello", "--name", ""], "name"),
        (["say", "Hello", "--name", "n" * 101], "name"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_exits_with_2_and_says_what_is_wrong(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr.lower()
    assert len(done.stderr.splitlines()) <= 3


# What is printed


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:strict"])
def test_a_place_that_the_terminal_has_no_characters_for_ends_nothing(
    encoding: str, tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    done = run("say", "Hello.", "--save-to", "звук", cwd=tmp_path, PYTHONIOENCODING=encoding, **key)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1), done.stderr
    assert len(list((tmp_path / "звук").glob("*.mp3"))) == 1
    done = run("say", "[sandbox:reject] Ё", "--save-to", "звук", cwd=tmp_path, PYTHONIOENCODING=encoding, **key)
    assert (done.returncode, done.stdout) == (1, "")
    assert "CONTENT_POLICY_VIOLATION" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_to_go_on_with_has_no_password_and_says_so(tmp_path: Path, key: dict[str, str]) -> None:
    (tmp_path / "lines.csv").write_text("id,text\na,Hello.\n")
    place = "ftp://speaker:mistyped@127.0.0.1:1/speech"
    shown = "--save-to ftp://127.0.0.1:1/speech  # with the user and the password put back into the URL"
    for command in (["say", "Hello."], ["batch", "lines.csv"]):
        done = run(*command, "--save-to", place, cwd=tmp_path, **key)
        assert done.returncode == 1
        assert f"prefect-nanogpt {shlex.join(command)} {shown}" in done.stderr
        assert "mistyped" not in done.stderr
    done = run("batch", f"{place}/lines.csv", cwd=tmp_path, **key)
    assert done.returncode == 2
    assert "mistyped" not in done.stderr
