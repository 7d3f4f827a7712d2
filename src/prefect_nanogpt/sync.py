"""The flows and tasks of this package for code without `async`: scripts, sync flows, threads, notebooks.

Each runs on the loop that Prefect keeps in a thread of its own for this, as a child of the run that calls it.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from prefect import State
from prefect.context import FlowRunContext, TaskRunContext
from prefect.utilities.asyncutils import run_coro_as_sync

from prefect_nanogpt import flows, tasks
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.flows.forms import own_signature

__all__ = [
    "collect_open_tickets",
    "estimate",
    "get_balance",
    "get_tts_status",
    "join_audio",
    "list_models",
    "list_voices",
    "read_ledger",
    "save_audio",
    "submit_tts",
    "text_to_speech",
    "text_to_speech_batch",
    "wait_for_tts",
    "write_subtitles",
]

P = ParamSpec("P")
R = TypeVar("R")


class _Blocking(Protocol[P, R]):
    """What is called with the parameters of a flow or task, and waits for its result."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def __call__(  # type: ignore[valid-type]  # as Prefect has it for flows
        self, *args: P.args, return_state: Literal[True], **kwargs: P.kwargs
    ) -> State[R]: ...


def _blocking(name: str, step: Callable[P, Coroutine[Any, Any, R]]) -> _Blocking[P, R]:
    """Make the version of a flow or task that waits for its result."""
    original = cast(Any, step).fn

    @wraps(original)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        _refuse_to_block_a_run(name)
        ended = threading.Event()

        async def run() -> R:
            work = asyncio.ensure_future(step(*args, **kwargs))
            try:
                return await asyncio.shield(work)
            except asyncio.CancelledError:
                work.cancel()
                # One Ctrl-C cancels here over and over; to a submission in the air the next one would be a second.
                while not work.done():
                    with suppress(asyncio.CancelledError):
                        await asyncio.wait([work])
                raise
            finally:
                ended.set()

        try:
            return run_coro_as_sync(run())
        except KeyboardInterrupt:
            # Prefect has cancelled the run and does not wait for its end, which a submission in the air may put off.
            ended.wait()
            raise

    call.__module__, call.__name__, call.__qualname__ = __name__, name, name
    call.__signature__ = own_signature(original)  # type: ignore[attr-defined]
    # Prefect follows it to tell what is async, and would await a task that is made of this.
    del call.__wrapped__
    return cast(_Blocking[P, R], call)


def _refuse_to_block_a_run(name: str) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    if FlowRunContext.get() or TaskRunContext.get():
        raise NanoGPTError(
            f"prefect_nanogpt.sync.{name} was called inside an async flow or task, which would stand still meanwhile. "
            "Await the one of prefect_nanogpt.flows or prefect_nanogpt.tasks. Nothing was submitted.",
            code="INVALID_REQUEST",
        )


if TYPE_CHECKING:
    text_to_speech = _blocking("text_to_speech", flows.text_to_speech)
    text_to_speech_batch = _blocking("text_to_speech_batch", flows.text_to_speech_batch)
    wait_for_tts = _blocking("wait_for_tts", flows.wait_for_tts)
    collect_open_tickets = _blocking("collect_open_tickets", flows.collect_open_tickets)
    get_tts_status = _blocking("get_tts_status", tasks.get_tts_status)
    submit_tts = _blocking("submit_tts", tasks.submit_tts)
    save_audio = _blocking("save_audio", tasks.save_audio)
    join_audio = _blocking("join_audio", tasks.join_audio)
    estimate = _blocking("estimate", tasks.estimate)
    list_models = _blocking("list_models", tasks.list_models)
    list_voices = _blocking("list_voices", tasks.list_voices)
    get_balance = _blocking("get_balance", tasks.get_balance)
    read_ledger = _blocking("read_ledger", tasks.read_ledger)
    write_subtitles = _blocking("write_subtitles", tasks.write_subtitles)

else:

    def __getattr__(name: str) -> Any:
        """Make one when it is used, as with the flows and tasks."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        step = getattr(flows if name in flows.__all__ else tasks, name)
        # Kept, and by the first of several threads: what is pickled by its name must be the one that has it.
        return globals().setdefault(name, _blocking(name, step))

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
