"""The examples, each run as its reader would run it."""

import json
import os
import re
import runpy
import subprocess
import sys
from base64 import b64decode
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from shutil import copy, copytree
from threading import Thread
from typing import Any, NamedTuple
from uuid import UUID

import nbformat
import pytest
from imageio_ffmpeg import get_ffmpeg_exe
from nbclient import NotebookClient
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.errors import ContentPolicyViolation
from prefect_nanogpt.flows import text_to_speech
from prefect_nanogpt.models import PollSchedule
from prefect_nanogpt.sandbox import Sandbox
from tests.conftest import API_KEY, eventually
from tests.s3_server import NOBODY, S3Server
from tests.sounds import played

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
POOL = "studio"
AUTOMATION = "Tell the editor of refused texts"


def environment(sandbox: Sandbox | None = None, **more: str) -> dict[str, str]:
    provider = {"NANOGPT_API_KEY": API_KEY, "NANOGPT_BASE_URL": sandbox.base_url} if sandbox else {}
    return {**os.environ, "PREFECT_API_URL": PREFECT_API_URL.value(), **provider, **more}


def run(python: str | Path, *arguments: str | Path, cwd: Path, env: dict[str, str]) -> str:
    done = subprocess.run([python, *arguments], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


async def runs_of(flow: str) -> list[FlowRun]:
    async with get_client() as client:
        return await client.read_flow_runs(flow_filter=FlowFilter(name={"any_": [flow]}))  # type: ignore[arg-type]


class Studio(NamedTuple):
    """A machine that has what is published and nothing of this source tree, with a worker on it."""

    python: Path
    sandbox: Sandbox
    s3: S3Server


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment's Python with the built wheel installed, beside the dependencies of the one that tests.

    The dependencies are reached through a path alone, which leaves behind the hooks that make the source tree
    importable there.
    """
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for part in ("src", "flows", "tasks"):
        copytree(ROOT / part, source / part)
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / part, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    subprocess.run([*pip, "wheel", *wheels, source], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    [site_packages] = (folder / "venv").rglob("site-packages")
    [wheel] = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site_packages, wheel], check=True)
    (site_packages / "dependencies.pth").write_text(f"{Path(pytest.__file__).parent.parent}\n")
    return site_packages.parent.parent.parent / "bin" / "python"


@pytest.fixture(scope="module")
def studio(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    """A worker in a folder of its own, with deployments of files that are in another one."""
    home, project = tmp_path_factory.mktemp("worker"), tmp_path_factory.mktemp("project")
    copy(EXAMPLES / "podcast_intro.py", project)
    (project / "speech.py").write_text("from prefect_nanogpt.flows import text_to_speech\n")
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process"), overwrite=True)
    deploying = """if True:
        from prefect import Flow
        for file, flow in [("podcast_intro", "podcast_intro"), ("speech", "text_to_speech")]:
            deployed = Flow.from_source(".", f"{file}.py:{flow}")
            deployed.deploy(flow.replace("_", "-"), work_pool_name="studio", print_next_steps=False)
    """
    with Sandbox(job_seconds=0, speak=False) as sandbox, S3Server() as s3:
        env = environment(sandbox, **NOBODY, **s3.env, PREFECT_WORKER_QUERY_SECONDS="1", PYTHONPATH="")
        run(installed, "-c", deploying, cwd=project, env=env)
        worker = subprocess.Popen(
            [installed, "-m", "prefect", "worker", "start", "--pool", POOL],
            cwd=home,
            env=env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield Studio(installed, sandbox, s3)
        finally:
            worker.terminate()
            worker.wait(30)


def loudness_of(file: Path) -> float:
    """Measure the loudness in LUFS."""
    measuring = [get_ffmpeg_exe(), "-i", file, "-af", "loudnorm=print_format=json", "-f", "null", "-"]
    told = subprocess.run(measuring, capture_output=True, text=True, check=True).stderr
    return float(json.loads(told[told.rindex("{") : told.rindex("}") + 1])["input_i"])


def test_what_is_published_is_all_that_is_needed(installed: Path, tmp_path: Path) -> None:
    asking = "import prefect_nanogpt.flows, prefect_nanogpt.tasks as tasks; print(tasks.__file__)"
    where = Path(run(installed, "-c", asking, cwd=tmp_path, env=environment(PYTHONPATH="")))
    assert where.is_relative_to(installed.parent.parent)


async def test_a_podcast_intro_is_published_at_the_right_loudness(studio: Studio, tmp_path: Path) -> None:
    async with get_client() as client:
        deployment = await client.read_deployment_by_name("podcast-intro/podcast-intro")
        parameters = {"episode": 7, "publish_to": "s3://speech/episodes"}
        started = await client.create_flow_run_from_deployment(deployment.id, parameters=parameters)

        async def over() -> FlowRun | None:
            flow_run = await client.read_flow_run(started.id)
            return flow_run if flow_run.state and flow_run.state.is_final() else None

        flow_run = await eventually(over, seconds=90)
    assert (flow_run.state_name, flow_run.name) == ("Completed", "intro-7"), flow_run.state
    [(name, published)] = studio.s3.objects().items()
    assert (name, studio.s3.content_type(name)) == ("episodes/intro-7.mp3", "audio/mpeg")
    intro, speech = tmp_path / "intro.mp3", tmp_path / "speech.mp3"
    intro.write_bytes(published)
    [submitted] = studio.sandbox.ledger.charges
    speech.write_bytes(studio.sandbox.audio_bytes(submitted.run_id))
    assert loudness_of(intro) == pytest.approx(-16, abs=1)
    assert loudness_of(speech) != pytest.approx(-16, abs=1)


def test_a_project_without_this_package_calls_the_deployment(studio: Studio, tmp_path: Path) -> None:
    (tmp_path / "prefect_nanogpt.py").write_text("raise ImportError('not installed in this project')")
    env = environment(PYTHONPATH=str(tmp_path))
    calling = [studio.python, EXAMPLES / "call_the_deployment.py"]
    greeting, refused = (
        subprocess.Popen(
            [*calling, text, str(tmp_path / "greetings")],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for text in ("Hello from outside.", "[sandbox:reject] Hm.")
    )
    printed, _ = greeting.communicate()
    cost, location = printed.splitlines()
    audio = Path(location)
    assert cost.endswith(" USD.")
    assert audio.parent == tmp_path / "greetings"
    assert audio.read_bytes() == studio.sandbox.audio_bytes(audio.stem)
    _, told = refused.communicate()
    assert refused.returncode != 0
    assert "CONTENT_POLICY_VIOLATION" in told.splitlines()[-1]


@pytest.fixture
def in_folder(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with the sandbox in the environment."""
    for name, value in environment(sandbox).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_sync_flow_has_its_speech_as_a_child_run(in_folder: Path, sandbox: Sandbox) -> None:
    morning_news: Any = runpy.run_path(str(EXAMPLES / "sync_pipeline.py"))["morning_news"]
    state = morning_news(["Rain.", "[sandbox:reject] What nobody will read aloud."], return_state=True)
    assert Path(state.result()).parent == in_folder / "audio"
    with get_client(sync_client=True) as client:
        children = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [state.state_details.flow_run_id]})  # type: ignore[arg-type]
        )
    assert sorted(str(child.state_name) for child in children) == ["CONTENT_POLICY_VIOLATION", "Completed"]
    assert len(sandbox.ledger.charges) == 2


def test_the_notebook_speaks(in_folder: Path) -> None:
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": str(in_folder)}}).execute()
    shown = [dict(output) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    players = [player for output in shown if (player := output.get("data", {}).get("text/html", "")).count("<audio")]
    played = [b64decode(re.findall(r"base64,([^\"]+)", player)[0]) for player in players]
    files = [path.read_bytes() for path in (in_folder / "audio").glob("*.mp3")]
    assert len(played) == 3
    assert sorted(played) == sorted(files)
    printed = [output["text"] for output in shown if output["output_type"] == "stream" and output["name"] == "stdout"]
    assert printed[-1] == "CONTENT_POLICY_VIOLATION\n"


def test_a_table_of_dialogue_becomes_a_file_for_each_line(in_folder: Path, sandbox: Sandbox) -> None:
    copy(EXAMPLES / "dialogue.csv", in_folder)
    said = run(sys.executable, copy(EXAMPLES / "dialogue.py", in_folder), cwd=in_folder, env=environment(sandbox))
    assert said == "Every line is recorded."
    files = {path.name for path in (in_folder / "audio" / "dialogue").iterdir() if path.is_file()}
    assert files == {f"{language}-gate-{n}.mp3" for language in ("en", "de", "fr") for n in (1, 2)} | {"manifest.jsonl"}
    assert {request.json.get("language") for request in sandbox.requests("submit")} == {None, "German", "French"}


def test_a_chapter_becomes_one_file(in_folder: Path, sandbox: Sandbox) -> None:
    said = run(
        sys.executable, copy(EXAMPLES / "audiobook_chapter.py", in_folder), cwd=in_folder, env=environment(sandbox)
    )
    files = [path for path in (in_folder / "audio" / "book").iterdir() if path.is_file()]
    assert files == [Path(said.splitlines()[-1])]
    assert len(sandbox.requests("submit")) > 1


def test_tickets_from_elsewhere_are_fetched_and_nothing_is_submitted(in_folder: Path, sandbox: Sandbox) -> None:
    tickets = [sandbox.add_job(f"Order {number}.") for number in range(2)]
    Path("tickets.jsonl").write_text("".join(f"{json.dumps(ticket)}\n" for ticket in tickets))
    command = [EXAMPLES / "tickets_from_elsewhere.py", "tickets.jsonl"]
    printed = run(sys.executable, *command, cwd=in_folder, env=environment(sandbox)).splitlines()
    assert [Path(line).read_bytes() for line in printed] == [sandbox.audio_bytes(job["runId"]) for job in tickets]
    assert sandbox.requests("submit") == []


@pytest.fixture
async def editor(tmp_path: Path) -> AsyncIterator[None]:
    """Whoever serves the reaction to a rejection."""
    serving = subprocess.Popen(  # noqa: ASYNC220 - does not block
        [sys.executable, EXAMPLES / "react_to_a_rejection.py"],
        cwd=tmp_path,
        env=environment(PREFECT_RUNNER_POLL_FREQUENCY="1"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    async with get_client() as client:

        async def automation() -> UUID | None:
            return next((found.id for found in await client.read_automations_by_name(AUTOMATION)), None)

        listening = await eventually(automation)
        yield
        await client.delete_automation(listening)
    serving.terminate()
    serving.wait(30)


async def test_a_refused_text_ends_up_on_the_editors_list(
    editor: None, save_to: str, credentials: NanoGPTCredentials
) -> None:
    async with get_client() as client:

        async def told() -> FlowRun | None:
            return next((run for run in await runs_of("tell-the-editor") if run.state_name == "Completed"), None)

        with pytest.raises(ContentPolicyViolation):
            await text_to_speech("[sandbox:reject] Hm.", save_to=save_to, credentials=credentials)
        reaction = await eventually(told, seconds=60)
        [artifact] = await client.read_artifacts(flow_run_filter=FlowRunFilter(id={"any_": [reaction.id]}))  # type: ignore[arg-type]
    [row] = json.loads(str(artifact.data))
    assert (row["code"], row["model"]) == ("CONTENT_POLICY_VIOLATION", "Elevenlabs-Turbo-V2.5")
    [refused] = [run for run in await runs_of("text-to-speech") if f"/{run.id})" in row["run"]]
    assert refused.state_name == "CONTENT_POLICY_VIOLATION"


def seconds_in(time: str) -> float:
    """Read a time of SRT."""
    hours, minutes, seconds = time.replace(",", ".").split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def test_lines_become_a_video_with_subtitles_that_end_with_the_sound(in_folder: Path, sandbox: Sandbox) -> None:
    script = copy(EXAMPLES / "narrated_video.py", in_folder)
    video = run(sys.executable, script, cwd=in_folder, env=environment(sandbox)).splitlines()[-1]

    reading = [get_ffmpeg_exe(), "-v", "error", "-i", video, "-map", "0:s", "-f", "srt", "-"]
    told = subprocess.run(reading, capture_output=True, text=True, check=True).stdout
    cues = [block.split("\n") for block in told.strip().split("\n\n")]
    assert " ".join(" ".join(cue[2:]) for cue in cues).count("NANO-GPT") == 1
    assert [request.json["text"] for request in sandbox.requests("submit")][1].count("nano G P T") == 1
    times = [[seconds_in(time) for time in cue[1].split(" --> ")] for cue in cues]
    sound = played(in_folder / "video" / "narration.mp3")
    assert times[0][0] == pytest.approx(0, abs=0.1)
    assert times[-1][1] == pytest.approx(sound, abs=0.1)
    gaps = [later[0] - earlier[1] for earlier, later in pairwise(times)]
    assert [gap for gap in gaps if gap > 0.1] == pytest.approx([0.6] * 3, abs=0.1)


def test_an_episode_is_made_of_the_newest_items_and_new_ones_alone_are_paid_for(
    in_folder: Path, sandbox: Sandbox
) -> None:
    script, feed = copy(EXAMPLES / "feed_episode.py", in_folder), copy(EXAMPLES / "feed.xml", in_folder)
    first = run(sys.executable, script, cwd=in_folder, env=environment(sandbox)).splitlines()
    assert Path(first[-1]) == in_folder / "podcast" / "episode.mp3"
    assert next(request.json["text"] for request in sandbox.requests("submit")) == (
        "Version 5 is out. Version 5 starts in half the time & needs less memory."
    )
    items = [played(item) for item in (in_folder / "podcast" / "items").glob("*.mp3")]
    assert len(items) == 5
    assert played(first[-1]) == pytest.approx(sum(items) + 4, abs=0.3)
    Path(feed).write_text(Path(feed).read_text().replace("Bug fixes", "Bugs, fixed"))
    run(sys.executable, script, cwd=in_folder, env=environment(sandbox))
    assert len(sandbox.ledger.charges) == 6


async def test_another_kind_of_job_is_waited_for(in_folder: Path) -> None:
    waiting: Any = runpy.run_path(str(EXAMPLES / "wait_for_a_video.py"))
    answers = [{"status": "IN_QUEUE"}, {"status": "IN_PROGRESS"}]
    answers.append({"status": "COMPLETED", "output": {"video": {"url": "https://video.test/1.mp4"}}})
    asked: list[tuple[str, str]] = []

    class Videos(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["x-api-key"]))
            body = json.dumps({"data": answers[len(asked) - 1]}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Videos) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        waiting["look_at_video"].fn.__globals__["BASE_URL"] = f"http://127.0.0.1:{server.server_address[1]}/api"
        quick = PollSchedule(min_seconds=0.25, max_seconds=0.25, jitter=0)
        url = await waiting["wait_for_video"]("98b0", patience=quick)
        server.shutdown()

    assert url == "https://video.test/1.mp4"
    assert asked == [("/api/video/status?requestId=98b0", API_KEY)] * 3
