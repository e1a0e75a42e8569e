"""``extend_attention`` by the compiled kernel and by torch's fused attention."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

from hetero_kernels.dispatch import loaded
from hetero_kernels.native import DTYPE_CODES, ExtendStruct, pointer

if TYPE_CHECKING:
    from torch import Tensor

# Queries of a block: large enough for the fused kernel, small enough that the keys behind a block's
# own end, which are masked or not read at all, are few.
QUERY_BLOCK = 512


def extend_attention_native(
    q: Tensor, k: Tensor, v: Tensor, prefix_len: int, scale: float
) -> Tensor:
    """Blocks of queries against packed blocks of keys; see ``extend_attention_reference``."""
    num_new, num_q_heads, head_dim = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    struct = ExtendStruct(
        dtype=DTYPE_CODES[q.dtype],
        head_dim=head_dim,
        num_kv_heads=k.shape[0],
        group_size=num_q_heads // k.shape[0],
        num_threads=torch.get_num_threads(),
        scale=scale,
        num_new=num_new,
        prefix_len=prefix_len,
        q=pointer(q),
        q_stride=q.stride(0),
        k=pointer(k),
        k_head_stride=k.stride(0),
        k_row_stride=k.stride(1),
        v=pointer(v),
        v_head_stride=v.stride(0),
        v_row_stride=v.stride(1),
        out=pointer(out),
        out_stride=out.stride(0),
    )
    loaded().extend_attention(ctypes.addressof(struct))
    return out


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
