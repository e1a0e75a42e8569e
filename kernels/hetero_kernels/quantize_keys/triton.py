"""``quantize_keys`` in Triton: one launch, exactly the definition's bits.

A program takes some keys of a head. Whatever rounds is written out, because the compiler's defaults
are not those of the definition: a division is approximate unless it is ``div_rn``, and bf16 is made
by integer arithmetic, which the interpreter can do too. A negative slot is padding and is not
written. The grid depends on shapes only. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hetero_kernels.quantize_keys.format import LARGEST
from hetero_kernels.triton_support import power_of_2

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.quantize_keys.format import QuantizedKeys

__all__ = ["quantize_keys_triton"]

# Elements of a program: 16 for each of 128 threads.
_PROGRAM_ELEMENTS = 2048
# Elements that certainly share a scale and a half of the key: groups have 32, halves a multiple
# of 16, so that a group may lie in both.
_CELL = tl.constexpr(16)


@triton.jit
def _scale(magnitude, LARGEST):
    """Bits of the bf16 scale of groups with these largest magnitudes, and its value in fp32."""
    bits = tl.div_rn(magnitude, LARGEST + tl.zeros_like(magnitude)).to(tl.int32, bitcast=True)
    # To the nearest, ties to even: a half, less one where the last bit that stays is even.
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # Of a number that is not one, rounding could carry into the sign.
    rounded = tl.where(bits > 0x7F800000, 0x7FC0, rounded)
    return rounded, (rounded << 16).to(tl.float32, bitcast=True)


@triton.jit
def _magnitude(x, axis: tl.constexpr):
    """Largest magnitude along an axis, as bits: NaN is above everything and is not lost."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def _whole(x, scale, LARGEST):
    """The nearest whole numbers to ``x / scale``, ties to even; 0 where there is no scale."""
    ratio = tl.div_rn(x, tl.where(scale > 0, scale, 1.0))
    ratio = tl.minimum(tl.maximum(ratio, -LARGEST), LARGEST)
    # At this size fp32 has no fractions, so the addition rounds; the subtraction is exact.
    ratio = (ratio + 12582912.0) - 12582912.0
    return tl.where(scale > 0, ratio, 0.0).to(tl.int32)


# What differs from call to call shall not make another kernel: a compilation takes a second.
@triton.jit(do_not_specialize=["num_keys"])
def _quantize(
    keys_ptr,
    data_ptr,
    scales_ptr,
    slots_ptr,
    num_keys,
    keys_head_stride,
    keys_stride,
    data_plane_stride,
    data_stride,
    scales_plane_stride,
    scales_stride,
    slots_stride,
    D: tl.constexpr,
    BITS: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + row * slots_stride, mask=row < num_keys, other=-1)
    is_key = slot >= 0
    keys_ptr += head * keys_head_stride + row * keys_stride  # [ROWS]
    data_ptr += head * data_plane_stride + slot * data_stride
    scales_ptr += head * scales_plane_stride + slot * scales_stride
    if BITS == 8:
        d = tl.arange(0, WIDTH)
        mask = is_key[:, None] & (d < D)[None, :]
        x = tl.load(keys_ptr[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        bits, scale = _scale(_magnitude(x, 1), LARGEST)  # [ROWS]
        whole = _whole(x, scale[:, None], LARGEST)
        tl.store(data_ptr[:, None] + d[None, :], whole.to(tl.int8), mask=mask)
        tl.store(scales_ptr, bits.to(tl.int16), mask=is_key)
    else:
        HALF: tl.constexpr = D // 2
        cell = tl.arange(0, WIDTH // _CELL)  # [C]
        within = tl.arange(0, _CELL)[None, None, :]
        in_group = tl.arange(0, 2 * _CELL)[None, None, :]
        is_cell = is_key[:, None] & (cell * _CELL < HALF)[None, :]  # [ROWS, C]
        at = cell[None, :, None] * _CELL + within
        packed = tl.zeros([ROWS, WIDTH // _CELL, _CELL], tl.int32)
        for half in tl.static_range(2):
            first = cell * _CELL + half * HALF
            group = first // (2 * _CELL)
            # The whole group of each cell, so twice each element, from the nearest cache.
            x = tl.load(
                keys_ptr[:, None, None] + group[None, :, None] * (2 * _CELL) + in_group,
                mask=is_cell[:, :, None],
                other=0.0,
            )
            bits, scale = _scale(_magnitude(x.to(tl.float32), 2), LARGEST)  # [ROWS, C]
            x = tl.load(
                keys_ptr[:, None, None] + half * HALF + at, mask=is_cell[:, :, None], other=0.0
            )
            whole = _whole(x.to(tl.float32), scale[:, :, None], LARGEST)
            packed |= (whole + 8) << (4 * half)
            # Of the two cells of a group the first writes its scale.
            is_first = is_cell & (first % (2 * _CELL) == 0)[None, :]
            tl.store(scales_ptr[:, None] + group[None, :], bits.to(tl.int16), mask=is_first)
        tl.store(data_ptr[:, None, None] + at, packed.to(tl.uint8), mask=is_cell[:, :, None])


def quantize_keys_triton(keys: Tensor, out: QuantizedKeys, planes: slice, slots: Tensor) -> None:
    """One launch for all heads; see ``quantize_keys_reference``.

    Args:
        keys: [num_heads, n, D], dense rows.
        out: Where to.
        planes: Planes of the heads.
        slots: int64 [n]; negative: padding.
    """
    num_heads, num_keys, head_dim = keys.shape
    if keys.numel() == 0:
        return
    data, scales = out.data[planes], out.scales[planes].view(torch.int16)
    # Places of a row of what is stored: elements, or pairs of them.
    width = power_of_2(head_dim if out.bits == 8 else head_dim // 2)
    rows = max(1, _PROGRAM_ELEMENTS // width)
    _quantize[(triton.cdiv(num_keys, rows), num_heads)](
        keys,
        data,
        scales,
        slots,
        num_keys,
        keys.stride(0),
        keys.stride(1),
        data.stride(0),
        data.stride(1),
        scales.stride(0),
        scales.stride(1),
        slots.stride(0),
        D=head_dim,
        BITS=out.bits,
        LARGEST=float(LARGEST[out.bits]),
        ROWS=rows,
        WIDTH=width,
    )
