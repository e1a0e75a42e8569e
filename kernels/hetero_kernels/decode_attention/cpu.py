"""``decode_attention`` by the compiled kernel and by torch."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from hetero_kernels.dispatch import loaded

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.layer import DecodeBatch, LayerTensors


def decode_attention_native(
    q: Tensor, out: Tensor, layer: LayerTensors, batch: DecodeBatch
) -> None:
    """One call for all requests and heads; see ``decode_attention_reference``."""
    struct = layer.to_struct()
    loaded().decode_attention(
        ctypes.addressof(struct),
        batch.address,
        q.data_ptr(),
        q.stride(0),
        out.data_ptr(),
        out.stride(0),
    )


def decode_attention_torch(q: Tensor, out: Tensor, layer: LayerTensors, batch: DecodeBatch) -> None:
    """Gather and two products for each request and KV head; see ``decode_attention_reference``."""
    groups = q.view(batch.size, layer.num_kv_heads, layer.group_size, layer.head_dim)
    results = out.view(groups.shape)
    k_rows = layer.k_blocks.reshape(-1, layer.head_dim)
    v_rows = layer.v_blocks.reshape(-1, layer.head_dim)
    rows, seq_lens, places = batch.rows.tolist(), batch.seq_lens.tolist(), layer.head_map.tolist()
    for b, (row, seq_len) in enumerate(zip(rows, seq_lens, strict=True)):
        if row < 0 or seq_len == 0:
            results[b] = 0
            continue
        for h, place in enumerate(places):
            length = layer.length(h, row, seq_len)
            if length == 0:
                results[b, h] = 0
                continue
            slots = layer.slots(h, row, length)
            resident = place >= 0
            keys = (layer.k_resident[place] if resident else k_rows)[slots].float()  # [T, D]
            values = (layer.v_resident[place] if resident else v_rows)[slots].float()
            scores = (groups[b, h].float() @ keys.T) * layer.scale  # [G, T]
            results[b, h] = (torch.softmax(scores, dim=-1) @ values).to(out.dtype)
