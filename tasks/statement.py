"""What was bought, told from ledgers, as a task."""

from collections.abc import Sequence
from os import PathLike

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_nanogpt.credentials import NanoGPTCredentials, places_of
from prefect_nanogpt.errors import StorageError
from prefect_nanogpt.ledger import Ledger
from prefect_nanogpt.statement import BoughtJob, statement_of

__all__ = ["read_ledger"]


@task(
    name="read-ledger",
    task_run_name="read ledger",
    description="Tell what was bought, what became of it, and what it cost.",
    cache_policy=NO_CACHE,
    persist_result=False,
)
async def read_ledger(
    folders: str | PathLike[str] | Sequence[str | PathLike[str]] = "audio",
    credentials: NanoGPTCredentials | str | None = None,
) -> list[BoughtJob]:
    """Tell what was bought: every job that money was, or may have been, spent on, and what can be done about it.

    It says what the notes say: nobody is asked, and no API key is needed. Whether the audio is still there is not
    looked at, and refunds are not known.

    Args:
        folders: A folder of audio, an fsspec URL such as `s3://bucket/speech` or a block as `remote-file-system/NAME`,
            or several of them. The ledger that `NANOGPT_LEDGER` or the credentials block names is read too.
        credentials: The credentials, or the name of their block, which say only where the ledger is.

    Returns:
        The jobs, the latest first, each charge in one of them only. `prefect_nanogpt.statement.totals_of` adds up what
        they have cost, by day, model and flow run.

    Raises:
        StorageError: A ledger is not there, or cannot be read, wholly or in part: the message says which.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.statement import totals_of
        from prefect_nanogpt.tasks import read_ledger

        @flow
        async def costs_of_each_day() -> dict[str, str]:
            jobs = await read_ledger(["audio/intros", "audio/lines"])
            return {total.name: str(total.costs) for total in totals_of(jobs) if total.by == "day"}
        ```
    """
    places = [folders] if isinstance(folders, str | PathLike) else list(folders)
    statement = await statement_of(places, Ledger.elsewhere((await places_of(credentials)).ledger))
    if statement.problems:
        raise StorageError(" ".join(statement.problems))
    return statement.jobs
