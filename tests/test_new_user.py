"""The first hour of a new user: the wheel in an empty folder and home, `serve`, the form, and then the audio, heard.

Without a key, so that it is the sandbox of `serve` that speaks. With SCREENSHOTS set to a folder, the pages are
photographed on the way.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.conftest import free_port, wait_for
from tests.s3_server import NOBODY, S3Server
from tests.test_installed import COMMAND, Installation, installed, without_python
from tests.test_ui import CHROMIUM, SCREENSHOTS, Served, browser, page, photograph, start_from_the_form, ui

__all__ = ["browser", "installed", "page", "ui"]

TEXT = "Good morning. Here is the news, read by nobody in particular."
LINES = [
    {"id": "gate-1", "text": "Halt! Who goes there?", "voice": "Adam"},
    {"id": "gate-2", "text": "Only a traveller, looking for a bed."},
    {"id": "gate-3", "text": "[sandbox:reject] What nobody may say at a gate."},
]
FOLDER = Path("/srv/radio")
"""Where the photographs are taken, so that no path of a test machine is in them."""

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.xdist_group("installed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder, in which everything is done."""
    if not SCREENSHOTS:
        yield tmp_path_factory.mktemp("empty")
        return
    FOLDER.mkdir()
    yield FOLDER
    shutil.rmtree(FOLDER)


@pytest.fixture(scope="module")
def s3_of_a_friend() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in NOBODY.items():
            patch.setenv(name, value)
        with S3Server() as server:
            yield server


@pytest.fixture(scope="module")
def served(installed: Installation, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("home")
    port = free_port()
    ours = ("PREFECT", "NANOGPT", "AWS")
    environment = {name: value for name, value in without_python().items() if not name.startswith(ours)}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [installed.python, "-m", COMMAND, "serve", "--port", str(port), "--listen-port", "0"],
            cwd=folder,
            env={**environment, "HOME": str(home), "PREFECT_RUNNER_POLL_FREQUENCY": "1"},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            wait_for(lambda: "It can be heard at" in (home / "log").read_text() or process.poll() is not None, 120)
            assert process.poll() is None, (home / "log").read_text()
            yield Served(f"http://127.0.0.1:{port}")
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
    said = (home / "log").read_text()
    assert "Traceback" not in said
    assert "https://nano-gpt.com/api" in said


def started(served: Served, flow: str, **parameters: Any) -> dict[str, Any]:
    """Start a run with parameters, and wait for its end."""
    before = served.ended_runs(flow)
    deployment = served.api(f"/deployments/name/{flow}/{flow}")["id"]
    served.api(f"/deployments/{deployment}/create_flow_run", {"parameters": parameters})
    return served.ended_run(flow, before)


def open_report(served: Served, page: Page, ui: str, run: dict[str, Any], key: str = "tts-audio") -> None:
    page.goto(f"{ui}/artifacts/artifact/{served.report_of(run, key)['id']}")


def follow(page: Page, name: str) -> Page:
    """Press a link, and give the page it leads to: in a tab of its own or not, as each version of the UI has it."""
    here = page.url
    page.get_by_role("link", name=name, exact=True).first.click()
    wait_for(lambda: page.wait_for_timeout(100) or len(page.context.pages) > 1 or page.url != here, 60)
    there = page.context.pages[-1]
    there.wait_for_load_state()
    return there


def seconds_played(page: Page) -> float:
    """Press the player's button, and give how far it has come after a while."""
    player = page.locator("audio, video").first
    expect(player).to_be_visible()
    box = player.bounding_box()
    assert box is not None
    if player.evaluate("player => player.paused"):
        page.mouse.click(box["x"] + 27, box["y"] + box["height"] / 2)

    def played() -> float:
        page.wait_for_timeout(50)
        return float(player.evaluate("player => player.error ? -1 : player.currentTime"))

    return float(wait_for(played, 30))


def test_a_sentence_that_is_typed_into_the_form_is_heard(served: Served, ui: str, page: Page, folder: Path) -> None:
    before = served.ended_runs("text-to-speech")
    start_from_the_form(served, page, ui, TEXT, photo="form")
    run = served.ended_run("text-to-speech", before)
    assert run["state_name"] == "Completed"
    page.goto(f"{ui}/runs/flow-run/{run['id']}")
    expect(page.get_by_text("Completed").first).to_be_visible()
    assert len(list((folder / "audio").glob("*.mp3"))) == 1  # the second version of the UI finds it

    open_report(served, page, ui, run)
    expect(page.get_by_role("img", name="Waveform")).to_be_visible()
    photograph(page, ui, "report")
    there = follow(page, "Listen")
    expect(there.get_by_text(TEXT)).to_be_visible()
    assert seconds_played(there) > 0


def test_a_batch_is_heard_line_by_line_and_as_a_whole(served: Served, ui: str, page: Page) -> None:
    run = started(served, "text-to-speech-batch", lines=LINES, save_to="audio/gate")
    assert run["state_name"] == "TTS_BATCH_PARTIAL"
    open_report(served, page, ui, run, key="tts-batch")
    expect(page.get_by_text("CONTENT_POLICY_VIOLATION").first).to_be_visible()
    there = follow(page, "Listen to all")
    expect(there.locator("audio")).to_have_count(2)
    expect(there.get_by_text("Only a traveller")).to_be_visible()
    expect(there.get_by_text("CONTENT_POLICY_VIOLATION")).to_be_visible()
    photograph(there, ui, "listen")
    assert seconds_played(there) > 0

    with there.expect_download() as downloaded:
        there.get_by_role("link", name="Download all").click()
    assert downloaded.value.suggested_filename == "gate.zip"

    if there is not page:
        there.close()
    open_report(served, page, ui, run, key="tts-batch")
    assert seconds_played(follow(page, "Listen")) > 0


def test_what_is_in_a_bucket_is_heard_through_a_signed_link(
    served: Served, ui: str, page: Page, s3_of_a_friend: S3Server, tmp_path: Path
) -> None:
    # A block, as those have one who can change no environment.
    saved = (
        "import json, os\nfrom prefect.filesystems import RemoteFileSystem\n"
        "RemoteFileSystem(basepath='s3://speech/news', settings=json.loads(os.environ['OPTIONS']))"
        ".save('news', overwrite=True)\n"
    )
    subprocess.run(
        [sys.executable, "-c", saved],
        env={**os.environ, "PREFECT_API_URL": f"{served.url}/api", "OPTIONS": json.dumps(s3_of_a_friend.settings)},
        check=True,
        timeout=60,
    )
    run = started(served, "text-to-speech", text="This one is in a bucket.", save_to="remote-file-system/news")
    assert run["state_name"] == "Completed"
    open_report(served, page, ui, run)
    expect(page.get_by_text(re.compile(r"until 20\d\d-\d\d-\d\d \d\d:\d\d UTC")).first).to_be_visible()
    there = follow(page, "Listen")
    assert there.url.startswith(f"{s3_of_a_friend.url}/speech/news/")
    assert seconds_played(there) > 0
