"""The section of a page about attention while decoding: do stable heads stay where they are?

The profile promised it on its calibration texts; here it is held against one more prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.profile.compare import rank_correlation
from hetero_sglang.report.curves import Band, Line, band_chart
from hetero_sglang.report.drawing import facts
from hetero_sglang.report.heat_image import HEAT_COLOUR, LEAST_SHOWN, heat_image

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_sglang.profile import HeadProfile
    from hetero_sglang.profiler.behaviour import HeadBehaviour

__all__ = ["attention_map", "attention_section"]

_MOST_MAPS = 3
"""Heads of each kind whose attention is drawn."""


@dataclass(frozen=True)
class _Group:
    """Heads that are drawn as one curve; bool [num_layers, num_kv_heads]."""

    name: str
    is_member: NDArray[np.bool_]

    @property
    def count(self) -> int:
        return int(self.is_member.sum())

    @property
    def heads(self) -> str:
        """What they are called in a sentence, with their number."""
        kind = "" if self.name == "all" else f"{self.name} "
        return f"{self.count} {kind}{'head' if self.count == 1 else 'heads'}"


def attention_section(profile: HeadProfile, behaviour: HeadBehaviour) -> str:
    """How long heads keep looking where they looked at the prompt's end.

    Args:
        profile: Says which heads are stable.
        behaviour: What the same heads did.
    """
    return "".join(
        (
            "<h2>Attention while decoding</h2>",
            _curves(profile, behaviour),
            _most_and_least_stable(profile, behaviour),
        )
    )


def attention_map(behaviour: HeadBehaviour, layer: int, head: int, caption: str) -> str:
    """Where one head looks, step by step, with a caption.

    Args:
        behaviour: What the heads did.
        layer: Layer.
        head: KV head in the layer.
        caption: HTML that follows the head's name.
    """
    masses = behaviour.mass_by_bin[:, layer, head]  # [num_steps + 1, num_bins]
    num_bins = masses.shape[1]
    step, bin_id = np.unravel_index(int(masses.argmax()), masses.shape)
    # The first token of a bin: token p is in bin p * num_bins // num_tokens.
    first, after = (
        -(-edge * behaviour.num_prompt_tokens // num_bins)
        for edge in (int(bin_id), int(bin_id) + 1)
    )
    alt = (
        f"layer {layer}, head {head}: attention by step and position; most, "
        f"{masses[step, bin_id]:.1%}, at step {step} on tokens {first + 1} to {after}"
    )
    return (
        f"<figure>{heat_image(masses, alt=alt)}<figcaption><b>{layer}.{head}</b> {caption}"
        "</figcaption></figure>"
    )


def _heat_scale(behaviour: HeadBehaviour) -> str:
    """How `attention_map` is read: its axes and its logarithmic scale."""
    num_bins = behaviour.mass_by_bin.shape[-1]
    red, green, blue = HEAT_COLOUR
    return (
        '<p class="soft">A row is a step: at the top the prompt\'s last token, at the bottom the '
        f"last of {behaviour.num_steps} decoded ones. A column is one of {num_bins} equal "
        "stretches of the prompt, its beginning on the left. 3.1 is layer 3, head 1.</p>"
        f'<div class="scale">{LEAST_SHOWN:.2%} or less'
        f'<span style="--heat: rgb({red} {green} {blue})"></span>'
        "all of the attention (logarithmic)</div>"
    )


def _curves(profile: HeadProfile, behaviour: HeadBehaviour) -> str:
    groups = _groups(profile)
    shown = [group for group in groups if group.count]
    line = None if profile.thresholds is None else profile.thresholds.stable
    lines = [Line("chance", "random sets", behaviour.overlap_by_chance)]
    text = (
        f"One more prompt of {behaviour.num_prompt_tokens:,} tokens was read and "
        f"{behaviour.num_steps} tokens decoded. Of a head's {behaviour.top_k:,} best positions at "
        "the prompt's end, the curves show the share that are among its best at each step: median "
        "of the heads, and a band from the lower to the upper quartile. Dotted: "
        f"{behaviour.overlap_by_chance:.2f}, what sets drawn at random have in common."
    )
    if line is not None:
        lines.append(Line("threshold", "threshold", line))
        text += f" Dashed: {line:g}, from which on the profile calls a head stable."
    if len(groups) == 1:
        text += " The profile does not record which heads are stable, so all are one group."
    text += "".join(
        f" The profile has no {group.name} head." for group in groups if not group.count
    )
    bands = [Band(group.name, behaviour.overlap_with_prompt[:, group.is_member]) for group in shown]
    legend = "".join(
        f'<li><span class="swatch {group.name}"></span>{group.heads}</li>' for group in shown
    )
    label = "Overlap with the prompt's best positions over decoded tokens"
    return (
        f'<p>{text}</p><ul class="plain">{legend}</ul>{band_chart(bands, lines, label=label)}'
        f"{facts(_facts(profile, behaviour, shown, line))}"
    )


def _facts(
    profile: HeadProfile, behaviour: HeadBehaviour, groups: list[_Group], line: float | None
) -> list[tuple[str, str]]:
    here = np.median(behaviour.overlap_with_prompt, axis=0)  # [num_layers, num_kv_heads]
    found = []
    for group in groups:
        values = behaviour.overlap_with_prompt[:, group.is_member]
        found.append((f"{np.median(values):.2f}", f"median overlap of {group.heads}"))
        if line is not None and group.name != "all":
            agrees = (here[group.is_member] >= line) == (group.name == "stable")
            text = f"{group.name} in the profile and on this prompt, by the median over steps"
            found.append((f"{int(agrees.sum())} of {group.count}", text))
    if profile.stability is not None:
        correlation = rank_correlation(profile.stability, here)
        # Undefined where all heads are alike.
        if np.isfinite(correlation):
            text = "rank correlation of the heads' stability in the profile and on this prompt"
            found.append((f"{correlation:.2f}", text))
    return found


def _most_and_least_stable(profile: HeadProfile, behaviour: HeadBehaviour) -> str:
    here = np.median(behaviour.overlap_with_prompt, axis=0)
    order_by = here if profile.stability is None else profile.stability
    order = np.argsort(order_by, axis=None, kind="stable")
    count = min(_MOST_MAPS, max(1, order.size // 2))
    parts = [_heat_scale(behaviour)]
    for name, heads in (("most", order[::-1][:count]), ("least", order[:count])):
        maps = []
        for layer, head in zip(*np.unravel_index(heads, here.shape), strict=True):
            caption = f"overlap {here[layer, head]:.2f}"
            if profile.stability is not None:
                caption += f", in the profile {profile.stability[layer, head]:.2f}"
            maps.append(attention_map(behaviour, int(layer), int(head), caption))
        where = "on this prompt" if profile.stability is None else "in the profile"
        parts.append(
            f'<h3>The heads {name} stable {where}</h3><div class="maps">{"".join(maps)}</div>'
        )
    return "".join(parts)


def _groups(profile: HeadProfile) -> list[_Group]:
    if profile.stability is None or profile.thresholds is None:
        return [_Group("all", np.ones(profile.roles.shape, dtype=np.bool_))]
    is_stable = profile.stability >= profile.thresholds.stable
    return [_Group("stable", is_stable), _Group("decaying", ~is_stable)]
