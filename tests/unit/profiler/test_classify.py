from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile import HeadProfile, HeadRole, ModelShape, Provenance, Thresholds
from hetero_sglang.profiler import assign_roles, classify_heads

A, V, P, S = HeadRole


def assign(
    stability: Any, similarity: Any, stable: float = 0.5, similar: float = 0.5
) -> HeadProfile:
    stability = np.asarray(stability, dtype=np.float64)
    return assign_roles(
        stability,
        np.asarray(similarity, dtype=np.float64),
        model=ModelShape(
            num_layers=len(stability),
            num_q_heads=stability.shape[1],
            num_kv_heads=stability.shape[1],
        ),
        thresholds=Thresholds(stable=stable, similarity=similar),
        provenance=Provenance(),
    )


def graph(num_heads: int, *edges: tuple[int, int]) -> list[list[list[float]]]:
    """Similarities of one layer: 0.8 where there is an edge, 0.1 elsewhere."""
    matrix = np.full((num_heads, num_heads), 0.1)
    np.fill_diagonal(matrix, 1.0)
    for first, second in edges:
        matrix[first, second] = matrix[second, first] = 0.8
    return [matrix.tolist()]


# Cases worked by hand: edges, expected roles, expected clusters.
STARS = [
    pytest.param(4, [], [A, A, A, A], {}, id="nobody-alike"),
    pytest.param(2, [(0, 1)], [P, S], {0: (1,)}, id="of-two-the-lower-leads"),
    pytest.param(3, [(0, 2), (1, 2)], [S, S, P], {2: (0, 1)}, id="the-centre-leads"),
    pytest.param(
        4, [(0, 1), (2, 3)], [P, S, P, S], {0: (1,), 2: (3,)}, id="two-pairs-lowest-first"
    ),
    # A path 0-1-2-3-4: heads 1, 2, 3 have two neighbours, 1 is lowest; 3-4 is left.
    pytest.param(
        5,
        [(0, 1), (1, 2), (2, 3), (3, 4)],
        [S, P, S, P, S],
        {1: (0, 2), 3: (4,)},
        id="a-path",
    ),
    # A path 0-1-2-3: head 3 loses its only neighbour and stays alone.
    pytest.param(4, [(0, 1), (1, 2), (2, 3)], [S, P, S, A], {1: (0, 2)}, id="left-alone"),
    # Degrees count unassigned neighbours only: after 0 took 1, 2 and 3, head 4 has one left, 6.
    pytest.param(
        7,
        [(0, 1), (0, 2), (0, 3), (4, 1), (4, 2), (4, 6), (5, 6)],
        [P, S, S, S, S, S, P],
        {0: (1, 2, 3), 6: (4, 5)},
        id="assigned-neighbours-do-not-count",
    ),
]


@pytest.mark.parametrize(("num_heads", "edges", "roles", "clusters"), STARS)
def test_clusters_are_greedy_stars(
    num_heads: int,
    edges: list[tuple[int, int]],
    roles: list[HeadRole],
    clusters: dict[int, tuple[int, ...]],
) -> None:
    profile = assign([[0.9] * num_heads], graph(num_heads, *edges))

    assert profile.roles.tolist() == [roles]
    assert dict(profile.satellites_of) == {(0, pivot): s for pivot, s in clusters.items()}


def test_heads_in_no_cluster_split_by_stability_and_the_line_counts_as_stable() -> None:
    profile = assign([[0.49, 0.5, 0.51]], graph(3))

    assert profile.roles.tolist() == [[V, A, A]]


def test_the_line_counts_as_similar() -> None:
    assert assign([[0.9, 0.9]], [[[1.0, 0.5], [0.5, 1.0]]]).roles.tolist() == [[P, S]]


def test_a_cluster_is_formed_whatever_the_stability() -> None:
    assert assign([[0.0, 0.0]], graph(2, (0, 1))).roles.tolist() == [[P, S]]


def test_layers_are_clustered_apart() -> None:
    similarity = graph(3, (0, 1)) + graph(3, (1, 2))

    profile = assign([[0.9] * 3] * 2, similarity)

    assert profile.roles.tolist() == [[P, S, A], [A, P, S]]


def test_weights_are_inverse_stabilities_with_mean_one_over_the_model() -> None:
    similarity = graph(3, (0, 1)) + graph(3)

    profile = assign([[0.9, 0.5, 0.25], [1.0, 0.8, 0.6]], similarity)

    # Head (0, 0) is a pivot and (0, 2) volatile; of the others 1 / stability is 2, 1, 1.25, 1.667.
    weights = np.array([1 / 0.500001, 1 / 1.000001, 1 / 0.800001, 1 / 0.600001])
    np.testing.assert_allclose(profile.allocation[0], [0, weights[0] / weights.mean(), 0])
    np.testing.assert_allclose(profile.allocation[1], weights[1:] / weights.mean())


def test_a_head_without_any_stability_still_has_a_finite_weight() -> None:
    profile = assign([[1.0, 0.0, 0.5]], graph(3, (0, 1)))

    assert profile.allocation[0, 1] == pytest.approx(2 * 1e6 / (1e6 + 2), rel=1e-4)


def test_a_model_without_compressed_heads_has_no_weights() -> None:
    assert not assign([[0.1, 0.1]], graph(2)).allocation.any()


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), st.floats(0, 1))
def test_every_classification_is_a_valid_profile(
    seed: int, num_layers: int, num_heads: int, similar: float
) -> None:
    random = np.random.default_rng(seed)
    raw = random.random((num_layers, num_heads, num_heads))
    similarity = (raw + raw.transpose(0, 2, 1)) / 2

    profile = assign(random.random((num_layers, num_heads)), similarity, similar=similar)

    for (layer, pivot), satellites in profile.satellites_of.items():
        assert (similarity[layer, pivot, list(satellites)] >= similar).all()
    # Nobody that is left alone has a neighbour who is alone too.
    for layer in range(num_layers):
        alone = np.flatnonzero(profile.roles[layer] <= V)
        pairs = similarity[layer][np.ix_(alone, alone)][np.triu_indices(len(alone), 1)]
        assert (pairs < similar).all()


NUM_POSITIONS = 200


def planted(num_steps: int = 9, group_size: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one layer whose heads are pivot, satellite, anchor and volatile, in this order.

    Heads 0 and 1 look at the same stretch; head 2 at one of its own for ever; head 3 at a third at
    first and then elsewhere. Query heads of a group share the attention unevenly.
    """
    starts = torch.tensor([20, 22, 80, 140]).repeat(num_steps + 1, 1)
    starts[1:, 3] = torch.arange(num_steps) * 3
    offsets = torch.arange(NUM_POSITIONS) - starts[..., None]
    heads = ((offsets >= 0) & (offsets < 30)).double() + 1e-6 * torch.rand(
        NUM_POSITIONS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    shares = torch.linspace(0.5, 1.5, group_size, dtype=torch.float64) if group_size > 1 else 1.0
    queries = heads[:, :, None] * torch.as_tensor(shares).reshape(1, 1, -1, 1)
    queries = queries.reshape(num_steps + 1, 1, 4 * group_size, NUM_POSITIONS)
    return queries[0], queries[1:]


@pytest.mark.parametrize("group_size", [1, 3, 4, 8])
def test_planted_roles_are_recovered(group_size: int) -> None:
    prefill, decode = planted(group_size=group_size)

    profile = classify_heads(
        prefill,
        decode,
        top_k=24,
        stable_threshold=0.5,
        similarity_threshold=0.5,
        num_kv_heads=4,
    )

    assert profile.roles.tolist() == [[P, S, A, V]]
    assert profile.model.group_size == group_size
    assert not profile.model.is_known
    assert profile.provenance.num_prompt_tokens == NUM_POSITIONS
    assert (profile.provenance.num_decode_steps, profile.provenance.top_k) == (9, 24)


def test_without_a_number_of_kv_heads_every_head_is_one() -> None:
    prefill, decode = planted()

    profile = classify_heads(
        prefill, decode, top_k=24, stable_threshold=0.5, similarity_threshold=0.5
    )

    assert profile.num_kv_heads == 4
    assert profile.similarity is not None
    assert profile.similarity[0, 0, 1] > 0.8


def peaks(*positions: int, num_positions: int = 14) -> torch.Tensor:
    """One layer whose heads look at one position each, [1, num_heads, num_positions].

    Pooled, a peak is a plateau: the same value at the position and two to either side of it.
    """
    rows = torch.zeros(1, len(positions), num_positions)
    rows[0, range(len(positions)), list(positions)] = 1.0
    return rows


def test_of_equally_good_positions_the_first_make_the_set() -> None:
    # Head 0 sees a plateau of 2 to 6 and takes 2, 3, 4, 5; head 1 sees one that the edge cuts to 0
    # to 3 and takes it all. Half in common: similar. The last positions would be 3, 4, 5, 6, with
    # one in common.
    prefill = peaks(4, 1)
    # Head 0 turns to 4 to 8 and takes 4, 5, 6, 7: half of its own. Head 1 turns to 0 to 2 and
    # fills up with 3, the first of the positions that nobody looks at: all of its own.
    decode = peaks(6, 0)[None]

    profile = classify_heads(
        prefill, decode, top_k=4, stable_threshold=0.5, similarity_threshold=0.5
    )

    assert profile.roles.tolist() == [[P, S]]
    assert profile.similarity is not None
    assert profile.similarity[0, 0, 1] == 0.5
    assert profile.stability is not None
    assert profile.stability.tolist() == [[0.5, 1.0]]


def test_of_equally_connected_heads_the_first_leads() -> None:
    # Sets of four from 0, 2, 4, 6 and 8 on: each shares half with the next one. Of the path
    # 0-1-2-3-4 heads 1, 2 and 3 have two neighbours; 1 leads 0 and 2; of 3 and 4 the first leads.
    prefill = peaks(2, 4, 6, 8, 10)

    profile = classify_heads(
        prefill, prefill[None], top_k=4, stable_threshold=0.5, similarity_threshold=0.5
    )

    assert profile.roles.tolist() == [[S, P, S, P, S]]
    assert dict(profile.satellites_of) == {(0, 1): (0, 2), (0, 3): (4,)}


@pytest.mark.parametrize(
    ("stable", "role"),
    [
        pytest.param(0.5, A, id="on-the-line"),
        pytest.param(0.51, V, id="under-the-line"),
    ],
)
def test_an_even_number_of_steps_has_its_median_between_the_middle_two(
    stable: float, role: HeadRole
) -> None:
    # Overlaps with the prompt's set of 0 to 3: all, three of four, one of four, none. The middle
    # two are 0.75 and 0.25.
    decode = torch.stack([peaks(2), peaks(3), peaks(5), peaks(9)])

    profile = classify_heads(
        peaks(2), decode, top_k=4, stable_threshold=stable, similarity_threshold=0.5
    )

    assert profile.roles.tolist() == [[role]]


def test_query_heads_of_a_group_are_averaged_before_positions_are_taken() -> None:
    # Each group's mean has two plateaus of equal height, 0 to 4 and 7 to 11, and takes the first:
    # the groups are alike, though their first query heads have nothing in common.
    prefill = peaks(2, 9, 9, 2)

    profile = classify_heads(
        prefill,
        prefill[None],
        top_k=5,
        stable_threshold=0.5,
        similarity_threshold=1.0,
        num_kv_heads=2,
    )

    assert profile.roles.tolist() == [[P, S]]


def test_permuting_positions_of_all_heads_alike_by_reversal_changes_nothing() -> None:
    prefill, decode = planted()
    settings: dict[str, Any] = {"top_k": 24, "stable_threshold": 0.5, "similarity_threshold": 0.5}

    forward = classify_heads(prefill, decode, **settings)
    backward = classify_heads(prefill.flip(-1), decode.flip(-1), **settings)

    np.testing.assert_array_equal(forward.roles, backward.roles)
    np.testing.assert_allclose(forward.stability, backward.stability)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefill": torch.zeros(4, NUM_POSITIONS)}, r"prefill must be \[num_layers"),
        ({"prefill": torch.zeros(0, 4, NUM_POSITIONS)}, "and not empty"),
        ({"decode": torch.zeros(3, 1, 4, 100)}, r"decode must be \[num_steps, 1, 4, 200\]"),
        ({"decode": torch.zeros(0, 1, 4, NUM_POSITIONS)}, "at least one step"),
        ({"prefill": torch.full((1, 4, NUM_POSITIONS), torch.nan)}, "prefill must be finite"),
        ({"decode": torch.full((1, 1, 4, NUM_POSITIONS), torch.inf)}, "decode must be finite"),
        (
            {"prefill": torch.full((1, 4, NUM_POSITIONS), -0.5)},
            r"prefill must not be negative, found -0\.5",
        ),
        (
            {"decode": torch.full((1, 1, 4, NUM_POSITIONS), -1e-9)},
            "decode must not be negative, found -1e-09",
        ),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": NUM_POSITIONS}, r"top_k must be below .* got 200"),
        ({"num_kv_heads": 3}, r"num_kv_heads must divide num_heads \(4\), got 3"),
        ({"num_kv_heads": 0}, "num_kv_heads must divide"),
    ],
)
def test_input_that_makes_no_sense_is_refused(change: dict[str, Any], message: str) -> None:
    prefill, decode = planted()
    arguments: dict[str, Any] = {
        "prefill": prefill,
        "decode": decode,
        "top_k": 24,
        "stable_threshold": 0.5,
        "similarity_threshold": 0.5,
    }

    with pytest.raises(ValueError, match=message):
        classify_heads(**{**arguments, **change})


def test_a_threshold_outside_its_range_is_refused() -> None:
    prefill, decode = planted()

    with pytest.raises(ProfileError, match=r"thresholds.stable"):
        classify_heads(prefill, decode, top_k=24, stable_threshold=2.0, similarity_threshold=0.5)
