"""What the README and the other documents show is run as it stands there."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL

from prefect_nanogpt.sandbox import Sandbox
from tests.conftest import API_KEY

ROOT = Path(__file__).parent.parent
# What the reference shows is of the docstrings, which tests/test_types.py checks.
DOCUMENTS = sorted(
    {ROOT / "README.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs/reference.md"}
)


def snippets(language: str, *documents: Path) -> list[str]:
    pattern = re.compile(rf"^```{language}\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    return [snippet for document in documents for snippet in pattern.findall(document.read_text())]


ELSEWHERE = {
    "make demo": "a clean clone",
    'pip install ".[sandbox,audio,long]"': "the wheel's test",
    "prefect worker start": "the deployment's test",
    "prefect gcl create": "the tests of the limits, which create it in another way",
    "prefect-nanogpt serve": "the browser's test",
    "prefect-nanogpt deploy": "the tests of deploying",
}


@pytest.fixture
def env(sandbox: Sandbox, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFECT_API_URL": PREFECT_API_URL.value(),
        "NANOGPT_API_KEY": API_KEY,
        "NANOGPT_BASE_URL": sandbox.base_url,
        "PREFECT_HOME": str(tmp_path / "prefect"),
    }


def first_line_of_interest(snippet: str) -> str:
    lines = [line for line in snippet.splitlines() if line and not line.startswith(("import", "from"))]
    return lines[0][:50]


@pytest.mark.parametrize("snippet", snippets("python", *DOCUMENTS), ids=first_line_of_interest)
def test_the_python_runs(snippet: str, env: dict[str, str], sandbox: Sandbox, tmp_path: Path) -> None:
    if ".save(" in snippet:
        # The saved block would win over the environment in every other test.
        snippet = snippet.replace('"default"', '"from-the-readme"')
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    if "print(" in snippet:
        assert done.stdout.strip()
    locations = re.findall(r"/\S+", done.stdout)
    assert bool(locations) == ("location" in snippet)
    for location in locations:
        assert Path(location).is_relative_to(tmp_path / "audio")
        assert Path(location).stat().st_size > 1_000


@pytest.mark.parametrize("snippet", snippets("sh", *DOCUMENTS), ids=first_line_of_interest)
def test_the_commands_run(snippet: str, env: dict[str, str], sandbox: Sandbox) -> None:
    run_id = "98b0d593-fe8d-49b8-89c9-233022232297"
    sandbox.add_job(run_id=run_id)
    for command in snippet.splitlines():
        if command.startswith(tuple(ELSEWHERE)):
            continue
        done = subprocess.run(command, shell=True, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 or "already exists" in done.stderr + done.stdout, done.stderr


def test_the_reference_is_what_the_docstrings_say() -> None:
    spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "reference.md").read_text() == module.reference(), "run `make reference`"
