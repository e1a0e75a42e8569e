"""``extend_attention``: laws of the reference, and every implementation against it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_kernels import extend_attention
from hetero_kernels.testing import LAST_DIGIT, TOLERANCE, implementations, using

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(num_new, prefix_len, num_kv_heads, group_size, head_dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    total = prefix_len + num_new
    q = torch.randn(num_new, num_kv_heads * group_size, head_dim, generator=generator)
    k = torch.randn(num_kv_heads, total, head_dim, generator=generator)
    v = torch.randn(num_kv_heads, total, head_dim, generator=generator)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("name", implementations())
@given(
    num_new=st.sampled_from([0, 1, 17, 63, 64, 65]),
    prefix_len=st.sampled_from([0, 1, 63, 64, 65]),
    num_kv_heads=st.sampled_from([1, 3]),
    group_size=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([16, 64, 80]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_result_is_the_references(
    name, num_new, prefix_len, num_kv_heads, group_size, head_dim, dtype, seed
):
    q, k, v = inputs(num_new, prefix_len, num_kv_heads, group_size, head_dim, dtype, seed)
    arguments = {"prefix_len": prefix_len, "scale": head_dim**-0.5}
    expected = extend_attention(q, k, v, **arguments, impl="reference")
    with using(name) as impl:
        actual = extend_attention(q, k, v, **arguments, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=LAST_DIGIT[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_new", "prefix_len"), [(1000, 0), (600, 700), (1, 1500), (1025, 3)])
def test_chunks_longer_than_a_block(name, dtype, num_new, prefix_len):
    q, k, v = inputs(num_new, prefix_len, 1, 3, 64, dtype, 1)
    visible = torch.ones(num_new, prefix_len + num_new, dtype=torch.bool).tril(prefix_len)
    scores = torch.einsum("nhd,td->hnt", q.float(), k[0].float()) * 0.125
    weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1)
    expected = torch.einsum("hnt,td->nhd", weights, v[0].float()).to(dtype)
    with using(name) as impl:
        actual = extend_attention(q, k, v, prefix_len=prefix_len, scale=0.125, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=LAST_DIGIT[dtype], atol=2 * TOLERANCE[dtype])


@pytest.mark.parametrize("name", [*implementations(), "reference"])
@given(seed=st.integers(0, 99), cut=st.integers(1, 39))
def test_two_chunks_are_one(name, seed, cut):
    q, k, v = inputs(40, 0, 2, 2, 16, torch.float32, seed)

    def run(*arguments, prefix_len):
        with using(name) as impl:
            return extend_attention(*arguments, prefix_len=prefix_len, scale=0.25, impl=impl)

    whole = run(q, k, v, prefix_len=0)
    first = run(q[:cut], k[:, :cut], v[:, :cut], prefix_len=0)
    second = run(q[cut:], k, v, prefix_len=cut)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", implementations())
def test_strided_queries_and_keys_need_no_copy(name):
    q, k, v = inputs(30, 10, 2, 3, 16, torch.float32, 0)
    expected = extend_attention(q, k, v, prefix_len=10, scale=0.25, impl="reference")
    fused = torch.cat([q.flatten(1), torch.zeros(30, 5)], dim=1)
    by_token = k.transpose(0, 1).contiguous()  # [total, H, D], as an engine's pool
    with using(name) as impl:
        actual = extend_attention(
            fused[:, : 6 * 16].unflatten(1, (6, 16)),
            by_token.transpose(0, 1),
            v,
            prefix_len=10,
            scale=0.25,
            impl=impl,
        )
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*implementations(), "reference"])
def test_a_query_that_is_no_number_gives_none(name):
    q, k, v = inputs(70, 10, 1, 3, 64, torch.float32, 0)
    q[[1, 66]] = float("nan")
    with using(name) as impl:
        out = extend_attention(q, k, v, prefix_len=10, scale=0.25, impl=impl)
    is_nan = out.isnan().all(dim=(1, 2))
    assert is_nan.nonzero().flatten().tolist() == [1, 66]
    assert out[~is_nan].isfinite().all()


def test_keys_that_do_not_fit_the_prefix_are_refused():
    q, k, v = inputs(4, 3, 1, 1, 16, torch.float32, 0)
    with pytest.raises(ValueError, match="prefix_len must be at least 0, got -2"):
        extend_attention(q, k[:, :2], v[:, :2], prefix_len=-2, scale=1.0)
    with pytest.raises(ValueError, match=r"query heads .* must be at least 1, got 0"):
        extend_attention(q[:, :0], k, v, prefix_len=3, scale=1.0)
    with pytest.raises(ValueError, match="v must be on cpu like q, got meta"):
        extend_attention(q, k, v.to("meta"), prefix_len=3, scale=1.0)
    with pytest.raises(ValueError, match=r"k must have shape \[any, 6, 16\]"):
        extend_attention(q, k, v, prefix_len=2, scale=1.0)
