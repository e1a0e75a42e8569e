"""A profile as one page for people: HTML and SVG, without scripts and without the network.

This module puts the page together out of its sections. Every number is in the page's text or in a
tooltip, so that nothing has to be read off a colour.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.profile import HeadRole
from hetero_sglang.report.attention import attention_section
from hetero_sglang.report.budgets import budget_rows
from hetero_sglang.report.drawing import grid, histogram, matrix
from hetero_sglang.report.pivots import pivot_section
from hetero_sglang.report.style import STYLE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero_sglang.profile import HeadProfile
    from hetero_sglang.profiler.behaviour import HeadBehaviour

__all__ = ["render_report"]

_MOST_HEADS_IN_MATRICES = 16
"""A matrix of more heads a layer would be too small to see; then only the histogram is drawn."""

_WHAT_ROLES_DO = {
    HeadRole.ANCHOR: "looks at the same tokens throughout; keeps its best ones, chosen once",
    HeadRole.VOLATILE: "looks at something new at every step; keeps everything",
    HeadRole.PIVOT: "speaks for its group: watches its own attention for drift",
    HeadRole.SATELLITE: "looks where its pivot looks; gets new rows when the pivot drifts",
}


def render_report(
    profile: HeadProfile,
    *,
    behaviour: HeadBehaviour | None = None,
    ratios: Sequence[float] = (0.15, 0.3, 0.5, 0.75, 1.0),
    prompt_tokens: Sequence[int] = (32_768, 131_072),
) -> str:
    """The page of a profile.

    Args:
        profile: The profile.
        behaviour: What its heads did on one more prompt; without it those sections are left out.
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
        "" if behaviour is None else attention_section(profile, behaviour),
        "" if behaviour is None else pivot_section(profile, behaviour),
        _origin(profile),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Head profile of {escape(name)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _head(profile: HeadProfile, name: str) -> str:
    model = profile.model
    roles = "".join(
        f'<li><span class="swatch {_css(role)}"></span>'
        f"<b>{count} {role.name.lower()}</b>: {_WHAT_ROLES_DO[role]}</li>"
        for role, count in profile.counts.items()
    )
    return (
        f"<h1>Head profile of {escape(name)}</h1>"
        f'<p class="soft">{model.num_layers} layers of {model.num_q_heads} query and '
        f"{model.num_kv_heads} KV heads; fingerprint {profile.fingerprint}, digest "
        f'{profile.digest[:16]}</p><ul class="plain">{roles}</ul>'
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
        f"its pivot's number.</p>{grid(profile.num_layers, profile.num_kv_heads, cell)}"
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
        + histogram(series, line, "stability", "heads")
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
    text += "</p>" + histogram([("value", pairs)], line, "similarity", "pairs of heads")
    if count > _MOST_HEADS_IN_MATRICES:
        return text + f'<p class="soft">Matrices of {count} heads a layer are not drawn.</p>'
    drawn = "".join(matrix(layer, values) for layer, values in enumerate(profile.similarity))
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
        + grid(profile.num_layers, profile.num_kv_heads, cell)
    )


def _budgets(profile: HeadProfile, num_tokens: int, ratios: Sequence[float]) -> str:
    full = profile.num_heads * num_tokens * 4 * profile.model.head_dim
    rows = []
    for row in budget_rows(profile, num_tokens, list(ratios)):
        if row.base is None:
            body = f'<td colspan="4">not above the floor, {row.floor:.1%}</td>'
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


def _css(role: HeadRole) -> str:
    return role.name.lower()
