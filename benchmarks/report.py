"""The page of the results: docs/performance.md, made of docs/performance.json and the notes."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.comparison import Target

DOCS = Path(__file__).parent.parent / "docs"
NOTES = Path(__file__).parent / "notes.md"


def verdict(target: Target) -> str:
    """Say what was to be reached, what was measured, and whether that is enough."""
    bound = "at least" if target.at_least else "at most"
    reached = "reached" if target.is_reached else "MISSED"
    return f"{target.what}: {target.shown}, {bound} {target.limit:g} {target.unit}: {reached}"


def write(results: dict[str, Any]) -> None:
    """Write the page and its plots."""
    machine = next(iter(results.values()))["machine"]
    targets = [Target(**target) for result in results.values() for target in result["targets"]]
    speeds = sorted(result["machine"]["import_seconds"] for result in results.values())
    speed = " to ".join(dict.fromkeys(f"{seconds:.2f}" for seconds in (speeds[0], speeds[-1])))
    parts = [
        "# Performance",
        "Made by `make bench` from [performance.json](performance.json), which has every single figure; not to be "
        "edited. `make bench-quick` gives an idea in about a minute, and `python -m benchmarks NAME` makes one of them "
        f"anew: {', '.join(f'`{name}`' for name in results)}.",
        f"The machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, shared with "
        f"others; Python {machine['python']}, Prefect {machine['prefect']}, httpx {machine['httpx']}. Provider (the "
        "sandbox), Prefect server and client run on it side by side, so absolute times say little elsewhere: compare "
        f"the ratios. To scale what is absolute to another machine: `import prefect` takes {speed} s of CPU here, in "
        "the same run.",
        "## Targets",
        _table(
            ["what", "to reach", "measured", ""],
            [
                [
                    target.what,
                    f"{'≥' if target.at_least else '≤'} {target.limit:g} {target.unit}",
                    target.shown,
                    "reached" if target.is_reached else "**missed**",
                ]
                for target in targets
            ],
        ),
    ]
    for name, result in results.items():
        speed = f"`import prefect` took {result['machine']['import_seconds']:.2f} s of CPU."
        parts += [f"## {result['title']}", f"{result['about']} {speed}", _table(result["columns"], result["rows"])]
        if name in PLOTS:
            PLOTS[name](result)
            parts.append(f"![{result['title']}](images/performance-{name}.svg)")
    parts.append(NOTES.read_text().strip())
    (DOCS / "performance.md").write_text("\n\n".join(parts) + "\n")


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plot_polling(result: dict[str, Any]) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for way, cost in result["raw"].items():
        if not way.startswith("if "):
            ours = way in ("text_to_speech", "wait_for_tts")
            axes.scatter(cost["calls"], 100 * cost["relative_delay"], color="C0" if ours else "C7")
            axes.annotate(way, (cost["calls"], 100 * cost["relative_delay"]), (6, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="status calls a job", ylabel="mean relative delay, %", xlim=(5, 1500))
    _save(figure, "polling")


def _plot_growth(result: dict[str, Any]) -> None:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    counts = [int(row[0].replace(",", "")) for row in result["rows"]]
    for axes, column, label in zip(figure.subplots(1, 2), (2, 3), ("CPU a line, ms", "peak memory, MB"), strict=True):
        axes.plot(counts, [float(row[column]) for row in result["rows"]], marker="o")
        axes.set(xscale="log", xlabel="lines", ylabel=label)
        axes.set_ylim(bottom=0)
    _save(figure, "growth")


def _save(figure: Figure, name: str) -> None:
    # Without a date and with names that do not change, the same results make the same file.
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(DOCS / "images" / f"performance-{name}.svg", metadata={"Date": None})


PLOTS = {"polling": _plot_polling, "growth": _plot_growth}
