"""The flows as deployments: `prefect-nanogpt serve`."""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack

from prefect import aserve
from prefect.deployments.runner import RunnerDeployment

from prefect_nanogpt.credentials import find_credentials
from prefect_nanogpt.errors import CredentialsError
from prefect_nanogpt.flows import collect_open_tickets, text_to_speech, text_to_speech_batch, wait_for_tts
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.shell import (
    NO_KEY,
    PREFECT_FAILED,
    Port,
    api_url,
    check_environment,
    console,
    free_port,
    prefect_failed,
    prefect_server,
    refuse_if_given,
    stop,
)

__all__ = ["serve"]


def serve(*, port: Port = 4200) -> int:
    """Put all flows into the Prefect UI and run them here, without a worker, until Ctrl-C.

    Starts a Prefect server unless PREFECT_API_URL names one, and without an API key also the sandbox.

    Args:
        port: The port of the server, if one is started; 0 for a free one.
    """
    check_environment()
    with ExitStack() as stack:
        if not api_url():
            console.print("Starting Prefect…")
            url = stack.enter_context(prefect_server(port or free_port()))
            console.print(f"The flows are at {url}/deployments. Ctrl-C stops everything.")
        try:
            asyncio.run(find_credentials())
        except CredentialsError as error:
            refuse_if_given(error)
            stand_in = stack.enter_context(Sandbox())
            # The runs have processes of their own, which find the sandbox there.
            os.environ.update(NANOGPT_API_KEY="sandbox", NANOGPT_BASE_URL=stand_in.base_url)
            console.print(NO_KEY)
        flows = (wait_for_tts, text_to_speech, text_to_speech_batch, collect_open_tickets)
        deployments = [RunnerDeployment.from_flow(flow, "local", tags=["nanogpt", "speech"]) for flow in flows]
        try:
            stop.run(lambda: aserve(*deployments, print_starting_message=False))
        except (asyncio.CancelledError, *PREFECT_FAILED) as error:
            if stop.number is None:
                return prefect_failed(error)
    return 0
