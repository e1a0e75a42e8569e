"""Definition of ``decode_attention``: one query head at a time, in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.layer import DecodeBatch, LayerTensors


def decode_attention_reference(
    q: Tensor, out: Tensor, layer: LayerTensors, batch: DecodeBatch
) -> None:
    """Attend with one query per head to the rows that each head holds.

    Query head ``j`` reads KV head ``j // G``. A head without rows gives zeros, and so does a
    request whose row is negative or whose ``seq_len`` is 0 (padding).

    Args:
        q: Queries, [B, Hq, D].
        out: Result, [B, Hq, D], overwritten.
        layer: Keys, values and tables.
        batch: Requests; ``seq_lens`` counts the new token, which is already appended.
    """
    for b in range(batch.size):
        row, seq_len = int(batch.rows[b]), int(batch.seq_lens[b])
        if row < 0 or seq_len == 0:
            out[b] = 0
            continue
        for j in range(layer.num_q_heads):
            h = j // layer.group_size
            place = int(layer.head_map[h])
            length = layer.length(h, row, seq_len)
            if length == 0:
                out[b, j] = 0
                continue
            slots = layer.slots(h, row, length)
            if place >= 0:
                keys, values = layer.k_resident[place, slots], layer.v_resident[place, slots]
            else:
                blocks, offsets = slots // layer.block_tokens, slots % layer.block_tokens
                keys, values = layer.k_blocks[blocks, offsets], layer.v_blocks[blocks, offsets]
            scores = (keys.float() @ q[b, j].float()) * layer.scale  # [T]
            out[b, j] = (torch.softmax(scores, dim=0) @ values.float()).to(out.dtype)
