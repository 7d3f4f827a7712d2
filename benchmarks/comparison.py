"""What a comparison is: a table, what was to be reached, and what was measured."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Self


@dataclass
class Target:
    """What was to be reached, and what was measured.

    Attributes:
        what: What is measured.
        measured: The median.
        limit: What is to be reached.
        unit: The unit of both, by default that of a ratio.
        at_least: Whether more is better.
        lowest: The least that was measured.
        highest: The most that was measured.
    """

    what: str
    measured: float
    limit: float
    unit: str = "×"
    at_least: bool = False
    lowest: float | None = None
    highest: float | None = None

    @classmethod
    def of(cls, what: str, values: Sequence[float], limit: float, unit: str = "×", *, at_least: bool = False) -> Self:
        """Take the median and the range of what several rounds measured."""
        return cls(what, median(values), limit, unit, at_least, min(values), max(values))

    @property
    def is_reached(self) -> bool:
        """Whether the median is on the right side of the limit."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    @property
    def shown(self) -> str:
        """What was measured, with its unit, and its range where there is one."""
        if self.lowest is None or self.highest is None or self.lowest == self.highest:
            return f"{self._number(self.measured)} {self.unit}"
        return (
            f"{self._number(self.measured)} {self.unit} ({self._number(self.lowest)} to {self._number(self.highest)})"
        )

    def _number(self, value: float) -> str:
        if isinstance(value, int):
            return f"{value:,}"
        return f"{value:.2f}" if self.unit == "×" else f"{value:.1f}"


@dataclass
class Comparison:
    """A table, the targets that it is held against, and everything that was measured."""

    title: str
    about: str
    columns: list[str]
    rows: list[list[str]]
    targets: list[Target] = field(default_factory=list)
    raw: Any = None


def shown(values: Sequence[float], digits: int = 1) -> str:
    """Show a median, and the range where there are several values."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def percentile_95(values: Sequence[float]) -> float:
    """Give the value that one in twenty is above."""
    return sorted(values)[int(0.95 * len(values))]
