"""Curves over decode steps as SVG: groups of heads in one chart, or one head in a few pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.report.drawing import svg

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["Band", "Line", "band_chart", "sparkline"]

_LEFT, _TOP, _WIDTH, _HEIGHT = 30, 8, 400, 180
_SPARK_WIDTH, _SPARK_HEIGHT = 104, 52


@dataclass(frozen=True)
class Band:
    """A group of heads, drawn as its median and the band between its quartiles.

    Attributes:
        name: Class in the style sheet, and the group's name in tooltips.
        values: In [0, 1], [num_steps, num_heads], at least one step and one head.
    """

    name: str
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Line:
    """A level that curves are compared with.

    Attributes:
        name: Class in the style sheet: threshold or chance.
        title: What it is.
        value: Where it is, in [0, 1].
    """

    name: str
    title: str
    value: float


def band_chart(bands: Sequence[Band], lines: Sequence[Line], *, label: str) -> str:
    """A chart of values in [0, 1] over decode steps, counted from 1.

    Args:
        bands: At least one, all over the same steps.
        lines: Levels drawn through the whole chart.
        label: What it shows, for those who cannot see it.
    """
    num_steps = len(bands[0].values)
    column = _WIDTH / num_steps
    # From edge to edge with every step in the middle of its column: one step alone is a line too.
    x = [_LEFT, *(_LEFT + (np.arange(num_steps) + 0.5) * column), _LEFT + _WIDTH]
    parts = [*_axes(num_steps), *(_level(line) for line in lines)]
    told: list[list[str]] = [[] for _ in range(num_steps)]
    for band in bands:
        low, middle, high = np.quantile(band.values, [0.25, 0.5, 0.75], axis=1)
        edge = [*_points(x, high), *reversed(_points(x, low))]
        parts.append(f'<polygon class="band {band.name}" points="{" ".join(edge)}"/>')
        line = " ".join(_points(x, middle))
        parts.append(f'<polyline class="curve {band.name}" points="{line}"/>')
        for step in range(num_steps):
            told[step].append(
                f"{band.name} {middle[step]:.2f} ({low[step]:.2f} to {high[step]:.2f})"
            )
    parts += [
        f'<rect class="hit" x="{_LEFT + step * column:.1f}" y="{_TOP}" width="{column:.1f}" '
        f'height="{_HEIGHT}"><title>step {step + 1}: {", ".join(texts)}</title></rect>'
        for step, texts in enumerate(told)
    ]
    drawn = svg(_LEFT + _WIDTH + 10, _TOP + _HEIGHT + 32, parts, label=label)
    return f'<div class="fit curves">{drawn}</div>'


def sparkline(values: NDArray[np.float64], level: float | None, *, title: str) -> str:
    """One head's values over steps, as small as a word.

    Args:
        values: In [0, 1], [num_steps], at least two.
        level: Where a dashed line is drawn.
        title: The tooltip: what it shows, in numbers.
    """
    x = np.linspace(0.0, _SPARK_WIDTH, len(values))
    y = 2.0 + (1.0 - values) * (_SPARK_HEIGHT - 4)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    parts = [f"<title>{title}</title>"]
    if level is not None:
        at = 2.0 + (1.0 - level) * (_SPARK_HEIGHT - 4)
        parts.append(
            f'<line class="threshold" x1="0" x2="{_SPARK_WIDTH}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
    parts.append(f'<polyline class="spark" points="{points}"/>')
    return svg(_SPARK_WIDTH, _SPARK_HEIGHT, parts, label=title)


def _points(x: Sequence[float], values: NDArray[np.float64]) -> list[str]:
    """Corners of a curve that runs level from each edge to the nearest step."""
    padded = [values[0], *values, values[-1]]
    return [f"{a:.1f},{_y(float(b)):.1f}" for a, b in zip(x, padded, strict=True)]


def _y(value: float) -> float:
    return _TOP + (1.0 - value) * _HEIGHT


def _level(line: Line) -> str:
    return (
        f'<line class="{line.name}" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{_y(line.value):.1f}" '
        f'y2="{_y(line.value):.1f}"><title>{line.title} {line.value:.2f}</title></line>'
    )


def _axes(num_steps: int) -> list[str]:
    bottom = _TOP + _HEIGHT
    parts = [
        f'<line class="axis" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{_y(value):.1f}" '
        f'y2="{_y(value):.1f}"/><text class="end" x="{_LEFT - 5}" y="{_y(value) + 3:.1f}">'
        f"{value:g}</text>"
        for value in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    column = _WIDTH / num_steps
    marks = sorted({1, *(round(num_steps * share / 4) for share in (1, 2, 3, 4))} - {0})
    parts += [
        f'<text class="middle" x="{_LEFT + (step - 0.5) * column:.1f}" y="{bottom + 14}">'
        f"{step}</text>"
        for step in marks
    ]
    middle = _LEFT + _WIDTH // 2
    parts.append(f'<text class="middle" x="{middle}" y="{bottom + 28}">decoded token</text>')
    return parts
