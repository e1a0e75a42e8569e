"""``append_rows`` by the compiled kernel and by torch."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch

from hetero_kernels.dispatch import loaded

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.layer import DecodeBatch, LayerTensors


def append_rows_native(
    k: Tensor, v: Tensor, q: Tensor | None, layer: LayerTensors, batch: DecodeBatch
) -> None:
    """One call for all requests and heads; see ``append_rows_reference``."""
    struct = layer.to_struct()
    loaded().append_rows(
        ctypes.addressof(struct),
        batch.address,
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        None if q is None else q.data_ptr(),
        0 if q is None else q.stride(0),
    )


def append_rows_torch(
    k: Tensor, v: Tensor, q: Tensor | None, layer: LayerTensors, batch: DecodeBatch
) -> None:
    """Indexed writes, a few for each head; see ``append_rows_reference``."""
    assert batch.token_ids is not None
    rows, token_ids = batch.rows, batch.token_ids
    positions = batch.seq_lens - 1
    is_real = (rows >= 0) & (positions >= 0)
    if not bool(is_real.all()):
        rows, token_ids, positions = rows[is_real], token_ids[is_real], positions[is_real]
        k, v = k[is_real], v[is_real]
        q = None if q is None else q[is_real]
    generated = positions - layer.prompt_lens[rows]
    for h, place in enumerate(layer.head_map.tolist()):
        if place >= 0:
            layer.k_resident[place, token_ids] = k[:, h]
            layer.v_resident[place, token_ids] = v[:, h]
        else:
            index = layer.kept_lens[rows, ~place] + generated
            offsets = index % layer.block_tokens
            blocks = layer.block_table[rows, ~place, index // layer.block_tokens].long()
            layer.k_blocks[blocks, offsets] = k[:, h]
            layer.v_blocks[blocks, offsets] = v[:, h]
            if layer.block_positions is not None:
                layer.block_positions[blocks, offsets] = positions.to(torch.int32)
    if q is None or layer.pivot_queries is None or layer.pivot_map is None:
        return
    groups = q.view(rows.shape[0], layer.num_kv_heads, layer.group_size, layer.head_dim)
    steps = generated % layer.pivot_queries.shape[2]
    for h, pivot in enumerate(layer.pivot_map.tolist()):
        if pivot >= 0:
            layer.pivot_queries[rows, pivot, steps] = groups[:, h]
