"""What others can hear of a job: events for automations, and the log of the run."""

from __future__ import annotations

import logging
import shlex
from typing import Any, Final, Literal

from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from pydantic import BaseModel, ConfigDict

from prefect_nanogpt.errors import without_login
from prefect_nanogpt.models import Ticket

__all__ = ["RunReference", "announce", "resume_command", "run_logger", "this_run"]

LOGGER_NAME: Final = "prefect.nanogpt"
LOGIN_LEFT_OUT: Final = "with the user and the password put back into the URL"


class RunReference(BaseModel):
    """The flow run that did something, for people who come across a note of it.

    Attributes:
        id: The id of the flow run; None outside of one.
        name: Its name.
    """

    model_config = ConfigDict(frozen=True)

    id: str | None = None
    name: str | None = None


def this_run() -> RunReference:
    """Give the flow run that this is a part of."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return RunReference()
    return RunReference(id=str(context.flow_run.id), name=context.flow_run.name)


def announce(
    what: Literal["submitted", "completed", "rejected", "timed-out"],
    job: str,
    model: str,
    ticket: Ticket | None,
    **details: Any,
) -> None:
    """Emit the event `nanogpt.tts.<what>` about a job, for automations. Neither the text nor the key is in it.

    Prefect adds the flow run, the task run, the deployment and their tags as related resources.

    Args:
        what: What has happened.
        job: The job's digest in the ledger, which stands for a job without a run id.
        model: The model.
        ticket: The ticket; None for a model that answers at once.
        details: What else to tell.
    """
    run_id = ticket.run_id if ticket else job
    payload = {"run_id": ticket and run_id, "job": job, "model": model, **details}
    if ticket is not None:
        payload |= {"currency": ticket.payment_source}
        if ticket.cost is not None:
            payload |= {"cost": f"{ticket.cost:f}"}
    try:
        emit_event(
            event=f"nanogpt.tts.{what}",
            resource={
                "prefect.resource.id": f"nanogpt.tts.{run_id}",
                "prefect.resource.name": run_id,
                "nanogpt.model": model,
            },
            payload={name: value for name, value in payload.items() if value is not None},
        )
    except Exception as error:  # nobody's job ends because nobody can be told of it
        run_logger().warning("The event nanogpt.tts.%s could not be emitted: %s", what, error)


def run_logger() -> logging.Logger | logging.LoggerAdapter[Any]:
    """Give the log of the task run or flow run, or outside of one a log of the process."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(LOGGER_NAME)


def resume_command(ticket: Ticket, save_to: str) -> str:
    """Write the shell command that waits for a ticket again, without the login that a URL may have."""
    shown = without_login(save_to)
    options = {"model": ticket.model, "payment-source": ticket.payment_source, "save-to": shown}
    if ticket.cost is not None:
        options["cost"] = f"{ticket.cost:f}"
    words = []
    for name in ("model", "cost", "payment-source", "save-to"):
        if value := options.get(name):
            # What begins with a dash is taken for an option, unless it says that it is not.
            words += [f"--{name}={value}"] if value.startswith("-") else [f"--{name}", value]
    is_like_an_option = ticket.run_id.startswith("-")
    words = [*words, "--", ticket.run_id] if is_like_an_option else [ticket.run_id, *words]
    command = shlex.join(["prefect-nanogpt", "wait", *words])
    return command if shown == save_to else f"{command}  # {LOGIN_LEFT_OUT}"
