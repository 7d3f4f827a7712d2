"""What the documents show is checked as a user's code is: by mypy, strict, against the package as it is installed."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from textwrap import dedent, indent

import pytest

from tests.test_installed import Installation, installed
from tests.test_readme import DOCUMENTS, ROOT, snippets

__all__ = ["installed"]

pytestmark = pytest.mark.xdist_group("installed")


SETTINGS = """
[mypy]
strict = true
untyped_calls_exclude = IPython
[mypy-fsspec,imageio_ffmpeg]
ignore_missing_imports = true
"""


ROWS = """
from collections.abc import Hashable, Mapping
from typing import Any, TypedDict

from prefect_nanogpt import flows, sync

class Row(TypedDict):
    id: str
    text: str

typed = [Row(id="a", text="A.")]
mappings: list[Mapping[str, str]] = [{"id": "a", "text": "A."}]
records: list[dict[Hashable, Any]] = [{"id": "a", "text": "A."}]  # as pandas has them
options: Mapping[str, str] = {"emotion": "calm"}

async def each() -> None:
    await flows.text_to_speech_batch(typed)
    await flows.text_to_speech_batch(mappings, options=options)
    await flows.text_to_speech_batch(records)
    await flows.text_to_speech("A.", options=options)

sync.text_to_speech_batch(typed)
sync.text_to_speech_batch(mappings, options=options)
"""

LAZY = """
from prefect_nanogpt import NanoGPTCredentials, flows, sync, tasks
from prefect_nanogpt import NanoGPTCredential  # type: ignore[attr-defined]
from prefect_nanogpt.flows import text_to_speach  # type: ignore[attr-defined]
from prefect_nanogpt.tasks import submit_ttss  # type: ignore[attr-defined]
from prefect_nanogpt.sync import submit_ttss as another  # type: ignore[attr-defined]

credentials: NanoGPTCredentials

async def each() -> None:
    reveal = await flows.text_to_speech("A.")
    reveal.location.upper()
    reveal.locations  # type: ignore[attr-defined]
    (await tasks.save_audio(7)).location  # type: ignore[call-overload]

sync.text_to_speech("A.").location.upper()
sync.text_to_speech(7)  # type: ignore[call-overload]
"""
"""Names that are imported when they are used have types, and others are no names; an `ignore` too many is a failure."""


def examples_of_docstrings() -> list[str]:
    """Give the examples that are code, not a session at a prompt."""
    modules = [path for folder in ("src", "flows", "tasks") for path in sorted((ROOT / folder).rglob("*.py"))]
    docstrings = [
        ast.get_docstring(node) or ""
        for module in modules
        for node in ast.walk(ast.parse(module.read_text()))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    return [dedent(code) for text in docstrings for code in re.findall(r"^ *```python\n(.*?)^ *```", text, re.M | re.S)]


def in_a_loop(code: str) -> str:
    """Make a module of code in which `await` stands outside of functions."""
    return "async def code() -> None:\n" + indent(code, "    ")


def cells(notebook: Path) -> str:
    code = [
        "".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    return "\n".join(code)


def test_mypy_finds_nothing_in_what_is_shown(installed: Installation, tmp_path: Path) -> None:
    shown = {
        **{f"snippet_{number}": text for number, text in enumerate(snippets("python", *DOCUMENTS))},
        **{f"docstring_{number}": in_a_loop(text) for number, text in enumerate(examples_of_docstrings())},
        **{path.stem: path.read_text() for path in (ROOT / "examples").glob("*.py")},
        **{path.stem: in_a_loop(cells(path)) for path in (ROOT / "examples").glob("*.ipynb")},
        "rows": ROWS,
        "lazy": LAZY,
    }
    assert len([name for name in shown if name.startswith("docstring")]) > 8
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    for name, text in shown.items():
        (tmp_path / f"{name}.py").write_text(text)
    checking = [
        "-m",
        "mypy",
        "--python-executable",
        str(installed.python),
        *(f"{name}.py" for name in shown),
    ]
    done = subprocess.run([sys.executable, *checking], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
