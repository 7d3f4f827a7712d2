"""What a person starts: flows made of the tasks of this package."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prefect_nanogpt.flows.batch import text_to_speech_batch
    from prefect_nanogpt.flows.collect import collect_open_tickets
    from prefect_nanogpt.flows.generate import text_to_speech
    from prefect_nanogpt.flows.wait import wait_for_tts

__all__ = ["collect_open_tickets", "text_to_speech", "text_to_speech_batch", "wait_for_tts"]

if not TYPE_CHECKING:  # where it would give any name a type
    _MODULES = {
        "collect_open_tickets": "collect",
        "text_to_speech": "generate",
        "text_to_speech_batch": "batch",
        "wait_for_tts": "wait",
    }

    def __getattr__(name: str) -> Any:
        """Import a flow when it is used: each takes a while, and few need all of them."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
