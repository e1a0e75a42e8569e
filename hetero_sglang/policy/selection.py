"""Which positions a head never gives up.

Deliberate difference from HeteroCache (arXiv 2601.13684), which protects nothing: with an
observation window the window itself and the attention sinks stay, as in SnapKV (arXiv 2404.14469)
and StreamingLLM (arXiv 2309.17453). A window of 1 is the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

NUM_SINKS = 4
"""First prompt tokens that always stay with a window: attention rests on them (StreamingLLM)."""


def protect(scores: Tensor, window: int) -> Tensor:
    """Lifts protected positions above all others, in place.

    Where a budget is smaller than what is protected, sinks go first, then the newest tokens.

    Args:
        scores: Pooled probabilities, at most 1, fp32 [..., num_tokens].
        window: Last prompt tokens that stay; 1 protects nothing.

    Returns:
        ``scores``.
    """
    if window <= 1:
        return scores
    num_tokens = scores.shape[-1]
    recent = min(window, num_tokens)
    order = torch.arange(1, recent + 1, device=scores.device)
    scores[..., num_tokens - recent :] = 2.0 + order / recent
    sinks = min(NUM_SINKS, num_tokens)
    scores[..., :sinks] = 4.0 + torch.arange(sinks, 0, -1, device=scores.device)
    return scores
