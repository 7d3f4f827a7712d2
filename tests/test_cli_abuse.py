"""The command line, as it is treated: stopped at any moment, with its output closed, with numbers that are none."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt.events import resume_command
from prefect_nanogpt.models import Ticket
from prefect_nanogpt.sandbox import Sandbox
from tests.conftest import API_KEY, free_port

COMMAND = str(Path(sys.executable).parent / "prefect-nanogpt")


@pytest.fixture
def environment(sandbox: Sandbox) -> dict[str, str]:
    return {
        **os.environ,
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "NANOGPT_API_KEY": API_KEY,
        "NANOGPT_BASE_URL": sandbox.base_url,
    }


def run(*arguments: str, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [COMMAND, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )


def processes_with(mark: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"ABUSED={mark}".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:  # it has just ended, or is somebody else's
            continue
    return found


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal."""
    [mask] = re.findall(r"^SigCgt:\s*([0-9a-f]+)$", Path(f"/proc/{pid}/status").read_text(), flags=re.MULTILINE)
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGINT, 0), (signal.SIGINT, 4), (signal.SIGTERM, 4), (signal.SIGINT, 8)]
)
def test_a_signal_while_the_server_starts_ends_everything_without_a_traceback(
    number: signal.Signals, seconds: float, tmp_path: Path, environment: dict[str, str], sandbox: Sandbox
) -> None:
    environment = {key: value for key, value in environment.items() if key != "PREFECT_API_URL"}
    environment |= {"PREFECT_HOME": str(tmp_path / "prefect"), "ABUSED": str(tmp_path)}
    process = subprocess.Popen(
        [COMMAND, "say", "Hello."],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not catches(process.pid, signal.SIGTERM):  # before it has begun, a signal is answered by Python itself
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(seconds)
    os.killpg(process.pid, number)  # as a terminal does
    printed, said = process.communicate(timeout=60)

    assert process.returncode in (128 + number, 0)
    assert "Traceback" not in printed + said
    deadline = time.monotonic() + 20
    while processes_with(str(tmp_path)):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.2)


@pytest.mark.parametrize("where", [">/dev/full", ">&-", "| head -c 0"])
def test_an_output_that_cannot_be_written_is_said_on_standard_error_with_what_it_was_to_get(
    where: str, tmp_path: Path, environment: dict[str, str], sandbox: Sandbox
) -> None:
    command = f"{{ {COMMAND} say Hello.; echo $? >code; }} {where}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert (tmp_path / "code").read_text() == "1\n", done.stderr
    [charge] = sandbox.ledger.charges
    last = done.stderr.splitlines()[-1]
    assert last.startswith("Standard output cannot be written: ")
    assert last.endswith(f"It was to get: {tmp_path}/audio/{charge.run_id}.mp3")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-", "2> >(head -c 0)", "<&- 2>&-"])
def test_a_standard_error_that_cannot_be_written_ends_no_job(
    where: str, tmp_path: Path, environment: dict[str, str], sandbox: Sandbox
) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{COMMAND} say Hello. {where}"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )

    [charge] = sandbox.ledger.charges
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/audio/{charge.run_id}.mp3\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["say", "Hi", "--timeout-seconds", "nan"],
        ["say", "Hi", "--timeout-seconds", "inf"],
        ["say", "Hi", "--speed", "nan"],
        ["say", "Hi", "--max-cost", "nan"],
        ["say", "Hi", "--max-cost", "1e400"],
        ["say", "Hi", "--take", "9" * 30],
        ["say", "Hi", "--save-to", ""],
        ["say", "Hi", "--model", ""],
        ["say", "Hi", "--voice", ""],
        ["say", "Hi", "--name", "n" * 10_000],
        ["batch", "x.csv", "--requests-per-second", "nan"],
        ["batch", "x.csv", "--max-in-flight", "0"],
        ["wait", "abc", "--model", "m", "--cost", "nan"],
        ["wait", "abc", "--model", "m", "--cost=-1"],
        ["sandbox", "--port", "99999"],
        ["sandbox", "--audio-port=-1"],
        ["sandbox", "--job-seconds", "nan"],
        ["serve", "--port", "99999"],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_a_value_that_cannot_be_meant_is_refused_by_the_name_of_its_option(
    arguments: list[str], tmp_path: Path, environment: dict[str, str], sandbox: Sandbox
) -> None:
    done = run(*arguments, cwd=tmp_path, environment=environment)

    assert (done.returncode, done.stdout) == (2, "")
    option = next(word for word in reversed(arguments) if word.startswith("--")).partition("=")[0]
    assert option.strip("-").replace("-", "_") in done.stderr.lower().replace("-", "_")
    assert len(done.stderr) < 600
    assert "Traceback" not in done.stderr
    assert sandbox.requests() == []


def test_a_working_directory_that_is_gone_is_bad_usage(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "gone").mkdir()
    command = f"cd gone && rmdir ../gone && exec {COMMAND} say Hello."
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("The working directory cannot be used: ")
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_said_in_one_line(
    tmp_path: Path, environment: dict[str, str], sandbox: Sandbox
) -> None:
    port = sandbox.root_url.rpartition(":")[2]
    done = run("sandbox", "--port", port, cwd=tmp_path, environment=environment)

    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert port in done.stderr


@pytest.mark.parametrize("run_id", ["-abc", "--", "-x=1", "--model", "an id", "it's", "-it's an id"])
@pytest.mark.parametrize("model", ["Elevenlabs-Turbo-V2.5", "-x"])
def test_the_command_that_waits_for_a_ticket_gives_it_to_the_command_line_as_it_is(run_id: str, model: str) -> None:
    from prefect_nanogpt.cli import app, wait

    ticket = Ticket(run_id=run_id, model=model, cost="0.1", payment_source="USD")
    program, *words = shlex.split(resume_command(ticket, "/audio"))
    command, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)

    assert (program, command) == ("prefect-nanogpt", wait)
    assert (*bound.args[:1], bound.kwargs["model"]) == (run_id, model)


def test_a_run_id_that_begins_with_a_dash_is_waited_for_by_the_printed_command(
    tmp_path: Path, environment: dict[str, str], sandbox: Sandbox
) -> None:
    ticket = Ticket.model_validate(sandbox.add_job(run_id="-abc"))
    _, *words = shlex.split(resume_command(ticket, str(tmp_path)))
    done = run(*words, cwd=tmp_path, environment=environment)

    assert done.returncode == 0, done.stderr
    assert [request.run_id for request in sandbox.requests("status")] == ["-abc"]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"NANOGPT_BASE_URL": "nano-gpt.com/api"}, "NANOGPT_BASE_URL"),
        ({"NANOGPT_API_KEY": "kéy"}, "key"),
        ({"NANOGPT_LEDGER": "/dev/null/ledger"}, "NANOGPT_LEDGER"),
        ({"PREFECT_API_URL": "nonsense"}, "PREFECT_API_URL"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("command", [["say", "Hi"], ["batch", "x.csv"], ["wait", "abc", "--model", "m"], ["serve"]])
def test_an_environment_that_cannot_be_used_is_bad_usage_for_every_command(
    command: list[str], bad: dict[str, str], words: str, tmp_path: Path, environment: dict[str, str], sandbox: Sandbox
) -> None:
    (tmp_path / "x.csv").write_text("id,text\na,Hello.\n")
    command = [*command, "--port", str(free_port())] if command == ["serve"] else command
    done = run(*command, cwd=tmp_path, environment={**environment, **bad})

    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert words in done.stderr
    assert "No NANOGPT_API_KEY" not in done.stderr
    assert "Traceback" not in done.stderr
    assert sandbox.requests() == []
