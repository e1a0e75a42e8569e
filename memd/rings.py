"""Clients' landing rings on devices, and the staging memory before them; no messages here.

Stands between the service, which knows requests, and `memd.transfer.cuda_ipc`, which knows devices.
A client's ring lives from its ``Hello`` to the moment that memd maps it no more::

    open ──> OPENING ──> OPEN ── close ──> CLOSED
                │          └─────────────> LOST      its device was given up
                └──> FAILED                          it was never mapped

CLOSED and FAILED rings are their owner's again. Of a LOST one nobody knows: memd may still map it,
and bytes may still arrive.

Everything here runs on the control thread and waits for nothing: what takes long is a generator
(`memd.turns`), and what devices have to say comes out of `Rings.poll`. No CUDA driver is loaded
before the first ring. Not yet run on a GPU.
"""

from __future__ import annotations

import dataclasses
import enum
import time
from typing import TYPE_CHECKING, Any

from memd.cuda.device import RingClosed, RingFailed, RingLost, RingOpened
from memd.cuda.driver import load_driver
from memd.cuda.errors import DeviceLost, RingRefused
from memd.cuda.ring import RingHandle
from memd.errors import IntegrityError
from memd.transfer.cuda_ipc import CudaIpc, start_thread
from memd.turns import Wait

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    import numpy as np
    import numpy.typing as npt

    from memd.cuda.device import DeviceEvent, StagedCopy
    from memd.cuda.driver import Driver
    from memd.cuda.worker import Timeouts, Worker
    from memd.protocol import DeviceRing
    from memd.store import Store

__all__ = ["ClientRing", "RingPhase", "Rings"]

# `CudaIpc.poll` is due within a second.
_POLL_INTERVAL_S = 0.5
# Some 3 ms of taking memory.
_SLICE_BYTES = 16 << 20


class RingPhase(enum.Enum):
    """Life of a client's ring."""

    OPENING = "opening"
    OPEN = "open"
    CLOSED = "closed"
    FAILED = "failed"
    LOST = "lost"


@dataclasses.dataclass(eq=False)
class ClientRing:
    """One client's ring; changed by `Rings` alone.

    Attributes:
        handle: What names it.
        num_rows: Rows of the client's layout in it.
        phase: Where it is in its life.
        reason: Why it is FAILED or LOST; empty otherwise.
        is_closing: Whether its client has left it, or is leaving.
    """

    handle: RingHandle
    num_rows: int
    phase: RingPhase = RingPhase.OPENING
    reason: str = ""
    is_closing: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nothing will happen to it any more."""
        return self.phase in (RingPhase.CLOSED, RingPhase.FAILED, RingPhase.LOST)

    def require_open(self) -> None:
        """Check that copies to it may begin.

        Raises:
            DeviceLost: Its device was given up, or memd is.
        """
        if self.phase is not RingPhase.OPEN or self.is_closing:
            raise self.lost()

    def lost(self) -> DeviceLost:
        """What whoever wants to copy to it is told, when that cannot be any more."""
        return DeviceLost(
            "memd has given up the device of the landing ring "
            f"({self.reason or 'memd is ending'}); "
            "use the ring for nothing any more, and another data path, or start memd again"
        )


class Rings:
    """All rings of all clients.

    Args:
        store: Where staging memory is taken from.
        memory: The region, uint8 [region_bytes].
        staging_bytes: Bytes to set aside for each device that is in use.
        fill: Puts memory behind part of the region, where it does not come with some; False if
            there is none.
        load: Gives the CUDA driver; called on a device's own thread.
        notify: Called from such a thread when `poll` has something to tell; must not block.
        timeouts: What is too long.
        spawn: Runs a worker; by default on a thread of its own.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        store: Store,
        memory: npt.NDArray[np.uint8],
        *,
        staging_bytes: int,
        fill: Callable[[int, int], bool] | None = None,
        load: Callable[[], Driver] = load_driver,
        notify: Callable[[], None] = lambda: None,
        timeouts: Timeouts | None = None,
        spawn: Callable[[Worker], None] = start_thread,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._staging_bytes = staging_bytes
        self._fill = fill
        self._clock = clock
        self._cuda = CudaIpc(
            memory,
            set_aside=self._take_prepared,
            give_back=store.give_back,
            staging_bytes=staging_bytes,
            load=load,
            timeouts=timeouts,
            notify=notify,
            spawn=spawn,
            clock=clock,
        )
        # Those that are not over, by client.
        self._rings: dict[int, ClientRing] = {}
        # Devices that staging memory is being made ready for.
        self._preparing: set[bytes] = set()
        # Staging memory that is ready; for no longer than `CudaIpc.open` takes.
        self._prepared: int | None = None
        self._poll_at = clock()

    @property
    def num_closing(self) -> int:
        """Rings whose clients wait for them to be closed, or are gone."""
        return sum(ring.is_closing for ring in self._rings.values())

    def next_due(self) -> float | None:
        """When `poll` has to be called at the latest, seconds of the clock; None if never."""
        return self._poll_at if self._cuda.is_waiting else None

    def read(self, ring: DeviceRing, row_bytes: int) -> ClientRing:
        """What a client says of its ring, checked as far as can be done without a driver.

        Raises:
            RingRefused: It cannot be one; the message says why.
        """
        handle = RingHandle(
            handle=ring.handle,
            base_offset=ring.base_offset,
            num_bytes=ring.num_bytes,
            device_uuid=ring.device_uuid,
        )
        num_rows, rest = divmod(ring.num_bytes, row_bytes)
        if rest:
            raise RingRefused(
                f"a landing ring holds whole rows of {row_bytes} bytes, got {ring.num_bytes} bytes"
            )
        self._cuda.require_fit(handle)
        return ClientRing(handle, num_rows)

    def open(
        self, client_id: int, ring: ClientRing, scrub: Callable[[int], object]
    ) -> Generator[Wait, None, None]:
        """Map a client's ring; it is OPEN at the end. Given up or failed, it is closed again.

        Args:
            client_id: Whose.
            ring: From `read`.
            scrub: Zeroes so many bytes of the region that were given back.

        Raises:
            RingRefused: memd cannot map it, or has no staging memory for it.
            DeviceLost: Its device was given up meanwhile.
        """
        yield from self._prepare(ring.handle.device_uuid, scrub)
        try:
            self._cuda.open(client_id, ring.handle)
        finally:
            if self._prepared is not None:
                self._store.give_back(self._prepared)
                self._prepared = None
        self._rings[client_id] = ring
        try:
            while ring.phase is RingPhase.OPENING:
                yield Wait.EVENT
        finally:
            if ring.phase is not RingPhase.OPEN:
                self.close(client_id)
        if ring.phase is RingPhase.FAILED:
            raise RingRefused(ring.reason)
        ring.require_open()

    def begin(self, client_id: int, *, ring_offset: int, num_bytes: int) -> StagedCopy | None:
        """A copy whose slot may be filled now; None when there is no room for it."""
        return self._cuda.begin(client_id, ring_offset=ring_offset, num_bytes=num_bytes)

    def send(self, copy: StagedCopy) -> None:
        """Have a filled copy made; `poll` tells its end."""
        self._cuda.send(copy)

    def cancel(self, copy: StagedCopy) -> None:
        """Give up a copy that was not sent."""
        self._cuda.cancel(copy)

    def close(self, client_id: int) -> None:
        """End a client's ring, if it has one that is not over; its copies are told of no more."""
        ring = self._rings.get(client_id)
        if ring is not None:
            ring.is_closing = True
            self._cuda.close(client_id)

    def poll(self) -> list[DeviceEvent]:
        """What has happened since the last call; microseconds when nothing has."""
        self._poll_at = self._clock() + _POLL_INTERVAL_S
        events = self._cuda.poll()
        for event in events:
            self._follow(event)
        return events

    def stop(self, timeout_s: float) -> bool:
        """Close every ring and end every thread, for memd's own end; blocks within a bound.

        Returns:
            Whether nothing is held of any device.
        """
        for client_id in list(self._rings):
            self.close(client_id)
        return self._cuda.stop(timeout_s, on_event=self._follow)

    def stats(self) -> dict[str, Any]:
        """Plain data; keys in ``memd.metrics``."""
        return self._cuda.stats()

    def check_integrity(self) -> None:
        """Verify the books of rings, copies and slots.

        Raises:
            IntegrityError: They do not hold.
        """
        self._cuda.check_integrity()
        for client_id, ring in self._rings.items():
            if ring.is_over or self._cuda.ring_state(client_id) is None:
                raise IntegrityError(f"client {client_id}'s ring is over and still known")

    def _prepare(
        self, device_uuid: bytes, scrub: Callable[[int], object]
    ) -> Generator[Wait, None, None]:
        """Have staging memory ready, if the device is not in use yet."""
        while device_uuid in self._preparing:
            yield Wait.TURN
        if not self._cuda.needs_staging(device_uuid):
            return
        self._preparing.add(device_uuid)
        offset, size = None, self._staging_bytes
        try:
            while (offset := self._store.set_aside(size)) is None:
                # Memory of a client that just left may only wait to be zeroed.
                if not self._store.could_set_aside(size):
                    return
                scrub(_SLICE_BYTES)
                yield Wait.TURN
            for start in range(0, size if self._fill else 0, _SLICE_BYTES):
                assert self._fill is not None, "else there is nothing to fill"
                if not self._fill(offset + start, min(_SLICE_BYTES, size - start)):
                    raise RingRefused(
                        f"the host has no memory for {size} bytes of staging any more; give memd "
                        "a smaller --bytes, or the host fewer programs"
                    )
                yield Wait.TURN
            self._prepared, offset = offset, None
        finally:
            self._preparing.remove(device_uuid)
            if offset is not None:
                self._store.give_back(offset)

    def _take_prepared(self, num_bytes: int) -> int | None:
        del num_bytes
        offset, self._prepared = self._prepared, None
        return offset

    def _follow(self, event: DeviceEvent) -> None:
        match event:
            case RingOpened(client_id):
                self._rings[client_id].phase = RingPhase.OPEN
            case RingFailed(client_id, reason):
                self._end(client_id, RingPhase.FAILED, reason)
            case RingClosed(client_id):
                self._end(client_id, RingPhase.CLOSED)
            case RingLost(client_id, reason):
                self._end(client_id, RingPhase.LOST, reason)

    def _end(self, client_id: int, phase: RingPhase, reason: str = "") -> None:
        ring = self._rings.pop(client_id)
        ring.phase, ring.reason = phase, reason
