"""`say --play`: the shell speaks, where something on the machine can."""

import os
import shutil
from pathlib import Path

import pytest

from prefect_nanogpt.sandbox import Sandbox
from tests.conftest import API_KEY
from tests.s3_server import S3Server, s3, s3_env
from tests.test_cli import run

__all__ = ["s3", "s3_env"]


@pytest.fixture
def key(sandbox: Sandbox) -> dict[str, str]:
    return {"NANOGPT_API_KEY": API_KEY, "NANOGPT_BASE_URL": sandbox.base_url, "DISPLAY": "", "WAYLAND_DISPLAY": ""}


def player(folder: Path, name: str, end: int = 0) -> dict[str, str]:
    """Put a player on an otherwise empty PATH that keeps what it is to play, and give the PATH."""
    folder.mkdir(exist_ok=True)
    script = folder / name
    keep = f'for last; do :; done\necho "$0 $*" >> {folder}/calls\n/bin/cp "$last" {folder}/played'
    script.write_text(f"#!/bin/sh\n{keep}\nexit {end}\n")
    script.chmod(0o755)
    return {"PATH": str(folder)}


@pytest.mark.skipif(shutil.which("ffplay") is None, reason="no ffplay on this machine")
def test_a_real_player_plays_it_to_the_end(tmp_path: Path, key: dict[str, str]) -> None:
    done = run("say", "Played.", "--play", cwd=tmp_path, SDL_AUDIODRIVER="dummy", **key)
    assert done.returncode == 0
    assert "cannot be played" not in done.stderr
    assert Path(done.stdout.strip()).is_file()


def test_the_first_player_that_succeeds_plays_it_and_nothing_else_is_said(tmp_path: Path, key: dict[str, str]) -> None:
    player(tmp_path / "players", "ffplay", end=1)
    path = player(tmp_path / "players", "mpv")
    done = run("say", "Played.", "--play", cwd=tmp_path, **key, **path)
    calls = (tmp_path / "players" / "calls").read_text().splitlines()
    assert [Path(call.split()[0]).name for call in calls] == ["ffplay", "mpv"]
    assert done.returncode == 0
    assert (tmp_path / "players" / "played").read_bytes() == Path(done.stdout.strip()).read_bytes()
    assert "cannot be played" not in done.stderr


def test_a_player_that_knows_other_containers_is_passed_over(tmp_path: Path, key: dict[str, str]) -> None:
    done = run("say", "MP3.", "--play", cwd=tmp_path, **key, **player(tmp_path / "players", "aplay"))
    assert not (tmp_path / "players" / "calls").exists()
    assert done.returncode == 0
    assert f"cannot be played: there is no player here that can. It is at {done.stdout.strip()}" in done.stderr
    again = run(
        *("say", "WAV.", "--model", "Kokoro-82m", "--play"),
        cwd=tmp_path,
        **key,
        **player(tmp_path / "players", "aplay"),
    )
    assert again.returncode == 0
    assert (tmp_path / "players" / "played").read_bytes() == Path(again.stdout.strip()).read_bytes()


def test_what_is_in_a_bucket_is_fetched_to_be_played_and_not_kept(
    tmp_path: Path, s3_env: S3Server, key: dict[str, str]
) -> None:
    (tmp_path / "temporary").mkdir()
    done = run(
        *("say", "Played from afar.", "--save-to", "s3://speech/episodes", "--play"),
        cwd=tmp_path,
        TMPDIR=str(tmp_path / "temporary"),
        **key,
        **player(tmp_path / "players", "ffplay"),
    )
    assert done.returncode == 0
    name = done.stdout.strip().removeprefix("s3://speech/")
    assert (tmp_path / "players" / "played").read_bytes() == s3_env.objects()[name]
    assert [found for found in os.listdir(tmp_path / "temporary") if found.startswith("tmp")] == []


def test_a_text_that_is_not_said_is_not_played(tmp_path: Path, key: dict[str, str]) -> None:
    done = run("say", "[sandbox:reject] No.", "--play", cwd=tmp_path, **key, **player(tmp_path / "players", "ffplay"))
    assert done.returncode == 1
    assert not (tmp_path / "players" / "calls").exists()
    assert "played" not in done.stderr
