"""Run the comparisons and print each target beside what was measured.

python -m benchmarks [--quick] [NAME ...]

A whole run writes docs/performance.json, and from it docs/performance.md with its plots. With names, only these
comparisons are made anew. A quick run has few jobs and one round, prints, and writes nothing; without names it makes
some of them.
"""

import argparse
import json
import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from platform import machine, python_version
from typing import Any

from benchmarks import comparisons, report
from benchmarks.comparison import Comparison

RESULTS = Path(__file__).parent.parent / "docs" / "performance.json"


def this_machine() -> dict[str, Any]:
    """Name the machine and what runs on it, and tell how fast it is at the moment."""
    info = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    memory_kb = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "processor": models[0] if models else machine(),
        "cores": info.count("processor\t"),
        "memory_gb": round(memory_kb / 1024**2),
        "import_seconds": comparisons.import_seconds(),
        "python": python_version(),
        **{name: version(name) for name in ("prefect", "httpx", "fastapi", "sqlalchemy")},
    }


def show(comparison: Comparison) -> None:
    """Print a comparison: its table, and the targets."""
    print(f"\n{comparison.title}", flush=True)
    for row in [comparison.columns, *comparison.rows]:
        print("  " + "  ".join(f"{cell:>22}" if column else f"{cell:<52}" for column, cell in enumerate(row)))
    for target in comparison.targets:
        print(f"  {report.verdict(target)}", flush=True)


def main() -> None:
    """Run what was asked for."""
    # Where bytecode is not kept, half of a start is compiling what users compile once.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--quick", action="store_true", help="few jobs, one round, nothing written")
    parser.add_argument("names", nargs="*", choices=[*comparisons.ALL, []], help="the comparisons to make anew")
    arguments = parser.parse_args()
    if arguments.quick:
        for name in arguments.names or comparisons.QUICK:
            show(comparisons.ALL[name](True))
        return
    machine = this_machine()
    for name in arguments.names or comparisons.ALL:
        comparison = comparisons.ALL[name](False)
        show(comparison)
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        results[name] = {**asdict(comparison), "machine": machine}
        results = {name: results[name] for name in comparisons.ALL if name in results}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        report.write(results)


if __name__ == "__main__":
    main()
