"""``plan_delta`` by torch, on any device and without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def plan_delta_torch(
    target: Tensor, kept: Tensor, num_tokens: int, limits: Tensor | None, room: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """A flag for each position, then ranks by running sums; see ``plan_delta_reference``."""
    missing = (target >= 0) & ~_members(kept, num_tokens).gather(1, _index(target, num_tokens))
    leaving = (kept >= 0) & ~_members(target, num_tokens).gather(1, _index(kept, num_tokens))
    counts = missing.sum(dim=1)
    if limits is not None:
        counts = torch.minimum(counts, limits.clamp(min=0))
    if room is not None:
        before = counts.cumsum(0) - counts
        counts = torch.minimum(counts, (room - before).clamp(min=0))
    width = target.shape[1]
    slots = torch.arange(kept.shape[1], dtype=torch.int32, device=kept.device)
    return (
        _compacted(target, missing, counts, width),
        _compacted(slots.expand_as(kept), leaving, counts, width),
        counts.to(torch.int32),
    )


def _index(positions: Tensor, num_tokens: int) -> Tensor:
    """Where a position's flag lies; skipped ones share the flag behind the last position."""
    return torch.where(positions >= 0, positions, num_tokens).long()


def _members(positions: Tensor, num_tokens: int) -> Tensor:
    shape = (positions.shape[0], num_tokens + 1)
    flags = torch.zeros(shape, dtype=torch.bool, device=positions.device)
    return flags.scatter_(1, _index(positions, num_tokens), True)


def _compacted(values: Tensor, is_chosen: Tensor, counts: Tensor, width: int) -> Tensor:
    """The first ``counts[i]`` chosen values of each row, then -1."""
    rank = is_chosen.cumsum(dim=1) - 1
    is_taken = is_chosen & (rank < counts[:, None])
    # What is not taken lands behind the last place.
    out = torch.full((values.shape[0], width + 1), -1, dtype=torch.int32, device=values.device)
    index = torch.where(is_taken, rank.clamp(max=width), width)
    return out.scatter_(1, index, values.to(torch.int32))[:, :width].contiguous()
