"""Decode step in Triton: appended bits are the reference's, attention is within tolerance."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetero_kernels import DecodeBatch, DecodeLayer, DecodeWorkspace
from hetero_kernels.testing import LAST_DIGIT, TOLERANCE, make_decode_case, on_device
from tests.property.kernels.test_decode_attention import (
    case_without_rows,
    cases,
    dense,
    side_by_side,
)

POOLS = ("k_resident", "v_resident", "k_blocks", "v_blocks", "block_positions", "pivot_queries")
few = settings(max_examples=25, suppress_health_check=list(HealthCheck))


def step(case, impl, device="cpu", num_programs=None):
    """Append and attend; the layer afterwards and the result, both on the CPU."""
    case = on_device(case, device)
    layer = case.layer
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    workspace = DecodeWorkspace.allocate(
        *(len(case.rows), layer.num_kv_heads, layer.group_size, layer.head_dim, case.q.device),
        num_programs=num_programs,
    )
    launcher = DecodeLayer(layer, impl=impl, workspace=workspace)
    launcher.append(case.k, case.v, case.q, batch)
    out = launcher.attend(case.q, torch.full_like(case.q, float("nan")), batch)
    return on_device(layer, "cpu"), out.cpu()


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("num_programs", [1, 9])
def test_what_is_no_number_stays_none(device, num_programs):
    case = make_decode_case(
        prompt_lens=[200],
        kept_lens=[[100]],
        generated=[1],
        head_map=[-1, 0],
        group_size=2,
        head_dim=16,
    )
    case.q[0, 1] = float("nan")
    _, out = step(case, "triton", device, num_programs)
    assert out[0].isnan().all(dim=1).tolist() == [False, True, False, False]
    assert out[0, [0, 2, 3]].isfinite().all()


def assert_is_the_references(case, device, num_programs=None):
    expected_layer, expected = step(case, "reference")
    layer, actual = step(case, "triton", device, num_programs)
    for pool in POOLS:
        assert torch.equal(bits(getattr(layer, pool)), bits(getattr(expected_layer, pool))), pool
    torch.testing.assert_close(
        actual, expected, rtol=LAST_DIGIT[case.q.dtype], atol=2 * TOLERANCE[case.q.dtype]
    )


@few
@given(
    case=cases(
        dtypes=sorted(TOLERANCE, key=str),
        lengths=(0, 1, 63, 64, 65, 200),
        head_dims=(16, 64, 80, 96),
        block_tokens=(16, 48, 128),
        has_pivots=True,
    ),
    num_programs=st.sampled_from([None, 1, 7]),
)
def test_bits_and_result_are_the_references(device, case, num_programs):
    assert_is_the_references(case, device, num_programs)


@pytest.mark.parametrize(
    ("dtype", "group_size", "head_dim", "block_tokens"),
    [
        (torch.float32, 3, 64, 16),
        (torch.float32, 1, 128, 64),
        (torch.bfloat16, 4, 128, 16),
        (torch.float16, 8, 256, 32),
    ],
)
def test_lengths_that_differ_a_thousandfold(device, dtype, group_size, head_dim, block_tokens):
    case = make_decode_case(
        prompt_lens=[1000, 1, 65],
        kept_lens=[[500, 0], [1, 1], [64, 7]],
        generated=[9, 1, 30],
        head_map=[-2, 0, -1],
        group_size=group_size,
        head_dim=head_dim,
        dtype=dtype,
        block_tokens=block_tokens,
        pivot_map=[-1, 0, -1],
    )
    assert_is_the_references(case, device)


@pytest.mark.parametrize("group_size", [1, 3, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("block_tokens", "dtype"), [(16, torch.float32), (64, torch.bfloat16), (128, torch.float16)]
)
@pytest.mark.parametrize("num_programs", [None, 3])
def test_a_head_without_rows_beside_heads_of_a_thousand(
    device, group_size, head_dim, block_tokens, dtype, num_programs
):
    case = make_decode_case(
        prompt_lens=[1000, 1000],
        kept_lens=[[0, 1000], [1000, 0]],
        generated=[1, 1],
        head_map=[-1, 0, -2],
        group_size=group_size,
        head_dim=head_dim,
        dtype=dtype,
        block_tokens=block_tokens,
    )
    DecodeLayer(case.layer, impl="reference").append(
        case.k, case.v, None, DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    )
    # As if nothing had been generated: compressed heads then hold what they kept, also nothing.
    case.layer.prompt_lens[case.rows] += 1
    results = []
    for impl, where in (("reference", "cpu"), ("triton", device)):
        moved = on_device(case, where)
        workspace = DecodeWorkspace.allocate(
            *(2, 3, group_size, head_dim, moved.q.device), num_programs=num_programs
        )
        launcher = DecodeLayer(moved.layer, impl=impl, workspace=workspace)
        out = torch.full_like(moved.q, float("nan"))
        results.append(launcher.attend(moved.q, out, DecodeBatch(moved.rows, moved.seq_lens)).cpu())
    expected, actual = results
    torch.testing.assert_close(actual, expected, rtol=LAST_DIGIT[dtype], atol=2 * TOLERANCE[dtype])
    empty = actual[0, :group_size], actual[1, 2 * group_size :]
    assert all(torch.equal(part, torch.zeros_like(part)) for part in empty)


def test_how_many_programs_share_the_work_changes_rounding_only(device):
    case = make_decode_case(
        prompt_lens=[300, 3],
        kept_lens=[[150, 20], [0, 3]],
        generated=[3, 1],
        head_map=[-1, 0, -2],
        group_size=2,
        head_dim=32,
        pivot_map=[-1, -1, -1],
    )
    results = [step(case, "triton", device, count)[1] for count in (1, 2, 5, 11, 100)]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=TOLERANCE[torch.float32])


def test_the_order_of_blocks_does_not_matter(device):
    case = make_decode_case(
        prompt_lens=[200],
        kept_lens=[[160]],
        generated=[1],
        head_map=[-1],
        group_size=3,
        head_dim=64,
        pivot_map=[-1],
    )
    before = step(case, "triton", device)[1]
    table = case.layer.block_table[int(case.rows[0]), 0]
    table[:10] = table[:10][torch.randperm(10)]
    after = step(case, "triton", device)[1]
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE[torch.float32])


def test_a_full_budget_is_dense_attention(device):
    case = make_decode_case(
        prompt_lens=[130],
        kept_lens=[[130]],
        generated=[5],
        head_map=[-1, 0],
        group_size=4,
        head_dim=64,
        pivot_map=[-1, -1],
    )
    layer, out = step(case, "triton", device)
    torch.testing.assert_close(out, dense(case, layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("magnitude", [1e-3, 1e4])
def test_large_and_small_scores_neither_overflow_nor_vanish(device, magnitude):
    case = make_decode_case(
        prompt_lens=[200],
        kept_lens=[[90]],
        generated=[3],
        head_map=[-1, 0],
        group_size=3,
        head_dim=64,
        pivot_map=[-1, -1],
    )
    case.q.mul_(magnitude)
    expected, actual = step(case, "reference")[1], step(case, "triton", device)[1]
    assert actual.isfinite().all()
    # The scores themselves are rounded: an error grows with their size.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * max(1.0, magnitude))


def test_padding_gives_zeros_and_writes_nothing(device):
    case = make_decode_case(
        prompt_lens=[70, 20, 5],
        kept_lens=[[30], [10], [5]],
        generated=[2, 3, 1],
        head_map=[-1, 0],
        group_size=3,
        head_dim=16,
        pivot_map=[0, -1],
    )
    alone = dataclasses.replace(
        case,
        **{name: getattr(case, name)[:1] for name in ("rows", "seq_lens", "token_ids")},
        **{name: getattr(case, name)[:1] for name in ("q", "k", "v")},
    )
    expected_layer, expected = step(alone, "triton", device)
    case.rows[1] = -1
    case.seq_lens[2] = 0
    for impl, where in (("triton", device), ("torch", "cpu"), ("reference", "cpu")):
        layer, out = step(case, impl, where)
        torch.testing.assert_close(out[:1], expected, rtol=0, atol=1e-5)
        assert torch.equal(out[1:], torch.zeros_like(out[1:]))
        for pool in POOLS:
            assert torch.equal(bits(getattr(layer, pool)), bits(getattr(expected_layer, pool)))


def test_a_head_without_rows_gives_zeros(device):
    case = case_without_rows()
    moved = on_device(case, device)
    out = torch.full_like(moved.q, float("nan"))
    batch = DecodeBatch(moved.rows[:1], moved.seq_lens[:1])
    DecodeLayer(moved.layer, impl="triton").attend(moved.q[:1], out[:1], batch)
    assert torch.equal(out[:1], torch.zeros_like(out[:1]))


def test_a_replay_sees_what_lies_at_the_addresses_now(device, replay):
    first, second = (
        make_decode_case(
            prompt_lens=prompts,
            kept_lens=kept,
            generated=generated,
            head_map=[-1, 0, -2],
            group_size=3,
            head_dim=32,
            pivot_map=[-1, 0, -1],
            seed=seed,
            spare=spare,
        )
        for prompts, kept, generated, seed, spare in (
            ([150, 4], [[70, 9], [4, 0]], [3, 1], 0, 70),
            ([2, 140], [[0, 2], [60, 3]], [2, 9], 1, 23),
        )
    )
    moved = on_device(first, device)
    layer = moved.layer
    batch = DecodeBatch(moved.rows, moved.seq_lens, moved.token_ids)
    workspace = DecodeWorkspace.allocate(2, 3, 3, 32, moved.q.device, num_programs=5)
    launcher = DecodeLayer(layer, impl="triton", workspace=workspace)
    out = torch.full_like(moved.q, float("nan"))

    def call():
        launcher.append(moved.k, moved.v, moved.q, batch)
        launcher.attend(moved.q, out, batch)

    again = replay(call)
    for case in (second, first, second):
        names = [f.name for f in dataclasses.fields(layer)]
        for target, source in [
            *((getattr(layer, name), getattr(case.layer, name)) for name in names),
            *((getattr(moved, name), getattr(case, name)) for name in ("q", "k", "v")),
            *((getattr(moved, n), getattr(case, n)) for n in ("rows", "seq_lens", "token_ids")),
        ]:
            if isinstance(target, torch.Tensor):
                region = tuple(slice(0, size) for size in source.shape)
                target[tuple(region)] = source.to(device)
        again()
        expected_layer, expected = step(case, "reference")
        torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=2e-5)
        rings = layer.pivot_queries[: len(expected_layer.pivot_queries)]
        row = int(case.rows[0])
        assert torch.equal(bits(rings[row].cpu()), bits(expected_layer.pivot_queries[row]))


def test_queries_and_pools_may_be_strided_views(device):
    case = make_decode_case(
        prompt_lens=[90, 10],
        kept_lens=[[40], [10]],
        generated=[2, 5],
        head_map=[-1, 0],
        group_size=2,
        head_dim=32,
        pivot_map=[-1, -1],
    )
    expected = step(case, "reference")[1]
    moved = on_device(case, device)
    layer = side_by_side(moved.layer)
    fused = torch.cat([moved.q, moved.k, moved.v], dim=1)
    q, k, v = fused.split([4, 2, 2], dim=1)
    batch = DecodeBatch(moved.rows, moved.seq_lens, moved.token_ids)
    launcher = DecodeLayer(layer, impl="triton")
    launcher.append(k, v, None, batch)
    actual = launcher.attend(q, torch.empty_like(moved.q), batch)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=TOLERANCE[torch.float32])


def test_a_workspace_that_is_too_small_is_refused(device):
    case = make_decode_case(
        prompt_lens=[9, 9],
        kept_lens=[[4], [4]],
        generated=[1, 1],
        head_map=[-1, 0],
        group_size=2,
        head_dim=16,
    )
    moved = on_device(case, device)
    workspace = DecodeWorkspace.allocate(1, 2, 2, 16, moved.q.device)
    launcher = DecodeLayer(moved.layer, impl="triton", workspace=workspace)
    with pytest.raises(ValueError, match=r"workspace must be for 4 .* got 2"):
        launcher.attend(moved.q, moved.q.clone(), DecodeBatch(moved.rows, moved.seq_lens))
