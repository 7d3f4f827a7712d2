"""Opening the ledger of a folder, and telling Prefect where it is, so that `collect_open_tickets` finds it."""

import hashlib
import socket
from os import PathLike
from typing import Final

from prefect.client.orchestration import get_client
from pydantic import BaseModel, ConfigDict

from prefect_nanogpt.credentials import NanoGPTCredentials, places_of
from prefect_nanogpt.events import run_logger, this_run
from prefect_nanogpt.folders import register
from prefect_nanogpt.ledger import Ledger
from prefect_nanogpt.storage import Destination

__all__ = ["LABEL", "LedgerLabel", "open_ledger"]

LABEL: Final = "nanogpt.ledger."
"""A flow run has a label that begins so for each ledger it uses."""


class LedgerLabel(BaseModel):
    """Where a run's ledger is.

    Attributes:
        place: The folder or URL.
        machine: The machine that it was used on.
        ledger: What tells the ledger from others at a place of that name; None where it could not be written.
    """

    model_config = ConfigDict(frozen=True)

    place: str
    machine: str | None = None
    ledger: str | None = None


_told: set[tuple[str | None, str]] = set()


async def open_ledger(save_to: str | PathLike[str], credentials: NanoGPTCredentials | str | None) -> tuple[Ledger, str]:
    """Open the ledger of a folder that can be used, and give with it the base URL of the API that would be asked.

    Raises:
        StorageError: It cannot.
    """
    destination = Destination(save_to)
    await destination.run(destination.check)
    if destination.is_local:
        register(destination.root)
    provider, elsewhere, destination.public_url = await places_of(credentials)
    ledger = Ledger.of(destination, elsewhere)
    if not ledger.is_beside_audio:  # else its first note proves it
        await destination.run(destination.prove)
    for warning in await ledger.run(ledger.warnings):
        run_logger().warning(warning)
    await _tell(ledger)
    return ledger, provider


async def _tell(ledger: Ledger) -> None:
    """Label the flow run with the place of the ledger; it is only for finding what is left open."""
    run = this_run()
    if run.id is None or (run.id, ledger.place) in _told:
        return
    identity = await ledger.run(ledger.identity, create=True)
    place = LedgerLabel(place=ledger.place, machine=socket.gethostname(), ledger=identity).model_dump_json()
    key = LABEL + hashlib.sha256(place.encode()).hexdigest()[:8]
    try:
        async with get_client() as client:
            await client.update_flow_run_labels(run.id, {key: place})  # type: ignore[arg-type]
    except Exception as error:
        run_logger().warning("Prefect could not be told where the ledger is, for collect-open-tickets: %s", error)
    else:
        _told.add((run.id, ledger.place))
