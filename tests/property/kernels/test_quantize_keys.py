"""``quantize_keys``: laws of the reference, torch against it, and scoring with what it makes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_kernels import (
    QuantizedKeys,
    quantize_keys,
    quantized_key_bytes,
    score_positions,
    topk_overlap,
)
from hetero_kernels.quantize_keys.format import LARGEST, num_groups
from hetero_kernels.testing import implementations, using
from tests.property.kernels.test_topk_overlap import check_overlaps, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def garbage(num_planes: int, num_slots: int, head_dim: int, bits: int) -> QuantizedKeys:
    """Memory that nobody has written: what is read of it shows in every score."""
    groups = num_groups(head_dim, bits)
    dtype = torch.int8 if bits == 8 else torch.uint8
    return QuantizedKeys(
        torch.full((num_planes, num_slots, head_dim * bits // 8), 77, dtype=dtype),
        torch.full((num_planes, num_slots, groups), float("nan"), dtype=torch.bfloat16),
    )


def some_keys(num_heads: int, count: int, head_dim: int, seed: int) -> torch.Tensor:
    """Keys with outlier channels, zeros, and very small and large ones."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(num_heads, count, head_dim, generator=generator)
    keys[..., 3] *= 20
    keys[:, ::7] *= 1e-3
    keys[:, 1::9] = 0
    keys[:, 2::11] *= 500
    return keys


@given(
    bits=st.sampled_from([8, 4]),
    dtype=st.sampled_from(DTYPES),
    head_dim=st.sampled_from([32, 64, 128]),
    count=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_torch_makes_the_references_bytes_in_their_slots(bits, dtype, head_dim, count, seed):
    keys = some_keys(2, count, head_dim, seed).to(dtype)
    slots = torch.randperm(count + 5, generator=torch.Generator().manual_seed(seed))[:count]
    expected, actual = (garbage(4, count + 5, head_dim, bits) for _ in range(2))
    quantize_keys(keys, expected, slice(1, 3), slots, impl="reference")
    quantize_keys(keys, actual, slice(1, 3), slots)
    assert torch.equal(actual.data, expected.data)
    assert torch.equal(actual.scales.view(torch.int16), expected.scales.view(torch.int16))
    untouched = torch.ones(4, count + 5, dtype=torch.bool)
    untouched[1:3, slots] = False
    assert torch.all(actual.data[untouched] == 77)


@given(
    bits=st.sampled_from([8, 4]),
    head_dim=st.sampled_from([32, 64, 128]),
    seed=st.integers(0, 99),
)
def test_elements_come_back_within_half_a_step(bits, head_dim, seed):
    keys = some_keys(1, 30, head_dim, seed)
    pool = garbage(1, 30, head_dim, bits)
    quantize_keys(keys, pool, slice(0, 1), torch.arange(30))
    back = pool.dequantize(0, torch.arange(30))
    groups = num_groups(head_dim, bits)
    steps = pool.scales[0].float()[..., None]
    error = (back - keys[0]).unflatten(-1, (groups, -1)).abs()
    # Half a step; at the edge of the range the rounded scale may cost up to its own rounding.
    slack = keys[0].unflatten(-1, (groups, -1)).abs() / 256
    assert torch.all(error <= steps / 2 * (1 + 1e-6) + slack)
    assert torch.all(back[1::9] == 0)
    whole = pool.data[0].to(torch.int16)
    if bits == 4:
        whole = torch.cat([whole & 15, whole >> 4], -1) - 8
    assert int(whole.abs().max()) <= LARGEST[bits]


def test_bytes_of_a_key():
    assert quantized_key_bytes(64, 8) == 66
    assert quantized_key_bytes(64, 4) == 36
    assert quantized_key_bytes(128, 8) == 130
    assert quantized_key_bytes(128, 4) == 72


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("bits", [8, 4])
@given(
    lengths=st.lists(st.sampled_from([1, 5, 63, 64, 65, 130]), min_size=1, max_size=3),
    group_size=st.sampled_from([1, 3, 8]),
    head_dim=st.sampled_from([32, 64, 96]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_scoring_quantised_keys_is_scoring_what_they_stand_for(
    name, bits, lengths, group_size, head_dim, dtype, seed
):
    case = make(len(lengths), 4, group_size, lengths, lengths, head_dim, dtype, seed)
    num_planes, num_slots, _ = case["keys"].shape
    pool = garbage(num_planes, num_slots, head_dim, bits)
    written = torch.unique(
        torch.cat([case["req_to_token"][r, :n] for r, n in zip(case["rows"], lengths, strict=True)])
    ).long()
    quantize_keys(case["keys"][:, written], pool, slice(0, num_planes), written)
    case["keys"] = pool
    expected = topk_overlap(**case, impl="reference")
    with using(name) as impl:
        actual = topk_overlap(**case, impl=impl)
    torch.testing.assert_close(actual[1], expected[1], rtol=5e-5, atol=1e-12)
    # The same scores through the other operation, for one request.
    slots = case["req_to_token"][case["rows"][0], : lengths[0]]
    planes = case["planes"][:1]
    with using(name) as impl:
        scores = score_positions(
            case["queries"][:1, -1], pool, case["scale"], planes=planes, slots=slots, impl=impl
        )
    torch.testing.assert_close(scores[0], expected[1][0, : lengths[0]], rtol=5e-5, atol=1e-12)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_queries", [2, 5])
def test_keys_that_lie_in_order_are_scored_alike(name, bits, dtype, num_queries):
    # As a server has them: slots of neighbours are neighbours, with a gap in one prompt.
    case = make(2, num_queries, 3, [300, 299], [90, 90], dtype=dtype, seed=2)
    pool = garbage(3, 340, 64, bits)
    keys = torch.randn(3, 340, 64, generator=torch.Generator().manual_seed(1))
    quantize_keys(keys, pool, slice(0, 3), torch.arange(340))
    case["req_to_token"][:, :300] = torch.arange(7, 307, dtype=torch.int32)
    case["req_to_token"][case["rows"][1], 150:300] += 5
    case["keys"] = pool
    expected = topk_overlap(**case, impl="reference")
    with using(name) as impl:
        actual = topk_overlap(**case, impl=impl)
    torch.testing.assert_close(actual[1], expected[1], rtol=5e-5, atol=1e-12)
    check_overlaps(name, case)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiple of 32, got 48"):
        num_groups(48, 4)
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        quantized_key_bytes(64, 3)
    pool = garbage(2, 9, 64, 8)
    with pytest.raises(ValueError, match=r"keys must have shape \[1, 3, 64\], got \[2, 3, 64\]"):
        quantize_keys(torch.zeros(2, 3, 64), pool, slice(0, 1), torch.arange(3))
    with pytest.raises(ValueError, match=r"slots must have shape \[any\], got \[3, 2\]"):
        quantize_keys(torch.zeros(1, 3, 64), pool, slice(0, 1), torch.zeros(3, 2).long())
    with pytest.raises(ValueError, match="k must have head_dim 32, got 64"):
        score_positions(torch.zeros(2, 3, 32), pool, 1.0)
    with pytest.raises(ValueError, match=r"scales must be torch\.bfloat16"):
        QuantizedKeys(pool.data, pool.scales.float())
    with pytest.raises(ValueError, match="scales must be on cpu like data, got meta"):
        QuantizedKeys(pool.data, pool.scales.to("meta"))
    with pytest.raises(ValueError, match="data must be int8"):
        QuantizedKeys(pool.data.float(), pool.scales)
