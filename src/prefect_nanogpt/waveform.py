"""The pictures of the report: the outline of audio, and a queue over time."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Final

__all__ = ["draw_steps", "draw_waveform"]

WIDTH: Final = 720
HEIGHT: Final = 96
COLOR: Final = "#4f7df3"


def draw_waveform(peaks: Sequence[int]) -> str:
    """Draw peaks from 0 to 100 as an image in a `data:` URL."""
    step = WIDTH / len(peaks)
    bars = "".join(
        f"M{(column + 0.5) * step:.1f} {(HEIGHT - height) / 2:.0f}v{height:.0f}"
        for column, peak in enumerate(peaks)
        for height in [max(2.0, peak * HEIGHT / 100)]
    )
    return _image(f'<path d="{bars}" stroke="{COLOR}" stroke-width="{step * 0.6:.1f}" stroke-linecap="round"/>')


def draw_steps(points: Sequence[tuple[float, int]], end: float) -> str:
    """Draw a quantity that changes at points in time as an image in a `data:` URL.

    Args:
        points: When (in seconds from 0) the quantity changed, and to what.
        end: The time at which the picture ends, in seconds.
    """
    highest = max(value for _, value in points) or 1

    def x(seconds: float) -> float:
        return 4 + (WIDTH - 8) * seconds / (end or 1)

    def y(value: int) -> float:
        return 20 + (HEIGHT - 40) * (1 - value / highest)

    line = f"M{x(0):.0f} {y(points[0][1]):.0f}" + "".join(f"H{x(at):.0f}V{y(value):.0f}" for at, value in points)
    label = f'font-family="sans-serif" font-size="12" fill="{COLOR}"'
    return _image(
        f'<path d="{line}H{x(end):.0f}" stroke="{COLOR}" stroke-width="2"/>'
        f'<text x="4" y="12" {label}>queue position {points[0][1]}</text>'
        f'<text x="{WIDTH - 4}" y="{HEIGHT - 4}" text-anchor="end" {label}>{end:.1f} s</text>'
    )


def _image(content: str) -> str:
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" fill="none">{content}</svg>'
    )
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
