"""``decode_attention``: laws of the reference, and every implementation against it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from hetero_kernels import DecodeBatch, DecodeLayer, decode_attention
from hetero_kernels.testing import LAST_DIGIT, TOLERANCE, implementations, make_decode_case, using

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def attended(case, impl):
    """Append, attend, and return the result; the case's pools are left as they are."""
    pools = ("k_resident", "v_resident", "k_blocks", "v_blocks", "block_positions")
    layer = dataclasses.replace(
        case.layer, **{name: getattr(case.layer, name).clone() for name in pools}
    )
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    launcher = DecodeLayer(layer, impl=impl)
    launcher.append(case.k, case.v, None, batch)
    return launcher.attend(case.q, torch.empty_like(case.q), batch)


@st.composite
def cases(
    draw,
    dtypes=DTYPES,
    lengths=(1, 63, 64, 65, 1000),
    head_dims=(16, 48, 64, 80, 128),
    block_tokens=(1, 16, 48),
    has_pivots=False,
):
    head_map = draw(st.sampled_from([[0], [-1], [-1, 0, -2], [1, -2, 0, -1]]))
    prompt_lens = draw(st.lists(st.sampled_from(lengths), min_size=0, max_size=3))
    num_compressed = sum(place < 0 for place in head_map)
    kept_lens = [
        [draw(st.sampled_from(sorted({0, n // 2, n}))) for _ in range(num_compressed)]
        for n in prompt_lens
    ]
    pivot_maps = st.sampled_from([[-1] * len(head_map), list(range(len(head_map)))])
    return make_decode_case(
        prompt_lens=prompt_lens,
        kept_lens=kept_lens,
        generated=[draw(st.integers(1, 70)) for _ in prompt_lens],
        head_map=head_map,
        group_size=draw(st.sampled_from([1, 3, 4, 8])),
        head_dim=draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        block_tokens=draw(st.sampled_from(block_tokens)),
        pivot_map=draw(pivot_maps) if has_pivots else None,
        seed=draw(st.integers(0, 99)),
    )


def dense(case, layer):
    """Dense attention over what each head of a layer holds, by torch."""
    out = torch.empty_like(case.q)
    for b, (row, seq_len) in enumerate(
        zip(case.rows.tolist(), case.seq_lens.tolist(), strict=True)
    ):
        for h, place in enumerate(layer.head_map.tolist()):
            slots = layer.slots(h, row, layer.length(h, row, seq_len))
            keys, values = (
                (layer.k_resident[place], layer.v_resident[place])
                if place >= 0
                else (layer.k_blocks.flatten(0, 1), layer.v_blocks.flatten(0, 1))
            )
            group = slice(h * layer.group_size, (h + 1) * layer.group_size)
            out[b, group] = scaled_dot_product_attention(
                case.q[b, group], keys[slots], values[slots], scale=layer.scale
            )
    return out


def side_by_side(layer):
    """The same layer with keys and values of a row side by side, as one pool has them."""
    D = layer.head_dim
    resident = torch.cat([layer.k_resident, layer.v_resident], dim=2)
    blocks = torch.cat([layer.k_blocks, layer.v_blocks], dim=2)
    return dataclasses.replace(
        layer,
        k_resident=resident[..., :D],
        v_resident=resident[..., D:],
        k_blocks=blocks[..., :D],
        v_blocks=blocks[..., D:],
    )


def case_without_rows():
    """Two requests; of the first the compressed head holds nothing, not even a new token."""
    case = make_decode_case(
        prompt_lens=[5, 90],
        kept_lens=[[0], [40]],
        generated=[1, 1],
        head_map=[-1],
        group_size=2,
        head_dim=16,
    )
    case.layer.prompt_lens[int(case.rows[0])] = int(case.seq_lens[0])
    return case


@pytest.mark.parametrize("name", implementations())
@given(case=cases())
def test_result_is_the_references(name, case):
    expected = attended(case, "reference")
    with using(name) as impl:
        actual = attended(case, impl)
    torch.testing.assert_close(
        actual, expected, rtol=LAST_DIGIT[case.q.dtype], atol=2 * TOLERANCE[case.q.dtype]
    )


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize(
    ("dtype", "group_size", "head_dim"),
    [
        (torch.float32, 1, 64),
        (torch.float32, 3, 64),
        (torch.float32, 4, 128),
        (torch.float32, 5, 80),
        (torch.float32, 8, 256),
        (torch.bfloat16, 3, 64),
        (torch.bfloat16, 8, 128),
        (torch.float16, 4, 128),
    ],
)
def test_long_heads_are_split_and_merged(name, dtype, group_size, head_dim):
    case = make_decode_case(
        prompt_lens=[5000, 1, 2300],
        kept_lens=[[2500, 0], [1, 1], [2300, 7]],
        generated=[9, 1, 30],
        head_map=[-2, 0, -1],
        group_size=group_size,
        head_dim=head_dim,
        dtype=dtype,
    )
    expected = attended(case, "reference")
    with using(name) as impl:
        actual = attended(case, impl)
    torch.testing.assert_close(actual, expected, rtol=LAST_DIGIT[dtype], atol=2 * TOLERANCE[dtype])


@given(case=cases(dtypes=[torch.float32], lengths=(1, 64, 65)))
def test_a_full_budget_is_dense_attention(case):
    # All kept: a compressed head then holds the same tokens as a dense head would.
    layer = case.layer
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    DecodeLayer(layer, impl="reference").append(case.k, case.v, None, batch)
    out = DecodeLayer(layer, impl="reference").attend(case.q, torch.empty_like(case.q), batch)
    torch.testing.assert_close(out, dense(case, layer), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", implementations())
@given(seed=st.integers(0, 99))
def test_the_order_of_rows_does_not_matter(name, seed):
    case = make_decode_case(
        prompt_lens=[100],
        kept_lens=[[80]],
        generated=[1],
        head_map=[-1],
        group_size=3,
        head_dim=64,
        block_tokens=1,
        seed=seed,
    )
    with using(name) as impl:
        before = attended(case, impl)
        table = case.layer.block_table[int(case.rows[0]), 0]
        table[:80] = table[:80][torch.randperm(80)]
        after = attended(case, impl)
    torch.testing.assert_close(after, before, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("magnitude", [1e-3, 30.0, 1e4])
def test_large_and_small_scores_neither_overflow_nor_vanish(name, magnitude):
    case = make_decode_case(
        prompt_lens=[700],
        kept_lens=[[300]],
        generated=[3],
        head_map=[-1, 0],
        group_size=3,
        head_dim=64,
    )
    case.q.mul_(magnitude)
    expected = attended(case, "reference")
    with using(name) as impl:
        actual = attended(case, impl)
    assert actual.isfinite().all()
    # The scores themselves are rounded: an error grows with their size.
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * max(1.0, magnitude))


@pytest.mark.parametrize("name", implementations())
def test_the_number_of_threads_changes_rounding_only(name):
    case = make_decode_case(
        prompt_lens=[3000],
        kept_lens=[[1500]],
        generated=[3],
        head_map=[-1, 0],
        group_size=3,
        head_dim=64,
    )
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with using(name) as impl:
                results.append(attended(case, impl))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", [*implementations(), "reference"])
def test_a_head_without_rows_gives_zeros(name):
    case = case_without_rows()
    batch = DecodeBatch(case.rows[:1], case.seq_lens[:1])
    out = torch.full_like(case.q[:1], float("nan"))
    with using(name) as impl:
        DecodeLayer(case.layer, impl=impl).attend(case.q[:1], out, batch)
    assert torch.equal(out, torch.zeros_like(out))


def with_padding(case):
    """The batch of a case between requests that are none: a row that is none, or no tokens."""
    wide = 2**30
    return DecodeBatch(
        torch.cat([torch.tensor([-1]), case.rows, case.rows[:1]]),
        torch.cat([torch.tensor([wide]), case.seq_lens, torch.tensor([0])]),
        torch.cat([torch.tensor([wide]), case.token_ids, torch.tensor([wide])]),
    )


def padded(rows):
    """Rows of a batch as `with_padding` wants them."""
    return torch.cat([torch.full_like(rows[:1], float("nan")), rows, rows[:1]])


@pytest.mark.parametrize("name", [*implementations(), "reference"])
@pytest.mark.parametrize("length", [90, 19000])
def test_padding_gives_zeros_and_changes_nothing_else(name, length):
    case = make_decode_case(
        prompt_lens=[length, 300],
        kept_lens=[[0], [299]],
        generated=[1, 1],
        head_map=[-1, 0],
        group_size=3,
        head_dim=16,
    )
    batch = with_padding(case)
    q = padded(case.q)
    with using(name) as impl:
        expected = attended(case, impl)
        layer = DecodeLayer(case.layer, impl=impl)
        layer.append(padded(case.k), padded(case.v), None, batch)
        out = layer.attend(q, torch.full_like(q, float("nan")), batch)
    assert torch.equal(out[[0, 3]], torch.zeros_like(out[:2]))
    torch.testing.assert_close(out[1:3], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*implementations(), "reference"])
@pytest.mark.parametrize("length", [40, 5000])
@pytest.mark.parametrize("culprit", ["query", "key"])
def test_what_is_no_number_stays_none(name, length, culprit):
    case = make_decode_case(
        prompt_lens=[length],
        kept_lens=[[length // 2]],
        generated=[1],
        head_map=[-1, 0],
        group_size=2,
        head_dim=64,
    )
    if culprit == "query":
        case.q[0, 1] = float("nan")
        affected = [1]
    else:
        case.layer.k_resident[0, case.layer.req_to_token[case.rows[0], 7].long()] = float("nan")
        affected = [2, 3]
    with using(name) as impl:
        out = attended(case, impl)
    is_nan = out[0].isnan().all(dim=1)
    assert is_nan.nonzero().flatten().tolist() == affected
    assert out[0, ~is_nan].isfinite().all()


@pytest.mark.parametrize("name", implementations())
def test_queries_and_pools_may_be_strided_views(name):
    case = make_decode_case(
        prompt_lens=[90, 10],
        kept_lens=[[40], [10]],
        generated=[2, 5],
        head_map=[-1, 0],
        group_size=2,
        head_dim=32,
    )
    expected = attended(case, "reference")
    layer = side_by_side(case.layer)
    wide = torch.zeros(2, 4 * 32 + 7)
    wide[:, : 4 * 32] = case.q.flatten(1)
    q = wide[:, : 4 * 32].unflatten(1, (4, 32))
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    with using(name) as impl:
        launcher = DecodeLayer(layer, impl=impl)
        launcher.append(case.k, case.v, None, batch)
        actual = launcher.attend(q, torch.empty_like(case.q), batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[torch.float32])


def test_the_function_and_the_launcher_do_the_same():
    case = make_decode_case(
        prompt_lens=[90],
        kept_lens=[[40]],
        generated=[2],
        head_map=[-1, 0],
        group_size=2,
        head_dim=32,
    )
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    launcher = DecodeLayer(case.layer)
    launcher.append(case.k, case.v, None, batch)
    expected = launcher.attend(case.q, torch.empty_like(case.q), batch)
    names = ("k_resident", "v_resident", "k_blocks", "v_blocks", "req_to_token", "block_table")
    actual = decode_attention(
        case.q,
        torch.empty_like(case.q),
        **{name: getattr(case.layer, name) for name in names},
        kept_lens=case.layer.kept_lens,
        prompt_lens=case.layer.prompt_lens,
        rows=case.rows,
        seq_lens=case.seq_lens,
        head_map=case.layer.head_map,
        scale=case.layer.scale,
    )
    assert torch.equal(actual, expected)


def test_a_head_map_outside_the_pools_is_refused():
    case = make_decode_case(
        prompt_lens=[4], kept_lens=[[2]], generated=[1], head_map=[-1], group_size=1, head_dim=16
    )
    for place in (0, -3):
        with pytest.raises(ValueError, match=r"head_map\[0\]"):
            dataclasses.replace(case.layer, head_map=torch.tensor([place], dtype=torch.int32))


def test_memory_of_other_devices_and_of_no_size_is_refused():
    case = make_decode_case(
        prompt_lens=[4], kept_lens=[[2]], generated=[1], head_map=[-1], group_size=1, head_dim=16
    )
    elsewhere = case.layer.block_table.to("meta")
    with pytest.raises(ValueError, match="block_table must be on cpu like k_blocks, got meta"):
        dataclasses.replace(case.layer, block_table=elsewhere)
    empty = torch.empty(3, 0, 16)
    with pytest.raises(ValueError, match=r"block_tokens .* must be at least 1, got 0"):
        dataclasses.replace(case.layer, k_blocks=empty, v_blocks=empty, block_positions=None)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        dataclasses.replace(case.layer, group_size=0)
    with pytest.raises(ValueError, match="seq_lens must be on cpu like rows, got meta"):
        DecodeBatch(case.rows, case.seq_lens.to("meta"))
    layer, batch = DecodeLayer(case.layer), DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    layer.append(case.k, case.v, None, batch)
    layer.attend(case.q, torch.empty_like(case.q), batch)
    # Also where a call like it was checked before.
    with pytest.raises(ValueError, match="q must be on cpu like k_blocks, got meta"):
        layer.attend(case.q.to("meta"), torch.empty_like(case.q), batch)
    with pytest.raises(ValueError, match="v must be on cpu like k_blocks, got meta"):
        layer.append(case.k, case.v.to("meta"), None, batch)


def test_queries_that_do_not_fit_the_batch_are_refused():
    case = make_decode_case(
        prompt_lens=[4], kept_lens=[[2]], generated=[1], head_map=[-1], group_size=1, head_dim=16
    )
    batch = DecodeBatch(case.rows, case.seq_lens)
    wrong = torch.empty(2, 1, 16)
    with pytest.raises(ValueError, match=r"q must have shape \[1, 1, 16\]"):
        DecodeLayer(case.layer).attend(wrong, wrong, batch)
