from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_sglang.profiler.observation import (
    HeadObserver,
    PromptObservation,
    group_mean,
    newest_attention,
    overlap,
    pooled_similarity,
    pooled_stability,
    top_mask,
)


def pooled_by_hand(row: list[float]) -> list[float]:
    padded = [0.0, 0.0, *row, 0.0, 0.0]
    return [sum(padded[i : i + 5]) / 5 for i in range(len(row))]


def top_by_hand(row: list[float], k: int) -> set[int]:
    pooled = torch.tensor(pooled_by_hand(row), dtype=torch.float32).tolist()
    return set(sorted(range(len(row)), key=lambda i: (-pooled[i], i))[:k])


def positions(mask: torch.Tensor) -> set[int]:
    return set(mask.nonzero().flatten().tolist())


# Multiples of 1/4: sums of five are exact, so that equal means equal.
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.data())
def test_the_mask_is_the_sorted_definition_with_ties_to_the_lower_position(
    values: list[int], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(values)))
    row = [value / 4 for value in values]

    assert positions(top_mask(torch.tensor(row), k)) == top_by_hand(row, k)


def test_pooling_lifts_a_crowd_over_a_lone_peak() -> None:
    row = torch.tensor([0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0, 0.0, 0.2, 0.2, 0.2, 0.0])

    assert positions(top_mask(row, 3)) == {8, 9, 10}


def test_edges_are_padded_with_zeros() -> None:
    # Pooled: 0.6, 0.6, 0.6, ... at the left edge only by the values themselves.
    row = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])

    assert positions(top_mask(row, 2)) == {2, 3}


def test_rows_are_independent() -> None:
    rows = torch.rand(2, 3, 40, generator=torch.Generator().manual_seed(0))

    masks = top_mask(rows, 7)

    for layer in range(2):
        for head in range(3):
            assert torch.equal(masks[layer, head], top_mask(rows[layer, head], 7))


def test_overlap_counts_common_positions() -> None:
    first = torch.tensor([[True, True, False, False], [True, True, False, False]])
    second = torch.tensor([[False, True, True, False], [False, False, True, True]])

    assert overlap(first, second).tolist() == [0.5, 0.0]


@pytest.mark.parametrize("group_size", [1, 3, 4, 8])
def test_groups_are_consecutive_query_heads(group_size: int) -> None:
    probabilities = torch.rand(2, 2 * group_size, 5)

    grouped = group_mean(probabilities, 2)

    torch.testing.assert_close(grouped[:, 1], probabilities[:, group_size:].mean(dim=1))


def one_hot(position: int, num_positions: int = 12) -> torch.Tensor:
    row = torch.zeros(1, 1, num_positions)
    row[..., position] = 1.0
    return row


def observed(prompt: torch.Tensor, *steps: torch.Tensor, name: str = "") -> PromptObservation:
    observer = HeadObserver(top_k=5)
    observer.begin_prompt(prompt)
    for step in steps:
        observer.add_step(step)
    return observer.result(name)


def pair(first: int, second: int) -> torch.Tensor:
    return torch.cat([one_hot(first), one_hot(second)], dim=1)


def test_stability_of_an_even_number_of_steps_is_the_mean_of_the_middle_two() -> None:
    # The prompt's set is positions 0 to 4; overlaps 1, 0.8, 0.6, 0.
    prompt = observed(one_hot(2), *(one_hot(position) for position in (2, 3, 4, 9)))

    assert pooled_stability([prompt]) == pytest.approx(np.array([[0.7]]))


def test_several_prompts_pool_their_steps_and_average_their_similarity() -> None:
    first = observed(pair(2, 2), pair(2, 9))
    second = observed(pair(2, 9), pair(2, 9), pair(9, 9))

    # overlaps: head 0 has 1, 1, 0; head 1 has 0, 1, 1
    np.testing.assert_allclose(pooled_stability([first, second]), [[1.0, 1.0]])
    # similarity: 1 in the first prompt, 0 in the second
    np.testing.assert_allclose(pooled_similarity([first, second]), [[[1.0, 0.5], [0.5, 1.0]]])


def test_prompts_may_differ_in_length() -> None:
    short = observed(one_hot(2, 12), one_hot(2, 12))
    long = observed(one_hot(2, 30), one_hot(2, 30))

    np.testing.assert_array_equal(pooled_stability([short, long]), [[1.0]])


def test_an_observer_starts_anew_with_each_prompt() -> None:
    observer = HeadObserver(top_k=5)
    for name in ("one", "two"):
        observer.begin_prompt(one_hot(2))
        observer.add_step(one_hot(2))
        assert observer.result(name).overlaps.shape == (1, 1, 1)


@pytest.mark.parametrize("group_size", [1, 3, 4, 8])
def test_the_newest_querys_attention_is_averaged_over_its_group(group_size: int) -> None:
    generator = torch.Generator().manual_seed(group_size)
    query = torch.randn(2 * group_size, 16, generator=generator)
    keys = torch.randn(2, 9, 16, generator=generator)

    found = newest_attention(query, keys, 0.25)

    for head in range(2):
        members = query[head * group_size : (head + 1) * group_size]
        expected = torch.stack([torch.softmax(keys[head] @ q * 0.25, 0) for q in members]).mean(0)
        torch.testing.assert_close(found[head], expected)


def test_a_prompt_no_longer_than_the_sets_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k must be below .* \(12\), got 12"):
        HeadObserver(top_k=12).begin_prompt(one_hot(2))
