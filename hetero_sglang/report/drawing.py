"""Pieces of a page: cells, bars and matrices as SVG, headline numbers as text.

Everything drawn bears a tooltip with its numbers. Colours are the style sheet's: a class names what
is shown, an opacity how much of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

__all__ = ["facts", "grid", "histogram", "matrix", "rect", "svg"]

_CELL = 18
_MARGIN = 30
_NUM_BINS = 20


def svg(width: int, height: int, parts: Iterable[str], *, label: str = "") -> str:
    """A drawing of its parts.

    Args:
        width: Units from left to right, pixels unless the style sheet says otherwise.
        height: Units from top to bottom.
        parts: SVG elements.
        label: What it shows, for those who cannot see it; escaped already.
    """
    spoken = f' role="img" aria-label="{label}"' if label else ""
    return (
        f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}"{spoken}>'
        f"{''.join(parts)}</svg>"
    )


def rect(x: int, y: int, name: str, opacity: float, title: str, *, size: int) -> str:
    """A square of a class, with a tooltip."""
    shade = "" if opacity >= 1.0 else f' fill-opacity="{opacity:.3f}"'
    return (
        f'<rect class="{name}" x="{x}" y="{y}" width="{size}" height="{size}"{shade}>'
        f"<title>{title}</title></rect>"
    )


def grid(
    num_layers: int, num_kv_heads: int, cell: Callable[[int, int], tuple[str, float, str, str]]
) -> str:
    """Layers from left to right, heads from top to bottom.

    Args:
        num_layers: Columns.
        num_kv_heads: Rows.
        cell: Class, opacity, mark and tooltip of (layer, head).
    """
    parts: list[str] = []
    for layer in range(num_layers):
        x = _MARGIN + layer * _CELL
        if layer % 5 == 0:
            parts.append(f'<text x="{x + 3}" y="{_CELL - 6}">{layer}</text>')
        for head in range(num_kv_heads):
            name, opacity, mark, title = cell(layer, head)
            y = (head + 1) * _CELL
            parts.append(rect(x, y, name, opacity, title, size=_CELL - 2))
            if mark:
                parts.append(f'<text class="mark" x="{x + 8}" y="{y + 12}">{mark}</text>')
    parts += [
        f'<text x="{_MARGIN - 14}" y="{(head + 1) * _CELL + 12}">{head}</text>'
        for head in range(num_kv_heads)
    ]
    width = _MARGIN + num_layers * _CELL
    return f'<div class="wide">{svg(width, (num_kv_heads + 1) * _CELL, parts)}</div>'


def histogram(
    series: Iterable[tuple[str, NDArray[np.float64]]], line: float | None, x_name: str, y_name: str
) -> str:
    """Stacked bars over [0, 1], with a dashed line at a threshold.

    Args:
        series: Class and values of each part of the bars, from bottom to top.
        line: The threshold.
        x_name: What the values are.
        y_name: What is counted.
    """
    counts = [
        (name, np.histogram(values, bins=_NUM_BINS, range=(0.0, 1.0))[0]) for name, values in series
    ]
    tallest = max(1, int(np.sum([count for _, count in counts], axis=0).max()))
    width, height, step = 400, 140, 400 // _NUM_BINS
    parts = [f'<line class="axis" x1="0" x2="{width}" y1="{height}" y2="{height}"/>']
    for index in range(_NUM_BINS):
        y = float(height)
        low, high = index / _NUM_BINS, (index + 1) / _NUM_BINS
        for name, count in counts:
            tall = (height - 20) * int(count[index]) / tallest
            if not tall:
                continue
            y -= tall
            title = f"{x_name} {low:.2f} to {high:.2f}: {int(count[index])} {y_name}"
            title += "" if name == "value" else f" ({name})"
            parts.append(
                f'<rect class="{name}" x="{index * step}" y="{y:.1f}" width="{step - 1}" '
                f'height="{tall:.1f}"><title>{title}</title></rect>'
            )
    parts += [
        f'<text x="{value * width - (8 if value else 0):.0f}" y="{height + 14}">{value:g}</text>'
        for value in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    if line is not None:
        x = line * width
        parts.append(
            f'<line class="threshold" x1="{x:.0f}" x2="{x:.0f}" y1="0" y2="{height}">'
            f"<title>threshold {line:g}</title></line>"
        )
    return f'<div class="fit">{svg(width + 12, height + 20, parts)}</div>'


def matrix(layer: int, values: NDArray[np.float64]) -> str:
    """A layer's heads by its heads, the darker the nearer to 1.

    Args:
        layer: The layer.
        values: In [0, 1], [num_kv_heads, num_kv_heads].
    """
    size = 10
    parts = [
        rect(
            column * size,
            row * size,
            "value",
            float(values[row, column]),
            f"layer {layer}, heads {row} and {column}: {values[row, column]:.2f}",
            size=size - 1,
        )
        for row in range(len(values))
        for column in range(len(values))
    ]
    extent = len(values) * size
    return f"<figure>{svg(extent, extent, parts)}<figcaption>{layer}</figcaption></figure>"


def facts(items: Iterable[tuple[str, str]]) -> str:
    """Headline numbers, each with what it is of.

    Args:
        items: Number and its description.
    """
    shown = "".join(f"<div><dt>{text}</dt><dd>{number}</dd></div>" for number, text in items)
    return f'<dl class="facts">{shown}</dl>'
