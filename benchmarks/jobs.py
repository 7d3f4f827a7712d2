"""The jobs that are compared, and how a process tells of itself. Nothing but the standard library."""

import math
import random
import re
from pathlib import Path

SEED = 20_260_901


def uniform(count: int, low: float = 2.0, high: float = 20.0) -> list[float]:
    """Draw durations in seconds, each as likely as the other."""
    rng = random.Random(SEED)
    return [rng.uniform(low, high) for _ in range(count)]


def log_uniform(count: int, low: float = 1.0, high: float = 180.0) -> list[float]:
    """Draw durations in seconds of which only the order of magnitude is known: as many from 1 to 2 as from 9 to 18."""
    rng = random.Random(SEED)
    return [math.exp(rng.uniform(math.log(low), math.log(high))) for _ in range(count)]


def durations_of(kind: str, count: int) -> list[float]:
    """Draw durations of a kind: `uniform` from 2 to 20 s, `log-uniform` from 1 to 180 s, or `quick`, from 2 to 6 s."""
    if kind == "log-uniform":
        return log_uniform(count)
    return uniform(count, high={"uniform": 20.0, "quick": 6.0}[kind])


def texts(durations: list[float]) -> list[str]:
    """Write texts that take the sandbox so long."""
    return [f"[sandbox:wait {seconds:.2f}] Line {number}." for number, seconds in enumerate(durations)]


def seconds_of(text: str) -> float:
    """Read back how long a text takes the sandbox."""
    found = re.search(r"\[sandbox:wait ([\d.]+)\]", text)
    return float(found.group(1)) if found else 0.0


def memory_mb(what: str) -> float:
    """Read this process's resident memory in MB: `VmRSS` now, `VmHWM` at its highest."""
    found = re.search(rf"^{what}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found.group(1)) / 1024
