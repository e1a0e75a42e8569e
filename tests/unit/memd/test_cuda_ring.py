"""Landing rings on a device: described by their owner, opened by another process, written to."""

from __future__ import annotations

import dataclasses
import mmap

import numpy as np
import pytest

from memd.cuda.context import PrimaryContext, find_device
from memd.cuda.errors import CudaError, RingRefused
from memd.cuda.export import export_ring
from memd.cuda.fake import FakeDriver
from memd.cuda.fake_machine import FakeAllocation, FakeMachine
from memd.cuda.registration import PageLock
from memd.cuda.ring import DeviceRing, RingHandle

RING = 4096


class Processes:
    """An engine with a ring in the middle of an allocation, and memd with page-locked bytes."""

    def __init__(self) -> None:
        self.machine = FakeMachine()
        self.engine = FakeDriver(self.machine)
        self.engine.init()
        self.memd = FakeDriver(self.machine)
        self.memd.init()
        self.memd.set_current(self.memd.retain_context(0))
        self.staging = np.frombuffer(mmap.mmap(-1, 2 * RING), dtype=np.uint8)
        self.lock = PageLock(self.memd, self.staging, device=0)
        self.staging[:] = np.arange(self.staging.size) % 251
        self.allocation = self.machine.allocate(3 * RING)
        self.handle = self.export(self.allocation, RING)

    def export(self, allocation: FakeAllocation, offset: int, num_bytes: int = RING) -> RingHandle:
        address = allocation.address + offset
        return export_ring(self.engine, device=0, address=address, num_bytes=num_bytes)

    def send(self, ring: DeviceRing, copy_id: int, source: int, offset: int, count: int) -> None:
        address = int(self.staging.ctypes.data) + source
        ring.send(copy_id, source=address, offset=offset, num_bytes=count)

    def end(self) -> None:
        self.lock.close()
        self.memd.release_context(0)
        assert self.memd.held() == dict.fromkeys(self.memd.held(), 0)
        assert not self.memd.ended_by_release
        assert not self.machine.violations


@pytest.fixture
def processes() -> Processes:
    return Processes()


def test_a_ring_inside_an_allocation_is_found_by_base_and_offset(processes: Processes) -> None:
    ring = DeviceRing(processes.memd, processes.handle)
    processes.send(ring, 1, 100, 200, 300)
    processes.memd.complete()

    assert ring.landed() == [1]
    written = np.flatnonzero(processes.allocation.memory != 0xEE)
    assert (written[0], written[-1] + 1) == (RING + 200, RING + 500)
    assert np.array_equal(
        processes.allocation.memory[RING + 200 :][:300], processes.staging[100:400]
    )
    ring.close()
    processes.end()


def test_copies_land_in_the_order_in_which_they_were_sent(processes: Processes) -> None:
    ring = DeviceRing(processes.memd, processes.handle)
    for copy_id in (7, 3, 5):
        processes.send(ring, copy_id, 0, copy_id * 64, 64)
    assert (ring.landed(), ring.num_in_flight) == ([], 3)
    processes.memd.complete(count=2)
    assert (ring.landed(), ring.num_in_flight) == ([7, 3], 1)
    processes.memd.complete()
    assert ring.landed() == [5]
    ring.close()
    processes.end()


def test_events_are_used_again(processes: Processes) -> None:
    ring = DeviceRing(processes.memd, processes.handle)
    for copy_id in range(10):
        processes.send(ring, copy_id, 0, 0, 64)
        processes.memd.complete()
        assert ring.landed() == [copy_id]
    assert processes.memd.held()["events"] == 1
    ring.close()
    processes.end()


@pytest.mark.parametrize(("offset", "count"), [(-1, 2), (RING, 1), (RING - 1, 2), (0, 0)])
def test_bytes_outside_the_ring_are_never_sent(
    processes: Processes, offset: int, count: int
) -> None:
    ring = DeviceRing(processes.memd, processes.handle)
    with pytest.raises(ValueError, match="leaves a landing ring of 4096 bytes"):
        processes.send(ring, 1, 0, offset, count)
    ring.close()
    processes.end()


def test_two_rings_in_one_allocation_share_its_mapping(processes: Processes) -> None:
    rings = [
        DeviceRing(processes.memd, processes.export(processes.allocation, offset))
        for offset in (0, RING)
    ]
    rings[0].close()
    processes.send(rings[1], 1, 0, 0, 64)
    processes.memd.complete()
    assert rings[1].landed() == [1]
    rings[1].close()
    processes.end()


def test_a_ring_longer_than_its_allocation_is_refused_and_unmapped(processes: Processes) -> None:
    handle = dataclasses.replace(processes.handle, num_bytes=2 * RING + 1)
    with pytest.raises(RingRefused, match=r"8193 bytes at 4096 does not fit .* 12288 bytes"):
        DeviceRing(processes.memd, handle)
    processes.end()


def test_a_handle_that_cuda_does_not_take_is_refused_with_what_to_change(
    processes: Processes,
) -> None:
    handle = dataclasses.replace(processes.handle, handle=bytes(64))
    with pytest.raises(RingRefused, match=r"INVALID_HANDLE.*--ipc host.*expandable_segments"):
        DeviceRing(processes.memd, handle)
    processes.end()


@pytest.mark.parametrize("call", ["cuIpcOpenMemHandle", "cuMemGetAddressRange", "cuStreamCreate"])
def test_want_of_room_for_one_ring_is_a_refusal_that_leaves_nothing(
    processes: Processes, call: str
) -> None:
    processes.memd.fail(call, "CUDA_ERROR_OUT_OF_MEMORY")
    with pytest.raises(RingRefused, match=f"{call}: CUDA_ERROR_OUT_OF_MEMORY"):
        DeviceRing(processes.memd, processes.handle)
    processes.end()


def test_an_error_of_the_device_is_no_refusal_of_the_ring(processes: Processes) -> None:
    processes.memd.fail("cuIpcOpenMemHandle", "CUDA_ERROR_ECC_UNCORRECTABLE")
    with pytest.raises(CudaError, match="ECC_UNCORRECTABLE"):
        DeviceRing(processes.memd, processes.handle)


def test_what_cannot_be_undone_is_no_refusal_either(processes: Processes) -> None:
    processes.memd.fail("cuStreamCreate", "CUDA_ERROR_OUT_OF_MEMORY")
    processes.memd.fail("cuIpcCloseMemHandle", "CUDA_ERROR_INVALID_VALUE")
    with pytest.raises(CudaError, match="cuIpcCloseMemHandle"):
        DeviceRing(processes.memd, processes.handle)


def test_expandable_segments_are_refused_by_name_where_the_ring_is_exported(
    processes: Processes,
) -> None:
    segment = processes.machine.allocate(RING, has_handle=False)
    with pytest.raises(RingRefused, match=r"expandable_segments out of PYTORCH_CUDA_ALLOC_CONF"):
        processes.export(segment, 0)


def test_a_ring_that_leaves_its_allocation_is_not_exported(processes: Processes) -> None:
    with pytest.raises(RingRefused, match="ends 1 bytes behind its allocation of 12288"):
        processes.export(processes.allocation, 2 * RING, RING + 1)


def wire(**changes: object) -> RingHandle:
    fields: dict[str, object] = {
        "handle": bytes(64),
        "base_offset": 0,
        "num_bytes": 1,
        "device_uuid": bytes(16),
    }
    return RingHandle(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"handle": b""}, "64 bytes, got 0"),
        ({"handle": bytes(63)}, "64 bytes, got 63"),
        ({"handle": b"\x02c" + bytes(64)}, r"got 66; .*export_ring.*not from PyTorch's storage"),
        ({"handle": b"\x02e" + bytes(40)}, "handle of PyTorch's expandable_segments"),
        ({"device_uuid": bytes(15)}, "UUID has 16 bytes, got 15"),
        ({"num_bytes": 0}, "at least 1 byte"),
        ({"base_offset": -1}, "got 1 bytes at -1"),
        ({"base_offset": (1 << 63) - 1, "num_bytes": 2}, "leaves the address space"),
    ],
)
def test_what_no_ring_can_be_is_refused_before_any_cuda_call(
    changes: dict[str, object], rule: str
) -> None:
    with pytest.raises(RingRefused, match=rule):
        wire(**changes)


def test_a_device_is_known_by_its_uuid_whatever_its_number() -> None:
    machine = FakeMachine(3)
    assert find_device(FakeDriver(machine), machine.uuids[2]) == 2


def test_a_device_that_memd_does_not_see_is_refused_with_those_it_sees() -> None:
    driver = FakeDriver(FakeMachine(1))
    with pytest.raises(
        RingRefused,
        match=r"no device GPU-0{8}-.*only GPU-d0d0d0d0-.*CUDA_VISIBLE_DEVICES",
    ):
        find_device(driver, bytes(16))
    assert driver.held()["contexts"] == 0


def test_a_context_that_cannot_be_made_current_is_released() -> None:
    driver = FakeDriver(FakeMachine())
    driver.init()
    driver.fail("cuCtxSetCurrent", "CUDA_ERROR_INVALID_CONTEXT")
    with pytest.raises(CudaError):
        PrimaryContext(driver, 0)
    assert driver.held()["contexts"] == 0
