"""The parameters as the forms of the Prefect UI show them. Their descriptions come from the flows' docstrings."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from prefect_nanogpt.credentials import NanoGPTCredentials
from prefect_nanogpt.models import PollSchedule

__all__ = [
    "ArtifactKey",
    "Credentials",
    "DocumentedFormat",
    "DocumentedModel",
    "SaveTo",
    "Schedule",
    "TimeoutSeconds",
    "titled",
]


def titled(title: str, **constraints: Any) -> Any:
    """Give a parameter a title. Prefect titles it by its name, but merges the extra schema over that."""
    return Field(json_schema_extra={"title": title}, **constraints)


# Offered to choose from; any other value can be typed.
DocumentedModel = Literal[
    "Elevenlabs-Turbo-V2.5",
    "Elevenlabs-V3",
    "Kokoro-82m",
    "Qwen-3-TTS-1.7B",
    "gpt-4o-mini-tts",
    "tts-1",
    "tts-1-hd",
    "xai-tts",
]
DocumentedFormat = Literal["mp3", "opus", "aac", "flac", "wav"]

SaveTo = Annotated[str, titled("Save to")]
Credentials = Annotated[NanoGPTCredentials | None, titled("Credentials")]
TimeoutSeconds = Annotated[float, titled("Timeout, in seconds", gt=0)]
Schedule = Annotated[PollSchedule, titled("Poll schedule")]
ArtifactKey = Annotated[str, titled("Artifact key", pattern=r"^[a-z0-9-]+$")]
