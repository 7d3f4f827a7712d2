"""The package as people have it: a wheel in an environment of its own, and a worker that starts in a checkout."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.filters import FlowRunFilter, LogFilter, LogFilterFlowRunId
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt.sandbox import Sandbox
from tests.conftest import API_KEY, eventually

ROOT = Path(__file__).parent.parent
NOT_OF_A_CHECKOUT = shutil.ignore_patterns(
    ".git", ".venv", ".node_modules", "audio", "build", "dist", "*.egg-info", "__pycache__", ".*_cache"
)
POOL = "nanogpt"
COMMAND = "prefect_nanogpt_command_of_tests"
"""A module that does what the script does that pip makes, for any interpreter."""

pytestmark = pytest.mark.xdist_group("installed")


def without_python() -> dict[str, str]:
    """Give the environment without what says where else packages are."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


@dataclass
class Installation:
    """An environment that has the package from its wheel only, and a checkout that nobody has installed.

    Attributes:
        python: The environment's interpreter.
        packages: Where its packages are.
        checkout: The checkout.
    """

    python: Path
    packages: Path
    checkout: Path

    def run(self, *arguments: str, cwd: Path, **environment: str) -> str:
        done = subprocess.run(
            [self.python, *arguments], cwd=cwd, env=self.environment(**environment), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def environment(self, **more: str) -> dict[str, str]:
        return {**without_python(), "PREFECT_API_URL": PREFECT_API_URL.value(), "NO_COLOR": "1", **more}


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    place = tmp_path_factory.mktemp("installed")
    checkout = place / "checkout"
    shutil.copytree(ROOT, checkout, ignore=NOT_OF_A_CHECKOUT)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place)]
    # Built in a copy of its own, since building leaves folders behind.
    shutil.copytree(checkout, place / "source")
    subprocess.run([*pip, *wheel, str(place / "source")], env=without_python(), check=True)

    venv.create(place / "venv", symlinks=True)
    python = place / "venv" / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(place / "venv")}))
    # All that the tests have is there, but for this package in whatever way they have it.
    for there in Path(sysconfig.get_path("purelib")).iterdir():
        if "prefect_nanogpt" not in there.name:
            (packages / there.name).symlink_to(there)
    [built] = place.glob("*.whl")
    install = ["--python", str(python), "install", "--no-deps", "--no-index", str(built)]
    subprocess.run([*pip, *install], env=without_python(), check=True)
    (packages / f"{COMMAND}.py").write_text("import sys\nfrom prefect_nanogpt_command import main\nsys.exit(main())\n")
    return Installation(python, packages, checkout)


@dataclass
class Worker:
    """A worker whose runs get a temporary folder as their working directory, which Prefect removes afterwards.

    Attributes:
        temporary: Where those folders are.
        home: Prefect's home.
    """

    temporary: Path
    home: Path

    async def run(self, deployment: str, **parameters: Any) -> FlowRun:
        """Run a deployment through the API to its end, and wait until the worker has cleared up after it."""
        running: Any = run_deployment(deployment, parameters=parameters, timeout=120, poll_interval=0.5)
        flow_run: FlowRun = await running

        async def cleared_up() -> bool | None:
            return not any(path.name.endswith("prefect") for path in self.temporary.iterdir()) or None

        await eventually(cleared_up)
        assert flow_run.state is not None
        assert flow_run.state.name == "Completed", flow_run.state
        return flow_run


@contextmanager
def worker_of(
    installed: Installation, folder: Path, sandbox: Sandbox, tmp_path: Path, **environment: str
) -> Iterator[Worker]:
    worker = Worker(tmp_path / "temporary", tmp_path / "prefect-home")
    worker.temporary.mkdir()
    process = subprocess.Popen(
        [installed.python, "-m", "prefect", "worker", "start", "--pool", POOL],
        cwd=folder,
        env=installed.environment(
            TMPDIR=str(worker.temporary),
            PREFECT_HOME=str(worker.home),
            PREFECT_WORKER_QUERY_SECONDS="1",
            NANOGPT_API_KEY=API_KEY,
            NANOGPT_BASE_URL=sandbox.base_url,
            **environment,
        ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield worker
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def pool(installed: Installation) -> None:
    create = ["-m", "prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite"]
    installed.run(*create, cwd=installed.checkout)


async def log_of(flow_run: FlowRun) -> str:
    """Read what a run and its child runs have logged."""
    async with get_client() as client:
        children = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(parent_flow_run_id={"any_": [flow_run.id]})
        )
        runs = [flow_run.id, *(child.id for child in children)]
        logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=runs)))
    return "\n".join(log.message for log in logs)


# The checkout


def test_in_a_checkout_the_installed_package_is_what_is_imported(installed: Installation) -> None:
    where = "import prefect_nanogpt.flows, prefect_nanogpt.tasks as t; print(prefect_nanogpt.__file__, t.__file__)"
    found = installed.run("-c", where, cwd=installed.checkout).split()
    package = installed.packages / "prefect_nanogpt"
    assert found == [str(package / "__init__.py"), str(package / "tasks" / "__init__.py")]


@pytest.fixture(scope="module")
def deployed(installed: Installation, pool: None) -> None:
    installed.run("-m", "prefect", "--no-prompt", "deploy", "--all", cwd=installed.checkout)


async def test_a_deployment_of_a_checkout_saves_into_it_and_anybody_can_read_its_result(
    installed: Installation, deployed: None, sandbox: Sandbox, tmp_path: Path
) -> None:
    with worker_of(installed, installed.checkout, sandbox, tmp_path) as worker:
        flow_run = await worker.run("text-to-speech/text-to-speech", text="From a checkout.")
    [charge] = sandbox.ledger.charges
    saved = installed.checkout / "audio" / f"{charge.run_id}.mp3"
    assert saved.read_bytes() == sandbox.audio_bytes(charge.run_id)

    reader = tmp_path / "reader.py"
    reader.write_text(READER)
    result = json.loads(
        installed.run(str(reader), str(flow_run.id), cwd=tmp_path, PREFECT_HOME=str(worker.home)).splitlines()[-1]
    )
    assert (result["location"], result["container"]) == (str(saved), "mp3")
    assert result["ticket"]["runId"] == charge.run_id
    assert API_KEY not in json.dumps(result)


READER = """
import asyncio, json, sys

sys.modules["prefect_nanogpt"] = None  # as good as not installed

from prefect.client.orchestration import get_client

async def read(flow_run_id):
    async with get_client() as client:
        flow_run = await client.read_flow_run(flow_run_id)
        return await flow_run.state.aresult()

print(json.dumps(asyncio.run(read(sys.argv[1]))))
"""


# Somebody else's repository

FLOWS = """
from pathlib import Path

from prefect import flow
from prefect.states import Completed

from prefect_nanogpt.flows import text_to_speech, text_to_speech_batch


@flow(log_prints=True)
async def greet(text: str):
    print("Working in", Path.cwd())
    audio = await text_to_speech(text)
    return Completed(message=audio.location)


@flow
async def chapter(texts: list[str]):
    rows = await text_to_speech_batch([{"id": f"line-{n}", "text": text} for n, text in enumerate(texts)])
    return Completed(message=" ".join(row.location for row in rows))
"""

PREFECT_YAML = """
pull:
  - prefect.deployments.steps.git_clone:
      repository: {url}
      branch: main
deployments:
  - name: theirs
    entrypoint: speech/flows.py:greet
    work_pool: {{name: {pool}}}
  - name: theirs
    entrypoint: speech/flows.py:chapter
    work_pool: {{name: {pool}}}
"""


@pytest.fixture(scope="module")
def theirs(installed: Installation, pool: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository that workers clone for each run, deployed."""
    repository = tmp_path_factory.mktemp("theirs") / "speech"
    (repository / "speech").mkdir(parents=True)
    (repository / "speech" / "flows.py").write_text(FLOWS)
    (repository / "prefect.yaml").write_text(PREFECT_YAML.format(url=repository.as_uri(), pool=POOL))
    identity = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com"]
    for command in (["init", "-q", "-b", "main"], ["add", "."], [*identity, "commit", "-q", "-m", "Speech"]):
        subprocess.run(["git", *command], cwd=repository, check=True)
    installed.run("-m", "prefect", "--no-prompt", "deploy", "--all", cwd=repository)
    return repository


@pytest.mark.parametrize("is_set", [True, False], ids=["NANOGPT_HOME", "Prefect's home"])
async def test_a_cloned_flow_saves_where_it_outlasts_the_clone_and_says_where(
    is_set: bool, installed: Installation, theirs: Path, sandbox: Sandbox, tmp_path: Path
) -> None:
    home = tmp_path / ("speech-home" if is_set else "prefect-home/nanogpt")
    environment = {"NANOGPT_HOME": str(home)} if is_set else {}
    with worker_of(installed, tmp_path, sandbox, tmp_path, **environment) as worker:
        flow_run = await worker.run("greet/theirs", text="From a clone.")
    assert flow_run.state is not None
    [charge] = sandbox.ledger.charges
    saved = home / "audio" / f"{charge.run_id}.mp3"
    assert flow_run.state.message == str(saved)
    assert saved.read_bytes() == sandbox.audio_bytes(charge.run_id)
    log = await log_of(flow_run)
    assert str(saved) in log
    [clone] = re.findall("Working in (.*)", log)
    assert Path(clone).is_relative_to(worker.temporary)
    assert not Path(clone).exists()


async def test_a_batch_of_a_cloned_flow_pays_once_over_its_runs(
    installed: Installation, theirs: Path, sandbox: Sandbox, tmp_path: Path
) -> None:
    home = tmp_path / "speech-home"
    texts = ["One.", "Two."]
    with worker_of(installed, tmp_path, sandbox, tmp_path, NANOGPT_HOME=str(home)) as worker:
        first = await worker.run("chapter/theirs", texts=texts)
        second = await worker.run("chapter/theirs", texts=texts)
    assert len(sandbox.ledger.charges) == len(texts)
    saved = [home / "audio" / f"line-{number}.mp3" for number in range(len(texts))]
    for flow_run in (first, second):
        assert flow_run.state is not None
        assert flow_run.state.message == " ".join(map(str, saved))
        assert str(home / "audio") in await log_of(flow_run)
    assert all(file.stat().st_size for file in saved)
