from __future__ import annotations

import mmap

import numpy as np
import pytest

from memd.cuda.errors import CudaError
from memd.cuda.fake import FakeDriver
from memd.cuda.fake_machine import FakeMachine
from memd.cuda.registration import PageLock

PAGE = mmap.PAGESIZE
CHUNK = 4 * PAGE


def mapping(num_bytes: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, num_bytes), dtype=np.uint8)


def engine(machine: FakeMachine | None = None) -> FakeDriver:
    driver = FakeDriver(machine or FakeMachine())
    driver.init()
    driver.set_current(driver.retain_context(0))
    return driver


def test_a_mapping_is_locked_chunk_by_chunk_and_reports_its_effective_bytes() -> None:
    driver, told = engine(), []
    memory = mapping(10 * PAGE)

    def progress(*numbers: int) -> None:
        told.append(numbers)

    with PageLock(driver, memory, device=0, chunk_bytes=CHUNK, progress=progress) as lock:
        assert driver.held()["registrations"] == 3
        assert lock.num_bytes == driver.registered_bytes == memory.size
        assert told == [(n * PAGE, 10 * PAGE) for n in (4, 8, 10)]
    assert driver.held()["registrations"] == lock.num_bytes == 0


def test_unlocking_goes_from_the_last_chunk_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, order = engine(), []
    unregister = driver.unregister_host
    monkeypatch.setattr(
        driver, "unregister_host", lambda address: (order.append(address), unregister(address))
    )
    memory = mapping(12 * PAGE)
    PageLock(driver, memory, device=0, chunk_bytes=CHUNK).close()
    assert [address - memory.ctypes.data for address in order] == [2 * CHUNK, CHUNK, 0]


def test_nothing_to_lock_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to page-lock: the mapping has 0 bytes"):
        PageLock(engine(), np.empty(0, dtype=np.uint8), device=0)


@pytest.mark.parametrize("chunk_bytes", [0, PAGE + 1])
def test_chunks_that_are_no_whole_memory_pages_are_refused(chunk_bytes: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of {PAGE}.*got {chunk_bytes}"):
        PageLock(engine(), mapping(PAGE), device=0, chunk_bytes=chunk_bytes)


def test_a_mapping_that_begins_inside_a_memory_page_is_refused() -> None:
    with pytest.raises(ValueError, match="start of a memory page"):
        PageLock(engine(), mapping(PAGE)[1:], device=0)


def test_a_chunk_that_cannot_be_locked_is_an_error_that_leaves_nothing_locked() -> None:
    driver = engine()
    driver.fail("cuMemHostRegister", "CUDA_ERROR_OUT_OF_MEMORY", after=2)
    with pytest.raises(CudaError, match=r"CUDA_ERROR_OUT_OF_MEMORY \(32 KiB of 48 KiB .* none"):
        PageLock(driver, mapping(12 * PAGE), device=0, chunk_bytes=CHUNK)
    assert driver.held()["registrations"] == 0


def test_progress_can_end_the_locking_and_it_is_undone() -> None:
    driver = engine()

    def stop(num_locked: int, num_bytes: int) -> None:
        if num_locked > CHUNK:
            raise InterruptedError("told to stop")

    with pytest.raises(InterruptedError):
        PageLock(driver, mapping(12 * PAGE), device=0, chunk_bytes=CHUNK, progress=stop)
    assert driver.held()["registrations"] == 0


def test_a_chunk_that_cannot_be_unlocked_keeps_no_other_locked() -> None:
    driver = engine()
    lock = PageLock(driver, mapping(12 * PAGE), device=0, chunk_bytes=CHUNK)
    driver.fail("cuMemHostUnregister", "CUDA_ERROR_UNKNOWN", after=1)
    with pytest.raises(CudaError, match="cuMemHostUnregister: CUDA_ERROR_UNKNOWN"):
        lock.close()
    assert driver.held()["registrations"] == 1
    lock.close()


def test_memory_that_is_locked_already_is_an_error() -> None:
    driver, memory = engine(), mapping(2 * PAGE)
    with (
        PageLock(driver, memory, device=0),
        pytest.raises(CudaError, match="HOST_MEMORY_ALREADY_REGISTERED"),
    ):
        PageLock(driver, memory, device=0)


def test_a_thread_without_a_context_is_told_so() -> None:
    driver = engine()
    driver.set_current(None)
    with pytest.raises(CudaError, match="CUDA_ERROR_INVALID_CONTEXT"):
        PageLock(driver, mapping(PAGE), device=0)


def test_with_one_address_space_the_device_uses_the_host_address() -> None:
    driver, memory = engine(), mapping(12 * PAGE)
    with PageLock(driver, memory, device=0, chunk_bytes=CHUNK) as lock:
        assert lock.device_address(0, memory.size) == memory.ctypes.data
        assert lock.device_address(CHUNK + 5, 7) == memory.ctypes.data + CHUNK + 5
    assert "cuMemHostGetDevicePointer" not in [call for call, _ in driver.calls]


def test_with_two_address_spaces_every_chunk_is_where_the_driver_says() -> None:
    driver, memory = engine(FakeMachine(one_address_space=False)), mapping(12 * PAGE)
    with PageLock(driver, memory, device=0, chunk_bytes=CHUNK) as lock:
        first, second = lock.device_address(0, CHUNK), lock.device_address(CHUNK, CHUNK)
        assert first != memory.ctypes.data
        assert second != first + CHUNK
        assert lock.device_address(CHUNK + 5, CHUNK - 5) == second + 5
        with pytest.raises(ValueError, match="crosses from one chunk"):
            lock.device_address(CHUNK - 1, 2)


@pytest.mark.parametrize(("offset", "num_bytes"), [(-1, 1), (0, 0), (0, PAGE + 1), (PAGE, 1)])
def test_an_address_outside_the_mapping_is_refused(offset: int, num_bytes: int) -> None:
    with (
        PageLock(engine(), mapping(PAGE), device=0) as lock,
        pytest.raises(ValueError, match="is not within"),
    ):
        lock.device_address(offset, num_bytes)
