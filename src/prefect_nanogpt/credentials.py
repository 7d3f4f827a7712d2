"""The API key: where it is kept, where it is looked for, and the client that carries it."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any, ClassVar, Final, NamedTuple
from urllib.parse import quote
from uuid import UUID

import httpx
from prefect.blocks.abstract import CredentialsBlock
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext, TaskRunContext
from pydantic import (
    ConfigDict,
    Field,
    HttpUrl,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from prefect_nanogpt.client import (
    DEFAULT_BASE_URL,
    INVALID_CREDENTIALS,
    OTHER_BASE_URL,
    NanoGPTClient,
    problem_with_base_url,
)
from prefect_nanogpt.connections import AudioHosts, split_login
from prefect_nanogpt.errors import CredentialsError
from prefect_nanogpt.events import run_logger, this_run
from prefect_nanogpt.limits import SharedLimit
from prefect_nanogpt.models import plain_name
from prefect_nanogpt.storage import problem_with_public_url

__all__ = ["NanoGPTCredentials", "find_credentials", "nanogpt_client", "places_of"]


KEY_IN_CLEAR: Final = (
    "an API key in clear (in a dict, or as a text) is refused, because Prefect stores the parameters of a run as they "
    'are. Give the name of a saved block, "nanogpt-credentials/NAME"; in Python also a block, '
    'NanoGPTCredentials(api_key=...) or NanoGPTCredentials.load("NAME"); '
    "or leave `credentials` out and set NANOGPT_API_KEY. No request was made."
)
MASK: Final = "********"
ADVANCED: Final = "advanced"
"""The parameter in which forms have what is seldom set."""
BLOCK: Final = "nanogpt-credentials/"
LONGEST_NAME: Final = 40
"""Of a block that is named without its type, in characters."""
_BLOCK_NAME: Final = re.compile(r"[a-z0-9-]+")
# A part of a key is long and mixes letters and digits.
_NAME_PART: Final = re.compile(r"[a-z]{1,20}[0-9]{0,4}|[0-9]{1,6}|[a-z0-9]{1,4}")


def names_block(credentials: str) -> bool:
    """Whether a text names a saved block, and cannot well be a key.

    Example:
        >>> names_block("studio-2"), names_block("nanogpt-credentials/x9k2m4"), names_block("sk-nano-1")
        (True, True, False)
    """
    if credentials.startswith(BLOCK):
        name = credentials.removeprefix(BLOCK)
        return _BLOCK_NAME.fullmatch(name) is not None and not name.startswith("sk-")
    parts = credentials.split("-")
    is_short = len(credentials) <= LONGEST_NAME and parts[0] != "sk" and credentials[:1].isalpha()
    return is_short and all(map(_NAME_PART.fullmatch, parts))


WHERE_KEYS_ARE: Final = "https://nano-gpt.com/api"
"""The page on which NanoGPT has people make and manage their keys."""
NO_KEY: Final = (
    f"There is no NanoGPT API key. Make one at {WHERE_KEYS_ARE}, and set NANOGPT_API_KEY in the environment of the "
    "process that runs the flow, or save a NanoGPT Credentials block named 'default' in Prefect. To try without a key, "
    "start the stand-in with `prefect-nanogpt sandbox` and set what it prints; or in Python put the call into a block "
    "`with Sandbox():`, from prefect_nanogpt.sandbox. No request was made."
)


def has_key_in_clear(credentials: object) -> bool:
    """Whether something that was given as credentials is, or may be, a key that nothing masks.

    A dict is one unless all of it refers to a saved block, as Prefect's own parameters do: its names may be misspelt.
    A text is one unless it is like the name of a block.
    """
    if isinstance(credentials, Mapping):
        return set(credentials) != {"$ref"}
    if isinstance(credentials, str):
        return not names_block(credentials)
    return not (credentials is None or isinstance(credentials, NanoGPTCredentials))


def without_key(parameters: Mapping[str, Any], is_key: Callable[[object], bool] = has_key_in_clear) -> dict[str, Any]:
    """Mask in a run's parameters what was given as credentials and may be a key, also in the forms' *Advanced*."""
    masked = {**parameters}
    if is_key(given := parameters.get("credentials")):
        masked["credentials"] = dict.fromkeys(given, MASK) if isinstance(given, Mapping) else MASK
    if isinstance(advanced := parameters.get(ADVANCED), Mapping):
        masked[ADVANCED] = without_key(advanced, is_key)
    return masked | {name: MASK for name in masked if plain_name(name) == "apikey"}


class NanoGPTCredentials(CredentialsBlock):
    """Holds a NanoGPT API key. Save one named `default` and every flow of this package finds it by itself.

    Attributes:
        api_key: The NanoGPT API key.
        base_url: The root of the API, for a proxy, NanoGPT's other host, or the sandbox.
        ledger: Where to keep the record of what is paid for, instead of beside the audio.
        audio_hosts: The hosts that audio may be fetched from although their addresses are not public.
        public_url: The address at which people reach what is saved, with `{path}`, `{bucket}` or `{name}` in it.
        base_url_login: The login of the base URL, which is moved here if it was given in it.
        ledger_login: The login of the ledger's URL, likewise.

    Example:
        Load a block that was saved. Its name will do too, as `credentials="nanogpt-credentials/BLOCK_NAME"`.

        ```python
        from prefect_nanogpt import NanoGPTCredentials
        from prefect_nanogpt.sync import text_to_speech

        credentials = NanoGPTCredentials.load("BLOCK_NAME")
        assert isinstance(credentials, NanoGPTCredentials)  # for type checkers, since load can be awaited too
        audio = text_to_speech("Hello!", credentials=credentials)
        ```
    """

    _block_type_name: ClassVar[str] = "NanoGPT Credentials"
    _block_type_slug: ClassVar[str] = "nanogpt-credentials"
    _logo_url: ClassVar[HttpUrl] = HttpUrl("https://nano-gpt.com/logo.png")
    _documentation_url: ClassVar[HttpUrl] = HttpUrl("https://docs.nano-gpt.com/api-reference/endpoint/tts")

    # What cannot be validated is often a key in the wrong place.
    model_config = ConfigDict(hide_input_in_errors=True)

    api_key: SecretStr = Field(
        title="API key",
        description="The NanoGPT API key, sent to the base URL and nowhere else.",
        examples=["sk-nano-..."],
    )
    base_url: str = Field(
        default=DEFAULT_BASE_URL,
        title="Base URL",
        description="The root of the API; change it for NanoGPT's other host (https://api.nano-gpt.com/api, which it "
        "recommends for requests with a key), a proxy or the sandbox.",
        pattern=r"^https?://[^\s/?#]+\S*$",
    )
    audio_hosts: list[str] = Field(
        default_factory=list,
        title="Audio hosts",
        description="Hosts that audio may be fetched from although their addresses are not public: names such as "
        "*.audio.internal, addresses, or networks such as 198.18.0.0/15.",
    )
    ledger: str | None = Field(
        default=None,
        title="Ledger",
        description="A folder or URL for the record of what is paid for, where save_to is a temporary folder.",
    )
    public_url: str | None = Field(
        default=None,
        title="Public URL",
        description="Where people reach what is saved, for the links in reports, such as "
        "https://cdn.example.org/{path}. {path} is the path in the bucket, {bucket} the bucket, {name} the file.",
    )
    base_url_login: SecretStr | None = Field(
        default=None,
        title="Login of the base URL",
        description="user:password, as they are, for a proxy in front of the API. A login in the URL is moved here.",
    )
    ledger_login: SecretStr | None = Field(
        default=None,
        title="Login of the ledger",
        description="user:password, as they are, for the ledger's URL. A login in the URL is moved here.",
    )

    _source: str | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _keep_logins_apart(cls, given: Any) -> Any:
        # Prefect shows and logs all fields but the secret ones.
        if isinstance(given, Mapping):
            for field in ("base_url", "ledger"):
                url = given.get(field)
                if isinstance(url, str) and "::" not in url.partition("://")[0]:
                    address, login = split_login(url)
                    if login and login[1]:
                        given = {**given, field: address, f"{field}_login": SecretStr(":".join(login))}
        return given

    @field_validator("base_url")
    @classmethod
    def _is_an_address(cls, base_url: str) -> str:
        if problem := problem_with_base_url(base_url):
            raise ValueError(problem)
        return base_url

    @field_validator("public_url")
    @classmethod
    def _is_a_template(cls, public_url: str | None) -> str | None:
        if public_url and (problem := problem_with_public_url(public_url)):
            raise ValueError(problem)
        return public_url or None

    @field_validator("audio_hosts")
    @classmethod
    def _are_hosts(cls, audio_hosts: list[str]) -> list[str]:
        AudioHosts(audio_hosts)
        return audio_hosts

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
        return NanoGPTClient(
            self.api_key,
            with_login(self.base_url, self.base_url_login),
            key_source=self.source,
            audio_hosts=self.audio_hosts,
        )

    @property
    def source(self) -> str:
        """Say where the key comes from."""
        if self._source is not None:
            return self._source
        name = self._block_document_name
        return f"the saved block nanogpt-credentials/{name}" if name else "the parameter `credentials`"


def with_login(url: str, login: SecretStr | None) -> str:
    """Give a URL with a login that is kept apart from it put back, whatever characters it has."""
    if login is None:
        return url
    user, _, password = login.get_secret_value().partition(":")
    return url.replace("://", f"://{quote(user, safe='')}:{quote(password, safe='')}@", 1)


async def find_credentials() -> NanoGPTCredentials:
    """Find credentials where none were given: in the environment, else in the saved block `default`.

    Raises:
        CredentialsError: There are none (says both ways of giving them), or what there is cannot be used.
    """
    api_key = SecretStr(os.environ.get("NANOGPT_API_KEY", "").strip())  # so that no traceback shows it
    if api_key.get_secret_value():
        try:
            found = NanoGPTCredentials(api_key=api_key, base_url=os.environ.get("NANOGPT_BASE_URL") or DEFAULT_BASE_URL)
        except ValidationError:
            raise CredentialsError(
                "What NANOGPT_BASE_URL is set to is not an http or https URL.", code=INVALID_CREDENTIALS
            ) from None
        found._source = "the environment variable NANOGPT_API_KEY"
        return found
    address = _address(os.environ.get("NANOGPT_BASE_URL") or DEFAULT_BASE_URL)
    if address != DEFAULT_BASE_URL:
        # Whoever exported the sandbox's address must not be charged by the address of the block.
        raise CredentialsError(
            f"NANOGPT_BASE_URL is set to {address} and NANOGPT_API_KEY is not: set both, or neither to use the "
            f"saved block. Keys are made at {WHERE_KEYS_ARE}; to try without one, set what "
            "`prefect-nanogpt sandbox` prints. No request was made.",
            code=INVALID_CREDENTIALS,
        )
    try:
        block = await NanoGPTCredentials.aload("default")
    except ValidationError:
        raise CredentialsError(
            "The saved block nanogpt-credentials/default is not valid: save it anew.", code=INVALID_CREDENTIALS
        ) from None
    except ValueError:
        raise CredentialsError(NO_KEY) from None
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
    asked: NanoGPTCredentials | str | None
    credentials: NanoGPTCredentials
    loop: asyncio.AbstractEventLoop


_open_client: ContextVar[_Lent | None] = ContextVar("nanogpt_client", default=None)


class Places(NamedTuple):
    """The base URL of the API, where its block wants the ledger, and where it says that people reach what is saved.

    The provider is the same at both of its hosts: to change from one to the other must not make other jobs of all.
    """

    provider: str
    ledger: str | None = None
    public_url: str | None = None


async def places_of(credentials: NanoGPTCredentials | str | None) -> Places:
    """Give the places that the credentials name which would be used, with a key or without.

    Raises:
        CredentialsError: There are credentials that cannot be used, or cannot be read now: that is not "none".
    """
    lent = _open_client.get()
    try:
        found = lent.credentials if lent and credentials in (None, lent.asked) else await _saved_or_found(credentials)
    except CredentialsError as error:
        if error.code != CredentialsError.default_code:
            raise
        # What is there already needs no key.
        return Places(_provider_at(os.environ.get("NANOGPT_BASE_URL") or DEFAULT_BASE_URL))
    ledger = with_login(found.ledger, found.ledger_login) if found.ledger else None
    return Places(_provider_at(found.base_url), ledger, found.public_url)


def _address(base_url: str) -> str:
    """Give the address of an API as it is shown and noted: without a login, and of one that is no URL the host."""
    return split_login(base_url.rstrip("/"))[0] if "://" in base_url else base_url.rpartition("@")[2]


def _provider_at(base_url: str) -> str:
    address = _address(base_url)
    with suppress(httpx.InvalidURL, ValueError):
        parsed = httpx.URL(address)  # which writes the host small, and leaves the usual port out
        if f"{parsed.scheme}://{parsed.netloc.decode()}{parsed.path}" in (DEFAULT_BASE_URL, OTHER_BASE_URL):
            return DEFAULT_BASE_URL
    return address


async def _saved_or_found(credentials: NanoGPTCredentials | str | None) -> NanoGPTCredentials:
    """Give the credentials that were given, in the block of that name, or else those that `find_credentials` finds.

    Raises:
        CredentialsError: There are none, or they cannot be used, or cannot be read now.
    """
    if has_key_in_clear(credentials):
        raise CredentialsError(f"`credentials`: {KEY_IN_CLEAR}", code=INVALID_CREDENTIALS)
    if not isinstance(credentials, str):
        return credentials or await find_credentials()
    try:
        block = await NanoGPTCredentials.aload(credentials.removeprefix(BLOCK))
    except ValidationError:
        raise CredentialsError(
            f"The saved block {credentials} is not valid: save it anew. No request was made.", code=INVALID_CREDENTIALS
        ) from None
    except ValueError:
        # What is not the name of any block may be a key after all.
        is_shown = credentials.startswith(BLOCK) and names_block(credentials.removeprefix(BLOCK))
        if not is_shown:
            await _mask_what_is_stored(credentials)
        which = credentials if is_shown else f"{BLOCK}NAME with the NAME that was given"
        raise CredentialsError(
            f"`credentials`: there is no saved block {which}. Save a NanoGPT Credentials block of that name in "
            "Prefect, or leave `credentials` out and set NANOGPT_API_KEY. No request was made.",
            code=INVALID_CREDENTIALS,
        ) from None
    except httpx.HTTPError as error:
        raise CredentialsError(
            f"The block that `credentials` names cannot be read now: {error}", code=INVALID_CREDENTIALS, retryable=True
        ) from None
    assert isinstance(block, NanoGPTCredentials)
    return block


async def _mask_what_is_stored(credentials: str) -> None:
    """Take a text that is no block's name out of the parameters of this run, as Prefect has stored them."""
    run = this_run()
    if run.id is None:
        return
    with suppress(Exception):
        async with get_client() as client:
            stored = (await client.read_flow_run(UUID(run.id))).parameters
            if (masked := without_key(stored, lambda given: given == credentials)) != stored:
                await client.update_flow_run(UUID(run.id), parameters=masked)


@asynccontextmanager
async def nanogpt_client(credentials: NanoGPTCredentials | str | None) -> AsyncIterator[NanoGPTClient]:
    """Lend the client that the flow run has open, or open one for this block.

    A flow opens one client and the tasks it calls share its connections; a task that is called on its own gets one
    for itself.

    Args:
        credentials: The credentials to use, or the name of their block; None for those of the flow, or else those that
            `find_credentials` finds.

    Raises:
        CredentialsError: There is no usable key.
    """
    lent = _open_client.get()
    if lent is not None and credentials in (None, lent.asked) and lent.loop is asyncio.get_running_loop():
        yield lent.client
        return
    found = await _saved_or_found(credentials)
    async with found.get_client() as client, SharedLimit() as limit:
        if FlowRunContext.get() or TaskRunContext.get():  # outside of a run Prefect would start a server to be asked
            client.turns.take_slots = limit.take_slots
        run_logger().info("Asking %s, with the key from %s.", client.base_url, found.source)
        token = _open_client.set(_Lent(client, credentials, found, asyncio.get_running_loop()))
        try:
            yield client
        finally:
            _open_client.reset(token)
