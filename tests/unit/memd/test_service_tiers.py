"""A service above a disk whose pages move when the test says so."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from memd.protocol import (
    PROTOCOL_VERSION,
    Commit,
    ErrorCode,
    ErrorReply,
    Fetch,
    FetchReply,
    Freeze,
    Goodbye,
    GoodbyeReply,
    Hello,
    HelloReply,
    KVLayout,
    Ping,
    Pong,
    Release,
    ReleaseReply,
    Reserve,
    Thaw,
    ThawReply,
    decode_reply,
    encode,
)
from memd.service import Service
from memd.store import Store
from memd.tiers import DiskTier, Tiers
from memd.tiers.holes import allocated_bytes
from memd.tiers.runner import Job, Running
from memd.tiers.testing import FakeFile
from memd.transfer import HostTransfer

if TYPE_CHECKING:
    from collections.abc import Iterator

# A page is a row, a memory page and a block of the disk.
LAYOUT = KVLayout(num_heads=1, head_dim=512, dtype="float32", page_tokens=1)
PAGE = LAYOUT.page_bytes
MEMORY_PAGES, DISK_PAGES, LANDING_ROWS = 8, 6, 2
SLOT = 2 * PAGE


class Daemon:
    """A service, one client of it at a time to a name, and a disk."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        size = (MEMORY_PAGES + 2 * DISK_PAGES) * PAGE
        os.ftruncate(fd, size)
        self.memory = np.frombuffer(mmap.mmap(fd, size), dtype=np.uint8)
        self.file = FakeFile(DISK_PAGES * SLOT)
        self.disk = DiskTier(Path(), len(self.file.data), open_file=lambda _, __: self.file)
        self.running: list[Running] = []
        self.is_slow = False
        self.store = Store(size, memory_bytes=MEMORY_PAGES * PAGE, disk_bytes=self.disk.num_bytes)
        tiers = Tiers(self.disk, eviction="lru", memory=self.memory, fd=fd, run=self.run)
        self.service = Service(self.store, HostTransfer(self.memory), tiers=tiers)
        self.sessions: dict[bytes, bytes] = {}
        self.extents: dict[bytes, int] = {}
        self.landings: dict[bytes, int] = {}
        self.replies: dict[tuple[bytes, int], Any] = {}
        self.num_requests = 0

    def run(self, job: Job) -> Running:
        self.running.append(Running(job))
        if not self.is_slow:
            self.arrive()
        return self.running[-1] if self.is_slow else self.last

    def arrive(self) -> None:
        """Let the pages that are on their way arrive."""
        while self.running:
            self.last = self.running.pop(0)
            self.last.run()
            self.service.note_news()

    def step(self) -> None:
        """Let the service do what it can do now."""
        for _ in range(100):
            if not self.service.has_work:
                return
            for connection, raw in self.service.step():
                reply = decode_reply(raw)
                self.replies[connection, reply.request_id or 0] = reply
        raise AssertionError("it never ends")

    def send(self, kind: Any, connection: bytes = b"a", **fields: Any) -> tuple[bytes, int]:
        """Send a request; what its reply will be found by."""
        self.num_requests += 1
        request = kind(request_id=self.num_requests, **fields)
        raw = self.service.handle(connection, encode(request))
        if raw is not None:
            self.replies[connection, self.num_requests] = decode_reply(raw)
        return connection, self.num_requests

    def ask(self, kind: Any, connection: bytes = b"a", **fields: Any) -> Any:
        """Send a request and let everything happen; its reply."""
        key = self.send(kind, connection, **fields)
        self.step()
        return self.replies[key]

    def hello(self, connection: bytes = b"a", **changes: Any) -> Any:
        self.sessions[connection] = self.service.open_session(1)
        fields = {
            "version": PROTOCOL_VERSION,
            "session": self.sessions[connection],
            "pid": 1,
            "layout": LAYOUT,
            "num_pages": 5,
            "landing_bytes": LANDING_ROWS * PAGE,
            "host_pages": 2,
        }
        reply = self.ask(Hello, connection, **{**fields, **changes})
        if isinstance(reply, HelloReply):
            self.extents[connection] = reply.extent_offset
            self.landings[connection] = reply.extent_offset + reply.landing_offset
        return reply

    def page(self, page_id: int, connection: bytes = b"a") -> Any:
        return self.memory[self.extents[connection] + page_id * PAGE :][:PAGE]

    def landed(self, row: int, connection: bytes = b"a") -> Any:
        start = self.landings[connection] + row * PAGE
        return self.memory[start : start + PAGE]

    def store_pages(self, num_pages: int, connection: bytes = b"a") -> list[int]:
        """Frozen pages, each with its number and one in it."""
        stored = []
        for _ in range(num_pages):
            page_ids = self.ask(Reserve, connection, num_pages=1).page_ids
            self.page(page_ids[0], connection)[:] = page_ids[0] + 1
            self.ask(Commit, connection, page_ids=page_ids)
            self.ask(Freeze, connection, page_ids=page_ids)
            stored += page_ids
        return stored

    def close_session(self, connection: bytes = b"a") -> None:
        self.service.close_session(self.sessions.pop(connection), "test")
        self.step()

    def tidy(self) -> None:
        while self.service.tidy(1 << 20):
            pass

    def client(self, connection: bytes = b"a") -> dict[str, Any]:
        clients = self.service.stats()["clients"]
        return next(iter(clients), {})


def rows(*pages: int) -> bytes:
    return np.array(pages, dtype="<u4").tobytes()


@pytest.fixture
def daemon() -> Iterator[Daemon]:
    fd = os.memfd_create("test")
    daemon = Daemon(fd)
    yield daemon
    daemon.arrive()
    daemon.step()
    assert daemon.service.stats()["integrity"] == "ok"
    for connection in list(daemon.sessions):
        daemon.close_session(connection)
    daemon.arrive()
    daemon.step()
    daemon.tidy()
    assert daemon.store.extents.num_allocated == 0
    assert daemon.store.memory_free_bytes == MEMORY_PAGES * PAGE
    assert daemon.store.disk_free_bytes == DISK_PAGES * SLOT
    assert daemon.disk.num_slots == 0
    assert allocated_bytes(fd) == 0
    os.close(fd)


@pytest.fixture
def client(daemon: Daemon) -> Daemon:
    """A daemon with a client of five pages, two of which may be in memory."""
    reply = daemon.hello()
    assert isinstance(reply, HelloReply)
    assert reply.host_pages == 2
    return daemon


def test_more_pages_than_memory_are_kept_and_read(client: Daemon) -> None:
    stored = client.store_pages(5)
    assert stored == [0, 1, 2, 3, 4]
    found = client.client()
    assert (found["pages_frozen"], found["memory_pages"], found["disk_pages"]) == (5, 2, 3)
    assert allocated_bytes(client.fd) == (2 + LANDING_ROWS) * PAGE
    for first in range(4):
        assert isinstance(client.ask(Fetch, rows=rows(first, first + 1), landing_row=0), FetchReply)
        assert (client.landed(0) == first + 1).all()
        assert (client.landed(1) == first + 2).all()


def test_nobody_waits_for_the_disk_but_who_needs_it(client: Daemon) -> None:
    client.store_pages(3)
    assert isinstance(client.hello(b"b", host_pages=0, num_pages=1), HelloReply)
    client.is_slow = True
    slow = client.send(Fetch, rows=rows(0), landing_row=0)
    client.step()
    assert slow not in client.replies
    assert not client.service.has_work, "it sleeps until the page has arrived"
    assert isinstance(client.ask(Ping), Pong)
    assert client.ask(Reserve, b"b", num_pages=1).page_ids == [0]
    for _ in range(2):  # one page leaves, the other comes
        client.arrive()
        client.step()
    assert isinstance(client.replies[slow], FetchReply)
    assert (client.landed(0) == 1).all()


def test_a_clients_requests_that_wait_keep_their_order(client: Daemon) -> None:
    client.store_pages(4)
    client.is_slow = True
    keys = [
        client.send(Fetch, rows=rows(0), landing_row=0),
        client.send(Thaw, page_ids=[1]),
        client.send(Fetch, rows=rows(3), landing_row=1),
        client.send(Reserve, num_pages=1),
    ]
    answered = []
    for _ in range(20):
        client.arrive()
        client.step()
        answered += [key for key in keys if key in client.replies and key not in answered]
    assert answered == keys
    # Page 1 is thawed and stays, and the new one stays, too.
    assert client.replies[keys[-1]].page_ids == [4]
    found = client.client()
    assert (found["memory_pages"], found["disk_pages"]) == (2, 3)


def test_pages_that_stay_leave_no_room_for_others(client: Daemon) -> None:
    page_ids = client.ask(Reserve, num_pages=2).page_ids
    assert page_ids == [0, 1]
    assert client.ask(Reserve, num_pages=1).page_ids is None, "a full pool is a value"
    client.ask(Commit, page_ids=[0])
    assert client.ask(Reserve, num_pages=1).page_ids is None
    client.ask(Freeze, page_ids=[0])
    assert client.ask(Reserve, num_pages=1).page_ids == [2]
    refused = client.ask(Fetch, rows=rows(0), landing_row=0)
    assert refused.code is ErrorCode.NO_ROOM
    assert "1 pages in memory at a time" in refused.message
    client.ask(Release, page_ids=[1])
    assert isinstance(client.ask(Fetch, rows=rows(0), landing_row=0), FetchReply)


def test_a_page_that_rots_on_disk_is_lost_and_never_wrong(client: Daemon) -> None:
    client.store_pages(3)
    client.file.data[PAGE + 17] ^= 1
    refused = client.ask(Fetch, rows=rows(0, 2), landing_row=0)
    assert refused.code is ErrorCode.PAGE_LOST
    assert "page 0 did not come back" in refused.message
    assert client.client()["lost_pages"] == 1
    assert isinstance(client.ask(Fetch, rows=rows(1), landing_row=0), FetchReply)
    assert client.ask(Thaw, page_ids=[0, 1]).lost == [0]
    assert isinstance(client.ask(Release, page_ids=[0]), ReleaseReply)
    assert client.client()["lost_pages"] == 0


def test_a_disk_that_cannot_be_read_loses_the_page(client: Daemon) -> None:
    client.store_pages(3)
    client.file.read_errors.append(errno.EIO)
    assert client.ask(Fetch, rows=rows(0), landing_row=0).code is ErrorCode.PAGE_LOST


def test_a_disk_that_takes_nothing_is_as_if_there_were_none(client: Daemon) -> None:
    client.store_pages(2)
    client.file.write_errors.extend([errno.ENOSPC] * 3)
    for _ in range(3):
        assert client.ask(Reserve, num_pages=1).page_ids is None
    assert not client.service.stats()["disk"]["is_writable"]
    assert isinstance(client.ask(Fetch, rows=rows(0, 1), landing_row=0), FetchReply)


def test_a_thawed_page_may_be_written_and_frozen_again(client: Daemon) -> None:
    client.store_pages(4)
    assert isinstance(client.ask(Thaw, page_ids=[0]), ThawReply)
    assert (client.page(0) == 1).all()
    client.page(0)[:] = 77
    client.ask(Freeze, page_ids=[0])
    for page_id in (1, 2, 3):
        client.ask(Fetch, rows=rows(page_id), landing_row=0)
    assert client.client()["disk_pages"] == 2
    client.ask(Fetch, rows=rows(0), landing_row=0)
    assert (client.landed(0) == 77).all()


def test_a_page_released_while_its_thaw_waits_is_not_thawed(client: Daemon) -> None:
    client.store_pages(3)
    client.is_slow = True
    thaw = client.send(Thaw, page_ids=[0])
    assert isinstance(client.ask(Release, page_ids=[0]), ReleaseReply)
    assert client.client()["pages_leaving"] == 1
    for _ in range(4):
        client.arrive()
        client.step()
    assert client.replies[thaw].code is ErrorCode.WRONG_STATE
    assert client.client()["pages_free"] == 3


def test_too_many_that_wait_are_refused_and_pin_nothing(
    client: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memd.service.MAX_FETCHES_IN_FLIGHT", 2)
    client.store_pages(4)
    client.is_slow = True
    waiting = [client.send(Thaw, page_ids=[0]), client.send(Fetch, rows=rows(1), landing_row=0)]
    for kind, fields in (
        (Thaw, {"page_ids": [2]}),
        (Fetch, {"rows": rows(2), "landing_row": 1}),
        (Reserve, {"num_pages": 1}),
    ):
        assert client.ask(kind, **fields).code is ErrorCode.TOO_MANY
    for _ in range(6):
        client.arrive()
        client.step()
    assert isinstance(client.replies[waiting[0]], ThawReply)
    assert isinstance(client.replies[waiting[1]], FetchReply)
    assert isinstance(client.ask(Release, page_ids=[2]), ReleaseReply)
    assert client.client()["pages_leaving"] == 0


@pytest.mark.parametrize("is_released", [False, True])
@pytest.mark.parametrize("is_polite", [False, True])
def test_memory_of_a_client_that_left_waits_for_the_page_on_its_way(
    client: Daemon, is_released: bool, is_polite: bool
) -> None:
    client.store_pages(3)
    client.is_slow = True
    fetch = client.send(Fetch, rows=rows(0), landing_row=0)
    if is_released:
        client.ask(Release, page_ids=[0])
    client.arrive()  # another page has left; this one is coming now
    client.step()
    assert client.running
    if is_polite:
        assert isinstance(client.ask(Goodbye), GoodbyeReply)
    client.close_session()
    assert client.replies[fetch].code is ErrorCode.NOT_REGISTERED
    assert client.store.dirty_bytes == 0, "the disk still writes there"
    assert client.store.memory_free_bytes == (MEMORY_PAGES - 2 - LANDING_ROWS) * PAGE
    client.arrive()
    client.step()
    client.tidy()
    assert client.store.memory_free_bytes == MEMORY_PAGES * PAGE
    assert client.disk.num_slots == 0
    client.disk.check_integrity()


def test_memory_and_disk_are_promised_once(client: Daemon) -> None:
    reply = client.hello(b"b", num_pages=6, host_pages=2)
    assert isinstance(reply, ErrorReply)
    assert reply.code is ErrorCode.POOL_FULL
    assert "of disk" in reply.message
    assert isinstance(client.hello(b"c", num_pages=4, host_pages=2), HelloReply)
    refused = client.hello(b"d", num_pages=1, host_pages=1)
    assert refused.code is ErrorCode.POOL_FULL
    client.close_session()
    # What it had is given back in the background, or when somebody asks for it.
    assert isinstance(client.hello(b"e", num_pages=5, host_pages=2), HelloReply)


def test_a_client_without_host_pages_has_all_of_them_in_memory(daemon: Daemon) -> None:
    reply = daemon.hello(num_pages=3, host_pages=0)
    assert reply.host_pages == 3
    assert allocated_bytes(daemon.fd) == (3 + LANDING_ROWS) * PAGE
    assert daemon.client()["memory_pages"] == 3


def test_no_memory_of_a_client_is_seen_by_the_next(client: Daemon) -> None:
    client.store_pages(5)
    client.close_session()
    client.tidy()
    assert allocated_bytes(client.fd) == 0
    client.hello(b"b", num_pages=5, host_pages=2)
    client.ask(Reserve, b"b", num_pages=2)
    assert not client.page(0, b"b").any()
    assert not client.page(1, b"b").any()


def test_pages_that_are_no_whole_memory_pages_stay_in_memory(daemon: Daemon) -> None:
    layout = KVLayout(num_heads=1, head_dim=64, dtype="float32", page_tokens=1)
    refused = daemon.hello(layout=layout, landing_bytes=0)
    assert refused.code is ErrorCode.OUT_OF_RANGE
    assert "a multiple of 4096 bytes, got 512" in refused.message
    assert isinstance(daemon.hello(layout=layout, landing_bytes=0, host_pages=0), HelloReply)


def test_a_host_without_memory_is_said_at_hello(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memd.tiers.client.fill_hole", lambda fd, offset, length: False)
    refused = daemon.hello()
    assert refused.code is ErrorCode.POOL_FULL
    assert "the host has no memory" in refused.message
    monkeypatch.undo()
    daemon.tidy()
    assert isinstance(daemon.ask(Hello, **_same_hello(daemon)), HelloReply), "it may ask again"


def _same_hello(daemon: Daemon) -> dict[str, Any]:
    return {
        "version": PROTOCOL_VERSION,
        "session": daemon.sessions[b"a"],
        "pid": 1,
        "layout": LAYOUT,
        "num_pages": 5,
        "landing_bytes": LANDING_ROWS * PAGE,
        "host_pages": 2,
    }
