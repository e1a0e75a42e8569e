"""Who owns which bytes of the region, and in which state each page is; pure bookkeeping.

The verbs of a page, in the order of its life::

    FREE --reserve--> RESERVED --commit--> SEALED --freeze--> FROZEN
      ^                   |                  |    <--thaw--     |
      +-------------------+------release-----+------------------+

RESERVED pages are the client's to write, and nobody may read them. SEALED pages are complete, and
only they may be fetched, and FROZEN ones, which the client has promised not to write: they may go
to disk (``memd.tiers``). A page that a fetch still reads is *pinned*; released meanwhile it is
LEAVING, and FREE once nobody reads it any more.

An extent has one owner at a time. When it comes back it is *dirty* until the server has zeroed it,
and only then can another client get it: no client ever sees another's bytes.

Above a disk tier an extent is addresses, and takes memory for some of its pages only. What memory
and disk space clients were promised is counted here, so that no promise is given twice.

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
    """Life of a page; only SEALED and FROZEN are readable."""

    FREE = 0
    RESERVED = 1
    SEALED = 2
    FROZEN = 3
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
        self._change(page_ids, PageState.RESERVED, PageState.SEALED, "commit needs RESERVED pages")

    def freeze(self, page_ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Note that sealed pages are not written any more.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page is not SEALED.
        """
        self._change(page_ids, PageState.SEALED, PageState.FROZEN, "freeze needs SEALED pages")

    def thaw(self, page_ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Note that frozen pages may be written again.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page is not FROZEN.
        """
        self._change(page_ids, PageState.FROZEN, PageState.SEALED, "thaw needs FROZEN pages")

    def release(self, page_ids: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Free pages that are held; those that are pinned become free with their last pin.

        Returns:
            Those that are free now.

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
        for state in (PageState.RESERVED, PageState.SEALED, PageState.FROZEN):
            is_in = states == state
            self._move(ids[is_in & is_pinned], state, PageState.LEAVING)
            self._move(ids[is_in & ~is_pinned], state, PageState.FREE)
        freed: npt.NDArray[np.int64] = ids[~is_pinned]
        return freed

    def pin(self, page_ids: npt.NDArray[np.int64]) -> None:
        """Keep readable pages as they are until `unpin`.

        Args:
            page_ids: Each once; the caller has checked that they are readable.
        """
        self._pins[page_ids] += 1

    def unpin(self, page_ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Take back one `pin` of each page; those that are LEAVING and have no other are free.

        Returns:
            Those that are free now.
        """
        self._pins[page_ids] -= 1
        is_gone = (self._pins[page_ids] == 0) & (self._states[page_ids] == PageState.LEAVING)
        freed: npt.NDArray[np.int64] = page_ids[is_gone]
        self._move(freed, PageState.LEAVING, PageState.FREE)
        return freed

    def require_readable(self, page_ids: npt.NDArray[np.int64]) -> None:
        """Check that pages, all in range, are SEALED or FROZEN.

        Raises:
            WrongState: One is not.
        """
        states = self._states[page_ids]
        is_wrong = (states != PageState.SEALED) & (states != PageState.FROZEN)
        if is_wrong.any():
            wrong = np.unique(page_ids[is_wrong])
            raise WrongState(self._describe("only SEALED pages are readable", wrong))

    def require_frozen(
        self, page_ids: Sequence[int] | npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Check that pages are FROZEN; they, as an array.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page is not FROZEN.
        """
        ids = self._checked(page_ids)
        wrong = ids[self._states[ids] != PageState.FROZEN]
        if wrong.size:
            raise WrongState(self._describe("thaw needs FROZEN pages", wrong))
        return ids

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
        is_held = np.isin(self._states, (PageState.SEALED, PageState.FROZEN, PageState.LEAVING))
        if self._pins[~is_held].any():
            raise IntegrityError("a page is pinned that nobody may read")
        if not self._pins[self._states == PageState.LEAVING].all():
            raise IntegrityError("a page is leaving and nobody reads it")

    def _change(
        self,
        page_ids: Sequence[int] | npt.NDArray[np.int64],
        old: PageState,
        new: PageState,
        rule: str,
    ) -> None:
        ids = self._checked(page_ids)
        wrong = ids[self._states[ids] != old]
        if wrong.size:
            raise WrongState(self._describe(rule, wrong))
        self._move(ids, old, new)

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
        host_pages: How many of its pages may be in memory at a time; all of them without a disk.
        memory_bytes: Memory that it was promised, bytes.
        disk_bytes: Space on disk that it was promised, bytes.
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
    host_pages: int
    memory_bytes: int
    disk_bytes: int
    pages: PageTable


@dataclasses.dataclass(frozen=True)
class _SetAside:
    """Part of the region that memd uses itself; the fields are those of a client's record."""

    extent_offset: int
    extent_bytes: int
    disk_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        return self.extent_bytes


@dataclasses.dataclass
class _Dirty:
    """An extent that was given back: bytes from ``cursor`` to ``end`` are not zeroed yet."""

    record: ClientRecord | _SetAside
    cursor: int

    @property
    def end(self) -> int:
        return self.record.extent_offset + self.record.extent_bytes


class Store:
    """All extents of the region and all clients.

    Args:
        region_bytes: Size of the region.
        memory_bytes: How much of it may have memory at a time; by default all.
        disk_bytes: Size of the disk tier; by default there is none.

    Attributes:
        extents: Which parts of the region somebody has.
        memory_bytes: How much of it may have memory at a time.
        memory_free_bytes: Memory that nobody was promised.
        disk_free_bytes: Disk space that nobody was promised.
    """

    def __init__(
        self, region_bytes: int, *, memory_bytes: int | None = None, disk_bytes: int = 0
    ) -> None:
        self.extents = RangeAllocator(region_bytes, alignment=mmap.ALLOCATIONGRANULARITY)
        self.memory_bytes = region_bytes if memory_bytes is None else memory_bytes
        self._disk_bytes = disk_bytes
        self.memory_free_bytes = self.memory_bytes
        self.disk_free_bytes = disk_bytes
        self._clients: dict[int, ClientRecord] = {}
        self._next_client_id = 1
        # By offset.
        self._set_aside: dict[int, _SetAside] = {}
        # Given back and not yet zeroed, oldest first.
        self._dirty: deque[_Dirty] = deque()

    @property
    def clients(self) -> list[ClientRecord]:
        """Registered clients, oldest first."""
        return list(self._clients.values())

    @property
    def dirty_bytes(self) -> int:
        """Bytes that were given back and are not yet zeroed."""
        return sum(dirty.end - dirty.cursor for dirty in self._dirty)

    def register(
        self,
        *,
        pid: int,
        name: str,
        layout: KVLayout,
        num_pages: int,
        landing_rows: int,
        host_pages: int | None = None,
        slot_bytes: int = 0,
    ) -> ClientRecord:
        """Carve an extent for a new client: its pages, then its landing ring, each page-aligned.

        Args:
            pid: Process id that memd watches.
            name: Free text from ``Hello``.
            layout: Layout of its pages.
            num_pages: Pages of the extent.
            landing_rows: Rows of the landing ring.
            host_pages: How many pages get memory; by default all.
            slot_bytes: Space that a page takes on disk; the other pages need as much.

        Raises:
            PoolFull: No clean free range is long enough, or there is not so much memory or disk
                space (the caller may scrub and try again).
        """
        host_pages = num_pages if host_pages is None else host_pages
        landing_offset = self.extents.padded(num_pages * layout.page_bytes)
        landing_bytes = self.extents.padded(landing_rows * layout.row_bytes)
        pages_bytes = landing_offset if host_pages == num_pages else host_pages * layout.page_bytes
        memory_bytes, disk_bytes = (
            pages_bytes + landing_bytes,
            (num_pages - host_pages) * slot_bytes,
        )
        extent_offset = self.extents.allocate(landing_offset + landing_bytes)
        if extent_offset is None:
            raise PoolFull(
                f"{num_pages} pages and {landing_rows} landing rows need "
                f"{landing_offset + landing_bytes} contiguous "
                f"bytes; {self.extents.num_free} of {self.extents.size} bytes are free, the "
                f"longest run has {self.extents.largest_free} (room for "
                f"{self._pages_in(self.extents.largest_free, layout, landing_rows)} pages)"
            )
        if memory_bytes > self.memory_free_bytes or disk_bytes > self.disk_free_bytes:
            self.extents.free(extent_offset)
            raise PoolFull(
                f"{host_pages} pages in memory, {landing_rows} landing rows and "
                f"{num_pages - host_pages} pages on disk need {memory_bytes} bytes of memory and "
                f"{disk_bytes} of disk; {self.memory_free_bytes} of {self.memory_bytes} and "
                f"{self.disk_free_bytes} of {self._disk_bytes} are free"
            )
        record = ClientRecord(
            client_id=self._next_client_id,
            pid=pid,
            name=name,
            layout=layout,
            extent_offset=extent_offset,
            extent_bytes=landing_offset + landing_bytes,
            landing_offset=landing_offset,
            landing_rows=landing_rows,
            host_pages=host_pages,
            memory_bytes=memory_bytes,
            disk_bytes=disk_bytes,
            pages=PageTable(num_pages),
        )
        self.memory_free_bytes -= memory_bytes
        self.disk_free_bytes -= disk_bytes
        self._next_client_id += 1
        self._clients[record.client_id] = record
        return record

    def could_register(self, layout: KVLayout, num_pages: int, landing_rows: int) -> bool:
        """Whether there is memory to be zeroed, and with it perhaps enough for such a client."""
        wanted = num_pages * layout.page_bytes + landing_rows * layout.row_bytes
        return bool(self._dirty) and wanted <= self.extents.num_free + self.dirty_bytes

    def set_aside(self, num_bytes: int) -> int | None:
        """Take a clean part of the region, and its memory, for memd's own use.

        Args:
            num_bytes: How much, >= 1.

        Returns:
            Where it begins, at a memory page; None when there is no room, though `could_set_aside`
            may tell that there will be.
        """
        size = self.extents.padded(num_bytes)
        offset = self.extents.allocate(size) if size <= self.memory_free_bytes else None
        if offset is not None:
            self.memory_free_bytes -= size
            self._set_aside[offset] = _SetAside(offset, size)
        return offset

    def could_set_aside(self, num_bytes: int) -> bool:
        """Whether there is memory to be zeroed, and with it perhaps enough to set aside."""
        return bool(self._dirty) and num_bytes <= self.extents.num_free + self.dirty_bytes

    def give_back(self, offset: int) -> None:
        """Take back what `set_aside` gave; it is dirty from now on.

        Raises:
            KeyError: Nothing was set aside there.
        """
        part = self._set_aside.pop(offset)
        self._dirty.append(_Dirty(part, part.extent_offset))

    def unregister(self, client_id: int) -> None:
        """Forget a client; its extent is dirty from now on.

        Raises:
            KeyError: No such client.
        """
        record = self._clients.pop(client_id)
        self._dirty.append(_Dirty(record, record.extent_offset))

    def next_dirty(self, max_bytes: int) -> tuple[int, int] | None:
        """The next ``(offset, length)`` to zero, ``max_bytes`` at most; None when all is clean."""
        if not self._dirty:
            return None
        dirty = self._dirty[0]
        return dirty.cursor, min(max_bytes, dirty.end - dirty.cursor)

    def mark_clean(self, offset: int, length: int) -> None:
        """Say that the bytes which ``next_dirty`` named are zero now."""
        dirty = self._dirty[0]
        if offset != dirty.cursor or offset + length > dirty.end:
            raise ValueError(f"[{offset}, +{length}) is not the next dirty range")
        dirty.cursor = offset + length
        if dirty.cursor == dirty.end:
            self._dirty.popleft()
            self.extents.free(dirty.record.extent_offset)
            self.memory_free_bytes += dirty.record.memory_bytes
            self.disk_free_bytes += dirty.record.disk_bytes

    def check_integrity(self) -> None:
        """Verify that extents tile the region, one owner each, and that every page table holds.

        Raises:
            IntegrityError: Something does not hold.
        """
        self.extents.check_integrity()
        owners = [
            *self._clients.values(),
            *self._set_aside.values(),
            *(dirty.record for dirty in self._dirty),
        ]
        owned = {record.extent_offset: record.extent_bytes for record in owners}
        if len(owned) != len(owners):
            raise IntegrityError("two owners share an extent")
        for what, promised, free, size in (
            (
                "memory",
                sum(record.memory_bytes for record in owners),
                self.memory_free_bytes,
                self.memory_bytes,
            ),
            (
                "disk",
                sum(record.disk_bytes for record in owners),
                self.disk_free_bytes,
                self._disk_bytes,
            ),
        ):
            if free < 0 or promised + free != size:
                raise IntegrityError(
                    f"{promised} bytes of {what} are promised and {free} free, of {size}"
                )
        if owned != self.extents.allocated():
            raise IntegrityError("extents and their owners differ")
        for record in self._clients.values():
            record.pages.check_integrity()

    def _pages_in(self, num_bytes: int, layout: KVLayout, landing_rows: int) -> int:
        left = num_bytes - self.extents.padded(landing_rows * layout.row_bytes)
        return max(0, left // layout.page_bytes)
