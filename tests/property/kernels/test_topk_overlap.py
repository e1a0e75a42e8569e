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
    lengths = draw(
        st.lists(st.sampled_from([0, 1, 5, 63, 64, 65, longest]), min_size=0, max_size=3)
    )
    return make(
        num_items=len(lengths),
        num_queries=draw(st.sampled_from([1, 2, 4, 5])),
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
    check_overlaps(name, case)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize(("num_queries", "group_size"), [(5, 3), (2, 3), (5, 8), (5, 12)])
def test_overlaps_of_long_prompts_are_exact_too(name, num_queries, group_size):
    lengths = [4001, 2047, 1024]
    counts = [n // 3 for n in lengths]
    check_overlaps(name, make(3, num_queries, group_size, lengths, counts, seed=num_queries))


def check_overlaps(name, case):
    """Each query's overlap is that of the scores that are reported when it is the newest one.

    With as many queries, so that rounding cannot swap two nearly equal positions.
    """

    def run(**arguments):
        with using(name) as impl:
            return topk_overlap(**arguments, impl=impl)

    overlap, _ = run(**case)
    num_words = case["reference"].shape[1]
    num_queries = case["queries"].shape[1]
    for s in range(num_queries):
        rolled = case["queries"].roll(num_queries - 1 - s, dims=1).contiguous()
        _, scores = run(**{**case, "queries": rolled})
        for i, count in enumerate(case["top_k"].tolist()):
            mine = scores[i, : int(case["prompt_lens"][i])]
            chosen = top_bits(mine, count, num_words, impl="reference")
            common = popcount((chosen & case["reference"][i]).long())
            assert overlap[i, s] == pytest.approx(common / count if count else 0.0, abs=1e-6)


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rise", [-400.0, -100.0, 100.0, 400.0])
@pytest.mark.parametrize(("length", "start"), [(200, 70), (200, 0), (20, 0)])
def test_scores_may_rise_or_fall_by_more_than_an_exponent_holds(name, dtype, rise, length, start):
    # By `rise` in natural units from position `start` on, in every query.
    count = length // 3
    case = make(1, 5, 3, [length], [count], dtype=torch.float32, seed=1)
    case["queries"][..., 0] = 8.0
    case["keys"][..., 0] = 0.0
    late = case["req_to_token"][case["rows"], start:length].flatten().long()
    case["keys"][:, late, 0] = rise / (8.0 * case["scale"])
    case["queries"], case["keys"] = case["queries"].to(dtype), case["keys"].to(dtype)
    expected = topk_overlap(**case, impl="reference")
    with using(name) as impl:
        actual = topk_overlap(**case, impl=impl)
    torch.testing.assert_close(actual[1], expected[1], rtol=2e-4, atol=1e-12)
    assert (actual[0] - expected[0]).abs().max() <= 2.5 / count


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_lie_in_order_are_read_as_they_lie(name, dtype):
    case = make(2, 5, 3, [300, 299], [90, 90], dtype=dtype, seed=2)
    case["keys"] = torch.randn(3, 320, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    case["req_to_token"][:, :300] = torch.arange(7, 307, dtype=torch.int32)
    # One gap in the middle of a row, where neighbours are no neighbours.
    case["req_to_token"][case["rows"][1], 150:300] += 5
    expected = topk_overlap(**case, impl="reference")
    with using(name) as impl:
        actual = topk_overlap(**case, impl=impl)
    torch.testing.assert_close(actual[1], expected[1], rtol=5e-5, atol=1e-12)
    assert (actual[0] - expected[0]).abs().max() <= 2.5 / 90


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_queries", "group_size", "head_dim"), [(5, 12, 64), (5, 3, 256), (5, 13, 128), (2, 1, 256)]
)
def test_many_queries_and_long_rows(name, dtype, num_queries, group_size, head_dim):
    case = make(2, num_queries, group_size, [200, 131], [70, 40], head_dim, dtype, seed=4)
    expected = topk_overlap(**case, impl="reference")
    with using(name) as impl:
        actual = topk_overlap(**case, impl=impl)
    torch.testing.assert_close(actual[1], expected[1], rtol=5e-5, atol=1e-12)
    assert (actual[0] - expected[0]).abs().max() <= 2.5 / 40


@pytest.mark.parametrize("name", [*implementations(), "reference"])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_who_wants_all_positions_gets_those_of_score_zero_too(name, num_queries):
    # Probabilities that fp32 cannot hold, in the middle of a prompt.
    case = make(1, num_queries, 3, [64], [64])
    case["queries"][..., 0] = 8.0
    case["queries"][..., 1:] = 0.0
    slots = case["req_to_token"][case["rows"][0], :64].long()
    case["keys"][:, slots, 0] = 0.0
    case["keys"][:, slots[40], 0] = 40.0
    case["keys"][:, slots[48:60], 0] = -90.0
    case["reference"].fill_(-1)
    with using(name) as impl:
        overlap, _ = topk_overlap(**case, impl=impl)
    assert torch.equal(overlap, torch.ones(1, num_queries))


@pytest.mark.parametrize("name", [*implementations(), "reference"])
def test_padding_gives_zeros_and_reads_nothing(name):
    case = make(3, 5, 3, [70, 40, 0], [20, 10, 0])
    case["rows"][0] = -1
    case["planes"][0] = 2**30
    with using(name) as impl:
        overlap, scores = topk_overlap(**case, impl=impl)
    expected = topk_overlap(**case, impl="reference")
    assert torch.equal(overlap[[0, 2]], torch.zeros(2, 5))
    assert torch.equal(scores[[0, 2]], torch.zeros(2, 70))
    torch.testing.assert_close(scores[1], expected[1][1], rtol=5e-5, atol=1e-12)


@pytest.mark.parametrize("name", [*implementations(), "reference"])
@pytest.mark.parametrize("num_queries", [2, 5])
@pytest.mark.parametrize("member", [0, 1, 2])
def test_a_query_that_is_no_number_gives_none(name, num_queries, member):
    case = make(1, num_queries, 3, [70], [20])
    case["queries"][0, -1, member, 5] = float("nan")
    with using(name) as impl:
        _, scores = topk_overlap(**case, impl=impl)
        others = topk_overlap(**{**case, "queries": case["queries"].roll(1, dims=1)}, impl=impl)[1]
    assert scores.isnan().all()
    assert others.isfinite().all()


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


@pytest.mark.parametrize("width", [None, 64, 128])
def test_lengths_that_cannot_be_are_refused(width):
    case = make(2, 1, 1, [100, 60], [10, 10])
    case["prompt_lens"][1] = -5
    with pytest.raises(ValueError, match="prompt_lens must be at least 0, got -5"):
        topk_overlap(**case, width=width)
    case["prompt_lens"][1] = 60
    if width == 64:
        with pytest.raises(ValueError, match=r"at most width \(64\), got 100"):
            topk_overlap(**case, width=width)


def test_items_without_queries_are_refused():
    case = make(1, 5, 3, [10], [3])
    for queries, what in (
        (case["queries"][:, :0], "groups"),
        (case["queries"][:, :, :0], "a group"),
    ):
        with pytest.raises(ValueError, match=f"{what}.* must be at least 1, got 0"):
            topk_overlap(**{**case, "queries": queries})


@pytest.mark.parametrize(
    "argument", ["keys", "planes", "req_to_token", "rows", "top_k", "reference"]
)
def test_tensors_elsewhere_are_refused(argument):
    case = make(1, 5, 3, [10], [3])
    case[argument] = case[argument].to("meta")
    with pytest.raises(ValueError, match=f"{argument} must be on cpu like queries, got meta"):
        topk_overlap(**case)


@pytest.mark.parametrize("scale", [0.0, -0.125, float("nan")])
def test_a_scale_that_does_not_keep_the_order_is_refused(scale):
    case = make(1, 1, 1, [10], [3])
    with pytest.raises(ValueError, match="scale must be positive"):
        topk_overlap(**{**case, "scale": scale})
