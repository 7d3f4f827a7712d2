"""The flows as deployments: `prefect-nanogpt serve` runs them here, `deploy` gives them to workers."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas import FlowRun
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, FlowRunFilter
from prefect.client.schemas.objects import StateType, WorkPool
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from prefect_nanogpt.credentials import NanoGPTCredentials, find_credentials
from prefect_nanogpt.errors import CredentialsError, NanoGPTError, without_login
from prefect_nanogpt.flows import collect_open_tickets, text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.flows.forms import offering
from prefect_nanogpt.folders import LISTEN_URL
from prefect_nanogpt.folders import PORT as LISTEN_PORT
from prefect_nanogpt.shell import (
    NO_KEY,
    PREFECT_FAILED,
    Port,
    UsageError,
    Words,
    api_url,
    check_environment,
    check_port,
    console,
    free_port,
    prefect_failed,
    prefect_server,
    refuse_if_given,
    say_if_it_hums,
    stop,
)
from prefect_nanogpt.storage import absolute

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

__all__ = ["DEPLOYMENTS", "TAGS", "Deployment", "deploy", "serve"]


@dataclass(frozen=True)
class Deployment:
    """A flow as people find it in the UI; its name is that of the flow.

    Attributes:
        flow: The flow.
        description: What it is for.
        schedules: The schedules that it begins with.
    """

    flow: Flow[..., Any]
    description: str
    schedules: tuple[DeploymentScheduleCreate, ...] = ()

    @property
    def full_name(self) -> str:
        """Its name as commands take it."""
        return f"{self.flow.name}/{self.flow.name}"


TAGS: Final = ["nanogpt", "speech"]
DEPLOYMENTS: Final = (
    Deployment(
        wait_for_tts,
        "Wait for a NanoGPT text-to-speech job and save its audio. Paste the ticket as NanoGPT gave it.",
    ),
    Deployment(
        text_to_speech,
        "Turn text into speech with NanoGPT and save the audio, paying once however often the run is retried.",
    ),
    Deployment(
        text_to_speech_batch,
        "Turn many lines into speech, each into a file of its own; run again, it does only what is missing.",
    ),
    Deployment(
        collect_open_tickets,
        "Look once at each job whose run timed out, crashed or was cancelled, and settle it.",
        (
            DeploymentScheduleCreate(
                schedule=CronSchedule(cron="0 * * * *", timezone="UTC"), slug="hourly", active=False
            ),
        ),
    ),
)
"""The same as in prefect.yaml, which a checkout is deployed with."""

OURS: Final = "prefect_nanogpt.flows."
"""How the entrypoints begin of what `serve` and `deploy` have made. Those of a checkout are files."""
RENEWED: Final = {"name", "flow_name", "entrypoint", "version", "paused"}
"""What a deployment that is there already gets anew. All else of it may have been changed in the UI, and is kept."""
PAUSING_SECONDS: Final = 20.0
STOPPED: Final = "`prefect-nanogpt serve` was stopped while this run was under way."


@dataclass
class _Found:
    """What the server has, before anything is changed."""

    ours: dict[str, DeploymentResponse] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)  # and whose they are


def serve(*, port: Port = 4200, listen_port: Port = LISTEN_PORT) -> int:
    """Put all flows into the Prefect UI and run them here, without a worker, until Ctrl-C.

    Starts a Prefect server unless PREFECT_API_URL names one, the audio pages unless NANOGPT_LISTEN_URL does, and
    without an API key also the sandbox. Audio that is saved to a relative folder goes to the working directory.

    Args:
        port: The port of the server, if one is started; 0 for a free one.
        listen_port: The port of the audio pages, if they are started; 0 for a free one, with which links in reports
            last only until this stops.
    """
    from prefect_nanogpt.listening import listening
    from prefect_nanogpt.sandbox import Sandbox

    check_environment()
    with ExitStack() as stack:
        given = api_url()
        if not given:
            port = port or free_port()
            check_port(port)
        if not os.environ.get(LISTEN_URL):
            os.environ[LISTEN_URL] = stack.enter_context(listening(listen_port))
        if not given:
            console.print("Starting Prefect…")
            url = stack.enter_context(prefect_server(port))
            where = f"at {url}/deployments"
        else:
            where = f"on the server {without_login(given)}"
        try:
            asyncio.run(find_credentials())
        except CredentialsError as error:
            refuse_if_given(error)
            # The runs have processes of their own, which find the sandbox in the environment.
            say_if_it_hums(stack.enter_context(Sandbox()))
            console.print(NO_KEY)
        # Also where Prefect takes the working directory for one that is removed after a run.
        os.environ["NANOGPT_HOME"] = str(Path.cwd())
        served: list[UUID] = []
        try:
            stop.run(lambda: _serve(served, where))
        except (asyncio.CancelledError, *PREFECT_FAILED) as error:
            if stop.number is None:
                return prefect_failed(error)
            _say_what_is_left(served)
    return 0


async def _serve(served: list[UUID], where: str) -> None:
    models = await _known_models()
    async with get_client() as client:
        found = await _look(client, pool=None)
        for name in await _served_by_another(client, found.ours.values()):
            found.others[name] = "served by another process"
        _refuse_those_of_others(found)
        await NanoGPTCredentials.aregister_type_and_schema(client=client)
    from prefect.runner import Runner

    # Paused when it stops, or else runs of the schedules would pile up until the next time.
    runner = Runner(pause_on_shutdown=True)
    for deployment in DEPLOYMENTS:
        existing = found.ours.get(deployment.full_name)
        served.append(await runner.aadd_deployment(_runner_deployment(deployment, existing, models, paused=False)))
    console.print(f"The flows are {where}. Ctrl-C stops everything.", markup=False)
    console.print(f"Audio goes to {Path.cwd() / 'audio'}, unless `save_to` says otherwise.", markup=False)
    console.print(f"It can be heard at {without_login(os.environ[LISTEN_URL])}", markup=False)
    if hasattr(signal, "pthread_sigmask"):
        # The runs' processes inherit it from this thread. Ctrl-C in a terminal would reach them too, and then what
        # stops them below would be a second signal, which lets nothing finish.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGHUP])
    running = asyncio.create_task(runner.start())
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        if runner.started:
            console.print("Stopping. A run that is submitting has 25 seconds for its ticket; Ctrl-C again kills it.")
            # By itself the runner would kill the runs, and a submission in the air would be paid for and unknown.
            await runner.astop()
            # What it began ends with the pausing of the deployments, one after another.
            await asyncio.wait({running}, timeout=PAUSING_SECONDS)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        raise


def deploy(*, pool: Words, image: Words | None = None, save_to: Words | None = None) -> int:
    """Make the deployments of all flows on a work pool, for workers that have this package installed.

    Run again, it brings its own deployments up to date, and keeps what was changed on them in the UI.

    Args:
        pool: The name of the work pool.
        image: The image that the runs start in, with this package installed; for pools whose jobs have one.
        save_to: Where runs save their audio unless they are told: a folder, an fsspec URL or a block. It has to outlast
            the run. For a pool of processes a folder of this machine by default.
    """
    check_environment()
    url = api_url()
    if not url:
        raise UsageError(
            "PREFECT_API_URL is not set, and work pools are on a server. Start one with `prefect server start` and "
            "set the URL that it prints."
        )
    try:
        return stop.run(lambda: _deploy(pool, image, save_to))
    except (asyncio.CancelledError, *PREFECT_FAILED) as error:
        return prefect_failed(error) if stop.number is None else 128 + stop.number


async def _deploy(pool_name: str, image: str | None, save_to: str | None) -> int:
    async with get_client() as client:
        try:
            pool = await client.read_work_pool(pool_name)
        except ObjectNotFound:
            create = shlex.join(["prefect", "work-pool", "create", pool_name, "--type", "process"])
            raise UsageError(f"There is no work pool {pool_name!r}. To make one: {create}") from None
        _check_image(pool, image)
        place = _durable(pool, save_to)
        found = await _look(client, pool=pool_name)
        _refuse_those_of_others(found)
        await NanoGPTCredentials.aregister_type_and_schema(client=client)
    models = await _known_models()
    for deployment in DEPLOYMENTS:
        existing = found.ours.get(deployment.full_name)
        parameters = dict(existing.parameters) if existing else {}
        if "save_to" in deployment.flow.parameters.properties and (save_to or "save_to" not in parameters):
            parameters["save_to"] = place
        variables = {**(existing.job_variables if existing else {}), **({"image": image} if image else {})}
        await _runner_deployment(
            deployment,
            existing,
            models,
            paused=existing.paused if existing else False,
            parameters=parameters,
            work_pool_name=pool_name,
            job_variables=variables,
        ).aapply()
        console.print(f"{'Updated' if existing else 'Made'} {deployment.full_name}", markup=False)
    console.print(
        f"Runs save to {place}, unless `save_to` says otherwise.\n"
        "They find the key in NANOGPT_API_KEY, in the environment of "
        f"{'the worker' if pool.type == 'process' else 'their container'}, or in the saved block "
        "nanogpt-credentials/default.\n"
        f"Next:\n{shlex.join(['prefect', 'worker', 'start', '--pool', pool_name])}\n"
        "prefect deployment run text-to-speech/text-to-speech --param text=Hello.",
        markup=False,
    )
    return 0


def _check_image(pool: WorkPool, image: str | None) -> None:
    takes_one = "image" in pool.base_job_template.get("variables", {}).get("properties", {})
    if takes_one and image is None:
        raise UsageError(
            f"The runs of the pool {pool.name!r} ({pool.type}) start in a container: give --image, the name of an "
            "image that has prefect-nanogpt installed."
        )
    if image is not None and not takes_one:
        raise UsageError(f"--image: the runs of the pool {pool.name!r} ({pool.type}) start in no image.")


def _durable(pool: WorkPool, save_to: str | None) -> str:
    """Give the place that outlasts the runs of a pool."""
    if save_to is not None and without_login(save_to) != save_to:
        raise UsageError(
            "--save-to: everybody who may see the deployment would see the password in it. Save a Remote File System "
            "block and give its name, or set the password in the environment of the runs."
        )
    if pool.type == "process":
        home = Path(os.environ.get("NANOGPT_HOME") or "nanogpt").expanduser()
        return absolute(save_to or get_current_settings().home / home / "audio")
    if save_to is None or absolute(save_to) != save_to:
        raise UsageError(
            f"The runs of the pool {pool.name!r} ({pool.type}) are on other machines, and what they save there goes "
            "with them, with the record of what is paid for. Give --save-to: a URL such as s3://bucket/speech, a block "
            "as remote-file-system/NAME, or the absolute path of a mounted volume."
        )
    return save_to


async def _known_models() -> list[str]:
    """Read the models that forms name as known; none where the catalogue cannot be read, which fails nothing."""
    try:
        async with (await find_credentials()).get_client() as client:
            return [model.id for model in await client.list_models() if model.kind == "speech"]
    except CredentialsError:
        why = "there is no key to ask NanoGPT with"
    except NanoGPTError as error:
        why = f"NanoGPT's catalogue cannot be read ({error})"
    console.print(f"The forms name the documented models, because {why}.", markup=False)
    return []


def _runner_deployment(
    deployment: Deployment,
    existing: DeploymentResponse | None,
    models: Sequence[str],
    *,
    paused: bool,
    **of_a_pool: Any,
) -> RunnerDeployment:
    """Give a deployment as Prefect applies it: whole where it is new, else with no more than has to be renewed."""
    from prefect.deployments.runner import RunnerDeployment

    made = RunnerDeployment.from_flow(
        offering(deployment.flow, models),
        deployment.flow.name,
        paused=paused,
        description=deployment.description,
        tags=TAGS,
        schedules=None if existing else list(deployment.schedules),
        entrypoint_type=EntrypointType.MODULE_PATH,
        **of_a_pool,
    )
    if existing is not None:
        # Prefect leaves alone what is not set. An empty list of schedules, for one, would remove those of the UI.
        made.model_fields_set.intersection_update(RENEWED | of_a_pool.keys())
    return made


async def _look(client: PrefectClient, pool: str | None) -> _Found:
    """Find out whose the deployments are that have the names of ours: of this pool, or else of `serve`."""
    found = _Found()
    for name in (deployment.full_name for deployment in DEPLOYMENTS):
        try:
            existing = await client.read_deployment_by_name(name)
        except ObjectNotFound:
            continue
        if not (existing.entrypoint or "").startswith(OURS):
            found.others[name] = f"made otherwise, with the entrypoint {existing.entrypoint}"
        elif existing.work_pool_name != pool:
            whose = existing.work_pool_name
            found.others[name] = f"of the work pool {whose}" if whose else "of `prefect-nanogpt serve`"
        else:
            found.ours[name] = existing
    return found


async def _served_by_another(client: PrefectClient, existing: Iterable[DeploymentResponse]) -> list[str]:
    """List the deployments that another process asks for runs at this moment.

    One that was stopped has paused them. After one that was killed Prefect takes them for served for another minute, so
    whether somebody asks is waited for.
    """
    asked = {
        deployment.id: deployment for deployment in existing if deployment.status == "READY" and not deployment.paused
    }
    if not asked:
        return []
    console.print("Looking whether another process serves the flows…")
    await asyncio.sleep(2 * get_current_settings().runner.poll_frequency)
    now = await client.read_deployments(deployment_filter=DeploymentFilter(id={"any_": list(asked)}))
    return [f"{later.name}/{later.name}" for later in now if later.last_polled != asked[later.id].last_polled]


def _refuse_those_of_others(found: _Found) -> None:
    if found.others:
        listed = "\n".join(f"  {name}, {whose}" for name, whose in found.others.items())
        raise NanoGPTError(
            f"the server has deployments of these names already, which are not this command's:\n{listed}\n"
            "Nothing was changed. Use them as they are; or remove them (`prefect deployment delete NAME`) and run this "
            "again; or use a server with a database of its own (another PREFECT_HOME, or another PREFECT_API_URL).",
            code="DEPLOYMENTS_OF_OTHERS",
        )


def _say_what_is_left(served: Sequence[UUID]) -> None:
    """Say which runs were under way, and end those that had no time to say so themselves."""
    try:
        runs = asyncio.run(_left(served, stop.at)) if served and stop.at else []
    except PREFECT_FAILED:
        return  # the server is gone, or was stopped too
    if runs:
        listed = "\n".join(f"  {run.name}" for run in runs)
        console.print(
            f"Under way when this was stopped:\n{listed}\n"
            "What they submitted is paid for, and noted beside the audio. To go on, start `prefect-nanogpt serve` "
            "again and press Retry on the run's page, or let collect-open-tickets fetch what is finished.",
            markup=False,
        )


async def _left(served: Sequence[UUID], since: datetime) -> list[FlowRun]:
    open_states = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
    async with get_client() as client:
        runs = await client.read_flow_runs(
            deployment_filter=DeploymentFilter(id={"any_": list(served)}),
            flow_run_filter=FlowRunFilter(
                state={"type": {"any_": [*open_states, StateType.CRASHED, StateType.CANCELLED, StateType.FAILED]}},
            ),
        )
        left = [run for run in runs if run.state_type in open_states or (run.end_time and run.end_time >= since)]
        for run in left:
            if run.state_type in open_states:  # its process is gone, and nobody else would say so
                await client.set_flow_run_state(run.id, Crashed(message=STOPPED), force=True)
    return left
