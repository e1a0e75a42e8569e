"""``top_positions`` and ``top_bits``: the exact set and order, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hetero_kernels import pack_positions, top_bits, top_positions
from hetero_kernels.testing import implementations, using

# Few distinct values: many ties. Subnormals, both zeros and infinities included.
TIED = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-40, 0.5, float("inf"), float("-inf")])
FREE = st.floats(allow_nan=False, width=32)


@st.composite
def scores(draw):
    shape = draw(st.sampled_from([(1, 1), (2, 7), (3, 64), (1, 65), (2, 200)]))
    return torch.from_numpy(
        draw(arrays("float32", shape, elements=draw(st.sampled_from([TIED, FREE]))))
    )


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("order", ["ascending", "best"])
@given(scores=scores(), data=st.data())
def test_positions_are_those_of_a_stable_sort(name, order, scores, data):
    num_rows, length = scores.shape
    k = torch.tensor(
        data.draw(st.lists(st.integers(0, length + 2), min_size=num_rows, max_size=num_rows)),
        dtype=torch.int32,
    )
    expected = top_positions(scores, k, order=order, impl="reference")
    with using(name) as impl:
        assert torch.equal(top_positions(scores, k, order=order, impl=impl), expected)
        bits = top_bits(scores, k, length // 32 + 2, impl=impl)
    assert torch.equal(bits, top_bits(scores, k, length // 32 + 2, impl="reference"))


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("k", [0, 1, 500, 999, 1000, 7000])
def test_long_rows_with_heavy_ties(name, k):
    generator = torch.Generator().manual_seed(k)
    scores = torch.rand(2, 1000, generator=generator).mul(30).round().div(30)
    expected = top_positions(scores, k, order="best", impl="reference")
    with using(name) as impl:
        assert torch.equal(top_positions(scores, k, order="best", impl=impl), expected)


def _misleading(pattern, length):
    """Scores of which an evenly spaced sample says little or nothing."""
    i = torch.arange(length, dtype=torch.float32)
    return {
        "ascending": i,
        "descending": -i,
        "constant": torch.full((length,), 0.25),
        "periodic": (i % 16) - 8,
        "mostly zero": (i % 97 == 3).float() * i,
        "one spike": (i == length - 2).float(),
        "halves": torch.where(i < length / 2, i - 1e6, i + 1e6),
        "steep": torch.exp2(-i / length * 200),
    }[pattern]


@pytest.mark.parametrize("name", implementations())
@pytest.mark.parametrize("length", [1023, 1024, 4096, 5003])
@pytest.mark.parametrize(
    "pattern",
    [
        "ascending",
        "descending",
        "constant",
        "periodic",
        "mostly zero",
        "one spike",
        "halves",
        "steep",
    ],
)
def test_no_pattern_of_long_rows_misleads_the_selection(name, length, pattern):
    scores = _misleading(pattern, length)[None]
    with using(name) as impl:
        for k in (1, 2, 17, length // 16, length // 2, length - 17, length - 1):
            expected = top_bits(scores, k, length // 32 + 1, impl="reference")
            assert torch.equal(top_bits(scores, k, length // 32 + 1, impl=impl), expected), k


@pytest.mark.parametrize("name", implementations())
@given(seed=st.integers(0, 999), k=st.integers(0, 3000), digits=st.sampled_from([1, 3, 9]))
def test_long_rows_of_any_distribution(name, seed, k, digits):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(1, 3000, generator=generator).exp().mul(10**digits).round()
    expected = top_bits(scores, k, 94, impl="reference")
    with using(name) as impl:
        assert torch.equal(top_bits(scores, k, 94, impl=impl), expected)


@pytest.mark.parametrize("name", implementations())
def test_many_long_rows_are_shared_by_threads(name):
    scores = torch.randn(9, 4000, generator=torch.Generator().manual_seed(1))
    k = torch.tensor([0, 1, 40, 1000, 1999, 2000, 3999, 4000, 9000], dtype=torch.int32)
    expected = top_positions(scores, k, order="best", impl="reference")
    with using(name) as impl:
        assert torch.equal(top_positions(scores, k, order="best", impl=impl), expected)


@given(scores=scores())
def test_of_equal_scores_the_lower_position_is_chosen(scores):
    k = scores.shape[1] // 2
    chosen = top_positions(scores, k, impl="reference").long()
    for row, mine in zip(scores, chosen, strict=True):
        left = sorted(set(range(len(row))) - set(mine.tolist()))
        for p in mine.tolist():
            assert all(
                row[p] > row[other] or (row[p] == row[other] and p < other) for other in left
            )


@pytest.mark.parametrize("name", [*implementations(), "reference"])
def test_any_number_of_leading_dimensions(name):
    scores = torch.randn(2, 3, 40)
    single = torch.randn(40)
    with using(name) as impl:
        assert top_positions(scores, 5, impl=impl).shape == (2, 3, 5)
        assert top_positions(single, 5, impl=impl).shape == (5,)
        assert top_bits(single, 5, 2, impl=impl).shape == (2,)
        assert top_positions(scores[:0], 5, impl=impl).shape[0] == 0


@given(positions=st.sets(st.integers(0, 99), max_size=30))
def test_packed_bits_are_exactly_the_positions(positions):
    row = torch.tensor([*positions, -1, -1], dtype=torch.int32)
    words = pack_positions(row, 4).tolist()
    assert {p for p in range(128) if (words[p // 32] >> (p % 32)) & 1} == positions


def test_no_positions_are_no_bits():
    chosen = top_positions(torch.zeros(3, 40), 0)
    assert torch.equal(pack_positions(chosen, 2), torch.zeros(3, 2, dtype=torch.int32))


def test_wrong_arguments_are_refused():
    scores = torch.zeros(2, 8)
    for position in (64, 65):
        with pytest.raises(ValueError, match=rf"positions must be below 64 .*got {position}"):
            pack_positions(torch.tensor([[3, position]], dtype=torch.int32), 2)
    with pytest.raises(ValueError, match="k must be on cpu like scores, got meta"):
        top_positions(scores, torch.zeros(2, dtype=torch.int32, device="meta"))
    with pytest.raises(ValueError, match="order"):
        top_positions(scores, 2, order="worst")
    with pytest.raises(ValueError, match="negative"):
        top_positions(scores, -1)
    with pytest.raises(ValueError, match="num_words"):
        top_bits(torch.zeros(2, 80), 2, 2)
    with pytest.raises(ValueError, match="float32"):
        top_positions(scores.double(), 2)
