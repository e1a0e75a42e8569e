"""Clients whose rows land on a device, as the service sees them; the driver is a fake."""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from memd.protocol import (
    Commit,
    ErrorCode,
    ErrorReply,
    FetchReply,
    Freeze,
    Goodbye,
    GoodbyeReply,
    HelloReply,
    Ping,
    Pong,
    Release,
    ReleaseReply,
    Reserve,
)
from memd.service import Service
from memd.store import Store
from memd.tiers.holes import allocated_bytes
from memd.transfer import HostTransfer
from tests.unit.memd.cuda_daemon import (
    LAYOUT,
    NUM_PAGES,
    RING_BYTES,
    RING_ROWS,
    ROW,
    STAGING_BYTES,
    CudaDaemon,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

A, B, C = b"a", b"b", b"c"


@pytest.fixture
def daemon() -> Iterator[CudaDaemon]:
    daemon = CudaDaemon()
    yield daemon
    daemon.check()


def refused(reply: Any, code: ErrorCode) -> str:
    assert isinstance(reply, ErrorReply), reply
    assert reply.code is code
    return reply.message


class Never:
    """An interconnect that nothing arrives over."""

    def finish_time(self, num_bytes: int) -> float:
        del num_bytes
        return float("inf")


class TestOpening:
    def test_hello_is_answered_when_the_ring_is_mapped(self, daemon: CudaDaemon) -> None:
        assert daemon.hello(A, daemon.ring(A)) is None
        assert isinstance(daemon.ask(A, Ping(request_id=7)), Pong)
        daemon.step(3)
        assert daemon.last(A) is None
        daemon.work()
        hello = daemon.last(A)
        assert isinstance(hello, HelloReply)
        assert hello.data_path == "cuda_ipc"
        assert hello.landing_rows == RING_ROWS
        # No bytes of the extent are a landing ring's.
        assert hello.extent_bytes == hello.landing_offset
        (client,) = daemon.check()["clients"]
        assert (client["data_path"], client["landing_rows"]) == ("cuda_ipc", RING_ROWS)

    def test_no_driver_is_loaded_before_a_ring_is_asked_for(self, daemon: CudaDaemon) -> None:
        assert daemon.join(A, has_ring=False).data_path == "host"
        assert isinstance(daemon.fetch(A, 3, [0, 1]), FetchReply)
        daemon.work()
        assert daemon.num_loads == 0
        assert daemon.check()["cuda"]["devices"] == []
        assert daemon.service.next_due() is None

    def test_a_daemon_without_staging_refuses_rings_by_name(self, daemon: CudaDaemon) -> None:
        daemon.service = Service(Store(1 << 18), HostTransfer(daemon.region))
        text = refused(daemon.hello(A, daemon.ring(A)), ErrorCode.DEVICE_REFUSED)
        assert "--cuda-staging-bytes" in text
        assert daemon.hello_again(A, daemon.sessions[A], None).data_path == "host"
        assert "cuda" not in daemon.service.stats()

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"num_bytes": RING_BYTES - 1}, "whole rows"),
            ({"num_bytes": STAGING_BYTES + ROW}, "longer than memd's staging"),
            ({"num_bytes": 0}, "at least 1 byte"),
            ({"handle": b"xe" + bytes(64)}, "expandable_segments"),
            ({"handle": bytes(10)}, "64 bytes"),
        ],
    )
    def test_a_ring_that_cannot_be_is_refused_at_once(
        self, daemon: CudaDaemon, change: dict[str, Any], text: str
    ) -> None:
        ring = msgspec.structs.replace(daemon.ring(A), **change)
        assert text in refused(daemon.hello(A, ring), ErrorCode.DEVICE_REFUSED)
        assert daemon.num_loads == 0
        assert daemon.check()["region"]["free_bytes"] == daemon.region.size

    def test_landing_bytes_and_a_ring_do_not_go_together(self, daemon: CudaDaemon) -> None:
        reply = daemon.hello(A, daemon.ring(A), landing_bytes=RING_BYTES)
        assert "must be 0 with a ring" in refused(reply, ErrorCode.OUT_OF_RANGE)

    def test_a_ring_that_cuda_refuses_leaves_nothing_behind(self, daemon: CudaDaemon) -> None:
        daemon.driver.fail("cuIpcOpenMemHandle", "CUDA_ERROR_INVALID_CONTEXT")
        assert daemon.hello(A, daemon.ring(A)) is None
        daemon.work()
        assert "--ipc host" in refused(daemon.last(A), ErrorCode.DEVICE_REFUSED)
        while daemon.service.tidy(1 << 20):
            pass
        stats = daemon.check()
        assert stats["clients"] == []
        assert stats["region"]["free_bytes"] == daemon.region.size
        assert stats["cuda"]["counters"]["rings_failed"] == 1
        # The same process may try again, without a ring.
        assert daemon.hello_again(A, daemon.sessions[A], None).data_path == "host"

    def test_no_room_for_staging_refuses_and_gives_the_extent_back(self) -> None:
        daemon = CudaDaemon(region_bytes=NUM_PAGES * LAYOUT.page_bytes + mmap.PAGESIZE)
        text = refused(daemon.hello(A, daemon.ring(A)), ErrorCode.DEVICE_REFUSED)
        assert "contiguous bytes left for staging" in text
        assert daemon.check()["clients"] == []

    def test_staging_waits_for_memory_to_be_zeroed(self) -> None:
        size = NUM_PAGES * LAYOUT.page_bytes
        daemon = CudaDaemon(region_bytes=size + STAGING_BYTES)
        rows = (size + STAGING_BYTES) // LAYOUT.page_bytes
        daemon.hello(B, None, num_pages=rows, landing_bytes=0)
        daemon.region[:] = 0xAB
        daemon.service.close_session(daemon.sessions[B], "test")
        assert isinstance(daemon.join(A), HelloReply)
        daemon.check()

    def test_a_second_ring_on_a_device_shares_its_staging(self, daemon: CudaDaemon) -> None:
        rings = [daemon.ring(A), daemon.ring(B)]
        assert daemon.hello(A, rings[0]) is None
        assert daemon.hello(B, rings[1]) is None
        daemon.work()
        assert {daemon.last(A).data_path, daemon.last(B).data_path} == {"cuda_ipc"}
        (device,) = daemon.check()["cuda"]["devices"]
        assert (device["rings"], device["staging_bytes"]) == (2, STAGING_BYTES)
        assert daemon.num_loads == 1

    def test_a_client_that_dies_while_its_ring_is_opened_leaves_nothing(
        self, daemon: CudaDaemon
    ) -> None:
        assert daemon.hello(A, daemon.ring(A)) is None
        daemon.step(2)
        daemon.service.close_session(daemon.sessions[A], "test")
        daemon.work()
        assert refused(daemon.last(A), ErrorCode.NOT_REGISTERED)
        assert daemon.driver.held() == dict.fromkeys(daemon.driver.held(), 0)
        while daemon.service.tidy(1 << 20):
            pass
        assert daemon.check()["region"]["free_bytes"] == daemon.region.size

    def test_staging_memory_is_zeroed_before_it_is_anybody_elses(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        daemon.fetch(A, 3, list(range(RING_ROWS)))
        daemon.work()
        daemon.ask(A, Goodbye(request_id=4))
        daemon.work()
        assert daemon.check()["region"]["free_bytes"] < daemon.region.size
        while daemon.service.tidy(1 << 20):
            pass
        assert daemon.check()["region"]["free_bytes"] == daemon.region.size
        assert not daemon.region.any()


class TestFetching:
    def test_rows_land_on_the_device(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        assert daemon.fetch(A, 3, [9, 1, 1, 40], landing_row=5) is None
        daemon.work(completes=False)
        assert daemon.reply(A, 3) is None
        daemon.now += 0.25
        daemon.work()
        reply = daemon.reply(A, 3)
        assert isinstance(reply, FetchReply)
        assert reply.num_rows == 4
        assert reply.copy_ns == 250_000_000
        assert reply.gather_ns > 0
        assert np.array_equal(daemon.landed(A, 5, 4), daemon.rows[A][[9, 1, 1, 40]])
        counters = daemon.check()["cuda"]["counters"]
        assert (counters["copies_done"], counters["bytes_copied"]) == (1, 4 * ROW)

    def test_a_row_outside_the_ring_is_refused(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        refused(daemon.fetch(A, 3, [0, 1], landing_row=RING_ROWS - 1), ErrorCode.OUT_OF_RANGE)

    def test_pages_are_free_once_they_are_gathered(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        daemon.fetch(A, 3, [0])
        release = Release(request_id=4, page_ids=[0])
        assert isinstance(daemon.ask(A, release), ReleaseReply)
        client = daemon.check()["clients"][0]
        assert (client["pages_free"], client["pages_leaving"]) == (1, 0)

    def test_fetches_wait_for_slots_and_all_land_in_order(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        daemon.join(B)
        half = RING_ROWS // 2
        batches = {request_id: list(range(request_id, request_id + half)) for request_id in (3, 4)}
        for connection in (A, B):
            for request_id, rows in batches.items():
                daemon.fetch(connection, request_id, rows, landing_row=(request_id - 3) * half)
        daemon.fetch(A, 5, [])
        daemon.work(completes=False)
        (device,) = daemon.check()["cuda"]["devices"]
        assert device["copies"] < 4 or device["staging_bytes_used"] <= STAGING_BYTES
        daemon.work()
        assert [r.request_id for to, r in daemon.replies if to == A] == [0, 3, 4, 5]
        assert [r.request_id for to, r in daemon.replies if to == B] == [0, 3, 4]
        for connection in (A, B):
            expected = daemon.rows[connection][batches[3] + batches[4]]
            assert np.array_equal(daemon.landed(connection, 0, RING_ROWS), expected)

    def test_a_long_fetch_is_not_overtaken_for_ever(self) -> None:
        daemon = CudaDaemon(staging_bytes=mmap.PAGESIZE)
        for connection in (A, B, C):
            daemon.join(connection)
        # A's leave too little room for B's, and C's would fit again and again.
        daemon.fetch(A, 3, list(range(8)))
        daemon.fetch(B, 3, list(range(32)))
        daemon.fetch(C, 3, [1])
        daemon.work(completes=False)
        assert daemon.check()["cuda"]["devices"][0]["copies"] == 1
        daemon.work()
        order = [to for to, reply in daemon.replies if isinstance(reply, FetchReply)]
        assert order == [A, B, C]

    def test_an_empty_fetch_is_answered_behind_those_before_it(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        daemon.fetch(A, 3, [1])
        assert daemon.fetch(A, 4, []) is None
        daemon.work(completes=False)
        assert daemon.reply(A, 4) is None
        daemon.work()
        assert [r.request_id for _, r in daemon.replies] == [0, 3, 4]
        daemon.fetch(A, 5, [])
        daemon.step()
        assert daemon.reply(A, 5).num_rows == 0

    def test_clients_with_and_without_rings_go_beside_each_other(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        daemon.join(B, has_ring=False)
        daemon.fetch(A, 3, [1, 2])
        assert isinstance(daemon.fetch(B, 3, [1, 2]), FetchReply)
        daemon.work()
        assert isinstance(daemon.reply(A, 3), FetchReply)

    def test_a_gather_that_fails_gives_its_slot_back(
        self, daemon: CudaDaemon, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        daemon.join(A)

        def fail(*args: object, **kwargs: object) -> None:
            raise MemoryError("the test breaks it")

        monkeypatch.setattr(daemon.service._transfer, "gather", fail)
        refused(daemon.fetch(A, 3, [1]), ErrorCode.INTERNAL)
        daemon.work()
        assert daemon.check()["cuda"]["devices"][0]["staging_bytes_used"] == 0


class TestTheEndOfADevice:
    def test_fetches_under_way_end_as_lost_and_the_client_goes_on(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        daemon.join(B, has_ring=False)
        for request_id in (3, 4, 5):
            daemon.fetch(A, request_id, list(range(RING_ROWS)))
        # The second is in its slot, or waits to be gathered there, and the third for one.
        assert daemon.check()["cuda"]["devices"][0]["copies"] == 2
        daemon.driver.break_device("CUDA_ERROR_ECC_UNCORRECTABLE")
        daemon.work()
        for request_id in (3, 4, 5):
            refused(daemon.reply(A, request_id), ErrorCode.DEVICE_LOST)
        text = refused(daemon.fetch(A, 6, [0]), ErrorCode.DEVICE_LOST)
        assert "ECC_UNCORRECTABLE" in text
        assert isinstance(
            daemon.ask(A, Release(request_id=7, page_ids=list(range(NUM_PAGES)))), ReleaseReply
        )
        assert isinstance(daemon.fetch(B, 8, [1, 2]), FetchReply)
        client = daemon.check()["clients"][0]
        assert (client["pages_free"], client["pages_leaving"]) == (NUM_PAGES, 0)
        # Nobody can promise that the ring is not written any more.
        goodbye = daemon.ask(A, Goodbye(request_id=9))
        assert isinstance(goodbye, GoodbyeReply)
        assert not goodbye.is_ring_closed
        refused(daemon.hello(C, daemon.ring(C)), ErrorCode.DEVICE_REFUSED)

    def test_fetches_that_wait_to_be_gathered_end_as_lost_too(self) -> None:
        daemon = CudaDaemon(delay=Never())
        daemon.join(A)
        daemon.fetch(A, 3, [0])
        daemon.fetch(A, 4, [1])
        daemon.step(3)
        daemon.ask(A, Release(request_id=5, page_ids=[0]))
        assert daemon.check()["clients"][0]["pages_leaving"] == 1
        daemon.driver.break_device("CUDA_ERROR_ECC_UNCORRECTABLE")
        daemon.driver.fail("cuIpcOpenMemHandle", "CUDA_ERROR_ECC_UNCORRECTABLE")
        daemon.hello(B, daemon.ring(B))
        daemon.work()
        for request_id in (3, 4):
            refused(daemon.reply(A, request_id), ErrorCode.DEVICE_LOST)
        client = daemon.check()["clients"][0]
        assert (client["pages_free"], client["pages_leaving"]) == (1, 0)

    def test_a_driver_that_hangs_is_noticed_without_any_news(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        daemon.fetch(A, 3, [1])
        daemon.step_workers(2)
        assert daemon.service.next_due() is not None
        daemon.pass_time(10)
        refused(daemon.reply(A, 3), ErrorCode.DEVICE_LOST)
        assert daemon.service.next_due() is None

    def test_a_device_that_is_lost_while_a_ring_is_opened_is_told_apart(
        self, daemon: CudaDaemon
    ) -> None:
        assert daemon.hello(A, daemon.ring(A)) is None
        daemon.pass_time(1)
        daemon.driver.during("cuIpcOpenMemHandle", lambda: daemon.pass_time(10))
        daemon.work()
        refused(daemon.last(A), ErrorCode.DEVICE_LOST)
        assert daemon.check()["clients"] == []


class TestTheEndOfAClient:
    def test_goodbye_is_answered_when_the_ring_is_unmapped(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        daemon.fetch(A, 3, [1])
        daemon.step_workers(2)
        assert daemon.ask(A, Goodbye(request_id=4)) is None
        assert daemon.service.num_leaving_rings == 1
        release = daemon.ask(A, Release(request_id=5, page_ids=[0]))
        refused(release, ErrorCode.NOT_REGISTERED)
        daemon.work(completes=False)
        assert daemon.reply(A, 4) is None
        # Its extent is anybody's meanwhile: the device reads staging memory.
        assert daemon.check()["clients"] == []
        daemon.service.tidy(1 << 20)
        free_bytes = daemon.check()["region"]["free_bytes"]
        assert free_bytes == daemon.region.size - STAGING_BYTES
        daemon.work()
        assert daemon.reply(A, 4).is_ring_closed
        daemon.machine.free(daemon.allocations[A])
        assert daemon.driver.held() == dict.fromkeys(daemon.driver.held(), 0)
        assert daemon.service.num_leaving_rings == 0

    def test_a_client_without_a_ring_says_goodbye_at_once(self, daemon: CudaDaemon) -> None:
        daemon.join(A, has_ring=False)
        assert isinstance(daemon.ask(A, Goodbye(request_id=4)), GoodbyeReply)

    @pytest.mark.parametrize("steps", [0, 1, 4])
    def test_a_client_that_is_killed_during_copies_harms_nobody(
        self, daemon: CudaDaemon, steps: int
    ) -> None:
        daemon.join(A)
        daemon.join(B)
        for request_id in (3, 4, 5):
            daemon.fetch(A, request_id, list(range(RING_ROWS)))
        daemon.fetch(B, 3, [7, 8])
        daemon.step_workers(steps)
        daemon.machine.kill_owner(daemon.allocations[A])
        daemon.service.close_session(daemon.sessions[A], "test")
        daemon.check()
        daemon.work()
        assert np.array_equal(daemon.landed(B, 0, 2), daemon.rows[B][[7, 8]])
        assert {r.code for to, r in daemon.replies if to == A and isinstance(r, ErrorReply)} == {
            ErrorCode.NOT_REGISTERED
        }
        (device,) = daemon.check()["cuda"]["devices"]
        assert (device["rings"], device["staging_bytes_used"]) == (1, 0)

    def test_memd_closes_all_rings_at_its_own_end(self, daemon: CudaDaemon) -> None:
        daemon.join(A)
        daemon.join(B)
        daemon.fetch(A, 3, list(range(RING_ROWS)))
        daemon.ask(B, Goodbye(request_id=4))
        # As if the worker had a thread of its own.
        clock, daemon.rings._cuda._clock = daemon.rings._cuda._clock, lambda: self_working(daemon)
        replies = daemon.service.stop_rings(1.0)
        daemon.rings._cuda._clock = clock
        assert [to for to, _ in replies] == [B]
        assert daemon.driver.held() == dict.fromkeys(daemon.driver.held(), 0)
        assert daemon.driver.ended_by_release == []
        refused(daemon.fetch(A, 5, [0]), ErrorCode.DEVICE_LOST)


def self_working(daemon: CudaDaemon) -> float:
    daemon.step_workers(3)
    daemon.driver.complete()
    return 0.0


class TestAboveADisk:
    """Pages come from disk, go through a slot that was filled for it, and land on a device."""

    DEEP = msgspec.structs.replace(LAYOUT, page_tokens=2 * LAYOUT.page_tokens)

    @pytest.fixture
    def deep(self) -> Iterator[CudaDaemon]:
        fd = os.memfd_create("test")
        daemon = CudaDaemon(fd=fd)
        daemon.hello(A, daemon.ring(A), layout=self.DEEP, num_pages=5, host_pages=2)
        daemon.work()
        self.hello = daemon.last(A)
        assert isinstance(self.hello, HelloReply)
        assert (self.hello.data_path, self.hello.host_pages) == ("cuda_ipc", 2)
        yield daemon
        daemon.check()
        daemon.service.close_session(daemon.sessions[A], "test")
        daemon.work()
        while daemon.service.tidy(1 << 20):
            pass
        assert daemon.store.memory_free_bytes == daemon.store.memory_bytes
        assert allocated_bytes(fd) == 0, "staging memory went with the last ring"
        os.close(fd)

    def store(self, daemon: CudaDaemon, num_pages: int) -> None:
        """Frozen pages, filled with their number and one."""
        for page in range(num_pages):
            reserved = daemon.ask(A, Reserve(request_id=100 + page, num_pages=1))
            daemon.work()
            reserved = reserved or daemon.reply(A, 100 + page)
            assert reserved.page_ids == [page]
            start = self.hello.extent_offset + page * self.DEEP.page_bytes
            daemon.region[start : start + self.DEEP.page_bytes] = page + 1
            daemon.ask(A, Commit(request_id=11, page_ids=[page]))
            daemon.ask(A, Freeze(request_id=12, page_ids=[page]))

    def test_rows_of_pages_on_disk_land_in_the_ring(self, deep: CudaDaemon) -> None:
        self.store(deep, 5)
        size = self.DEEP.rows_per_page
        assert deep.check()["clients"][0]["disk_pages"] == 3
        for page in range(5):
            assert deep.fetch(A, 20 + page, [page * size, page * size + size - 1]) is None
            deep.work()
            assert isinstance(deep.reply(A, 20 + page), FetchReply)
            assert (deep.landed(A, 0, 2) == page + 1).all()

    def test_a_fetch_of_too_many_pages_gives_its_place_back(self, deep: CudaDaemon) -> None:
        self.store(deep, 3)
        size = self.DEEP.rows_per_page
        reply = deep.fetch(A, 30, [0, size, 2 * size])
        deep.work()
        refused(reply or deep.reply(A, 30), ErrorCode.NO_ROOM)
        deep.fetch(A, 31, [0, size])
        deep.work()
        assert (deep.landed(A, 0, 1) == 1).all()
        assert (deep.landed(A, 1, 1) == 2).all()
