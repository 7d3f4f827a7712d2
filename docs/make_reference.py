"""Writes docs/reference.md from the docstrings: `make reference`."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

from griffe import Docstring as GriffeDocstring
from griffe import DocstringSectionKind, parse_google

from prefect_nanogpt.flows.forms import own_signature

PUBLIC = {
    "prefect_nanogpt.flows": ["text_to_speech", "text_to_speech_batch", "wait_for_tts", "collect_open_tickets"],
    "prefect_nanogpt.tasks": [
        "submit_tts",
        "get_tts_status",
        "save_audio",
        "join_audio",
        "write_subtitles",
        "list_models",
        "list_voices",
        "get_balance",
        "estimate",
        "read_ledger",
    ],
    "prefect_nanogpt": ["NanoGPTCredentials"],
    "prefect_nanogpt.models": [
        "Ticket",
        "TTSRequest",
        "Pending",
        "Completed",
        "Rejected",
        "AudioFile",
        "AudioModel",
        "Balance",
        "PollSchedule",
    ],
    "prefect_nanogpt.lines": ["ManifestRow"],
    "prefect_nanogpt.tasks.estimates": ["Estimate", "ModelEstimate"],
    "prefect_nanogpt.statement": ["BoughtJob", "Charge", "Total", "totals_of"],
    "prefect_nanogpt.errors": [
        "NanoGPTError",
        "TTSJobRejected",
        "ContentPolicyViolation",
        "TTSTimeout",
        "BatchPartial",
        "SubmissionUncertain",
        "ProviderError",
        "AudioError",
        "StorageError",
        "CredentialsError",
    ],
}


def described(text: str) -> str:
    """Turn a Google-style docstring into Markdown."""
    parts = []
    for section in parse_google(GriffeDocstring(text), warnings=False):
        match section.kind:
            case DocstringSectionKind.text:
                parts.append(section.value)
            case DocstringSectionKind.parameters | DocstringSectionKind.attributes:
                title = "Arguments" if section.kind is DocstringSectionKind.parameters else "Attributes"
                rows = [f"- `{item.name}`: {one_line(item.description)}" for item in section.value]
                parts.append("\n".join([f"**{title}**", "", *rows]))
            case DocstringSectionKind.raises:
                rows = [f"- `{item.annotation}`: {one_line(item.description)}" for item in section.value]
                parts.append("\n".join(["**Raises**", "", *rows]))
            case DocstringSectionKind.returns:
                parts.append("**Returns** " + " ".join(one_line(item.description) for item in section.value))
            case DocstringSectionKind.admonition:
                contents = section.value.description
                parts.append(contents if "```" in contents else f"```python\n{contents}\n```")
            case DocstringSectionKind.examples:
                for kind, contents in section.value:
                    is_code = kind is DocstringSectionKind.examples
                    parts.append(f"```python\n{contents}\n```" if is_code else contents)
    return "\n\n".join(parts)


def one_line(text: str) -> str:
    """Undo the line breaks of the source."""
    return " ".join(text.split())


def entry(name: str, thing: Any) -> str:
    """Describe one public name."""
    function = getattr(thing, "fn", thing)
    parts = [f"### `{name}`"]
    if inspect.isfunction(function):
        parameters = "".join(
            f"    {parameter.name},\n"
            if parameter.default is parameter.empty
            else f"    {parameter.name}={parameter.default!r},\n"
            for parameter in own_signature(function).parameters.values()
        )
        parts.append(f"```python\nawait {name}(\n{parameters})\n```")
    return "\n\n".join([*parts, described(inspect.getdoc(function) or "")])


def reference() -> str:
    """Give the whole page."""
    pages = ["# Reference", "Made from the docstrings by `make reference`."]
    for module, names in PUBLIC.items():
        pages.append(f"## `{module}`")
        pages += [entry(name, getattr(importlib.import_module(module), name)) for name in names]
    return "\n\n".join(pages) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "reference.md").write_text(reference())
