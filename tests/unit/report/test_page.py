"""The page of a profile: whole, self-contained, and with the numbers of the profile."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from hetero_sglang.profile import HeadProfile, ModelShape, Provenance, shipped_profiles
from hetero_sglang.report import render_report
from tests.html_page import Page, says_nan
from tests.synthetic_behaviour import synthetic_behaviour

NAME = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def profile() -> HeadProfile:
    return shipped_profiles()[NAME]


def test_the_page_shows_every_head_once_in_each_map(profile: HeadProfile) -> None:
    page = Page(render_report(profile))
    roles = [text for text in page.tooltips if re.match(r"layer \d+, head \d+: \w+( of|,|$)", text)]
    assert len(roles) == 90
    assert sum("pivot of" in text for text in roles) == 30
    assert sum("satellite of" in text for text in roles) == 58
    assert sum("volatile" in text for text in roles) == 2
    assert sum("weight" in text for text in page.tooltips) == 90
    # Three by three for each layer.
    assert sum(", heads " in text for text in page.tooltips) == 270
    binned = [re.search(r": (\d+) heads", text) for text in page.tooltips]
    assert sum(int(found[1]) for found in binned if found) == 90


def test_the_page_has_the_numbers_of_the_profile(profile: HeadProfile) -> None:
    page = Page(render_report(profile, ratios=(0.3,), prompt_tokens=(10_000,)))
    assert "A prompt of 10,000 tokens" in page.text
    assert f"{int((27 - 2 - 30 * 66 / 256) * 10_000 / 88):,}" in page.text
    assert "not above the floor, 35.6%" in page.text
    assert profile.digest[:16] in page.text
    assert "hetero-sglang" in page.text


def test_nothing_is_fetched_and_nothing_runs(profile: HeadProfile) -> None:
    text = render_report(profile, behaviour=synthetic_behaviour(profile))
    assert "<script" not in text
    assert "url(" not in text
    page = Page(text)
    for tag, attributes in page.elements:
        assert not attributes.keys() & {"href", "xlink:href", "srcset"}
        assert "src" not in attributes or tag == "img"
    assert page.images
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.images)
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_names_cannot_break_out_of_the_page(profile: HeadProfile) -> None:
    bad = Provenance(model="<script>alert(1)</script>", tool='"><img src=x>', texts=("<b>",))
    text = render_report(dataclasses.replace(profile, provenance=bad))
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text


def test_what_was_not_recorded_is_said(profile: HeadProfile) -> None:
    bare = dataclasses.replace(profile, stability=None, similarity=None, thresholds=None)
    assert Page(render_report(bare)).text.count("Not recorded in this profile.") == 2


def test_what_heads_did_is_shown_only_where_it_was_watched(profile: HeadProfile) -> None:
    titles = ("Attention while decoding", "Is the pivot representative?")

    without = Page(render_report(profile))
    watched = Page(render_report(profile, behaviour=synthetic_behaviour(profile)))

    assert not any(title in without.text for title in titles)
    assert not without.facts
    assert all(title in watched.text for title in titles)
    # The profile's own half is the same.
    assert watched.tooltips[: len(without.tooltips)] == without.tooltips


def test_the_page_of_a_small_model_is_small(profile: HeadProfile) -> None:
    behaviour = synthetic_behaviour(profile, num_steps=64, num_bins=64)

    assert len(render_report(profile, behaviour=behaviour).encode()) < 1_000_000


def test_every_colour_has_a_light_and_a_dark_shade(profile: HeadProfile) -> None:
    style = Page(render_report(profile)).text
    light, _, dark = style.partition("prefers-color-scheme: dark")
    names = re.compile(r"(--[\w-]+): #")

    assert names.findall(light)
    assert set(names.findall(light)) == set(names.findall(dark))


@pytest.mark.parametrize("role", [1, 2])
def test_the_page_of_the_smallest_profile_is_whole(role: int) -> None:
    profile = HeadProfile(
        model=ModelShape(num_layers=1, num_q_heads=1, num_kv_heads=1),
        roles=np.array([[role]]),
        allocation=np.array([[float(role == 1)]]),
        satellites_of={},
    )
    behaviour = synthetic_behaviour(profile, num_steps=1, num_bins=1)

    html = render_report(profile, behaviour=behaviour)

    assert not says_nan(html)
    assert "The profile has no satellites" in Page(html).text
