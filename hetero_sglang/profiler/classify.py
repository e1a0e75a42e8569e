"""From stability and similarity of heads to their roles and budget weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.profile import (
    Head,
    HeadProfile,
    HeadRole,
    ModelShape,
    Provenance,
    Thresholds,
)
from hetero_sglang.profile.clusters import greedy_stars, inverse_stability
from hetero_sglang.profiler.observation import (
    POOL_KERNEL,
    HeadObserver,
    group_mean,
    pooled_similarity,
    pooled_stability,
)

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

__all__ = ["assign_roles", "classify_heads"]


def classify_heads(
    prefill: torch.Tensor,
    decode: torch.Tensor,
    *,
    top_k: int,
    stable_threshold: float,
    similarity_threshold: float,
    num_kv_heads: int | None = None,
) -> HeadProfile:
    """Profiles heads from their recorded attention.

    Args:
        prefill: Attention probabilities of the last prompt token's query over the prompt,
            [num_layers, num_heads, num_positions].
        decode: The same for each decoded token's query, over the same positions,
            [num_steps, num_layers, num_heads, num_positions].
        top_k: Size of the compared sets, below num_positions.
        stable_threshold: A head with at least this stability is stable.
        similarity_threshold: Heads of a layer with at least this similarity may share a cluster.
        num_kv_heads: KV heads a layer; if smaller than num_heads, the query heads of a group are
            averaged first. By default every head is a KV head.

    Returns:
        The profile; its model shape has only the numbers that the arguments tell.

    Raises:
        ValueError: Shapes do not fit together, a value is negative or not finite, or `top_k` is
            out of range.
        ProfileError: A threshold is not in [0, 1].

    Source: HeteroCache (arXiv 2601.13684) section 3.1 and upstream's tools/get_cluster.py.
    """
    num_layers, num_q_heads = _check_attention(prefill, decode)
    num_kv_heads = num_q_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_q_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads ({num_q_heads}), got {num_kv_heads}")
    if top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    observer = HeadObserver(top_k)
    observer.begin_prompt(group_mean(prefill, num_kv_heads))
    for step in decode:
        observer.add_step(group_mean(step, num_kv_heads))
    observed = [observer.result()]
    return assign_roles(
        pooled_stability(observed),
        pooled_similarity(observed),
        model=ModelShape(num_layers=num_layers, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads),
        thresholds=Thresholds(stable=stable_threshold, similarity=similarity_threshold),
        provenance=Provenance(
            num_prompt_tokens=prefill.shape[-1],
            num_decode_steps=len(decode),
            top_k=top_k,
            pool_kernel=POOL_KERNEL,
        ),
    )


def assign_roles(
    stability: NDArray[np.float64],
    similarity: NDArray[np.float64],
    *,
    model: ModelShape,
    thresholds: Thresholds,
    provenance: Provenance,
) -> HeadProfile:
    """Sorts heads into roles and weighs the budgets of those that are compressed.

    Clusters first, by greedy stars within each layer; what is left over is an anchor if stable and
    volatile if not. A compressed head's weight is the inverse of its stability, so that heads that
    move more keep more.

    Args:
        stability: [num_layers, num_kv_heads], in [0, 1].
        similarity: [num_layers, num_kv_heads, num_kv_heads], symmetric, in [0, 1].
        model: Shape of the model.
        thresholds: Where the lines are drawn; a value on the line is stable, or similar.
        provenance: Passed on.

    Returns:
        The profile.

    Raises:
        ProfileError: The arrays do not have the model's shape.
    """
    roles = np.where(stability >= thresholds.stable, HeadRole.ANCHOR, HeadRole.VOLATILE)
    satellites_of: dict[Head, tuple[int, ...]] = {}
    for layer, values in enumerate(similarity):
        for pivot, satellites in greedy_stars(values >= thresholds.similarity):
            roles[layer, pivot] = HeadRole.PIVOT
            roles[layer, list(satellites)] = HeadRole.SATELLITE
            satellites_of[layer, pivot] = satellites
    is_compressed = (roles == HeadRole.ANCHOR) | (roles == HeadRole.SATELLITE)
    allocation = np.zeros_like(stability)
    weights = inverse_stability(stability[is_compressed])
    if weights.size:
        allocation[is_compressed] = weights / weights.mean()
    return HeadProfile(
        model=model,
        roles=roles.astype(np.int8),
        allocation=allocation,
        stability=stability,
        satellites_of=satellites_of,
        thresholds=thresholds,
        similarity=similarity,
        provenance=provenance,
    )


def _check_attention(prefill: torch.Tensor, decode: torch.Tensor) -> tuple[int, int]:
    if prefill.ndim != 3 or not prefill.numel():
        raise ValueError(
            "prefill must be [num_layers, num_heads, num_positions] and not empty, "
            f"got shape {list(prefill.shape)}"
        )
    if decode.ndim != 4 or decode.shape[1:] != prefill.shape or not len(decode):
        raise ValueError(
            f"decode must be [num_steps, {', '.join(str(n) for n in prefill.shape)}] with at least "
            f"one step, got shape {list(decode.shape)}"
        )
    for name, values in (("prefill", prefill), ("decode", decode)):
        if not values.isfinite().all():
            raise ValueError(f"{name} must be finite, found NaN or infinity")
        if (values < 0).any():
            raise ValueError(f"{name} must not be negative, found {values.min().item():g}")
    return prefill.shape[0], prefill.shape[1]
