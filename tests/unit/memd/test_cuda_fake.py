"""What the fake must notice, or the tests that trust it prove nothing."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from memd.cuda.errors import CudaError
from memd.cuda.fake import FakeDriver
from memd.cuda.fake_machine import FakeMachine

RING = 4096


class Process:
    """A process with an open ring of another one, a stream, and page-locked memory."""

    def __init__(self) -> None:
        self.machine = FakeMachine()
        self.allocation = self.machine.allocate(RING)
        self.driver = FakeDriver(self.machine)
        self.driver.init()
        self.driver.set_current(self.driver.retain_context(0))
        self.memory = np.frombuffer(mmap.mmap(-1, 2 * RING), dtype=np.uint8)
        self.source = int(self.memory.ctypes.data)
        self.driver.register_host(self.source, RING)
        self.base = self.driver.open_ipc(self.allocation.handle)
        self.stream = self.driver.create_stream()

    def copy(self, offset: int = 0, count: int = 64, source: int = 0) -> None:
        self.driver.copy_to_device(self.base + offset, self.source + source, count, self.stream)

    def close(self) -> None:
        self.driver.close_ipc(self.base)

    @property
    def violations(self) -> list[str]:
        return self.machine.violations


@pytest.fixture
def process() -> Process:
    return Process()


def test_a_copy_reads_and_writes_only_when_it_is_done(process: Process) -> None:
    process.memory[:64] = 7
    process.copy(offset=32)
    assert (process.allocation.memory == 0xEE).all()
    process.driver.complete()
    assert (process.allocation.memory[32:96] == 7).all()
    assert not process.violations


def test_an_event_is_done_when_the_copies_before_it_are(process: Process) -> None:
    event = process.driver.create_event()
    assert process.driver.is_done(event)
    process.copy()
    process.driver.record_event(event, process.stream)
    process.copy()
    assert not process.driver.is_done(event)
    process.driver.complete(count=1)
    assert process.driver.is_done(event)


def test_writing_staging_under_a_copy_is_noticed(process: Process) -> None:
    process.copy()
    process.memory[3] ^= 1
    process.driver.complete()
    assert process.violations == ["staging memory was written under a copy"]


@pytest.mark.parametrize(("offset", "count"), [(RING - 1, 2), (0, RING + 1)])
def test_a_copy_that_leaves_its_allocation_is_noticed(
    process: Process, offset: int, count: int
) -> None:
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        process.copy(offset=offset, count=count)
    assert process.violations == ["a copy left its allocation"]


@pytest.mark.parametrize("source", [RING, RING - 1])
def test_a_source_that_is_not_or_not_wholly_page_locked_is_noticed(
    process: Process, source: int
) -> None:
    process.copy(source=source)
    assert process.violations == ["a copy read memory that is not page-locked"]


def test_a_source_across_two_registrations_is_noticed(process: Process) -> None:
    process.driver.register_host(process.source + RING, RING)
    process.copy(source=RING - 1)
    assert process.violations == ["a copy read memory that is not page-locked"]


def test_unlocking_under_a_copy_is_noticed(process: Process) -> None:
    process.copy()
    process.driver.unregister_host(process.source)
    process.driver.complete()
    assert process.violations == [
        "memory was unlocked under a copy",
        "a copy read memory that is not page-locked any more",
    ]


def test_unmapping_under_a_copy_is_noticed(process: Process) -> None:
    process.copy()
    process.close()
    process.driver.complete()
    assert process.violations == [
        "a ring was unmapped under a copy",
        "a copy arrived in a ring that is unmapped",
    ]


def test_use_after_close_is_noticed(process: Process) -> None:
    process.close()
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        process.copy()
    assert process.violations == ["a copy went to memory that is not mapped"]
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        process.close()


def test_destroying_a_stream_under_a_copy_is_noticed(process: Process) -> None:
    process.copy()
    process.driver.destroy_stream(process.stream)
    assert process.violations == ["a stream was destroyed under a copy"]


def test_freeing_what_another_process_maps_is_noticed_and_a_death_is_none(
    process: Process,
) -> None:
    process.machine.kill_owner(process.allocation)
    assert not process.violations
    assert process.machine.held_bytes() == RING
    process.close()
    assert process.machine.held_bytes() == 0

    other = process.machine.allocate(RING)
    process.driver.open_ipc(other.handle)
    process.machine.free(other)
    assert process.violations == ["memory was freed that another process maps"]


def test_a_handle_of_memory_that_is_gone_or_has_none_is_not_opened(process: Process) -> None:
    gone, segment = process.machine.allocate(1), process.machine.allocate(1, has_handle=False)
    process.machine.free(gone)
    for allocation in (gone, segment):
        with pytest.raises(CudaError, match="INVALID_HANDLE"):
            process.driver.open_ipc(allocation.handle)
    with pytest.raises(CudaError, match="INVALID_VALUE"):
        process.driver.ipc_handle(segment.address)


def test_opening_twice_needs_closing_twice(process: Process) -> None:
    assert process.driver.open_ipc(process.allocation.handle) == process.base
    process.close()
    process.copy()
    assert process.driver.held()["mappings"] == 1


def test_the_last_release_ends_copies_and_all_that_was_held(process: Process) -> None:
    process.copy()
    process.driver.release_context(0)
    assert process.driver.held() == dict.fromkeys(process.driver.held(), 0)
    assert sorted(process.driver.ended_by_release) == ["mapping", "registration", "stream"]
    assert (process.driver.complete(), process.allocation.num_mappings) == (0, 0)
    assert (process.allocation.memory == 0xEE).all()
    with pytest.raises(CudaError, match="INVALID_CONTEXT"):
        process.driver.release_context(0)


def test_a_broken_device_fails_every_call_until_its_context_ends(process: Process) -> None:
    process.driver.break_device("CUDA_ERROR_ILLEGAL_ADDRESS")
    for call in (process.copy, process.close, process.driver.create_event):
        with pytest.raises(CudaError, match="ILLEGAL_ADDRESS"):
            call()
    process.driver.release_context(0)
    process.driver.retain_context(0)
    process.driver.create_event()


def test_calls_before_the_start_and_on_other_threads_are_refused() -> None:
    driver = FakeDriver(FakeMachine())
    with pytest.raises(CudaError, match="NOT_INITIALIZED"):
        driver.device_count()
    driver.init()
    with driver.as_thread("worker"):
        driver.set_current(driver.retain_context(0))
        driver.create_stream()
    with pytest.raises(CudaError, match="INVALID_CONTEXT"):
        driver.create_stream()
