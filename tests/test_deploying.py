"""`prefect-nanogpt serve` and `deploy`: without a checkout, in an empty folder, on servers of their own."""

import http.server
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from prefect_nanogpt.sandbox import Accept, Sandbox
from tests.conftest import API_KEY, call_prefect, free_port, wait_for, wait_for_server
from tests.test_installed import COMMAND, Installation, installed

__all__ = ["installed"]

pytestmark = pytest.mark.xdist_group("installed")

NAMES = ["collect-open-tickets", "text-to-speech", "text-to-speech-batch", "wait-for-tts"]
PREFECT_YAML = Path(__file__).parent.parent / "prefect.yaml"


@dataclass
class Machine:
    """An empty folder, an empty home, and a server that somebody runs there.

    Attributes:
        installed: Where the package is installed from its wheel.
        home: The folder.
        url: The server's.
    """

    installed: Installation
    home: Path
    url: str = ""

    def environment(self, **more: str) -> dict[str, str]:
        clean = {name: value for name, value in self.installed.environment().items() if name != "PREFECT_API_URL"}
        server = {"PREFECT_API_URL": f"{self.url}/api"} if self.url else {}
        quick = {"PREFECT_RUNNER_POLL_FREQUENCY": "1", "PREFECT_WORKER_QUERY_SECONDS": "1"}
        return {**clean, **server, **quick, "PREFECT_HOME": str(self.home / "prefect"), **more}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.installed.python, "-m", *arguments],
            cwd=self.home,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=180,
        )

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.run(COMMAND, *arguments, **environment)

    def api(self, method: str, path: str, body: Any = None) -> Any:
        return call_prefect(self.url, method, path, body)

    def deployment(self, name: str) -> dict[str, Any]:
        return dict(self.api("GET", f"/deployments/name/{name}/{name}"))

    def model_in_form(self, name: str) -> str:
        """What the form says of the model."""
        return str(self.deployment(name)["parameter_openapi_schema"]["properties"]["model"]["description"])

    def names(self) -> list[str]:
        return sorted(deployment["name"] for deployment in self.api("POST", "/deployments/filter", {}))

    def start(self, name: str, /, **parameters: Any) -> str:
        path = f"/deployments/{self.deployment(name)['id']}/create_flow_run"
        return str(self.api("POST", path, {"parameters": parameters})["id"])

    def state(self, run: str) -> str:
        return str(self.api("GET", f"/flow_runs/{run}")["state_name"])

    @contextmanager
    def process(self, *arguments: str, log_to: str = "log", **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run something in a process group of its own, as a terminal does."""
        with (self.home / log_to).open("w") as log:
            process = subprocess.Popen(
                [self.installed.python, "-m", *arguments],
                cwd=self.home,
                env=self.environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)

    @property
    def log(self) -> str:
        return (self.home / "log").read_text()

    @contextmanager
    def serving(self, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        with self.process(COMMAND, "serve", "--listen-port", "0", *arguments, **environment) as process:
            wait_for(lambda: "Audio goes to" in self.log or process.poll() is not None)
            assert process.poll() is None, self.log
            yield process

    def press_ctrl_c(self, process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(90) == 0, self.log


@pytest.fixture
def empty(installed: Installation, tmp_path: Path) -> Machine:
    """A machine on which nothing has been started."""
    return Machine(installed, tmp_path)


@pytest.fixture
def machine(empty: Machine) -> Iterator[Machine]:
    """A machine with a server."""
    port = free_port()
    with empty.process("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), log_to="server"):
        empty.url = f"http://127.0.0.1:{port}"
        wait_for_server(f"{empty.url}/api/health")
        yield empty


@pytest.fixture
def key(sandbox: Sandbox) -> dict[str, str]:
    return {"NANOGPT_API_KEY": API_KEY, "NANOGPT_BASE_URL": sandbox.base_url}


# What the deployments are


def test_the_deployments_are_those_of_prefect_yaml() -> None:
    from prefect_nanogpt.deploying import DEPLOYMENTS, TAGS

    said = {deployment["name"]: deployment for deployment in yaml.safe_load(PREFECT_YAML.read_text())["deployments"]}
    assert sorted(said) == sorted(deployment.flow.name for deployment in DEPLOYMENTS) == NAMES
    for deployment in DEPLOYMENTS:
        there = said[deployment.flow.name]
        assert there["entrypoint"].endswith(f":{deployment.flow.fn.__name__}")
        assert (there["description"], there["tags"]) == (deployment.description, TAGS)
        schedules = [
            {"cron": schedule.schedule.cron, "timezone": schedule.schedule.timezone, "slug": schedule.slug}
            | {"active": schedule.active}
            for schedule in deployment.schedules
        ]
        assert there.get("schedules", []) == schedules


# serve


def test_serve_in_an_empty_folder_starts_a_server_and_saves_into_that_folder(empty: Machine) -> None:
    with empty.serving("--port", "0") as process:
        found = re.search(r"The flows are at (http://127\.0\.0\.1:\d+)/deployments", empty.log)
        assert found is not None
        empty.url = found[1]
        assert empty.names() == NAMES
        [hourly] = empty.deployment("collect-open-tickets")["schedules"]
        assert (hourly["schedule"]["cron"], hourly["slug"], hourly["active"]) == ("0 * * * *", "hourly", False)
        assert empty.deployment("text-to-speech")["entrypoint"] == "prefect_nanogpt.flows.generate.text_to_speech"
        block_types = [found["slug"] for found in empty.api("POST", "/block_types/filter", {})]
        assert "nanogpt-credentials" in block_types

        run = empty.start("text-to-speech", text="Said without a key.", name="said")
        wait_for(lambda: empty.state(run) == "Completed")
        empty.press_ctrl_c(process)
    assert (empty.home / "audio" / "said.mp3").stat().st_size > 1_000
    assert f"Audio goes to {empty.home / 'audio'}" in empty.log
    assert "https://nano-gpt.com/api" in empty.log
    assert "Under way" not in empty.log


def test_what_was_changed_in_the_ui_outlasts_the_next_serve(machine: Machine, key: dict[str, str]) -> None:
    with machine.serving(**key) as process:
        speech, collect = machine.deployment("text-to-speech"), machine.deployment("collect-open-tickets")
        for name in ("text-to-speech", "text-to-speech-batch"):
            assert "microsoft/vibevoice" in machine.model_in_form(name)
            assert "Music" not in machine.model_in_form(name)
            assert "others can be typed" in machine.model_in_form(name)
        mine = {"parameters": {"voice": "Rachel"}, "tags": ["mine"], "description": "Mine.", "concurrency_limit": 2}
        machine.api("PATCH", f"/deployments/{speech['id']}", mine)
        daily = {"schedule": {"cron": "0 8 * * *", "timezone": "UTC"}, "active": True}
        machine.api("POST", f"/deployments/{speech['id']}/schedules", [daily])
        hourly = f"/deployments/{collect['id']}/schedules/{collect['schedules'][0]['id']}"
        machine.api("PATCH", hourly, {"active": True})
        changed = [machine.deployment(name) for name in NAMES]
        machine.press_ctrl_c(process)
    assert all(machine.deployment(name)["paused"] for name in NAMES)

    with machine.serving(**key):
        kept = [machine.deployment(name) for name in NAMES]
    for before, after in zip(changed, kept, strict=True):
        for field in ("id", "parameters", "tags", "description", "paused", "parameter_openapi_schema"):
            assert after[field] == before[field]
        assert after["global_concurrency_limit"] == before["global_concurrency_limit"]
        assert [(schedule["schedule"], schedule["active"]) for schedule in after["schedules"]] == [
            (schedule["schedule"], schedule["active"]) for schedule in before["schedules"]
        ]
    assert kept[1]["global_concurrency_limit"]["limit"] == 2
    assert [schedule["active"] for schedule in kept[0]["schedules"] + kept[1]["schedules"]] == [True, True]


def test_serve_leaves_alone_what_another_serve_has_and_takes_over_from_one_that_was_killed(
    machine: Machine, key: dict[str, str]
) -> None:
    with machine.serving(**key) as process:
        wait_for(lambda: machine.deployment("wait-for-tts")["status"] == "READY")
        second = machine.command("serve", "--listen-port", "0", **key)
        assert second.returncode == 1
        assert second.stderr.count("served by another process") == len(NAMES)
        assert not machine.deployment("text-to-speech")["paused"]
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
    with machine.serving(**key):
        assert machine.names() == NAMES


def test_ctrl_c_gives_a_submission_in_the_air_the_time_for_its_ticket_and_names_its_run(
    machine: Machine, sandbox: Sandbox, key: dict[str, str]
) -> None:
    sandbox.on_submit([Accept(delay=3)])
    with machine.serving(**key) as process:
        run = machine.start("text-to-speech", text="In the air.", name="said")
        sandbox.wait_for_request("submit", timeout=90)
        machine.press_ctrl_c(process)
        name = machine.api("GET", f"/flow_runs/{run}")["name"]
        assert f"Under way when this was stopped:\n  {name}\n" in machine.log
        assert machine.state(run) in ("Cancelled", "Crashed")

    with machine.serving(**key):
        # As Retry on the run's page does.
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
        machine.api("POST", f"/flow_runs/{run}/set_state", {"state": state, "force": True})
        wait_for(lambda: machine.state(run) == "Completed")
    assert (machine.home / "audio" / "said.mp3").exists()
    assert len(sandbox.requests("submit")) == 1


# The port


class Quiet(http.server.BaseHTTPRequestHandler):
    server_version = "Neighbour/1.0"

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


def test_a_port_that_is_taken_is_said_with_who_has_it_and_nothing_is_changed(
    machine: Machine, key: dict[str, str]
) -> None:
    there = httpx.get(f"{machine.url}/api/admin/version").json()
    port = machine.url.rpartition(":")[2]
    taken = machine.command("serve", "--listen-port", "0", "--port", port, PREFECT_API_URL="", **key)
    assert taken.returncode == 1
    assert f"port {port} is taken, by a Prefect server ({there})" in taken.stderr
    assert f"PREFECT_API_URL={machine.url}/api prefect-nanogpt serve" in taken.stderr
    assert "serve --port 0" in taken.stderr
    assert machine.names() == []


@pytest.mark.parametrize("what", ["an HTTP server (Neighbour/1.0", "another program"])
def test_a_port_that_something_else_has_is_said_too(what: str, empty: Machine, key: dict[str, str]) -> None:
    if what == "another program":
        other = socket.create_server(("127.0.0.1", 0))
        with closing(other):
            taken = empty.command("serve", "--listen-port", "0", "--port", str(other.getsockname()[1]), **key)
    else:
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            taken = empty.command("serve", "--listen-port", "0", "--port", str(server.server_port), **key)
            server.shutdown()
    assert taken.returncode == 1
    assert f"is taken, by {what}" in taken.stderr
    assert "serve --port 0" in taken.stderr
    assert "Traceback" not in taken.stderr


# deploy


@pytest.fixture
def pools(machine: Machine) -> Machine:
    for name, kind in (("nanogpt", "process"), ("boxes", "docker")):
        assert machine.run("prefect", "work-pool", "create", name, "--type", kind).returncode == 0
    return machine


def test_a_worker_runs_what_was_deployed_without_a_checkout(
    pools: Machine, sandbox: Sandbox, key: dict[str, str]
) -> None:
    deployed = pools.command("deploy", "--pool", "nanogpt")
    assert deployed.returncode == 0, deployed.stderr
    assert "prefect worker start --pool nanogpt" in deployed.stderr.splitlines()
    assert "The forms name the documented models, because there is no key to ask NanoGPT with." in deployed.stderr
    assert "Qwen-3-TTS-1.7B" in pools.model_in_form("text-to-speech")
    place = pools.home / "prefect" / "nanogpt" / "audio"
    assert pools.deployment("text-to-speech")["parameters"] == {"save_to": str(place)}
    assert pools.deployment("collect-open-tickets")["parameters"] == {}

    with pools.process("prefect", "worker", "start", "--pool", "nanogpt", **key):
        run = pools.start("text-to-speech", text="From a wheel.")
        wait_for(lambda: pools.state(run) == "Completed")
    [charge] = sandbox.ledger.charges
    assert (place / f"{charge.run_id}.mp3").read_bytes() == sandbox.audio_bytes(charge.run_id)


def test_deploying_again_keeps_what_was_changed_and_serve_leaves_it_alone(pools: Machine, key: dict[str, str]) -> None:
    first = pools.command("deploy", "--pool", "boxes", "--image", "speech:1", "--save-to", "s3://bucket/speech")
    assert first.returncode == 0, first.stderr
    speech = pools.deployment("text-to-speech")
    daily = {"schedule": {"cron": "0 8 * * *", "timezone": "UTC"}, "active": True}
    pools.api("POST", f"/deployments/{speech['id']}/schedules", [daily])
    changed = {
        "parameters": {**speech["parameters"], "voice": "Rachel"},
        "job_variables": {"image": "speech:1", "network_mode": "host"},
        "paused": True,
    }
    pools.api("PATCH", f"/deployments/{speech['id']}", changed)

    again = pools.command("deploy", "--pool", "boxes", "--image", "speech:2", "--save-to", "/mnt/speech")
    assert again.returncode == 0, again.stderr
    after = pools.deployment("text-to-speech")
    assert after["parameters"] == {"voice": "Rachel", "save_to": "/mnt/speech"}
    assert after["job_variables"] == {"image": "speech:2", "network_mode": "host"}
    assert (after["id"], after["paused"], after["work_pool_name"]) == (speech["id"], True, "boxes")
    assert [schedule["schedule"]["cron"] for schedule in after["schedules"]] == ["0 8 * * *"]

    for command in (["serve"], ["deploy", "--pool", "nanogpt"]):
        refused = pools.command(*command, **key)
        assert refused.returncode == 1
        assert refused.stderr.count("of the work pool boxes") == len(NAMES)
    assert pools.deployment("text-to-speech") == after


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pool", "none"], "prefect work-pool create none --type process"),
        (["--pool", "boxes"], "give --image"),
        (["--pool", "boxes", "--image", "speech:1"], "Give --save-to"),
        (["--pool", "boxes", "--image", "speech:1", "--save-to", "audio"], "Give --save-to"),
        (["--pool", "boxes", "--image", "speech:1", "--save-to", "ftp://me:mistyped@host/x"], "would see the password"),
        (["--pool", "nanogpt", "--image", "speech:1"], "start in no image"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_deployed_is_said_with_what_to_do(arguments: list[str], words: str, pools: Machine) -> None:
    done = pools.command("deploy", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
    assert "mistyped" not in done.stderr
    assert pools.names() == []


def test_deploy_without_a_server_says_that_it_needs_one(empty: Machine) -> None:
    done = empty.command("deploy", "--pool", "nanogpt")
    assert done.returncode == 2
    assert "prefect server start" in done.stderr
