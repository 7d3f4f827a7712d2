"""One Prefect task per step: submit, poll, save, join, write subtitles; and what can be looked up before and after."""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from prefect_nanogpt.tasks.log import is_news

if TYPE_CHECKING:
    from prefect_nanogpt.tasks.audio import save_audio
    from prefect_nanogpt.tasks.catalogue import get_balance, list_models, list_voices
    from prefect_nanogpt.tasks.estimates import estimate
    from prefect_nanogpt.tasks.join import join_audio
    from prefect_nanogpt.tasks.statement import read_ledger
    from prefect_nanogpt.tasks.status import get_tts_status
    from prefect_nanogpt.tasks.submit import submit_tts
    from prefect_nanogpt.tasks.subtitles import write_subtitles

__all__ = [
    "estimate",
    "get_balance",
    "get_tts_status",
    "join_audio",
    "list_models",
    "list_voices",
    "read_ledger",
    "save_audio",
    "submit_tts",
    "write_subtitles",
]

if not TYPE_CHECKING:  # where it would give any name a type
    _MODULES = {
        "estimate": "estimates",
        "get_balance": "catalogue",
        "get_tts_status": "status",
        "join_audio": "join",
        "list_models": "catalogue",
        "list_voices": "catalogue",
        "read_ledger": "statement",
        "save_audio": "audio",
        "submit_tts": "submit",
        "write_subtitles": "subtitles",
    }

    def __getattr__(name: str) -> Any:
        """Import a task when it is used, as with the flows."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


# Here, since whatever imports a task runs this first.
logging.getLogger("prefect.task_runs").addFilter(is_news)
