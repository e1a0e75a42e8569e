"""Budgets of compressed heads: the paper's formula, water-filling and refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hetero_sglang.errors import BudgetError
from hetero_sglang.policy.budget import allocate_budget, base_budget, check_ratio, water_fill


def test_base_follows_the_papers_formula() -> None:
    # (0.5 * 256 - 50) * 4096 / 206, Llama-3.1-8B's published counts.
    assert base_budget(0.5, 4096, 50, 256) == 1550


def test_without_clamping_each_head_gets_base_times_its_weight() -> None:
    allocation = np.array([0.5, 0.9, 1.1, 1.5])
    budget = allocate_budget(
        allocation, 2000, ratio=0.5, num_resident=2, num_heads=6, min_tokens=1024
    )
    assert budget.base == 500
    assert budget.tokens.tolist() == [250, 450, 550, 750]


def test_what_a_clamped_head_leaves_goes_to_the_others_in_proportion() -> None:
    shares = water_fill(np.array([4.0, 1.0, 1.0]), total=12.0, cap=6.0)
    assert shares.tolist() == [6.0, 3.0, 3.0]


def test_ratio_one_keeps_everything_even_for_light_heads() -> None:
    allocation = np.array([0.57, 1.43])
    budget = allocate_budget(
        allocation, 3000, ratio=1.0, num_resident=2, num_heads=4, min_tokens=1024
    )
    assert budget.keeps_everything
    assert budget.tokens.tolist() == [3000, 3000]


def test_short_prompts_keep_everything() -> None:
    budget = allocate_budget(
        np.ones(2), 1023, ratio=0.6, num_resident=2, num_heads=4, min_tokens=1024
    )
    assert budget.keeps_everything
    assert not allocate_budget(
        np.ones(2), 1024, ratio=0.6, num_resident=2, num_heads=4, min_tokens=1024
    ).keeps_everything


def test_a_ratio_at_the_floor_is_refused_with_the_floor() -> None:
    with pytest.raises(BudgetError, match=r"0\.5 is not above the floor 0\.5000"):
        base_budget(0.5, 4096, 2, 4)


def test_a_ratio_that_leaves_no_token_names_the_least_ratio_that_does() -> None:
    with pytest.raises(BudgetError, match=r"use at least 0\.5005") as error:
        check_ratio(0.5001, 2, 4, 1024)
    least = float(str(error.value).split("at least ")[1].split()[0])
    check_ratio(least + 1e-4, 2, 4, 1024)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, math.nan])
def test_ratios_outside_their_range_are_refused(ratio: float) -> None:
    with pytest.raises(BudgetError, match="kv-policy-ratio must be in"):
        check_ratio(ratio, 1, 4, 1024)
