"""``quantize_keys`` in Triton: exactly the reference's bytes, in their slots and nowhere else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetero_kernels import quantize_keys
from hetero_kernels.testing import TOLERANCE, on_device
from tests.property.kernels.test_quantize_keys import garbage, some_keys

few = settings(max_examples=25, suppress_health_check=list(HealthCheck))
DTYPES = sorted(TOLERANCE, key=str)


def assert_same_bytes(actual, expected):
    assert torch.equal(actual.data.cpu(), expected.data)
    assert torch.equal(actual.scales.cpu().view(torch.int16), expected.scales.view(torch.int16))


def assert_is_the_references(device, keys, bits, slots, planes=slice(1, 3), num_planes=4):
    expected = garbage(num_planes, keys.shape[1] + 9, keys.shape[2], bits)
    actual = on_device(expected, device)
    quantize_keys(keys, expected, planes, slots, impl="reference")
    quantize_keys(keys.to(device), actual, planes, slots.to(device), impl="triton")
    assert_same_bytes(actual, expected)


@few
@given(
    shape=st.sampled_from([(8, 16), (8, 80), (8, 128), (4, 32), (4, 96), (4, 128), (4, 224)]),
    dtype=st.sampled_from(DTYPES),
    count=st.sampled_from([0, 1, 31, 65]),
    has_padding=st.booleans(),
    seed=st.integers(0, 99),
)
def test_bytes_are_the_references(device, shape, dtype, count, has_padding, seed):
    bits, head_dim = shape
    keys = some_keys(2, count, head_dim, seed).to(dtype)
    slots = torch.randperm(count + 9, generator=torch.Generator().manual_seed(seed))[:count]
    if has_padding:
        slots[::5] = -1
    assert_is_the_references(device, keys, bits, slots)


@pytest.mark.parametrize("bits", [8, 4])
def test_halves_go_to_the_even_neighbour(device, bits):
    # The largest magnitude makes the scale 1, and every other element is a tie.
    largest = 127 if bits == 8 else 7
    halves = torch.arange(-largest, largest).repeat(64)[: 2 * 7 * 64].view(2, 7, 64) + 0.5
    halves[..., ::32] = -largest
    assert_is_the_references(device, halves, bits, torch.arange(7))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("magnitude", [1e-45, 1e-41, 1e-38, 1e37])
def test_scales_that_are_subnormal_vanish_or_are_huge(device, bits, magnitude):
    keys = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(1)) * magnitude
    assert_is_the_references(device, keys, bits, torch.randperm(20))


@pytest.mark.parametrize("bits", [8, 4])
def test_keys_and_pools_may_be_strided_views(device, bits):
    by_token = some_keys(30, 2, 64, 0)  # [n, heads, D], as an engine's projection gives them
    slots = torch.randperm(39)[:30]
    keys = by_token.transpose(0, 1)
    assert_is_the_references(device, keys, bits, slots, planes=slice(0, 4, 2))
    wide = torch.stack([keys, torch.full_like(keys, float("nan"))], dim=-1)
    assert_is_the_references(device, wide[..., 0], bits, slots)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_replay_writes_what_lies_there_now(device, replay, bits):
    keys = torch.zeros(2, 12, 64, device=device)
    slots = torch.full((12,), -1, device=device)
    pool = on_device(garbage(2, 40, 64, bits), device)
    again = replay(lambda: quantize_keys(keys, pool, slice(0, 2), slots, impl="triton"))
    expected = garbage(2, 40, 64, bits)
    for seed, count in enumerate((12, 5, 0, 7)):
        keys.copy_(some_keys(2, 12, 64, seed))
        slots.fill_(-1)
        slots[:count] = torch.randperm(40)[:count].to(device)
        again()
        quantize_keys(keys.cpu(), expected, slice(0, 2), slots.cpu(), impl="reference")
        assert_same_bytes(pool, expected)
