"""``window_scores``: laws of the reference, and torch against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_kernels import score_positions, window_scores

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(num_heads, window, group_size, length, head_dim=32, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_heads, window, group_size, head_dim, generator=generator) * 2
    k = torch.randn(num_heads, length, head_dim, generator=generator)
    return q.to(dtype), k.to(dtype)


@given(
    num_heads=st.integers(0, 3),
    window=st.integers(1, 9),
    group_size=st.sampled_from([1, 3, 4]),
    more=st.sampled_from([0, 1, 3, 50]),
    head_dim=st.sampled_from([16, 64]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_torch_gives_the_references_scores(
    num_heads, window, group_size, more, head_dim, dtype, seed
):
    q, k = inputs(num_heads, window, group_size, window + more, head_dim, dtype, seed)
    expected = window_scores(q, k, head_dim**-0.5, impl="reference")
    actual = window_scores(q, k, head_dim**-0.5)
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=1e-12)


@given(window=st.integers(1, 9), more=st.integers(4, 40), seed=st.integers(0, 99))
def test_nothing_is_lost_but_what_the_pool_drops_at_the_ends(window, more, seed):
    # Each token's attention sums to one; the pool drops 3/5 and 1/5 of what lies at the ends.
    q, k = inputs(1, window, 2, window + more, seed=seed)
    scores = window_scores(q, k, 0.2, impl="reference")
    assert 0 < float(scores.sum()) <= 1 + 1e-5


@given(more=st.integers(0, 40), seed=st.integers(0, 99))
def test_a_window_of_one_query_head_is_the_last_querys_score(more, seed):
    q, k = inputs(2, 1, 1, 1 + more, seed=seed)
    expected = score_positions(q[:, 0], k, 0.2, impl="reference")
    torch.testing.assert_close(
        window_scores(q, k, 0.2, impl="reference"), expected, rtol=1e-5, atol=1e-12
    )


def test_a_query_does_not_see_what_comes_after_it():
    q, k = inputs(1, 3, 1, 20)
    k[0, -2:] *= 100
    first = window_scores(q[:, :1], k[:, :18], 0.2, impl="reference")
    # Of the window only its first token: the pool of the far positions is its own.
    both = window_scores(q, k, 0.2, impl="reference")
    later = window_scores(q[:, 1:], k, 0.2, impl="reference")
    torch.testing.assert_close(both[0, :16] * 3, first[0, :16] + later[0, :16] * 2)


def test_what_does_not_fit_is_refused():
    q, k = inputs(1, 5, 1, 4)
    with pytest.raises(ValueError, match=r"window must be 1 to 4 \(prompt\) tokens, got 5"):
        window_scores(q, k, 1.0)
    with pytest.raises(ValueError, match=r"query heads .* must be at least 1, got 0"):
        window_scores(q[:, :1, :0], k, 1.0)
    with pytest.raises(ValueError, match=r"k must be torch\.float32, got torch\.bfloat16"):
        window_scores(q, k.bfloat16(), 1.0)
