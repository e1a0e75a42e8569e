"""Scores, drift check and selection in Triton against their references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hetero_kernels import (
    QuantizedKeys,
    quantize_keys,
    score_positions,
    top_bits,
    top_positions,
    topk_overlap,
    window_scores,
)
from hetero_kernels.testing import TOLERANCE, on_device
from tests.property.kernels.test_topk_overlap import cases, make, popcount, tied

few = settings(max_examples=15, suppress_health_check=list(HealthCheck))
DTYPES = sorted(TOLERANCE, key=str)
# Few distinct values: many ties. Subnormals, both zeros and infinities included.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 0.5, float("inf"), float("-inf")])
FREE = st.floats(allow_nan=False, width=32)


@pytest.fixture(autouse=True)
def _small_splits(device, monkeypatch):
    """Many splits and blocks for short rows, which are all that the interpreter can take."""
    from hetero_kernels import triton_scores, triton_select

    monkeypatch.setattr(triton_scores, "SPLIT_TOKENS", 150)
    monkeypatch.setattr(triton_select, "SPLIT_SCORES", 128)
    if device == "cpu":
        monkeypatch.setattr(triton_select, "BLOCK", 64)


def assert_same_scores(actual, expected):
    # Relative: a small score decides as much as a large one where a budget ends among small ones.
    torch.testing.assert_close(actual.cpu(), expected, rtol=5e-5, atol=1e-12)


@few
@given(
    num_heads=st.integers(0, 3),
    group_size=st.sampled_from([1, 3, 4, 8, 17]),
    length=st.sampled_from([0, 1, 2, 5, 60, 61, 63, 64, 65, 200]),
    head_dim=st.sampled_from([16, 80, 128]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_scores_are_the_references(device, num_heads, group_size, length, head_dim, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(num_heads, group_size, head_dim, generator=generator) * 2).to(dtype)
    k = torch.randn(num_heads, length, head_dim, generator=generator).to(dtype)
    expected = score_positions(q, k, head_dim**-0.5, impl="reference")
    actual = score_positions(q.to(device), k.to(device), head_dim**-0.5, impl="triton")
    assert_same_scores(actual, expected)
    slots = torch.randperm(length + 9)[:length].to(torch.int32)
    pool = torch.full((num_heads, length + 9, head_dim), float("nan"), dtype=dtype)
    pool[:, slots.long()] = k
    named = score_positions(
        q.to(device), pool.to(device), head_dim**-0.5, slots=slots.to(device), impl="triton"
    )
    assert torch.equal(named, actual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "head_dim"), [(8, 64), (8, 80), (4, 32), (4, 96)])
def test_quantised_keys_score_as_what_they_stand_for(device, dtype, bits, head_dim):
    groups = 1 if bits == 8 else head_dim // 32
    stored, kind = (head_dim, torch.int8) if bits == 8 else (head_dim // 2, torch.uint8)
    keys = QuantizedKeys(
        torch.full((3, 160, stored), 99, dtype=kind),
        torch.full((3, 160, groups), float("nan"), dtype=torch.bfloat16),
    )
    slots = torch.randperm(160)[:130]
    quantize_keys(torch.randn(2, 130, head_dim).to(dtype), keys, slice(1, 3), slots)
    q = (torch.randn(2, 3, head_dim) * 2).to(dtype)
    where = {"planes": torch.tensor([2, 1], dtype=torch.int32), "slots": slots.int()}
    expected = score_positions(q, keys, 0.2, **where, impl="reference")
    moved = on_device({"q": q, "k": keys, **where}, device)
    assert_same_scores(score_positions(**moved, scale=0.2, impl="triton"), expected)


@pytest.mark.parametrize("member", [0, 2])
def test_a_query_that_is_no_number_gives_none(device, member):
    q, k = torch.randn(2, 3, 16), torch.randn(2, 300, 16)
    q[0, member, 5] = float("nan")
    scores = score_positions(q.to(device), k.to(device), 0.25, impl="triton")
    assert scores[0].isnan().all()
    assert_same_scores(scores[1], score_positions(q, k, 0.25, impl="reference")[1])
    window = window_scores(q[:, :, None].to(device), k.to(device), 0.25, impl="triton")
    assert window[0].isnan().all()
    assert window[1].isfinite().all()


def test_extreme_queries_give_finite_scores(device):
    q = torch.randn(1, 3, 64, device=device) * 1e4
    scores = score_positions(q, torch.randn(1, 300, 64, device=device), 0.125, impl="triton")
    assert scores.isfinite().all()
    assert (scores >= 0).all()


@few
@given(
    num_heads=st.integers(0, 2),
    window=st.sampled_from([1, 4, 9, 32]),
    group_size=st.sampled_from([1, 3, 4]),
    more=st.sampled_from([0, 1, 3, 50, 200]),
    head_dim=st.sampled_from([16, 80]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_window_scores_are_the_references(
    device, num_heads, window, group_size, more, head_dim, dtype, seed
):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(num_heads, window, group_size, head_dim, generator=generator) * 2
    k = torch.randn(num_heads, window + more, head_dim, generator=generator)
    q, k = q.to(dtype), k.to(dtype)
    expected = window_scores(q, k, head_dim**-0.5, impl="reference")
    actual = window_scores(q.to(device), k.to(device), head_dim**-0.5, impl="triton")
    assert_same_scores(actual, expected)


@few
@given(case=cases(longest=200), spare=st.sampled_from([None, 0, 3]))
def test_overlap_counts_exactly_the_chosen_positions(device, case, spare):
    width = None
    lengths = case["prompt_lens"].tolist()
    if spare is not None:
        limit = min(32 * case["reference"].shape[1], case["req_to_token"].shape[1])
        width = min(max(lengths, default=0) + spare, limit)
    expected = topk_overlap(**case, width=width, impl="reference")[1]
    moved = on_device(case, device)
    overlap, scores = topk_overlap(**moved, width=width, impl="triton")
    assert_same_scores(scores, expected)
    # The set is judged by the scores that were found: rounding may swap two nearly equal ones.
    for s in range(case["queries"].shape[1]):
        one = {**moved, "queries": moved["queries"][:, s : s + 1].contiguous()}
        mine = topk_overlap(**one, impl="triton")[1].cpu()
        for i, count in enumerate(case["top_k"].tolist()):
            chosen = top_bits(
                mine[i, : lengths[i]], count, case["reference"].shape[1], impl="reference"
            )
            common = popcount((chosen & case["reference"][i]).long())
            assert overlap[i, s].item() == pytest.approx(common / count if count else 0, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_prompt(device, dtype):
    case = make(2, 5, 3, [1000, 777], [500, 388], dtype=dtype, seed=5)
    expected = topk_overlap(**case, impl="torch")
    actual = topk_overlap(**on_device(case, device), impl="triton")
    assert_same_scores(actual[1], expected[1])
    torch.testing.assert_close(actual[0].cpu(), expected[0], rtol=0, atol=2.5 / 388)


def test_an_item_that_is_padding_gives_zeros(device):
    case = make(3, 2, 3, [70, 40, 65], [30, 20, 10])
    expected = topk_overlap(**case, impl="torch")
    case["rows"][1] = -1
    for impl, where in (("triton", device), ("torch", "cpu"), ("reference", "cpu")):
        overlap, scores = topk_overlap(**on_device(case, where), impl=impl)
        assert torch.equal(overlap[1].cpu(), torch.zeros(2))
        assert torch.equal(scores[1].cpu(), torch.zeros(70))
        assert_same_scores(scores[::2], expected[1][::2])


def test_equal_scores_choose_the_lowest_positions(device):
    case, expected = tied()
    overlap, _ = topk_overlap(**on_device(case, device), impl="triton")
    assert overlap.item() == pytest.approx(expected)


@st.composite
def score_rows(draw):
    shape = draw(st.sampled_from([(1, 1), (2, 7), (3, 64), (1, 65), (2, 200)]))
    return torch.from_numpy(
        draw(arrays("float32", shape, elements=draw(st.sampled_from([TIED, FREE]))))
    )


@few
@given(scores=score_rows(), data=st.data())
def test_positions_are_those_of_a_stable_sort(device, scores, data):
    num_rows, length = scores.shape
    k = torch.tensor(
        data.draw(st.lists(st.integers(0, length + 2), min_size=num_rows, max_size=num_rows)),
        dtype=torch.int32,
    )
    num_words = length // 32 + 2
    for order in ("ascending", "best"):
        expected = top_positions(scores, k, order=order, impl="reference")
        actual = top_positions(scores.to(device), k.to(device), order=order, impl="triton")
        assert torch.equal(actual.cpu(), expected)
        wide = top_positions(
            scores.to(device), k.to(device), order=order, width=length, impl="triton"
        )
        padding = (0, length - expected.shape[1])
        assert torch.equal(wide.cpu(), torch.nn.functional.pad(expected, padding, value=-1))
    bits = top_bits(scores.to(device), k.to(device), num_words, impl="triton")
    assert torch.equal(bits.cpu(), top_bits(scores, k, num_words, impl="reference"))


@pytest.mark.parametrize("order", ["ascending", "best"])
def test_both_zeros_are_equal_and_subnormals_are_not_zero(device, order):
    scores = torch.tensor([[-0.0, 0.0, -1e-40, -0.0, 1e-40, 0.0, float("-inf"), -1.0]])
    for k in range(9):
        expected = top_positions(scores, k, order=order, impl="reference")
        actual = top_positions(scores.to(device), k, order=order, impl="triton")
        assert torch.equal(actual.cpu(), expected)


@pytest.mark.parametrize("k", [0, 1, 500, 999, 1000, 7000])
def test_long_rows_with_heavy_ties(device, k):
    generator = torch.Generator().manual_seed(k)
    scores = torch.rand(2, 1000, generator=generator).mul(30).round().div(30)
    expected = top_positions(scores, k, order="best", impl="reference")
    actual = top_positions(scores.to(device), k, order="best", impl="triton")
    assert torch.equal(actual.cpu(), expected)


def test_more_than_there_are_places_for_stays_within_its_row(device):
    # In a replayed graph nobody looks at k: what finds no place must not land in the next row.
    scores = torch.rand(3, 200, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([150, 10, 180], dtype=torch.int32)
    whole = top_positions(scores, k, impl="reference")
    for width in (0, 1, 40):
        out = top_positions(scores.to(device), k.to(device), width=width, impl="triton")
        assert torch.equal(out.cpu(), whole[:, :width])


def test_prompts_longer_than_the_width_are_cut_to_it(device):
    # Likewise: behind the width lie slots that nobody owns, here and in a replayed graph.
    case = make(2, 2, 3, [70, 70], [20, 70])
    expected = topk_overlap(**case, impl="torch")
    case["prompt_lens"][1] = 2**30
    overlap, scores = topk_overlap(**on_device(case, device), width=70, impl="triton")
    assert_same_scores(scores, expected[1])
    torch.testing.assert_close(overlap.cpu(), expected[0], rtol=0, atol=0.06)


@pytest.mark.parametrize("impl", ["auto", "triton", "torch"])
def test_a_head_dimension_that_tensor_cores_do_not_take_is_refused(device, impl):
    q, k = torch.zeros(1, 2, 1, 8, device=device), torch.zeros(1, 9, 8, device=device)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 16 up to 256, got 8"):
        window_scores(q, k, 1.0, impl=impl)


def test_a_replay_of_the_drift_check_sees_what_lies_there_now(device, replay):
    cases = [
        make(2, 3, 3, lengths, counts, seed=seed, head_dim=16)
        for lengths, counts, seed in (([130, 70], [60, 30], 0), ([64, 130], [10, 65], 1))
    ]
    moved = on_device(cases[0], device)
    results = {}

    def call():
        overlap, scores = topk_overlap(**moved, width=130, impl="triton")
        chosen = top_positions(scores, moved["top_k"], order="best", width=80, impl="triton")
        results.update(overlap=overlap, scores=scores, chosen=chosen)

    again = replay(call)
    for case in (cases[1], cases[0], cases[1]):
        for name, value in case.items():
            if isinstance(value, torch.Tensor):
                moved[name].copy_(value)
        again()
        overlap, scores = topk_overlap(**case, impl="torch")
        assert_same_scores(results["scores"], scores)
        torch.testing.assert_close(results["overlap"].cpu(), overlap, rtol=0, atol=0.11)
        best = top_positions(results["scores"].cpu(), case["top_k"], order="best", impl="reference")
        assert torch.equal(results["chosen"][:, : best.shape[1]].cpu(), best)
