from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hetero_sglang.profile import HeadProfile, Thresholds, shipped_profiles
from hetero_sglang.profile.compare import rank_correlation
from hetero_sglang.report.attention import attention_section
from tests.html_page import Page, says_nan
from tests.synthetic_behaviour import synthetic_behaviour

if TYPE_CHECKING:
    from hetero_sglang.profiler.behaviour import HeadBehaviour

NUM_STEPS = 6


@pytest.fixture(scope="module")
def profile() -> HeadProfile:
    return shipped_profiles()["smollm2-135m-instruct"]


@pytest.fixture(scope="module")
def behaviour(profile: HeadProfile) -> HeadBehaviour:
    return synthetic_behaviour(profile, num_steps=NUM_STEPS)


def test_headline_numbers_are_those_of_the_arrays(
    profile: HeadProfile, behaviour: HeadBehaviour
) -> None:
    page = Page(attention_section(profile, behaviour))

    assert profile.stability is not None
    is_stable = profile.stability >= 0.5
    overlaps, here = behaviour.overlap_with_prompt, np.median(behaviour.overlap_with_prompt, axis=0)
    agreeing = "in the profile and on this prompt, by the median over steps"
    assert page.facts == {
        "median overlap of 85 stable heads": f"{np.median(overlaps[:, is_stable]):.2f}",
        f"stable {agreeing}": f"{(here[is_stable] >= 0.5).sum()} of 85",
        "median overlap of 5 decaying heads": f"{np.median(overlaps[:, ~is_stable]):.2f}",
        f"decaying {agreeing}": f"{(here[~is_stable] < 0.5).sum()} of 5",
        "rank correlation of the heads' stability in the profile and on this prompt": (
            f"{rank_correlation(profile.stability, here):.2f}"
        ),
    }
    for text in ("400 tokens was read and 6 tokens decoded", "100 best positions", "Dotted: 0.25"):
        assert text in page.text
    assert "Dashed: 0.5" in page.text


def test_tooltips_tell_median_and_quartiles_of_each_group_at_each_step(
    profile: HeadProfile, behaviour: HeadBehaviour
) -> None:
    page = Page(attention_section(profile, behaviour))

    assert profile.stability is not None
    expected = []
    for step, overlaps in enumerate(behaviour.overlap_with_prompt, start=1):
        told = []
        for name, members in (
            ("stable", overlaps[profile.stability >= 0.5]),
            ("decaying", overlaps[profile.stability < 0.5]),
        ):
            low, middle, high = np.quantile(members, [0.25, 0.5, 0.75])
            told.append(f"{name} {middle:.2f} ({low:.2f} to {high:.2f})")
        expected.append(f"step {step}: {', '.join(told)}")
    assert [text for text in page.tooltips if text.startswith("step")] == expected
    assert page.count("polyline", "curve") == page.count("polygon", "band") == 2


def test_maps_are_of_the_most_and_the_least_stable_heads(
    profile: HeadProfile, behaviour: HeadBehaviour
) -> None:
    page = Page(attention_section(profile, behaviour))

    assert profile.stability is not None
    order = np.argsort(profile.stability, axis=None, kind="stable")
    expected = [divmod(int(index), 3) for index in (*order[::-1][:3], *order[:3])]
    shown = [re.match(r"layer (\d+), head (\d+):", image["alt"]) for image in page.images]
    assert [(int(found[1]), int(found[2])) for found in shown if found] == expected
    for layer, head in expected:
        overlap = np.median(behaviour.overlap_with_prompt[:, layer, head])
        assert (
            f"{layer}.{head} overlap {overlap:.2f}, in the profile "
            f"{profile.stability[layer, head]:.2f}"
        ) in page.text
    assert {(image["width"], image["height"]) for image in page.images} == {("8", "7")}


def test_a_map_tells_its_greatest_mass_and_where_it_is(
    profile: HeadProfile, behaviour: HeadBehaviour
) -> None:
    assert profile.stability is not None
    layer, head = divmod(int(np.argmax(profile.stability)), 3)
    masses = np.full_like(behaviour.mass_by_bin, 0.01)
    masses[4, layer, head, 2] = 0.625
    behaviour = dataclasses.replace(behaviour, mass_by_bin=masses)

    (image, *_) = Page(attention_section(profile, behaviour)).images

    # Stretches of 50 of the 400 tokens.
    assert image["alt"] == image["title"]
    assert image["alt"].endswith("most, 62.5%, at step 4 on tokens 101 to 150")


@pytest.mark.parametrize(("threshold", "missing"), [(0.0, "decaying"), (1.0, "stable")])
def test_a_group_without_heads_is_said_and_not_drawn(
    profile: HeadProfile, behaviour: HeadBehaviour, threshold: float, missing: str
) -> None:
    thresholds = Thresholds(stable=threshold, similarity=0.5)
    html = attention_section(dataclasses.replace(profile, thresholds=thresholds), behaviour)

    page = Page(html)

    assert f"The profile has no {missing} head." in page.text
    assert page.count("polyline", "curve") == 1
    assert not any(missing in description for description in page.facts)
    assert not says_nan(html)


@pytest.mark.parametrize("absent", ["stability", "thresholds"])
def test_heads_of_unrecorded_stability_are_one_group(
    profile: HeadProfile, behaviour: HeadBehaviour, absent: str
) -> None:
    changes: dict[str, Any] = {absent: None}
    html = attention_section(dataclasses.replace(profile, **changes), behaviour)

    page = Page(html)

    assert "does not record which heads are stable" in page.text
    assert page.facts["median overlap of 90 heads"] == (
        f"{np.median(behaviour.overlap_with_prompt):.2f}"
    )
    assert page.count("polyline", "curve") == 1
    assert not says_nan(html)
    if absent == "stability":
        here = np.median(behaviour.overlap_with_prompt, axis=0)
        layer, head = divmod(int(np.argmax(here)), 3)
        assert page.images[0]["alt"].startswith(f"layer {layer}, head {head}:")


def test_heads_that_are_all_alike_have_no_rank_correlation(
    profile: HeadProfile, behaviour: HeadBehaviour
) -> None:
    alike = dataclasses.replace(
        behaviour, overlap_with_prompt=np.full_like(behaviour.overlap_with_prompt, 0.75)
    )
    html = attention_section(profile, alike)

    assert not any("rank correlation" in description for description in Page(html).facts)
    assert not says_nan(html)
