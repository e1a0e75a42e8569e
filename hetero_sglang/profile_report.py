"""A profile as one page for people: HTML and SVG, without scripts and without the network.

Every number is in the page's text or in a tooltip, so that nothing has to be read off a colour.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.profile import HeadRole
from hetero_sglang.profile_commands import budget_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from hetero_sglang.profile import HeadProfile

__all__ = ["render_report"]

_CELL = 18
_MARGIN = 30
_NUM_BINS = 20
_MOST_HEADS_IN_MATRICES = 16
"""A matrix of more heads a layer would be too small to see; then only the histogram is drawn."""

_WHAT_ROLES_DO = {
    HeadRole.ANCHOR: "looks at the same tokens throughout; keeps its best ones, chosen once",
    HeadRole.VOLATILE: "looks at something new at every step; keeps everything",
    HeadRole.PIVOT: "speaks for its group: watches its own attention for drift",
    HeadRole.SATELLITE: "looks where its pivot looks; gets new rows when the pivot drifts",
}

_STYLE = """
:root { color-scheme: light dark;
  --page: #ffffff; --text: #1c2024; --soft: #60646c; --line: #d9d9e0;
  --anchor: #3e63dd; --volatile: #e5484d; --pivot: #f5a623; --satellite: #46a758; --ink: #1c2024; }
@media (prefers-color-scheme: dark) {
  :root { --page: #111113; --text: #edeef0; --soft: #b0b4ba; --line: #43484e;
    --anchor: #849dff; --volatile: #ff9592; --pivot: #ffca16; --satellite: #71d083;
    --ink: #111113; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: .5rem 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p, li { max-width: 46rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; } .fit svg { max-width: 100%; height: auto; } svg { display: block; }
svg text { fill: var(--soft); font-size: 10px; }
svg .mark { fill: var(--ink); text-anchor: middle; } .axis { stroke: var(--line); }
.threshold { stroke: var(--text); stroke-dasharray: 4 3; }
.anchor { fill: var(--anchor); } .volatile { fill: var(--volatile); }
.pivot { fill: var(--pivot); } .satellite { fill: var(--satellite); }
.value { fill: var(--anchor); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .4em; }
.matrices { display: flex; flex-wrap: wrap; gap: .75rem; margin-top: .75rem; } figure { margin: 0; }
figcaption { font-size: .8rem; color: var(--soft); }
table { border-collapse: collapse; } th, td { padding: .25rem .75rem; text-align: right;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
"""


def render_report(
    profile: HeadProfile,
    *,
    ratios: Sequence[float] = (0.15, 0.3, 0.5, 0.75, 1.0),
    prompt_tokens: Sequence[int] = (32_768, 131_072),
) -> str:
    """The page of a profile.

    Args:
        profile: The profile.
        ratios: Resident shares in the tables.
        prompt_tokens: Prompt lengths in the tables.

    Returns:
        An HTML document that needs nothing else.
    """
    name = profile.provenance.model or profile.model.architecture or "unnamed model"
    sections = [
        _head(profile, name),
        _role_map(profile),
        _stability(profile),
        _similarity(profile),
        _weights(profile),
        *(_budgets(profile, num_tokens, ratios) for num_tokens in prompt_tokens),
        _origin(profile),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Head profile of {escape(name)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _head(profile: HeadProfile, name: str) -> str:
    model = profile.model
    roles = "".join(
        f'<li><span class="swatch" style="background: var(--{_css(role)})"></span>'
        f"<b>{count} {role.name.lower()}</b>: {_WHAT_ROLES_DO[role]}</li>"
        for role, count in profile.counts.items()
    )
    return (
        f"<h1>Head profile of {escape(name)}</h1>"
        f'<p class="soft">{model.num_layers} layers of {model.num_q_heads} query and '
        f"{model.num_kv_heads} KV heads; fingerprint {profile.fingerprint}, digest "
        f"{profile.digest[:16]}</p><ul>{roles}</ul>"
    )


def _role_map(profile: HeadProfile) -> str:
    pivot_of = {
        (layer, head): pivot
        for (layer, pivot), heads in profile.satellites_of.items()
        for head in heads
    }

    def cell(layer: int, head: int) -> tuple[str, float, str, str]:
        role = HeadRole(profile.roles[layer, head])
        mark = {HeadRole.PIVOT: "P", HeadRole.SATELLITE: str(pivot_of.get((layer, head), ""))}
        return _css(role), 1.0, mark.get(role, ""), _tooltip(profile, layer, head, pivot_of)

    return (
        "<h2>Roles</h2><p>A column is a layer, a row a KV head. P marks a pivot; a satellite bears "
        f"its pivot's number.</p>{_grid(profile, cell)}"
    )


def _stability(profile: HeadProfile) -> str:
    if profile.stability is None:
        return "<h2>Stability</h2><p>Not recorded in this profile.</p>"
    values = profile.stability
    line = None if profile.thresholds is None else profile.thresholds.stable
    below = "" if line is None else f" {int((values < line).sum())} heads are below {line:g}."
    series = [(_css(role), values[profile.roles == role]) for role in HeadRole]
    return (
        "<h2>Stability</h2><p>Share of a head's best prompt positions that stay its best while "
        f"decoding, median over the steps. Least {values.min():.2f}, median "
        f"{np.median(values):.2f}, greatest {values.max():.2f}.{below}</p>"
        + _histogram(series, line, "stability", "heads")
    )


def _similarity(profile: HeadProfile) -> str:
    if profile.similarity is None:
        return "<h2>Similarity</h2><p>Not recorded in this profile.</p>"
    count = profile.num_kv_heads
    upper = np.triu_indices(count, 1)
    pairs = profile.similarity[:, upper[0], upper[1]].ravel()
    line = None if profile.thresholds is None else profile.thresholds.similarity
    text = (
        "<h2>Similarity</h2><p>Share of best prompt positions that two heads of a layer have in "
        "common at the end of the prompt."
    )
    if pairs.size:
        text += f" Over {pairs.size} pairs: median {np.median(pairs):.2f}."
    text += "</p>" + _histogram([("value", pairs)], line, "similarity", "pairs of heads")
    if count > _MOST_HEADS_IN_MATRICES:
        return text + f'<p class="soft">Matrices of {count} heads a layer are not drawn.</p>'
    drawn = "".join(_matrix(layer, values) for layer, values in enumerate(profile.similarity))
    return f'{text}<div class="matrices">{drawn}</div>'


def _weights(profile: HeadProfile) -> str:
    largest = float(profile.allocation.max()) or 1.0

    def cell(layer: int, head: int) -> tuple[str, float, str, str]:
        weight = float(profile.allocation[layer, head])
        role = HeadRole(profile.roles[layer, head]).name.lower()
        text = f"layer {layer}, head {head}: weight {weight:.3f} ({role})"
        return "value", weight / largest, "", text

    return (
        "<h2>Budget by head</h2><p>Heads that move more get more of the budget: weights of "
        f"anchors and satellites, mean 1, greatest {largest:.2f}. A pivot's budget has weight 1 "
        "(by default) or is everything (preset paper); volatile heads keep everything.</p>"
        + _grid(profile, cell)
    )


def _budgets(profile: HeadProfile, num_tokens: int, ratios: Sequence[float]) -> str:
    full = profile.num_heads * num_tokens * 4 * profile.model.head_dim
    rows = []
    for row in budget_rows(profile, num_tokens, list(ratios)):
        if row.base is None:
            cells = [f"not above the floor, {row.floor:.1%}", "", "", ""]
        else:
            size = "" if row.num_bytes is None else f"{row.num_bytes / 2**20:,.0f}"
            cells = [*(f"{n:,}" for n in (row.base, row.least, row.most)), size]
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{row.preset}</td><td>{row.ratio:g}</td>{body}</tr>")
    size = f"; full attention holds {full / 2**20:,.0f} MiB" if full else ""
    head = "".join(
        f"<th>{text}</th>"
        for text in ("preset", "ratio", "tokens a head", "least", "most", "MiB on the device")
    )
    return (
        f"<h2>A prompt of {num_tokens:,} tokens</h2><p>16-bit KV{size}.</p>"
        f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
    )


def _origin(profile: HeadProfile) -> str:
    made = profile.provenance
    facts = {
        "tool": made.tool,
        "texts": ", ".join(made.texts),
        "prompt tokens": str(made.num_prompt_tokens or ""),
        "decoded tokens": str(made.num_decode_steps or ""),
        "best positions": str(made.top_k or ""),
        "dtype": made.dtype,
    }
    items = "".join(f"<li>{key}: {escape(value)}</li>" for key, value in facts.items() if value)
    return f"<h2>How it was made</h2><ul>{items}</ul>" if items else ""


def _tooltip(
    profile: HeadProfile, layer: int, head: int, pivot_of: dict[tuple[int, int], int]
) -> str:
    role = HeadRole(profile.roles[layer, head])
    text = f"layer {layer}, head {head}: {role.name.lower()}"
    if role is HeadRole.SATELLITE:
        text += f" of {pivot_of[layer, head]}"
    if role is HeadRole.PIVOT:
        text += f" of {', '.join(map(str, profile.satellites_of[layer, head]))}"
    if profile.stability is not None:
        text += f", stability {profile.stability[layer, head]:.2f}"
    return text


# -- drawing -------------------------------------------------------------------------------------


def _css(role: HeadRole) -> str:
    return role.name.lower()


def _grid(profile: HeadProfile, cell: Callable[[int, int], tuple[str, float, str, str]]) -> str:
    """Layers by heads; ``cell`` gives class, opacity, mark and tooltip."""
    parts: list[str] = []
    for layer in range(profile.num_layers):
        x = _MARGIN + layer * _CELL
        if layer % 5 == 0:
            parts.append(f'<text x="{x + 3}" y="{_CELL - 6}">{layer}</text>')
        for head in range(profile.num_kv_heads):
            name, opacity, mark, title = cell(layer, head)
            y = (head + 1) * _CELL
            parts.append(_rect(x, y, name, opacity, title, size=_CELL - 2))
            if mark:
                parts.append(f'<text class="mark" x="{x + 8}" y="{y + 12}">{mark}</text>')
    parts += [
        f'<text x="{_MARGIN - 14}" y="{(head + 1) * _CELL + 12}">{head}</text>'
        for head in range(profile.num_kv_heads)
    ]
    width = _MARGIN + profile.num_layers * _CELL
    return f'<div class="wide">{_svg(width, (profile.num_kv_heads + 1) * _CELL, parts)}</div>'


def _histogram(
    series: Iterable[tuple[str, NDArray[np.float64]]], line: float | None, x_name: str, y_name: str
) -> str:
    """Stacked bars over [0, 1], with a dashed line at a threshold."""
    counts = [
        (name, np.histogram(values, bins=_NUM_BINS, range=(0.0, 1.0))[0]) for name, values in series
    ]
    tallest = max(1, int(sum(count for _, count in counts).max()))  # type: ignore[union-attr]
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
    return f'<div class="fit">{_svg(width + 12, height + 20, parts)}</div>'


def _matrix(layer: int, values: NDArray[np.float64]) -> str:
    size = 10
    parts = [
        _rect(
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
    return f"<figure>{_svg(extent, extent, parts)}<figcaption>{layer}</figcaption></figure>"


def _rect(x: int, y: int, name: str, opacity: float, title: str, *, size: int) -> str:
    shade = "" if opacity >= 1.0 else f' fill-opacity="{opacity:.3f}"'
    return (
        f'<rect class="{name}" x="{x}" y="{y}" width="{size}" height="{size}"{shade}>'
        f"<title>{title}</title></rect>"
    )


def _svg(width: int, height: int, parts: list[str]) -> str:
    body = "".join(parts)
    return f'<svg width="{width}" height="{height}" viewBox="0 0 {width} {height}">{body}</svg>'
