"""Budgets of compressed heads: the paper's formula, water-filling and refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hetero_sglang.errors import BudgetError
from hetero_sglang.policy.budget import BudgetRule, allocate_budget, water_fill


def rule(ratio: float, held: float, num_heads: int, **changes: Any) -> BudgetRule:
    return BudgetRule(
        ratio=ratio, held_heads=held, num_heads=num_heads, **{"min_tokens": 1024, **changes}
    )


def test_base_follows_the_papers_formula() -> None:
    # (0.5 * 256 - 50) * 4096 / 206, Llama-3.1-8B's published counts.
    assert rule(0.5, 50, 256).base(4096, 206) == 1550


def test_base_with_budgeted_pivots_pays_for_their_watched_keys() -> None:
    # The same model: 17 volatile heads, and 33 pivots whose int8 keys are 130 of 512 bytes.
    held = 17 + 33 * 130 / 512
    assert rule(0.15, held, 256).base(4096, 239) == int((0.15 * 256 - held) * 4096 / 239)


def test_without_clamping_each_head_gets_base_times_its_weight() -> None:
    allocation = np.array([0.5, 0.9, 1.1, 1.5])
    for is_filling in (True, False):
        budget = allocate_budget(allocation, 2000, rule(0.5, 2, 6, is_filling=is_filling))
        assert budget.base == 500
        assert budget.tokens.tolist() == [250, 450, 550, 750]


def test_what_a_clamped_head_leaves_goes_to_the_others_in_proportion() -> None:
    shares = water_fill(np.array([4.0, 1.0, 1.0]), total=12.0, cap=6.0)
    assert shares.tolist() == [6.0, 3.0, 3.0]


def test_what_a_clamped_head_leaves_is_lost_in_the_papers_formula() -> None:
    budget = allocate_budget(np.array([1.5, 0.5]), 2000, rule(0.8, 0, 2, is_filling=False))
    assert budget.tokens.tolist() == [2000, 800]


def test_ratio_one_keeps_everything_even_for_light_heads() -> None:
    allocation = np.array([0.57, 1.43])
    budget = allocate_budget(allocation, 3000, rule(1.0, 2, 4))
    assert budget.keeps_everything
    assert budget.tokens.tolist() == [3000, 3000]
    # In the paper's formula it does not.
    budget = allocate_budget(allocation, 3000, rule(1.0, 2, 4, is_filling=False))
    assert budget.tokens.tolist() == [1710, 3000]


def test_short_prompts_keep_everything() -> None:
    assert allocate_budget(np.ones(2), 1023, rule(0.6, 2, 4)).keeps_everything
    assert not allocate_budget(np.ones(2), 1024, rule(0.6, 2, 4)).keeps_everything
    # So do those of which not one token would stay.
    assert allocate_budget(np.ones(2), 4, rule(0.6, 2, 4, min_tokens=1)).keeps_everything
    assert not allocate_budget(np.ones(2), 5, rule(0.6, 2, 4, min_tokens=1)).keeps_everything


def test_a_ratio_at_the_floor_is_refused_with_the_floor() -> None:
    with pytest.raises(BudgetError, match=r"0\.5 is not above the floor 0\.5000"):
        rule(0.5, 2, 4).base(4096, 2)


def test_a_ratio_that_leaves_no_token_names_the_least_ratio_that_does() -> None:
    with pytest.raises(BudgetError, match=r"use at least 0\.5005") as error:
        rule(0.5001, 2, 4).check(2)
    least = float(str(error.value).split("at least ")[1].split()[0])
    rule(least + 1e-4, 2, 4).check(2)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, math.nan])
def test_ratios_outside_their_range_are_refused(ratio: float) -> None:
    with pytest.raises(BudgetError, match="kv-policy-ratio must be in"):
        rule(ratio, 1, 4).check(3)
