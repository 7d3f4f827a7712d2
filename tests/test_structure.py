"""Which module may use which: the arrows of the architecture point one way."""

import ast
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "prefect_nanogpt"
FOLDERS = {"prefect_nanogpt.flows": ROOT / "flows", "prefect_nanogpt.tasks": ROOT / "tasks", "prefect_nanogpt": PACKAGE}
"""Where the modules are that are installed under a name."""


def files() -> Iterator[tuple[str, Path]]:
    """Find all modules, by the names that they are imported by."""
    for prefix, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [*path.relative_to(folder).parent.parts, *([] if path.stem == "__init__" else [path.stem])]
            yield ".".join([prefix, *parts]), path


MODULES = dict(files())


def imports_of(module: str) -> set[str]:
    """Read what a module imports, wherever in it: modules, and names of packages that are modules too."""
    found: set[str] = set()
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, [above, node.module]))
            found |= {origin} | {f"{origin}.{name.name}" for name in node.names}
    return found


def is_in(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def arrows(modules: list[str], *targets: str) -> list[str]:
    """List the imports of targets that there are, so that a failure says where."""
    assert modules
    return [f"{module} -> {name}" for module in modules for name in sorted(imports_of(module)) if is_in(name, *targets)]


FLOWS, TASKS, SANDBOX = "prefect_nanogpt.flows", "prefect_nanogpt.tasks", "prefect_nanogpt.sandbox"
ENTRANCES = [FLOWS, TASKS, *(f"prefect_nanogpt.{name}" for name in ("cli", "deploying", "lookups", "sync"))]


def test_the_reader_of_imports_sees_them() -> None:
    assert "prefect_nanogpt.tasks.say" in imports_of("prefect_nanogpt.flows.generate")
    assert "prefect_nanogpt.sandbox.api" in imports_of("prefect_nanogpt.sandbox.server")
    assert "prefect.runtime.flow_run" in imports_of("prefect_nanogpt.flows.wait")
    assert {"prefect_nanogpt.job", "prefect_nanogpt", "prefect_nanogpt.cli"} <= MODULES.keys()


def test_tasks_use_no_flow() -> None:
    assert arrows([module for module in MODULES if is_in(module, TASKS)], FLOWS) == []


def test_the_package_uses_neither_flow_nor_task_but_for_the_command_line() -> None:
    inside = [module for module in MODULES if not is_in(module, *ENTRANCES)]

    assert arrows(inside, FLOWS, TASKS, "prefect_nanogpt.cli") == []


@pytest.mark.parametrize("flow", ["wait", "generate", "batch", "collect"])
def test_no_flow_uses_another(flow: str) -> None:
    others = [f"{FLOWS}.{other}" for other in ("wait", "generate", "batch", "collect") if other != flow]
    exported = ["text_to_speech", "text_to_speech_batch", "wait_for_tts", "collect_open_tickets"]

    assert arrows([f"{FLOWS}.{flow}"], *others, *(f"{FLOWS}.{name}" for name in exported)) == []


@pytest.mark.parametrize("module", ["client", "models", "errors", "polling"])
def test_what_speaks_with_the_provider_knows_nothing_of_prefect(module: str) -> None:
    start = f"prefect_nanogpt.{module}"
    reached, left = set(), [start]
    while left:  # also by way of the other modules that it uses
        name = left.pop()
        if name in MODULES and name not in reached and name != "prefect_nanogpt":
            reached.add(name)
            left += imports_of(name) - type_checking_only(name)

    assert arrows(sorted(reached), "prefect") == []


def type_checking_only(module: str) -> set[str]:
    """Read what a module imports for its annotations alone."""
    blocks = [
        node.body
        for node in ast.walk(ast.parse(MODULES[module].read_text()))
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {
        name
        for node in chain(*blocks)
        if isinstance(node, ast.ImportFrom)
        for name in [str(node.module), *(f"{node.module}.{imported.name}" for imported in node.names)]
    }


def test_the_sandbox_uses_nothing_of_the_plugin_and_nothing_of_prefect() -> None:
    sandbox = [module for module in MODULES if is_in(module, SANDBOX)]
    plugin = [module for module in MODULES if not is_in(module, SANDBOX) and module != "prefect_nanogpt"]

    assert arrows(sandbox, "prefect", *plugin) == []


def test_no_two_modules_use_each_other_not_even_by_way_of_others() -> None:
    uses = {module: (imports_of(module) - type_checking_only(module)) & MODULES.keys() - {module} for module in MODULES}
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for used in sorted(uses[module]):
                # A package's own modules may say its name to reach their neighbours.
                if not module.startswith(f"{used}.") and not used.startswith(f"{module}."):
                    follow(used, [*path, module])
            done.add(module)

    for module in MODULES:
        follow(module, [])
