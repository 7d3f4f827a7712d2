"""What people see: the Prefect UI, both versions of it, in a real browser, from the form to the report."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

from prefect_nanogpt.sandbox import Sandbox
from tests.conftest import API_KEY, call_prefect, free_port, wait_for

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = os.environ.get("SCREENSHOTS")
FLAGS = """
    no-sandbox disable-gpu mute-audio autoplay-policy=no-user-gesture-required disable-quic no-first-run
    disable-background-networking disable-component-update disable-sync
""".split()
TEXT = "Good morning. Here is the news, read by nobody in particular."

expect.set_options(timeout=60_000)

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.xdist_group("ui"),
]


class Served:
    """A machine on which somebody has typed `prefect-nanogpt serve`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return call_prefect(self.url, "GET" if body is None else "POST", path, body)

    def runs(self, flow: str) -> list[dict[str, Any]]:
        """All runs of a flow, those that ended last first."""
        return list(self.api("/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "END_TIME_DESC"}))

    def ended_runs(self, flow: str) -> list[dict[str, Any]]:
        return [run for run in self.runs(flow) if run["state_type"] in {"COMPLETED", "FAILED", "CRASHED"}]

    def ended_run(self, flow: str, before: list[dict[str, Any]]) -> dict[str, Any]:
        """Wait for a run of a flow that had not ended before."""
        earlier = [run["id"] for run in before]
        try:
            return wait_for(
                lambda: next((run for run in self.ended_runs(flow) if run["id"] not in earlier), None), seconds=240
            )
        except AssertionError as nothing:
            states = [(run["expected_start_time"], run["state_name"]) for run in self.runs(flow)]
            raise AssertionError(f"{nothing}; the runs of {flow}: {sorted(states)[:10]}") from None

    def report_of(self, run: dict[str, Any], key: str = "tts-audio") -> dict[str, Any]:
        found = self.api(
            "/artifacts/filter",
            {
                "flow_runs": {"id": {"any_": [run["id"]]}},
                "artifacts": {"key": {"any_": [key]}},
            },
        )
        return dict(found[0])


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(job_seconds=3.0) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def served(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    home = tmp_path_factory.mktemp("served")
    port = free_port()
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "prefect-nanogpt"), "serve", "--port", str(port), "--listen-port", "0"],
        cwd=home,
        env={
            **os.environ,
            "PREFECT_HOME": str(home / "prefect"),
            "PREFECT_RUNNER_POLL_FREQUENCY": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
            "NANOGPT_API_KEY": API_KEY,
            "NANOGPT_BASE_URL": sandbox.base_url,
        },
        stdout=subprocess.DEVNULL,
        stderr=(home / "log").open("w"),
    )
    served = Served(f"http://127.0.0.1:{port}")
    try:
        wait_for(lambda: _all_deployed(served), seconds=120)
        yield served
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    log = (home / "log").read_text()
    assert "Traceback" not in log
    assert "RuntimeWarning" not in log


def _all_deployed(served: Served) -> bool:
    try:
        return len(served.api("/deployments/filter", {})) == 4
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[f"--{flag}" for flag in FLAGS],
        )
        yield browser
        browser.close()


@pytest.fixture(params=["/v2", ""], ids=["V2", "V1"])
def ui(request: pytest.FixtureRequest, served: Served) -> str:
    """Where one version of the UI is."""
    return f"{served.url}{request.param}"


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1280, "height": 1000}, device_scale_factor=1)
    page.set_default_timeout(60_000)
    yield page
    page.close()


def photograph(page: Page, ui: str, name: str, *, everywhere: bool = False) -> None:
    if SCREENSHOTS and (ui.endswith("/v2") or everywhere):
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=f"{SCREENSHOTS}/{name}.png", animations="disabled")


def start_from_the_form(served: Served, page: Page, ui: str, text: str, photo: str | None = None) -> None:
    """Go to the deployments, open text-to-speech, fill in its custom run, and start it."""
    page.goto(f"{ui}/deployments")
    deployment = served.api("/deployments/name/text-to-speech/text-to-speech")["id"]
    page.locator(f"a[href$='/deployments/deployment/{deployment}']").first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    expect(page.get_by_text("What to say.")).to_be_visible()
    page.locator("textarea").first.fill(text)
    if photo:
        photograph(page, ui, photo)
    submit(served, page, "text-to-speech")


def test_a_text_typed_into_the_form_becomes_a_report_with_its_waveform(served: Served, ui: str, page: Page) -> None:
    before = served.ended_runs("text-to-speech")
    start_from_the_form(served, page, ui, TEXT)
    run = served.ended_run("text-to-speech", before)
    assert run["state_name"] == "Completed"
    assert run["name"].startswith("tts-Elevenlabs-Turbo-V2.5-Good morning.")

    page.goto(f"{ui}/runs/flow-run/{run['id']}")
    expect(page.get_by_text("Completed").first).to_be_visible()

    report = served.report_of(run)
    page.goto(f"{ui}/artifacts/artifact/{report['id']}")
    waveform = page.get_by_role("img", name="Waveform")
    expect(waveform).to_be_visible()
    assert waveform.evaluate("image => image.complete && image.naturalWidth") > 0
    # Whichever version of the UI comes second finds the audio of the first, and shows the same of it.
    for fact in (TEXT, "Elevenlabs-Turbo-V2.5", "USD", "SHA-256", "isApiRequest"):
        expect(page.get_by_text(fact).first).to_be_visible()
    assert len(report["data"]) < 40_000


def test_a_refused_text_ends_in_a_state_named_by_its_code(served: Served, ui: str, page: Page) -> None:
    before = served.ended_runs("text-to-speech")
    start_from_the_form(served, page, ui, "[sandbox:reject] What nobody may say.")
    run = served.ended_run("text-to-speech", before)

    page.goto(f"{ui}/runs/flow-run/{run['id']}")
    expect(page.get_by_text("CONTENT_POLICY_VIOLATION", exact=True).first).to_be_visible()

    page.goto(f"{ui}/artifacts/artifact/{served.report_of(run)['id']}")
    expect(page.get_by_text("would refuse the same text again").first).to_be_visible()


# The forms


@pytest.mark.parametrize("flow", ["wait-for-tts", "text-to-speech", "text-to-speech-batch", "collect-open-tickets"])
def test_a_form_has_one_plain_control_for_each_thing(served: Served, ui: str, page: Page, flow: str) -> None:
    open_form(served, page, ui, flow)

    shown = page.locator("body").inner_text()
    assert "type None" not in shown
    assert "`" not in shown
    assert page.get_by_role("tab", name="None").count() == 0
    assert page.get_by_role("tab", name="str").count() == 0
    photograph(page, ui, f"form-{flow}{'' if '/v2' in ui else '-v1'}", everywhere=True)


def test_a_ticket_is_pasted_as_it_is_and_a_name_that_was_typed_is_kept(
    served: Served, sandbox: Sandbox, ui: str, page: Page
) -> None:
    ticket = json.dumps(sandbox.add_job("Pasted."))
    before = served.ended_runs("wait-for-tts")
    open_form(served, page, ui, "wait-for-tts")
    page.locator(".cm-content, .p-code-input textarea").first.click()
    page.keyboard.insert_text(ticket)
    rename(page, "The ticket of today")
    submit(served, page, "wait-for-tts")

    run = served.ended_run("wait-for-tts", before)
    assert (run["state_name"], run["name"]) == ("Completed", "The ticket of today")
    assert run["parameters"]["ticket"] == json.loads(ticket)


def test_lines_are_pasted_and_advanced_things_are_set(served: Served, ui: str, page: Page) -> None:
    before = served.ended_runs("text-to-speech-batch")
    open_form(served, page, ui, "text-to-speech-batch")
    page.locator("textarea").first.fill(f'id,text\none,"One, in {ui}."\ntwo,"Two, in {ui}."\n')
    field(page, "Jobs at the provider at once").fill("3")
    submit(served, page, "text-to-speech-batch")

    run = served.ended_run("text-to-speech-batch", before)
    assert (run["state_name"], run["name"]) == ("Completed", "tts-batch-2-lines")
    assert run["parameters"]["advanced"]["max_in_flight"] == 3


def test_a_text_alone_makes_a_run_and_so_does_a_collection_of_nothing(served: Served, ui: str, page: Page) -> None:
    before = served.ended_runs("collect-open-tickets")
    open_form(served, page, ui, "collect-open-tickets")
    submit(served, page, "collect-open-tickets")

    run = served.ended_run("collect-open-tickets", before)
    assert (run["state_name"], run["name"]) == ("Completed", "collect-open-tickets")


def open_form(served: Served, page: Page, ui: str, flow: str) -> None:
    deployment = served.api(f"/deployments/name/{flow}/{flow}")["id"]
    page.goto(f"{ui}/deployments/deployment/{deployment}/run")
    expect(page.get_by_text("What is left empty has its default.")).to_be_visible()


def field(page: Page, title: str) -> Locator:
    """The number field below a title, in either version of the UI."""
    return page.locator(f"xpath=//*[starts-with(normalize-space(text()), '{title}')]/following::input[1]")


def rename(page: Page, name: str) -> None:
    """Type a name over the one that the form has made up."""
    made_up = page.locator("input").filter(visible=True).first
    made_up.fill(name)


def submit(served: Served, page: Page, flow: str) -> None:
    before = len(served.runs(flow))
    # On a busy machine the form may still be at work on what was typed and let a click go by, as it does for people.
    for _ in range(5):
        page.get_by_role("button", name="Submit", exact=True).click()
        with suppress(PlaywrightTimeoutError):
            page.wait_for_url("**/deployments/deployment/*?*", timeout=20_000)
            return
        assert len(served.runs(flow)) == before, "a run was started, but the form is still there"
    raise AssertionError("the form cannot be submitted")


def active_schedules(served: Served, deployment: str) -> list[str]:
    schedules = served.api(f"/deployments/{deployment}")["schedules"]
    return [schedule["schedule"]["cron"] for schedule in schedules if schedule["active"]]


@pytest.mark.timeout(420)
def test_a_schedule_added_in_the_ui_starts_runs(served: Served, page: Page) -> None:
    before = served.ended_runs("collect-open-tickets")
    deployment = served.api("/deployments/name/collect-open-tickets/collect-open-tickets")["id"]
    page.goto(f"{served.url}/v2/deployments/deployment/{deployment}")
    page.get_by_role("button", name="Schedule", exact=True).click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_role("tab", name="Cron").click()
    # On a busy machine the tab may still be at work and set what was typed back to its own default.
    for _ in range(5):
        dialog.get_by_role("textbox").first.fill("* * * * *")
        with suppress(AssertionError):
            expect(dialog.get_by_text("Every minute", exact=True)).to_be_visible(timeout=10_000)
            break
    dialog.get_by_role("button", name="Save").click()
    expect(dialog).to_be_hidden()
    # The dialog closes before the server has stored what it sends.
    assert wait_for(lambda: active_schedules(served, deployment), 30) == ["* * * * *"]

    run = served.ended_run("collect-open-tickets", before)
    assert run["auto_scheduled"]
    assert run["state_name"] == "Completed"
