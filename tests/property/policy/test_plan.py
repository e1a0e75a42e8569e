"""Laws of the fetch plan: smallest exchange, best first, resumable."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hetero_sglang.policy.drift import drift_verdict, is_check_due
from hetero_sglang.policy.plan import plan_delta, refresh_target


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    num_tokens = draw(st.integers(1, 200))
    size = draw(st.integers(0, num_tokens))
    order = draw(st.permutations(range(num_tokens)))
    other = draw(st.permutations(range(num_tokens)))
    return np.array(order[:size], dtype=int), np.array(other[:size], dtype=int), num_tokens


@given(exchanges())
def test_installing_the_plan_gives_the_target_and_moves_nothing_else(
    case: tuple[np.ndarray, np.ndarray, int],
) -> None:
    target, kept, num_tokens = case
    plan = plan_delta(target, kept, num_tokens)
    assert len(plan.positions) == len(plan.slots) == len(set(target) - set(kept))
    after = kept.copy()
    after[plan.slots] = plan.positions
    assert set(after) == set(target)
    assert np.sum(after != kept) == len(plan.slots)


@given(exchanges(), st.integers(1, 50))
def test_a_cut_plan_takes_the_best_first_and_ends_at_the_target(
    case: tuple[np.ndarray, np.ndarray, int], limit: int
) -> None:
    target, kept, num_tokens = case
    missing = [p for p in target if p not in set(kept)]
    fetched: list[int] = []
    while True:
        plan = plan_delta(target, kept, num_tokens, limit)
        if not len(plan.positions):
            break
        assert len(plan.positions) <= limit
        kept = kept.copy()
        kept[plan.slots] = plan.positions
        assert len(set(kept)) == len(kept)
        fetched += plan.positions.tolist()
    assert fetched == missing
    assert set(kept) == set(target)


@given(exchanges(), st.floats(0.0, 1.0), st.integers(0, 99))
def test_a_refresh_brings_the_best_and_drops_the_worst_of_what_was_held(
    case: tuple[np.ndarray, np.ndarray, int], share: float, seed: int
) -> None:
    _, held, num_tokens = case
    # Few different values, so that there are ties; infinite ones are those of protected positions.
    scores = np.random.default_rng(seed).integers(-4, 5, num_tokens).astype(np.float32)
    scores[scores == 4] = np.inf
    ranking = sorted(range(num_tokens), key=lambda p: (-scores[p], p))
    best = np.array(ranking[: int(share * len(held))], dtype=int)
    target = refresh_target(best, held, scores)
    assert len(set(target.tolist())) == len(target) == len(held)
    assert target[: len(best)].tolist() == best.tolist()
    rest = target[len(best) :].tolist()
    assert rest == [p for p in ranking if p in set(held) - set(best)][: len(rest)]


def test_a_refresh_of_the_whole_budget_is_the_pivots_best() -> None:
    best = np.array([7, 3, 5])
    scores = np.zeros(9, dtype=np.float32)
    assert refresh_target(best, np.array([0, 1, 2]), scores).tolist() == [7, 3, 5]


def test_drift_is_the_median_below_the_threshold() -> None:
    overlap = np.array([[0.9, 0.4, 0.5], [0.9, 0.4, 0.4], [0.5, 0.5, 0.5]], dtype=np.float32)
    assert drift_verdict(overlap, 0.5).tolist() == [False, True, False]


def test_checks_end_each_interval_and_never_precede_the_first_step() -> None:
    assert np.flatnonzero(is_check_due(np.arange(12), 5)).tolist() == [5, 10]
