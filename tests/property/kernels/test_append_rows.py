"""``append_rows``: every implementation moves exactly the bits that the reference moves."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_kernels import DecodeBatch, DecodeLayer, append_rows
from hetero_kernels.testing import implementations, make_decode_case, using

POOLS = ("k_resident", "v_resident", "k_blocks", "v_blocks", "block_positions", "pivot_queries")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_MAPS = [[0], [-1], [-1, 0, -2], [1, -2, 0, -1], [0, 1]]


def cloned(layer):
    return dataclasses.replace(layer, **{name: getattr(layer, name).clone() for name in POOLS})


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@st.composite
def cases(draw):
    head_map = draw(st.sampled_from(HEAD_MAPS))
    num_reqs = draw(st.integers(0, 4))
    lengths = st.sampled_from([1, 15, 16, 17, 65])
    prompt_lens = draw(st.lists(lengths, min_size=num_reqs, max_size=num_reqs))
    num_compressed = sum(place < 0 for place in head_map)
    kept_lens = [[draw(st.integers(0, n)) for _ in range(num_compressed)] for n in prompt_lens]
    return make_decode_case(
        prompt_lens=prompt_lens,
        kept_lens=kept_lens,
        generated=[draw(st.integers(1, 12)) for _ in prompt_lens],
        head_map=head_map,
        group_size=draw(st.sampled_from([1, 3])),
        head_dim=draw(st.sampled_from([16, 64])),
        dtype=draw(st.sampled_from(DTYPES)),
        block_tokens=draw(st.sampled_from([1, 16])),
        pivot_map=draw(st.sampled_from([[-1] * len(head_map), list(range(len(head_map)))])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("name", implementations())
@given(case=cases(), watch=st.booleans())
def test_pools_hold_the_same_bits_as_by_the_reference(name, case, watch):
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    expected, actual = cloned(case.layer), cloned(case.layer)
    q = case.q if watch else None
    DecodeLayer(expected, impl="reference").append(case.k, case.v, q, batch)
    with using(name) as impl:
        DecodeLayer(actual, impl=impl).append(case.k, case.v, q, batch)
    for pool in POOLS:
        assert torch.equal(bits(getattr(actual, pool)), bits(getattr(expected, pool))), pool


@pytest.mark.parametrize("name", [*implementations(), "reference"])
@given(case=cases())
def test_rows_land_where_attention_looks_for_them(name, case):
    layer = cloned(case.layer)
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    with using(name) as impl:
        DecodeLayer(layer, impl=impl).append(case.k, case.v, None, batch)
    for b, (row, seq_len) in enumerate(
        zip(case.rows.tolist(), case.seq_lens.tolist(), strict=True)
    ):
        for h, place in enumerate(layer.head_map.tolist()):
            newest = layer.slots(h, row, layer.length(h, row, seq_len))[-1]
            if place >= 0:
                k, v = layer.k_resident[place, newest], layer.v_resident[place, newest]
            else:
                k = layer.k_blocks.flatten(0, 1)[newest]
                v = layer.v_blocks.flatten(0, 1)[newest]
                assert layer.block_positions.flatten()[newest] == seq_len - 1
            assert torch.equal(k, case.k[b, h])
            assert torch.equal(v, case.v[b, h])


@pytest.mark.parametrize("name", implementations())
@given(case=cases(), is_row=st.booleans())
def test_of_padding_nothing_is_written(name, case, is_row):
    # The first request becomes padding: by its row, or because it has no tokens.
    if is_row:
        case.rows[:1] = -1
    else:
        case.seq_lens[:1] = 0
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    expected, actual = cloned(case.layer), cloned(case.layer)
    DecodeLayer(expected, impl="reference").append(case.k, case.v, case.q, batch)
    with using(name) as impl:
        DecodeLayer(actual, impl=impl).append(case.k, case.v, case.q, batch)
    for pool in POOLS:
        assert torch.equal(bits(getattr(actual, pool)), bits(getattr(expected, pool))), pool


@pytest.mark.parametrize("name", implementations())
def test_rows_of_a_fused_projection_need_no_copy(name):
    case = make_decode_case(
        prompt_lens=[20, 5],
        kept_lens=[[10, 3], [5, 2]],
        generated=[1, 4],
        head_map=[-1, 0, -2],
        group_size=3,
        head_dim=64,
        pivot_map=[-1, 0, -1],
    )
    fused = torch.randn(2, (9 + 3 + 3) * 64)
    q, k, v = (part.unflatten(1, (-1, 64)) for part in fused.split([9 * 64, 3 * 64, 3 * 64], 1))
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    expected, actual = cloned(case.layer), cloned(case.layer)
    DecodeLayer(expected, impl="reference").append(k, v, q, batch)
    with using(name) as impl:
        DecodeLayer(actual, impl=impl).append(k, v, q, batch)
    for pool in POOLS:
        assert torch.equal(bits(getattr(actual, pool)), bits(getattr(expected, pool))), pool


def test_the_function_and_the_launcher_do_the_same():
    case = make_decode_case(
        prompt_lens=[20],
        kept_lens=[[10]],
        generated=[2],
        head_map=[-1, 0],
        group_size=2,
        head_dim=16,
        pivot_map=[-1, 0],
    )
    by_function, by_launcher = cloned(case.layer), cloned(case.layer)
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    DecodeLayer(by_launcher).append(case.k, case.v, case.q, batch)
    append_rows(
        case.k,
        case.v,
        **{name: getattr(by_function, name) for name in POOLS},
        block_table=by_function.block_table,
        kept_lens=by_function.kept_lens,
        prompt_lens=by_function.prompt_lens,
        rows=case.rows,
        seq_lens=case.seq_lens,
        token_ids=case.token_ids,
        head_map=by_function.head_map,
        q=case.q,
        pivot_map=by_function.pivot_map,
    )
    for pool in POOLS:
        assert torch.equal(bits(getattr(by_function, pool)), bits(getattr(by_launcher, pool))), pool


def test_new_rows_of_another_dtype_are_refused():
    case = make_decode_case(
        prompt_lens=[4], kept_lens=[[2]], generated=[1], head_map=[-1], group_size=1, head_dim=16
    )
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    with pytest.raises(ValueError, match=r"k must be torch\.float32, got torch\.bfloat16"):
        DecodeLayer(case.layer).append(case.k.bfloat16(), case.v, None, batch)


def test_a_batch_without_token_ids_cannot_append():
    case = make_decode_case(
        prompt_lens=[4], kept_lens=[[2]], generated=[1], head_map=[-1], group_size=1, head_dim=16
    )
    with pytest.raises(ValueError, match="token_ids"):
        DecodeLayer(case.layer).append(case.k, case.v, None, DecodeBatch(case.rows, case.seq_lens))
