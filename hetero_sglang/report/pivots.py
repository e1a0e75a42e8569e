"""The section of a page about clusters: does a pivot look where its satellites look?

In serving a satellite gets the rows that its pivot looks at. The two were alike at the end of the
calibration texts; here they are compared at every step of one more prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.report.attention import attention_map
from hetero_sglang.report.curves import sparkline
from hetero_sglang.report.drawing import facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from hetero_sglang.profile import HeadProfile
    from hetero_sglang.profiler.behaviour import HeadBehaviour

__all__ = ["pivot_section"]

_MOST_SPARKLINES = 64


@dataclass(frozen=True)
class _Follower:
    """A satellite beside its pivot.

    Attributes:
        layer: Layer of both.
        head: The satellite.
        pivot: Its pivot.
        overlaps: Overlap of their best positions, [num_steps + 1].
        on_pivot: Attention of the satellite to its pivot's best positions, mean over steps.
        on_own: Attention to its own best positions.
    """

    layer: int
    head: int
    pivot: int
    overlaps: NDArray[np.float64]
    on_pivot: float
    on_own: float

    @property
    def median(self) -> float:
        """Of the overlap, over steps."""
        return float(np.median(self.overlaps))


def pivot_section(profile: HeadProfile, behaviour: HeadBehaviour) -> str:
    """Whether the pivots' best positions serve their satellites.

    Args:
        profile: Says which head follows which.
        behaviour: What the same heads did.
    """
    title = "<h2>Is the pivot representative?</h2>"
    followers = _worst_first(profile, behaviour)
    if not followers:
        return f"{title}<p>The profile has no satellites: no head speaks for another.</p>"
    line = None if profile.thresholds is None else profile.thresholds.similarity
    return "".join(
        (
            title,
            "<p>A satellite is refreshed with the positions that its pivot looks at. So the two "
            "must look at the same ones not only at the prompt's end, where the profile compared "
            f"them, but at every decoded token too. Compared are their {behaviour.top_k:,} best "
            f"positions; sets drawn at random have {behaviour.overlap_by_chance:.2f} in common."
            "</p>",
            facts(_headline(followers, line)),
            _sparklines(followers, line),
            '<div class="halves">',
            _pair(behaviour, "best", followers[-1]),
            _pair(behaviour, "worst", followers[0]),
            "</div>",
        )
    )


def _worst_first(profile: HeadProfile, behaviour: HeadBehaviour) -> list[_Follower]:
    followers = [
        _Follower(
            layer,
            head,
            pivot,
            behaviour.overlap_with_pivot[:, layer, head],
            float(behaviour.mass_on_pivot[:, layer, head].mean()),
            float(behaviour.mass_on_own[:, layer, head].mean()),
        )
        for (layer, pivot), heads in profile.satellites_of.items()
        for head in heads
    ]
    return sorted(followers, key=lambda follower: follower.median)


def _headline(followers: Sequence[_Follower], line: float | None) -> list[tuple[str, str]]:
    overlaps = np.stack([follower.overlaps for follower in followers])
    index, step = np.unravel_index(int(overlaps.argmin()), overlaps.shape)
    least = followers[int(index)]
    items = [
        (f"{np.median(overlaps):.2f}", "median overlap of a satellite with its pivot"),
        (
            f"{overlaps.min():.2f}",
            f"least overlap: layer {least.layer}, head {least.head} at step {step}",
        ),
    ]
    if line is not None:
        count = sum(follower.median < line for follower in followers)
        text = (
            f"satellites ({count / len(followers):.1%}) are under the profile's threshold of "
            f"similarity, {line:g}, by the median over steps"
        )
        items.append((f"{count} of {len(followers)}", text))
    on_pivot = np.mean([follower.on_pivot for follower in followers])
    on_own = np.mean([follower.on_own for follower in followers])
    return [
        *items,
        (
            f"{on_pivot:.1%}",
            "of a satellite's attention, on average, is on its pivot's best positions",
        ),
        (f"{on_own:.1%}", "of a satellite's attention, on average, is on its own best positions"),
    ]


def _sparklines(followers: Sequence[_Follower], line: float | None) -> str:
    drawn = followers[:_MOST_SPARKLINES]
    text = (
        "Overlap over the steps, 0 at the bottom and 1 at the top, worst satellites first. Under "
        "each curve: median, satellite → pivot."
    )
    if line is not None:
        text += f" Dashed: the threshold, {line:g}."
    if len(drawn) < len(followers):
        text += f" Drawn are the worst {len(drawn)} of {len(followers)} satellites."
    figures = "".join(
        f"<figure>{sparkline(follower.overlaps, line, title=_told(follower))}<figcaption>"
        f"<b>{follower.median:.2f}</b> {follower.layer}.{follower.head} → "
        f"{follower.layer}.{follower.pivot}</figcaption></figure>"
        for follower in drawn
    )
    return f'<h3>Each satellite and its pivot</h3><p>{text}</p><div class="sparks">{figures}</div>'


def _told(follower: _Follower) -> str:
    step = int(follower.overlaps.argmin())
    return (
        f"layer {follower.layer}, head {follower.head} follows head {follower.pivot}: overlap "
        f"{follower.median:.2f} in the median, least {follower.overlaps[step]:.2f} at step {step}; "
        f"{follower.on_pivot:.1%} of its attention on the pivot's best positions, "
        f"{follower.on_own:.1%} on its own"
    )


def _pair(behaviour: HeadBehaviour, name: str, follower: _Follower) -> str:
    layer = follower.layer
    return (
        f"<div><h3>The {name} represented satellite</h3>"
        f"<p>Overlap with its pivot {follower.median:.2f} in the median over steps; "
        f"{follower.on_pivot:.1%} of its attention is on the pivot's best positions, "
        f'{follower.on_own:.1%} on its own.</p><div class="maps">'
        f"{attention_map(behaviour, layer, follower.head, 'satellite')}"
        f"{attention_map(behaviour, layer, follower.pivot, 'pivot')}</div></div>"
    )
