"""The command line, as a person uses it: in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt.sandbox import Sandbox
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
        text=True,
        timeout=120,
    )


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
    done = run("say", "Hello again.", cwd=tmp_path, server=False, PREFECT_HOME=str(tmp_path / "prefect"))
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


def test_say_reads_standard_input_and_files(tmp_path: Path, sandbox: Sandbox, key: dict[str, str]) -> None:
    (tmp_path / "text").write_text("Read from a file.", encoding="utf-8-sig")
    assert run("say", "-", cwd=tmp_path, stdin="Piped in.\n", **key).returncode == 0
    assert run("say", "--file", "text", cwd=tmp_path, **key).returncode == 0
    assert [request.json["text"] for request in sandbox.requests("submit")] == ["Piped in.\n", "Read from a file."]


def test_batch_says_every_line_and_prints_where_the_manifest_is(
    tmp_path: Path, sandbox: Sandbox, key: dict[str, str]
) -> None:
    (tmp_path / "lines.csv").write_text("id,text\nhello,Hello.\nbye,Bye.\n")
    done = run("batch", "lines.csv", "--save-to", "here", cwd=tmp_path, **key)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/here/manifest.jsonl\n")
    assert "2 of 2 lines" in done.stderr
    assert {path.name for path in (tmp_path / "here").iterdir()} == {"hello.mp3", "bye.mp3", "manifest.jsonl"}

    with (tmp_path / "lines.csv").open("a") as file:
        file.write("bad,[sandbox:reject] No.\n")
    done = run("batch", "lines.csv", "--save-to", "here", cwd=tmp_path, **key)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("TTS_BATCH_PARTIAL: 1 of 3 lines have no audio")
    assert len(sandbox.requests("submit")) == 3


def test_no_key_at_all_is_said_before_any_request(tmp_path: Path, sandbox: Sandbox) -> None:
    done = run("wait", "98b0d593", "--model", "Elevenlabs-V3", cwd=tmp_path, NANOGPT_BASE_URL=sandbox.base_url)
    assert (done.returncode, done.stdout) == (1, "")
    assert "NANOGPT_API_KEY" in done.stderr
    assert sandbox.requests() == []


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
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_exits_with_2_and_says_what_is_wrong(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr.lower()
    assert len(done.stderr.splitlines()) <= 3
