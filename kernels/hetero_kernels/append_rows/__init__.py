"""Puts a new token's K and V where each head keeps them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero_kernels.append_rows.cpu import append_rows_native, append_rows_torch
from hetero_kernels.append_rows.reference import append_rows_reference
from hetero_kernels.checks import check_dense_rows, check_devices, check_dtype, check_shape
from hetero_kernels.dispatch import resolve
from hetero_kernels.layer import DecodeBatch, LayerTensors

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.dispatch import Impl

__all__ = ["append_rows"]


def append_rows(
    k: Tensor,
    v: Tensor,
    *,
    k_resident: Tensor,
    v_resident: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    block_positions: Tensor,
    block_table: Tensor,
    kept_lens: Tensor,
    prompt_lens: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    token_ids: Tensor,
    head_map: Tensor,
    q: Tensor | None = None,
    pivot_queries: Tensor | None = None,
    pivot_map: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Write the new token of each request to the pools of one layer, in place.

    A resident head's row goes to ``pool[plane, token_id]``; a compressed head's to row
    ``kept_lens + seq_len - 1 - prompt_len`` of its blocks, with its position beside it. The queries
    of pivots go to step ``(seq_len - 1 - prompt_len) mod S`` of their ring. Of a request with a
    negative row or a ``seq_len`` of 0, which is padding, nothing is written.

    On a GPU this call reads ``head_map`` back; CUDA graphs capture ``DecodeLayer.append``.

    Args:
        k: Keys of the new tokens, fp32 / bf16 / fp16 [B, H, D], dense over heads.
        v: Values, like ``k``.
        k_resident: [num_planes, num_slots, D].
        v_resident: [num_planes, num_slots, D].
        k_blocks: [num_blocks, block_tokens, D].
        v_blocks: [num_blocks, block_tokens, D].
        block_positions: int32 [num_blocks, block_tokens].
        block_table: int32 [R, C, max_blocks].
        kept_lens: int32 [R, C].
        prompt_lens: int32 [R].
        rows: Row of each request in the tables, int64 [B], unique.
        seq_lens: Tokens including the new one, int64 [B].
        token_ids: Slot of the new token in the resident pool, int64 [B].
        head_map: int32 [H]: plane, or ``~c`` for compressed head ``c``.
        q: Queries of the new tokens, [B, Hq, D]; with it the rings are written.
        pivot_queries: [R, P, S, G, D].
        pivot_map: int32 [H]: pivot index or -1.
        impl: See ``hetero_kernels.dispatch``.

    Raises:
        ValueError: A shape, dtype or stride is not as described.
    """
    num_kv_heads = head_map.shape[0]
    group_size = 1 if q is None else q.shape[1] // max(1, num_kv_heads)
    layer = LayerTensors(
        k_resident=k_resident,
        v_resident=v_resident,
        k_blocks=k_blocks,
        v_blocks=v_blocks,
        block_table=block_table,
        kept_lens=kept_lens,
        prompt_lens=prompt_lens,
        head_map=head_map,
        scale=1.0,
        group_size=group_size,
        block_positions=block_positions,
        pivot_queries=None if q is None else pivot_queries,
        pivot_map=None if q is None else pivot_map,
    )
    batch = DecodeBatch(rows, seq_lens, token_ids)
    check_new_rows(k, v, q, layer, batch)
    chosen = resolve(impl, k.device)
    if chosen == "native":
        append_rows_native(k, v, q, layer, batch)
    elif chosen == "triton":
        from hetero_kernels.append_rows.triton import append_rows_triton

        append_rows_triton(k, v, q, layer, batch)
    elif chosen == "torch":
        append_rows_torch(k, v, q, layer, batch)
    else:
        append_rows_reference(k, v, q, layer, batch)


def check_new_rows(
    k: Tensor, v: Tensor, q: Tensor | None, layer: LayerTensors, batch: DecodeBatch
) -> None:
    """Check the tensors of new tokens against the layer they go to.

    Raises:
        ValueError: A shape, dtype, stride or device does not fit.
    """
    if batch.token_ids is None:
        raise ValueError("appending needs the batch's token_ids, got None")
    check_devices(k_blocks=layer.k_blocks, rows=batch.rows, k=k, v=v, q=q)
    for name, tensor, heads in (
        ("k", k, layer.num_kv_heads),
        ("v", v, layer.num_kv_heads),
        ("q", q, layer.num_q_heads),
    ):
        if tensor is not None:
            check_dtype(name, tensor, layer.dtype)
            check_shape(name, tensor, (batch.size, heads, layer.head_dim))
            check_dense_rows(name, tensor, 2)
