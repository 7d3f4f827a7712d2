"""Prefect tasks and flows for NanoGPT's asynchronous text-to-speech API."""

__version__ = "0.1.0"

from prefect_nanogpt.credentials import NanoGPTCredentials

__all__ = ["NanoGPTCredentials", "__version__"]
