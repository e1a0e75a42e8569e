"""Definition of ``append_rows``: one row at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.layer import DecodeBatch, LayerTensors


def append_rows_reference(
    k: Tensor, v: Tensor, q: Tensor | None, layer: LayerTensors, batch: DecodeBatch
) -> None:
    """Write the new token's K and V of each request and head, and the queries of pivots.

    Args:
        k: Keys of the new tokens, [B, H, D].
        v: Values, [B, H, D].
        q: Queries, [B, Hq, D]; ``None`` leaves the query rings alone.
        layer: Destination.
        batch: Requests; ``seq_lens`` counts the new token. A negative row or a ``seq_len`` of 0 is
            padding: nothing is written.
    """
    assert batch.token_ids is not None
    G = layer.group_size
    for b in range(batch.size):
        row, position = int(batch.rows[b]), int(batch.seq_lens[b]) - 1
        if row < 0 or position < 0:
            continue
        generated = position - int(layer.prompt_lens[row])
        for h in range(layer.num_kv_heads):
            place = int(layer.head_map[h])
            if place >= 0:
                slot = int(batch.token_ids[b])
                layer.k_resident[place, slot] = k[b, h]
                layer.v_resident[place, slot] = v[b, h]
            else:
                index = int(layer.kept_lens[row, ~place]) + generated
                block = int(layer.block_table[row, ~place, index // layer.block_tokens])
                offset = index % layer.block_tokens
                layer.k_blocks[block, offset] = k[b, h]
                layer.v_blocks[block, offset] = v[b, h]
                if layer.block_positions is not None:
                    layer.block_positions[block, offset] = position
            if q is None or layer.pivot_queries is None or layer.pivot_map is None:
                continue
            pivot = int(layer.pivot_map[h])
            if pivot >= 0:
                step = generated % layer.pivot_queries.shape[2]
                layer.pivot_queries[row, pivot, step] = q[b, h * G : (h + 1) * G]
