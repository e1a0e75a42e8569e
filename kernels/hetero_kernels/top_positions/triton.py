"""``top_positions`` and ``top_bits`` in Triton; see ``hetero_kernels.triton_select``.

Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels.triton_select import Selection, select

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["top_bits_triton", "top_positions_triton"]


def top_positions_triton(scores: Tensor, counts: Tensor, *, best_first: bool, width: int) -> Tensor:
    """Radix search and compaction; the chosen alone are sorted where the best shall come first.

    Args:
        scores: fp32 [M, N], dense rows.
        counts: int32 [M], each at most ``width`` or at least N.
        best_first: Order by score (then position) instead of by position.
        width: Places of a row of the result.

    Returns:
        int32 [M, width], unused places -1.
    """
    shape = (scores.shape[0], width)
    out = torch.full(shape, -1, dtype=torch.int32, device=scores.device)
    if out.numel() == 0:
        return out
    select(Selection(scores, counts, positions=out))
    if not best_first:
        return out
    # Stable, so that positions stay ascending among equals and unused places, which count as the
    # lowest score there is, stay last. Adding 0 makes both zeros the same.
    chosen = scores.gather(1, out.clamp(min=0).long()) + 0.0
    chosen = chosen.masked_fill(out < 0, -torch.inf)
    order = torch.sort(chosen, dim=1, descending=True, stable=True).indices
    return out.gather(1, order)


def top_bits_triton(scores: Tensor, counts: Tensor, num_words: int) -> Tensor:
    """The same choice as bit sets, int32 [M, num_words]."""
    shape = (scores.shape[0], num_words)
    out = torch.zeros(shape, dtype=torch.int32, device=scores.device)
    if out.numel():
        select(Selection(scores, counts, bits=out))
    return out
