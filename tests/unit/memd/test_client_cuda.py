"""The client's side of rings on a device, and of a page-locked landing ring."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest

from memd.client import MemdClient
from memd.cuda.context import PrimaryContext
from memd.cuda.errors import CudaError
from memd.cuda.fake import FakeDriver
from memd.cuda.fake_machine import FakeMachine
from memd.cuda.ring import RingHandle
from memd.protocol import (
    ErrorCode,
    ErrorReply,
    FetchReply,
    GoodbyeReply,
    HelloReply,
    KVLayout,
    decode_request,
    encode,
)
from memd.registration import Registration
from memd.testing import FakeMemd

LAYOUT = KVLayout(num_heads=2, head_dim=16, dtype="float32", page_tokens=8)


class Scripted:
    """A channel whose other end answers as the test says."""

    def __init__(self) -> None:
        self.sent: list[object] = []
        self.replies: list[object] = []
        self.is_closed = False
        self.has_ended = False
        self.num_deaf = 0

    def send(self, frame: bytes) -> bool:
        self.sent.append(decode_request(frame))
        return True

    def receive(self) -> bytes | None:
        if self.num_deaf:
            self.num_deaf -= 1
            return None
        return encode(self.replies.pop(0)) if self.replies else None  # type: ignore[arg-type]

    def peer_has_closed(self) -> bool:
        return self.has_ended

    def wait(self, timeout_s: float) -> None:
        del timeout_s

    def close(self) -> None:
        self.is_closed = True


def ring_client(channel: Scripted, *, deadline_s: float = 0.05) -> MemdClient:
    size = 4 * LAYOUT.page_bytes
    hello = HelloReply(
        request_id=0,
        version=1,
        client_id=1,
        extent_offset=0,
        extent_bytes=size,
        landing_offset=size,
        landing_rows=16,
        row_bytes=LAYOUT.row_bytes,
        page_bytes=LAYOUT.page_bytes,
        row_index_bytes=4,
        data_path="cuda_ipc",
    )
    registration = Registration(channel, hello, np.zeros(size, dtype=np.uint8), 1)
    return MemdClient(registration, LAYOUT, num_pages=4, address="x", deadline_s=deadline_s)


def test_rows_on_a_device_have_tickets_and_no_array() -> None:
    channel = Scripted()
    client = ring_client(channel, deadline_s=60.0)
    assert client.data_path == "cuda_ipc"
    assert client.landing.shape == (0, LAYOUT.row_bytes)
    assert client.landing_rows == 16
    first, second = client.fetch(np.arange(10)), client.fetch(np.arange(6))
    assert first is not None
    assert second is not None
    assert (first.landing_start, second.landing_start) == (0, 10)
    assert client.fetch(np.arange(1)) is None
    channel.replies.append(FetchReply(request_id=1, num_rows=10, copy_ns=5))
    client.poll()
    assert first.is_done
    with pytest.raises(ValueError, match="on the device, from row 0"):
        client.landed(first)
    client.finish(first)
    assert client.fetch(np.arange(1)) is not None


def test_after_the_loss_of_the_device_nothing_is_fetched_and_the_rest_goes_on() -> None:
    channel = Scripted()
    client = ring_client(channel, deadline_s=60.0)
    ticket = client.fetch(np.arange(10))
    assert ticket is not None
    channel.replies.append(ErrorReply(request_id=1, code=ErrorCode.DEVICE_LOST, message="it broke"))
    client.poll()
    assert ticket.error == "device_lost: it broke"
    assert client.is_alive
    assert client.device_lost_reason == client.stats()["device_lost_reason"] == "it broke"
    client.finish(ticket)
    assert client.fetch(np.arange(1)) is None
    assert not client.reserve(1).is_done


@pytest.mark.parametrize(
    ("replies", "is_closed"),
    [
        ([GoodbyeReply(request_id=1)], True),
        ([GoodbyeReply(request_id=1, is_ring_closed=False)], False),
        ([ErrorReply(request_id=1, code=ErrorCode.INTERNAL, message="no")], False),
        ([], False),
    ],
)
def test_a_ring_may_be_freed_when_memd_has_said_so(replies: list[object], is_closed: bool) -> None:
    channel = Scripted()
    client = ring_client(channel)
    assert not client.is_ring_closed
    channel.replies += replies
    client.close()
    assert channel.is_closed
    assert client.is_ring_closed is is_closed


def test_a_fetch_that_the_goodbye_ends_does_not_hide_its_answer() -> None:
    channel = Scripted()
    client = ring_client(channel)
    ticket = client.fetch(np.arange(10))
    assert ticket is not None
    channel.replies += [
        ErrorReply(request_id=1, code=ErrorCode.NOT_REGISTERED, message="it left"),
        GoodbyeReply(request_id=2),
    ]
    client.close()
    assert ticket.error == "not_registered: it left"
    assert client.is_ring_closed


def test_an_answer_that_comes_behind_the_news_of_memds_end_is_heard() -> None:
    channel = Scripted()
    client = ring_client(channel, deadline_s=5.0)
    channel.has_ended, channel.num_deaf = True, 3
    channel.replies.append(GoodbyeReply(request_id=1))
    client.close()
    assert client.is_ring_closed


def test_a_memd_that_ended_without_an_answer_is_not_waited_for_long() -> None:
    channel = Scripted()
    client = ring_client(channel, deadline_s=60.0)
    channel.has_ended = True
    begin = time.monotonic()
    client.close()
    assert time.monotonic() - begin < 30.0
    assert not client.is_ring_closed


def test_a_ring_has_as_many_bytes_as_the_landing_rows() -> None:
    ring = RingHandle(handle=bytes(64), base_offset=0, num_bytes=64, device_uuid=bytes(16))
    with pytest.raises(ValueError, match="a ring of 16 rows has 2048 bytes, got 64"):
        MemdClient.connect("ipc:///x", LAYOUT, num_pages=1, landing_rows=16, ring=ring)


def test_the_landing_ring_is_page_locked_for_as_long_as_the_caller_says() -> None:
    driver = FakeDriver(FakeMachine())
    driver.init()
    with (
        FakeMemd.create(LAYOUT, num_pages=4, landing_rows=64) as client,
        PrimaryContext(driver, 0),
    ):
        # The fake's extent is no mapping; what is tested here is not where it begins.
        aligned = np.zeros(64 * LAYOUT.row_bytes + 4096, dtype=np.uint8)
        start = -aligned.ctypes.data % 4096
        client.landing = aligned[start : start + 64 * LAYOUT.row_bytes].reshape(64, -1)
        assert client.data_path == "shm"
        assert client.is_ring_closed
        with client.page_lock(driver, device=0) as lock:
            assert client.data_path == "pinned"
            assert lock.num_bytes == client.landing.nbytes == driver.registered_bytes
            with pytest.raises(ValueError, match="already"):
                client.page_lock(driver, device=0)
        assert client.data_path == "shm"
        driver.fail("cuMemHostRegister", "CUDA_ERROR_OUT_OF_MEMORY")
        with pytest.raises(CudaError):
            client.page_lock(driver, device=0)
        assert client.data_path == "shm"
    assert driver.held() == dict.fromkeys(driver.held(), 0)


def test_a_ring_of_the_wire_is_a_ring_of_the_binding() -> None:
    from memd.protocol import DeviceRing

    wire = set(DeviceRing.__struct_fields__)
    assert wire == {field.name for field in dataclasses.fields(RingHandle)}
