"""When a step is tried again: one rule, for Prefect's retries and for plain calls."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, TypeVar

from prefect import State, Task
from prefect.client.schemas import TaskRun

from prefect_nanogpt.errors import NanoGPTError

__all__ = ["JITTER", "LONGEST_RETRY_AFTER_SECONDS", "is_worth_another_try", "may_help", "with_retries"]

R = TypeVar("R")
JITTER: Final = 0.3
LONGEST_RETRY_AFTER_SECONDS: Final = 60.0
NOT_FOUND_ATTEMPTS: Final = 4
"""A job accepted just now may not be visible yet, but one that is unknown for long is unknown for good."""


async def may_help(task: Task[..., Any], task_run: TaskRun, state: State[Any]) -> bool:
    """Say whether to try a failed task again, once the time that the provider asked for has passed.

    A function, not a callable object: Prefect takes the latter for "never".
    """
    error = await state.aresult(raise_on_failure=False)
    if not isinstance(error, NanoGPTError) or not is_worth_another_try(error, task_run.run_count):
        return False
    if error.retry_after_seconds is not None:
        await asyncio.sleep(error.retry_after_seconds)
    return True


async def with_retries(call: Callable[[], Awaitable[R]], delays: Sequence[float]) -> R:
    """Make a call as a task with these retry delays, in seconds, would."""
    attempts = 0
    while True:
        try:
            return await call()
        except NanoGPTError as error:
            attempts += 1
            if attempts > len(delays) or not is_worth_another_try(error, attempts):
                raise
            await asyncio.sleep(
                (error.retry_after_seconds or 0) + delays[attempts - 1] * (1 + JITTER * random.random())
            )


def is_worth_another_try(error: NanoGPTError, attempts: int) -> bool:
    """Say whether what has failed so many times may succeed within a reasonable time."""
    if not error.retryable or (error.http_status == 404 and attempts >= NOT_FOUND_ATTEMPTS):
        return False
    return error.retry_after_seconds is None or error.retry_after_seconds <= LONGEST_RETRY_AFTER_SECONDS
