"""The API key: where it is kept, where it is looked for, and the client that carries it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import ClassVar, Final, NamedTuple

import httpx
from prefect.blocks.abstract import CredentialsBlock
from pydantic import Field, HttpUrl, PrivateAttr, SecretStr, ValidationError, field_validator

from prefect_nanogpt.client import DEFAULT_BASE_URL, NanoGPTClient, split_login
from prefect_nanogpt.errors import CredentialsError
from prefect_nanogpt.events import run_logger

__all__ = ["NanoGPTCredentials", "find_credentials", "nanogpt_client", "provider_and_ledger"]

INVALID_CREDENTIALS: Final = "INVALID_CREDENTIALS"
"""Something was given, and it cannot be used: that is not the same as nothing."""


class NanoGPTCredentials(CredentialsBlock):
    """Holds a NanoGPT API key. Save one named `default` and every flow of this package finds it by itself.

    Attributes:
        api_key: The NanoGPT API key.
        base_url: The root of the API, for a proxy, NanoGPT's other host, or the sandbox.
        ledger: Where to keep the record of what is paid for, instead of beside the audio.

    Example:
        Load stored credentials and look at a job:

        ```python
        from prefect_nanogpt import NanoGPTCredentials
        from prefect_nanogpt.models import Ticket

        credentials = NanoGPTCredentials.load("BLOCK_NAME")
        async with credentials.get_client() as client:
            status = await client.status(Ticket(run_id="98b0d593", model="Elevenlabs-Turbo-V2.5"))
        ```
    """

    _block_type_name: ClassVar[str] = "NanoGPT Credentials"
    _block_type_slug: ClassVar[str] = "nanogpt-credentials"
    _logo_url: ClassVar[HttpUrl] = HttpUrl("https://nano-gpt.com/logo.png")
    _documentation_url: ClassVar[HttpUrl] = HttpUrl("https://docs.nano-gpt.com/api-reference/endpoint/tts")

    api_key: SecretStr = Field(
        title="API key",
        description="The NanoGPT API key, sent to the base URL and nowhere else.",
        examples=["sk-nano-..."],
    )
    base_url: str = Field(
        DEFAULT_BASE_URL,
        title="Base URL",
        description="The root of the API; change it for a proxy or the sandbox.",
        pattern=r"^https?://[^\s/?#]+\S*$",
    )
    ledger: str | None = Field(
        None,
        title="Ledger",
        description="A folder or URL for the record of what is paid for, where save_to is a temporary folder.",
    )

    _source: str | None = PrivateAttr(None)

    @field_validator("api_key")
    @classmethod
    def _is_not_blank(cls, api_key: SecretStr) -> SecretStr:
        if not api_key.get_secret_value().strip():
            raise ValueError("the API key is empty")
        return api_key

    def get_client(self) -> NanoGPTClient:
        """Make a client, to be closed by whoever asked for it (`async with`).

        Raises:
            CredentialsError: The key has characters that no key has.
        """
        return NanoGPTClient(self.api_key.get_secret_value(), self.base_url, key_source=self.source)

    @property
    def source(self) -> str:
        """Say where the key comes from."""
        if self._source is not None:
            return self._source
        name = self._block_document_name
        return f"the saved block nanogpt-credentials/{name}" if name else "the parameter `credentials`"


async def find_credentials() -> NanoGPTCredentials:
    """Find credentials where none were given: in the environment, else in the saved block `default`.

    Raises:
        CredentialsError: There are none (says both ways of giving them), or what there is cannot be used.
    """
    base_url = os.environ.get("NANOGPT_BASE_URL") or DEFAULT_BASE_URL
    if api_key := os.environ.get("NANOGPT_API_KEY", "").strip():
        try:
            found = NanoGPTCredentials(api_key=SecretStr(api_key), base_url=base_url)
        except ValidationError:
            raise CredentialsError(
                "What NANOGPT_BASE_URL is set to is not an http or https URL.", code=INVALID_CREDENTIALS
            ) from None
        found._source = "the environment variable NANOGPT_API_KEY"
        return found
    if base_url != DEFAULT_BASE_URL:
        # Whoever exported the sandbox's address must not be charged by the address of the block.
        raise CredentialsError(
            f"NANOGPT_BASE_URL is set to {_address(base_url)} and NANOGPT_API_KEY is not: set both, or neither to use "
            "the saved block. No request was made.",
            code=INVALID_CREDENTIALS,
        )
    try:
        block = await NanoGPTCredentials.aload("default")
    except ValidationError:
        raise CredentialsError(
            "The saved block nanogpt-credentials/default is not valid: save it anew.", code=INVALID_CREDENTIALS
        ) from None
    except ValueError:
        raise CredentialsError(
            "There is no NanoGPT API key: set NANOGPT_API_KEY in the environment of the process that runs the flow, or "
            "save a NanoGPT Credentials block named 'default' in Prefect. To try without a key, start the stand-in "
            "with `prefect-nanogpt sandbox`. No request was made."
        ) from None
    except httpx.HTTPError as error:
        raise CredentialsError(
            f"Whether Prefect has a block nanogpt-credentials/default cannot be told now: {error}",
            code=INVALID_CREDENTIALS,
            retryable=True,
        ) from None
    assert isinstance(block, NanoGPTCredentials)
    return block


class _Lent(NamedTuple):
    """The client that a flow run has open, the credentials that were asked for and those that it has."""

    client: NanoGPTClient
    asked: NanoGPTCredentials | None
    credentials: NanoGPTCredentials
    loop: asyncio.AbstractEventLoop


_open_client: ContextVar[_Lent | None] = ContextVar("nanogpt_client", default=None)


async def provider_and_ledger(credentials: NanoGPTCredentials | None) -> tuple[str, str | None]:
    """Give the base URL of the API that would be asked, and where its block wants the ledger, with a key or without.

    Raises:
        CredentialsError: There are credentials that cannot be used, or cannot be read now: that is not "none".
    """
    lent = _open_client.get()
    try:
        found = credentials or (lent.credentials if lent else await find_credentials())
    except CredentialsError as error:
        if error.code != CredentialsError.default_code:
            raise
        # What is there already needs no key.
        return _address(os.environ.get("NANOGPT_BASE_URL") or DEFAULT_BASE_URL), None
    return _address(found.base_url), found.ledger


def _address(base_url: str) -> str:
    """Give the address of an API as it is shown and noted: without a login, and of one that is no URL the host."""
    return split_login(base_url.rstrip("/"))[0] if "://" in base_url else base_url.rpartition("@")[2]


@asynccontextmanager
async def nanogpt_client(credentials: NanoGPTCredentials | None) -> AsyncIterator[NanoGPTClient]:
    """Lend the client that the flow run has open, or open one for this block.

    A flow opens one client and the tasks it calls share its connections; a task that is called on its own gets one
    for itself.

    Args:
        credentials: The credentials to use; None for those of the flow, or else those that `find_credentials` finds.

    Raises:
        CredentialsError: There is no usable key.
    """
    lent = _open_client.get()
    if lent is not None and credentials in (None, lent.asked) and lent.loop is asyncio.get_running_loop():
        yield lent.client
        return
    found = credentials or await find_credentials()
    async with found.get_client() as client:
        run_logger().info("Asking %s, with the key from %s.", client.base_url, found.source)
        token = _open_client.set(_Lent(client, credentials, found, asyncio.get_running_loop()))
        try:
            yield client
        finally:
            _open_client.reset(token)
