"""``append_rows`` in Triton: one launch, a program for each request and KV head.

A program copies one row of K, one of V, a position and, for a pivot, the queries of its group; bits
are loaded and stored as they are. Padding (a negative row or a ``seq_len`` of 0) writes nothing.
Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from hetero_kernels.triton_support import power_of_2

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.layer import DecodeBatch, LayerTensors

__all__ = ["append_rows_triton"]


@triton.jit
def _append(
    k_ptr,
    v_ptr,
    q_ptr,
    k_resident_ptr,
    v_resident_ptr,
    k_blocks_ptr,
    v_blocks_ptr,
    block_positions_ptr,
    block_table_ptr,
    kept_lens_ptr,
    prompt_lens_ptr,
    rows_ptr,
    seq_lens_ptr,
    token_ids_ptr,
    head_map_ptr,
    pivot_map_ptr,
    pivot_queries_ptr,
    k_stride,
    v_stride,
    q_stride,
    plane_stride,
    slot_stride,
    block_stride,
    block_row_stride,
    positions_stride,
    table_row_stride,
    table_head_stride,
    kept_row_stride,
    kept_head_stride,
    pivot_row_stride,
    pivot_head_stride,
    BLOCK_TOKENS: tl.constexpr,
    NUM_STEPS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_QUERIES: tl.constexpr,
):
    b = tl.program_id(0)
    h = tl.program_id(1)
    row = tl.load(rows_ptr + b)
    position = tl.load(seq_lens_ptr + b) - 1
    if (row >= 0) & (position >= 0):
        d = tl.arange(0, DP)
        request = b.to(tl.int64)
        k = tl.load(k_ptr + request * k_stride + h * D + d, mask=d < D)
        v = tl.load(v_ptr + request * v_stride + h * D + d, mask=d < D)
        generated = position - tl.load(prompt_lens_ptr + row)
        place = tl.load(head_map_ptr + h)
        if place >= 0:
            slot = tl.load(token_ids_ptr + b)
            at = place.to(tl.int64) * plane_stride + slot * slot_stride + d
            tl.store(k_resident_ptr + at, k, mask=d < D)
            tl.store(v_resident_ptr + at, v, mask=d < D)
        else:
            head = (-1 - place).to(tl.int64)
            kept = tl.load(kept_lens_ptr + row * kept_row_stride + head * kept_head_stride)
            index = kept + generated
            block = tl.load(
                block_table_ptr
                + row * table_row_stride
                + head * table_head_stride
                + index // BLOCK_TOKENS
            ).to(tl.int64)
            offset = index % BLOCK_TOKENS
            at = block * block_stride + offset * block_row_stride + d
            tl.store(k_blocks_ptr + at, k, mask=d < D)
            tl.store(v_blocks_ptr + at, v, mask=d < D)
            if HAS_POSITIONS:
                at_position = block_positions_ptr + block * positions_stride + offset
                tl.store(at_position, position.to(tl.int32))
        if HAS_QUERIES:
            pivot = tl.load(pivot_map_ptr + h)
            if pivot >= 0:
                g = tl.arange(0, GP)[:, None]
                is_query = (g < G) & (d[None, :] < D)
                q = tl.load(
                    q_ptr + request * q_stride + (h * G + g) * D + d[None, :], mask=is_query
                )
                at_step = (
                    row * pivot_row_stride
                    + pivot.to(tl.int64) * pivot_head_stride
                    + (generated % NUM_STEPS) * (G * D)
                )
                tl.store(pivot_queries_ptr + at_step + g * D + d[None, :], q, mask=is_query)


def append_rows_triton(
    k: Tensor, v: Tensor, q: Tensor | None, layer: LayerTensors, batch: DecodeBatch
) -> None:
    """One launch for all requests and heads; see ``append_rows_reference``."""
    if batch.size == 0 or layer.num_kv_heads == 0:
        return
    positions, ring, pivots = layer.block_positions, layer.pivot_queries, layer.pivot_map
    watches = q is not None and ring is not None and pivots is not None
    # A pointer that is not read must still be one.
    unused = layer.head_map
    _append[(batch.size, layer.num_kv_heads)](
        k,
        v,
        q if watches else k,
        layer.k_resident,
        layer.v_resident,
        layer.k_blocks,
        layer.v_blocks,
        unused if positions is None else positions,
        layer.block_table,
        layer.kept_lens,
        layer.prompt_lens,
        batch.rows,
        batch.seq_lens,
        batch.token_ids,
        layer.head_map,
        pivots if watches else unused,
        ring if watches else k,
        k.stride(0),
        v.stride(0),
        q.stride(0) if q is not None and watches else 0,
        layer.k_resident.stride(0),
        layer.k_resident.stride(1),
        layer.k_blocks.stride(0),
        layer.k_blocks.stride(1),
        0 if positions is None else positions.stride(0),
        layer.block_table.stride(0),
        layer.block_table.stride(1),
        layer.kept_lens.stride(0),
        layer.kept_lens.stride(1),
        ring.stride(0) if ring is not None and watches else 0,
        ring.stride(1) if ring is not None and watches else 0,
        BLOCK_TOKENS=layer.block_tokens,
        NUM_STEPS=ring.shape[2] if ring is not None and watches else 1,
        G=layer.group_size,
        D=layer.head_dim,
        GP=power_of_2(layer.group_size),
        DP=power_of_2(layer.head_dim),
        HAS_POSITIONS=positions is not None,
        HAS_QUERIES=watches,
        # A row is at most 1 KiB: one warp loads it whole.
        num_warps=1,
    )
