"""What only asks the provider something: the commands `models`, `voices` and `balance`, and `--dry-run` of others."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import ExitStack
from decimal import Decimal
from typing import Annotated, Any, Final, TypeVar

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from prefect_nanogpt.client import NanoGPTClient
from prefect_nanogpt.credentials import find_credentials
from prefect_nanogpt.models import AudioModel, Balance, plain
from prefect_nanogpt.shell import (
    Words,
    check_environment,
    console,
    credentials_or_sandbox,
    prefect_api,
    stop,
)
from prefect_nanogpt.tasks import estimate
from prefect_nanogpt.tasks.estimates import Estimate, ModelEstimate

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
    found = _ask_provider(NanoGPTClient.list_models)
    if as_json:
        _print_json(found)
        return 0
    table = Table(
        Column("Model", no_wrap=True),
        *(Column(name, justify="right") for name in ("USD per 1,000", "USD per job", "Longest text", "Voices")),
        Column("Kind", no_wrap=True),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
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
        _amount(model.usd_per_thousand_chars) if has_price else UNKNOWN,
        _amount(model.usd_per_generation),
        f"{model.max_chars:,}" if model.max_chars else "",
        str(len(model.voices) or ""),
        model.kind,
    ]


def voices(model: Words, *, as_json: AsJson = False) -> int:
    """List the voices of a model, one a line.

    Args:
        model: The model id.
        as_json: Print JSON, for programs.
    """
    found = _ask_provider(lambda client: client.list_voices(model))
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
    found = _ask_provider(NanoGPTClient.get_balance)
    if as_json:
        _print_json(found)
        return 0
    print(_balance(found))
    return 0


def dry_run(text: str | None = None, **parameters: Any) -> int:
    """Show what a text or a batch would cost, for `say --dry-run` and `batch --dry-run`."""

    async def ask() -> Estimate:
        with ExitStack() as stack:
            return await estimate.fn(text, credentials=await credentials_or_sandbox(stack), **parameters)

    found = _ask(ask)
    held = f", {found.held_jobs} held back (uncertain, lost or refused)" if found.held_jobs else ""
    more = " and what is not known" if any(model.usd is None for model in found.models) else ""
    spent = ", ".join(f"{_amount(cost)} {unit}" for unit, cost in found.spent.items())
    lines = [
        ("Lines", f"{found.lines:,}, with {found.characters:,} characters"),
        ("Jobs", f"{found.jobs:,}: {found.paid_jobs:,} paid for, {found.new_jobs:,} to be submitted{held}"),
        *((model.model, _price_of(model)) for model in found.models),
        ("Would be charged", f"{_amount(found.usd)} USD{more}"),
        ("Charged before", spent or "nothing known"),
        ("Balance", _balance(found.balance).replace("\n", ", ")),
        *(("Not known", what) for what in found.unknown),
        *(("Warning", what) for what in found.warnings),
    ]
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:{width}}  {value}")
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


def _ask_provider(question: Callable[[NanoGPTClient], Awaitable[R]]) -> R:
    """Ask the provider, and nobody in its place: what a sandbox answers would be taken for the account."""

    async def ask() -> R:
        async with (await find_credentials()).get_client() as client:
            return await question(client)

    return _ask(ask)


def _ask(question: Callable[[], Coroutine[Any, Any, R]]) -> R:
    """Ask something, where Prefect can be asked for a key that the environment does not have."""
    check_environment()
    logging.getLogger("prefect.nanogpt").setLevel(logging.WARNING)
    with ExitStack() as stack:
        if not os.environ.get("NANOGPT_API_KEY", "").strip():  # there may be one in a block
            stack.enter_context(prefect_api())
        try:
            return stop.run(question)
        except asyncio.CancelledError:
            raise SystemExit(128 + (stop.number or 0)) from None


def _amount(amount: Decimal | None) -> str:
    return "" if amount is None else f"{amount.normalize():f}"


def _print_json(found: Any) -> None:
    print(json.dumps(plain(found), ensure_ascii=False, indent=2))


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
