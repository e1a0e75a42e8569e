from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hetero_sglang.profile import HeadProfile, HeadRole, ModelShape, shipped_profiles
from hetero_sglang.report.pivots import pivot_section
from tests.html_page import Page, says_nan
from tests.synthetic_behaviour import synthetic_behaviour

if TYPE_CHECKING:
    from hetero_sglang.profiler.behaviour import HeadBehaviour


@pytest.fixture(scope="module")
def profile() -> HeadProfile:
    return shipped_profiles()["smollm2-135m-instruct"]


@pytest.fixture(scope="module")
def behaviour(profile: HeadProfile) -> HeadBehaviour:
    return synthetic_behaviour(profile)


def one_cluster(num_heads: int) -> HeadProfile:
    """A layer whose first head is the pivot of all others; no thresholds."""
    weights = np.ones((1, num_heads))
    weights[0, 0] = 0.0
    return HeadProfile(
        model=ModelShape(num_layers=1, num_q_heads=num_heads, num_kv_heads=num_heads),
        roles=np.array([[HeadRole.PIVOT, *[HeadRole.SATELLITE] * (num_heads - 1)]]),
        allocation=weights,
        satellites_of={(0, 0): tuple(range(1, num_heads))},
    )


def test_headline_numbers_are_those_of_the_arrays(
    profile: HeadProfile, behaviour: HeadBehaviour
) -> None:
    page = Page(pivot_section(profile, behaviour))

    is_satellite = profile.roles == HeadRole.SATELLITE
    overlaps = behaviour.overlap_with_pivot
    step, layer, head = np.unravel_index(np.nanargmin(overlaps), overlaps.shape)
    under = int((np.median(overlaps[:, is_satellite], axis=0) < 0.5).sum())
    of_attention = "of a satellite's attention, on average, is on its"
    assert page.facts == {
        "median overlap of a satellite with its pivot": (
            f"{np.median(overlaps[:, is_satellite]):.2f}"
        ),
        f"least overlap: layer {layer}, head {head} at step {step}": f"{np.nanmin(overlaps):.2f}",
        f"satellites ({under / 58:.1%}) are under the profile's threshold of similarity, 0.5, by "
        "the median over steps": f"{under} of 58",
        f"{of_attention} pivot's best positions": f"{np.nanmean(behaviour.mass_on_pivot):.1%}",
        f"{of_attention} own best positions": f"{np.nanmean(behaviour.mass_on_own):.1%}",
    }
    assert "100 best positions; sets drawn at random have 0.25 in common" in page.text


def test_every_satellite_has_a_curve_the_worst_first(
    profile: HeadProfile, behaviour: HeadBehaviour
) -> None:
    page = Page(pivot_section(profile, behaviour))

    told = re.compile(r"layer (\d+), head (\d+) follows head (\d+): overlap ([\d.]+) in the median")
    shown = [match for text in page.tooltips if (match := told.match(text))]
    heads = [(int(match[1]), int(match[2])) for match in shown]
    assert sorted(heads) == sorted(
        (layer, head) for layer, head in np.argwhere(profile.roles == HeadRole.SATELLITE).tolist()
    )
    medians = [float(np.median(behaviour.overlap_with_pivot[:, *head])) for head in heads]
    assert medians == sorted(medians)
    for match, median in zip(shown, medians, strict=True):
        layer, head, pivot = (int(match[index]) for index in (1, 2, 3))
        assert match[4] == f"{median:.2f}"
        assert head in profile.satellites_of[layer, pivot]
        assert f"{median:.2f} {layer}.{head} → {layer}.{pivot}" in page.text
    assert page.count("polyline", "spark") == page.count("line", "threshold") == 58
    assert "Drawn are the worst" not in page.text


def test_a_curve_tells_its_least_overlap_and_both_masses(
    profile: HeadProfile, behaviour: HeadBehaviour
) -> None:
    page = Page(pivot_section(profile, behaviour))

    layer, head = np.argwhere(profile.roles == HeadRole.SATELLITE)[0]
    overlaps = behaviour.overlap_with_pivot[:, layer, head]
    (told,) = (text for text in page.tooltips if f"layer {layer}, head {head} follows" in text)
    assert f"least {overlaps.min():.2f} at step {overlaps.argmin()};" in told
    on_pivot = behaviour.mass_on_pivot[:, layer, head].mean()
    on_own = behaviour.mass_on_own[:, layer, head].mean()
    assert told.endswith(
        f"{on_pivot:.1%} of its attention on the pivot's best positions, {on_own:.1%} on its own"
    )


def test_a_curve_runs_from_the_prompts_end_to_the_last_step() -> None:
    profile = one_cluster(2)
    behaviour = synthetic_behaviour(profile, num_steps=2)
    behaviour.overlap_with_pivot[:, 0, 1] = [1.0, 0.5, 0.0]

    page = Page(pivot_section(profile, behaviour))

    (curve,) = (attributes for tag, attributes in page.elements if tag == "polyline")
    assert curve["points"] == "0.0,2.0 52.0,26.0 104.0,50.0"


def test_the_best_and_the_worst_represented_are_shown_beside_their_pivots(
    profile: HeadProfile, behaviour: HeadBehaviour
) -> None:
    page = Page(pivot_section(profile, behaviour))

    medians = np.median(behaviour.overlap_with_pivot, axis=0)
    expected = []
    for index in (np.nanargmax(medians), np.nanargmin(medians)):
        layer, head = divmod(int(index), 3)
        (pivot,) = (
            pivot
            for (of, pivot), heads in profile.satellites_of.items()
            if of == layer and head in heads
        )
        expected += [(layer, head), (layer, pivot)]
    shown = [re.match(r"layer (\d+), head (\d+):", image["alt"]) for image in page.images]
    assert [(int(found[1]), int(found[2])) for found in shown if found] == expected


def test_no_more_than_the_64_worst_satellites_are_drawn() -> None:
    profile = one_cluster(101)

    page = Page(pivot_section(profile, synthetic_behaviour(profile)))

    assert page.count("polyline", "spark") == 64
    assert "Drawn are the worst 64 of 100 satellites." in page.text


def test_without_a_threshold_nothing_is_said_to_be_under_it() -> None:
    profile = one_cluster(4)
    html = pivot_section(profile, synthetic_behaviour(profile))

    page = Page(html)

    assert page.count("line", "threshold") == 0
    assert len(page.facts) == 4
    assert "threshold" not in page.text
    assert not says_nan(html)


def test_a_profile_without_satellites_says_so(
    profile: HeadProfile, behaviour: HeadBehaviour
) -> None:
    none = dataclasses.replace(
        profile,
        roles=np.full_like(profile.roles, HeadRole.VOLATILE),
        allocation=np.zeros_like(profile.allocation),
        satellites_of={},
    )
    html = pivot_section(none, synthetic_behaviour(none))

    page = Page(html)

    assert "The profile has no satellites" in page.text
    assert not page.images
    assert not says_nan(html)
