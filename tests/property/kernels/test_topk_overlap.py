"""``topk_overlap``: scores against the reference, and sets exact for the scores that were found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_kernels import top_bits, topk_overlap
from hetero_kernels.testing import implementations, using

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(
    num_items, num_queries, group_size, lengths, counts, head_dim=64, dtype=torch.float32, seed=0
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    width = max(lengths, default=0)
    num_planes, num_rows, num_slots = 3, num_items + 2, width + 11
    pool = torch.full((num_planes, num_slots, head_dim), float("nan"))
    slots = torch.randperm(num_slots, generator=generator)[:width]
    pool[:, slots] = normal(num_planes, width, head_dim)
    req_to_token = torch.full((num_rows, width + 4), 2**30, dtype=torch.int32)
    rows = torch.randperm(num_rows, generator=generator)[:num_items]
    for i, row in enumerate(rows.tolist()):
        order = torch.randperm(width, generator=generator)[: lengths[i]]
        req_to_token[row, : lengths[i]] = slots[order].to(torch.int32)
    num_words = width // 32 + 1
    reference = torch.randint(-(2**31), 2**31, (num_items, num_words), generator=generator)
    return {
        "queries": (normal(num_items, num_queries, group_size, head_dim) * 2).to(dtype),
        "keys": pool.to(dtype),
        "planes": torch.randint(
            0, num_planes, (num_items,), dtype=torch.int32, generator=generator
        ),
        "req_to_token": req_to_token,
        "rows": rows,
        "prompt_lens": torch.tensor(lengths, dtype=torch.int32),
        "top_k": torch.tensor(counts, dtype=torch.int32),
        "reference": reference.to(torch.int32),
        "scale": head_dim**-0.5,
    }


@st.composite
def cases(draw, longest=130):
    lengths = draw(st.lists(st.sampled_from([1, 5, 63, 64, 65, longest]), min_size=0, max_size=3))
    return make(
        num_items=len(lengths),
        num_queries=draw(st.sampled_from([1, 4, 5])),
        group_size=draw(st.sampled_from([1, 3, 4, 8])),
        lengths=lengths,
        counts=[draw(st.integers(0, n)) for n in lengths],
        head_dim=draw(st.sampled_from([16, 64, 80])),
        dtype=draw(st.sampled_from(DTYPES)),
        seed=draw(st.integers(0, 99)),
    )


def popcount(words):
    return sum(int(word).bit_count() for word in (words & 0xFFFFFFFF).tolist())


def tied():
    """Equal scores, of which a choice takes the lowest: arguments, and the overlap that follows."""
    # Zero queries: all probabilities are equal, the two positions at each end score less.
    case = make(1, 1, 3, [40], [10])
    case["queries"].zero_()
    case["reference"] = torch.tensor([[0b111_1111_1100, 0]], dtype=torch.int32)  # positions 2 .. 10
    # Chosen: 2 .. 11, of which the reference holds all but 11.
    return case, 0.9


@pytest.mark.parametrize("name", implementations())
@given(case=cases())
def test_newest_scores_are_the_references(name, case):
    expected = topk_overlap(**case, impl="reference")[1]
    with using(name) as impl:
        actual = topk_overlap(**case, impl=impl)[1]
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=1e-12)


@pytest.mark.parametrize("name", [*implementations(), "reference"])
@given(case=cases())
def test_overlap_counts_exactly_the_chosen_positions(name, case):
    # Of each query's own scores, so that rounding cannot swap two nearly equal positions.
    def run(**arguments):
        if name == "reference":
            return topk_overlap(**arguments, impl="reference")
        with using(name) as impl:
            return topk_overlap(**arguments, impl=impl)

    overlap, _ = run(**case)
    num_words = case["reference"].shape[1]
    for s in range(case["queries"].shape[1]):
        _, scores = run(**{**case, "queries": case["queries"][:, s : s + 1].contiguous()})
        for i, count in enumerate(case["top_k"].tolist()):
            mine = scores[i, : int(case["prompt_lens"][i])]
            chosen = top_bits(mine, count, num_words, impl="reference")
            common = popcount((chosen & case["reference"][i]).long())
            assert overlap[i, s] == pytest.approx(common / count if count else 0.0, abs=1e-6)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_prompt(name, dtype):
    case = make(2, 5, 3, [1000, 777], [500, 388], dtype=dtype, seed=5)
    expected = topk_overlap(**case, impl="reference")
    with using(name) as impl:
        actual = topk_overlap(**case, impl=impl)
    torch.testing.assert_close(actual[1], expected[1], rtol=5e-5, atol=1e-12)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=2.5 / 388)


@pytest.mark.parametrize("name", [*implementations(), "reference"])
def test_equal_scores_choose_the_lowest_positions(name):
    case, expected = tied()
    if name == "reference":
        overlap, _ = topk_overlap(**case, impl="reference")
    else:
        with using(name) as impl:
            overlap, _ = topk_overlap(**case, impl=impl)
    assert overlap.item() == pytest.approx(expected)


@given(case=cases())
def test_the_overlap_of_a_set_with_itself_is_one(case):
    scores = topk_overlap(**case, impl="reference")[1]
    for i, length in enumerate(case["prompt_lens"].tolist()):
        case["reference"][i] = top_bits(
            scores[i, :length], int(case["top_k"][i]), case["reference"].shape[1], impl="reference"
        )
    newest = topk_overlap(**case, impl="reference")[0][:, -1]
    assert torch.equal(newest, (case["top_k"] > 0).float())


@given(case=cases())
def test_scores_beyond_a_prompt_are_zero(case):
    scores = topk_overlap(**case)[1]
    for row, length in zip(scores, case["prompt_lens"].tolist(), strict=True):
        assert torch.equal(row[length:], torch.zeros_like(row[length:]))


def test_a_reference_shorter_than_the_prompt_is_refused():
    case = make(1, 1, 1, [100], [10])
    case["reference"] = case["reference"][:, :2].contiguous()
    with pytest.raises(ValueError, match="prompt_lens must fit"):
        topk_overlap(**case)
