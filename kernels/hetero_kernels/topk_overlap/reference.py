"""Definition of ``topk_overlap``: one query group at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hetero_kernels.keys import read_keys
from hetero_kernels.score_positions.reference import pooled_scores

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.quantize_keys.format import QuantizedKeys


def topk_overlap_reference(
    queries: Tensor,
    keys: Tensor | QuantizedKeys,
    planes: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    prompt_lens: Tensor,
    top_k: Tensor,
    reference: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Share of the reference positions that are among each query group's best; see the package.

    The best are the ``top_k`` highest pooled scores, of equal ones the lower position. The share's
    divisor is ``top_k`` also when the prompt is shorter; ``top_k = 0`` gives 0. An item with a
    negative row is padding and gives zeros.
    """
    num_items, num_queries = queries.shape[:2]
    width = int(prompt_lens.max()) if num_items else 0
    like: dict[str, Any] = {"dtype": torch.float32, "device": queries.device}
    overlap = torch.zeros(num_items, num_queries, **like)
    newest_scores = torch.zeros(num_items, width, **like)
    for i in range(num_items):
        length, count = int(prompt_lens[i]), int(top_k[i])
        if int(rows[i]) < 0:
            continue
        slots = req_to_token[int(rows[i]), :length].long()
        prompt = read_keys(keys, int(planes[i]), slots)
        words = reference[i].tolist()
        for s in range(num_queries):
            scores = pooled_scores(queries[i, s], prompt, scale)
            best = torch.sort(scores, descending=True, stable=True).indices[:count].tolist()
            common = sum((words[p // 32] >> (p % 32)) & 1 for p in best)
            overlap[i, s] = common / count if count else 0.0
            newest_scores[i, :length] = scores
    return overlap, newest_scores
