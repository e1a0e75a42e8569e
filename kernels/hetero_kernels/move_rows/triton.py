"""The row movers in Triton: one launch each, bit for bit.

Elements are moved as integers of their size, so no bit pattern is touched. A program moves a few
rows; a negative index is padding. Grids depend on shapes only. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hetero_kernels.triton_support import power_of_2

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["gather_rows_triton", "install_rows_triton", "scatter_rows_triton"]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Elements of a program: 16 bytes for each of 128 threads at 2 bytes an element.
_PROGRAM_ELEMENTS = 1024


# What differs from call to call shall not make another kernel: a compilation takes a second.
@triton.jit(do_not_specialize=["num_rows"])
def _move(
    source_ptr,
    index_ptr,
    out_ptr,
    num_rows,
    width,
    source_stride,
    out_stride,
    IS_GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    index = tl.load(index_ptr + row, mask=row < num_rows, other=-1)
    is_element = (index >= 0)[:, None] & (column < width)[None, :]
    from_row = index if IS_GATHER else row
    to_row = row if IS_GATHER else index
    data = tl.load(
        source_ptr + from_row[:, None] * source_stride + column[None, :], mask=is_element, other=0
    )
    tl.store(out_ptr + to_row[:, None] * out_stride + column[None, :], data, mask=is_element)


@triton.jit(do_not_specialize=["num_rows"])
def _install(
    source_ptr,
    index_ptr,
    k_blocks_ptr,
    v_blocks_ptr,
    positions_ptr,
    block_positions_ptr,
    num_rows,
    source_stride,
    D: tl.constexpr,
    DP: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    index = tl.load(index_ptr + row, mask=row < num_rows, other=-1)
    is_element = (index >= 0)[:, None] & (d < D)[None, :]
    at_source = source_ptr + row[:, None] * source_stride + d[None, :]
    at_out = index[:, None] * D + d[None, :]
    k = tl.load(at_source, mask=is_element, other=0)
    v = tl.load(at_source + D, mask=is_element, other=0)
    tl.store(k_blocks_ptr + at_out, k, mask=is_element)
    tl.store(v_blocks_ptr + at_out, v, mask=is_element)
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + row, mask=index >= 0, other=0)
        tl.store(block_positions_ptr + index, position, mask=index >= 0)


def gather_rows_triton(source: Tensor, index: Tensor, out: Tensor) -> None:
    """``out[i] = source[index[i]]``; see ``gather_rows_reference``."""
    _launch(source, index, out, is_gather=True)


def scatter_rows_triton(source: Tensor, index: Tensor, out: Tensor) -> None:
    """``out[index[i]] = source[i]``; see ``scatter_rows_reference``."""
    _launch(source, index, out, is_gather=False)


def install_rows_triton(
    source: Tensor,
    index: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    block_positions: Tensor | None,
    positions: Tensor | None,
) -> None:
    """K, V and position of each row in one launch; see ``install_rows``."""
    num_rows, head_dim = index.shape[0], k_blocks.shape[2]
    if num_rows == 0:
        return
    has_positions = block_positions is not None and positions is not None
    rows = max(1, _PROGRAM_ELEMENTS // power_of_2(2 * head_dim))
    _install[(triton.cdiv(num_rows, rows),)](
        _as_integers(source),
        index,
        _as_integers(k_blocks),
        _as_integers(v_blocks),
        positions if has_positions else index,
        block_positions if has_positions else index,
        num_rows,
        source.stride(0),
        D=head_dim,
        DP=power_of_2(head_dim),
        ROWS=rows,
        HAS_POSITIONS=has_positions,
    )


def _launch(source: Tensor, index: Tensor, out: Tensor, *, is_gather: bool) -> None:
    num_rows, width = index.shape[0], source.shape[1]
    columns = min(_PROGRAM_ELEMENTS, power_of_2(width))
    rows = _PROGRAM_ELEMENTS // columns
    _move[(triton.cdiv(num_rows, rows), triton.cdiv(width, columns))](
        _as_integers(source),
        index,
        _as_integers(out),
        num_rows,
        width,
        source.stride(0),
        out.stride(0),
        IS_GATHER=is_gather,
        ROWS=rows,
        COLUMNS=columns,
    )


def _as_integers(tensor: Tensor) -> Tensor:
    return tensor.view(_INTEGERS[tensor.element_size()])
