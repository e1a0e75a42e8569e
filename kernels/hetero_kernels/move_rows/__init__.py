"""Moves rows between pools, staging and landing areas, bit for bit.

All movers see their operands as tables of rows, [num_rows, row_elements]; a pool
[num_blocks, block_tokens, D] is viewed as [num_blocks * block_tokens, D]. K and V side by side, as
memd keeps them, are ``install_rows``' source.

A row with a negative index is padding and moves nowhere: CUDA graphs run with more rows than there
are. ``torch`` alone, which would have to wait for the device to leave it out, takes none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from hetero_kernels.checks import (
    check_dense_rows,
    check_devices,
    check_dtype,
    check_same,
    check_shape,
)
from hetero_kernels.dispatch import resolve
from hetero_kernels.move_rows.cpu import (
    gather_rows_native,
    gather_rows_torch,
    scatter_rows_native,
    scatter_rows_torch,
)
from hetero_kernels.move_rows.reference import gather_rows_reference, scatter_rows_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hetero_kernels.dispatch import Impl

__all__ = ["gather_rows", "install_rows", "scatter_rows"]


def gather_rows(
    source: Tensor, index: Tensor, *, out: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """Collect rows: ``out[i] = source[index[i]]``.

    Args:
        source: [num_rows, row_elements], any dtype, dense rows.
        index: int64 [M], values below ``num_rows``.
        out: [M, row_elements], dense rows, not overlapping ``source``; made if not given.
        impl: See ``hetero_kernels.dispatch``.

    Returns:
        ``out``.

    Raises:
        ValueError: A shape, dtype, stride or device is not as described.
    """
    check_dtype("index", index, torch.int64)
    check_shape("index", index, (None,))
    check_shape("source", source, (None, None))
    if out is None:
        out = source.new_empty(index.shape[0], source.shape[1])
    check_devices(source=source, index=index, out=out)
    check_dtype("out", out, source.dtype)
    check_shape("out", out, (index.shape[0], source.shape[1]))
    for name, tensor in (("source", source), ("index", index), ("out", out)):
        check_dense_rows(name, tensor)
    if out.numel() > 0:
        _mover("gather_rows", impl, source.device)(source, index, out)
    return out


def scatter_rows(source: Tensor, index: Tensor, out: Tensor, *, impl: Impl = "auto") -> None:
    """Distribute rows: ``out[index[i]] = source[i]``.

    Args:
        source: [M, row_elements], any dtype, dense rows.
        index: int64 [M], unique, values below ``out``'s rows.
        out: [num_rows, row_elements], dense rows, not overlapping ``source``.
        impl: See ``hetero_kernels.dispatch``.

    Raises:
        ValueError: A shape, dtype, stride or device is not as described.
    """
    check_dtype("index", index, torch.int64)
    check_shape("index", index, (None,))
    check_devices(source=source, index=index, out=out)
    check_dtype("out", out, source.dtype)
    check_shape("out", out, (None, None))
    check_shape("source", source, (index.shape[0], out.shape[1]))
    for name, tensor in (("source", source), ("index", index), ("out", out)):
        check_dense_rows(name, tensor)
    if source.numel() > 0:
        _mover("scatter_rows", impl, source.device)(source, index, out)


def install_rows(
    source: Tensor,
    index: Tensor,
    *,
    k_blocks: Tensor,
    v_blocks: Tensor,
    block_positions: Tensor | None = None,
    positions: Tensor | None = None,
    impl: Impl = "auto",
) -> None:
    """Put fetched rows (K, then V of a token) in their places in the block pool.

    Args:
        source: [M, 2 * D], the pools' dtype, dense rows.
        index: Place of each row, ``block * block_tokens + offset``, int64 [M], unique.
        k_blocks: [num_blocks, block_tokens, D], contiguous.
        v_blocks: Like ``k_blocks``.
        block_positions: int32 [num_blocks, block_tokens], contiguous; goes with ``positions``.
        positions: Prompt position of each row, int32 [M].
        impl: See ``hetero_kernels.dispatch``.

    Raises:
        ValueError: A shape, dtype, stride or device is not as described.
    """
    check_dtype("index", index, torch.int64)
    check_shape("index", index, (None,))
    check_dense_rows("index", index)
    check_shape("k_blocks", k_blocks, (None, None, None))
    head_dim = k_blocks.shape[2]
    check_same("k_blocks and v_blocks must have the same shape", k_blocks.shape, v_blocks.shape)
    check_shape("source", source, (index.shape[0], 2 * head_dim))
    check_dense_rows("source", source)
    check_devices(
        source=source,
        index=index,
        k_blocks=k_blocks,
        v_blocks=v_blocks,
        block_positions=block_positions,
        positions=positions,
    )
    for name, tensor in (("k_blocks", k_blocks), ("v_blocks", v_blocks)):
        check_dtype(name, tensor, source.dtype)
    if not (k_blocks.is_contiguous() and v_blocks.is_contiguous()):
        raise ValueError("k_blocks and v_blocks must be contiguous")
    if (block_positions is None) != (positions is None):
        raise ValueError("block_positions and positions go together, got one of them")
    if block_positions is not None and positions is not None:
        for name, tensor in (("positions", positions), ("block_positions", block_positions)):
            check_dtype(name, tensor, torch.int32)
            check_dense_rows(name, tensor, tensor.dim())
        check_shape("positions", positions, (index.shape[0],))
        check_shape("block_positions", block_positions, tuple(k_blocks.shape[:2]))
    if resolve(impl, source.device) == "triton":
        from hetero_kernels.move_rows.triton import install_rows_triton

        install_rows_triton(source, index, k_blocks, v_blocks, block_positions, positions)
        return
    scatter_rows(source[:, :head_dim], index, k_blocks.view(-1, head_dim), impl=impl)
    scatter_rows(source[:, head_dim:], index, v_blocks.view(-1, head_dim), impl=impl)
    if block_positions is not None and positions is not None:
        held = block_positions.view(-1, 1)
        scatter_rows(positions.view(-1, 1), index, held, impl=impl)


def _mover(
    name: Literal["gather_rows", "scatter_rows"], impl: Impl, device: torch.device
) -> Callable[[Tensor, Tensor, Tensor], None]:
    """The implementation of a mover that runs for tensors on ``device``."""
    chosen = resolve(impl, device)
    if chosen == "triton":
        from hetero_kernels.move_rows import triton as movers

        return movers.gather_rows_triton if name == "gather_rows" else movers.scatter_rows_triton
    found = {
        "native": (gather_rows_native, scatter_rows_native),
        "torch": (gather_rows_torch, scatter_rows_torch),
        "reference": (gather_rows_reference, scatter_rows_reference),
    }[chosen]
    return found[0 if name == "gather_rows" else 1]
