"""``topk_overlap`` in Triton: scores, then selection, for all items and queries together.

Eight launches whose grids depend on shapes only: ``hetero_kernels.triton_scores`` and
``hetero_kernels.triton_select``. Between them lie the pooled scores, fp32 [Q, S, width]. A negative
row is padding and gives zeros. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels.triton_scores import ScoredItems, pool_maxima
from hetero_kernels.triton_select import Selection, select

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.quantize_keys.format import QuantizedKeys

__all__ = ["topk_overlap_triton"]


def topk_overlap_triton(
    queries: Tensor,
    keys: Tensor | QuantizedKeys,
    planes: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    prompt_lens: Tensor,
    top_k: Tensor,
    reference: Tensor,
    scale: float,
    width: int,
) -> tuple[Tensor, Tensor]:
    """Pooled scores, their K-th highest, and overlap; see ``topk_overlap_reference``.

    Args:
        queries: [Q, S, G, D].
        keys: [num_planes, num_slots, D].
        planes: int32 [Q].
        req_to_token: int32 [R, max_context].
        rows: int64 [Q].
        prompt_lens: int32 [Q].
        top_k: int32 [Q].
        reference: int32 [Q, num_words].
        scale: Factor on the products.
        width: Positions of the longest prompt, or more.

    Returns:
        Overlap, fp32 [Q, S], and the scores of the newest queries, fp32 [Q, width].
    """
    num_items, num_queries = queries.shape[:2]
    scores = pool_maxima(
        ScoredItems(
            queries.contiguous(),
            keys,
            scale,
            width=width,
            slots=req_to_token,
            rows=rows,
            lengths=prompt_lens,
            planes=planes,
        )
    )
    common = select(
        Selection(
            scores.view(num_items * num_queries, width),
            top_k,
            # Of an item that is padding every position scores 0; none of them counts.
            lengths=torch.where(rows >= 0, prompt_lens, 0),
            repeat=num_queries,
            reference=reference,
        )
    )
    assert common is not None
    overlap = common.view(num_items, num_queries).float() / top_k.clamp(min=1)[:, None]
    # Not a view: those of the other queries shall not live as long.
    return overlap, scores[:, num_queries - 1].contiguous()
