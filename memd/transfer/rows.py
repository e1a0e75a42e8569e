"""Two ways to copy rows from anywhere to one run of rows; which one is a matter of speed alone.

Rows of 256 and 512 bytes at random places are bound by how many of them the processor waits for at
a time. ``take_rows`` calls one memcpy for each, a dozen or so in flight, and reaches a third to a
half of the speed of one long copy. Views of wider elements, one void element a row, touching the
rows before the copy, and merging neighbours into slices were all measured and are slower or no
faster; rows in runs are as fast as NumPy gets without any of it. The compiled copy asks for rows
ahead of their turn and reaches most of the speed of one long copy (``docs/memd.md`` has numbers).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from memd import native

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["RowCopy", "compiled_rows", "fastest_copy", "take_rows"]


class RowCopy(Protocol):
    """Copies rows without a temporary; several threads may run it, each with its own ``out``."""

    def __call__(
        self,
        source: npt.NDArray[np.uint8],
        rows: npt.NDArray[np.int64],
        out: npt.NDArray[np.uint8],
        /,
    ) -> None:
        """Set ``out[i] = source[rows[i]]``; complete when it returns.

        Args:
            source: uint8 [num_source_rows, row_bytes], contiguous.
            rows: int64 [num_rows], contiguous, inside the source (the caller has checked).
            out: uint8 [num_rows, row_bytes], contiguous, apart from the rows that are read.
        """
        ...


def fastest_copy() -> RowCopy:
    """The compiled copy where the installation has one, else NumPy's."""
    gather = native.gather()
    return take_rows if gather is None else compiled_rows(gather)


def take_rows(
    source: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8], /
) -> None:
    """Copy rows with NumPy; see ``RowCopy``."""
    # mode="raise" would gather into a temporary and copy once more.
    np.take(source, rows, axis=0, out=out, mode="clip")


def compiled_rows(gather: native.Gather) -> RowCopy:
    """Wrap the compiled gather; see ``RowCopy``."""

    def copy(
        source: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64], out: npt.NDArray[np.uint8], /
    ) -> None:
        gather(out.ctypes.data, source.ctypes.data, rows.ctypes.data, *out.shape)

    return copy
