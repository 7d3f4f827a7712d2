"""The commands that only ask the provider something: `models`, `voices` and `balance`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from decimal import Decimal
from typing import Annotated, Any, Final, TypeVar

from cyclopts import Parameter
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefect_nanogpt import NanoGPTCredentials
from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import find_credentials
from prefect_nanogpt.errors import CredentialsError
from prefect_nanogpt.models import AudioModel, plain
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.shell import NO_KEY, Words, check_environment, console, prefect_api, refuse_if_given, stop

__all__ = ["balance", "models", "voices"]

R = TypeVar("R")
AsJson = Annotated[bool, Parameter(name="--json", negative=())]
UNKNOWN: Final = "unknown"
WIDTH: Final = 160
"""Of a table that goes to a file or another program, in columns."""


def models(*, as_json: AsJson = False) -> int:
    """List the models of NanoGPT's catalogue, those for speech first.

    Args:
        as_json: Print JSON, for programs.
    """
    found = _ask(NanoGPTClient.list_models)
    if as_json:
        _print_json(found)
        return 0
    table = Table("Model", "Kind", "USD per 1,000 characters", "USD per job", "Longest text", "Voices", "Formats")
    kinds = ("speech", "music", "clone", "other")
    for model in sorted(found, key=lambda model: (kinds.index(model.kind), model.id.lower())):
        table.add_row(*map(Text, _cells(model)))
    _print(table)
    return 0


def _cells(model: AudioModel) -> list[str]:
    """Give a row of the table. Of speech that has neither price in the catalogue the price is not known."""
    has_price = model.usd_per_thousand_chars is not None or model.usd_per_generation is not None
    return [
        model.id,
        model.kind,
        _amount(model.usd_per_thousand_chars) if has_price else UNKNOWN,
        _amount(model.usd_per_generation),
        f"{model.max_chars:,}" if model.max_chars else "",
        str(len(model.voices) or ""),
        ", ".join(model.response_formats),
    ]


def voices(model: Words, *, as_json: AsJson = False) -> int:
    """List the voices of a model, one a line.

    Args:
        model: The model id.
        as_json: Print JSON, for programs.
    """
    found = _ask(lambda client: client.list_voices(model))
    if as_json:
        _print_json(found)
    elif found:
        print("\n".join(found))
    else:
        console.print(f"The catalogue names no voices of {model}.", markup=False)
    return 0


def balance(*, as_json: AsJson = False) -> int:
    """Show what is left on the account.

    Args:
        as_json: Print JSON, for programs.
    """
    found = _ask(NanoGPTClient.get_balance)
    if as_json:
        _print_json(found)
        return 0
    for currency, amount in (("USD", found.usd), ("XNO", found.xno)):
        print(f"{UNKNOWN if amount is None else _amount(amount)} {currency}")
    return 0


def _ask(question: Callable[[NanoGPTClient], Awaitable[R]]) -> R:
    """Ask the provider with the credentials that there are, or else the sandbox."""

    async def ask() -> R:
        with ExitStack() as stack:
            try:
                credentials = await find_credentials()
            except CredentialsError as error:
                refuse_if_given(error)
                sandbox = stack.enter_context(Sandbox(speak=False))
                credentials = NanoGPTCredentials(api_key=SecretStr("sandbox"), base_url=sandbox.base_url)
                console.print(NO_KEY)
            async with credentials.get_client() as client:
                return await question(client)

    check_environment()
    with ExitStack() as stack:
        if not os.environ.get("NANOGPT_API_KEY", "").strip():  # there may be a key in a block of Prefect's
            stack.enter_context(prefect_api())
        return stop.run(ask)


def _amount(amount: Decimal | None) -> str:
    return "" if amount is None else f"{amount.normalize():f}"


def _print_json(found: Any) -> None:
    print(json.dumps(plain(found), ensure_ascii=False, indent=2))


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
