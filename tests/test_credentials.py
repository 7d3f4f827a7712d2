"""The block that holds the API key, as Prefect's server and its tools see it."""

import asyncio
import json
from collections.abc import AsyncIterator
from importlib.metadata import entry_points
from typing import Any

import pytest
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.testing.standard_test_suites import BlockStandardTestSuite
from pydantic import SecretStr, ValidationError

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.client import DEFAULT_BASE_URL
from prefect_nanogpt.credentials import find_credentials, nanogpt_client
from prefect_nanogpt.errors import CredentialsError, ProviderError
from prefect_nanogpt.models import Ticket
from prefect_nanogpt.sandbox import Answer, Sandbox
from tests.conftest import API_KEY


@pytest.fixture
def block() -> NanoGPTCredentials:
    return NanoGPTCredentials(api_key=SecretStr(API_KEY))


@pytest.fixture
async def saved_block() -> AsyncIterator[str]:
    """The name of a saved block, gone after the test."""
    await NanoGPTCredentials(api_key=SecretStr(API_KEY), base_url="http://127.0.0.1:8765/api").save(
        "default", overwrite=True
    )
    yield "default"
    await NanoGPTCredentials.adelete("default")


class TestNanoGPTCredentialsIsABlockLikeOthers(BlockStandardTestSuite):
    # This one would fetch the picture from the network.
    test_has_a_valid_image = None

    @pytest.fixture
    def block(self) -> type[Block]:
        return NanoGPTCredentials


def test_prefect_finds_the_package_among_its_collections() -> None:
    [entry_point] = entry_points(group="prefect.collections", name="prefect_nanogpt")

    assert entry_point.load().NanoGPTCredentials is NanoGPTCredentials
    assert Block.get_block_class_from_key("nanogpt-credentials") is NanoGPTCredentials


async def test_a_saved_block_is_loaded_with_its_key(saved_block: str) -> None:
    loaded = await NanoGPTCredentials.aload(saved_block)

    assert loaded.api_key.get_secret_value() == API_KEY
    assert loaded.base_url == "http://127.0.0.1:8765/api"


async def test_the_server_shows_a_saved_block_without_its_key(saved_block: str) -> None:
    async with get_client() as client:
        document = await client.read_block_document_by_name(saved_block, "nanogpt-credentials", include_secrets=False)

    assert document.data["base_url"] == "http://127.0.0.1:8765/api"
    assert API_KEY not in document.model_dump_json()


def test_a_block_shows_no_key(block: NanoGPTCredentials) -> None:
    shown = [repr(block), str(block), str(block.model_dump()), block.model_dump_json(), repr(block.get_client())]

    assert "**" in shown[0]
    assert not any(API_KEY in text for text in shown)


def test_the_address_is_that_of_the_provider_unless_given(block: NanoGPTCredentials) -> None:
    assert block.base_url == block.get_client().base_url == DEFAULT_BASE_URL == "https://nano-gpt.com/api"


@pytest.mark.parametrize(
    "broken",
    [
        {"api_key": ""},
        {"api_key": " \n"},
        {"base_url": ""},
        {"base_url": "nano-gpt.com/api"},
        {"base_url": "ftp://nano-gpt.com"},
        {"base_url": "https://"},
        {"base_url": "https:///api"},
        {"base_url": "https://nano gpt.com"},
    ],
    ids=str,
)
def test_what_cannot_be_a_key_or_an_address_is_refused(broken: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        NanoGPTCredentials.model_validate({"api_key": API_KEY, **broken})

    assert [error["loc"] for error in caught.value.errors()] == [tuple(broken)]
    assert API_KEY not in str(caught.value)


def test_a_key_with_a_newline_inside_is_refused_and_not_shown() -> None:
    block = NanoGPTCredentials(api_key=SecretStr(f"{API_KEY}\nX-Injected: yes"))

    with pytest.raises(CredentialsError, match="no key has") as caught:
        block.get_client()

    assert caught.value.code == "INVALID_CREDENTIALS"
    assert "the parameter `credentials`" in str(caught.value)
    assert API_KEY not in str(caught.value)


# Where they are looked for


@pytest.mark.parametrize(
    ("address", "expected"),
    [(None, DEFAULT_BASE_URL), ("", DEFAULT_BASE_URL), ("http://127.0.0.1:8765/api", "http://127.0.0.1:8765/api")],
)
async def test_the_environment_comes_first(
    address: str | None, expected: str, saved_block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_API_KEY", " the-key-of-the-environment\n")
    if address is not None:
        monkeypatch.setenv("NANOGPT_BASE_URL", address)

    found = await find_credentials()

    assert (found.api_key.get_secret_value(), found.base_url) == ("the-key-of-the-environment", expected)
    assert found.source == "the environment variable NANOGPT_API_KEY"


async def test_an_address_without_a_key_is_never_answered_with_the_saved_block(
    saved_block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_BASE_URL", "http://127.0.0.1:9999/api")

    with pytest.raises(CredentialsError, match="set both, or neither") as caught:
        await find_credentials()

    assert caught.value.code == "INVALID_CREDENTIALS"
    assert "http://127.0.0.1:9999/api" in str(caught.value)


@pytest.mark.parametrize("blank", ["", " \n"])
async def test_the_block_named_default_comes_second(
    blank: str, saved_block: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_API_KEY", blank)

    found = await find_credentials()

    assert (found.api_key.get_secret_value(), found.base_url) == (API_KEY, "http://127.0.0.1:8765/api")
    assert found.source == "the saved block nanogpt-credentials/default"


def test_credentials_that_were_given_are_said_to_be_given(block: NanoGPTCredentials) -> None:
    assert block.source == "the parameter `credentials`"


@pytest.mark.parametrize("key", [None, "", " \n"])
async def test_without_either_the_error_names_both_ways(key: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if key is not None:
        monkeypatch.setenv("NANOGPT_API_KEY", key)

    with pytest.raises(CredentialsError) as caught:
        await find_credentials()

    assert "block named 'default'" in str(caught.value)
    assert "set NANOGPT_API_KEY" in str(caught.value)
    for way in (
        "https://nano-gpt.com/api",
        "NANOGPT_API_KEY",
        "'default'",
        "prefect-nanogpt sandbox",
        "with Sandbox():",
    ):
        assert way in str(caught.value)


@pytest.mark.parametrize("source", ["the environment variable NANOGPT_API_KEY", "the parameter `credentials`"])
async def test_the_log_says_where_the_key_came_from_and_which_api_is_asked_and_never_the_key(
    source: str, block: NanoGPTCredentials, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
    caplog.set_level("INFO")

    async with nanogpt_client(block if "parameter" in source else None):
        pass

    assert f"Asking {DEFAULT_BASE_URL}, with the key from {source}." in caplog.text
    assert API_KEY not in caplog.text


async def test_a_refused_key_is_said_to_be_from_where_it_came(
    sandbox: Sandbox, credentials: NanoGPTCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
    monkeypatch.setenv("NANOGPT_BASE_URL", sandbox.base_url)
    sandbox.on_status(None, [Answer(401, {"error": "Invalid API key"})] * 2)
    words = []
    for given in (None, credentials):
        async with nanogpt_client(given) as client:
            with pytest.raises(ProviderError) as caught:
                await client.status(Ticket(run_id="98b0", model="m"))
        words.append(str(caught.value))

    assert words[0].endswith(
        f"The key is from the environment variable NANOGPT_API_KEY, and was sent to {sandbox.base_url}."
    )
    assert words[1].endswith(f"The key is from the parameter `credentials`, and was sent to {sandbox.base_url}.")
    assert API_KEY not in str(words)


async def test_a_bad_address_in_the_environment_is_a_credentials_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOGPT_API_KEY", API_KEY)
    monkeypatch.setenv("NANOGPT_BASE_URL", "nano-gpt.com/api")

    with pytest.raises(CredentialsError, match="NANOGPT_BASE_URL") as caught:
        await find_credentials()

    assert API_KEY not in str(caught.value)


# One client for a flow


async def test_tasks_of_a_flow_share_its_client(block: NanoGPTCredentials) -> None:
    async with nanogpt_client(block) as outer, nanogpt_client(block) as same, nanogpt_client(None) as also:
        assert outer is same is also
    async with nanogpt_client(block) as later:
        assert later is not outer


async def test_other_credentials_get_another_client(block: NanoGPTCredentials) -> None:
    other = NanoGPTCredentials(api_key=SecretStr("another-key"))

    async with nanogpt_client(block) as outer, nanogpt_client(other) as inner:
        assert inner is not outer


async def test_another_event_loop_gets_another_client(block: NanoGPTCredentials) -> None:
    async def elsewhere() -> int:
        async with nanogpt_client(block) as client:
            return id(client)

    async with nanogpt_client(block) as outer:
        assert await asyncio.to_thread(lambda: asyncio.run(elsewhere())) != id(outer)


def test_the_schema_marks_the_key_as_a_secret() -> None:
    schema = json.loads(json.dumps(NanoGPTCredentials.model_json_schema()))

    assert schema["secret_fields"] == ["api_key", "base_url_login", "ledger_login"]
