"""The command that tells what was bought: `prefect-nanogpt ledger`."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Final

from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prefect_nanogpt.client import DEFAULT_BASE_URL
from prefect_nanogpt.credentials import places_of
from prefect_nanogpt.errors import CredentialsError
from prefect_nanogpt.ledger import Ledger
from prefect_nanogpt.shell import JOB_FAILED, UsageError, Words, api_url, console
from prefect_nanogpt.statement import COLUMNS, BoughtJob, Statement, Total, cells, statement_of, totals_of

__all__ = ["ledger"]

NO_REFUNDS: Final = "Refunds are not known to a ledger: your balance or your usage page tells of them."
FORMULA: Final = ("=", "+", "-", "@")
"""How text begins that a spreadsheet would take for a formula."""
GROUPS: Final = {"all": "in all", "day": "by day (UTC)", "model": "by model", "flow_run": "by flow run"}
GROUP_SHOWN: Final = 10
STYLES: Final = {"saved": "green", "open": "cyan", "sending": "cyan"}


def ledger(
    *folders: Words,
    all_: Annotated[bool, Parameter(name="--all", negative=())] = False,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
    csv_: Annotated[bool, Parameter(name="--csv", negative=())] = False,
) -> int:
    """Tell what was bought, what became of it, what it cost, and what can be done about it.

    Reads the ledgers beside the audio, and that of NANOGPT_LEDGER or the credentials block. Asks nobody, and needs no
    API key.

    Args:
        folders: Folders of audio or fsspec URLs; by default audio.
        all_: List the saved jobs too, and all totals.
        json_: Write all jobs and totals as JSON.
        csv_: Write all jobs as CSV.
    """
    if json_ and csv_:
        raise UsageError("Give --json or --csv, and only one of them.")
    statement = asyncio.run(_statement(folders))
    for problem in statement.problems:
        console.print(problem, style="red", markup=False)
    if json_:
        print(_as_json(statement))
    elif csv_:
        _write_csv(statement.jobs)
    elif statement.jobs or not statement.problems:
        _show(statement.jobs, everything=all_)
    return JOB_FAILED if statement.problems else 0


async def _statement(folders: Sequence[str]) -> Statement:
    elsewhere = Ledger.elsewhere(None)
    if api_url() and not os.environ.get("NANOGPT_API_KEY", "").strip():  # with a key from there the block is not used
        try:
            elsewhere = Ledger.elsewhere((await places_of(None)).ledger)
        except CredentialsError as error:
            console.print(f"Whether the credentials name a ledger is not known: {error.message}", markup=False)
    return await statement_of(folders or ["audio"], elsewhere)


def _as_json(statement: Statement) -> str:
    told = statement.model_dump(mode="json")
    totals = [total.model_dump(mode="json") for total in totals_of(statement.jobs)]
    return json.dumps({**told, "totals": totals, "refunds": NO_REFUNDS}, ensure_ascii=False, indent=1)


def _write_csv(jobs: Iterable[BoughtJob]) -> None:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(COLUMNS)
    for job in jobs:
        values = cells(dict(job)).values()
        table.writerow(f"'{value}" if value.startswith(FORMULA) else value for value in values)


def _show(jobs: Sequence[BoughtJob], *, everything: bool) -> None:
    """Write what a person looks for: first what something can be done about, last what all has cost."""
    page = Console(highlight=False)
    shown = [job for job in jobs if everything or job.outcome != "saved"]
    if shown:
        table = Table("what became of it", "what it is", box=box.SIMPLE_HEAD, pad_edge=False)
        table.columns[1].overflow = "fold"
        for job in shown:
            table.add_row(*_row(job))
        page.print(table)
    for (outcome, to_do), count in Counter((job.outcome, job.to_do) for job in shown if job.to_do).items():
        page.print(Text.assemble((f"{outcome} ({count}): ", "bold"), to_do))
    if saved := len(jobs) - len(shown):
        page.print(f"Jobs that are saved, and need nothing: {saved}. --all lists them too.", markup=False)
    for _, totals in groupby(totals_of(jobs), key=lambda total: total.provider):
        _show_totals(page, list(totals), everything=everything)
    page.print(NO_REFUNDS if jobs else "Nothing was bought.", markup=False)


def _row(job: BoughtJob) -> tuple[Text, Text]:
    when = f"{job.at:%Y-%m-%d %H:%M}" if job.at else "at an unknown time"
    tries = f"{job.tries} tries" if job.tries > 1 else ""
    end = Text("\n".join(filter(None, [job.outcome, _cost(job), tries, when])))
    end.stylize(STYLES.get(job.outcome, "red"), 0, len(job.outcome))
    return end, Text("\n".join(_lines(job)))


def _lines(job: BoughtJob) -> Iterator[str]:
    """Tell what a job is, line by line, as far as the notes say."""
    what = {"part": "part of a long text", "whole": "a long text", "ticket": "a ticket from elsewhere", "text": ""}
    yield ": ".join(filter(None, [what[job.kind], job.text])) or job.job
    yield ", ".join(filter(None, [job.model, job.run_id]))
    if job.flow_run or job.flow_run_id:
        yield f"flow run {job.flow_run or ''} {f'({job.flow_run_id})' if job.flow_run_id else ''}".strip()
    yield f"in {job.folder}"
    if job.provider != DEFAULT_BASE_URL:
        yield f"at {job.provider or 'an unknown provider'}"
    if job.detail:
        yield job.detail


def _cost(job: BoughtJob) -> str:
    """Write the cost of a job: what nobody has said is no zero."""
    costs = [(job.currency, job.cost), *(job.other_costs or {}).items()]
    told = [f"{cost:f} {currency}" for currency, cost in costs if cost is not None]
    return " + ".join([*told, *(["unknown"] if job.unpriced else [])]) or "no charge noted"


def _show_totals(page: Console, totals: Sequence[Total], *, everything: bool) -> None:
    provider = totals[0].provider
    if provider != DEFAULT_BASE_URL:
        page.print(Text(f"At {provider or 'an unknown provider'}:"))
    table = Table("total", "cost", "jobs", "of unknown cost", box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].overflow = "fold"
    for by, group in groupby(totals, key=lambda total: total.by):
        rows = list(group)
        if by != "all":
            table.add_section()
            table.add_row(Text(GROUPS[by], "bold"))
        for total in rows if everything else rows[:GROUP_SHOWN]:
            costs = "\n".join(f"{cost:f} {currency}" for currency, cost in total.costs.items())
            table.add_row(Text(total.name or GROUPS[by]), Text(costs or "unknown"), str(total.jobs), _count(total))
        if not everything and len(rows) > GROUP_SHOWN:
            table.add_row(f"and {len(rows) - GROUP_SHOWN} more (--all)")
    page.print(table)


def _count(total: Total) -> str:
    return str(total.unknown) if total.unknown else ""
