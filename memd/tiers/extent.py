"""The bytes of one client's pages: its part of the region above, slots of the disk tier below."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from memd.tiers.header import PageIdentity
from memd.tiers.holes import fill_hole, punch_hole
from memd.tiers.runner import run_at_once

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from memd.tiers.disk import DiskTier, GetJob, PutJob, Slot
    from memd.tiers.mover import Move
    from memd.tiers.runner import Job, Running

__all__ = ["ExtentIO"]


class _Move:
    """A job of the disk tier, and what is to be done after it."""

    def __init__(self, running: Running, finish: Callable[[], bool]) -> None:
        self._running = running
        self.finish = finish

    @property
    def is_done(self) -> bool:
        return self._running.is_done


class ExtentIO:
    """Moves whole pages of one extent; what ``PageMover`` asks for. A context manager.

    Args:
        disk: Where pages go; shared with other clients.
        owner: Client id.
        memory: The region, uint8 [region_bytes], writable.
        fd: The memfd behind it.
        extent_offset: Where page 0 begins in the region.
        page_bytes: Bytes of a page.
        run: Runs what waits for the disk; by default in the caller's thread.

    Raises:
        ValueError: Pages do not begin and end with memory pages, so that giving one back would not
            give all of it back.
    """

    def __init__(
        self,
        disk: DiskTier,
        *,
        owner: int,
        memory: npt.NDArray[np.uint8],
        fd: int,
        extent_offset: int,
        page_bytes: int,
        run: Callable[[Job], Running] = run_at_once,
    ) -> None:
        if extent_offset % mmap.PAGESIZE or page_bytes % mmap.PAGESIZE:
            raise ValueError(
                f"pages on disk begin and end with memory pages of {mmap.PAGESIZE} bytes, got "
                f"pages of {page_bytes} bytes from {extent_offset} on"
            )
        self._disk = disk
        self._owner = owner
        self._memory = memory
        self._fd = fd
        self._extent_offset = extent_offset
        self._page_bytes = page_bytes
        self._run = run
        self._slots: dict[int, Slot] = {}

    def __enter__(self) -> ExtentIO:
        """The bytes."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Forget all copies."""
        self.close()

    def close(self) -> None:
        """Forget all copies on disk; the memory is its owner's. Idempotent.

        No page may be on its way.
        """
        for page_id in list(self._slots):
            self.discard(page_id)

    def spill(self, page_id: int, generation: int) -> Move | None:
        """Begin to copy a page to disk; see ``PageIO.spill``."""
        job = self._disk.begin_put(self._identity(page_id, generation), self._page(page_id))
        if job is None:
            return None
        return _Move(self._run(job), lambda: self._spilled(page_id, job))

    def promote(self, page_id: int, generation: int) -> Move | None:
        """Begin to copy a page back; see ``PageIO.promote``."""
        slot = self._slots.get(page_id)
        if slot is None:
            return None
        job = self._disk.begin_get(slot, self._identity(page_id, generation), self._page(page_id))
        if job is None:
            self.discard(page_id)
            return None
        return _Move(self._run(job), lambda: self._promoted(page_id, job))

    def discard(self, page_id: int) -> None:
        """Forget a page's copy, if there is one; see ``PageIO.discard``."""
        slot = self._slots.pop(page_id, None)
        if slot is not None:
            self._disk.free(slot)

    def fill(self, page_id: int) -> bool:
        """Put memory behind a page; see ``PageIO.fill``."""
        return fill_hole(self._fd, self._offset(page_id), self._page_bytes)

    def punch(self, page_id: int) -> None:
        """Give the memory behind a page back; see ``PageIO.punch``."""
        punch_hole(self._fd, self._offset(page_id), self._page_bytes)

    def _spilled(self, page_id: int, job: PutJob) -> bool:
        slot = self._disk.end_put(job)
        if slot is None:
            return False
        self.discard(page_id)
        self._slots[page_id] = slot
        return True

    def _promoted(self, page_id: int, job: GetJob) -> bool:
        is_whole = self._disk.end_get(job)
        self.discard(page_id)
        return is_whole

    def _identity(self, page_id: int, generation: int) -> PageIdentity:
        return PageIdentity(self._owner, page_id, generation)

    def _offset(self, page_id: int) -> int:
        return self._extent_offset + page_id * self._page_bytes

    def _page(self, page_id: int) -> memoryview:
        start = self._offset(page_id)
        return self._memory[start : start + self._page_bytes].data
