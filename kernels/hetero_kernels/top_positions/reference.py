"""Definition of ``top_positions``: a stable sort."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def top_positions_reference(scores: Tensor, counts: Tensor, *, best_first: bool) -> Tensor:
    """Positions of the ``counts[i]`` highest scores of row ``i``; of equal ones the lower position.

    Args:
        scores: fp32 [M, N], no NaN.
        counts: int32 [M]; more than N counts as N.
        best_first: Order by score (then position) instead of by position.

    Returns:
        int32 [M, min(max(counts), N)], unused places -1.
    """
    width = min(int(counts.max()), scores.shape[1]) if counts.numel() else 0
    out = torch.full((scores.shape[0], width), -1, dtype=torch.int32, device=scores.device)
    for i, count in enumerate(counts.tolist()):
        best = torch.sort(scores[i], descending=True, stable=True).indices[:count]
        best = best if best_first else best.sort().values
        out[i, : best.shape[0]] = best.to(torch.int32)
    return out


def pack_positions_reference(positions: Tensor, num_words: int) -> Tensor:
    """Bit sets of positions: bit ``p % 32`` of word ``p // 32``.

    Args:
        positions: int32 [M, K]; negative ones are skipped.
        num_words: Words of a set.

    Returns:
        int32 [M, num_words].
    """
    words = torch.zeros(positions.shape[0], num_words, dtype=torch.int64, device="cpu")
    for i, row in enumerate(positions.tolist()):
        for p in set(row):
            if p >= 0:
                words[i, p // 32] += 1 << (p % 32)
    return words.to(torch.uint32).view(torch.int32).to(positions.device)
