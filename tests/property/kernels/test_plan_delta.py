"""``plan_delta``: the plan that the policy makes head by head, for all heads at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_kernels import plan_delta
from hetero_sglang.policy.plan import plan_delta as plan_of_a_head


@st.composite
def exchanges(draw, max_tokens=150):
    """Targets and kept sets of heads with different budgets, padded with -1."""
    num_tokens = draw(st.integers(1, max_tokens))
    budgets = draw(st.lists(st.integers(0, num_tokens), max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    width = max(budgets, default=0) + draw(st.integers(0, 2))
    target = torch.full((len(budgets), width), -1, dtype=torch.int32)
    kept = target.clone()
    for i, budget in enumerate(budgets):
        for table in (target, kept):
            order = torch.randperm(num_tokens, generator=generator)[:budget]
            table[i, :budget] = order.to(torch.int32)
    limits = None
    if draw(st.booleans()):
        drawn = draw(st.lists(st.integers(0, 40), min_size=len(budgets), max_size=len(budgets)))
        limits = torch.tensor(drawn, dtype=torch.int32)
    return {
        "target": target,
        "kept": kept,
        "num_tokens": num_tokens,
        "limits": limits,
        "room": draw(st.none() | st.integers(0, sum(budgets) + 1)),
    }


def used(row):
    return row[row >= 0].numpy()


@pytest.mark.parametrize("impl", ["torch", "reference"])
@given(case=exchanges())
def test_items_are_planned_as_the_policy_plans_a_head(impl, case):
    plan = plan_delta(**case, impl=impl)
    room = case["room"]
    for i in range(len(case["target"])):
        # As `hetero_sglang.cache.retrieval` does: heads in turn, each as much as there is room.
        target, kept = used(case["target"][i]), used(case["kept"][i])
        bounds = [case["limits"][i].item()] if case["limits"] is not None else []
        bounds += [room] if room is not None else []
        one = plan_of_a_head(
            target.astype(np.int64),
            kept.astype(np.int64),
            case["num_tokens"],
            min(bounds) if bounds else None,
        )
        count = int(plan.counts[i])
        assert count == len(one.positions)
        assert plan.positions[i, :count].tolist() == one.positions.tolist()
        assert plan.slots[i, :count].tolist() == one.slots.tolist()
        assert (plan.positions[i, count:] == -1).all()
        assert (plan.slots[i, count:] == -1).all()
        if room is not None:
            room -= count


@given(case=exchanges())
def test_what_is_not_cut_makes_the_kept_set_the_target(case):
    plan = plan_delta(case["target"], case["kept"], case["num_tokens"])
    for i, count in enumerate(plan.counts.tolist()):
        after = case["kept"][i].clone()
        after[plan.slots[i, :count].long()] = plan.positions[i, :count]
        assert set(used(after)) == set(used(case["target"][i]))
        assert int((after != case["kept"][i]).sum()) == count


def test_what_does_not_fit_is_refused():
    rows = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"kept must have shape \[2, any\]"):
        plan_delta(rows, rows[:1], 5)
    with pytest.raises(ValueError, match=r"limits must be torch\.int32"):
        plan_delta(rows, rows, 5, limits=torch.zeros(2))
    with pytest.raises(ValueError, match="room must not be negative, got -1"):
        plan_delta(rows, rows, 5, room=-1)
