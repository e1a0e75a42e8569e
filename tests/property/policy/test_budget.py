"""Laws of the budget for any weights, ratio and length."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hetero_sglang.policy.budget import allocate_budget

weights = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=40)


@given(
    weights, st.integers(0, 30), st.floats(0.0, 1.0, exclude_min=True), st.integers(1024, 200_000)
)
def test_budgets_stay_inside_the_ratio_and_the_prompt(
    raw: list[float], num_resident: int, spare: float, num_tokens: int
) -> None:
    allocation = np.array(raw) / np.mean(raw)
    num_heads = num_resident + len(raw)
    ratio = (num_resident + spare * len(raw)) / num_heads
    if not num_resident / num_heads < ratio <= 1.0:
        return
    budget = allocate_budget(
        allocation,
        num_tokens,
        ratio=ratio,
        num_resident=num_resident,
        num_heads=num_heads,
        min_tokens=1024,
    )
    assert budget.tokens.min() >= 0
    assert budget.tokens.max() <= num_tokens
    spent = num_resident * num_tokens + int(budget.tokens.sum())
    assert spent <= ratio * num_heads * num_tokens * (1 + 1e-12) + 1e-6
    # Floors lose less than a token a head, the base less than a token a head again.
    assert spent > ratio * num_heads * num_tokens - 2 * len(raw) - 1
    order = np.argsort(allocation, kind="stable")
    assert np.all(np.diff(budget.tokens[order]) >= 0)
