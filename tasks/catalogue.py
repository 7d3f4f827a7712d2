"""What the provider offers, and what is left of the money, as tasks."""

from collections.abc import Collection
from typing import Any, Final

from prefect import task
from prefect.cache_policies import NO_CACHE

from prefect_nanogpt.catalogue import doubts_about
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import NanoGPTCredentials, nanogpt_client
from prefect_nanogpt.errors import NanoGPTError
from prefect_nanogpt.events import run_logger
from prefect_nanogpt.models import AudioModel, Balance, TTSRequest
from prefect_nanogpt.tasks.retries import JITTER, may_help

__all__ = ["check_names", "get_balance", "list_models", "list_voices"]

NOT_IN_CATALOGUE: Final = "NOT_IN_CATALOGUE"
RETRIED: Final[dict[str, Any]] = {
    "retries": 3,
    "retry_delay_seconds": [1, 4, 15],
    "retry_jitter_factor": JITTER,
    "retry_condition_fn": may_help,
    "cache_policy": NO_CACHE,
    "persist_result": False,
}


@task(name="list-models", task_run_name="list models", description="Read NanoGPT's catalogue of models.", **RETRIED)
async def list_models(credentials: NanoGPTCredentials | str | None = None) -> list[AudioModel]:
    """Read the provider's catalogue of audio models: ids, prices, longest texts, voices. Free of charge.

    It also has models that are no speech; `AudioModel.kind` tells them apart. A process reads it at most every five
    minutes, since models and prices change.

    Args:
        credentials: The credentials, or the name of their block; None for the environment, or else the block `default`.

    Returns:
        The models in the provider's order, each once. What the catalogue does not say of one, or says oddly, is None
        or empty.

    Raises:
        ProviderError: The catalogue could not be read.
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.tasks import list_models

        @flow
        async def cheapest() -> str:
            models = [model for model in await list_models() if model.kind == "speech"]
            priced = [model for model in models if model.price("Hello!") is not None]
            return min(priced, key=lambda model: model.price("Hello!") or 0).id
        ```
    """
    async with nanogpt_client(credentials) as client:
        return await client.list_models()


@task(
    name="list-voices",
    task_run_name="list voices of {model}",
    description="Read the voices of a model from NanoGPT's catalogue.",
    **RETRIED,
)
async def list_voices(model: str, credentials: NanoGPTCredentials | str | None = None) -> list[str]:
    """List the voices that the provider's catalogue names for a model. Free of charge.

    Args:
        model: The model id.
        credentials: The credentials, or the name of their block; None for the environment, or else the block `default`.

    Returns:
        The names, as `voice` takes them; none where the catalogue names none. There may be more: voices that were
        cloned have ids of their own.

    Raises:
        ProviderError: The catalogue could not be read, or does not have the model (code `MODEL_NOT_FOUND`; the message
            has the nearest ids).
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from prefect import flow
        from prefect_nanogpt.tasks import list_voices

        @flow
        async def first_voice() -> str:
            return (await list_voices("Elevenlabs-Turbo-V2.5"))[0]
        ```
    """
    async with nanogpt_client(credentials) as client:
        return await client.list_voices(model)


@task(name="get-balance", task_run_name="get balance", description="Ask what is left on the account.", **RETRIED)
async def get_balance(credentials: NanoGPTCredentials | str | None = None) -> Balance:
    """Ask the provider what is left on the account. Free of charge.

    Args:
        credentials: The credentials, or the name of their block; None for the environment, or else the block `default`.

    Returns:
        The amounts in USD and XNO, exact; None for one that the provider does not say.

    Raises:
        ProviderError: The balance could not be read.
        CredentialsError: There is no usable API key.

    Example:
        ```python
        from decimal import Decimal

        from prefect import flow
        from prefect_nanogpt.tasks import get_balance

        @flow
        async def has_enough() -> bool:
            balance = await get_balance()
            return balance.usd is not None and balance.usd >= Decimal("5")
        ```
    """
    async with nanogpt_client(credentials) as client:
        return await client.get_balance()


async def check_names(requests: Collection[TTSRequest], client: NanoGPTClient, *, strict: bool) -> None:
    """Warn of models, voices and containers that are doubtful, before anything is submitted.

    Where the catalogue cannot be read, that is said, and the run goes on without it.

    Raises:
        NanoGPTError: The catalogue does not have a model or a voice, and `strict` is set (code `NOT_IN_CATALOGUE`).
    """
    catalogue = None
    try:
        catalogue = await client.list_models()
    except NanoGPTError as error:
        run_logger().warning(
            "The catalogue cannot be read, so whether it has the models and voices is not known: %s", error
        )
    doubts = doubts_about(requests, catalogue)
    if doubts.names and strict:
        raise NanoGPTError(f"{' '.join(doubts.names)} Nothing was submitted.", code=NOT_IN_CATALOGUE)
    for doubt in [*doubts.names, *doubts.formats]:
        run_logger().warning(doubt)
