"""memd copies into rings on devices: what lands, what is kept, and what ends when something fails.

Workers run here when the test says so (`Daemon.work`), but for the last tests, where each has its
thread.
"""

from __future__ import annotations

import mmap
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from memd.cuda import device as device_module
from memd.cuda.device import (
    CopyEnd,
    CopyEnded,
    DeviceEvent,
    RingClosed,
    RingFailed,
    RingLost,
    RingOpened,
    StagedCopy,
)
from memd.cuda.errors import DriverMissing, RingRefused
from memd.cuda.export import export_ring
from memd.cuda.fake import FakeDriver
from memd.cuda.fake_machine import FakeAllocation, FakeMachine
from memd.cuda.ring import RingHandle
from memd.cuda.staging import SLOT_ALIGNMENT, SlotState
from memd.cuda.worker import Timeouts, Worker
from memd.errors import IntegrityError
from memd.transfer import HostTransfer
from memd.transfer.cuda_ipc import CudaIpc

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from memd.cuda.driver import Driver

ROW = 128
NUM_ROWS = 64
STAGING = 1 << 13
RING = 1 << 12
TIMEOUTS = Timeouts(start_s=60.0, call_s=10.0, copy_s=5.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Daemon:
    """memd's side with engines around it: a region of numbered rows, and staging behind them."""

    def __init__(
        self,
        *,
        num_devices: int = 1,
        load: Callable[[], Driver] | None = None,
        set_aside: Callable[[int], int | None] | None = None,
        **options: object,
    ) -> None:
        self.machine = FakeMachine(num_devices)
        self.driver = FakeDriver(self.machine)
        self.engine = FakeDriver(self.machine)
        self.engine.init()
        self.clock = Clock()
        self.num_loads = 0
        self.workers: list[Worker] = []
        pages = NUM_ROWS * ROW
        self.memory = np.frombuffer(mmap.mmap(-1, pages + 4 * STAGING), dtype=np.uint8)
        self.rows = self.memory[:pages].reshape(NUM_ROWS, ROW)
        self.rows[:] = np.arange(NUM_ROWS, dtype=np.uint8)[:, None] + 1
        self.transfer = HostTransfer(self.memory)
        self.free_staging = [pages + n * STAGING for n in range(4)]
        self.rings: dict[int, FakeAllocation] = {}
        self.events: list[DeviceEvent] = []
        options.setdefault("clock", self.clock)
        options.setdefault("spawn", self.workers.append)
        options.setdefault("timeouts", TIMEOUTS)
        self.path = CudaIpc(
            self.memory,
            set_aside=set_aside or (lambda num_bytes: self.free_staging.pop()),
            give_back=self.free_staging.append,
            staging_bytes=STAGING,
            load=load or self.load,
            **options,  # type: ignore[arg-type]
        )

    def load(self) -> Driver:
        self.num_loads += 1
        return self.driver

    def handle(self, client_id: int, *, device: int = 0) -> RingHandle:
        """Device memory of a client; its ring lies in the middle."""
        allocation = self.rings[client_id] = self.machine.allocate(3 * RING, device=device)
        return export_ring(
            self.engine, device=device, address=allocation.address + RING, num_bytes=RING
        )

    def open(self, client_id: int, *, device: int = 0) -> None:
        self.path.open(client_id, self.handle(client_id, device=device))
        self.work()
        assert self.take() == [RingOpened(client_id)]

    def fill(self, client_id: int, rows: Sequence[int], *, ring_row: int = 0) -> StagedCopy | None:
        copy = self.path.begin(client_id, ring_offset=ring_row * ROW, num_bytes=len(rows) * ROW)
        if copy is not None:
            self.transfer.gather(
                source_offset=0,
                row_bytes=ROW,
                rows=np.array(rows, dtype=np.int64),
                landing_offset=copy.slot.offset,
            )
        return copy

    def fetch(self, client_id: int, rows: Sequence[int], *, ring_row: int = 0) -> StagedCopy:
        copy = self.fill(client_id, rows, ring_row=ring_row)
        assert copy is not None
        self.path.send(copy)
        return copy

    def work(self, steps: int = 12) -> None:
        for worker in self.workers:
            with self.driver.as_thread(worker.name):
                for _ in range(steps):
                    worker.step()

    def take(self) -> list[DeviceEvent]:
        self.path.check_integrity()
        events = self.path.poll()
        self.path.check_integrity()
        return events

    def ended(self) -> list[tuple[StagedCopy, CopyEnd]]:
        return [(e.copy, e.end) for e in self.take() if isinstance(e, CopyEnded)]

    def pass_time(self, seconds: float) -> list[DeviceEvent]:
        """Time passes while the control thread looks."""
        events: list[DeviceEvent] = []
        for _ in range(round(seconds * 2)):
            self.clock.now += 0.5
            events += self.path.poll()
        return events

    def landed(self, client_id: int, count: int, *, ring_row: int = 0) -> list[int]:
        ring = self.rings[client_id].memory[RING + ring_row * ROW :][: count * ROW]
        rows = ring.reshape(count, ROW)
        assert (rows == rows[:, :1]).all()
        return [int(value) - 1 for value in rows[:, 0]]

    def is_untouched(self, client_id: int) -> bool:
        return bool((self.rings[client_id].memory == 0xEE).all())

    def holds_nothing(self) -> bool:
        assert self.machine.violations == []
        return not any(self.driver.held().values())

    def assert_clean_end(self) -> None:
        assert self.holds_nothing()
        assert self.driver.ended_by_release == []
        assert len(self.free_staging) == 4
        assert self.path.stats()["devices"] == []


def test_nothing_of_cuda_happens_before_a_client_asks() -> None:
    daemon = Daemon()
    assert daemon.take() == []
    assert (daemon.num_loads, daemon.workers, len(daemon.free_staging)) == (0, [], 4)
    assert not daemon.path.is_waiting


def test_a_fetch_lands_in_the_ring_by_one_copy() -> None:
    daemon = Daemon()
    daemon.open(1)
    copy = daemon.fetch(1, [9, 3, 3, 40], ring_row=5)
    daemon.work()
    assert (daemon.take(), daemon.is_untouched(1)) == ([], True)
    daemon.driver.complete()
    daemon.work()

    assert daemon.ended() == [(copy, CopyEnd.DONE)]
    assert daemon.landed(1, 4, ring_row=5) == [9, 3, 3, 40]
    assert [call for call, _ in daemon.driver.calls].count("cuMemcpyHtoDAsync") == 1
    written = np.flatnonzero(daemon.rings[1].memory != 0xEE)
    assert (written[0], written[-1]) == (RING + 5 * ROW, RING + 9 * ROW - 1)
    assert copy.slot.state is SlotState.FREE


def test_the_last_ring_takes_context_page_locks_and_staging_with_it() -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.open(2)
    assert daemon.driver.held()["contexts"] == 1
    assert daemon.driver.registered_bytes == STAGING
    for client_id in (1, 2):
        assert not daemon.holds_nothing()
        daemon.path.close(client_id)
        daemon.work()
        assert daemon.take() == [RingClosed(client_id)]
        daemon.machine.free(daemon.rings[client_id])
    daemon.assert_clean_end()


def test_a_device_can_be_used_again_after_its_last_ring() -> None:
    daemon = Daemon()
    for client_id in (1, 2):
        daemon.open(client_id)
        daemon.path.close(client_id)
        daemon.work()
        assert daemon.take() == [RingClosed(client_id)]
        daemon.assert_clean_end()


def test_a_ring_that_opens_while_the_last_one_closes_is_not_lost_in_between() -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.path.close(1)
    daemon.work()
    daemon.path.open(2, daemon.handle(2))
    assert daemon.take() == [RingClosed(1)]
    daemon.work()
    assert daemon.take() == [RingOpened(2)]
    daemon.fetch(2, [4])
    daemon.work()
    daemon.driver.complete()
    daemon.path.close(2)
    daemon.work()
    assert daemon.take() == [RingClosed(2)]
    daemon.assert_clean_end()


def test_no_room_is_a_value_and_comes_back_with_the_next_landing() -> None:
    daemon = Daemon()
    daemon.open(1)
    rows = range(STAGING // ROW // 2)
    copies = [daemon.fetch(1, rows), daemon.fetch(1, rows)]
    assert daemon.fill(1, [1]) is None
    assert daemon.path.counters.waits_for_slot == 1
    daemon.work()
    daemon.driver.complete(count=1)
    daemon.work()
    assert daemon.ended() == [(copies[0], CopyEnd.DONE)]
    assert daemon.fill(1, [1]) is not None


def test_copies_that_wait_for_the_worker_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_module, "MAX_COPIES", 3)
    daemon = Daemon()
    daemon.open(1)
    for _ in range(3):
        daemon.fetch(1, [1])
    assert daemon.fill(1, [1]) is None


def test_staging_is_not_written_while_a_copy_reads_it() -> None:
    daemon = Daemon()
    daemon.open(1)
    slots = [daemon.fetch(1, [n]).slot for n in range(STAGING // SLOT_ALIGNMENT)]
    daemon.work()
    daemon.driver.complete(count=len(slots) // 2)
    daemon.work()
    assert len(daemon.ended()) == len(slots) // 2
    while daemon.fill(1, [60]) is not None:
        pass
    daemon.driver.complete()
    assert daemon.machine.violations == []


def test_each_clients_copies_end_in_their_order_and_clients_do_not_wait_for_each_other() -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.open(2)
    mine = [daemon.fetch(1, [n], ring_row=n) for n in range(3)]
    other = daemon.fetch(2, [50])
    daemon.work()
    first, second = daemon.driver.busy_streams()
    daemon.driver.complete(second)
    daemon.work()
    assert daemon.ended() == [(other, CopyEnd.DONE)]
    daemon.driver.complete(first, count=2)
    daemon.work()
    assert daemon.ended() == [(copy, CopyEnd.DONE) for copy in mine[:2]]
    assert daemon.landed(1, 2) == [0, 1]


@pytest.mark.parametrize(("offset", "count"), [(-1, ROW), (RING, 1), (RING - ROW, ROW + 1), (0, 0)])
def test_bytes_outside_the_ring_are_a_mistake_of_the_caller(offset: int, count: int) -> None:
    daemon = Daemon()
    daemon.open(1)
    with pytest.raises(ValueError, match="leaves a ring of 4096 bytes"):
        daemon.path.begin(1, ring_offset=offset, num_bytes=count)


def test_a_client_without_an_open_ring_copies_nothing() -> None:
    daemon = Daemon()
    with pytest.raises(ValueError, match="client 1 has no ring"):
        daemon.path.begin(1, ring_offset=0, num_bytes=ROW)
    daemon.path.open(1, daemon.handle(1))
    with pytest.raises(ValueError, match="no open ring"):
        daemon.path.begin(1, ring_offset=0, num_bytes=ROW)
    with pytest.raises(ValueError, match="has a ring already"):
        daemon.path.open(1, daemon.handle(1))
    daemon.work()
    daemon.path.close(1)
    with pytest.raises(ValueError, match="no open ring"):
        daemon.path.begin(1, ring_offset=0, num_bytes=ROW)


# Rings that are refused.


def test_a_ring_longer_than_staging_is_refused_at_once() -> None:
    daemon = Daemon()
    long = RingHandle(handle=bytes(64), base_offset=0, num_bytes=STAGING + 1, device_uuid=bytes(16))
    with pytest.raises(RingRefused, match=f"ring of {STAGING + 1} bytes .* allows \\({STAGING}\\)"):
        daemon.path.open(1, long)
    assert daemon.workers == []


def test_a_region_without_room_for_staging_refuses_the_ring_at_once() -> None:
    daemon = Daemon(set_aside=lambda num_bytes: None)
    with pytest.raises(RingRefused, match="no 8192 contiguous bytes left for staging"):
        daemon.path.open(1, daemon.handle(1))
    assert daemon.path.ring_state(1) is None


def test_without_a_driver_the_ring_is_refused_with_what_would_help() -> None:
    def load() -> Driver:
        raise DriverMissing("libcuda.so.1 cannot be loaded: pass the GPU through")

    daemon = Daemon(load=load)
    daemon.path.open(1, daemon.handle(1))
    daemon.work()
    assert daemon.take() == [RingFailed(1, "libcuda.so.1 cannot be loaded: pass the GPU through")]
    daemon.assert_clean_end()


def test_a_device_that_memd_does_not_see_is_refused_without_a_context() -> None:
    daemon = Daemon()
    handle = RingHandle(handle=bytes(64), base_offset=0, num_bytes=1, device_uuid=bytes(16))
    daemon.path.open(1, handle)
    daemon.work()
    (event,) = daemon.take()
    assert isinstance(event, RingFailed)
    assert "CUDA_VISIBLE_DEVICES" in event.reason
    assert "cuDevicePrimaryCtxRetain" not in [call for call, _ in daemon.driver.calls]
    daemon.assert_clean_end()


@pytest.mark.parametrize(
    "call",
    [
        "cuInit",
        "cuDeviceGetCount",
        "cuDeviceGet",
        "cuDeviceGetUuid",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuDeviceGetAttribute",
        "cuMemHostRegister",
        "cuIpcOpenMemHandle",
        "cuStreamCreate",
    ],
)
def test_a_start_that_fails_anywhere_refuses_the_ring_and_leaves_nothing(call: str) -> None:
    daemon = Daemon()
    daemon.driver.fail(call, "CUDA_ERROR_OUT_OF_MEMORY")
    daemon.path.open(1, daemon.handle(1))
    daemon.work()
    (event,) = daemon.take()
    assert isinstance(event, RingFailed)
    assert f"{call}: CUDA_ERROR_OUT_OF_MEMORY" in event.reason
    daemon.assert_clean_end()
    # It is the attempt that failed, not the device.
    daemon.open(2)


def test_a_refused_ring_takes_no_other_with_it() -> None:
    daemon = Daemon()
    daemon.open(1)
    gone = daemon.handle(2)
    daemon.machine.free(daemon.rings[2])
    daemon.path.open(2, gone)
    daemon.work()
    (event,) = daemon.take()
    assert isinstance(event, RingFailed)
    daemon.fetch(1, [5])
    daemon.work()
    daemon.driver.complete()
    daemon.work()
    assert [end for _, end in daemon.ended()] == [CopyEnd.DONE]


# Rings that are closed: by Goodbye, or by death.


def test_a_ring_is_unmapped_only_when_the_device_has_done_its_copies() -> None:
    daemon = Daemon()
    daemon.open(1)
    copies = [daemon.fetch(1, [n], ring_row=n) for n in range(2)]
    daemon.work()
    assert daemon.path.close(1) == copies
    daemon.work()
    assert daemon.take() == []
    assert {copy.slot.state for copy in copies} == {SlotState.IN_FLIGHT}
    daemon.driver.complete()
    daemon.work()

    # Cancelled for whoever waited: they end only once.
    assert daemon.take() == [RingClosed(1)]
    assert {copy.slot.state for copy in copies} == {SlotState.FREE}
    daemon.assert_clean_end()


def test_copies_that_were_not_begun_are_withdrawn_and_never_made() -> None:
    daemon = Daemon()
    daemon.open(1)
    filling = daemon.fill(1, [1])
    queued = daemon.fetch(1, [2])
    assert daemon.path.close(1) == [filling, queued]
    assert queued.slot.state is SlotState.FREE
    daemon.work()
    assert daemon.take() == [RingClosed(1)]
    assert daemon.driver.complete() == 0
    assert daemon.is_untouched(1)
    daemon.assert_clean_end()


def test_closing_one_ring_withdraws_no_copy_of_another() -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.open(2)
    daemon.fetch(1, [1])
    kept = daemon.fetch(2, [2])
    daemon.path.close(1)
    daemon.work()
    daemon.driver.complete()
    daemon.work()
    assert daemon.take()[0] == RingClosed(1)
    assert (daemon.is_untouched(1), daemon.landed(2, 1)) == (True, [2])
    assert kept.slot.state is SlotState.FREE


def test_a_dead_clients_device_memory_is_held_no_longer_than_its_copies_take() -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.fetch(1, [1])
    daemon.work()
    daemon.machine.kill_owner(daemon.rings[1])
    daemon.path.close(1)
    daemon.work()
    assert daemon.machine.held_bytes() == 3 * RING
    daemon.driver.complete()
    daemon.work()
    assert daemon.take() == [RingClosed(1)]
    assert daemon.machine.held_bytes() == 0
    daemon.assert_clean_end()


def test_an_owner_may_free_its_ring_once_it_is_closed() -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.path.close(1)
    daemon.work()
    assert daemon.take() == [RingClosed(1)]
    daemon.machine.free(daemon.rings[1])
    assert daemon.machine.violations == []


def test_a_copy_can_be_given_up_before_it_is_sent() -> None:
    daemon = Daemon()
    daemon.open(1)
    copy = daemon.fill(1, [1])
    assert copy is not None
    daemon.path.cancel(copy)
    assert copy.slot.state is SlotState.FREE
    assert daemon.path.counters.copies_cancelled == 1


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_client_that_leaves_while_its_ring_opens_is_told_of_the_end_only(
    is_refused: bool,
) -> None:
    daemon = Daemon()
    if is_refused:
        daemon.driver.fail("cuIpcOpenMemHandle", "CUDA_ERROR_INVALID_VALUE")
    daemon.path.open(1, daemon.handle(1))
    daemon.path.close(1)
    daemon.work()
    assert daemon.take() == [RingClosed(1)]
    daemon.assert_clean_end()


def test_closing_twice_and_closing_what_is_not_open_does_nothing() -> None:
    daemon = Daemon()
    assert daemon.path.close(1) == []
    daemon.open(1)
    daemon.fetch(1, [1])
    assert len(daemon.path.close(1)) == 1
    assert daemon.path.close(1) == []
    daemon.work()
    assert daemon.take() == [RingClosed(1)]


# Devices that are lost.


@pytest.mark.parametrize(
    "call", ["cuEventCreate", "cuMemcpyHtoDAsync", "cuEventRecord", "cuEventQuery"]
)
def test_a_driver_that_fails_in_a_copy_loses_the_device(call: str) -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.open(2)
    filling = daemon.fill(1, [1])
    sent = daemon.fetch(2, [2])
    daemon.driver.fail(call, "CUDA_ERROR_LAUNCH_FAILED")
    daemon.work()

    events = daemon.take()
    copies = [event for event in events if isinstance(event, CopyEnded)]
    assert [(e.copy, e.end) for e in copies] == [
        (filling, CopyEnd.DEVICE_LOST),
        (sent, CopyEnd.DEVICE_LOST),
    ]
    reason = f"{call}: CUDA_ERROR_LAUNCH_FAILED"
    assert events[2:] == [RingLost(1, reason), RingLost(2, reason)]
    assert daemon.take() == []
    # The context was ended, which ends the mapping and whatever copies there were.
    assert daemon.holds_nothing()


def test_a_lost_device_is_refused_from_then_on_and_keeps_its_staging() -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.driver.fail("cuEventQuery", "CUDA_ERROR_ECC_UNCORRECTABLE")
    daemon.fetch(1, [1])
    daemon.work()
    daemon.take()
    with pytest.raises(RingRefused, match=r"given the device up \(cuEventQuery.*start memd again"):
        daemon.path.open(2, daemon.handle(2))
    assert len(daemon.free_staging) == 3
    (shown,) = daemon.path.stats()["devices"]
    assert shown["lost_reason"] == "cuEventQuery: CUDA_ERROR_ECC_UNCORRECTABLE"
    assert not daemon.path.is_waiting


@pytest.mark.parametrize("call", ["cuEventDestroy", "cuStreamDestroy", "cuIpcCloseMemHandle"])
def test_a_ring_that_cannot_be_closed_is_lost_and_never_reported_closed(call: str) -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.fetch(1, [1])
    daemon.work()
    daemon.driver.complete()
    daemon.work()
    assert len(daemon.ended()) == 1
    daemon.driver.fail(call, "CUDA_ERROR_UNKNOWN")
    daemon.path.close(1)
    daemon.work()
    assert daemon.take() == [RingLost(1, f"{call}: CUDA_ERROR_UNKNOWN")]
    assert daemon.holds_nothing()


@pytest.mark.parametrize("call", ["cuMemHostUnregister", "cuDevicePrimaryCtxRelease"])
def test_a_context_that_cannot_be_ended_loses_the_device_but_not_the_client(call: str) -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.driver.fail(call, "CUDA_ERROR_UNKNOWN")
    daemon.path.close(1)
    daemon.work()
    assert daemon.take() == [RingClosed(1)]
    with pytest.raises(RingRefused, match=call):
        daemon.path.open(2, daemon.handle(2))


def test_one_lost_device_leaves_the_others_alone() -> None:
    daemon = Daemon(num_devices=2)
    daemon.open(1, device=0)
    daemon.open(2, device=1)
    daemon.driver.break_device("CUDA_ERROR_ILLEGAL_ADDRESS", device=0)
    daemon.fetch(1, [1])
    kept = daemon.fetch(2, [2])
    daemon.work()
    daemon.driver.complete()
    daemon.work()
    events = daemon.take()
    assert [type(event) for event in events] == [CopyEnded, RingLost, CopyEnded]
    assert events[-1] == CopyEnded(kept, CopyEnd.DONE, 0.0)
    assert daemon.landed(2, 1) == [2]


def test_copies_that_never_land_lose_the_device_after_their_bound() -> None:
    daemon = Daemon()
    daemon.open(1)
    copy = daemon.fetch(1, [1])
    daemon.work()
    not_begun = daemon.fetch(1, [2])
    assert daemon.pass_time(5.0) == []
    *ended, lost = daemon.pass_time(1.0)
    assert [(e.copy, e.end) for e in ended] == [  # type: ignore[union-attr]
        (copy, CopyEnd.DEVICE_LOST),
        (not_begun, CopyEnd.DEVICE_LOST),
    ]
    assert lost == RingLost(1, "copies to client 1 have made no progress for 5 s")
    assert copy.slot.state is SlotState.IN_FLIGHT
    # The worker ends the context; the device does nothing more.
    daemon.work()
    assert [call for call, _ in daemon.driver.calls].count("cuMemcpyHtoDAsync") == 1
    assert daemon.holds_nothing()
    assert daemon.driver.complete() == 0
    assert daemon.is_untouched(1)


def test_copies_that_land_now_and_then_are_progress() -> None:
    daemon = Daemon()
    daemon.open(1)
    for n in range(4):
        daemon.fetch(1, [n])
    daemon.work()
    for _ in range(4):
        assert daemon.pass_time(4.0) == []
        daemon.driver.complete(count=1)
        daemon.work()
        assert len(daemon.ended()) == 1


def test_a_closing_ring_whose_copies_never_land_is_lost_not_closed() -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.fetch(1, [1])
    daemon.work()
    daemon.path.close(1)
    assert daemon.pass_time(6.0) == [
        RingLost(1, "copies to client 1 have made no progress for 5 s")
    ]


def test_a_daemon_that_was_stopped_itself_does_not_blame_the_driver() -> None:
    daemon = Daemon()
    daemon.open(1)
    daemon.fetch(1, [1])
    daemon.work()
    daemon.clock.now += 3600.0
    assert daemon.take() == []
    daemon.driver.complete()
    daemon.work()
    assert [end for _, end in daemon.ended()] == [CopyEnd.DONE]


@pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuEventQuery", "cuEventRecord"])
def test_a_call_that_returns_after_its_bound_is_followed_by_no_other_copy(call: str) -> None:
    daemon = Daemon(timeouts=Timeouts(call_s=10.0, copy_s=60.0))
    daemon.open(1)
    first, second = daemon.fetch(1, [1]), daemon.fetch(1, [2])
    seen: list[DeviceEvent] = []
    # The control thread goes on while the worker is inside the call.
    daemon.driver.during(call, lambda: seen.extend(daemon.pass_time(11.0)))
    daemon.work()

    assert [(e.copy, e.end) for e in seen if isinstance(e, CopyEnded)] == [
        (first, CopyEnd.DEVICE_LOST),
        (second, CopyEnd.DEVICE_LOST),
    ]
    assert seen[-1] == RingLost(1, "a driver call has not returned for 10 s")
    assert [name for name, _ in daemon.driver.calls].count("cuMemcpyHtoDAsync") == 1
    assert daemon.holds_nothing()
    assert daemon.is_untouched(1)
    assert daemon.take() == []


def test_a_start_may_take_longer_than_other_calls_but_not_for_ever() -> None:
    daemon = Daemon()
    seen: list[DeviceEvent] = []
    daemon.driver.during("cuDevicePrimaryCtxRetain", lambda: seen.extend(daemon.pass_time(50.0)))
    daemon.open(1)
    assert seen == []

    slow = Daemon()
    slow.driver.during("cuInit", lambda: seen.extend(slow.pass_time(61.0)))
    slow.path.open(1, slow.handle(1))
    slow.work()
    assert seen == [RingLost(1, "a driver call has not returned for 60 s")]
    assert slow.holds_nothing()


def test_a_mistake_of_ours_in_the_worker_is_a_lost_device_not_a_silent_thread() -> None:
    daemon = Daemon()
    daemon.open(1)

    def fail() -> None:
        raise ZeroDivisionError("ours")

    daemon.driver.during("cuEventQuery", fail)
    copy = daemon.fetch(1, [1])
    daemon.work()
    ended, lost = daemon.take()
    assert (ended.copy, ended.end) == (copy, CopyEnd.DEVICE_LOST)  # type: ignore[union-attr]
    assert lost == RingLost(1, "memd failed: ZeroDivisionError('ours')")
    assert daemon.holds_nothing()


def test_books_that_do_not_agree_are_noticed() -> None:
    daemon = Daemon()
    daemon.open(1)
    copy = daemon.fetch(1, [1])
    daemon.path.check_integrity()
    copy.slot.state = SlotState.FILLING
    with pytest.raises(IntegrityError, match="client 1 has 0 copies under way, counted 1"):
        daemon.path.check_integrity()


@pytest.mark.parametrize(
    ("options", "rule"), [({"call_s": 0.0}, "positive"), ({"copy_s": -1.0}, "positive")]
)
def test_bounds_must_be_bounds(options: dict[str, float], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Timeouts(**options)


# With threads.


class ThreadedDaemon(Daemon):
    """Every worker on its own thread; time passes when the test says so."""

    def __init__(self, **options: object) -> None:
        self.woken = threading.Event()
        super().__init__(spawn=self.start, notify=self.woken.set, **options)

    def start(self, worker: Worker) -> None:
        self.workers.append(worker)
        thread = threading.Thread(target=worker.run, daemon=True)
        thread.start()

    def until(self, kind: type[DeviceEvent], count: int = 1) -> list[DeviceEvent]:
        """Events up to the ``count``-th of a kind, polled for as the server does."""
        events: list[DeviceEvent] = []
        deadline = time.monotonic() + 20.0
        while sum(isinstance(event, kind) for event in events) < count:
            assert time.monotonic() < deadline, events
            self.woken.wait(0.02)
            self.woken.clear()
            events += self.path.poll()
        return events

    def until_nothing_is_held(self) -> None:
        deadline = time.monotonic() + 20.0
        while not self.holds_nothing():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def open(self, client_id: int, *, device: int = 0) -> None:
        self.path.open(client_id, self.handle(client_id, device=device))
        assert self.until(RingOpened) == [RingOpened(client_id)]


def test_the_control_thread_makes_no_cuda_call() -> None:
    daemon = ThreadedDaemon()
    daemon.driver.is_automatic = True
    daemon.open(1)
    for n in range(200):
        daemon.fetch(1, [n % NUM_ROWS], ring_row=n % 16)
        if n % 10 == 9:
            daemon.until(CopyEnded, 10)
    daemon.path.close(1)
    daemon.until(RingClosed)
    assert daemon.path.stop(10.0)

    threads = {thread for _, thread in daemon.driver.calls}
    assert len(threads) == 1
    assert threading.get_ident() not in threads
    assert daemon.landed(1, 8, ring_row=8) == [n % NUM_ROWS for n in range(184, 192)]
    daemon.assert_clean_end()


@pytest.mark.parametrize("call", ["cuIpcOpenMemHandle", "cuMemcpyHtoDAsync", "cuEventQuery"])
def test_a_driver_that_hangs_never_holds_the_control_thread(call: str) -> None:
    daemon = ThreadedDaemon(timeouts=Timeouts(call_s=10.0, copy_s=60.0))
    if call == "cuIpcOpenMemHandle":
        block = daemon.driver.block(call)
        daemon.path.open(1, daemon.handle(1))
    else:
        daemon.open(1)
        block = daemon.driver.block(call)
        daemon.fetch(1, [1])
    assert block.entered.wait(20.0)
    # All of this while the worker is inside.
    (*_, lost) = daemon.pass_time(61.0)
    assert isinstance(lost, RingLost)
    assert "has not returned" in lost.reason
    # memd's end does not wait for it either.
    assert not daemon.path.stop(3600.0)
    assert not block.released.is_set()

    block.released.set()
    daemon.until_nothing_is_held()
    assert daemon.is_untouched(1)


def test_a_worker_ends_the_context_when_its_device_is_given_up() -> None:
    daemon = ThreadedDaemon()
    daemon.open(1)
    daemon.fetch(1, [1])
    (*_, lost) = daemon.pass_time(6.0)
    assert isinstance(lost, RingLost)
    assert "no progress" in lost.reason
    daemon.until_nothing_is_held()


def test_memds_end_closes_every_ring_within_a_bound() -> None:
    daemon = ThreadedDaemon()
    daemon.driver.is_automatic = True
    for client_id in (1, 2):
        daemon.open(client_id)
    for client_id in (1, 2):
        daemon.fetch(client_id, [1])
    assert daemon.path.stop(10.0)
    daemon.assert_clean_end()


def test_memds_end_does_not_wait_for_copies_longer_than_its_bound() -> None:
    daemon = ThreadedDaemon(clock=time.monotonic)
    daemon.open(1)
    daemon.fetch(1, [1])
    while not daemon.driver.busy_streams():
        time.sleep(0.001)
    begin = time.monotonic()
    assert not daemon.path.stop(0.2)
    assert time.monotonic() - begin < 5.0
    daemon.driver.is_automatic = True
    assert daemon.path.stop(10.0)
    daemon.assert_clean_end()


def test_by_default_each_device_has_a_thread_that_does_not_keep_the_process() -> None:
    machine = FakeMachine()
    driver = FakeDriver(machine)
    engine = FakeDriver(machine)
    engine.init()
    memory = np.frombuffer(mmap.mmap(-1, STAGING), dtype=np.uint8)
    path = CudaIpc(
        memory,
        set_aside=lambda num_bytes: 0,
        give_back=lambda offset: None,
        staging_bytes=STAGING,
        load=lambda: driver,
    )
    ring = machine.allocate(RING)
    path.open(1, export_ring(engine, device=0, address=ring.address, num_bytes=RING))
    (thread,) = [t for t in threading.enumerate() if t.name.startswith("memd-GPU-")]
    assert thread.daemon
    assert path.stop(10.0)
    thread.join(10.0)
    assert not thread.is_alive()
