"""One device as the control thread sees it: rings, copies and staging; never blocks.

Life of a ring and of a copy::

    open ──> OPENING ── RingOpened ──> OPEN ── close ──> CLOSING ── RingClosed ──> gone
                └────── RingFailed ──> gone

    begin ──> filling ── send ──> under way ── CopyEnded ──> done
                 └── cancel, close ──> cancelled

Every copy ends once: `CopyEnded` says that it is done or that the device was lost, or `cancel` or
`close` cancels it. When the ring of a client is closed,

- copies that were not begun are cancelled, and their staging bytes are free at once;
- copies that the device has begun are cancelled too, for whoever waits for them, but nothing of
  them is touched until the device has done them; only then is the ring unmapped, and `RingClosed`
  says so. The client's death changes none of this: memory that memd maps stays, with its owner
  gone, until memd unmaps it.

A device is **lost** when the driver fails in a copy, a query or a close, when a call takes longer
than its bound, or when copies to a ring make no progress for theirs. Then every copy that is not
done ends as ``DEVICE_LOST``, every ring ends with `RingLost`, and the device stays lost until memd
ends. Copies may still arrive in those rings, so their owners must not use them for anything else;
and the staging memory is never given to anybody, because the device may still read it.

Time counts only as long as the control thread looks, so a daemon that was stopped for a while does
not blame the driver for it.

Must not know sockets, messages or pages.
"""

from __future__ import annotations

import dataclasses
import enum
import logging
import time
from typing import TYPE_CHECKING

from memd.cuda.commands import (
    Close,
    Closed,
    Idle,
    Landed,
    Lost,
    Open,
    Opened,
    Refused,
    Send,
    Stop,
)
from memd.cuda.staging import SlotState
from memd.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable

    from memd.cuda.commands import Outcome
    from memd.cuda.ring import RingHandle
    from memd.cuda.staging import Slot, Staging
    from memd.cuda.worker import Errand, Timeouts, Worker

__all__ = [
    "MAX_COPIES",
    "CopyEnd",
    "CopyEnded",
    "Device",
    "DeviceEvent",
    "RingClosed",
    "RingFailed",
    "RingLost",
    "RingOpened",
    "RingState",
    "StagedCopy",
]

_LOG = logging.getLogger(__name__)

MAX_COPIES = 1024
"""Of one device, not ended; bounds what waits for the worker."""

# Time between two looks counts only up to this much.
_MAX_GAP_S = 1.0


class RingState(enum.Enum):
    """Life of a ring."""

    OPENING = "opening"
    OPEN = "open"
    CLOSING = "closing"


class CopyEnd(enum.Enum):
    """How a copy ended; a cancelled one is not told of."""

    DONE = "done"
    DEVICE_LOST = "device_lost"


@dataclasses.dataclass(eq=False)
class StagedCopy:
    """One fetch on its way: bytes in a staging slot, then in a ring.

    Attributes:
        copy_id: Unique for its device.
        client_id: Whose ring.
        slot: Where its bytes wait; fill it before `Device.send`.
        ring_offset: Where they go.
        begun_at: When the slot was given, in seconds of the device's clock.
    """

    copy_id: int
    client_id: int
    slot: Slot
    ring_offset: int
    begun_at: float


@dataclasses.dataclass(frozen=True)
class RingOpened:
    """Copies to the client's ring may begin."""

    client_id: int


@dataclasses.dataclass(frozen=True)
class RingFailed:
    """The client's ring was not opened."""

    client_id: int
    reason: str


@dataclasses.dataclass(frozen=True)
class RingClosed:
    """memd does not map the client's ring any more, and writes nothing to it."""

    client_id: int


@dataclasses.dataclass(frozen=True)
class RingLost:
    """The client's ring went with its device; bytes may still arrive in it."""

    client_id: int
    reason: str


@dataclasses.dataclass(frozen=True)
class CopyEnded:
    """A copy is done, or its device was lost.

    Attributes:
        copy: Which.
        end: How.
        seconds: Since its slot was given.
    """

    copy: StagedCopy
    end: CopyEnd
    seconds: float


DeviceEvent = RingOpened | RingFailed | RingClosed | RingLost | CopyEnded


@dataclasses.dataclass
class _Ring:
    """A client's ring.

    Attributes:
        num_bytes: Of the ring.
        state: Where it is in its life.
        num_under_way: Copies that were sent and whose slot is not free.
        progress_at: Watched time of the last progress of its copies.
    """

    num_bytes: int
    state: RingState = RingState.OPENING
    num_under_way: int = 0
    progress_at: float = 0.0


class Device:
    """One device; driven by the control thread alone.

    Args:
        worker: Calls the driver; already running.
        staging: Slots of the worker's staging memory.
        timeouts: Bounds; ``copy_s`` is judged here.
        clock: Monotonic seconds.

    Attributes:
        name: Of the device, for people.
        staging: As given.
        lost_reason: Why the device was given up; None as long as it was not.
        is_stopped: Whether nothing is held of it and the worker has ended or will; its staging
            memory may be used otherwise.
    """

    def __init__(
        self,
        worker: Worker,
        staging: Staging,
        *,
        timeouts: Timeouts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = worker.name
        self.staging = staging
        self.lost_reason: str | None = None
        self.is_stopped = False
        self._worker = worker
        self._timeouts = timeouts
        self._clock = clock
        self._rings: dict[int, _Ring] = {}
        # Slots that are not free, by copy; the cancelled ones wait for the device.
        self._copies: dict[int, StagedCopy] = {}
        self._cancelled: set[int] = set()
        self._next_copy_id = 0
        self._watched_s = 0.0
        self._looked_at = clock()
        self._errand: Errand | None = None
        self._errand_seen_at = 0.0

    @property
    def num_rings(self) -> int:
        """Rings that are opening, open or closing."""
        return len(self._rings)

    @property
    def num_copies(self) -> int:
        """Copies that have not ended."""
        return len(self._copies) - len(self._cancelled)

    @property
    def is_waiting(self) -> bool:
        """Whether something is to come or to be judged: `poll` is due within a second."""
        return self.lost_reason is None and not self.is_stopped

    def ring_state(self, client_id: int) -> RingState | None:
        """Where a client's ring is in its life; None without one."""
        ring = self._rings.get(client_id)
        return None if ring is None else ring.state

    def open(self, client_id: int, handle: RingHandle) -> None:
        """Begin to map a client's ring; `RingOpened` or `RingFailed` follows.

        Raises:
            ValueError: The client has one, or the device is lost.
        """
        if client_id in self._rings or self.lost_reason is not None:
            raise ValueError(f"client {client_id} has a ring already, or the device is lost")
        self._rings[client_id] = _Ring(handle.num_bytes)
        self._worker.post(Open(client_id, handle))

    def begin(self, client_id: int, *, ring_offset: int, num_bytes: int) -> StagedCopy | None:
        """A copy whose slot may be filled now; None when there is no room for it.

        Args:
            client_id: Whose ring; OPEN.
            ring_offset: Where the bytes will go.
            num_bytes: How many, >= 1.

        Raises:
            ValueError: The client has no open ring, or the bytes leave it.
        """
        ring = self._rings.get(client_id)
        if ring is None or ring.state is not RingState.OPEN:
            raise ValueError(f"client {client_id} has no open ring")
        if not 0 <= ring_offset < ring_offset + num_bytes <= ring.num_bytes:
            raise ValueError(
                f"[{ring_offset}, +{num_bytes}) leaves a ring of {ring.num_bytes} bytes"
            )
        if len(self._copies) >= MAX_COPIES:
            return None
        slot = self.staging.reserve(num_bytes)
        if slot is None:
            return None
        copy = StagedCopy(self._next_copy_id, client_id, slot, ring_offset, self._clock())
        self._next_copy_id += 1
        self._copies[copy.copy_id] = copy
        return copy

    def send(self, copy: StagedCopy) -> None:
        """Have a filled copy made; `CopyEnded` follows. Its slot is not to be written any more."""
        ring = self._rings[copy.client_id]
        self.staging.sent(copy.slot)
        if not ring.num_under_way:
            ring.progress_at = self._watched_s
        ring.num_under_way += 1
        self._worker.post(
            Send(
                client_id=copy.client_id,
                copy_id=copy.copy_id,
                staging_offset=copy.slot.offset - self.staging.offset,
                ring_offset=copy.ring_offset,
                num_bytes=copy.slot.num_bytes,
            )
        )

    def cancel(self, copy: StagedCopy) -> None:
        """Give up a copy that was not sent; its slot is not to be written any more."""
        del self._copies[copy.copy_id]
        self.staging.free(copy.slot)

    def close(self, client_id: int) -> list[StagedCopy]:
        """End a client's ring, whatever its state; `RingClosed` or `RingLost` follows.

        A client without a ring, or with one that is CLOSING, is left as it is.

        Returns:
            Its copies that had not ended, oldest first; cancelled now.
        """
        ring = self._rings.get(client_id)
        if ring is None or ring.state is RingState.CLOSING:
            return []
        ring.state = RingState.CLOSING
        cancelled = [
            copy
            for copy in self._copies.values()
            if copy.client_id == client_id and copy.copy_id not in self._cancelled
        ]
        withdrawn = set(self._worker.withdraw(client_id))
        for copy in cancelled:
            is_sent = copy.slot.state is SlotState.IN_FLIGHT
            if is_sent and copy.copy_id not in withdrawn:
                self._cancelled.add(copy.copy_id)
                continue
            ring.num_under_way -= is_sent
            self.cancel(copy)
        self._worker.post(Close(client_id))
        return cancelled

    def poll(self) -> list[DeviceEvent]:
        """What has happened; judges also whether the driver still does what it should."""
        if self.lost_reason is not None or self.is_stopped:
            return []
        now = self._clock()
        self._watched_s += min(now - self._looked_at, _MAX_GAP_S)
        self._looked_at = now
        events: list[DeviceEvent] = []
        for outcome in self._worker.take_outcomes():
            self._on_outcome(outcome, events)
        if self.lost_reason is None:
            reason = self._what_hangs()
            if reason is not None:
                self._lose(reason, events)
        return events

    def check_integrity(self) -> None:
        """Verify that copies, slots and rings belong together.

        Raises:
            IntegrityError: They do not.
        """
        self.staging.check_integrity()
        if self.lost_reason is not None:
            return
        if not self._cancelled <= self._copies.keys():
            raise IntegrityError("a cancelled copy is forgotten before the device is done with it")
        num_slots = sum(self.staging.count(state) for state in SlotState)
        if num_slots != len(self._copies):
            raise IntegrityError(f"{len(self._copies)} copies hold {num_slots} slots")
        for client_id, ring in self._rings.items():
            mine = [copy for copy in self._copies.values() if copy.client_id == client_id]
            num_sent = sum(copy.slot.state is SlotState.IN_FLIGHT for copy in mine)
            if num_sent != ring.num_under_way:
                raise IntegrityError(
                    f"client {client_id} has {num_sent} copies under way, counted "
                    f"{ring.num_under_way}"
                )
        if any(copy.client_id not in self._rings for copy in self._copies.values()):
            raise IntegrityError("a copy has lost its ring")

    def _on_outcome(self, outcome: Outcome, events: list[DeviceEvent]) -> None:
        match outcome:
            case Opened(client_id):
                ring = self._rings[client_id]
                if ring.state is RingState.OPENING:
                    ring.state = RingState.OPEN
                    events.append(RingOpened(client_id))
            case Refused(client_id, reason):
                # A ring that is CLOSING already will be Closed next.
                if self._rings[client_id].state is RingState.OPENING:
                    del self._rings[client_id]
                    events.append(RingFailed(client_id, reason))
            case Landed(copy_id):
                self._on_landed(copy_id, events)
            case Closed(client_id):
                del self._rings[client_id]
                events.append(RingClosed(client_id))
            case Idle():
                # Not when another ring was asked for meanwhile.
                if not self._rings:
                    self._worker.post(Stop())
                    self.is_stopped = True
            case Lost(reason):
                self._lose(reason, events)

    def _on_landed(self, copy_id: int, events: list[DeviceEvent]) -> None:
        copy = self._copies.pop(copy_id)
        self.staging.free(copy.slot)
        ring = self._rings[copy.client_id]
        ring.num_under_way -= 1
        ring.progress_at = self._watched_s
        if copy_id in self._cancelled:
            self._cancelled.remove(copy_id)
        else:
            events.append(CopyEnded(copy, CopyEnd.DONE, self._clock() - copy.begun_at))

    def _what_hangs(self) -> str | None:
        errand = self._worker.errand
        if errand is not self._errand:
            self._errand, self._errand_seen_at = errand, self._watched_s
        if errand is not None and self._watched_s - self._errand_seen_at > errand.bound_s:
            return f"a driver call has not returned for {errand.bound_s:g} s"
        for client_id, ring in self._rings.items():
            is_stuck = self._watched_s - ring.progress_at > self._timeouts.copy_s
            if ring.num_under_way and is_stuck:
                return (
                    f"copies to client {client_id} have made no progress for "
                    f"{self._timeouts.copy_s:g} s"
                )
        return None

    def _lose(self, reason: str, events: list[DeviceEvent]) -> None:
        self.lost_reason = reason
        self._worker.is_abandoned = True
        _LOG.error("device %s is lost until memd ends: %s", self.name, reason)
        for copy in self._copies.values():
            if copy.copy_id not in self._cancelled:
                seconds = self._clock() - copy.begun_at
                events.append(CopyEnded(copy, CopyEnd.DEVICE_LOST, seconds))
        events.extend(RingLost(client_id, reason) for client_id in self._rings)
        self._copies.clear()
        self._cancelled.clear()
        self._rings.clear()
