"""Data path onto the device: memd copies fetched rows into a ring that the engine exported.

The ring only, never the engine's KV. A fetch is gathered into page-locked staging memory inside the
region, by whatever gathers into a landing ring on the host, and goes from there in one copy::

    copy = cuda_ipc.begin(client_id, ring_offset=..., num_bytes=rows.size * row_bytes)
    if copy is None:                       # no room now: try again after the next CopyEnded
        ...
    transfer.gather(..., rows=rows, landing_offset=copy.slot.offset)
    cuda_ipc.send(copy)
    ...
    for event in cuda_ipc.poll(): ...      # CopyEnded(copy, DONE, seconds)

The control thread makes no CUDA call and waits for none: each device has a thread of its own
(`memd.cuda.worker`), which exists, as its context does, from the first ring to the last. What
happens to rings and copies, above all when a client or a device is lost, is told in
`memd.cuda.device`.

What holds for the engine:

- it keeps the ring allocated until memd has answered its ``Goodbye``: freeing memory that another
  process maps is undefined;
- ring space is free again when the device has *read* it, which is later than when the reading was
  launched;
- after ``device_lost`` it uses the ring for nothing any more, because copies may still arrive.

Off unless staging memory is configured. Not yet run on a GPU.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from typing import TYPE_CHECKING, Any

from memd.cuda.device import (
    CopyEnd,
    CopyEnded,
    Device,
    DeviceEvent,
    RingClosed,
    RingFailed,
    RingLost,
    RingOpened,
    RingState,
    StagedCopy,
)
from memd.cuda.driver import load_driver
from memd.cuda.errors import RingRefused
from memd.cuda.registration import CHUNK_BYTES
from memd.cuda.staging import SLOT_ALIGNMENT, Staging
from memd.cuda.worker import Timeouts, Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from memd.cuda.driver import Driver
    from memd.cuda.ring import RingHandle

__all__ = ["CudaCounters", "CudaIpc", "start_thread"]

_STOP_POLL_S = 0.001


@dataclasses.dataclass
class CudaCounters:
    """What was done on all devices; only ever grow.

    Attributes:
        rings_opened: Rings that could be copied to.
        rings_failed: Rings that memd could not map.
        rings_lost: Rings that went with their device.
        copies_done: Copies that landed.
        copies_lost: Copies that ended because their device was lost.
        copies_cancelled: Copies of clients that left.
        bytes_copied: Bytes that landed.
        copy_ns: Nanoseconds from slot to landing, summed over copies that landed.
        waits_for_slot: Times that there was no room for a copy.
    """

    rings_opened: int = 0
    rings_failed: int = 0
    rings_lost: int = 0
    copies_done: int = 0
    copies_lost: int = 0
    copies_cancelled: int = 0
    bytes_copied: int = 0
    copy_ns: int = 0
    waits_for_slot: int = 0


def start_thread(worker: Worker) -> None:
    """Run a worker on a thread of its own."""
    # A daemon thread: one that hangs in the driver must not keep the process from its end.
    threading.Thread(target=worker.run, name=f"memd-{worker.name[:12]}", daemon=True).start()


class CudaIpc:
    """All rings on all devices; driven by the control thread alone.

    Args:
        memory: The region, uint8 [region_bytes]; slots carry offsets into it.
        set_aside: Gives bytes of the region, from a memory page on, as an offset; None when there
            is no room.
        give_back: Takes an offset of ``set_aside`` back. Not called for a lost device.
        staging_bytes: Bytes to set aside for each device that is in use, > 0.
        load: Gives the driver; called on a device's own thread.
        timeouts: What is too long.
        chunk_bytes: Bytes to page-lock at a time.
        notify: Called from a device's thread when `poll` has something to tell; must not block.
        spawn: Runs a worker, by default on a thread of its own.
        clock: Monotonic seconds.

    Attributes:
        counters: What was done.
    """

    def __init__(
        self,
        memory: npt.NDArray[np.uint8],
        *,
        set_aside: Callable[[int], int | None],
        give_back: Callable[[int], object],
        staging_bytes: int,
        load: Callable[[], Driver] = load_driver,
        timeouts: Timeouts | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        notify: Callable[[], None] = lambda: None,
        spawn: Callable[[Worker], None] = start_thread,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if staging_bytes < SLOT_ALIGNMENT:
            raise ValueError(
                f"staging_bytes must be at least {SLOT_ALIGNMENT}, got {staging_bytes}"
            )
        self.counters = CudaCounters()
        self._memory = memory
        self._set_aside = set_aside
        self._give_back = give_back
        self._staging_bytes = staging_bytes
        self._load = load
        self._timeouts = timeouts or Timeouts()
        self._chunk_bytes = chunk_bytes
        self._notify = notify
        self._spawn = spawn
        self._clock = clock
        # By UUID; a lost device stays.
        self._devices: dict[bytes, Device] = {}
        # Of clients whose ring has not come to an end.
        self._device_of: dict[int, Device] = {}

    @property
    def max_copy_bytes(self) -> int:
        """Bytes of the longest copy, and so of the longest ring."""
        most = min(self._staging_bytes, self._chunk_bytes)
        return most - most % SLOT_ALIGNMENT

    @property
    def is_waiting(self) -> bool:
        """Whether `poll` must be called within a second, even if nobody notifies."""
        return any(device.is_waiting for device in self._devices.values())

    def ring_state(self, client_id: int) -> RingState | None:
        """Where a client's ring is in its life; None without one."""
        device = self._device_of.get(client_id)
        return None if device is None else device.ring_state(client_id)

    def needs_staging(self, device_uuid: bytes) -> bool:
        """Whether `open` of a ring on this device would set memory aside."""
        return device_uuid not in self._devices

    def require_fit(self, handle: RingHandle) -> None:
        """Check that a copy can be as long as the ring.

        Raises:
            RingRefused: It cannot.
        """
        if handle.num_bytes > self.max_copy_bytes:
            raise RingRefused(
                f"a landing ring of {handle.num_bytes} bytes is longer than memd's staging memory "
                f"allows ({self.max_copy_bytes}): make the ring smaller or the staging memory "
                f"larger"
            )

    def open(self, client_id: int, handle: RingHandle) -> None:
        """Begin to map a client's ring; `RingOpened` or `RingFailed` follows.

        Raises:
            RingRefused: It is known already that this cannot be.
        """
        self.require_fit(handle)
        device = self._devices.get(handle.device_uuid)
        if device is None:
            device = self._devices[handle.device_uuid] = self._make_device(handle.device_uuid)
        if device.lost_reason is not None:
            raise RingRefused(
                f"memd has given the device up ({device.lost_reason}); start memd again, or use "
                f"another data path"
            )
        device.open(client_id, handle)
        self._device_of[client_id] = device

    def begin(self, client_id: int, *, ring_offset: int, num_bytes: int) -> StagedCopy | None:
        """A copy whose slot may be filled now; None when there is no room, see `Device.begin`."""
        copy = self._ring_device(client_id).begin(
            client_id, ring_offset=ring_offset, num_bytes=num_bytes
        )
        self.counters.waits_for_slot += copy is None
        return copy

    def send(self, copy: StagedCopy) -> None:
        """Have a filled copy made; `CopyEnded` follows."""
        self._ring_device(copy.client_id).send(copy)

    def cancel(self, copy: StagedCopy) -> None:
        """Give up a copy that was not sent."""
        self._ring_device(copy.client_id).cancel(copy)
        self.counters.copies_cancelled += 1

    def close(self, client_id: int) -> list[StagedCopy]:
        """End a client's ring, if it has one; see `Device.close`.

        Returns:
            Its copies that had not ended; cancelled now.
        """
        device = self._device_of.get(client_id)
        cancelled = [] if device is None else device.close(client_id)
        self.counters.copies_cancelled += len(cancelled)
        return cancelled

    def poll(self) -> list[DeviceEvent]:
        """What has happened since the last call; microseconds when nothing has."""
        events = []
        for device_uuid, device in list(self._devices.items()):
            for event in device.poll():
                self._count(event)
                events.append(event)
            if device.is_stopped:
                del self._devices[device_uuid]
                self._give_back(device.staging.offset)
        return events

    def stop(
        self, timeout_s: float, *, on_event: Callable[[DeviceEvent], None] = lambda event: None
    ) -> bool:
        """Close every ring and end every thread, for memd's own end; blocks within a bound.

        Args:
            timeout_s: The bound, in seconds.
            on_event: Called with what `poll` would have told.

        Returns:
            Whether nothing is held of any device; False after the bound, or with one that is lost.
        """
        deadline = self._clock() + timeout_s
        for client_id in list(self._device_of):
            self.close(client_id)
        while True:
            for event in self.poll():
                on_event(event)
            if not self.is_waiting or self._clock() >= deadline:
                break
            time.sleep(_STOP_POLL_S)
        return not self._devices

    def stats(self) -> dict[str, Any]:
        """Plain data: ``counters``, and ``devices``, one map each.

        Keys of a device: ``uuid``, ``rings``, ``copies``, ``staging_bytes``,
        ``staging_bytes_used``, ``lost_reason``.
        """
        return {
            "counters": dataclasses.asdict(self.counters),
            "devices": [
                {
                    "uuid": device.name,
                    "rings": device.num_rings,
                    "copies": device.num_copies,
                    "staging_bytes": device.staging.num_bytes,
                    "staging_bytes_used": device.staging.bytes_used,
                    "lost_reason": device.lost_reason,
                }
                for device in self._devices.values()
            ],
        }

    def check_integrity(self) -> None:
        """Verify every device's books.

        Raises:
            IntegrityError: Something does not hold.
        """
        for device in self._devices.values():
            device.check_integrity()

    def _ring_device(self, client_id: int) -> Device:
        device = self._device_of.get(client_id)
        if device is None:
            raise ValueError(f"client {client_id} has no ring")
        return device

    def _make_device(self, device_uuid: bytes) -> Device:
        offset = self._set_aside(self._staging_bytes)
        if offset is None:
            raise RingRefused(
                f"the region has no {self._staging_bytes} contiguous bytes left for staging; make "
                f"it larger, or the staging memory smaller"
            )
        worker = Worker(
            device_uuid,
            self._memory[offset : offset + self._staging_bytes],
            load=self._load,
            timeouts=self._timeouts,
            chunk_bytes=self._chunk_bytes,
            notify=self._notify,
        )
        staging = Staging(offset, self._staging_bytes, chunk_bytes=self._chunk_bytes)
        device = Device(worker, staging, timeouts=self._timeouts, clock=self._clock)
        self._spawn(worker)
        return device

    def _count(self, event: DeviceEvent) -> None:
        counters = self.counters
        match event:
            case RingOpened():
                counters.rings_opened += 1
            case RingFailed(client_id):
                counters.rings_failed += 1
                del self._device_of[client_id]
            case RingClosed(client_id):
                del self._device_of[client_id]
            case RingLost(client_id):
                counters.rings_lost += 1
                del self._device_of[client_id]
            case CopyEnded(copy, CopyEnd.DONE, seconds):
                counters.copies_done += 1
                counters.bytes_copied += copy.slot.num_bytes
                counters.copy_ns += int(seconds * 1e9)
            case CopyEnded():
                counters.copies_lost += 1
