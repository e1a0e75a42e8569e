"""Pooled attention scores in Triton, shared by the operations that score positions.

An *item* is a KV head (of a request) with R query rows. Three launches:

1. *measure* (item, split, chunk of rows): maximum and sum of the exponentials of each row over the
   split's keys.
2. *combine* (item, chunk): the splits' maxima and sums to one maximum and one factor for each row.
3. *pool* (item, split, chunk): the keys once more, now to probabilities, their average pool, and
   what the operation makes of the rows: the maximum over each group (``pool_maxima``) or the mean
   over all (``pool_mean``).

Keys are read twice so that the R x N probabilities are never in memory: at 128K tokens, five
queries of four heads they would be 10 MB an item, written and read, against 32 MB of bf16 keys.

Pooling is a product with a band matrix: a tile of T keys gives T - 4 pooled positions, and
neighbours overlap by 4.

Numbers that follow a prompt's length are not specialised on, and `_combine` has room for the most
splits there are: a prompt of another length shall not make other kernels. Not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hetero_kernels import triton_support
from hetero_kernels.triton_select import share_of
from hetero_kernels.triton_support import power_of_2

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.quantize_keys.format import QuantizedKeys

__all__ = ["ScoredItems", "pool_maxima", "pool_mean"]

LOG2_E = 1.4426950408889634
# Keys of a tile, of which the outer four only help to pool.
TILE = tl.constexpr(64)
HALO = tl.constexpr(2)
# Query rows that a program holds: 64 x 128 in bf16 are four tensor-core tiles high. With longer
# rows there are fewer, or registers and shared memory (227 KiB) would not do.
CHUNK_BYTES = 16384
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 16, 64
# Rows that are pooled one by one take the wide products of this processor from 64 on, and those
# spilled 2 KiB a thread where they were compiled (groups of 8, five queries); 32 spill nothing.
MAX_POOLED_ROWS = 32
# Bytes of a tile of keys from which on one tile less is loaded ahead.
LONG_TILE_BYTES = 32768
# Keys of a split: enough to pay for the queries, few enough that one item of 128K tokens fills 64
# programs.
SPLIT_TOKENS = 2048
MAX_SPLITS = 64


@triton.jit
def _item(item, rows_ptr, lens_ptr, planes_ptr, length, HAS_ROWS, HAS_LENS, HAS_PLANES):
    """Row of the slot table, plane and number of positions (padding: 0) of an item."""
    row = tl.zeros((), tl.int64)
    plane = item.to(tl.int64)
    num_positions = length + tl.zeros((), tl.int32)
    if HAS_LENS:
        # Nothing has checked it: in a replayed graph it may be longer than what was allocated.
        num_positions = tl.minimum(tl.load(lens_ptr + item), length)
    if HAS_ROWS:
        row = tl.load(rows_ptr + item)
        num_positions = tl.where(row >= 0, num_positions, 0)
    if HAS_PLANES:
        plane = tl.load(planes_ptr + item).to(tl.int64)
    return row, plane, tl.maximum(num_positions, 0)


@triton.jit
def _queries(q_ptr, item, row, G, GP, R, D, DP, FIRST, WIDTH):
    """Elements FIRST .. FIRST + WIDTH of query rows; row ``r`` is query ``r % GP`` of a group."""
    d = tl.arange(0, DP)
    source = (row // GP) * G + row % GP  # [RB]
    is_row = (row % GP < G) & (source < R)
    at = item.to(tl.int64) * (R * D) + source[:, None] * D + FIRST + d[None, :]
    return tl.load(q_ptr + at, mask=is_row[:, None] & (d < WIDTH)[None, :], other=0.0)


@triton.jit
def _operands(
    q_ptr,
    item,
    row,
    G,
    GP,
    R,
    D: tl.constexpr,
    DP: tl.constexpr,
    KEY_BITS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Query rows as ``_products`` takes them: whole, or the two halves that 4-bit keys have."""
    STORED: tl.constexpr = D // 2 if KEY_BITS == 4 else D
    q = _queries(q_ptr, item, row, G, GP, R, D, DP, 0, STORED)
    q_high = q
    if KEY_BITS == 4:
        q_high = _queries(q_ptr, item, row, G, GP, R, D, DP, STORED, STORED)
    if WIDEN or KEY_BITS == 4:
        q = q.to(tl.float32)
        q_high = q_high.to(tl.float32)
    return q, q_high


@triton.jit
def _band():
    """What pools a tile: column b sums keys b .. b + 4, which are b - 2 .. b + 2 of its output."""
    t = tl.arange(0, TILE)
    return ((t[:, None] >= t[None, :]) & (t[:, None] <= t[None, :] + 2 * HALO)).to(tl.float32)


@triton.jit
def _products(
    q,
    q_high,
    keys_ptr,
    scales_ptr,
    slots_ptr,
    position,
    is_position,
    slot_stride,
    scales_stride,
    D: tl.constexpr,
    DP: tl.constexpr,
    KEY_BITS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Products of query rows and the keys of some positions, fp32 [RB, T]."""
    d = tl.arange(0, DP)
    slot = position.to(tl.int64)
    if HAS_SLOTS:
        slot = tl.load(slots_ptr + position, mask=is_position, other=0).to(tl.int64)
    if KEY_BITS == 4:
        HALF: tl.constexpr = D // 2
        mask = is_position[:, None] & (d < HALF)[None, :]
        data = tl.load(keys_ptr + slot[:, None] * slot_stride + d[None, :], mask=mask, other=0)
        at_scale = scales_ptr + slot[:, None] * scales_stride
        low_scale = tl.load(at_scale + (d // 32)[None, :], mask=mask, other=0.0)
        high_scale = tl.load(at_scale + ((d + HALF) // 32)[None, :], mask=mask, other=0.0)
        # An integer of 4 bits times a scale of 8 has 11 or fewer: exact, also in TF32.
        low = ((data & 15).to(tl.float32) - 8.0) * low_scale.to(tl.float32)
        high = ((data >> 4).to(tl.float32) - 8.0) * high_scale.to(tl.float32)
        products = tl.dot(q, tl.trans(low), input_precision=PRECISION)
        products += tl.dot(q_high, tl.trans(high), input_precision=PRECISION)
    else:
        mask = is_position[:, None] & (d < D)[None, :]
        k = tl.load(keys_ptr + slot[:, None] * slot_stride + d[None, :], mask=mask, other=0)
        if KEY_BITS == 8:
            # Integers up to 127 are exact in every dtype; the scale is the whole key's.
            k = k.to(q.dtype)
        if WIDEN:
            k = k.to(tl.float32)
        products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if KEY_BITS == 8:
            scale = tl.load(scales_ptr + slot * scales_stride, mask=is_position, other=0.0)
            products *= scale.to(tl.float32)[None, :]
    return products


@triton.jit(do_not_specialize=["length"])
def _measure(
    q_ptr,
    keys_ptr,
    scales_ptr,
    slots_ptr,
    rows_ptr,
    lens_ptr,
    planes_ptr,
    stats_ptr,
    scale_log2,
    length,
    plane_stride,
    slot_stride,
    scales_plane_stride,
    scales_stride,
    slots_stride,
    R: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    RB: tl.constexpr,
    KEY_BITS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_LENS: tl.constexpr,
    HAS_PLANES: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(0)
    split = tl.program_id(1)
    chunk = tl.program_id(2)
    table_row, plane, N = _item(
        item, rows_ptr, lens_ptr, planes_ptr, length, HAS_ROWS, HAS_LENS, HAS_PLANES
    )
    row = chunk * RB + tl.arange(0, RB)
    q, q_high = _operands(q_ptr, item, row, G, GP, R, D, DP, KEY_BITS, WIDEN)
    keys_ptr += plane * plane_stride
    scales_ptr += plane * scales_plane_stride
    slots_ptr += table_row * slots_stride
    visible = tl.full([RB], 0, tl.int32) + N
    if WINDOW > 0:
        visible = N - WINDOW + row // GP + 1

    maximum = tl.full([RB], float("-inf"), tl.float32)
    total = tl.zeros([RB], tl.float32)
    first, last = share_of(tl.cdiv(N, TILE))
    for tile in range(first, last):
        position = tile * TILE + tl.arange(0, TILE)
        products = _products(
            q,
            q_high,
            keys_ptr,
            scales_ptr,
            slots_ptr,
            position,
            position < N,
            slot_stride,
            scales_stride,
            D,
            DP,
            KEY_BITS,
            HAS_SLOTS,
            WIDEN,
            PRECISION,
        )
        is_visible = position[None, :] < visible[:, None]
        scores = tl.where(is_visible, products * scale_log2, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # A row that has seen nothing yet keeps a sum of 0 (and not of NaN).
        base = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
        total = total * tl.exp2(maximum - base)
        total += tl.sum(tl.exp2(scores - base[:, None]), axis=1)
        maximum = new_maximum
    at = ((item.to(tl.int64) * tl.num_programs(1) + split) * tl.num_programs(2) + chunk) * (2 * RB)
    tl.store(stats_ptr + at + tl.arange(0, RB), maximum)
    tl.store(stats_ptr + at + RB + tl.arange(0, RB), total)


@triton.jit(do_not_specialize=["num_splits"])
def _combine(
    stats_ptr,
    factors_ptr,
    num_splits,
    SPLITS: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    RB: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    split = tl.arange(0, SPLITS)[:, None]
    r = tl.arange(0, RB)
    at = ((item * num_splits + split) * tl.num_programs(1) + chunk) * (2 * RB) + r[None, :]
    exists = split < num_splits
    maxima = tl.load(stats_ptr + at, mask=exists, other=float("-inf"))  # [SPLITS, RB]
    sums = tl.load(stats_ptr + at + RB, mask=exists, other=0.0)
    maximum = tl.max(maxima, axis=0)
    maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    total = tl.sum(sums * tl.exp2(maxima - maximum[None, :]), axis=0)
    # No positions, no sum; what is no number stays none, and makes all of its group none: their
    # maximum would drop it.
    factor = tl.where((r % GP >= G) | (total == 0), 0.0, 1.0 / total)
    groups = tl.sum(tl.reshape(factor, [RB // GP, GP]), axis=1)
    group = tl.reshape(tl.broadcast_to(groups[:, None], [RB // GP, GP]), [RB])
    factor = tl.where(group != group, group, factor)
    at_out = factors_ptr + (item * tl.num_programs(1) + chunk) * (2 * RB) + r
    tl.store(at_out, maximum)
    tl.store(at_out + RB, factor)


@triton.jit(do_not_specialize=["length", "width", "out_item_stride", "out_query_stride"])
def _pool_maxima(
    q_ptr,
    keys_ptr,
    scales_ptr,
    slots_ptr,
    rows_ptr,
    lens_ptr,
    planes_ptr,
    factors_ptr,
    out_ptr,
    scale_log2,
    length,
    width,
    plane_stride,
    slot_stride,
    scales_plane_stride,
    scales_stride,
    slots_stride,
    out_item_stride,
    out_query_stride,
    R: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    RB: tl.constexpr,
    KEY_BITS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_LENS: tl.constexpr,
    HAS_PLANES: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BAND_PRECISION: tl.constexpr,
):
    item = tl.program_id(0)
    chunk = tl.program_id(2)
    table_row, plane, N = _item(
        item, rows_ptr, lens_ptr, planes_ptr, length, HAS_ROWS, HAS_LENS, HAS_PLANES
    )
    row = chunk * RB + tl.arange(0, RB)
    q, q_high = _operands(q_ptr, item, row, G, GP, R, D, DP, KEY_BITS, WIDEN)
    keys_ptr += plane * plane_stride
    scales_ptr += plane * scales_plane_stride
    slots_ptr += table_row * slots_stride
    at = (item.to(tl.int64) * tl.num_programs(2) + chunk) * (2 * RB) + tl.arange(0, RB)
    maximum = tl.load(factors_ptr + at)
    factor = tl.load(factors_ptr + at + RB)

    t = tl.arange(0, TILE)
    band = _band()
    query = chunk * (RB // GP) + tl.arange(0, RB // GP)
    STEP: tl.constexpr = TILE - 2 * HALO
    begin, end = share_of(tl.cdiv(width, STEP))
    # Behind the last position there is nothing to load. Two loops, because the compiler loads ahead
    # only in one that has no branches.
    last = tl.minimum(tl.cdiv(N, STEP), end)
    out_ptr += item.to(tl.int64) * out_item_stride
    at_out = out_ptr + query.to(tl.int64)[:, None] * out_query_stride
    is_group = (query < R // G)[:, None]
    for tile in range(begin, last):
        position = tile * STEP - HALO + t
        is_position = (position >= 0) & (position < N)
        products = _products(
            q,
            q_high,
            keys_ptr,
            scales_ptr,
            slots_ptr,
            position,
            is_position,
            slot_stride,
            scales_stride,
            D,
            DP,
            KEY_BITS,
            HAS_SLOTS,
            WIDEN,
            PRECISION,
        )
        shares = tl.exp2(products * scale_log2 - maximum[:, None]) * factor[:, None]
        shares = tl.where(is_position[None, :], shares, 0.0)
        sums = tl.dot(shares, band, input_precision=BAND_PRECISION) * 0.2  # [RB, T]
        pooled = tl.max(tl.reshape(sums, [RB // GP, GP, TILE]), axis=1)
        target = tile * STEP + t
        is_target = (t < STEP) & (target < width)
        # The two positions behind the last would have a share of it.
        pooled = tl.where((target < N)[None, :], pooled, 0.0)
        tl.store(at_out + target[None, :], pooled, mask=is_group & is_target[None, :])
    for tile in range(tl.maximum(begin, last), end):
        target = tile * STEP + t
        is_target = (t < STEP) & (target < width)
        zeros = tl.zeros([RB // GP, TILE], tl.float32)
        tl.store(at_out + target[None, :], zeros, mask=is_group & is_target[None, :])


@triton.jit(do_not_specialize=["N", "out_item_stride"])
def _pool_mean(
    q_ptr,
    keys_ptr,
    factors_ptr,
    out_ptr,
    scale_log2,
    N,
    plane_stride,
    slot_stride,
    out_item_stride,
    R: tl.constexpr,
    G: tl.constexpr,
    WINDOW: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    RB: tl.constexpr,
    NUM_CHUNKS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    item = tl.program_id(0)
    keys_ptr += item.to(tl.int64) * plane_stride
    t = tl.arange(0, TILE)
    band = _band()
    STEP: tl.constexpr = TILE - 2 * HALO
    first, last = share_of(tl.cdiv(N, STEP))
    for tile in range(first, last):
        position = tile * STEP - HALO + t
        is_position = (position >= 0) & (position < N)
        sums = tl.zeros([TILE], tl.float32)
        # The keys of the tile stay in the nearest cache from one chunk of queries to the next.
        for chunk in range(NUM_CHUNKS):
            row = chunk * RB + tl.arange(0, RB)
            q = _queries(q_ptr, item, row, G, G, R, D, DP, 0, D)
            if WIDEN:
                q = q.to(tl.float32)
            at = (item.to(tl.int64) * NUM_CHUNKS + chunk) * (2 * RB) + tl.arange(0, RB)
            maximum = tl.load(factors_ptr + at)
            factor = tl.load(factors_ptr + at + RB)
            products = _products(
                q,
                q,
                keys_ptr,
                keys_ptr,
                keys_ptr,
                position,
                is_position,
                slot_stride,
                0,
                D,
                DP,
                0,
                False,
                WIDEN,
                PRECISION,
            )
            visible = N - WINDOW + row // G + 1
            is_seen = (position[None, :] < visible[:, None]) & is_position[None, :]
            shares = tl.exp2(products * scale_log2 - maximum[:, None]) * factor[:, None]
            sums += tl.sum(tl.where(is_seen & (row < R)[:, None], shares, 0.0), axis=0)
        pooled = tl.sum(sums[:, None] * band, axis=0) * (0.2 / R)
        target = tile * STEP + t
        is_target = (t < STEP) & (target < N)
        tl.store(out_ptr + item.to(tl.int64) * out_item_stride + target, pooled, mask=is_target)


@dataclass(frozen=True, eq=False)
class ScoredItems:
    """Queries and where their keys lie.

    Attributes:
        queries: [items, groups, G, D], contiguous; R = groups * G.
        keys: Keys, [num_planes, num_slots, D].
        scale: Factor on the products.
        width: Positions of the longest item.
        slots: Slot by position, int32 [N] or, with ``rows``, [rows, N]; ``None``: the position.
        rows: Row of ``slots`` of each item, int64 [items]; negative: padding.
        lengths: Positions of each item, int32 [items]; ``None``, and at most: ``width``.
        planes: Plane of each item, int32 [items]; ``None``: the item's index.
    """

    queries: Tensor
    keys: Tensor | QuantizedKeys
    scale: float
    width: int
    slots: Tensor | None = None
    rows: Tensor | None = None
    lengths: Tensor | None = None
    planes: Tensor | None = None

    @property
    def num_splits(self) -> int:
        """Programs along the keys of an item."""
        return max(1, min(MAX_SPLITS, -(-self.width // SPLIT_TOKENS)))


def pool_maxima(items: ScoredItems) -> Tensor:
    """Pooled scores of each query group: the maximum over its queries, 0 beyond an item's length.

    Returns:
        fp32 [items, groups, width].
    """
    num_items, num_groups, group_size, _ = items.queries.shape
    out = _floats(items, num_items, num_groups, items.width)
    if out.numel() == 0:
        return out
    padded = power_of_2(group_size)
    num_rows = max(16, padded * power_of_2(num_groups))
    chunk_rows = min(num_rows, max(_chunk_rows(items, MAX_POOLED_ROWS), padded))
    num_chunks = triton.cdiv(num_groups * padded, chunk_rows)
    factors, arguments, options = _measured(items, padded, chunk_rows, num_chunks, window=0)
    del options["WINDOW"]
    _pool_maxima[(num_items, items.num_splits, num_chunks)](
        *arguments[:7],
        factors,
        out,
        *arguments[7:9],
        items.width,
        *arguments[9:],
        out.stride(0),
        out.stride(1),
        **options,
        # Three TF32 products give the sums 22 bits, and what they sum are not differences.
        BAND_PRECISION="tf32x3",
    )
    return out


def pool_mean(items: ScoredItems) -> Tensor:
    """Mean over all query rows, pooled; group ``w`` of W sees positions up to ``N - W + w``.

    Returns:
        fp32 [items, width].
    """
    num_items, window, group_size, _ = items.queries.shape
    assert isinstance(items.keys, torch.Tensor)
    out = _floats(items, num_items, items.width)
    if out.numel() == 0:
        return out
    num_rows = window * group_size
    chunk_rows = min(_chunk_rows(items, MAX_CHUNK_ROWS), max(16, power_of_2(num_rows)))
    num_chunks = triton.cdiv(num_rows, chunk_rows)
    factors, _, options = _measured(items, group_size, chunk_rows, num_chunks, window=window)
    _pool_mean[(num_items, items.num_splits)](
        items.queries,
        items.keys,
        factors,
        out,
        items.scale * LOG2_E,
        items.width,
        items.keys.stride(0),
        items.keys.stride(1),
        out.stride(0),
        NUM_CHUNKS=num_chunks,
        **{name: options[name] for name in ("R", "G", "WINDOW", "D", "DP", "RB")},
        **{name: options[name] for name in ("WIDEN", "PRECISION", "num_warps", "num_stages")},
    )
    return out


def _floats(items: ScoredItems, *shape: int) -> Tensor:
    """Memory for fp32 numbers where the items are."""
    return torch.empty(shape, dtype=torch.float32, device=items.queries.device)


def _chunk_rows(items: ScoredItems, most: int) -> int:
    row_bytes = power_of_2(items.queries.shape[3]) * items.queries.element_size()
    return max(MIN_CHUNK_ROWS, min(most, CHUNK_BYTES // int(row_bytes)))


def _measured(
    items: ScoredItems, padded_group: int, chunk_rows: int, num_chunks: int, window: int
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Maximum and factor of each row, and the arguments that the pooling kernels take too.

    Scratch: fp32 [items, splits, chunks, 2, chunk_rows] for the splits' maxima and sums, and the
    same without splits for the result.
    """
    queries, keys = items.queries, items.keys
    num_items, num_groups, group_size, head_dim = queries.shape
    bits = 0 if isinstance(keys, torch.Tensor) else keys.bits
    data, scales = (keys, keys) if isinstance(keys, torch.Tensor) else (keys.data, keys.scales)
    stats = _floats(items, num_items, items.num_splits, num_chunks, 2, chunk_rows)
    factors = _floats(items, num_items, num_chunks, 2, chunk_rows)
    # fp32: three TF32 products of what TF32 keeps and what it drops, 22 bits; plain fp32 products
    # do not run on tensor cores and spilled registers by the kilobyte where they were compiled.
    precision = "tf32x3" if queries.dtype == torch.float32 else "tf32" if bits == 4 else "ieee"
    arguments = (
        queries,
        data,
        scales,
        data if items.slots is None else items.slots,
        queries if items.rows is None else items.rows,
        queries if items.lengths is None else items.lengths,
        queries if items.planes is None else items.planes,
        items.scale * LOG2_E,
        items.width,
        data.stride(0),
        data.stride(1),
        scales.stride(0),
        scales.stride(1),
        0 if items.rows is None or items.slots is None else items.slots.stride(0),
    )
    options = {
        "R": num_groups * group_size,
        "G": group_size,
        "GP": padded_group,
        "WINDOW": window,
        "D": head_dim,
        "DP": power_of_2(head_dim // 2 if bits == 4 else head_dim),
        "RB": chunk_rows,
        "KEY_BITS": bits,
        "HAS_SLOTS": items.slots is not None,
        "HAS_ROWS": items.rows is not None,
        "HAS_LENS": items.lengths is not None,
        "HAS_PLANES": items.planes is not None,
        "WIDEN": triton_support.widens_bf16(queries.dtype),
        "PRECISION": precision,
        # Queries and products live in registers; more of them need more threads.
        "num_warps": 8 if chunk_rows * head_dim > 8192 else 4,
        "num_stages": 2 if TILE.value * head_dim * queries.element_size() > LONG_TILE_BYTES else 3,
    }
    _measure[(num_items, items.num_splits, num_chunks)](
        *arguments[:7], stats, *arguments[7:], **options
    )
    _combine[(num_items, num_chunks)](
        stats,
        factors,
        items.num_splits,
        SPLITS=MAX_SPLITS,
        # With a window it is the mean over all rows that is wanted: each is a group of its own.
        G=1 if window else group_size,
        GP=1 if window else padded_group,
        RB=chunk_rows,
    )
    return factors, arguments, options
