"""``score_positions``: laws of the reference, and every implementation against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import avg_pool1d

from hetero_kernels import score_positions
from hetero_kernels.testing import implementations, using

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [0, 1, 2, 3, 5, 63, 64, 65]


def inputs(num_heads, group_size, length, head_dim, dtype, seed, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_heads, group_size, head_dim, generator=generator) * spread
    k = torch.randn(num_heads, length, head_dim, generator=generator)
    return q.to(dtype), k.to(dtype)


def assert_same_scores(actual, expected):
    # Relative: a small score decides as much as a large one where a budget ends among small ones.
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=1e-12)


@pytest.mark.parametrize("name", implementations())
@given(
    num_heads=st.integers(0, 3),
    group_size=st.sampled_from([1, 3, 4, 8]),
    length=st.sampled_from(LENGTHS),
    head_dim=st.sampled_from([16, 48, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_scores_are_the_references(name, num_heads, group_size, length, head_dim, dtype, seed):
    q, k = inputs(num_heads, group_size, length, head_dim, dtype, seed)
    expected = score_positions(q, k, head_dim**-0.5, impl="reference")
    with using(name) as impl:
        actual = score_positions(q, k, head_dim**-0.5, impl=impl)
    assert_same_scores(actual, expected)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("group_size", [1, 3, 8, 17])
def test_scores_of_a_long_prompt_are_the_references(name, group_size):
    q, k = inputs(2, group_size, 1000, 64, torch.float32, 7)
    expected = score_positions(q, k, 0.125, impl="reference")
    with using(name) as impl:
        actual = score_positions(q, k, 0.125, impl=impl)
    assert_same_scores(actual, expected)


@pytest.mark.parametrize("name", [*implementations(), "reference"])
@given(length=st.sampled_from(LENGTHS), seed=st.integers(0, 99))
def test_slots_name_the_rows_and_nothing_else_is_read(name, length, seed):
    q, k = inputs(2, 3, length, 64, torch.float32, seed)
    slots = torch.randperm(length + 9)[:length].to(torch.int32)
    pool = torch.full((2, length + 9, 64), float("nan"))
    pool[:, slots.long()] = k
    expected = score_positions(q, k, 0.125, impl="reference")
    with using(name) as impl:
        actual = score_positions(q, pool, 0.125, slots=slots, impl=impl)
    assert_same_scores(actual, expected)


@given(length=st.sampled_from([1, 2, 5, 63]), seed=st.integers(0, 99))
def test_reference_is_softmax_pool_and_maximum(length, seed):
    q, k = inputs(2, 3, length, 16, torch.float32, seed)
    probabilities = torch.softmax(torch.einsum("hgd,hnd->hgn", q, k) * 0.25, dim=-1)
    pooled = avg_pool1d(probabilities, kernel_size=5, stride=1, padding=2, count_include_pad=True)
    torch.testing.assert_close(
        score_positions(q, k, 0.25, impl="reference"), pooled.amax(dim=1), rtol=1e-5, atol=1e-9
    )


@given(seed=st.integers(0, 99))
def test_a_permutation_of_heads_permutes_the_scores(seed):
    q, k = inputs(3, 2, 20, 16, torch.float32, seed)
    order = torch.randperm(3)
    scores = score_positions(q, k, 0.25, impl="reference")
    assert torch.equal(score_positions(q[order], k[order], 0.25, impl="reference"), scores[order])


@pytest.mark.parametrize("name", implementations())
def test_extreme_queries_give_finite_scores(name):
    q, k = inputs(1, 3, 500, 64, torch.float32, 3, spread=1e4)
    with using(name) as impl:
        scores = score_positions(q, k, 0.125, impl=impl)
    assert scores.isfinite().all()
    assert (scores >= 0).all()


def test_keys_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="k must have a plane for each head of q, got 3, 2"):
        score_positions(torch.zeros(2, 3, 16), torch.zeros(3, 5, 16), 1.0)
    with pytest.raises(ValueError, match="multiple of 16"):
        score_positions(torch.zeros(2, 3, 20), torch.zeros(2, 5, 20), 1.0)
