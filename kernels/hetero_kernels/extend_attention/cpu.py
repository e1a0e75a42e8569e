"""``extend_attention`` by torch's fused attention over blocks of queries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

# Queries of a block: large enough for the fused kernel, small enough that the keys behind a block's
# own end, which are masked or not read at all, are few.
QUERY_BLOCK = 512


def extend_attention_torch(
    q: Tensor, k: Tensor, v: Tensor, prefix_len: int, scale: float
) -> Tensor:
    """Blocks of queries, each with the keys up to its end; see ``extend_attention_reference``."""
    num_new, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[0]
    group_size = num_q_heads // num_kv_heads
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # KV heads as the batch and their query heads as heads: a group shares its keys without a copy.
    queries = q.view(num_new, num_kv_heads, group_size, head_dim).permute(1, 2, 0, 3)
    results = out.view(num_new, num_kv_heads, group_size, head_dim).permute(1, 2, 0, 3)
    keys = k[:, None].expand(-1, group_size, -1, -1)
    values = v[:, None].expand(-1, group_size, -1, -1)
    for begin in range(0, num_new, QUERY_BLOCK):
        end = min(num_new, begin + QUERY_BLOCK)
        visible = prefix_len + end
        first = prefix_len + begin == 0
        mask = None
        if not first:
            mask = torch.zeros(end - begin, visible, dtype=q.dtype, device=q.device)
            mask[:, prefix_len + begin :] = torch.full(
                (end - begin, end - begin), float("-inf"), dtype=q.dtype, device=q.device
            ).triu_(1)
        results[:, :, begin:end] = scaled_dot_product_attention(
            queries[:, :, begin:end],
            keys[:, :, :visible],
            values[:, :, :visible],
            attn_mask=mask,
            is_causal=first,
            scale=scale,
        )
    return out
