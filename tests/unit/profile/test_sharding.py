from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile import (
    HeadProfile,
    HeadRole,
    ModelShape,
    Provenance,
    Thresholds,
    floor_by_rank,
    shard_profile,
)
from hetero_sglang.profile.json_format import dumps_profile, loads_profile
from hetero_sglang.profiler import assign_roles

A, V, P, S = HeadRole


def model_of(num_layers: int, num_kv_heads: int, group_size: int) -> ModelShape:
    return ModelShape(
        num_layers=num_layers,
        num_q_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        architecture="LlamaForCausalLM",
        head_dim=16,
        hidden_size=4096,
        vocab_size=1000,
    )


def unrecorded(profile: HeadProfile) -> HeadProfile:
    """What an imported profile says: neither likeness nor stability, nor any lines."""
    return replace(profile, stability=None, similarity=None, thresholds=None)


def profile_of(
    stability: list[list[float]], likeness: list[dict[tuple[int, int], float]]
) -> HeadProfile:
    """What the profiler finds, with both lines at 0.5.

    Args:
        stability: Of each layer's heads.
        likeness: Of each layer's pairs of heads; 0.1 where nothing is said.
    """
    num_layers, num_kv_heads = len(stability), len(stability[0])
    similarity = np.full((num_layers, num_kv_heads, num_kv_heads), 0.1)
    for layer, pairs in enumerate(likeness):
        np.fill_diagonal(similarity[layer], 1.0)
        for (first, second), value in pairs.items():
            similarity[layer, first, second] = similarity[layer, second, first] = value
    return assign_roles(
        np.array(stability),
        similarity,
        model=model_of(num_layers, num_kv_heads, group_size=4),
        thresholds=Thresholds(stable=0.5, similarity=0.5),
        provenance=Provenance(model="toy"),
    )


# Three layers of eight heads, to be cut in the middle.
STABILITY = [
    [0.9, 0.8, 0.2, 0.6, 0.9, 0.7, 0.5, 0.4],
    [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2],
    [0.8, 0.9, 0.3, 0.7, 0.6, 0.5, 0.4, 0.9],
]
LIKENESS: list[dict[tuple[int, int], float]] = [
    # 0 leads 1, 3; 4 leads 5, 6: no cluster crosses.
    {(0, 1): 0.8, (0, 3): 0.7, (4, 5): 0.6, (4, 6): 0.9},
    # 0 leads 1, 4, 5, 6; 2 leads 3, 7. Heads 4 and 5, with one pivot, are alike too.
    {
        (0, 1): 0.8,
        (0, 4): 0.7,
        (0, 5): 0.6,
        (0, 6): 0.6,
        (2, 3): 0.9,
        (2, 7): 0.6,
        (4, 5): 0.6,
    },
    # 0 leads 4, 5, 6, 7, of which 5 is like 6 and 7 too; 1 leads 2; 3 is alone.
    {
        (0, 4): 0.6,
        (0, 5): 0.6,
        (0, 6): 0.6,
        (0, 7): 0.6,
        (1, 2): 0.6,
        (5, 6): 0.7,
        (5, 7): 0.6,
    },
]


@pytest.fixture
def profile() -> HeadProfile:
    whole = profile_of(STABILITY, LIKENESS)
    assert whole.roles.tolist() == [
        [P, S, V, S, P, S, S, V],
        [P, S, P, S, S, S, S, S],
        [P, P, S, A, S, S, S, S],
    ]
    return replace(whole, origin="toy.json")


def test_clusters_of_one_rank_stay_and_orphans_are_placed_by_what_is_recorded(
    profile: HeadProfile,
) -> None:
    first, second = (shard_profile(profile, rank, 2) for rank in range(2))

    # Layer 1: pivots 0 and 2 keep the satellites they have here. Layer 2: all satellites of head 0
    # are elsewhere; it is stable, so an anchor.
    assert first.roles.tolist() == [[P, S, V, S], [P, S, P, S], [A, P, S, A]]
    assert dict(first.satellites_of) == {
        (0, 0): (1, 3),
        (1, 0): (1,),
        (1, 2): (3,),
        (2, 1): (2,),
    }
    # Layer 1: of the orphans 4, 5, 6, 7 the first two are alike; 6 and 7 are alone and unstable.
    # Layer 2: of the orphans 4, 5, 6, 7 head 5 has two neighbours; 4 is alone and stable.
    assert second.roles.tolist() == [[P, S, S, V], [P, S, V, V], [A, P, S, S]]
    assert dict(second.satellites_of) == {(0, 0): (1, 2), (1, 0): (1,), (2, 1): (2, 3)}


def test_without_records_an_orphan_keeps_everything(profile: HeadProfile) -> None:
    first, second = (shard_profile(unrecorded(profile), rank, 2) for rank in range(2))

    assert first.roles.tolist() == [[P, S, V, S], [P, S, P, S], [V, P, S, A]]
    assert second.roles.tolist() == [[P, S, S, V], [V] * 4, [V] * 4]


@pytest.mark.parametrize("name", ["stability", "similarity", "thresholds"])
def test_one_missing_record_is_enough_to_keep_everything(profile: HeadProfile, name: str) -> None:
    changes: dict[str, Any] = {name: None}

    shard = shard_profile(replace(profile, **changes), 1, 2)

    assert shard.roles.tolist() == [[P, S, S, V], [V] * 4, [V] * 4]


@pytest.mark.parametrize(
    ("likeness", "follows"),
    [
        pytest.param({(8, 5): 0.6, (8, 7): 0.7}, 7, id="the-likeliest"),
        pytest.param({(8, 5): 0.6, (8, 7): 0.6}, 5, id="the-lowest-of-equals"),
        pytest.param({(8, 5): 0.5, (8, 7): 0.4}, 5, id="on-the-line"),
        pytest.param({(8, 5): 0.4, (8, 6): 0.9}, None, id="satellites-do-not-lead"),
    ],
)
def test_an_orphaned_satellite_joins_the_pivot_it_is_most_similar_to(
    likeness: dict[tuple[int, int], float], follows: int | None
) -> None:
    # Of ten heads, 0 leads 1, 2, 3 and 8, which is cut off; beyond the border 5 leads 6, 7 leads 9.
    clusters = {(0, 1): 0.8, (0, 2): 0.8, (0, 3): 0.8, (0, 8): 0.8, (5, 6): 0.9, (7, 9): 0.9}
    whole = profile_of([[0.9] * 10], [clusters | likeness])
    assert dict(whole.satellites_of) == {(0, 0): (1, 2, 3, 8), (0, 5): (6,), (0, 7): (9,)}

    shard = shard_profile(whole, 1, 2)

    followed = [pivot + 5 for (_, pivot), heads in shard.satellites_of.items() if 3 in heads]
    assert followed == ([] if follows is None else [follows])
    assert shard.roles[0, 3] == (A if follows is None else S)


def test_a_lonely_pivot_may_follow_another_orphan() -> None:
    # 0 leads 1, 5, 6; 7 leads 2, 3 and is like 5. Cut off, 5 and 7 have only each other.
    likeness = {(0, 1): 0.8, (0, 5): 0.8, (0, 6): 0.8, (2, 7): 0.8, (3, 7): 0.8, (5, 7): 0.6}
    whole = profile_of([[0.9, 0.8, 0.8, 0.5, 0.3, 0.7, 0.6, 0.4]], [likeness])
    assert whole.roles.tolist() == [[P, S, S, S, V, S, S, P]]

    shard = shard_profile(whole, 1, 2)

    assert shard.roles.tolist() == [[V, P, A, S]]
    # 6, an anchor, had a weight already; 7 gets one on the same scale.
    weights = np.array([1 / 0.600001, 1 / 0.400001])
    np.testing.assert_allclose(shard.allocation[0], [0, 0, *(weights / weights.mean())])


def test_weights_keep_their_proportions_and_average_one(profile: HeadProfile) -> None:
    shard = shard_profile(profile, 0, 2)

    # Compressed heads in order; the last but one, once a pivot, is weighed by its stability too.
    stability = [0.8, 0.6, 0.8, 0.6, 0.8, 0.3, 0.7]
    weights = 1 / (np.array(stability) + 1e-6)
    np.testing.assert_allclose(shard.allocation[shard.allocation > 0], weights / weights.mean())


def test_weights_that_are_not_of_stability_keep_their_proportions_too(
    profile: HeadProfile,
) -> None:
    whole = unrecorded(profile)
    shard = shard_profile(whole, 0, 2)

    kept = np.isin(shard.roles, (A, S))
    ratios = shard.allocation[kept] / whole.allocation[:, :4][kept]
    np.testing.assert_allclose(ratios, ratios[0])


def test_the_shape_has_the_ranks_heads_and_the_rest_is_carried_on(profile: HeadProfile) -> None:
    shard = shard_profile(profile, 1, 4)

    assert shard.model == replace(profile.model, num_q_heads=8, num_kv_heads=2)
    assert shard.provenance == profile.provenance
    assert shard.thresholds == profile.thresholds
    assert shard.origin == "toy.json, rank 1 of 4"
    assert shard_profile(replace(profile, origin=""), 1, 4).origin == "rank 1 of 4"
    np.testing.assert_array_equal(shard.stability, profile.stability[:, 2:4])
    np.testing.assert_array_equal(shard.similarity, profile.similarity[:, 2:4, 2:4])


def test_for_one_rank_it_is_the_profile_itself(profile: HeadProfile) -> None:
    assert shard_profile(profile, 0, 1) is profile


def test_a_head_on_its_own_is_an_anchor_or_volatile(profile: HeadProfile) -> None:
    roles = [shard_profile(profile, rank, 16).roles[:, 0].tolist() for rank in (2, 3, 14, 15)]

    # Two ranks share a head: number 1, then number 7.
    assert roles == [[A, A, A], [A, A, A], [V, V, A], [V, V, A]]


def test_the_floor_is_told_rank_by_rank(profile: HeadProfile) -> None:
    assert floor_by_rank(profile, 1) == [profile.floor]
    assert floor_by_rank(profile, 2) == [5 / 12, 6 / 12]
    assert floor_by_rank(unrecorded(profile), 2) == [6 / 12, 10 / 12]


@pytest.mark.parametrize(
    ("rank", "num_ranks", "message"),
    [
        (0, 0, "num_ranks must be at least 1, got 0"),
        (-1, 2, r"rank must be in \[0, 2\), got -1"),
        (2, 2, r"rank must be in \[0, 2\), got 2"),
        (1, 1, r"rank must be in \[0, 1\), got 1"),
        (0, 3, "num_ranks must divide the model's 8 KV heads .*, got 3. Choose another --tp-size"),
        (0, 12, "num_ranks must divide the model's 8 KV heads or be a multiple of them, got 12"),
        (0, 64, "num_ranks must divide the model's 32 query heads, got 64. Choose another"),
    ],
)
def test_heads_that_cannot_be_divided_are_refused(
    profile: HeadProfile, rank: int, num_ranks: int, message: str
) -> None:
    with pytest.raises(ProfileError, match=message):
        shard_profile(profile, rank, num_ranks)


def test_floors_of_no_ranks_are_refused(profile: HeadProfile) -> None:
    with pytest.raises(ProfileError, match="num_ranks must be at least 1, got 0"):
        floor_by_rank(profile, 0)


@st.composite
def profiles(draw: st.DrawFn) -> HeadProfile:
    """Profiles of random heads as the profiler makes them, with or without its records."""
    num_layers = draw(st.integers(1, 3))
    num_kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # A coarse grid, so that ties and values on the lines come up.
    raw = random.integers(0, 11, (num_layers, num_kv_heads, num_kv_heads)) / 10
    profile = assign_roles(
        random.integers(0, 11, (num_layers, num_kv_heads)) / 10,
        np.maximum(raw, raw.transpose(0, 2, 1)),
        model=model_of(num_layers, num_kv_heads, group_size=draw(st.sampled_from([4, 12]))),
        thresholds=Thresholds(
            stable=draw(st.integers(0, 10)) / 10, similarity=draw(st.integers(5, 10)) / 10
        ),
        provenance=Provenance(model="random"),
    )
    return profile if draw(st.booleans()) else unrecorded(profile)


@st.composite
def sharded(draw: st.DrawFn) -> tuple[HeadProfile, list[HeadProfile]]:
    """A profile and its slices, for any number of ranks that its heads can be divided among."""
    profile = draw(profiles())
    num_kv_heads = profile.num_kv_heads
    divisors = [n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]
    num_ranks = draw(st.sampled_from([*divisors, 2 * num_kv_heads, 4 * num_kv_heads]))
    return profile, [shard_profile(profile, rank, num_ranks) for rank in range(num_ranks)]


def heads_of(profile: HeadProfile, shards: list[HeadProfile], rank: int) -> list[int]:
    """The whole profile's numbers of a rank's heads."""
    per_rank = shards[rank].num_kv_heads
    replicas = len(shards) * per_rank // profile.num_kv_heads
    return [rank // replicas * per_rank + head for head in range(per_rank)]


@given(sharded())
def test_every_slice_is_a_profile_that_can_be_saved(
    case: tuple[HeadProfile, list[HeadProfile]],
) -> None:
    _, shards = case

    for shard in shards:
        assert loads_profile(dumps_profile(shard).encode(), origin="test") == shard


@given(sharded())
def test_the_ranks_have_every_head_once_or_replicate_it_equally(
    case: tuple[HeadProfile, list[HeadProfile]],
) -> None:
    profile, shards = case
    served = [heads_of(profile, shards, rank) for rank in range(len(shards))]
    replicas = max(1, len(shards) // profile.num_kv_heads)

    assert [head for heads in served[::replicas] for head in heads] == list(
        range(profile.num_kv_heads)
    )
    assert sum(shard.model.num_q_heads for shard in shards) == profile.model.num_q_heads
    for rank, shard in enumerate(shards):
        assert shard == shards[rank // replicas * replicas]
        if profile.stability is not None:
            np.testing.assert_array_equal(shard.stability, profile.stability[:, served[rank]])


@given(sharded())
def test_heads_outside_clusters_keep_their_role(
    case: tuple[HeadProfile, list[HeadProfile]],
) -> None:
    profile, shards = case

    for rank, shard in enumerate(shards):
        before = profile.roles[:, heads_of(profile, shards, rank)]
        alone = np.isin(before, (A, V))
        np.testing.assert_array_equal(shard.roles[alone], before[alone])


@given(sharded())
def test_satellites_stay_with_their_pivot_or_follow_one_that_is_similar(
    case: tuple[HeadProfile, list[HeadProfile]],
) -> None:
    profile, shards = case

    for rank, shard in enumerate(shards):
        served = heads_of(profile, shards, rank)
        for (layer, pivot), satellites in shard.satellites_of.items():
            before = profile.satellites_of.get((layer, served[pivot]), ())
            for head in satellites:
                if served[head] in before:
                    continue
                assert profile.similarity is not None
                assert profile.thresholds is not None
                likeness = profile.similarity[layer, served[head], served[pivot]]
                assert likeness >= profile.thresholds.similarity
        for (layer, pivot), satellites in profile.satellites_of.items():
            if pivot in served:
                here = {served.index(head) for head in satellites if head in served}
                assert here <= set(shard.satellites_of.get((layer, served.index(pivot)), ()))


@given(sharded())
def test_orphans_compress_only_where_records_allow_it(
    case: tuple[HeadProfile, list[HeadProfile]],
) -> None:
    profile, shards = case

    for rank, shard in enumerate(shards):
        before = profile.roles[:, heads_of(profile, shards, rank)]
        new_anchors = (shard.roles == A) & (before != A)
        if profile.stability is None:
            assert not new_anchors.any()
        else:
            assert shard.stability is not None
            assert profile.thresholds is not None
            assert (shard.stability[new_anchors] >= profile.thresholds.stable).all()


@given(profiles(), st.integers(2, 4))
def test_slicing_between_clusters_keeps_every_role(profile: HeadProfile, num_ranks: int) -> None:
    # As many copies side by side as ranks: then no cluster crosses a border.
    width = profile.num_kv_heads
    similarity = None
    if profile.similarity is not None:
        # Copies are alike, across the borders too: that must not matter.
        similarity = np.tile(profile.similarity, (1, num_ranks, num_ranks))
    wide = replace(
        profile,
        model=model_of(profile.num_layers, width * num_ranks, profile.model.group_size),
        roles=np.tile(profile.roles, num_ranks),
        allocation=np.tile(profile.allocation, num_ranks),
        satellites_of={
            (layer, pivot + copy * width): tuple(head + copy * width for head in heads)
            for (layer, pivot), heads in profile.satellites_of.items()
            for copy in range(num_ranks)
        },
        stability=None if profile.stability is None else np.tile(profile.stability, num_ranks),
        similarity=similarity,
    )

    for rank in range(num_ranks):
        shard = shard_profile(wide, rank, num_ranks)
        np.testing.assert_array_equal(shard.roles, profile.roles)
        assert shard.satellites_of == profile.satellites_of
        np.testing.assert_allclose(shard.allocation, profile.allocation)
