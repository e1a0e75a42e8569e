"""Which of one client's pages are in host memory and which on disk; pure bookkeeping.

A client may have more pages than its budget of host memory. A page's address is its place in the
client's extent and never changes; what changes is whether there is memory behind it.

What a client does with a page, and where its bytes may be meanwhile::

    FREE ──reserve──> RESERVED ──commit──> SEALED ──freeze──> FROZEN
    HOLE, HOST        HOLE, HOST           HOST, LOST <─thaw── HOST, DISK, LOST
      ^                   │                  │                  │
      └───────────────────┴─────release──────┴──────────────────┘

How the bytes move, each step told by whoever moves them (``memd.tiers.mover``)::

    HOLE ──filled──> HOST      memory is behind a page that somebody will write
    HOST ──emptied─> HOLE      memory of a FREE page is needed elsewhere
    HOST ──spilled─> DISK      of a FROZEN page that nobody reads
    DISK ──promoted> HOST      somebody reads it, or will write it
    DISK ──lost────> LOST      the disk did not give it back; its client learns that and releases it

``freeze`` is the client's promise not to write. Who breaks it loses what was written, or the page
if it was being copied: its checksum is wrong then. Pages that are *pinned* are being read; they are
not spilled, and one on disk that is pinned is about to come back.

The verbs of a client change all the pages that they name or none. FREE pages keep their memory
until it is needed: most pages that are reserved were released a moment ago.

This module must not know memory, files or messages.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from memd.errors import IntegrityError
from memd.store import OutOfRange, WrongState

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from memd.tiers.eviction import EvictionPolicy

    PageIds = Sequence[int] | npt.NDArray[np.int64]

__all__ = ["Place", "RoomPlan", "TierCounters", "TieredPages", "Use"]


class Place(enum.IntEnum):
    """Where a page's bytes are."""

    HOLE = 0
    """Nowhere, and no memory is behind its address."""
    HOST = 1
    """In memory, at its address."""
    DISK = 2
    """On disk, and no memory is behind its address."""
    LOST = 3
    """Nowhere any more: the disk did not give them back."""


class Use(enum.IntEnum):
    """What the client does with a page."""

    FREE = 0
    """Nothing."""
    RESERVED = 1
    """It writes the page, and nobody reads it."""
    SEALED = 2
    """It reads the page, and may write rows that nobody was told of yet."""
    FROZEN = 3
    """It reads the page, and does not write it."""


class RoomPlan(NamedTuple):
    """Which pages have to leave host memory.

    Attributes:
        to_empty: FREE pages; their bytes are nobody's.
        to_spill: FROZEN pages, best first.
    """

    to_empty: list[int]
    to_spill: list[int]


@dataclasses.dataclass
class TierCounters:
    """Pages that moved; only ever grow.

    Attributes:
        filled: Got memory to be written.
        emptied: Gave memory back that nobody used.
        spilled: Went to disk.
        promoted: Came back from disk.
        lost: Did not come back.
    """

    filled: int = 0
    emptied: int = 0
    spilled: int = 0
    promoted: int = 0
    lost: int = 0


class TieredPages:
    """Places of one client's pages.

    Args:
        num_pages: Pages of the client, >= 1; ids are ``0 .. num_pages - 1``. All are FREE holes.
        host_pages: How many of them may be in host memory at a time, 1 to ``num_pages``.
        policy: Which leave first; for ``num_pages`` pages.

    Attributes:
        num_pages: Pages of the client.
        host_pages: How many of them may be in host memory at a time.
        counters: Pages that moved.
    """

    def __init__(self, num_pages: int, host_pages: int, policy: EvictionPolicy) -> None:
        if not 1 <= host_pages <= num_pages:
            raise ValueError(f"host_pages must be 1 to {num_pages}, got {host_pages}")
        self.num_pages = num_pages
        self.host_pages = host_pages
        self.counters = TierCounters()
        self._policy = policy
        self._uses = np.zeros(num_pages, dtype=np.uint8)
        self._places = np.zeros(num_pages, dtype=np.uint8)
        self._pins = np.zeros(num_pages, dtype=np.uint32)
        self._generations = np.zeros(num_pages, dtype=np.int64)
        self._num_frozen = 0
        self._num_in = dict.fromkeys(Place, 0)
        self._num_in[Place.HOLE] = num_pages

    @property
    def host_room(self) -> int:
        """Pages that may still get memory without another giving up its own."""
        return self.host_pages - self._num_in[Place.HOST]

    def count(self, place: Place) -> int:
        """Pages in a place."""
        return self._num_in[place]

    def place(self, page_id: int) -> Place:
        """Where one page's bytes are."""
        return Place(int(self._places[page_id]))

    def use(self, page_id: int) -> Use:
        """What the client does with one page."""
        return Use(int(self._uses[page_id]))

    def generation(self, page_id: int) -> int:
        """Which of its contents a page has had since it was frozen: no two share a number."""
        return int(self._generations[page_id])

    def missing(self, page_ids: PageIds) -> npt.NDArray[np.int64]:
        """Those of the pages that have to get memory before they can be read or written."""
        ids = self._checked(page_ids)
        places = self._places[ids]
        missing: npt.NDArray[np.int64] = ids[(places == Place.HOLE) | (places == Place.DISK)]
        return missing

    def lost_among(self, page_ids: PageIds) -> npt.NDArray[np.int64]:
        """Those of the pages that a fetch has to be refused for."""
        ids = self._checked(page_ids)
        lost: npt.NDArray[np.int64] = ids[self._places[ids] == Place.LOST]
        return lost

    def reserve(self, page_ids: PageIds) -> None:
        """Give FREE pages to the client, which may write them once none of them is `missing`.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page is not FREE.
        """
        ids = self._checked(page_ids)
        self._require(ids, self._uses[ids] == Use.FREE, "reserve needs FREE pages")
        self._uses[ids] = Use.RESERVED

    def commit(self, page_ids: PageIds) -> None:
        """Seal RESERVED pages, which have memory.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page is not RESERVED, or was never there to be written.
        """
        ids = self._checked(page_ids)
        is_written = (self._uses[ids] == Use.RESERVED) & (self._places[ids] == Place.HOST)
        self._require(ids, is_written, "commit needs RESERVED pages in host memory")
        self._uses[ids] = Use.SEALED

    def freeze(self, page_ids: PageIds, depths: PageIds | None = None) -> None:
        """Let SEALED pages be spilled: the client does not write them until `thaw`.

        Args:
            page_ids: Which.
            depths: How deep in a prompt each lies, the first page at 0; None says nothing.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice, or the depths are not
                one for each page.
            WrongState: A page is not SEALED.
        """
        ids = self._checked(page_ids)
        deep = np.zeros_like(ids) if depths is None else np.asarray(depths, dtype=np.int64)
        if deep.shape != ids.shape:
            raise OutOfRange(f"{ids.size} pages need as many depths, got {deep.size}")
        self._require(ids, self._uses[ids] == Use.SEALED, "freeze needs SEALED pages")
        self._uses[ids] = Use.FROZEN
        self._generations[ids] = self._num_frozen + 1 + np.arange(ids.size)
        self._num_frozen += ids.size
        self._policy.admit(ids, deep)
        self._offer(ids)

    def thaw(self, page_ids: PageIds) -> None:
        """Let the client write FROZEN pages again; they stay in memory from now on.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page is not FROZEN, or is on disk and has to come back first.
        """
        ids = self._checked(page_ids)
        self._require(ids, self._uses[ids] == Use.FROZEN, "thaw needs FROZEN pages")
        self._require(ids, self._places[ids] != Place.DISK, "thaw needs pages in host memory")
        self._uses[ids] = Use.SEALED
        self._policy.withdraw(ids)

    def release(self, page_ids: PageIds) -> npt.NDArray[np.int64]:
        """Free pages that nobody reads.

        Returns:
            Those of them that were on disk.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page is FREE, or pinned.
        """
        ids = self._checked(page_ids)
        self._require(ids, self._uses[ids] != Use.FREE, "release needs pages that are held")
        self._require(ids, self._pins[ids] == 0, "release needs pages that nobody reads")
        self._policy.withdraw(ids)
        self._uses[ids] = Use.FREE
        on_disk: npt.NDArray[np.int64] = ids[self._places[ids] == Place.DISK]
        for place in (Place.DISK, Place.LOST):
            self._move(ids[self._places[ids] == place], place, Place.HOLE)
        return on_disk

    def touch(self, page_ids: PageIds) -> None:
        """Note that pages are used now: those that are not go first.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
        """
        self._policy.touch(self._checked(page_ids))

    def pin(self, page_ids: PageIds) -> None:
        """Keep SEALED or FROZEN pages where they are, or bring them back, until `unpin`.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page is neither.
        """
        ids = self._checked(page_ids)
        self._require(ids, self._uses[ids] >= Use.SEALED, "only SEALED pages are readable")
        self._pins[ids] += 1
        self._policy.withdraw(ids)

    def unpin(self, page_ids: PageIds) -> None:
        """Take back one `pin` of each page.

        Raises:
            OutOfRange: An id is not a page of this client, or is named twice.
            WrongState: A page is not pinned.
        """
        ids = self._checked(page_ids)
        self._require(ids, self._pins[ids] > 0, "unpin needs pages that are pinned")
        self._pins[ids] -= 1
        self._offer(ids)

    def plan_room(self, num_pages: int) -> RoomPlan | None:
        """Which pages have to leave so that this many can get memory; changes nothing.

        Returns:
            No pages where there is room; None where all that may leave would not be enough.
        """
        num_short = num_pages - self.host_room
        if num_short <= 0:
            return RoomPlan([], [])
        # The lowest free ids are reserved first, so the highest are missed last.
        is_spare = (self._uses == Use.FREE) & (self._places == Place.HOST)
        to_empty = np.flatnonzero(is_spare)[-num_short:].tolist()
        to_spill = self._policy.victims(num_short - len(to_empty))
        if len(to_empty) + len(to_spill) < num_short:
            return None
        return RoomPlan(to_empty, to_spill)

    def filled(self, page_id: int) -> None:
        """A HOLE has memory now, for which there was room."""
        assert self.host_room > 0, "memory needs room in the budget"
        self._step(page_id, Place.HOLE, Place.HOST)
        self.counters.filled += 1

    def emptied(self, page_id: int) -> None:
        """A FREE page has given its memory back."""
        assert self.use(page_id) is Use.FREE, "only memory that nobody uses is thrown away"
        self._step(page_id, Place.HOST, Place.HOLE)
        self.counters.emptied += 1

    def spilled(self, page_id: int, generation: int) -> bool:
        """A copy of a page is on disk.

        Args:
            page_id: Which.
            generation: Which of its contents was copied.

        Returns:
            Whether the page is on disk from now on, and its memory may go. False if it was thawed,
            released, pinned or spilled meanwhile: then the copy is of no use.
        """
        ids = np.array([page_id])
        if self.generation(page_id) != generation or not self._may_leave(ids).all():
            return False
        self._policy.evict(page_id)
        self._move(ids, Place.HOST, Place.DISK)
        self.counters.spilled += 1
        return True

    def promoted(self, page_id: int) -> None:
        """A page is back from disk, for which there was room."""
        assert self.host_room > 0, "memory needs room in the budget"
        self._step(page_id, Place.DISK, Place.HOST)
        self._offer(np.array([page_id]))
        self.counters.promoted += 1

    def lost(self, page_id: int) -> None:
        """A page did not come back from disk."""
        self._step(page_id, Place.DISK, Place.LOST)
        self.counters.lost += 1

    def check_integrity(self) -> None:
        """Verify that places, uses and pins fit, and the budget holds.

        Raises:
            IntegrityError: Something does not hold.
        """
        found = np.bincount(self._places, minlength=len(Place))
        if found.tolist() != [self._num_in[place] for place in Place]:
            raise IntegrityError(f"pages by place are {found.tolist()}, counted {self._num_in}")
        if self.host_room < 0:
            raise IntegrityError(f"{-self.host_room} pages more than the budget are in memory")
        for use, places in _PLACES_OF.items():
            wrong = np.flatnonzero((self._uses == use) & ~np.isin(self._places, places))
            if wrong.size:
                page_id = int(wrong[0])
                raise IntegrityError(
                    f"page {page_id} is {use.name} and its place is {self.place(page_id).name}"
                )
        if self._pins[self._uses < Use.SEALED].any():
            raise IntegrityError("a page is pinned that nobody may read")
        self._policy.check_integrity()
        candidates = set(np.flatnonzero(self._may_leave(np.arange(self.num_pages))).tolist())
        if set(self._policy.victims(self.num_pages)) != candidates:
            raise IntegrityError("the policy would choose among other pages than those that may go")

    def _may_leave(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        is_idle = (self._uses[ids] == Use.FROZEN) & (self._pins[ids] == 0)
        may_leave: npt.NDArray[np.bool_] = is_idle & (self._places[ids] == Place.HOST)
        return may_leave

    def _offer(self, ids: npt.NDArray[np.int64]) -> None:
        self._policy.offer(ids[self._may_leave(ids)])

    def _step(self, page_id: int, old: Place, new: Place) -> None:
        assert self.place(page_id) is old, f"page {page_id} is {self.place(page_id).name}"
        self._move(np.array([page_id]), old, new)

    def _move(self, ids: npt.NDArray[np.int64], old: Place, new: Place) -> None:
        self._places[ids] = new
        self._num_in[old] -= ids.size
        self._num_in[new] += ids.size

    def _checked(self, page_ids: PageIds) -> npt.NDArray[np.int64]:
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

    def _require(
        self, ids: npt.NDArray[np.int64], is_right: npt.NDArray[np.bool_], rule: str
    ) -> None:
        wrong = ids[~is_right]
        if wrong.size:
            first = int(wrong[0])
            more = f" and {wrong.size - 1} more" if wrong.size > 1 else ""
            raise WrongState(
                f"{rule}: page {first} is {self.use(first).name}, its place "
                f"{self.place(first).name}{more}"
            )


_PLACES_OF = {
    Use.FREE: (Place.HOLE, Place.HOST),
    Use.RESERVED: (Place.HOLE, Place.HOST),
    Use.SEALED: (Place.HOST, Place.LOST),
    Use.FROZEN: (Place.HOST, Place.DISK, Place.LOST),
}
