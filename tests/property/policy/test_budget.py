"""Laws of the budget for any weights, ratio and length."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hetero_sglang.policy.budget import BudgetRule, allocate_budget

weights = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=40)


@given(
    weights,
    st.floats(0, 30),
    st.floats(0.0, 1.0, exclude_min=True),
    st.integers(1024, 200_000),
    st.booleans(),
)
def test_budgets_stay_inside_the_ratio_and_the_prompt(
    raw: list[float], held: float, spare: float, num_tokens: int, is_filling: bool
) -> None:
    # `held` is what heads that keep everything and watched keys cost, in rows of a head; the
    # model has as many heads as that at least.
    allocation = np.array(raw) / np.mean(raw)
    num_heads = math.ceil(held) + len(raw)
    ratio = (held + spare * len(raw)) / num_heads
    if not held / num_heads < ratio <= 1.0:
        return
    rule = BudgetRule(
        ratio=ratio,
        held_heads=held,
        num_heads=num_heads,
        min_tokens=1024,
        is_filling=is_filling,
    )
    budget = allocate_budget(allocation, num_tokens, rule)
    assert budget.tokens.min() >= 0
    assert budget.tokens.max() <= num_tokens
    order = np.argsort(allocation, kind="stable")
    assert np.all(np.diff(budget.tokens[order]) >= 0)
    if rule.base(num_tokens, len(raw)) < 1:
        assert budget.keeps_everything
        return
    spent = held * num_tokens + int(budget.tokens.sum())
    assert spent <= ratio * num_heads * num_tokens * (1 + 1e-12) + 1e-6
    if is_filling:
        # Floors lose less than a token a head, the base less than a token a head again.
        assert spent > ratio * num_heads * num_tokens - 2 * len(raw) - 1
    else:
        weighted = np.floor(np.minimum(allocation * budget.base, num_tokens) + 1e-9)
        assert budget.tokens.tolist() == weighted.tolist()
