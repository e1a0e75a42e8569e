"""``decode_attention`` in Triton: three launches, none of which depends on contents.

1. *schedule* (one program): rows of every (request, KV head) item and how many tiles lie before it.
2. *attend* (a fixed number of programs): the tiles of all items, resident and compressed, are one
   long line that is cut into equal shares, so that heads whose lengths differ a hundredfold load
   all processors alike. A program walks its share from item to item. An item that lies in one share
   is finished there; of any other each share leaves maximum, sum and weighted values.
3. *merge* (a program for each query head): puts the parts of an item together, writes zeros for
   items without rows.

The part of item ``i`` that program ``p`` computes lies at ``p + i``: from one part to the next in
the line at least one of the two grows, so no two parts share a place and an item's parts are
neighbours.

A request whose row is negative or whose ``seq_len`` is 0 is padding: its result is zero. Not yet
run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from hetero_kernels import triton_support
from hetero_kernels.decode_attention.workspace import DecodeWorkspace
from hetero_kernels.triton_support import power_of_2

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.layer import DecodeBatch, LayerTensors

__all__ = ["decode_attention_triton"]

LOG2_E = 1.4426950408889634
# Bytes of a tile's keys, and as many of its values: 64 tokens at head_dim 128 in bf16. A head of
# 100 tokens wastes little of that.
TILE_BYTES = 16384
# Loads go through two steps, slot and row, so five stages are two tiles (of 32 KiB) ahead, 71 KiB
# of shared memory where it was compiled; a multiprocessor's share of 3.35 TB/s times a latency of
# 0.7 us is 18 KiB. Without tensor-core products four stages take 97 KiB.
DOT_STAGES, PLAIN_STAGES = 5, 4
MIN_TILE_TOKENS, MAX_TILE_TOKENS = 16, 64
SCHEDULE_BLOCK = 1024
# Parts that a merging program reads at a time: 16 rows of 128 fp32 keep 128 threads busy.
MERGE_PARTS = 16


# What differs from call to call shall not make another kernel: a compilation takes a second.
@triton.jit(do_not_specialize=["num_items"])
def _schedule(
    rows_ptr,
    seq_lens_ptr,
    head_map_ptr,
    kept_lens_ptr,
    prompt_lens_ptr,
    lengths_ptr,
    starts_ptr,
    num_items,
    kept_row_stride,
    kept_head_stride,
    H: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros((), dtype=tl.int32)
    for first in range(0, num_items, BLOCK):
        item = first + tl.arange(0, BLOCK)
        exists = item < num_items
        row = tl.load(rows_ptr + item // H, mask=exists, other=-1)
        seq_len = tl.load(seq_lens_ptr + item // H, mask=exists, other=0).to(tl.int32)
        place = tl.load(head_map_ptr + item % H, mask=exists, other=0)
        is_real = (row >= 0) & (seq_len > 0)
        is_compressed = is_real & (place < 0)
        head = (-1 - place).to(tl.int64)
        kept = tl.load(
            kept_lens_ptr + row * kept_row_stride + head * kept_head_stride,
            mask=is_compressed,
            other=0,
        )
        prompt = tl.load(prompt_lens_ptr + row, mask=is_compressed, other=0)
        length = tl.where(is_compressed, kept + seq_len - prompt, seq_len)
        length = tl.maximum(tl.where(is_real, length, 0), 0)
        tiles = (length + TILE - 1) // TILE
        ends = total + tl.cumsum(tiles, axis=0)
        tl.store(lengths_ptr + item, length, mask=exists)
        tl.store(starts_ptr + item, ends - tiles, mask=exists)
        total += tl.sum(tiles, axis=0)
    tl.store(starts_ptr + num_items, total)


@triton.jit(do_not_specialize=["num_items"])
def _attend(
    q_ptr,
    out_ptr,
    k_resident_ptr,
    v_resident_ptr,
    k_blocks_ptr,
    v_blocks_ptr,
    req_to_token_ptr,
    block_table_ptr,
    head_map_ptr,
    rows_ptr,
    lengths_ptr,
    starts_ptr,
    sums_ptr,
    accumulators_ptr,
    scale_log2,
    num_items,
    q_stride,
    out_stride,
    plane_stride,
    slot_stride,
    block_stride,
    block_row_stride,
    req_to_token_stride,
    table_row_stride,
    table_head_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    ITEMS: tl.constexpr,
    TILE: tl.constexpr,
    GP: tl.constexpr,
    DP: tl.constexpr,
    USE_DOT: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    total = tl.load(starts_ptr + num_items)
    share = tl.maximum(tl.cdiv(total, tl.num_programs(0)), 1)
    tile = program * share
    end = tl.minimum(tile + share, total)
    # The last item that starts at or before the first tile; items without rows start there too.
    index = tl.arange(0, ITEMS)
    starts = tl.load(starts_ptr + index, mask=index < num_items, other=2147483647)
    item = tl.sum((starts <= tile).to(tl.int32), axis=0) - 1

    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    is_query = (g[:, None] < G) & (d[None, :] < D)  # [GP, DP]
    while tile < end:
        first = tl.load(starts_ptr + item)
        stop = tl.load(starts_ptr + item + 1)
        last = tl.minimum(stop, end)
        if last > tile:
            b = item // H
            h = item % H
            length = tl.load(lengths_ptr + item)
            row = tl.load(rows_ptr + b)
            place = tl.load(head_map_ptr + h)
            is_resident = place >= 0
            # Choices are made of scalars: a choice between two tensors of offsets would hide from
            # the compiler that rows are aligned, and each element would be loaded by itself.
            plane = tl.where(is_resident, place, 0).to(tl.int64) * plane_stride
            k_ptr = tl.where(is_resident, k_resident_ptr + plane, k_blocks_ptr)
            v_ptr = tl.where(is_resident, v_resident_ptr + plane, v_blocks_ptr)
            head = tl.where(is_resident, 0, -1 - place).to(tl.int64)
            tokens_ptr = req_to_token_ptr + row * req_to_token_stride
            blocks_ptr = block_table_ptr + row * table_row_stride + head * table_head_stride
            table_ptr = tl.where(is_resident, tokens_ptr, blocks_ptr)
            outer_stride = tl.where(is_resident, slot_stride, block_stride)
            inner_stride = tl.where(is_resident, 0, block_row_stride)
            at_q = (h * G + g[:, None]) * D + d[None, :]
            q = tl.load(q_ptr + b.to(tl.int64) * q_stride + at_q, mask=is_query, other=0.0)
            if WIDEN or not USE_DOT:
                q = q.to(tl.float32)

            maximum = tl.full([GP], float("-inf"), tl.float32)
            total_weight = tl.zeros([GP], tl.float32)
            acc = tl.zeros([GP, DP], tl.float32)
            for t in tl.range(tile - first, last - first, num_stages=STAGES):
                position = t * TILE + tl.arange(0, TILE)  # [T]
                is_row = position < length
                entry = tl.where(is_resident, position, position // BLOCK_TOKENS)
                outer = tl.load(table_ptr + entry, mask=is_row, other=0).to(tl.int64)
                inner = (position % BLOCK_TOKENS).to(tl.int64)
                offset = outer * outer_stride + inner * inner_stride
                at = offset[:, None] + d[None, :]  # [T, DP]
                is_element = is_row[:, None] & (d[None, :] < D)
                k = tl.load(k_ptr + at, mask=is_element, other=0.0)
                v = tl.load(v_ptr + at, mask=is_element, other=0.0)
                if WIDEN or not USE_DOT:
                    k = k.to(tl.float32)
                    v = v.to(tl.float32)
                if USE_DOT:
                    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [GP, T]
                else:
                    scores = tl.sum(q[:, None, :] * k[None, :, :], axis=2)
                scores = tl.where(is_row[None, :], scores * scale_log2, float("-inf"))
                new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
                weights = tl.exp2(scores - new_maximum[:, None])
                correction = tl.exp2(maximum - new_maximum)
                total_weight = total_weight * correction + tl.sum(weights, axis=1)
                acc = acc * correction[:, None]
                if USE_DOT:
                    acc += tl.dot(weights.to(v.dtype), v, input_precision="ieee")
                else:
                    acc += tl.sum(weights[:, :, None] * v[None, :, :], axis=1)
                maximum = new_maximum

            if (tile == first) & (last == stop):
                result = acc / total_weight[:, None]
                tl.store(
                    out_ptr + b.to(tl.int64) * out_stride + at_q,
                    result.to(out_ptr.dtype.element_ty),
                    mask=is_query,
                )
            else:
                part = (program + item).to(tl.int64)
                at_sums = sums_ptr + part * (2 * G) + g
                tl.store(at_sums, maximum, mask=g < G)
                tl.store(at_sums + G, total_weight, mask=g < G)
                at_acc = accumulators_ptr + part * (G * D) + g[:, None] * D + d[None, :]
                tl.store(at_acc, acc, mask=is_query)
            tile = last
        item += 1


@triton.jit(do_not_specialize=["num_items"])
def _merge(
    out_ptr,
    starts_ptr,
    sums_ptr,
    accumulators_ptr,
    num_items,
    num_programs,
    out_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PARTS: tl.constexpr,
):
    item = tl.program_id(0)
    g = tl.program_id(1)
    share = tl.maximum(tl.cdiv(tl.load(starts_ptr + num_items), num_programs), 1)
    first = tl.load(starts_ptr + item)
    stop = tl.load(starts_ptr + item + 1)
    d = tl.arange(0, DP)
    row = (item // H).to(tl.int64) * out_stride
    at_out = out_ptr + row + ((item % H) * G + g) * D + d
    if stop == first:
        tl.store(at_out, tl.zeros([DP], out_ptr.dtype.element_ty), mask=d < D)
    else:
        begin = first // share + item
        end = (stop - 1) // share + item + 1
        # One part: the program that had it has written the result.
        if end - begin > 1:
            maximum = tl.full((), float("-inf"), tl.float32)
            total_weight = tl.zeros((), tl.float32)
            acc = tl.zeros([DP], tl.float32)
            for part in range(begin, end, PARTS):
                index = (part + tl.arange(0, PARTS)).to(tl.int64)
                exists = index < end
                at_sums = sums_ptr + index * (2 * G) + g
                maxima = tl.load(at_sums, mask=exists, other=float("-inf"))
                weights = tl.load(at_sums + G, mask=exists, other=0.0)
                values = tl.load(
                    accumulators_ptr + (index[:, None] * G + g) * D + d[None, :],
                    mask=exists[:, None] & (d[None, :] < D),
                    other=0.0,
                )  # [PARTS, DP]
                new_maximum = tl.maximum(maximum, tl.max(maxima, axis=0))
                factors = tl.exp2(maxima - new_maximum)
                correction = tl.exp2(maximum - new_maximum)
                total_weight = total_weight * correction + tl.sum(weights * factors, axis=0)
                acc = acc * correction + tl.sum(values * factors[:, None], axis=0)
                maximum = new_maximum
            result = (acc / total_weight).to(out_ptr.dtype.element_ty)
            tl.store(at_out, result, mask=d < D)


def decode_attention_triton(
    q: Tensor,
    out: Tensor,
    layer: LayerTensors,
    batch: DecodeBatch,
    workspace: DecodeWorkspace | None = None,
) -> None:
    """Attend with one query per head to the rows that each head holds, in three launches.

    Grids depend on the batch's size and the workspace only, and nothing waits for the device, so
    the call can be captured in a CUDA graph.

    Args:
        q: Queries, [B, Hq, D].
        out: Result, [B, Hq, D], overwritten.
        layer: Keys, values and tables.
        batch: Requests; ``seq_lens`` counts the new token, which is already appended. A negative
            row or a ``seq_len`` of 0 is padding and gives zeros.
        workspace: Scratch memory; ``None`` allocates it.

    Raises:
        ValueError: The workspace is too small or of another shape.
    """
    H, G, D = layer.num_kv_heads, layer.group_size, layer.head_dim
    num_items = batch.size * H
    if num_items == 0:
        return
    if workspace is None:
        workspace = DecodeWorkspace.allocate(batch.size, H, G, D, q.device)
    workspace.check(num_items, G, D)
    assert layer.req_to_token is not None
    head_dim = power_of_2(D)
    # A single query is bound by memory and needs no tensor cores. Groups take them, padded to the
    # 16 rows that they have: products of [G, T, D] in registers would spill instead.
    use_dot = G > 1
    tile = TILE_BYTES // (head_dim * q.element_size())
    tile = max(MIN_TILE_TOKENS, min(MAX_TILE_TOKENS, tile))
    _schedule[(1,)](
        batch.rows,
        batch.seq_lens,
        layer.head_map,
        layer.kept_lens,
        layer.prompt_lens,
        workspace.lengths,
        workspace.starts,
        num_items,
        layer.kept_lens.stride(0),
        layer.kept_lens.stride(1),
        H=H,
        TILE=tile,
        BLOCK=SCHEDULE_BLOCK,
    )
    _attend[(workspace.num_programs,)](
        q,
        out,
        layer.k_resident,
        layer.v_resident,
        layer.k_blocks,
        layer.v_blocks,
        layer.req_to_token,
        layer.block_table,
        layer.head_map,
        batch.rows,
        workspace.lengths,
        workspace.starts,
        workspace.sums,
        workspace.accumulators,
        layer.scale * LOG2_E,
        num_items,
        q.stride(0),
        out.stride(0),
        layer.k_resident.stride(0),
        layer.k_resident.stride(1),
        layer.k_blocks.stride(0),
        layer.k_blocks.stride(1),
        layer.req_to_token.stride(0),
        layer.block_table.stride(0),
        layer.block_table.stride(1),
        H=H,
        G=G,
        D=D,
        BLOCK_TOKENS=layer.block_tokens,
        ITEMS=power_of_2(num_items),
        TILE=tile,
        GP=max(16, power_of_2(G)) if use_dot else 1,
        DP=head_dim,
        USE_DOT=use_dot,
        WIDEN=triton_support.widens_bf16(q.dtype),
        STAGES=DOT_STAGES if use_dot else PLAIN_STAGES,
        num_warps=4,
    )
    _merge[(num_items, G)](
        out,
        workspace.starts,
        workspace.sums,
        workspace.accumulators,
        num_items,
        workspace.num_programs,
        out.stride(0),
        H=H,
        G=G,
        D=D,
        DP=head_dim,
        PARTS=MERGE_PARTS,
        num_warps=4,
    )
