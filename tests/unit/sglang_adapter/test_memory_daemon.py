"""memd's memory is page-locked in pieces that no copy crosses."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from hetero_sglang.errors import ConfigError
from hetero_sglang.sglang_adapter import memory_daemon
from memd.cuda.context import PrimaryContext
from memd.cuda.errors import CudaError
from memd.cuda.fake import FakeDriver
from memd.cuda.fake_machine import FakeMachine
from memd.protocol import KVLayout
from memd.testing import FakeMemd

# A page of 3 * 5 * 128 bytes: no memory page holds a whole number of them.
LAYOUT = KVLayout(num_heads=3, head_dim=16, dtype="float32", page_tokens=5)
NUM_PAGES = 100


def aligned(rows: int, row_bytes: int) -> np.ndarray:
    memory = np.zeros(rows * row_bytes + 4096, dtype=np.uint8)
    start = -memory.ctypes.data % 4096
    return memory[start : start + rows * row_bytes].reshape(rows, row_bytes)


@pytest.fixture
def client():
    # The fake's extent is no mapping; where it begins is not tested here.
    with FakeMemd.create(LAYOUT, num_pages=NUM_PAGES, landing_rows=64) as client:
        client.landing = aligned(64, LAYOUT.row_bytes)
        client.pages = aligned(NUM_PAGES, LAYOUT.page_bytes)
        yield client


@pytest.fixture
def driver():
    driver = FakeDriver(FakeMachine())
    driver.init()
    with PrimaryContext(driver, 0):
        yield driver
    assert driver.held() == dict.fromkeys(driver.held(), 0)


def test_pages_and_ring_are_locked_until_the_locks_end(client, driver, monkeypatch) -> None:
    monkeypatch.setattr(memory_daemon, "CHUNK_BYTES", 100_000)
    pieces: list[int] = []
    register = driver.register_host
    monkeypatch.setattr(
        driver, "register_host", lambda at, size: (pieces.append(size), register(at, size))[1]
    )
    with contextlib.ExitStack() as locks:
        memory_daemon.lock_memory(client, driver, 0, locks)
        assert client.data_path == "pinned"
        assert driver.registered_bytes == client.landing.nbytes + client.pages.nbytes
        # The ring in one piece, pages in pieces of whole pages and whole memory pages.
        assert pieces[0] == client.landing.nbytes
        assert len(pieces) > 2
        assert all(size % LAYOUT.page_bytes == 0 for size in pieces[1:])
    assert client.data_path == "shm"


def test_what_was_locked_is_unlocked_when_the_rest_cannot_be(client, driver, monkeypatch) -> None:
    register = driver.register_host

    def only_the_ring(address: int, size: int) -> None:
        if size != client.landing.nbytes:
            raise CudaError("cuMemHostRegister", "CUDA_ERROR_OUT_OF_MEMORY")
        register(address, size)

    monkeypatch.setattr(driver, "register_host", only_the_ring)
    with contextlib.ExitStack() as locks:
        with pytest.raises(CudaError):
            memory_daemon.lock_memory(client, driver, 0, locks)
        assert client.data_path == "pinned"
    assert client.data_path == "shm"


def test_a_ring_of_several_pieces_is_refused(client, driver, monkeypatch) -> None:
    monkeypatch.setattr(memory_daemon, "CHUNK_BYTES", client.landing.nbytes - 1)
    with contextlib.ExitStack() as locks, pytest.raises(ConfigError, match="landing ring"):
        memory_daemon.lock_memory(client, driver, 0, locks)
