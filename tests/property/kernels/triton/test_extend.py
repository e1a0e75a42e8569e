"""``extend_attention`` in Triton against the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetero_kernels import extend_attention
from hetero_kernels.testing import LAST_DIGIT, TOLERANCE
from tests.property.kernels.test_extend_attention import inputs

few = settings(max_examples=15, suppress_health_check=list(HealthCheck))
DTYPES = sorted(TOLERANCE, key=str)


@few
@given(
    num_new=st.sampled_from([0, 1, 17, 63, 64, 65]),
    prefix_len=st.sampled_from([0, 1, 63, 64, 65]),
    num_kv_heads=st.sampled_from([1, 3]),
    group_size=st.sampled_from([1, 3, 4, 8]),
    head_dim=st.sampled_from([16, 64, 80]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_result_is_the_references(
    device, num_new, prefix_len, num_kv_heads, group_size, head_dim, dtype, seed
):
    q, k, v = inputs(num_new, prefix_len, num_kv_heads, group_size, head_dim, dtype, seed)
    arguments = {"prefix_len": prefix_len, "scale": head_dim**-0.5}
    expected = extend_attention(q, k, v, **arguments, impl="torch")
    q, k, v = q.to(device), k.to(device), v.to(device)
    actual = extend_attention(q, k, v, **arguments, impl="triton")
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=LAST_DIGIT[dtype], atol=2 * TOLERANCE[dtype]
    )
    # The same from a pool in which nobody owns the other slots.
    total = prefix_len + num_new
    slots = torch.randperm(total + 9)[:total].int().to(device)
    pools = [
        part.new_full((num_kv_heads, total + 9, head_dim), float("nan")).index_copy(
            1, slots.long(), part
        )
        for part in (k, v)
    ]
    named = extend_attention(q, *pools, **arguments, slots=slots, impl="triton")
    assert torch.equal(named, actual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_new", "prefix_len"), [(300, 130), (1, 1000)])
def test_chunks_longer_than_a_block(device, dtype, num_new, prefix_len):
    q, k, v = inputs(num_new, prefix_len, 1, 3, 64, dtype, 1)
    expected = extend_attention(q, k, v, prefix_len=prefix_len, scale=0.125, impl="torch")
    q, k, v = q.to(device), k.to(device), v.to(device)
    actual = extend_attention(q, k, v, prefix_len=prefix_len, scale=0.125, impl="triton")
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=LAST_DIGIT[dtype], atol=2 * TOLERANCE[dtype]
    )


@pytest.mark.parametrize("impl", ["auto", "torch", "reference"])
def test_slots_name_the_rows_for_every_implementation(impl):
    q, k, v = inputs(9, 4, 2, 2, 16, torch.float32, 0)
    expected = extend_attention(q, k, v, prefix_len=4, scale=0.25, impl="reference")
    slots = torch.randperm(20)[:13].int()
    pools = [torch.full((2, 20, 16), float("nan")) for _ in range(2)]
    for pool, part in zip(pools, (k, v), strict=True):
        pool[:, slots.long()] = part
    actual = extend_attention(q, *pools, prefix_len=4, scale=0.25, slots=slots, impl=impl)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_two_chunks_are_one(device):
    q, k, v = (part.to(device) for part in inputs(70, 0, 2, 2, 16, torch.float32, 3))

    def run(*parts, prefix_len):
        return extend_attention(*parts, prefix_len=prefix_len, scale=0.25, impl="triton")

    whole = run(q, k, v, prefix_len=0)
    first = run(q[:33], k[:, :33], v[:, :33], prefix_len=0)
    second = run(q[33:], k, v, prefix_len=33)
    torch.testing.assert_close(torch.cat([first, second]), whole, rtol=0, atol=1e-5)


def test_strided_queries_and_keys_need_no_copy(device):
    q, k, v = (part.to(device) for part in inputs(30, 10, 2, 3, 16, torch.float32, 0))
    expected = extend_attention(q, k, v, prefix_len=10, scale=0.25, impl="triton")
    fused = torch.cat([q.flatten(1), torch.zeros(30, 5, device=device)], dim=1)
    by_token = k.transpose(0, 1).contiguous()  # [total, H, D], as an engine's pool
    actual = extend_attention(
        fused[:, : 6 * 16].unflatten(1, (6, 16)),
        by_token.transpose(0, 1),
        v,
        prefix_len=10,
        scale=0.25,
        impl="triton",
    )
    assert torch.equal(actual, expected)
