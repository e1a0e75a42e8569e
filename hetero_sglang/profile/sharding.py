"""Slices of a profile for tensor parallelism, where each rank serves some of the KV heads.

A rank drops and fetches on its own: it cannot follow a pivot that another rank has. So clusters are
cut at the ranks' borders, and heads that lose their company by that, the *orphans*, get roles anew.
All other heads keep theirs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile.clusters import greedy_stars, inverse_stability
from hetero_sglang.profile.roles import HeadRole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_sglang.profile.head_profile import Head, HeadProfile
    from hetero_sglang.profile.model_shape import ModelShape

__all__ = ["floor_by_rank", "shard_profile"]

_CLUSTERED = (HeadRole.PIVOT, HeadRole.SATELLITE)
_COMPRESSED = (HeadRole.ANCHOR, HeadRole.SATELLITE)


def shard_profile(profile: HeadProfile, rank: int, num_ranks: int) -> HeadProfile:
    """The profile of one rank's heads, numbered from 0 as the rank numbers them.

    Heads are divided as SGLang does it: consecutive KV heads for each rank or, with more ranks than
    KV heads, each KV head on as many consecutive ranks.

    What becomes of orphans (satellites whose pivot is on another rank, pivots whose satellites all
    are) depends on what the profile recorded. With similarity, stability and thresholds, a
    satellite joins the pivot on its rank that it is most similar to, if similar enough; the other
    orphans form clusters among themselves; who is alone even then is an anchor or volatile by its
    stability. Without them nothing can be said about a head on its own, so it keeps everything.

    Args:
        profile: Profile of the whole model.
        rank: Which slice, in [0, num_ranks).
        num_ranks: Size of the tensor-parallel group.

    Returns:
        The slice, with the rank's head counts in its model shape and weights of mean 1 over the
        rank's own compressed heads; for one rank the profile itself.

    Raises:
        ProfileError: The heads cannot be divided among so many ranks, or there is no such rank.
    """
    model = _model_of_rank(profile.model, rank, num_ranks)
    if num_ranks == 1:
        return profile
    # The same for divided and for replicated heads.
    first = rank * profile.num_kv_heads // num_ranks
    own = slice(first, first + model.num_kv_heads)
    roles, satellites_of = _regroup(profile, own)
    place = f"rank {rank} of {num_ranks}"
    return replace(
        profile,
        model=model,
        roles=roles,
        allocation=_allocation(profile, own, roles),
        satellites_of=satellites_of,
        stability=None if profile.stability is None else profile.stability[:, own],
        similarity=None if profile.similarity is None else profile.similarity[:, own, own],
        origin=f"{profile.origin}, {place}" if profile.origin else place,
    )


def floor_by_rank(profile: HeadProfile, num_ranks: int) -> list[float]:
    """What each rank keeps whole in the paper's method, as a share of its heads.

    The resident share must be over the largest of them. Where clusters are cut, it tends to be
    higher than the whole profile's floor.

    Args:
        profile: Profile of the whole model.
        num_ranks: Size of the tensor-parallel group.

    Returns:
        `HeadProfile.floor` of each rank's slice.

    Raises:
        ProfileError: As `shard_profile`.
    """
    _check_num_ranks(num_ranks)
    return [shard_profile(profile, rank, num_ranks).floor for rank in range(num_ranks)]


def _model_of_rank(model: ModelShape, rank: int, num_ranks: int) -> ModelShape:
    _check_num_ranks(num_ranks)
    if not 0 <= rank < num_ranks:
        raise ProfileError(
            f"must be in [0, {num_ranks})",
            field="rank",
            value=str(rank),
            remedy="Ranks are counted from 0",
        )
    fewer, more = sorted((model.num_kv_heads, num_ranks))
    if more % fewer:
        raise ProfileError(
            f"must divide the model's {model.num_kv_heads} KV heads or be a multiple of them",
            field="num_ranks",
            value=str(num_ranks),
            remedy="Choose another --tp-size",
        )
    if model.num_q_heads % num_ranks:
        raise ProfileError(
            f"must divide the model's {model.num_q_heads} query heads",
            field="num_ranks",
            value=str(num_ranks),
            remedy="Choose another --tp-size",
        )
    return replace(
        model,
        num_q_heads=model.num_q_heads // num_ranks,
        num_kv_heads=max(1, model.num_kv_heads // num_ranks),
    )


def _check_num_ranks(num_ranks: int) -> None:
    if num_ranks < 1:
        raise ProfileError(
            "must be at least 1",
            field="num_ranks",
            value=str(num_ranks),
            remedy="Give the size of the tensor-parallel group",
        )


def _regroup(
    profile: HeadProfile, own: slice
) -> tuple[NDArray[np.int8], dict[Head, tuple[int, ...]]]:
    """Roles and clusters of the rank's heads: what the cut left, and the orphans' new places."""
    roles = profile.roles[:, own].copy()
    satellites_of = _clusters_within(profile, own)
    is_orphan = np.isin(roles, _CLUSTERED)
    for (layer, pivot), heads in satellites_of.items():
        is_orphan[layer, [pivot, *heads]] = False
    was_satellite = roles == HeadRole.SATELLITE

    roles[is_orphan] = HeadRole.VOLATILE
    thresholds = profile.thresholds
    if profile.stability is None or profile.similarity is None or thresholds is None:
        return roles, satellites_of
    roles[is_orphan & (profile.stability[:, own] >= thresholds.stable)] = HeadRole.ANCHOR
    for layer in np.flatnonzero(is_orphan.any(axis=1)).tolist():
        placed = _place_orphans(
            {pivot: heads for (at, pivot), heads in satellites_of.items() if at == layer},
            orphans=np.flatnonzero(is_orphan[layer]),
            satellites=np.flatnonzero(is_orphan[layer] & was_satellite[layer]),
            similarity=profile.similarity[layer, own, own],
            threshold=thresholds.similarity,
        )
        for pivot, heads in placed.items():
            roles[layer, pivot] = HeadRole.PIVOT
            roles[layer, list(heads)] = HeadRole.SATELLITE
            satellites_of[layer, pivot] = heads
    return roles, satellites_of


def _clusters_within(profile: HeadProfile, own: slice) -> dict[Head, tuple[int, ...]]:
    """What the rank has of the clusters whose pivot it has, in its own numbers."""
    heads = range(own.start, own.stop)
    clusters: dict[Head, tuple[int, ...]] = {}
    for (layer, pivot), satellites in profile.satellites_of.items():
        here = tuple(head - own.start for head in satellites if head in heads)
        if pivot in heads and here:
            clusters[layer, pivot - own.start] = here
    return clusters


def _place_orphans(
    clusters: dict[int, tuple[int, ...]],
    *,
    orphans: NDArray[np.int64],
    satellites: NDArray[np.int64],
    similarity: NDArray[np.float64],
    threshold: float,
) -> dict[int, tuple[int, ...]]:
    """One layer's clusters with the orphans that fit somewhere.

    Args:
        clusters: Satellites of each pivot without the orphans.
        orphans: Heads to place, ascending.
        satellites: Those of them that may join a cluster. A pivot is not among them: were it like
            another pivot, it would have been that one's satellite.
        similarity: [num_kv_heads, num_kv_heads].
        threshold: From where on two heads are similar.

    Returns:
        Satellites of each pivot; orphans in none of the clusters stay alone.
    """
    placed = dict(clusters)
    left = orphans
    if clusters:
        pivots = np.array(sorted(clusters))
        likeness = similarity[np.ix_(satellites, pivots)]  # [num_satellites, num_pivots]
        joins = likeness.max(axis=1) >= threshold
        # argmax returns the first of equal maxima, the lowest pivot.
        chosen = pivots[likeness.argmax(axis=1)]
        for head, pivot in zip(satellites[joins].tolist(), chosen[joins].tolist(), strict=True):
            placed[pivot] = (*placed[pivot], head)
        left = np.setdiff1d(orphans, satellites[joins])
    for pivot, heads in greedy_stars(similarity[np.ix_(left, left)] >= threshold):
        placed[int(left[pivot])] = tuple(left[list(heads)].tolist())
    return placed


def _allocation(profile: HeadProfile, own: slice, roles: NDArray[np.int8]) -> NDArray[np.float64]:
    """Weights of the rank's compressed heads, in the proportions of the whole profile."""
    is_compressed = np.isin(roles, _COMPRESSED)
    weights = np.where(is_compressed, profile.allocation[:, own], 0.0)
    # Pivots that have become something else: they had no weight.
    is_new = is_compressed & (weights == 0.0)
    if is_new.any():
        assert profile.stability is not None, "without stability no pivot is compressed"
        raw = inverse_stability(profile.stability)
        scale = raw[np.isin(profile.roles, _COMPRESSED)].mean()
        weights[is_new] = raw[:, own][is_new] / scale
    if is_compressed.any():
        weights /= weights[is_compressed].mean()
    return weights
