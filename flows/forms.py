"""The parameters as the forms of the Prefect UI show them, and as Prefect keeps them: without a key.

Their descriptions come from the flows' docstrings.
"""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, ParamSpec, TypeVar
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.exceptions import ParameterTypeError
from prefect.runtime import flow_run as this_flow_run
from pydantic import BeforeValidator, Field, WithJsonSchema

from prefect_nanogpt.credentials import KEY_IN_CLEAR, MASK, NanoGPTCredentials, has_key_in_clear
from prefect_nanogpt.lines import usable
from prefect_nanogpt.models import LARGEST_TAKE, Money, PollSchedule

__all__ = [
    "ArtifactKey",
    "CostLimit",
    "Credentials",
    "DocumentedFormat",
    "DocumentedModel",
    "FileName",
    "Lines",
    "Resubmitted",
    "SaveTo",
    "Schedule",
    "Take",
    "TimeoutSeconds",
    "keeps_no_key",
    "titled",
]

P = ParamSpec("P")
R = TypeVar("R")


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
FileName = Annotated[str | None, titled("File name", min_length=1, max_length=100)]
Credentials = Annotated[NanoGPTCredentials | str | None, titled("Credentials")]
TimeoutSeconds = Annotated[float, titled("Timeout, in seconds", gt=0, le=LONGEST_TIMEOUT_SECONDS, allow_inf_nan=False)]
Schedule = Annotated[PollSchedule, titled("Poll schedule")]
CostLimit = Annotated[Money | None, titled("Cost limit, in USD")]
Take = Annotated[int, titled("Take", ge=1, le=LARGEST_TAKE)]
Resubmitted = Annotated[Sequence[Literal["uncertain", "lost", "refused"]], titled("Resubmit")]
ArtifactKey = Annotated[str, titled("Artifact key", pattern=r"^[a-z0-9-]+$")]


class _KeyIsNoParameter(Flow[P, R]):
    """A flow that refuses an API key that is given in clear, and keeps it out of what Prefect stores of a run."""

    def with_options(self, **options: Any) -> Flow[P, R]:
        """Make another version of the flow, as Prefect does."""
        return keeps_no_key(super().with_options(**options))

    def serialize_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Give the parameters as they are stored, which is before they are validated."""
        storable: dict[str, Any] = _storable(super().serialize_parameters(_without_key(parameters)))
        return storable

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Check the parameters.

        Raises:
            ParameterTypeError: One of them is not what it should be, or is a key in clear.
        """
        if has_key_in_clear(parameters.get("credentials")):
            with suppress(Exception):
                _mask_what_is_stored(parameters)
            raise ParameterTypeError(f"Flow run received invalid parameters:\n - credentials: {KEY_IN_CLEAR}")
        given = parameters.get("credentials")
        if not isinstance(given, str):
            return super().validate_parameters(parameters)
        # Prefect logs all parameters where one is wrong, and what should be a name may be a key.
        return super().validate_parameters({**parameters, "credentials": None}) | {"credentials": given}


def _mask_what_is_stored(parameters: Mapping[str, Any]) -> None:
    """Take a key out of the parameters of this run where it was started through the API, which has stored them."""
    run_id = this_flow_run.id
    if run_id is None:
        return
    with get_client(sync_client=True) as client:
        stored = client.read_flow_run(UUID(run_id)).parameters
        if stored.get("credentials") == parameters["credentials"]:
            client.update_flow_run(UUID(run_id), parameters=_without_key(stored))


def _without_key(parameters: Mapping[str, Any]) -> dict[str, Any]:
    given = parameters.get("credentials")
    if not has_key_in_clear(given):
        return {**parameters}
    return {**parameters, "credentials": dict.fromkeys(given, MASK) if isinstance(given, Mapping) else MASK}


def _storable(value: Any) -> Any:
    """Replace what Prefect cannot store, or cannot read again, until whoever refuses it comes to it.

    One run with a NaN among its parameters ends every listing of runs that it is in with an error of the server.
    """
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case int() if not -(2**63) <= value < 2**63:
            return "a number of more than 64 bits"
        case str():
            return value.encode(errors="replace").decode().replace("\0", "\ufffd")
        case list():
            return [_storable(item) for item in value]
        case dict():
            return {_storable(name): _storable(item) for name, item in value.items()}
    return value


def keeps_no_key(flow: Flow[P, R]) -> Flow[P, R]:
    """Keep API keys out of the parameters that Prefect stores of a flow's runs.

    Prefect stores the parameters of a run before it validates them, a block without its secrets and a dict as it is.
    """
    flow.__class__ = _KeyIsNoParameter
    return flow
