"""``score_positions`` in Triton; see ``hetero_kernels.triton_scores``. Not yet run on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero_kernels.triton_scores import ScoredItems, pool_maxima

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.quantize_keys.format import QuantizedKeys

__all__ = ["score_positions_triton"]


def score_positions_triton(
    q: Tensor,
    k: Tensor | QuantizedKeys,
    scale: float,
    planes: Tensor | None,
    slots: Tensor | None,
    length: int,
) -> Tensor:
    """Three launches for all heads; see ``score_positions_reference``."""
    items = ScoredItems(q.contiguous()[:, None], k, scale, width=length, slots=slots, planes=planes)
    return pool_maxima(items)[:, 0]
