"""``topk_overlap`` by the compiled kernel and by torch."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from hetero_kernels.dispatch import loaded
from hetero_kernels.keys import read_keys
from hetero_kernels.native import DTYPE_CODES, ScoreStruct, key_fields, pointer
from hetero_kernels.score_positions.cpu import pooled_scores_torch

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.quantize_keys.format import QuantizedKeys


def topk_overlap_native(
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
    """Each item's keys read once for all its queries; see ``topk_overlap_reference``."""
    num_items, num_queries, group_size, head_dim = queries.shape
    width = int(prompt_lens.max()) if num_items else 0
    like: dict[str, Any] = {"dtype": torch.float32, "device": queries.device}
    overlap = torch.empty(num_items, num_queries, **like)
    newest_scores = torch.empty(num_items, width, **like)
    queries = queries.contiguous()
    struct = ScoreStruct(
        dtype=DTYPE_CODES[queries.dtype],
        head_dim=head_dim,
        num_queries=num_queries,
        group_size=group_size,
        num_threads=torch.get_num_threads(),
        scale=scale,
        num_items=num_items,
        queries=pointer(queries),
        **key_fields(keys),
        planes=pointer(planes),
        slots=pointer(req_to_token),
        slots_stride=req_to_token.stride(0),
        rows=pointer(rows),
        prompt_lens=pointer(prompt_lens),
        top_k=pointer(top_k),
        reference=pointer(reference),
        reference_stride=reference.stride(0),
        overlap=pointer(overlap),
        newest_scores=pointer(newest_scores),
        newest_stride=width,
    )
    loaded().score(ctypes.addressof(struct))
    return overlap, newest_scores


def topk_overlap_torch(
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
    """Batched over the queries of an item; see ``topk_overlap_reference``."""
    num_items, num_queries = queries.shape[:2]
    like: dict[str, Any] = {"dtype": torch.float32, "device": queries.device}
    width = int(prompt_lens.max()) if num_items else 0
    overlap = torch.zeros(num_items, num_queries, **like)
    newest_scores = torch.zeros(num_items, width, **like)
    shifts = torch.arange(32, device=queries.device)
    for i in range(num_items):
        length, count = int(prompt_lens[i]), int(top_k[i])
        if length == 0 or int(rows[i]) < 0:
            continue
        prompt = read_keys(keys, int(planes[i]), req_to_token[int(rows[i]), :length].long())
        scores = pooled_scores_torch(queries[i], prompt[None], scale)  # [S, N]
        best = torch.sort(scores, dim=1, descending=True, stable=True).indices[:, :count]
        members = (reference[i][:, None] >> shifts & 1).view(-1)
        overlap[i] = members[best].sum(dim=1, dtype=torch.float32) / max(1, count)
        newest_scores[i, :length] = scores[-1]
    return overlap, newest_scores
