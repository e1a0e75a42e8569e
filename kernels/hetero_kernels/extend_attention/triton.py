"""``extend_attention`` in Triton: one launch, online softmax, a program for each block of rows.

A row is a query of a group of a new token: the group shares each key that is loaded. A program goes
over the keys that all of its rows see without a mask, then over the few tiles on the diagonal with
one. What lies behind the diagonal is not touched, so the cost is new x total. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hetero_kernels import triton_support
from hetero_kernels.triton_support import power_of_2

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["extend_attention_triton"]

LOG2_E = 1.4426950408889634
# Bytes of a program's queries and of a tile of keys: 128 rows and 64 keys of 128 in bf16, as is
# usual for prefill on this kind of processor; longer rows or wider elements halve both.
QUERY_BYTES = 32768
KEY_BYTES = 16384


@triton.jit
def _tiles(
    q,
    maximum,
    total,
    acc,
    k_ptr,
    v_ptr,
    slots_ptr,
    first,
    last,
    num_visible,
    num_keys,
    scale_log2,
    k_stride,
    v_stride,
    D: tl.constexpr,
    DP: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    IS_MASKED: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Takes the keys of tiles ``first .. last - 1`` into a softmax under way."""
    d = tl.arange(0, DP)
    for tile in range(first, last):
        position = tile * TILE + tl.arange(0, TILE)
        is_key = position < num_keys
        slot = position.to(tl.int64)
        if HAS_SLOTS:
            slot = tl.load(slots_ptr + position, mask=is_key, other=0).to(tl.int64)
        mask = is_key[:, None] & (d < D)[None, :]
        k = tl.load(k_ptr + slot[:, None] * k_stride + d[None, :], mask=mask, other=0.0)
        v = tl.load(v_ptr + slot[:, None] * v_stride + d[None, :], mask=mask, other=0.0)
        if WIDEN:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        if IS_MASKED:
            scores = tl.where(position[None, :] < num_visible[:, None], scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1))
        # Every row sees position 0, which is in the first tile: the maximum is a number.
        weights = tl.exp2(scores - new_maximum[:, None])
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction + tl.sum(weights, axis=1)
        acc = acc * correction[:, None]
        acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        maximum = new_maximum
    return maximum, total, acc


# What differs from call to call shall not make another kernel: a compilation takes a second.
@triton.jit(do_not_specialize=["num_new", "prefix_len"])
def _extend(
    q_ptr,
    k_ptr,
    v_ptr,
    slots_ptr,
    out_ptr,
    scale_log2,
    num_new,
    prefix_len,
    q_stride,
    k_head_stride,
    k_stride,
    v_head_stride,
    v_stride,
    out_stride,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The last blocks see most keys: they go first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    TOKENS: tl.constexpr = ROWS // GP
    row = tl.arange(0, ROWS)
    token = block * TOKENS + row // GP  # [ROWS]
    g = row % GP
    d = tl.arange(0, DP)
    is_query = ((token < num_new) & (g < G))[:, None] & (d < D)[None, :]
    at = (h * G + g[:, None]) * D + d[None, :]
    q = tl.load(q_ptr + token.to(tl.int64)[:, None] * q_stride + at, mask=is_query, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    k_ptr += h.to(tl.int64) * k_head_stride
    v_ptr += h.to(tl.int64) * v_head_stride
    num_keys = prefix_len + tl.minimum((block + 1) * TOKENS, num_new)
    num_visible = prefix_len + token + 1
    whole = (prefix_len + block * TOKENS + 1) // TILE
    maximum = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DP], tl.float32)
    begin = 0
    end = whole
    # Twice: what all rows see needs no mask, what lies on the diagonal does.
    for IS_MASKED in tl.static_range(2):
        maximum, total, acc = _tiles(
            q,
            maximum,
            total,
            acc,
            k_ptr,
            v_ptr,
            slots_ptr,
            begin,
            end,
            num_visible,
            num_keys,
            scale_log2,
            k_stride,
            v_stride,
            D,
            DP,
            TILE,
            HAS_SLOTS,
            IS_MASKED,
            WIDEN,
            PRECISION,
        )
        begin = end
        end = tl.cdiv(num_keys, TILE)
    result = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token.to(tl.int64)[:, None] * out_stride + at, result, mask=is_query)


def extend_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, prefix_len: int, scale: float, slots: Tensor | None
) -> Tensor:
    """One launch for all heads; see ``extend_attention_reference``.

    Args:
        q: Queries, [n, Hq, D].
        k: Keys by position, or by slot with ``slots``, [H, prefix_len + n or num_slots, D].
        v: Values, like ``k``.
        prefix_len: Tokens before the new ones.
        scale: Factor on the scores.
        slots: Slot of each position, int32 [prefix_len + n]; ``None``: the position.

    Returns:
        [n, Hq, D], contiguous.
    """
    num_new, num_q_heads, head_dim = q.shape
    num_kv_heads = k.shape[0]
    group_size = num_q_heads // num_kv_heads
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    padded_group = power_of_2(group_size)
    row_bytes = power_of_2(head_dim) * q.element_size()
    # Few new tokens need few rows, but tensor cores take no fewer than 16.
    rows = min(QUERY_BYTES // row_bytes, 128, max(16, power_of_2(num_new) * padded_group))
    rows = max(rows, padded_group, 16)
    _extend[(triton.cdiv(num_new, rows // padded_group), num_kv_heads)](
        q,
        k,
        v,
        q if slots is None else slots,
        out,
        scale * LOG2_E,
        num_new,
        prefix_len,
        q.stride(0),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        out.stride(0),
        G=group_size,
        GP=padded_group,
        D=head_dim,
        DP=power_of_2(head_dim),
        ROWS=rows,
        TILE=max(16, min(64, KEY_BYTES // row_bytes)),
        HAS_SLOTS=slots is not None,
        WIDEN=triton_support.widens_bf16(q.dtype),
        PRECISION="tf32x3" if q.dtype == torch.float32 else "ieee",
        num_warps=8 if rows >= 128 else 4,
        num_stages=3,
    )
    return out
