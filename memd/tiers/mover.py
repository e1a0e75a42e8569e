"""Moves a client's pages between host memory and disk, one page a step.

The control thread calls this between two looks at its sockets. So a step does the work of one page
at most, and keeps nothing in mind: who waits for pages asks again until they are there. Meanwhile
anything may happen to them.

What a step costs is one page written to disk or read from there: a millisecond or two for 2 MiB
where the disk has nothing else to do, tens of them where it has. Giving memory back or taking it
costs half a millisecond.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Protocol

from memd.tiers.tiered import Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from memd.tiers.tiered import TieredPages

__all__ = ["PageIO", "PageMover", "Progress"]


class PageIO(Protocol):
    """Does to the bytes of one client's pages what the mover decides."""

    def spill(self, page_id: int, generation: int) -> bool:
        """Copy a page to disk; False if that cannot be. Its memory stays."""
        ...

    def promote(self, page_id: int, generation: int) -> bool:
        """Copy a page back to its memory, and forget the copy; False if that is not to be had."""
        ...

    def discard(self, page_id: int) -> None:
        """Forget a page's copy on disk."""
        ...

    def fill(self, page_id: int) -> bool:
        """Put memory behind a page; False if the kernel has none."""
        ...

    def punch(self, page_id: int) -> None:
        """Give the memory behind a page back."""
        ...


class Progress(enum.Enum):
    """How far a request for pages is."""

    DONE = enum.auto()
    """No page is missing."""
    MOVED = enum.auto()
    """A page was moved and more have to be: ask again."""
    STUCK = enum.auto()
    """There is no room, and no page may leave or the disk takes none; asking again helps only after
    somebody froze, unpinned or released some."""


class PageMover:
    """Moves the pages of one client.

    Args:
        pages: Where they are.
        io: Moves their bytes.
    """

    def __init__(self, pages: TieredPages, io: PageIO) -> None:
        self._pages = pages
        self._io = io

    def bring(self, page_ids: Sequence[int] | npt.NDArray[np.int64]) -> Progress:
        """Take one step towards having all of the pages in memory, as far as they are not lost.

        Args:
            page_ids: RESERVED or pinned pages, so that none of them leaves while others come.
        """
        missing = self._pages.missing(page_ids)
        if not missing.size:
            return Progress.DONE
        page_id = int(missing[0])
        if self._pages.host_room < 1:
            return Progress.MOVED if self._make_room() else Progress.STUCK
        if not self._io.fill(page_id):
            return Progress.STUCK
        if self._pages.place(page_id) is Place.HOLE:
            self._pages.filled(page_id)
        elif self._io.promote(page_id, self._pages.generation(page_id)):
            self._pages.promoted(page_id)
        else:
            self._pages.lost(page_id)
            self._io.punch(page_id)
        return Progress.MOVED if missing.size > 1 else Progress.DONE

    def keep_room(self, num_pages: int) -> Progress:
        """Take one step towards room for this many pages, ahead of need.

        Args:
            num_pages: At most the host's budget.
        """
        if self._pages.host_room >= num_pages:
            return Progress.DONE
        return Progress.MOVED if self._make_room() else Progress.STUCK

    def release(self, page_ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Free pages, and their copies on disk; see ``TieredPages.release``."""
        for page_id in self._pages.release(page_ids).tolist():
            self._io.discard(page_id)

    def _make_room(self) -> bool:
        """Give up one page's memory; False if none may go."""
        plan = self._pages.plan_room(self._pages.host_room + 1)
        if plan is None:
            return False
        for page_id in plan.to_empty:
            self._io.punch(page_id)
            self._pages.emptied(page_id)
        for page_id in plan.to_spill:
            generation = self._pages.generation(page_id)
            if not self._io.spill(page_id, generation):
                return False
            self._pages.spilled(page_id, generation)
            self._io.punch(page_id)
        return True
