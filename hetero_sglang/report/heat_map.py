"""A sweep as a figure: heat maps over the two thresholds, one for each ratio and set size.

The figure is one SVG that follows the reader's light or dark mode. Every cell bears its number.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from hetero_sglang.profiler.sweep import SweepPoint

__all__ = ["render_sweep"]

_CELL_WIDTH, _CELL_HEIGHT = 62, 26
_LEFT, _TOP, _GAP = 64, 62, 34

_STYLE = """
.page { fill: #ffffff; }
text { font: 11px system-ui, sans-serif; fill: #1c2024; text-anchor: middle; }
.title { font-size: 13px; font-weight: 600; text-anchor: start; } .axis { fill: #60646c; }
.side { text-anchor: end; } .cell { fill: #3e63dd; } .none { fill: none; stroke: #d9d9e0; }
.best { fill: none; stroke: #1c2024; stroke-width: 2; }
@media (prefers-color-scheme: dark) {
  .page { fill: #111113; } text { fill: #edeef0; } .axis { fill: #b0b4ba; }
  .cell { fill: #849dff; } .none { stroke: #43484e; } .best { stroke: #edeef0; } }
"""


@dataclass(frozen=True)
class _Panel:
    """One heat map: of these points, this number."""

    title: str
    points: Sequence[SweepPoint]
    value: Callable[[SweepPoint], float | None]
    text: Callable[[float], str]
    is_lower_better: bool


def render_sweep(points: Sequence[SweepPoint], *, title: str = "") -> str:
    """Draws a sweep: for each set size the floor, then KL and top 1 side by side by ratio.

    The darker a cell the larger its number within the panel; the best of each panel is framed. What
    was not measured, because the ratio is not above the floor, is a dash.

    Args:
        points: The points, at least one.
        title: Line over the figure.

    Returns:
        An SVG document.
    """
    rows = [
        row
        for top_k in sorted({point.top_k for point in points})
        for row in _panels([point for point in points if point.top_k == top_k], top_k)
    ]
    panel_width, panel_height = _extent(points)
    parts = [
        f'<g transform="translate({column * (panel_width + _GAP)} '
        f'{28 + index * (panel_height + _GAP)})">{_draw(panel, points)}</g>'
        for index, row in enumerate(rows)
        for column, panel in enumerate(row)
    ]
    width = 2 * panel_width + _GAP + 8
    height = 28 + len(rows) * (panel_height + _GAP)
    heading = f'<text class="title" x="4" y="16">{escape(title)}</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img"><title>{escape(title or "sweep")}</title>'
        f'<style>{_STYLE}</style><rect class="page" width="{width}" height="{height}"/>{heading}'
        f"{''.join(parts)}</svg>\n"
    )


def _panels(points: Sequence[SweepPoint], top_k: int) -> list[list[_Panel]]:
    """The rows of panels of one set size."""
    ratios = sorted({point.ratio for point in points})
    first = [point for point in points if point.ratio == ratios[0]]
    panels = [
        [_Panel(f"floor (top {top_k})", first, lambda p: p.floor, lambda v: f"{v:.1%}", True)]
    ]
    for ratio in ratios:
        some = [point for point in points if point.ratio == ratio]
        panels.append(
            [
                _Panel(f"KL at ratio {ratio:g}", some, lambda p: p.kl, lambda v: f"{v:.4f}", True),
                _Panel(
                    f"same top token at ratio {ratio:g}",
                    some,
                    lambda p: p.top1,
                    lambda v: f"{v:.1%}",
                    False,
                ),
            ]
        )
    return panels


def _extent(points: Sequence[SweepPoint]) -> tuple[int, int]:
    columns = len({point.stable for point in points})
    rows = len({point.similarity for point in points})
    return _LEFT + columns * _CELL_WIDTH, _TOP + rows * _CELL_HEIGHT


def _draw(panel: _Panel, points: Sequence[SweepPoint]) -> str:
    columns = sorted({point.stable for point in points})
    rows = sorted({point.similarity for point in points})
    values = {(p.stable, p.similarity): panel.value(p) for p in panel.points}
    known = [value for value in values.values() if value is not None]
    least, most = min(known, default=0.0), max(known, default=0.0)
    best = least if panel.is_lower_better else most
    middle = _LEFT + len(columns) * _CELL_WIDTH / 2
    parts = [
        f'<text class="title" x="{_LEFT}" y="16">{escape(panel.title)}</text>',
        f'<text class="axis" x="{middle:g}" y="36">stable threshold</text>',
        f'<text class="axis side" x="{_LEFT - 6}" y="36">similarity</text>',
    ]
    for column, stable in enumerate(columns):
        x = _LEFT + column * _CELL_WIDTH
        parts.append(f'<text class="axis" x="{x + _CELL_WIDTH / 2:g}" y="54">{stable:g}</text>')
        for row, similarity in enumerate(rows):
            y = _TOP + row * _CELL_HEIGHT
            if not column:
                parts.append(
                    f'<text class="axis side" x="{_LEFT - 6}" y="{y + 17}">{similarity:g}</text>'
                )
            value = values.get((stable, similarity))
            parts.append(_cell(x, y, value, least, most, panel))
            if value is not None and value == best and least < most:
                parts.append(_rect("best", x, y, ""))
    return "".join(parts)


def _cell(x: int, y: int, value: float | None, least: float, most: float, panel: _Panel) -> str:
    if value is None:
        return _rect("none", x, y, "") + _label(x, y, "-")
    share = (value - least) / (most - least) if most > least else 0.0
    # Never so dark that the number on it could not be read.
    return _rect("cell", x, y, f' fill-opacity="{0.08 + 0.47 * share:.3f}"') + _label(
        x, y, panel.text(value)
    )


def _rect(name: str, x: int, y: int, extra: str) -> str:
    return (
        f'<rect class="{name}" x="{x + 1}" y="{y + 1}" width="{_CELL_WIDTH - 2}" '
        f'height="{_CELL_HEIGHT - 2}"{extra}/>'
    )


def _label(x: int, y: int, text: str) -> str:
    return f'<text x="{x + _CELL_WIDTH / 2:g}" y="{y + 17}">{text}</text>'
