"""Moves a client's pages between host memory and disk, one page at a time.

The control thread calls this between two looks at its sockets. So a step begins or ends the move of
one page at most and waits for no disk; who waits for pages asks again until they are there.
Meanwhile anything may happen to them.

At most one page of a client is on its way at a time. Giving memory back or taking it is done in the
step itself and costs half a millisecond for 2 MiB.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, Protocol

from memd.tiers.tiered import Place

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from memd.tiers.tiered import TieredPages

__all__ = ["Move", "PageIO", "PageMover", "Progress"]


class Move(Protocol):
    """A page on its way to disk or back."""

    @property
    def is_done(self) -> bool:
        """Whether `finish` may be called."""
        ...

    def finish(self) -> bool:
        """Do the books of it; whether the page has arrived."""
        ...


class PageIO(Protocol):
    """Does to the bytes of one client's pages what the mover decides."""

    def spill(self, page_id: int, generation: int) -> Move | None:
        """Begin to copy a page to disk; None if that cannot be. Its memory stays."""
        ...

    def promote(self, page_id: int, generation: int) -> Move | None:
        """Begin to copy a page back to its memory; None if there is no copy.

        The copy on disk is forgotten at the end in any case.
        """
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
    MOVING = enum.auto()
    """A page is on its way: asking again helps once it has arrived."""
    STUCK = enum.auto()
    """There is no room, and no page may leave or the disk takes none; asking again helps only after
    somebody froze, unpinned or released some."""


@dataclasses.dataclass(frozen=True)
class _Moving:
    """The page that is on its way."""

    page_id: int
    generation: int
    move: Move
    is_spill: bool


class PageMover:
    """Moves the pages of one client.

    Args:
        pages: Where they are.
        io: Moves their bytes.
    """

    def __init__(self, pages: TieredPages, io: PageIO) -> None:
        self._pages = pages
        self._io = io
        self._moving: _Moving | None = None
        self._has_ended = False

    @property
    def is_moving(self) -> bool:
        """Whether memory of the client is being read or written for a page on its way."""
        return self._moving is not None and not self._moving.move.is_done

    def bring(self, page_ids: Sequence[int] | npt.NDArray[np.int64]) -> Progress:
        """Take one step towards having all of the pages in memory, as far as they are not lost.

        Args:
            page_ids: RESERVED or pinned pages, so that none of them leaves while others come.
        """
        if not self._has_arrived():
            return Progress.MOVING
        missing = self._pages.missing(page_ids)
        if not missing.size:
            return Progress.DONE
        if self._pages.host_room < 1:
            return self._make_room()
        page_id = int(missing[0])
        if not self._io.fill(page_id):
            return Progress.STUCK
        if self._pages.place(page_id) is Place.HOLE:
            self._pages.filled(page_id)
        else:
            self._begin(page_id, is_spill=False)
            if not self._has_arrived():
                return Progress.MOVING
        return Progress.MOVED if missing.size > 1 else Progress.DONE

    def keep_room(self, num_pages: int) -> Progress:
        """Take one step towards room for this many pages, ahead of need.

        Args:
            num_pages: At most the host's budget.
        """
        if not self._has_arrived():
            return Progress.MOVING
        if self._pages.host_room >= num_pages:
            return Progress.DONE
        return self._make_room()

    def release(self, page_ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Free pages, and their copies on disk; see ``TieredPages.release``."""
        if self._has_ended:
            return
        for page_id in self._pages.release(page_ids).tolist():
            self._io.discard(page_id)

    def end(self) -> None:
        """Let `release` do nothing from now on: the client is gone, and takes all copies with it.

        Else a page that is on its way from disk could lose its copy to another while it is read.
        """
        self._has_ended = True

    def _make_room(self) -> Progress:
        """Give up one page's memory, or begin to."""
        plan = self._pages.plan_room(self._pages.host_room + 1)
        if plan is None:
            return Progress.STUCK
        for page_id in plan.to_empty:
            self._io.punch(page_id)
            self._pages.emptied(page_id)
        for page_id in plan.to_spill:
            if not self._begin(page_id, is_spill=True):
                return Progress.STUCK
            room = self._pages.host_room
            if not self._has_arrived():
                return Progress.MOVING
            if self._pages.host_room == room:
                return Progress.STUCK
        return Progress.MOVED

    def _begin(self, page_id: int, *, is_spill: bool) -> bool:
        """Send a page on its way; False if it does not go."""
        generation = self._pages.generation(page_id)
        move = (self._io.spill if is_spill else self._io.promote)(page_id, generation)
        if move is not None:
            self._moving = _Moving(page_id, generation, move, is_spill)
        elif not is_spill:
            self._lose(page_id)
        return move is not None

    def _has_arrived(self) -> bool:
        """Whether no page is on its way; does the books of one that has arrived."""
        moving = self._moving
        if moving is None:
            return True
        if not moving.move.is_done:
            return False
        self._moving = None
        page_id, is_whole = moving.page_id, moving.move.finish()
        if not moving.is_spill:
            if is_whole:
                self._pages.promoted(page_id)
            else:
                self._lose(page_id)
        elif is_whole:
            if self._pages.spilled(page_id, moving.generation):
                self._io.punch(page_id)
            else:
                # Somebody wanted the page meanwhile.
                self._io.discard(page_id)
        return True

    def _lose(self, page_id: int) -> None:
        self._pages.lost(page_id)
        self._io.punch(page_id)
