"""What only asks the provider something: the commands `models`, `voices` and `balance`, and `--dry-run` of others."""

from __future__ import annotations

import json
import logging
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
from prefect_nanogpt.models import AudioModel, Balance, plain
from prefect_nanogpt.sandbox import Sandbox
from prefect_nanogpt.shell import NO_KEY, Words, check_environment, console, prefect_api, refuse_if_given, stop
from prefect_nanogpt.tasks import estimate
from prefect_nanogpt.tasks.estimates import ModelEstimate

__all__ = ["balance", "dry_run", "models", "voices"]

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
    found = _ask_client(NanoGPTClient.list_models)
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
    found = _ask_client(lambda client: client.list_voices(model))
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
    found = _ask_client(NanoGPTClient.get_balance)
    if as_json:
        _print_json(found)
        return 0
    print(_balance(found))
    return 0


def dry_run(text: str | None = None, **parameters: Any) -> int:
    """Show what a text or a batch would cost, for `say --dry-run` and `batch --dry-run`."""
    found = _ask(lambda credentials: estimate.fn(text, credentials=credentials, **parameters))
    held = f", {found.held_jobs} held back (uncertain, lost or refused)" if found.held_jobs else ""
    more = " and what is not known" if any(model.usd is None for model in found.models) else ""
    spent = ", ".join(f"{_amount(cost)} {unit}" for unit, cost in found.spent.items())
    table = Table.grid("", "", padding=(0, 2))
    for name, value in [
        ("Lines", f"{found.lines:,}, with {found.characters:,} characters"),
        ("Jobs", f"{found.jobs:,}: {found.paid_jobs:,} paid for, {found.new_jobs:,} to be submitted{held}"),
        *((model.model, _price_of(model)) for model in found.models),
        ("Would be charged", f"{_amount(found.usd)} USD{more}"),
        ("Charged before", spent or "nothing known"),
        ("Balance", _balance(found.balance).replace("\n", ", ")),
        *(("Not known", what) for what in found.unknown),
        *(("Warning", what) for what in found.warnings),
    ]:
        table.add_row(Text(name), Text(value))
    _print(table)
    console.print("Nothing was submitted.")
    return 0


def _price_of(model: ModelEstimate) -> str:
    prices = [
        f"{_amount(price)} USD {unit}"
        for price, unit in ((model.usd_per_thousand_chars, "per 1,000"), (model.usd_per_generation, "per job"))
        if price is not None
    ]
    amount = f" at {' and '.join(prices)}: {_amount(model.usd)} USD" if model.usd is not None else ""
    return f"{model.jobs:,} {'job' if model.jobs == 1 else 'jobs'}, {model.characters:,} characters{amount}"


def _balance(found: Balance | None) -> str:
    amounts = ((found.usd, "USD"), (found.xno, "XNO")) if found else ((None, "USD"),)
    return "\n".join(f"{UNKNOWN if amount is None else _amount(amount)} {currency}" for amount, currency in amounts)


def _ask_client(question: Callable[[NanoGPTClient], Awaitable[R]]) -> R:
    async def ask(credentials: NanoGPTCredentials) -> R:
        async with credentials.get_client() as client:
            return await question(client)

    return _ask(ask)


def _ask(question: Callable[[NanoGPTCredentials], Awaitable[R]]) -> R:
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
            return await question(credentials)

    check_environment()
    logging.getLogger("prefect.nanogpt").setLevel(logging.WARNING)
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
