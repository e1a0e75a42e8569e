"""Memory that was given back, on its way to the next client."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memd.metrics import Metrics
    from memd.store import Store
    from memd.tiers import Tiers
    from memd.transfer import Transfer

__all__ = ["SLICE_BYTES", "Scrubber"]

SLICE_BYTES = 16 << 20
"""Some 3 ms of zeroing, or of taking memory."""


class Scrubber:
    """Makes memory that was given back clean: by zeros, or by giving it back to the host.

    Args:
        store: Knows what is dirty.
        transfer: Zeroes.
        tiers: Gives memory back, where there is a disk below.
        metrics: Where it is counted.
    """

    def __init__(
        self, store: Store, transfer: Transfer, tiers: Tiers | None, metrics: Metrics
    ) -> None:
        self._store = store
        self._transfer = transfer
        self._tiers = tiers
        self._metrics = metrics

    def scrub(self, max_bytes: int) -> bool:
        """Clean up to ``max_bytes``; True when more is left."""
        dirty = self._store.next_dirty(max_bytes)
        if dirty is None:
            return False
        offset, length = dirty
        if self._tiers is None:
            self._transfer.zero(offset=offset, length=length)
        else:
            self._tiers.punch(offset, length)
        self._store.mark_clean(offset, length)
        self._metrics.counters.bytes_zeroed += length
        return self._store.dirty_bytes > 0
