"""What is imported when: nobody waits for what is not used, and all that is lazy looks as if it were there."""

import json
import pickle
import pkgutil
import pydoc
from pathlib import Path

import pytest

import prefect_nanogpt
from prefect_nanogpt import flows, sync, tasks
from tests.test_installed import COMMAND, Installation, installed

__all__ = ["installed"]

pytestmark = pytest.mark.xdist_group("installed")

PLAIN = """
from prefect import flow, task

@task
async def one(): ...

@flow
async def whole(): await one()
"""
SPEAK = "from prefect_nanogpt.flows import text_to_speech"
BESIDES = {"ftplib"}
"""What else a run of one text imports that Prefect does not."""
OWN = {
    "prefect_nanogpt",
    *(
        f"prefect_nanogpt.{name}"
        for name in (
            "audio",
            "budget",
            "catalogue",
            "client",
            "connections",
            "credentials",
            "errors",
            "events",
            "flows",
            "flows.ending",
            "flows.forms",
            "flows.generate",
            "folders",
            "job",
            "joining",
            "ledger",
            "limits",
            "long_text",
            "models",
            "polling",
            "pronunciation",
            "report",
            "storage",
            "subtitles",
            "tables",
            "tasks",
            "tasks.audio",
            "tasks.catalogue",
            "tasks.ledgers",
            "tasks.log",
            "tasks.parts",
            "tasks.retries",
            "tasks.say",
            "tasks.status",
            "tasks.submit",
            "turns",
            "waveform",
        )
    ),
}
LAZY = [prefect_nanogpt, flows, tasks, sync]


def modules(installed: Installation, code: str, folder: Path) -> set[str]:
    """Run code in a process of its own, and give the modules that it has imported."""
    counted = f"{code}\nimport json, sys\nprint(json.dumps([*sys.modules]))"
    return set(json.loads(installed.run("-c", counted, cwd=folder).splitlines()[-1]))


def test_importing_the_flows_imports_none_of_them(installed: Installation, tmp_path: Path) -> None:
    imported = modules(installed, "import prefect_nanogpt.flows", tmp_path)

    assert imported - modules(installed, PLAIN, tmp_path) == {"prefect_nanogpt", "prefect_nanogpt.flows"}


def test_a_flow_imports_what_prefect_does_and_its_own_part_of_the_package(
    installed: Installation, tmp_path: Path
) -> None:
    imported = modules(installed, SPEAK, tmp_path)

    assert "prefect_nanogpt.flows.generate" in imported
    assert imported - modules(installed, PLAIN, tmp_path) - OWN - BESIDES == set()


@pytest.mark.parametrize(
    "code",
    [
        "import prefect_nanogpt",
        "from prefect_nanogpt.models import AudioFile, Ticket, TTSRequest",
        "from prefect_nanogpt.errors import TTSJobRejected",
        "from prefect_nanogpt.sandbox import Sandbox",
    ],
)
def test_what_needs_no_prefect_imports_none(code: str, installed: Installation, tmp_path: Path) -> None:
    assert "prefect" not in modules(installed, code, tmp_path)


def test_the_command_line_tells_its_version_without_prefect(installed: Installation, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['prefect'] = None; sys.argv[1:] = ['--version']; import {COMMAND}"

    assert installed.run("-c", code, cwd=tmp_path) == prefect_nanogpt.__version__


def test_the_command_line_starts_without_what_only_one_command_needs(installed: Installation, tmp_path: Path) -> None:
    imported = modules(installed, "import prefect_nanogpt.cli", tmp_path)

    assert not imported & {"prefect_nanogpt.listening", "prefect_nanogpt.sandbox", "prefect.runner", "uvicorn"}


@pytest.mark.parametrize("module", LAZY, ids=lambda module: module.__name__)
def test_lazy_names_can_be_listed_explained_and_taken_all_at_once(module: object) -> None:
    names = module.__all__  # type: ignore[attr-defined]
    taken: dict[str, object] = {}
    exec(f"from {module.__name__} import *", taken)  # type: ignore[attr-defined]

    assert set(names) <= set(dir(module))
    assert set(names) <= taken.keys()
    assert all(name in pydoc.render_doc(module) for name in names)


@pytest.mark.parametrize("module", LAZY, ids=lambda module: module.__name__)
def test_an_unknown_name_is_refused_in_the_usual_words(module: object) -> None:
    name = module.__name__  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=rf"^module '{name}' has no attribute 'text_to_speach'$"):
        module.text_to_speach  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match=f"cannot import name 'text_to_speach' from '{name}'"):
        exec(f"from {name} import text_to_speach")


@pytest.mark.parametrize("module", [prefect_nanogpt, flows, tasks], ids=lambda module: module.__name__)
def test_no_lazy_name_is_that_of_a_module(module: object) -> None:
    # Importing the module would put it in the place of the name.
    inside = {found.name for found in pkgutil.iter_modules(module.__path__)}  # type: ignore[attr-defined]

    assert inside
    assert not inside & set(module.__all__)  # type: ignore[attr-defined]


def test_the_modules_of_a_package_can_still_be_taken_from_it(installed: Installation, tmp_path: Path) -> None:
    code = "from prefect_nanogpt.flows import wait, wait_for_tts; print(wait.wait_for_tts is wait_for_tts)"

    assert installed.run("-c", code, cwd=tmp_path) == "True"


@pytest.mark.parametrize("module", ["prefect_nanogpt.flows", "prefect_nanogpt.sync"])
def test_threads_that_come_at_once_get_the_same(module: str, installed: Installation, tmp_path: Path) -> None:
    code = f"""
import {module} as module
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

together = Barrier(8)

def take(_):
    together.wait()
    return [getattr(module, name) for name in ("text_to_speech", "wait_for_tts")]

with ThreadPoolExecutor(8) as pool:
    print(*map(len, map(set, zip(*pool.map(take, range(8))))))
"""
    assert installed.run("-c", code, cwd=tmp_path) == "1 1"


@pytest.mark.parametrize("name", ["text_to_speech", "collect_open_tickets"])
@pytest.mark.parametrize("separator", [".", ":"])
def test_prefect_loads_a_flow_by_the_name_of_the_package(
    name: str, separator: str, installed: Installation, tmp_path: Path
) -> None:
    entrypoint = f"prefect_nanogpt.flows{separator}{name}"
    code = f"from prefect.flows import load_flow_from_entrypoint as load; print(load({entrypoint!r}).fn.__name__)"

    assert installed.run("-c", code, cwd=tmp_path) == name


@pytest.mark.parametrize("name", sync.__all__)
def test_what_waits_is_pickled_by_its_name(name: str) -> None:
    step = getattr(sync, name)

    assert pickle.loads(pickle.dumps(step)) is step


def test_prefect_finds_the_block_where_nobody_has_imported_it(installed: Installation, tmp_path: Path) -> None:
    code = (
        "from prefect.blocks.core import Block; print(Block.get_block_class_from_key('nanogpt-credentials').__name__)"
    )

    assert installed.run("-c", code, cwd=tmp_path) == "NanoGPTCredentials"


def test_the_block_is_registered_by_the_name_of_the_package(installed: Installation, tmp_path: Path) -> None:
    said = installed.run("-m", "prefect", "block", "register", "-m", "prefect_nanogpt", cwd=tmp_path)

    assert "NanoGPT Credentials" in said


@pytest.mark.parametrize("first", ["prefect_nanogpt.tasks", "prefect_nanogpt.flows.wait", "prefect_nanogpt.sync"])
def test_the_log_leaves_out_what_prefect_says_of_each_step_whatever_is_imported_first(
    first: str, installed: Installation, tmp_path: Path
) -> None:
    code = f"""
import {first}, logging
import prefect, prefect_nanogpt.tasks
step = logging.LogRecord("", logging.INFO, "", 0, "Finished in state Completed()", (), None)
print(bool(logging.getLogger("prefect.task_runs").filter(step)), end=" ")
step.task_name = "submit-tts"
print(bool(logging.getLogger("prefect.task_runs").filter(step)))
"""
    assert installed.run("-c", code, cwd=tmp_path) == "True False"


def test_the_schema_of_the_parameters_is_there_when_it_is_asked_for() -> None:
    assert {"text", "model", "save_to"} <= flows.text_to_speech.parameters.properties.keys()
    assert flows.text_to_speech.parameters is flows.text_to_speech.parameters
    assert "ticket" in flows.wait_for_tts.with_options(name="another").parameters.properties
