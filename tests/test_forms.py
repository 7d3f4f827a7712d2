"""The forms: what Prefect stores of the parameters of a deployment, and what becomes of what a form sends."""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas import FlowRun
from prefect.exceptions import ParameterTypeError
from prefect.flow_engine import run_flow
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import is_valid

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.flows import collect_open_tickets, text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.models import PollSchedule, Ticket
from prefect_nanogpt.sandbox import Sandbox

FLOWS: list[Flow[..., Any]] = [wait_for_tts, text_to_speech, text_to_speech_batch, collect_open_tickets]
TICKET = {"runId": "98b0d593", "model": "m", "cost": 0.005, "paymentSource": "USD", "isApiRequest": True}


def form_of(flow: Flow[..., Any]) -> dict[str, Any]:
    schema: dict[str, Any] = parameter_schema(flow).model_dump()
    return schema


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_a_form_has_one_control_for_each_thing_and_plain_words(flow: Flow[..., Any]) -> None:
    written = json.dumps(form_of(flow))
    assert not any(part in written for part in ("anyOf", "null", "`", "$ref"))
    assert form_of(flow.with_options(retries=2)) == form_of(flow)


@pytest.mark.parametrize("flow", FLOWS, ids=lambda flow: flow.name)
def test_a_form_asks_for_few_things_and_every_parameter_has_its_place(flow: Flow[..., Any]) -> None:
    shown = form_of(flow)["properties"]
    inside = shown["advanced"]["properties"]
    assert list(shown)[-1] == "advanced"
    assert len(shown) <= 8
    every = {"table" if name == "lines" else name for name in flow.fn.__annotations__} - {"return", "shard"}
    assert (set(shown) - {"advanced"}) | set(inside) == every


@pytest.mark.parametrize(
    ("flow", "parameters"),
    [
        (text_to_speech, {"text": "Hi.", "poll": {"min_seconds": 0.25}, "max_cost": "0.5", "voice": None}),
        (text_to_speech, {"text": "Hi.", "credentials": "studio", "advanced": {"max_cost": 0.5, "voice": None}}),
        (text_to_speech, {"text": "Hi.", "credentials": {"$ref": {"block_document_id": str(uuid4())}}}),
        (wait_for_tts, {"ticket": TICKET}),
        (wait_for_tts, {"ticket": json.dumps(TICKET)}),
        (text_to_speech_batch, {"lines": [{"id": "a", "text": "A."}], "shards": 2, "shard": 1}),
        (text_to_speech_batch, {"lines": "lines.csv"}),
        (text_to_speech_batch, {"table": "lines.csv", "advanced": {"resubmit": ["lost"]}}),
        (collect_open_tickets, {"folders": ["audio"]}),
    ],
)
def test_the_server_takes_parameters_flat_and_as_forms_send_them(flow: Flow[..., Any], parameters: Any) -> None:
    assert is_valid(parameters, form_of(flow))


def test_what_a_form_sends_is_what_the_flow_takes() -> None:
    sent = {"text": "Hi.", "voice": "", "save_to": None, "advanced": {"take": 3, "poll": {"min_seconds": 1}}}
    taken = text_to_speech.validate_parameters(sent)
    assert (taken["text"], taken["take"], taken["poll"]) == ("Hi.", 3, PollSchedule(min_seconds=1))
    assert (taken.get("voice"), taken.get("save_to", "audio")) == (None, "audio")
    assert "advanced" not in taken

    lines = [{"id": "a", "text": "A."}]
    assert text_to_speech_batch.validate_parameters({"table": json.dumps(lines)})["lines"] == lines
    assert wait_for_tts.validate_parameters({"ticket": json.dumps(TICKET)})["ticket"] == Ticket.model_validate(TICKET)


@pytest.mark.parametrize(
    ("pasted", "lines"),
    [
        ("lines.csv", "lines.csv"),
        (" s3://bucket/lines.csv\n", "s3://bucket/lines.csv"),
        ('\n[{"id": "a", "text": "A."}]', [{"id": "a", "text": "A."}]),
        ('{"id": "a", "text": "A."}', [{"id": "a", "text": "A."}]),
        (
            '{"id": "a", "text": "A."}\n\n{"id": "b", "text": "B."}\n',
            [{"id": "a", "text": "A."}, {"id": "b", "text": "B."}],
        ),
        ('\ufeffid,text\r\na,"A, b."\r\n', [{"id": "a", "text": "A, b."}]),
        ("id\ttext\na\tA, b.", [{"id": "a", "text": "A, b."}]),
        ("# to say\nid;text;take\na;A.;2", [{"id": "a", "text": "A.", "take": "2"}]),
    ],
)
def test_a_table_is_named_or_pasted_in_any_form_that_a_file_has(pasted: str, lines: object) -> None:
    assert text_to_speech_batch.validate_parameters({"table": pasted})["lines"] == lines


@pytest.mark.parametrize(
    ("flow", "parameters", "says"),
    [
        (text_to_speech_batch, {"table": '[{"id": "a"'}, "table: line 1: not JSON"),
        (
            text_to_speech_batch,
            {"table": '{"id": "a", "text": "A."}\n{"id": "b", "text": "B."'},
            "table: line 2: not JSON",
        ),
        (text_to_speech_batch, {"table": "name,words\na,A."}, "table: line 1: the columns id and text are needed"),
        (text_to_speech_batch, {"table": "id,text,text\na,A.,B."}, "table: the name 'text' is there twice"),
        (text_to_speech, {"text": "Hi.", "poll": {"minimum": 3}}, "minimum"),
        (text_to_speech, {"text": "Hi.", "advanced": {"poll": {"minimum": 3}}}, "minimum"),
        (text_to_speech_batch, {}, "lines"),
        (text_to_speech, {"text": "Hi.", "advanced": 3}, "advanced: this is no object"),
        (text_to_speech, {"text": "Hi.", "advanced": {"takes": 3}}, "takes"),
        (text_to_speech, {"text": "Hi.", "advanced": {"credentials": {"api_key": "k"}}}, "in clear"),
        (wait_for_tts, {"ticket": "98b0d593"}, "not the ticket's JSON"),
    ],
)
def test_what_a_form_cannot_mean_is_refused_with_a_word(flow: Flow[..., Any], parameters: Any, says: str) -> None:
    with pytest.raises(Exception, match=says) as caught:
        flow.validate_parameters(parameters)
    assert isinstance(caught.value, ParameterTypeError | TypeError | ValueError)


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("The ticket of today", True),
        ("chapter-one", True),
        ("beta-test-of-ours", True),
        ("Modern-Jazz", True),
        ("alpha3-canis-majoris-nebula", False),
        ("Gorgeous-Deer", False),  # made up by the form of V2
        ("nu973-norpin-v", False),  # by that of V1
        (None, False),  # by the server
    ],
)
async def test_the_name_of_a_run_is_made_only_where_nobody_has_given_one(
    given: str | None, is_kept: bool, sandbox: Sandbox, credentials: NanoGPTCredentials, save_to: str
) -> None:
    await credentials.save("names", overwrite=True)
    parameters = {
        "text": "Hello.",
        "save_to": save_to,
        "credentials": "names",
        "advanced": {"poll": {"min_seconds": 0.25}},
    }
    async with get_client() as client:
        run: FlowRun = await client.create_flow_run(text_to_speech, parameters=parameters, name=given)
        await run_flow(text_to_speech, flow_run=run)  # type: ignore[misc]
        ended = await client.read_flow_run(run.id)

    assert ended.state_name == "Completed"
    assert ended.name == (given if is_kept else "tts-Elevenlabs-Turbo-V2.5-Hello.")


@pytest.mark.parametrize(
    ("of_deployment", "of_run", "take"),
    [
        ({"advanced": {"take": 2}}, {}, 2),
        ({"advanced": {"take": 2}}, {"take": 3}, 3),  # by a pipeline, where the default was set in a form
        ({"take": 2}, {"advanced": {"take": 3}}, 3),  # in a form, where the default was set in prefect.yaml
        ({"advanced": {"take": 2}}, {"take": 3, "advanced": {"take": 4}}, 4),
        ({"take": 3, "advanced": {"take": 2}}, {}, 2),  # in the deployment's form, over prefect.yaml
        ({"advanced": {"take": 2}}, {"advanced": {"max_cost": 1}}, 2),  # Prefect's server merges the first level alone
    ],
)
async def test_what_a_run_is_given_comes_before_what_its_deployment_has(
    of_deployment: dict[str, Any],
    of_run: dict[str, Any],
    take: int,
    sandbox: Sandbox,
    credentials: NanoGPTCredentials,
    save_to: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await credentials.save("precedence", overwrite=True)
    always = {"text": "Hello.", "save_to": save_to, "credentials": "precedence", **of_deployment}
    made = await text_to_speech.ato_deployment("precedence", parameters=always)
    deployment = await made.aapply()
    async with get_client() as client:
        run = await client.create_flow_run_from_deployment(deployment, parameters=of_run)
        monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(run.id))  # as in the process of every deployment's run
        await run_flow(text_to_speech, flow_run=run)  # type: ignore[misc]
        ended = await client.read_flow_run(run.id)

    assert ended.state_name == "Completed"
    [sent] = [json.loads(note.read_bytes()) for note in Path(save_to, ".nanogpt").rglob("*sent*")]
    assert sent["take"] == take


LINES = [{"id": "a", "text": "A."}]
OTHERS = json.dumps([{"id": "b", "text": "B."}])


@pytest.mark.parametrize(
    ("of_deployment", "of_run", "said"),
    [
        ({"table": OTHERS}, {"lines": LINES}, ["a"]),
        ({"lines": LINES}, {"table": OTHERS}, ["b"]),
        ({}, {"lines": LINES, "table": OTHERS}, None),
    ],
)
async def test_the_lines_of_a_run_come_before_those_of_its_deployment(
    of_deployment: dict[str, Any],
    of_run: dict[str, Any],
    said: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = await text_to_speech_batch.ato_deployment("lines", parameters=of_deployment)
    deployment = await made.aapply()
    async with get_client() as client:
        run = await client.create_flow_run_from_deployment(deployment, parameters=of_run)
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", str(run.id))
    if said is None:
        with pytest.raises(ParameterTypeError, match="both are given"):
            text_to_speech_batch.validate_parameters(run.parameters)
    else:
        taken = text_to_speech_batch.validate_parameters(run.parameters)
        assert [line["id"] for line in taken["lines"]] == said


async def test_an_empty_text_in_code_is_no_limit_that_was_left_out(save_to: str, sandbox: Sandbox) -> None:
    with pytest.raises(ParameterTypeError, match="max_cost"):
        await text_to_speech("Hello.", save_to=save_to, max_cost="")
    assert sandbox.requests() == []


async def test_parameters_are_checked_in_every_version_of_a_flow(
    save_to: str, credentials: NanoGPTCredentials, sandbox: Sandbox
) -> None:
    unchecked = text_to_speech.with_options(validate_parameters=False)
    await unchecked("Hello.", save_to=save_to, credentials=credentials)
    assert len(sandbox.ledger.charges) == 1
