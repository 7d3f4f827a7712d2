"""Prefect tasks and flows for NanoGPT's asynchronous text-to-speech API."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from prefect_nanogpt.credentials import NanoGPTCredentials

__all__ = ["NanoGPTCredentials", "__version__"]

if not TYPE_CHECKING:  # where it would give any name a type

    def __getattr__(name: str) -> Any:
        """Import the block when it is used: it needs Prefect, which takes its time."""
        if name != "NanoGPTCredentials":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from prefect_nanogpt.credentials import NanoGPTCredentials

        return NanoGPTCredentials

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
