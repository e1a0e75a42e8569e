"""Definition of ``plan_delta``: one item at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def plan_delta_reference(
    target: Tensor, kept: Tensor, num_tokens: int, limits: Tensor | None, room: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Missing positions of each item, best first, and the slots that they take.

    Args:
        target: int32 [M, T], best first; negative ones are skipped.
        kept: int32 [M, B]; negative ones are no rows.
        num_tokens: Positions lie below it.
        limits: Most rows of each item, int32 [M]; ``None``: no limit.
        room: Most rows of all items; the first are served first. ``None``: no limit.

    Returns:
        Positions and slots, int32 [M, T], unused places -1, and counts, int32 [M].

    Source: ``hetero_sglang.policy.plan.plan_delta`` for each item, as
    ``hetero_sglang.cache.retrieval`` calls it, in tensors.
    """
    positions = torch.full_like(target, -1, memory_format=torch.contiguous_format)
    slots = positions.clone()
    counts = torch.zeros(target.shape[0], dtype=torch.int32, device=target.device)
    for i in range(target.shape[0]):
        wanted = [p for p in target[i].tolist() if p >= 0]
        held = kept[i].tolist()
        missing = [p for p in wanted if p not in set(held)]
        if limits is not None:
            missing = missing[: max(0, int(limits[i]))]
        if room is not None:
            missing = missing[:room]
            room -= len(missing)
        leaving = [slot for slot, p in enumerate(held) if p >= 0 and p not in set(wanted)]
        leaving = leaving[: len(missing)]
        positions[i, : len(missing)] = torch.tensor(
            missing, dtype=torch.int32, device=target.device
        )
        slots[i, : len(leaving)] = torch.tensor(leaving, dtype=torch.int32, device=target.device)
        counts[i] = len(missing)
    return positions, slots, counts
