"""The names of task runs where one flow run has many jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from prefect.runtime import task_run

__all__ = ["labelled", "named_by_step"]

_label: ContextVar[str | None] = ContextVar("nanogpt_label", default=None)


@contextmanager
def labelled(label: str) -> Iterator[None]:
    """Name the task runs started within by their step and this label, such as `submit-line-7`."""
    token = _label.set(label)
    try:
        yield
    finally:
        _label.reset(token)


def named_by_step(step: str) -> Callable[[], str]:
    """Make a `task_run_name` of a step; without a label it leaves Prefect's own name.

    `with_options(task_run_name=...)` for each job would do the same, but reads the task's source file each time.
    """

    def name() -> str:
        label = _label.get()
        return str(task_run.name) if label is None else f"{step}-{label}"

    return name
