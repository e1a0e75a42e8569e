"""Definition of the row movers: one row at a time, bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def gather_rows_reference(source: Tensor, index: Tensor, out: Tensor) -> None:
    """``out[i] = source[index[i]]``; where the index is negative, ``out[i]`` stays as it is."""
    for i, place in enumerate(index.tolist()):
        if place >= 0:
            out[i] = source[place]


def scatter_rows_reference(source: Tensor, index: Tensor, out: Tensor) -> None:
    """``out[index[i]] = source[i]``; indices are unique; negative ones are left out."""
    for i, place in enumerate(index.tolist()):
        if place >= 0:
            out[place] = source[i]
