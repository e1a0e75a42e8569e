"""The tiers of all clients of one region, and of each: who moves its pages, and where they are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from memd.tiers.eviction import eviction_policy
from memd.tiers.extent import ExtentIO
from memd.tiers.files import BLOCK_BYTES
from memd.tiers.holes import fill_hole, punch_hole
from memd.tiers.mover import PageMover, Progress
from memd.tiers.runner import run_at_once
from memd.tiers.tiered import Place, TieredPages

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from memd.store import ClientRecord
    from memd.tiers.disk import DiskTier
    from memd.tiers.runner import Job, Running

__all__ = ["ClientTier", "Tiers", "tier_stats"]

# Part of a client's memory that is kept free in idle time, so that what comes need not wait for
# what has to leave.
_ROOM_SHARE = 16


class ClientTier:
    """One client's pages above and below.

    Args:
        pages: Where they are.
        io: Their bytes.

    Attributes:
        pages: Where they are.
        mover: Moves them.
    """

    def __init__(self, pages: TieredPages, io: ExtentIO) -> None:
        self.pages = pages
        self.mover = PageMover(pages, io)
        self._io = io

    def tidy(self) -> bool:
        """Take one step towards room for pages to come; whether another would help now."""
        wanted = self.pages.host_pages // _ROOM_SHARE
        return self.mover.keep_room(wanted) is Progress.MOVED

    def close(self) -> bool:
        """Forget all pages; False while one of them is on its way, which needs its memory."""
        if self.mover.is_moving:
            return False
        # Ends what has arrived and begins nothing.
        self.mover.keep_room(0)
        self._io.close()
        return True


class Tiers:
    """What clients of one region have below their memory.

    Args:
        disk: Where pages go.
        eviction: Name of the policy.
        memory: The region, uint8 [region_bytes], writable.
        fd: The memfd behind it, without memory where nobody asked for it yet.
        run: Runs what waits for the disk; by default in the caller's thread.
    """

    def __init__(
        self,
        disk: DiskTier,
        *,
        eviction: str,
        memory: npt.NDArray[np.uint8],
        fd: int,
        run: Callable[[Job], Running] = run_at_once,
    ) -> None:
        self._disk = disk
        self._eviction = eviction
        self._memory = memory
        self._fd = fd
        self._run = run

    def slot_bytes(self, page_bytes: int) -> int:
        """Space that a page takes on disk."""
        return self._disk.slot_bytes(page_bytes)

    @staticmethod
    def can_hold(page_bytes: int) -> bool:
        """Whether pages of this size can go to disk: they are given back in whole memory pages."""
        return page_bytes % BLOCK_BYTES == 0

    def attach(self, record: ClientRecord) -> ClientTier:
        """The tiers of a client that may have fewer pages in memory than it has pages."""
        num_pages = record.pages.num_pages
        pages = TieredPages(
            num_pages, record.host_pages, eviction_policy(self._eviction, num_pages)
        )
        io = ExtentIO(
            self._disk,
            owner=record.client_id,
            memory=self._memory,
            fd=self._fd,
            extent_offset=record.extent_offset,
            page_bytes=record.layout.page_bytes,
            run=self._run,
        )
        return ClientTier(pages, io)

    def fill(self, offset: int, length: int) -> bool:
        """Put memory behind part of the region; False if the kernel has none."""
        return fill_hole(self._fd, offset, length)

    def punch(self, offset: int, length: int) -> None:
        """Give the memory behind part of the region back; it reads as zeros from now on."""
        punch_hole(self._fd, offset, length)

    def stats(self) -> dict[str, Any]:
        """Plain data; keys in ``memd.metrics``."""
        disk = self._disk
        return {
            "bytes": disk.num_bytes,
            "free_bytes": disk.free_bytes,
            "quarantined_bytes": disk.quarantined_bytes,
            "pages": disk.num_slots,
            "is_writable": disk.is_writable,
            "is_readable": disk.is_readable,
            "eviction": self._eviction,
            **dataclasses.asdict(disk.counters),
        }

    def check_integrity(self) -> None:
        """Verify the books of the disk.

        Raises:
            IntegrityError: They do not hold.
        """
        self._disk.check_integrity()


def tier_stats(tier: ClientTier | None, num_pages: int) -> dict[str, Any]:
    """A client's pages by place, as plain data; all in memory without a tier."""
    if tier is None:
        return {"memory_pages": num_pages, "disk_pages": 0, "lost_pages": 0}
    return {
        "memory_pages": tier.pages.count(Place.HOST),
        "disk_pages": tier.pages.count(Place.DISK),
        "lost_pages": tier.pages.count(Place.LOST),
    }
