"""``top_positions`` and ``top_bits`` by the compiled kernel and by torch."""

from __future__ import annotations

import torch
from torch import Tensor

from hetero_kernels.dispatch import loaded
from hetero_kernels.native import pointer


def top_positions_native(scores: Tensor, counts: Tensor, *, best_first: bool) -> Tensor:
    """A sample's bracket and halving instead of sorting; see ``top_positions_reference``."""
    width = min(int(counts.max()), scores.shape[1]) if counts.numel() else 0
    out = torch.empty(scores.shape[0], width, dtype=torch.int32, device=scores.device)
    _call(scores, counts, best_first, out, None)
    return out


def top_bits_native(scores: Tensor, counts: Tensor, num_words: int) -> Tensor:
    """The same selection as bit sets, int32 [M, num_words]."""
    out = torch.empty(scores.shape[0], num_words, dtype=torch.int32, device=scores.device)
    _call(scores, counts, False, None, out)
    return out


def top_positions_torch(scores: Tensor, counts: Tensor, *, best_first: bool) -> Tensor:
    """One sort of all rows; see ``top_positions_reference``."""
    length = scores.shape[1]
    width = min(int(counts.max()), length) if counts.numel() else 0
    best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :width]
    unused = torch.arange(width, device=scores.device) >= counts[:, None]
    if not best_first:
        # Unused places sort behind every position.
        best = best.masked_fill(unused, length).sort(dim=1).values
    return best.masked_fill(unused, -1).to(torch.int32)


def pack_positions_torch(positions: Tensor, num_words: int) -> Tensor:
    """A flag for each bit, then a weighted sum; see ``pack_positions_reference``."""
    flags = torch.zeros(
        positions.shape[0], num_words * 32 + 1, dtype=torch.bool, device=positions.device
    )
    # Skipped positions land on the flag behind the last word.
    index = torch.where(positions >= 0, positions, num_words * 32).long()
    flags.scatter_(1, index, True)
    weights = 1 << torch.arange(32, device=positions.device)
    words = (flags[:, :-1].view(positions.shape[0], num_words, 32) * weights).sum(dim=2)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _call(
    scores: Tensor, counts: Tensor, best_first: bool, positions: Tensor | None, bits: Tensor | None
) -> None:
    loaded().top_positions(
        pointer(scores),
        scores.shape[0],
        scores.shape[1],
        scores.stride(0),
        pointer(counts),
        int(best_first),
        pointer(positions),
        0 if positions is None else positions.stride(0),
        pointer(bits),
        0 if bits is None else bits.stride(0),
        torch.get_num_threads(),
    )
