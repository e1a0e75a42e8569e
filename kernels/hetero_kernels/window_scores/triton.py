"""``window_scores`` in Triton; see ``hetero_kernels.triton_scores``. Not yet run on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero_kernels.triton_scores import ScoredItems, pool_mean

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["window_scores_triton"]


def window_scores_triton(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Three launches for all heads; see ``window_scores_reference``."""
    keys = k if k.stride(2) == 1 else k.contiguous()
    return pool_mean(ScoredItems(q.contiguous(), keys, scale, width=k.shape[1]))
