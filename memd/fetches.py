"""Fetches from the moment their pages are in memory until their rows have landed; no messages here.

A fetch that is alone and fits one turn is copied at once. Others wait in the ``CopyQueue``, and the
pages they read are pinned meanwhile.

A fetch of a client with a ring on a device goes two ways. It is copied like any other, but into a
staging slot, which it waits for in line with the others of its device. From there the device takes
it, and it is over when that has it. Its pages are pinned on the first way only::

    stage ──> submit, or copy_now and send ──> under way ──> Ended
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from memd.copying import CopyJob, CopyQueue
from memd.cuda.device import CopyEnd, CopyEnded, RingLost
from memd.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from memd.copying import Delay
    from memd.cuda.device import DeviceEvent, StagedCopy
    from memd.rings import ClientRing, Rings
    from memd.store import ClientRecord
    from memd.tiers import ClientTier
    from memd.transfer import Transfer

__all__ = ["Ended", "Fetch", "FetchEnd", "Fetches"]

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Fetch:
    """A fetch that was accepted.

    Attributes:
        connection: Who is to be answered.
        request_id: Of the request.
        record: Whose pages are read.
        tier: Of the same client; None if all its pages are in memory.
        job: The copying.
        page_ids: Pages that it reads, each once.
        ring: Where its rows go; None if that is the extent's landing ring.
        ring_offset: Their first byte in the ring.
        begun_ns: When it was asked for, by the performance counter.
    """

    connection: bytes
    request_id: int
    record: ClientRecord
    tier: ClientTier | None
    job: CopyJob
    page_ids: npt.NDArray[np.int64]
    ring: ClientRing | None = None
    ring_offset: int = 0
    begun_ns: int = dataclasses.field(default_factory=time.perf_counter_ns)

    @property
    def ring_device(self) -> bytes | None:
        """The device of its ring; None without one."""
        return None if self.ring is None else self.ring.handle.device_uuid

    def pin(self) -> None:
        """Keep the pages from being anybody else's."""
        self.record.pages.pin(self.page_ids)

    def hold(self) -> None:
        """Keep the pages in memory, too, or have them come back there."""
        assert self.tier is not None, "without a disk all pages are in memory"
        self.tier.pages.pin(self.page_ids)
        self.tier.pages.touch(self.page_ids)

    def unpin(self) -> None:
        """Take ``pin`` and ``hold`` back, and free pages that were released meanwhile."""
        if self.tier is not None:
            self.tier.pages.unpin(self.page_ids)
        freed = self.record.pages.unpin(self.page_ids)
        if self.tier is not None and freed.size:
            self.tier.mover.release(freed)


class FetchEnd(enum.Enum):
    """How a fetch ended that nobody gave up."""

    LANDED = "landed"
    FAILED = "failed"
    DEVICE_LOST = "device lost"


class Ended(NamedTuple):
    """A fetch that is over.

    Attributes:
        fetch: It; its pages are not pinned by it any more.
        end: How it ended.
        copy_ns: Time from slot to landing; 0 without a device.
    """

    fetch: Fetch
    end: FetchEnd
    copy_ns: int = 0


class Fetches:
    """All fetches that are being copied, held back or on their way to a device.

    Args:
        transfer: Does the copying.
        delay: Interconnect to imitate; by default none.
        clock: Monotonic seconds.
        rings: Rings on devices; by default there are none.
        on_room: Called when pages were unpinned, or when who waits for a slot may try again.
    """

    def __init__(
        self,
        transfer: Transfer,
        *,
        delay: Delay | None,
        clock: Callable[[], float],
        rings: Rings | None = None,
        on_room: Callable[[], None] = lambda: None,
    ) -> None:
        self._copies = CopyQueue(transfer, delay=delay, clock=clock)
        self._rings = rings
        self._on_room = on_room
        self._of_job: dict[CopyJob, Fetch] = {}
        # Who waits for a slot, first come first.
        self._line: list[Fetch] = []
        # Those with a slot, and the reverse.
        self._slots: dict[Fetch, StagedCopy] = {}
        self._of_slot: dict[StagedCopy, Fetch] = {}
        # By client, in the order of their answers: copied, and not known to be over.
        self._under_way: dict[int, deque[Fetch]] = {}
        # Of those, over but for others before them.
        self._ends: dict[Fetch, Ended] = {}

    @property
    def has_work(self) -> bool:
        """Whether something is to be copied now."""
        return not self._copies.is_idle

    def next_due(self) -> float | None:
        """When a fetch that is held back will be over, seconds of the clock; None if none is."""
        return self._copies.next_due()

    def num_of(self, client_id: int) -> int:
        """A client's fetches that are not over."""
        return self._copies.num_jobs_of(client_id) + len(self._under_way.get(client_id, ()))

    def is_reading(self, client_id: int) -> bool:
        """Whether fetches of a client pin pages that they will unpin by themselves."""
        return self._copies.num_jobs_of(client_id) > 0

    def pending_bytes(self, client_id: int) -> int:
        """Bytes of a client's fetches that are still to be copied."""
        return self._copies.pending_bytes(client_id)

    def stage(self, fetch: Fetch) -> bool:
        """Give a fetch to an open ring its slot; False if it must wait, where it has its place."""
        assert fetch.ring is not None, "only rings have slots"
        assert self._rings is not None, "a ring belongs to them"
        if not fetch.job.num_bytes:
            return True
        device_uuid = fetch.ring.handle.device_uuid
        first = next((f for f in self._line if f.ring_device == device_uuid), fetch)
        copy = None
        if first is fetch:
            copy = self._rings.begin(
                fetch.record.client_id,
                ring_offset=fetch.ring_offset,
                num_bytes=fetch.job.num_bytes,
            )
        if copy is None:
            if fetch not in self._line:
                self._line.append(fetch)
            return False
        self._leave_line(fetch)
        fetch.job.landing_offset = copy.slot.offset
        self._slots[fetch] = copy
        self._of_slot[copy] = fetch
        return True

    def unstage(self, fetch: Fetch) -> None:
        """Take `stage` back, for a fetch that is not copied after all."""
        self._leave_line(fetch)
        copy = self._forget_slot(fetch)
        if copy is not None:
            assert self._rings is not None, "else there are no slots"
            self._rings.cancel(copy)
            self._on_room()

    def copy_now(self, job: CopyJob) -> bool:
        """Copy the rows of a fetch if it waits for nobody; whether it did."""
        if not self._copies.is_immediate(job):
            return False
        self._copies.copy_now(job)
        return True

    def submit(self, fetch: Fetch) -> None:
        """Have a fetch copied in its turn; it is unpinned at its end, and was pinned before.

        With a ring it was staged before.
        """
        self._of_job[fetch.job] = fetch
        self._copies.submit(fetch.job)

    def send(self, fetch: Fetch) -> list[Ended]:
        """Unpin a fetch whose rows lie in its slot, and have the device take them.

        Returns:
            What is over with that: nothing, but for a fetch of no rows.
        """
        self._unpin(fetch)
        self._under_way.setdefault(fetch.record.client_id, deque()).append(fetch)
        copy = self._slots.get(fetch)
        if copy is None:
            return self._end(Ended(fetch, FetchEnd.LANDED))
        assert self._rings is not None, "else there are no slots"
        self._rings.send(copy)
        return []

    def step(self) -> list[Ended]:
        """Copy for one client's turn; what is over now."""
        ended = []
        try:
            self._copies.step()
        except Exception:
            job = self._copies.drop_current()
            _LOG.exception("copying for client %d failed", job.client_id)
            ended += self._fail(self._of_job.pop(job))
        for job in self._copies.take_finished():
            fetch = self._of_job.pop(job)
            if fetch.ring is not None:
                ended += self.send(fetch)
            else:
                self._unpin(fetch)
                ended.append(Ended(fetch, FetchEnd.LANDED))
        return ended

    def follow(self, event: DeviceEvent) -> list[Ended]:
        """What is over after something has happened to a ring or a copy."""
        match event:
            case CopyEnded(copy, CopyEnd.DONE, seconds):
                fetch = self._of_slot[copy]
                self._forget_slot(fetch)
                return self._end(Ended(fetch, FetchEnd.LANDED, int(seconds * 1e9)))
            case RingLost(client_id):
                # All of them, whose copies have just ended one by one, and those without any yet.
                return self._lose(client_id)
        return []

    def cancel(self, client_id: int) -> list[Fetch]:
        """Forget a client's fetches, in their order; none of its rows is written after this.

        But for those that its device has begun to take, until its ring is closed.
        """
        fetches = [
            *self._under_way.pop(client_id, ()),
            *(self._of_job.pop(job) for job in self._copies.cancel(client_id)),
        ]
        for fetch in fetches:
            self._forget_slot(fetch)
            self._ends.pop(fetch, None)
        return fetches

    def check_integrity(self) -> None:
        """Verify the queue, and that who is on the way to a device is known by its slot.

        Raises:
            IntegrityError: Something does not hold.
        """
        self._copies.check_integrity()
        if {copy: fetch for fetch, copy in self._slots.items()} != self._of_slot:
            raise IntegrityError("fetches and their slots differ")
        under_way = [fetch for queue in self._under_way.values() for fetch in queue]
        if not all(self._under_way.values()):
            raise IntegrityError("a client has no fetch under way and is known")
        if any((fetch in self._slots) == (fetch in self._ends) for fetch in under_way):
            raise IntegrityError("a fetch under way has neither a slot nor an end, or both")
        if not self._slots.keys() <= {*under_way, *self._of_job.values()}:
            raise IntegrityError("a slot has lost its fetch")
        if not self._ends.keys() <= set(under_way):
            raise IntegrityError("a fetch has ended and is not known")
        if len(set(self._line)) != len(self._line) or self._slots.keys() & set(self._line):
            raise IntegrityError("a fetch waits for a slot that it has, or waits twice")

    def _end(self, end: Ended) -> list[Ended]:
        """Note the end of a fetch under way; what can be answered with that, in order."""
        client_id = end.fetch.record.client_id
        self._ends[end.fetch] = end
        queue, ended = self._under_way[client_id], []
        while queue and queue[0] in self._ends:
            ended.append(self._ends.pop(queue.popleft()))
        if not queue:
            del self._under_way[client_id]
        return ended

    def _fail(self, fetch: Fetch) -> list[Ended]:
        """End a fetch whose copying failed."""
        end = Ended(fetch, FetchEnd.FAILED)
        self._unpin(fetch)
        if fetch.ring is None:
            return [end]
        self.unstage(fetch)
        self._under_way.setdefault(fetch.record.client_id, deque()).append(fetch)
        return self._end(end)

    def _lose(self, client_id: int) -> list[Ended]:
        ends = dict(self._ends)
        queued = set(self._of_job.values())
        fetches = self.cancel(client_id)
        for fetch in fetches:
            if fetch in queued:
                self._unpin(fetch)
        self._on_room()
        return [ends.get(fetch, Ended(fetch, FetchEnd.DEVICE_LOST)) for fetch in fetches]

    def _unpin(self, fetch: Fetch) -> None:
        fetch.unpin()
        self._on_room()

    def _leave_line(self, fetch: Fetch) -> None:
        if fetch in self._line:
            self._line.remove(fetch)
            # Who was behind it may have what it wanted.
            self._on_room()

    def _forget_slot(self, fetch: Fetch) -> StagedCopy | None:
        copy = self._slots.pop(fetch, None)
        if copy is not None:
            del self._of_slot[copy]
        return copy
