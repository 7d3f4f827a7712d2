"""Other people's clients of NanoGPT against the sandbox: it is a stand-in for them too, or it is none for us.

They are installed from the package registries, and a test is skipped, saying so, where that cannot be done.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefect_nanogpt.sandbox import Sandbox
from tests.conftest import API_KEY

pytestmark = pytest.mark.registries
PYTHON_CLIENTS = ("openai==3.57.0", "nanoodle==0.6.0")
NODE_CLIENT = "nanoodle@0.8.0"
NOODLES = """
import json, sys
from nanoodle import Workflow

base_url, key, folder = sys.argv[1:]
for model, prompt in json.load(sys.stdin):
    graph = {"v": 1, "nodes": [{"id": "n1", "type": "tts", "fields": {"model": model, "prompt": prompt}}], "links": []}
    try:
        result = Workflow(graph, api_key=key, base_url=base_url, poll_intervals={"audio": 0.1}).run({})
    except Exception as error:
        print(json.dumps(str(error)))
    else:
        audio = next(iter(result.outputs.values()))
        audio.save(f"{folder}/noodle-{model}")
        print(json.dumps(result.cost_usd))
"""
SPEECH = """
import json, sys
from openai import APIStatusError, OpenAI

base_url, key, folder = sys.argv[1:]
client = OpenAI(base_url=f"{base_url}/api/v1", api_key=key, max_retries=0)
answers = client.audio.speech
with answers.with_streaming_response.create(
    model="tts-1", voice="alloy", input="Hello.", response_format="wav", extra_body={"stream": True}
) as answer:
    answer.stream_to_file(f"{folder}/streamed")
    print(json.dumps([answer.headers.get("content-length"), answer.headers["content-type"]]))
answers.create(model="tts-1", voice="alloy", input="Hello.").write_to_file(f"{folder}/whole")
for wrong, model in ((client, "no-such-model"), (client.with_options(api_key="bad-key"), "tts-1")):
    try:
        wrong.audio.speech.create(model=model, voice="alloy", input="Hello.")
    except APIStatusError as error:
        print(json.dumps([type(error).__name__, error.code]))
"""
NODE = """
import { NanoClient } from "nanoodle";
import { writeFileSync } from "node:fs";

const [baseUrl, apiKey, folder] = process.argv.slice(2);
const client = new NanoClient({ apiKey, baseUrl, pollIntervals: { audio: 100 } });
let job;
const noted = { onRunId: (one) => { job = one; } };
const url = await client.audio("Elevenlabs-Turbo-V2.5", "Hello.", { voice: "Rachel" }, noted);
writeFileSync(`${folder}/node`, Buffer.from(await (await fetch(url)).arrayBuffer()));
const inline = await client.audio("tts-1", "Hello.");
console.log(JSON.stringify([job.runId, job.cost, inline.slice(0, 40)]));
try {
  await client.audio("Elevenlabs-Turbo-V2.5", "[sandbox:reject] No.");
} catch (error) {
  console.log(JSON.stringify(error.message));
}
"""


def install(*command: str | Path, cwd: Path) -> None:
    """Install something, or skip the test where no registry can be reached."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=90)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"the client cannot be installed here: {error}")
    if done.returncode:
        pytest.skip(f"the client cannot be installed here: {done.stderr.strip()[-300:]}")


def run(*command: str | Path, cwd: Path, stdin: str = "") -> list[Any]:
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has the clients and nothing of ours."""
    folder = tmp_path_factory.mktemp("clients")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    found = folder / "venv" / "bin" / "python"
    install(Path(sys.executable).with_name("uv"), "pip", "install", "--python", found, *PYTHON_CLIENTS, cwd=folder)
    return found


def test_openais_client_gets_its_audio_whole_and_streamed_and_its_errors(
    python: Path, sandbox: Sandbox, tmp_path: Path
) -> None:
    streamed, *errors = run(python, "-c", SPEECH, sandbox.root_url, API_KEY, tmp_path, cwd=tmp_path)

    assert streamed == [None, "audio/wav"]
    first, second = sandbox.ledger.charges
    assert (tmp_path / "streamed").read_bytes() == sandbox.audio_bytes(first.run_id)
    assert (tmp_path / "whole").read_bytes() == sandbox.audio_bytes(second.run_id)
    assert errors == [["NotFoundError", "model_not_found"], ["AuthenticationError", "invalid_api_key"]]


def test_nanoodle_in_python_polls_a_ticket_and_reads_the_other_answers(
    python: Path, sandbox: Sandbox, tmp_path: Path
) -> None:
    models = ["Elevenlabs-Turbo-V2.5", "tts-1", "Elevenlabs-V3"]
    asked = [*zip(models, ["Hello.", "Hello.", "[sandbox:reject] No."], strict=True)]

    costs = run(python, "-c", NOODLES, sandbox.root_url, API_KEY, tmp_path, cwd=tmp_path, stdin=json.dumps(asked))

    for model, charge in zip(models[:2], sandbox.ledger.charges, strict=False):
        assert (tmp_path / f"noodle-{model}").read_bytes() == sandbox.audio_bytes(charge.run_id)
    assert costs[0] == pytest.approx(float(sandbox.ledger.charges[0].amount))
    assert "Content rejected by provider" in costs[2]
    assert [refund.model for refund in sandbox.ledger.refunds] == ["Elevenlabs-V3"]


def test_nanoodle_in_node_polls_a_ticket_and_reads_the_other_answers(sandbox: Sandbox, tmp_path: Path) -> None:
    install("npm", "install", "--no-audit", "--no-fund", "--fetch-retries=0", NODE_CLIENT, cwd=tmp_path)
    (tmp_path / "speech.mjs").write_text(NODE)

    (run_id, cost, data_url), refused = run("node", "speech.mjs", sandbox.root_url, API_KEY, tmp_path, cwd=tmp_path)

    charge = sandbox.ledger.charges[0]
    assert (run_id, float(cost)) == (charge.run_id, float(charge.amount))
    assert (tmp_path / "node").read_bytes() == sandbox.audio_bytes(run_id)
    assert data_url.startswith("data:audio/mpeg;base64,")
    assert "Content rejected by provider" in refused
    assert len(sandbox.ledger.refunds) == 1
