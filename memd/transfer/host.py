"""Data path inside host memory: one vectorised gather from pages into the landing ring."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["HostTransfer"]


class HostTransfer:
    """Gathers with ``numpy.take``: one memcpy per row, driven from C.

    Args:
        region: The shared region, uint8 [region_bytes], writable.
    """

    def __init__(self, region: npt.NDArray[np.uint8]) -> None:
        self._region = region

    def gather(
        self,
        *,
        source_offset: int,
        row_bytes: int,
        rows: npt.NDArray[np.int64],
        landing_offset: int,
    ) -> None:
        """Copy rows to consecutive places; see ``Transfer.gather``."""
        if rows.size == 0:
            return
        num_source_rows = (self._region.size - source_offset) // row_bytes
        source = self._region[source_offset : source_offset + num_source_rows * row_bytes]
        landing = self._region[landing_offset : landing_offset + rows.size * row_bytes]
        # mode="raise" would gather into a temporary and copy once more; the caller has checked
        # rows.
        np.take(
            source.reshape(-1, row_bytes),
            rows,
            axis=0,
            out=landing.reshape(-1, row_bytes),
            mode="clip",
        )

    def zero(self, *, offset: int, length: int) -> None:
        """Set bytes to zero; see ``Transfer.zero``."""
        self._region[offset : offset + length] = 0
