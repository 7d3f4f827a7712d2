"""The parameters as the forms of the Prefect UI show them, and as Prefect keeps them: without a key.

Their descriptions come from the flows' docstrings. A form has few things first and the rest in *Advanced*; the flows'
own parameters are flat, and runs can be started with them in either way.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from decimal import Decimal
from functools import cached_property
from typing import Annotated, Any, Literal, ParamSpec, TypeVar
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.exceptions import ParameterTypeError
from prefect.runtime import flow_run as this_flow_run
from prefect.utilities.callables import ParameterSchema, get_parameter_defaults, parameter_schema
from pydantic import BeforeValidator, Field, GetPydanticSchema, WithJsonSchema
from pydantic.json_schema import NoDefault

from prefect_nanogpt.credentials import ADVANCED, KEY_IN_CLEAR, NanoGPTCredentials, has_key_in_clear, without_key
from prefect_nanogpt.models import LARGEST_TAKE, Money, PollSchedule, Ticket
from prefect_nanogpt.subtitles import SubtitleFormat
from prefect_nanogpt.tables import read_pasted

__all__ = [
    "ArtifactKey",
    "CostLimit",
    "Credentials",
    "DocumentedFormat",
    "DocumentedModel",
    "FileName",
    "Lines",
    "Options",
    "PaidTicket",
    "Pronounced",
    "Resubmitted",
    "SaveTo",
    "Schedule",
    "Subtitles",
    "Take",
    "TimeoutSeconds",
    "flow",
    "has_form",
    "offering",
    "own_signature",
    "titled",
]

P = ParamSpec("P")
R = TypeVar("R")


def titled(title: str, **constraints: Any) -> Any:
    """Give a parameter a title. Prefect titles it by its name, but merges the extra schema over that."""
    return Field(json_schema_extra={"title": title}, **constraints)


def _read_as(kind: Any) -> GetPydanticSchema:
    """Make a value of one type, and accept for type checkers all that is read as one."""
    return GetPydanticSchema(lambda _, handler: handler(kind))


def _lines(lines: Any) -> Any:
    from prefect_nanogpt.lines import usable

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
    # As wide for type checkers as rows are: mappings of any kind, such as typed dicts, and pandas' records.
    Sequence[Mapping[Any, Any]] | str | os.PathLike[str],
    _read_as(list[dict[str, Any]] | str),
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
    WithJsonSchema({"type": "string"}),
    titled("Save to"),
]
Options = Annotated[Mapping[str, Any] | None, _read_as(dict[str, Any] | None), titled("Further options")]
FileName = Annotated[str | None, titled("File name", min_length=1, max_length=100)]
Credentials = Annotated[NanoGPTCredentials | str | None, titled("Credentials")]
TimeoutSeconds = Annotated[float, titled("Timeout, in seconds", gt=0, le=LONGEST_TIMEOUT_SECONDS, allow_inf_nan=False)]
Schedule = Annotated[PollSchedule, titled("Poll schedule")]
CostLimit = Annotated[Decimal | float | str | None, _read_as(Money | None), titled("Cost limit, in USD")]
PaidTicket = Annotated[Ticket | Mapping[str, Any] | str, _read_as(Ticket), titled("Ticket")]
Take = Annotated[int, titled("Take", ge=1, le=LARGEST_TAKE)]
Resubmitted = Annotated[Sequence[Literal["uncertain", "lost", "refused"]], titled("Resubmit")]
Pronounced = Annotated[
    Mapping[str, Any] | str | os.PathLike[str] | None,
    _read_as(dict[str, Any] | str | None),
    BeforeValidator(lambda given: os.fspath(given) if isinstance(given, os.PathLike) else given),
    WithJsonSchema({"type": "string"}),
    titled("Pronunciation"),
]
Subtitles = Annotated[SubtitleFormat | None, titled("Subtitles")]
ArtifactKey = Annotated[str, titled("Artifact key", pattern=r"^[a-z0-9-]+$")]


WRITTEN = "written_signature"
TABLE = "table"
"""What `lines` is called in the form, where it is one text field. Prefect's server would refuse a list for a text."""
OF_FORMS = (ADVANCED, TABLE)
TABLE_DESCRIPTION = (
    "The path or URL of a table (CSV) with the columns id and text, of a JSON array or of JSON Lines; or what "
    'is in it, pasted: [{"id": "hello", "text": "Hello."}]. Its other columns or fields: voice, model, take, '
    "documented options such as speed, and others as option.NAME."
)


class _HasForm(Flow[P, R]):
    """A flow with a form, which refuses an API key in clear, and keeps it out of what Prefect stores of a run."""

    _first: tuple[str, ...]
    _left_out: tuple[str, ...]
    _models: tuple[str, ...] = ()

    @cached_property
    def parameters(self) -> ParameterSchema:  # type: ignore[override]  # Prefect sets it, and reads it nowhere
        """The schema of the parameters, made when it is asked for; see `flow`."""
        return parameter_schema(self.fn)

    @property
    def __signature__(self) -> inspect.Signature:
        """The parameters as the form has them: Prefect makes the schema of a deployment of the flow's signature."""
        schema = parameter_schema(self.fn)
        defaults = get_parameter_defaults(self.fn)
        if self._models and "model" in schema.properties:
            schema.properties["model"]["anyOf"] = [{"enum": [*self._models]}, {"type": "string"}]
        shown = {name: _control(schema.properties[name], schema.definitions) for name in schema.properties}
        first = []
        for name in self._first:
            default = defaults.get(name, inspect.Parameter.empty)
            if name == "lines":
                described = {"type": "string", "title": "Lines", "description": TABLE_DESCRIPTION}
                first.append(_parameter(TABLE, described, NoDefault))
            elif default is inspect.Parameter.empty:
                # An object that must be given is pasted; without a type it is one field for JSON.
                shape = shown[name] if "properties" not in shown[name] else _only(shown[name], "title", "description")
                first.append(_parameter(name, shape, default))
            else:
                first.append(_parameter(name, shown[name], NoDefault if default in (None, ()) else default))
        rest = {
            name: _with_default_told(shape, defaults[name])
            for name, shape in shown.items()
            if name not in (*self._first, *self._left_out, *OF_FORMS)
        }
        advanced = {
            "type": "object",
            "title": "Advanced",
            "description": "What is left empty has its default.",
            "properties": {name: {**shape, "position": number} for number, (name, shape) in enumerate(rest.items())},
        }
        return inspect.Signature([*first, _parameter(ADVANCED, advanced, NoDefault)])

    def with_options(self, **options: Any) -> Flow[P, R]:
        """Make another version of the flow, as Prefect does."""
        return has_form(*self._first, left_out=self._left_out, models=self._models)(super().with_options(**options))

    def serialize_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Give the parameters as they are stored, which is before they are validated."""
        given = {name: value for name, value in parameters.items() if not (name in OF_FORMS and value is None)}
        storable: dict[str, Any] = _storable(super().serialize_parameters(without_key(given)))
        return storable

    def validate_parameters(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """Check the parameters.

        Raises:
            ParameterTypeError: One of them is not what it should be, or is a key in clear.
        """
        parameters = self._flat(parameters)
        if without_key(parameters) != parameters:
            with suppress(Exception):
                _mask_what_is_stored()
        if has_key_in_clear(parameters.get("credentials")):
            raise ParameterTypeError(f"Flow run received invalid parameters:\n - credentials: {KEY_IN_CLEAR}")
        given = parameters.get("credentials")
        # Prefect logs all parameters where one is wrong, and what should be a name may be a key.
        name = {"credentials": given} if isinstance(given, str) else {}
        validated = super().validate_parameters({**parameters, **dict.fromkeys(name)}) | name
        return {name: value for name, value in validated.items() if name not in OF_FORMS}

    def _flat(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Give the parameters as the flow takes them. What is emptied in a form is not there."""
        parameters = {**given}
        advanced, table = parameters.pop(ADVANCED, None), parameters.pop(TABLE, None)
        if not isinstance(advanced, Mapping | None):
            raise ParameterTypeError(f"Flow run received invalid parameters:\n - {ADVANCED}: this is no object")
        if advanced is not None or table:
            of_run, of_deployment = _stored_parameters()
            of_run = {name: value for name, value in of_run.items() if of_deployment.get(name) != value}
            defaults = of_deployment.get(ADVANCED) or {}
            # Prefect's server takes what a run has in Advanced for all that its deployment has there. And defaults of a
            # deployment, in Advanced or flat, give way to what the run itself was given, flat or in Advanced.
            kept = {name: value for name, value in {**defaults, **(advanced or {})}.items() if value not in (None, "")}
            parameters |= {
                name: value for name, value in kept.items() if name not in of_run or defaults.get(name) != value
            }
            if table and parameters.get("lines") is not None:
                if of_deployment.get(TABLE) == table:
                    table = None
                elif of_deployment.get("lines") != parameters["lines"]:
                    raise ParameterTypeError(
                        f"Flow run received invalid parameters:\n - lines and {TABLE}: both are given, which is it?"
                    )
        if table:
            parameters["lines"] = _pasted(table)
        if "lines" in self._first and parameters.get("lines") is None:
            raise ParameterTypeError("Flow run received invalid parameters:\n - lines: there are none")
        defaults = get_parameter_defaults(self.fn)
        # Controls that somebody may empty to a text. Any other empty text is a mistake, and refused as such.
        texts = {name for name in self._first if defaults.get(name, "") is None}
        return {
            name: value
            for name, value in parameters.items()
            if not (name in defaults and (value is None or (name in texts and isinstance(value, str) and not value)))
        }


def _control(schema: dict[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Make a property one plain control: the UIs show a tab for each type of several, "None" included."""
    told = _only(schema, "title", "description")
    told["description"] = _plain(told.get("description", ""))
    kinds = [_resolved(kind, definitions) for kind in schema.get("anyOf", [schema])]
    kinds = [kind for kind in kinds if kind.get("type") != "null"]
    for kind in kinds:
        if "block_type_slug" in kind:  # without a type, so that a block's name is taken too
            return _only(kind, "block_type_slug") | told
    numbers = [kind for kind in kinds if kind.get("type") == "number"]
    if not numbers and len(kinds) > 1 and "enum" in kinds[0]:  # no drop-down of theirs has room to type
        told["description"] += f" Known are {', '.join(kinds[0]['enum'])}; others can be typed."
        return {"type": "string"} | told
    control = {name: value for name, value in (numbers or kinds)[0].items() if name not in ("default", "position")}
    if "properties" in control:
        control["properties"] = {
            name: _with_default_told(_control(member, definitions), member.get("default"))
            for name, member in control["properties"].items()
        }
    return control | told


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    if "$ref" not in schema:
        return {**schema}
    definition: dict[str, Any] = definitions[schema["$ref"].rpartition("/")[2]]
    return definition | {name: schema[name] for name in schema if name != "$ref"}


def _only(schema: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: schema[name] for name in names if name in schema}


def _plain(words: str) -> str:
    """Give a docstring's words without markup, and with what leaves a value out as a form has it."""
    words = " ".join(words.replace("`", "").split())
    return words.replace("; None ", "; empty ").replace(". None ", ". Empty ")


def _with_default_told(shape: dict[str, Any], default: object) -> dict[str, Any]:
    """Tell a default in words. Were it filled in, it would displace what a copied run was given flat."""
    if not isinstance(default, int | float | str) or isinstance(default, bool):
        return shape
    told = default if isinstance(default, str) else f"{default:g}"
    return {**shape, "description": f"{shape['description']} Default: {told}."}


def _parameter(name: str, shape: dict[str, Any], default: object) -> inspect.Parameter:
    # Prefect puts its own title over that of the annotation, but merges the extra schema over both.
    annotation = Annotated[Any, WithJsonSchema(shape), Field(json_schema_extra=shape)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _pasted(table: Any) -> Any:
    """Read lines that were pasted in the place of a path."""
    from prefect_nanogpt.lines import is_content

    if not isinstance(table, str):
        return table
    pasted = table.strip("\ufeff \t\r\n")
    if not (pasted.startswith("[") or is_content(pasted)):
        return pasted
    try:
        return read_pasted(pasted)
    except ValueError as error:
        raise ParameterTypeError(f"Flow run received invalid parameters:\n - {TABLE}: {error}") from None


def _stored_parameters() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Read what this run was started with, and what its deployment has for all its runs; both are empty in code."""
    run_id = this_flow_run.id
    if run_id is None or FlowRunContext.get() is not None:  # which is that of a parent
        return {}, {}
    with get_client(sync_client=True) as client:
        run = client.read_flow_run(UUID(run_id))
        deployment = client.read_deployment(run.deployment_id) if run.deployment_id else None
    return run.parameters, deployment.parameters if deployment else {}


def _mask_what_is_stored() -> None:
    """Take a key out of the parameters of this run where it was started through the API, which has stored them."""
    run_id = this_flow_run.id
    if run_id is None:
        return
    with get_client(sync_client=True) as client:
        stored = client.read_flow_run(UUID(run_id)).parameters
        if (masked := without_key(stored)) != stored:
            client.update_flow_run(UUID(run_id), parameters=masked)


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


def _with_what_forms_have(signature: inspect.Signature) -> inspect.Signature:
    """Let Prefect bind what a form sends, which it does before the flow can sort it: to names that the function has."""
    own = [
        parameter.replace(default=None) if parameter.name == "lines" else parameter
        for parameter in signature.parameters.values()
    ]
    more = OF_FORMS if "lines" in signature.parameters else (ADVANCED,)
    forms = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Any) for name in more]
    return signature.replace(parameters=[*own, *forms])


def own_signature(function: Callable[..., Any]) -> inspect.Signature:
    """Give the signature of a flow's function, or of any other, as it is written."""
    return vars(function).get(WRITTEN) or inspect.signature(function)


def offering(flow: Flow[P, R], models: Iterable[str]) -> Flow[P, R]:
    """Make a version of a flow whose form names these models as the known ones, where there are any."""
    assert isinstance(flow, _HasForm)
    return has_form(*flow._first, left_out=flow._left_out, models=tuple(models))(flow.with_options())


def flow(**options: Any) -> Callable[[Callable[P, R]], Flow[P, R]]:
    """Make a flow that is to have a form, as Prefect's decorator does, but without the schema of its parameters.

    Prefect makes one, and a model to check them by, whenever a flow is declared. For our many parameters that takes
    longer than to import all else that a run needs, and only who deploys the flow looks at it.
    """

    def make(function: Callable[P, R]) -> Flow[P, R]:
        vars(function)["__signature__"] = inspect.Signature()
        made = Flow(function, validate_parameters=False, **options)
        del vars(function)["__signature__"]
        return made

    return make


def has_form(
    *first: str, left_out: tuple[str, ...] = (), models: tuple[str, ...] = ()
) -> Callable[[Flow[P, R]], Flow[P, R]]:
    """Give a flow a form of plain controls, and keep API keys out of the parameters that Prefect stores of its runs.

    Prefect stores the parameters of a run before it validates them, a block without its secrets and a dict as it is.

    Args:
        first: The parameters that come first, in this order; the others are in *Advanced*.
        left_out: The parameters that no person sets.
        models: The models that the form names as known; none for the documented ones.
    """

    def make(flow: Flow[P, R]) -> Flow[P, R]:
        flow.__class__ = _HasForm
        vars(flow).pop("parameters", None)  # made of no signature, or of that of another version
        vars(flow).update(_first=first, _left_out=left_out, _models=models)
        flow.should_validate_parameters = True  # without which parameters of forms would reach the function
        written = own_signature(flow.fn)
        vars(flow.fn).update({WRITTEN: written, "__signature__": _with_what_forms_have(written)})
        return flow

    return make
