"""The row movers by the compiled kernels and by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels.dispatch import loaded
from hetero_kernels.native import pointer

if TYPE_CHECKING:
    from torch import Tensor


def gather_rows_native(source: Tensor, index: Tensor, out: Tensor) -> None:
    """``out[i] = source[index[i]]``, in parallel for large moves."""
    item = source.element_size()
    loaded().gather_rows(
        pointer(source),
        source.stride(0) * item,
        pointer(index),
        index.shape[0],
        source.shape[1] * item,
        pointer(out),
        out.stride(0) * item,
        torch.get_num_threads(),
    )


def scatter_rows_native(source: Tensor, index: Tensor, out: Tensor) -> None:
    """``out[index[i]] = source[i]``, in parallel for large moves."""
    item = source.element_size()
    loaded().scatter_rows(
        pointer(source),
        source.stride(0) * item,
        pointer(index),
        index.shape[0],
        source.shape[1] * item,
        pointer(out),
        out.stride(0) * item,
        torch.get_num_threads(),
    )


def gather_rows_torch(source: Tensor, index: Tensor, out: Tensor) -> None:
    """``out[i] = source[index[i]]`` by ``index_select``."""
    out.copy_(source.index_select(0, index))


def scatter_rows_torch(source: Tensor, index: Tensor, out: Tensor) -> None:
    """``out[index[i]] = source[i]`` by ``index_copy_``."""
    out.index_copy_(0, index, source)
