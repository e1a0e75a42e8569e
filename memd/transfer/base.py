"""The contract of a data path; the service knows only this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Transfer"]


class Transfer(Protocol):
    """Moves bytes inside the region. Offsets are bytes from the region's start."""

    def gather(
        self,
        *,
        source_offset: int,
        row_bytes: int,
        rows: npt.NDArray[np.int64],
        landing_offset: int,
    ) -> None:
        """Copy rows to consecutive places; complete when it returns.

        Args:
            source_offset: Where row 0 begins.
            row_bytes: Bytes of one row.
            rows: Row indices, int64 [num_rows], any order, repetitions allowed; the caller has
                checked that they lie inside the source.
            landing_offset: Where the first copied row goes; the caller has checked that
                ``num_rows`` rows fit, and that the range does not overlap the source.
        """
        ...

    def zero(self, *, offset: int, length: int) -> None:
        """Set ``length`` bytes from ``offset`` on to zero."""
        ...
