"""The parameters as the forms of the Prefect UI show them. Their descriptions come from the flows' docstrings."""

import os
from collections.abc import Iterator, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from prefect_nanogpt.credentials import NanoGPTCredentials
from prefect_nanogpt.lines import usable
from prefect_nanogpt.models import PollSchedule

__all__ = [
    "ArtifactKey",
    "CostLimit",
    "Credentials",
    "DocumentedFormat",
    "DocumentedModel",
    "Lines",
    "Resubmitted",
    "SaveTo",
    "Schedule",
    "Take",
    "TimeoutSeconds",
    "titled",
]


def titled(title: str, **constraints: Any) -> Any:
    """Give a parameter a title. Prefect titles it by its name, but merges the extra schema over that."""
    return Field(json_schema_extra={"title": title}, **constraints)


def _lines(lines: Any) -> Any:
    if isinstance(lines, Iterator):
        raise ValueError("these lines can be read only once, and Prefect reads parameters too: give list(lines)")
    return usable(lines)


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

Lines = Annotated[
    list[dict[str, Any]] | str | os.PathLike[str],
    BeforeValidator(_lines),
    WithJsonSchema(
        {"anyOf": [{"type": "array", "items": {"type": "object", "additionalProperties": True}}, {"type": "string"}]}
    ),
    titled("Lines"),
]
LONGEST_TIMEOUT_SECONDS = 30 * 24 * 3600
SaveTo = Annotated[
    str | os.PathLike[str],
    BeforeValidator(lambda place: os.fspath(place) if isinstance(place, os.PathLike) else place),
    WithJsonSchema({"type": "string", "title": "Save to"}),
]
Credentials = Annotated[NanoGPTCredentials | None, titled("Credentials")]
TimeoutSeconds = Annotated[float, titled("Timeout, in seconds", gt=0, le=LONGEST_TIMEOUT_SECONDS, allow_inf_nan=False)]
Schedule = Annotated[PollSchedule, titled("Poll schedule")]
CostLimit = Annotated[Decimal | None, titled("Cost limit, in USD", ge=0, allow_inf_nan=False)]
Take = Annotated[int, titled("Take", ge=1)]
Resubmitted = Annotated[Sequence[Literal["uncertain", "lost", "refused"]], titled("Resubmit")]
ArtifactKey = Annotated[str, titled("Artifact key", pattern=r"^[a-z0-9-]+$")]
