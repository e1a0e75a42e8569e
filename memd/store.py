"""Who owns which bytes of the region, and in which state each page is; pure bookkeeping.

The verbs of a page, in the order of its life::

    FREE --reserve--> RESERVED --commit--> SEALED --release--> FREE
                          \\____________release____________/

RESERVED pages are the client's to write, and nobody may read them. SEALED pages are complete, and
only they may be fetched. A page that a fetch still reads is *pinned*; released meanwhile it is
LEAVING, and FREE once nobody reads it any more. SPILLED is set aside for a disk tier and is not
used yet.

An extent has one owner at a time. When it comes back it is *dirty* until the server has zeroed it,
and only then can another client get it: no client ever sees another's bytes.

This module must not know sockets, messages or memory; it is driven by ``memd.service``.
"""

from __future__ import annotations

import dataclasses
import enum
import mmap
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from memd.allocator import RangeAllocator
from memd.errors import IntegrityError, MemdError, PoolFull

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from memd.protocol import KVLayout

__all__ = ["ClientRecord", "OutOfRange", "PageState", "PageTable", "Store", "WrongState"]


class OutOfRange(MemdError):
    """A page id or a row lies outside the client's extent."""


class WrongState(MemdError):
    """A page is not in the state that the request needs."""


class PageState(enum.IntEnum):
    """Life of a page; only SEALED is readable."""

    FREE = 0
    RESERVED = 1
    SEALED = 2
    SPILLED = 3
    LEAVING = 4


class PageTable:
    """States of one client's pages. Every method changes all the pages it names or none.

    Args:
        num_pages: Pages of the client, >= 1; ids are ``0 .. num_pages - 1``.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages must be at least 1, got {num_pages}")
        self.num_pages = num_pages
        self._states = np.zeros(num_pages, dtype=np.uint8)
        # Fetches that still read each page.
        self._pins = np.zeros(num_pages, dtype=np.uint32)
        self._counts = dict.fromkeys(PageState, 0)
        self._counts[PageState.FREE] = num_pages

    def count(self, state: PageState) -> int:
        """Pages in a state."""
        return self._counts[state]

    def state(self, page_id: int) -> PageState:
        """State of one page."""
        return PageState(int(self._states[page_id]))

    def reserve(self, num_pages: int) -> npt.NDArray[np.int64] | None:
        """The lowest free pages, now RESERVED, ascending; None when there are too few."""
        if num_pages > self._counts[PageState.FREE]:
            return None
        page_ids = np.flatnonzero(self._states == PageState.FREE)[:num_pages].astype(np.int64)
        self._move(page_ids, PageState.FREE, PageState.RESERVED)
        return page_ids

    def commit(self, page_ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Seal reserved pages.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page is not RESERVED.
        """
        ids = self._checked(page_ids)
        wrong = ids[self._states[ids] != PageState.RESERVED]
        if wrong.size:
            raise WrongState(self._describe("commit needs RESERVED pages", wrong))
        self._move(ids, PageState.RESERVED, PageState.SEALED)

    def release(self, page_ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Free reserved or sealed pages; those that are pinned become free with their last pin.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page was released already.
        """
        ids = self._checked(page_ids)
        states = self._states[ids]
        wrong = ids[(states == PageState.FREE) | (states == PageState.LEAVING)]
        if wrong.size:
            raise WrongState(self._describe("release needs pages that are held", wrong))
        is_pinned = self._pins[ids] > 0
        self._move(ids[is_pinned], PageState.SEALED, PageState.LEAVING)
        for state in (PageState.RESERVED, PageState.SEALED, PageState.SPILLED):
            self._move(ids[(states == state) & ~is_pinned], state, PageState.FREE)

    def pin(self, page_ids: npt.NDArray[np.int64]) -> None:
        """Keep sealed pages as they are until `unpin`.

        Args:
            page_ids: Each once; the caller has checked that they are SEALED.
        """
        self._pins[page_ids] += 1

    def unpin(self, page_ids: npt.NDArray[np.int64]) -> None:
        """Take back one `pin` of each page; those that are LEAVING and have no other are free."""
        self._pins[page_ids] -= 1
        is_gone = (self._pins[page_ids] == 0) & (self._states[page_ids] == PageState.LEAVING)
        self._move(page_ids[is_gone], PageState.LEAVING, PageState.FREE)

    def require_sealed(self, page_ids: npt.NDArray[np.int64]) -> None:
        """Check that all pages (any number of repetitions, all in range) are SEALED.

        Raises:
            WrongState: One is not.
        """
        if self._counts[PageState.SEALED] == self.num_pages:
            return
        is_wrong = self._states[page_ids] != PageState.SEALED
        if is_wrong.any():
            wrong = np.unique(page_ids[is_wrong])
            raise WrongState(self._describe("only SEALED pages are readable", wrong))

    def check_integrity(self) -> None:
        """Verify that the counts are those of the states, and that only readable pages are pinned.

        Raises:
            IntegrityError: They are not.
        """
        found = np.bincount(self._states, minlength=len(PageState))
        for state in PageState:
            if int(found[state]) != self._counts[state]:
                raise IntegrityError(
                    f"{int(found[state])} pages are {state.name}, counted {self._counts[state]}"
                )
        if len(found) != len(PageState):
            raise IntegrityError("a page is in no known state")
        is_held = (self._states == PageState.SEALED) | (self._states == PageState.LEAVING)
        if self._pins[~is_held].any():
            raise IntegrityError("a page is pinned that nobody may read")
        if not self._pins[self._states == PageState.LEAVING].all():
            raise IntegrityError("a page is leaving and nobody reads it")

    def _move(self, ids: npt.NDArray[np.int64], old: PageState, new: PageState) -> None:
        self._states[ids] = new
        self._counts[old] -= ids.size
        self._counts[new] += ids.size

    def _checked(self, page_ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        ids = np.asarray(page_ids, dtype=np.int64).reshape(-1)
        if ids.size == 0:
            return ids
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.num_pages:
            outside = low if low < 0 else high
            raise OutOfRange(f"page ids are 0..{self.num_pages - 1}, got {outside}")
        if np.bincount(ids).max() > 1:
            raise OutOfRange("a page is named twice in one request")
        return ids

    def _describe(self, rule: str, wrong: npt.NDArray[np.int64]) -> str:
        first = int(wrong[0])
        more = f" and {wrong.size - 1} more" if wrong.size > 1 else ""
        return f"{rule}: page {first} is {self.state(first).name}{more}"


@dataclasses.dataclass(frozen=True)
class ClientRecord:
    """One registered client and its part of the region.

    Attributes:
        client_id: Unique over the daemon's life.
        pid: Process id that memd watches.
        name: Free text from ``Hello``.
        layout: Layout of its pages.
        extent_offset: First byte of its extent in the region.
        extent_bytes: Bytes of its extent.
        landing_offset: First byte of the landing ring, counted from the extent's start.
        landing_rows: Rows of the landing ring.
        pages: States of its pages; the pages begin at the extent's start.
    """

    client_id: int
    pid: int
    name: str
    layout: KVLayout
    extent_offset: int
    extent_bytes: int
    landing_offset: int
    landing_rows: int
    pages: PageTable


class Store:
    """All extents of the region and all clients.

    Args:
        region_bytes: Size of the region.
    """

    def __init__(self, region_bytes: int) -> None:
        self.extents = RangeAllocator(region_bytes, alignment=mmap.ALLOCATIONGRANULARITY)
        self._clients: dict[int, ClientRecord] = {}
        self._next_client_id = 1
        # Extents given back and not yet zeroed: [start, next byte to zero, end].
        self._dirty: deque[list[int]] = deque()

    @property
    def clients(self) -> list[ClientRecord]:
        """Registered clients, oldest first."""
        return list(self._clients.values())

    @property
    def dirty_bytes(self) -> int:
        """Bytes that were given back and are not yet zeroed."""
        return sum(end - cursor for _, cursor, end in self._dirty)

    def register(
        self, *, pid: int, name: str, layout: KVLayout, num_pages: int, landing_rows: int
    ) -> ClientRecord:
        """Carve an extent for a new client: its pages, then its landing ring, each page-aligned.

        Raises:
            PoolFull: No clean free range is long enough (the caller may scrub and try again).
        """
        landing_offset = self.extents.padded(num_pages * layout.page_bytes)
        extent_bytes = landing_offset + self.extents.padded(landing_rows * layout.row_bytes)
        extent_offset = self.extents.allocate(extent_bytes)
        if extent_offset is None:
            raise PoolFull(
                f"{num_pages} pages and {landing_rows} landing rows need {extent_bytes} contiguous "
                f"bytes; {self.extents.num_free} of {self.extents.size} bytes are free, the "
                f"longest run has {self.extents.largest_free} (room for "
                f"{self._pages_in(self.extents.largest_free, layout, landing_rows)} pages)"
            )
        record = ClientRecord(
            client_id=self._next_client_id,
            pid=pid,
            name=name,
            layout=layout,
            extent_offset=extent_offset,
            extent_bytes=extent_bytes,
            landing_offset=landing_offset,
            landing_rows=landing_rows,
            pages=PageTable(num_pages),
        )
        self._next_client_id += 1
        self._clients[record.client_id] = record
        return record

    def unregister(self, client_id: int) -> None:
        """Forget a client; its extent is dirty from now on.

        Raises:
            KeyError: No such client.
        """
        record = self._clients.pop(client_id)
        start = record.extent_offset
        self._dirty.append([start, start, start + record.extent_bytes])

    def next_dirty(self, max_bytes: int) -> tuple[int, int] | None:
        """The next ``(offset, length)`` to zero, ``max_bytes`` at most; None when all is clean."""
        if not self._dirty:
            return None
        _, cursor, end = self._dirty[0]
        return cursor, min(max_bytes, end - cursor)

    def mark_clean(self, offset: int, length: int) -> None:
        """Say that the bytes which ``next_dirty`` named are zero now."""
        extent = self._dirty[0]
        if offset != extent[1] or offset + length > extent[2]:
            raise ValueError(f"[{offset}, +{length}) is not the next dirty range")
        extent[1] = offset + length
        if extent[1] == extent[2]:
            self._dirty.popleft()
            self.extents.free(extent[0])

    def check_integrity(self) -> None:
        """Verify that extents tile the region, one owner each, and that every page table holds.

        Raises:
            IntegrityError: Something does not hold.
        """
        self.extents.check_integrity()
        owned = {record.extent_offset: record.extent_bytes for record in self._clients.values()}
        owned |= {start: end - start for start, _, end in self._dirty}
        if len(owned) != len(self._clients) + len(self._dirty):
            raise IntegrityError("two owners share an extent")
        if owned != self.extents.allocated():
            raise IntegrityError("extents and their owners differ")
        for record in self._clients.values():
            record.pages.check_integrity()

    def _pages_in(self, num_bytes: int, layout: KVLayout, landing_rows: int) -> int:
        left = num_bytes - self.extents.padded(landing_rows * layout.row_bytes)
        return max(0, left // layout.page_bytes)
