"""Data path inside host memory: one gather from pages into the landing ring, on a few threads."""

from __future__ import annotations

import concurrent.futures
import itertools
from typing import TYPE_CHECKING

import numpy as np

from memd.transfer.rows import fastest_copy

if TYPE_CHECKING:
    import numpy.typing as npt

    from memd.transfer.rows import RowCopy

__all__ = ["HostTransfer"]

# Some 200 us of copying. With shares of half that, waking a thread costs as much as it saves.
_MIN_THREAD_BYTES = 4 << 20


class HostTransfer:
    """Copies inside one region; a context manager, which ends its threads.

    Args:
        region: The shared region, uint8 [region_bytes], writable.
        num_threads: Threads that a long gather may use, the caller's included, >= 1. Both ways to
            copy rows leave the interpreter lock.
        copy_rows: How rows are copied; by default the fastest that is installed.
    """

    def __init__(
        self,
        region: npt.NDArray[np.uint8],
        *,
        num_threads: int = 1,
        copy_rows: RowCopy | None = None,
    ) -> None:
        if num_threads < 1:
            raise ValueError(f"num_threads must be at least 1, got {num_threads}")
        self._region = region
        self._num_threads = num_threads
        self._copy_rows = fastest_copy() if copy_rows is None else copy_rows
        # Starts a thread only when there is work for it.
        self._helpers = concurrent.futures.ThreadPoolExecutor(
            max(1, num_threads - 1), thread_name_prefix="memd-gather"
        )

    def __enter__(self) -> HostTransfer:
        """The transfer."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the transfer."""
        self.close()

    def close(self) -> None:
        """End the threads; idempotent."""
        self._helpers.shutdown()

    def gather(
        self,
        *,
        source_offset: int,
        row_bytes: int,
        rows: npt.NDArray[np.int64],
        landing_offset: int,
    ) -> None:
        """Copy rows to consecutive places; see ``Transfer.gather``."""
        num_source_rows = (self._region.size - source_offset) // row_bytes
        source = self._region[source_offset:][: num_source_rows * row_bytes]
        source = source.reshape(num_source_rows, row_bytes)
        landing = self._region[landing_offset:][: rows.size * row_bytes]
        landing = landing.reshape(rows.size, row_bytes)
        rows = np.ascontiguousarray(rows)
        num_parts = max(1, min(self._num_threads, landing.nbytes // _MIN_THREAD_BYTES))
        bounds = [part * rows.size // num_parts for part in range(num_parts + 1)]
        mine, *others = (slice(*ends) for ends in itertools.pairwise(bounds))
        helped = [
            self._helpers.submit(self._copy_rows, source, rows[part], landing[part])
            for part in others
        ]
        self._copy_rows(source, rows[mine], landing[mine])
        for copied in helped:
            copied.result()

    def zero(self, *, offset: int, length: int) -> None:
        """Set bytes to zero; see ``Transfer.zero``."""
        self._region[offset : offset + length] = 0
