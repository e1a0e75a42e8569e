"""A service above a slow and failing disk: fetches are right or refused, and all is given back.

Real memory with holes in it, the real service, tiers and mover; only the disk is a fake, and pages
move when the machine lets them. Requests are answered in whatever step that takes, and clients ask
on meanwhile.
"""

from __future__ import annotations

import collections
import dataclasses
import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from memd.protocol import (
    PROTOCOL_VERSION,
    Commit,
    ErrorCode,
    ErrorReply,
    Fetch,
    FetchReply,
    Freeze,
    Goodbye,
    Hello,
    HelloReply,
    KVLayout,
    Release,
    Reserve,
    ReserveReply,
    Thaw,
    ThawReply,
    decode_reply,
    encode,
)
from memd.service import Service
from memd.store import Store
from memd.tiers import DiskTier, Tiers
from memd.tiers.disk import GetJob
from memd.tiers.eviction import POLICY_NAMES
from memd.tiers.files import BLOCK_BYTES
from memd.tiers.holes import allocated_bytes
from memd.tiers.runner import Job, Running, run_at_once
from memd.tiers.testing import FakeFile
from memd.tiers.tiered import Place
from memd.transfer import HostTransfer

# A page is a row, a memory page and a block.
LAYOUT = KVLayout(num_heads=1, head_dim=512, dtype="float32", page_tokens=1)
PAGE = LAYOUT.page_bytes
MEMORY_PAGES, DISK_PAGES, LANDING_ROWS = 24, 12, 4
RESERVED, SEALED, FROZEN = "reserved", "sealed", "frozen"
PATIENCE = 1 << 30


@dataclasses.dataclass
class Pending:
    """A request without its reply.

    Attributes:
        request: It.
        contents: What a fetch must bring, by landing row.
    """

    request: Any
    contents: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Client:
    """A client that keeps its promises.

    Attributes:
        session: Of its process.
        hello: What memd told it; None while it waits.
        states: Of the pages that it holds.
        contents: What it wrote to each page.
        pending: By request id.
        lost: Pages of which memd said that they did not come back.
    """

    session: bytes
    num_pages: int
    hello: HelloReply | None = None
    states: dict[int, str] = dataclasses.field(default_factory=dict)
    contents: dict[int, int] = dataclasses.field(default_factory=dict)
    pending: dict[int, Pending] = dataclasses.field(default_factory=dict)
    lost: set[int] = dataclasses.field(default_factory=set)

    def held(self, *states: str) -> list[int]:
        """Pages in these states that no request of its own is about."""
        busy = {page for p in self.pending.values() for page in getattr(p.request, "page_ids", ())}
        return [page for page, state in self.states.items() if state in states and page not in busy]


class TieredServiceMachine(RuleBasedStateMachine):
    """Clients above a disk."""

    @initialize(eviction=st.sampled_from(POLICY_NAMES), is_slow=st.booleans())
    def start(self, eviction: str, is_slow: bool) -> None:
        self.fd = os.memfd_create("test")
        size = (MEMORY_PAGES + DISK_PAGES) * PAGE
        os.ftruncate(self.fd, size)
        self.memory = np.frombuffer(mmap.mmap(self.fd, size), dtype=np.uint8)
        self.file = FakeFile(2 * DISK_PAGES * BLOCK_BYTES)
        self.disk = DiskTier(
            Path(),
            len(self.file.data),
            max_errors_in_a_row=PATIENCE,
            open_file=lambda directory, num_bytes: self.file,
        )
        self.running: list[Running] = []
        tiers = Tiers(
            self.disk,
            eviction=eviction,
            memory=self.memory,
            fd=self.fd,
            run=self.run_later if is_slow else run_at_once,
        )
        # So that the tiers are looked at in every stats.
        self.now = 0.0
        self.store = Store(size, memory_bytes=MEMORY_PAGES * PAGE, disk_bytes=self.disk.num_bytes)
        self.service = Service(
            self.store, HostTransfer(self.memory), tiers=tiers, clock=lambda: self.now
        )
        self.clients: dict[bytes, Client] = {}
        self.num_requests = 0
        self.num_writes = 0
        self.was_spoilt = False
        self.could_write = True
        self.come(num_pages=6, host_pages=3)
        self.store_a_prompt(0, 3)
        self.store_a_prompt(0, 2)

    def teardown(self) -> None:
        if not hasattr(self, "service"):
            return
        if self.num_requests % 2:
            self.finish()
            assert not any(client.pending for client in self.clients.values())
        for connection in list(self.clients):
            self.service.close_session(self.clients.pop(connection).session, "test")
        self.finish()
        while self.service.tidy(PAGE):
            pass
        assert self.store.extents.num_allocated == 0
        assert self.store.disk_free_bytes == self.disk.num_bytes
        assert self.disk.num_slots == 0
        assert allocated_bytes(self.fd) == 0
        os.close(self.fd)

    def run_later(self, job: Job) -> Running:
        """What the daemon's thread is."""
        self.running.append(Running(job))
        return self.running[-1]

    @rule()
    def arrive(self) -> None:
        while self.running:
            self.running.pop(0).run()
            self.service.note_news()

    @rule()
    def step(self) -> None:
        for connection, raw in self.service.step():
            self.take(connection, raw)

    @rule()
    def tidy(self) -> None:
        self.service.tidy(PAGE)

    def finish(self) -> None:
        """Let everything happen that can."""
        for _ in range(2000):
            self.arrive()
            if not self.service.has_work:
                return
            self.step()
        raise AssertionError("it never ends")

    def ask(self, connection: bytes, make: Any, contents: dict[int, int] | None = None) -> None:
        self.num_requests += 1
        request = make(self.num_requests)
        self.clients[connection].pending[request.request_id] = Pending(request, contents or {})
        raw = self.service.handle(connection, encode(request))
        if raw is not None:
            self.take(connection, raw)

    def take(self, connection: bytes, raw: bytes) -> None:
        """What a client does with a reply."""
        reply = decode_reply(raw)
        client = self.clients.get(connection)
        if client is None:
            assert isinstance(reply, ErrorReply)
            assert reply.code is ErrorCode.NOT_REGISTERED
            return
        pending = client.pending.pop(reply.request_id)
        request = pending.request
        if isinstance(reply, ErrorReply):
            self.take_error(client, request, reply)
        elif isinstance(reply, HelloReply):
            client.hello = reply
            extent = self.memory[reply.extent_offset :][: reply.extent_bytes]
            # Looking at a hole gives it memory, so only where there is some.
            assert not extent[reply.landing_offset :].any(), "another client's bytes"
        elif isinstance(reply, ReserveReply):
            for page in reply.page_ids or []:
                assert page not in client.states, "a page was given twice"
                client.states[page] = RESERVED
                self.write(client, page)
        elif isinstance(reply, FetchReply):
            for row, content in pending.contents.items():
                landed = self.landing(client, row)
                assert (landed == content).all(), "wrong bytes"
        elif isinstance(reply, ThawReply):
            assert self.was_spoilt or not reply.lost
            client.lost.update(reply.lost)
            for page in request.page_ids:
                client.states[page] = SEALED
                if page not in client.lost:
                    assert (self.page(client, page) == client.contents[page]).all()
                    self.write(client, page)
        elif isinstance(request, Commit | Freeze):
            for page in request.page_ids:
                client.states[page] = SEALED if isinstance(request, Commit) else FROZEN
        elif isinstance(request, Release):
            for page in request.page_ids:
                del client.states[page]
                client.lost.discard(page)

    def take_error(self, client: Client, request: Any, reply: ErrorReply) -> None:
        match reply.code:
            case ErrorCode.POOL_FULL:
                assert isinstance(request, Hello)
            case ErrorCode.PAGE_LOST:
                assert isinstance(request, Fetch)
                assert self.was_spoilt
            case ErrorCode.NO_ROOM:
                assert isinstance(request, Fetch | Thaw)
                # Else others could have left.
                stays = [page for page, state in client.states.items() if state != FROZEN]
                wanted = len(set(self.pages_of(request)) | set(stays))
                assert client.hello is not None
                others = sum(1 for p in client.pending.values() if isinstance(p.request, Reserve))
                assert (
                    wanted > client.hello.host_pages
                    or not self.could_write
                    or others
                    or self.was_spoilt
                )
            case _:
                raise AssertionError(reply)

    def pages_of(self, request: Any) -> list[int]:
        if isinstance(request, Thaw):
            return list(request.page_ids)
        return np.frombuffer(request.rows, dtype="<u4").tolist()

    def page(self, client: Client, page: int) -> Any:
        assert client.hello is not None
        return self.memory[client.hello.extent_offset + page * PAGE :][:PAGE]

    def landing(self, client: Client, row: int) -> Any:
        assert client.hello is not None
        start = client.hello.extent_offset + client.hello.landing_offset + row * PAGE
        return self.memory[start : start + PAGE]

    def write(self, client: Client, page: int) -> None:
        self.num_writes += 1
        client.contents[page] = self.num_writes % 255 + 1
        self.page(client, page)[:] = client.contents[page]

    def some(self, index: int) -> tuple[bytes, Client] | None:
        """A client that is registered."""
        there = [(name, client) for name, client in self.clients.items() if client.hello]
        return there[index % len(there)] if there else None

    @precondition(lambda self: len(self.clients) < 3)
    @rule(num_pages=st.integers(4, 10), host_pages=st.sampled_from([2, 3, 4, 0]))
    def come(self, num_pages: int, host_pages: int) -> None:
        connection = b"c%d" % self.num_requests
        self.clients[connection] = Client(self.service.open_session(1), num_pages)
        self.ask(
            connection,
            lambda request_id: Hello(
                request_id=request_id,
                version=PROTOCOL_VERSION,
                session=self.clients[connection].session,
                pid=1,
                layout=LAYOUT,
                num_pages=num_pages,
                landing_bytes=LANDING_ROWS * PAGE,
                host_pages=min(host_pages, num_pages),
            ),
        )
        client = self.clients[connection]
        if client.hello is None and not client.pending:
            self.service.close_session(self.clients.pop(connection).session, "it was refused")

    @precondition(lambda self: len(self.clients) > 1)
    @rule(index=st.integers(0, 2), is_polite=st.booleans())
    def go(self, index: int, is_polite: bool) -> None:
        chosen = self.some(index)
        if chosen is None:
            return
        connection, client = chosen
        if is_polite:
            raw = self.service.handle(connection, encode(Goodbye(request_id=1 << 40)))
            assert raw is not None
        del self.clients[connection]
        self.service.close_session(client.session, "test")

    @rule(index=st.integers(0, 2), num_pages=st.integers(1, 4))
    def reserve(self, index: int, num_pages: int) -> None:
        if chosen := self.some(index):
            self.ask(chosen[0], lambda i: Reserve(request_id=i, num_pages=num_pages))

    @rule(index=st.integers(0, 2), num_pages=st.integers(1, 4))
    def store_a_prompt(self, index: int, num_pages: int) -> None:
        chosen = self.some(index)
        if chosen is None:
            return
        self.reserve(index, num_pages)
        self.finish()
        self.change(index, Commit, RESERVED, range(9))
        self.change(index, Freeze, SEALED, range(9))

    @rule(
        index=st.integers(0, 2),
        kind=st.sampled_from([(Commit, RESERVED), (Freeze, SEALED), (Thaw, FROZEN)]),
        which=st.sets(st.integers(0, 9), min_size=1, max_size=3),
    )
    def change_some(self, index: int, kind: tuple[Any, str], which: set[int]) -> None:
        self.change(index, *kind, which)

    def change(self, index: int, kind: Any, state: str, which: Any) -> None:
        chosen = self.some(index)
        if chosen is None:
            return
        ids = [page for page in chosen[1].held(state) if page in which]
        if ids:
            self.ask(chosen[0], lambda i: kind(request_id=i, page_ids=ids))

    @rule(index=st.integers(0, 2), which=st.sets(st.integers(0, 9), min_size=1, max_size=4))
    def release(self, index: int, which: set[int]) -> None:
        chosen = self.some(index)
        if chosen is None:
            return
        ids = [page for page in chosen[1].held(RESERVED, SEALED, FROZEN) if page in which]
        if ids:
            # Fetches that were asked for before still read them.
            self.ask(chosen[0], lambda i: Release(request_id=i, page_ids=ids))

    @rule(
        index=st.integers(0, 2),
        which=st.lists(st.integers(0, 9), min_size=1, max_size=LANDING_ROWS, unique=True),
    )
    def fetch(self, index: int, which: list[int]) -> None:
        self.read(index, which)

    @rule(index=st.integers(0, 2), num_pages=st.integers(1, 3))
    def fetch_from_disk(self, index: int, num_pages: int) -> None:
        self.read(index, self.on_disk(index)[:num_pages])

    @rule(index=st.integers(0, 2))
    def fetch_and_release(self, index: int) -> None:
        pages = self.on_disk(index)[:2]
        self.read(index, pages)
        self.release(index, set(pages))

    @rule(index=st.integers(0, 2), is_released=st.booleans(), is_polite=st.booleans())
    def leave_while_a_page_comes_back(self, index: int, is_released: bool, is_polite: bool) -> None:
        pages = self.on_disk(index)[:2]
        self.read(index, pages)
        if is_released:
            self.release(index, set(pages))
        for _ in range(6):
            if self.running and isinstance(self.running[0].job, GetJob):
                break
            self.arrive()
            self.step()
        if len(self.clients) > 1:
            self.go(index, is_polite)
        # Somebody else's pages may go where its own were.
        self.come(4, 2)
        self.reserve(index, 3)

    @rule(index=st.integers(0, 2))
    def thaw_from_disk(self, index: int) -> None:
        self.change(index, Thaw, FROZEN, self.on_disk(index)[:2])

    def on_disk(self, index: int) -> list[int]:
        """Pages of a client that a fetch would have to bring back."""
        chosen = self.some(index)
        tier = None if chosen is None else self.service._sessions.client(chosen[0]).tier
        if chosen is None or tier is None:
            return []
        return [page for page in chosen[1].states if tier.pages.place(page) is Place.DISK]

    def read(self, index: int, which: list[int]) -> None:
        chosen = self.some(index)
        if chosen is None:
            return
        connection, client = chosen
        used = [row for p in client.pending.values() for row in p.contents]
        start = max(used, default=-1) + 1
        pages = [page for page in which if page in client.held(SEALED, FROZEN)]
        pages = pages[: LANDING_ROWS - start]
        if not pages:
            return
        contents = {start + row: client.contents[page] for row, page in enumerate(pages)}
        if client.lost & set(pages):
            contents = {}
        packed = np.array(pages, dtype="<u4").tobytes()
        self.ask(
            connection,
            lambda i: Fetch(request_id=i, rows=packed, landing_row=start),
            contents,
        )

    @precondition(lambda self: hasattr(self, "file"))
    @rule(
        kind=st.sampled_from(["write error", "read error", "lost write", "flipped bit"]),
        byte=st.integers(0, 1 << 20),
    )
    def spoil(self, kind: str, byte: int) -> None:
        if kind == "write error":
            self.could_write = False
            self.file.write_errors = collections.deque([errno.EIO])
            return
        self.was_spoilt = True
        if kind == "read error":
            self.file.read_errors = collections.deque([errno.EIO])
        elif kind == "lost write":
            self.file.num_writes_to_lose = 1
        else:
            self.file.data[byte % len(self.file.data)] ^= 1 << byte % 8

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "service"):
            return
        self.now += 60
        assert self.service.stats()["integrity"] == "ok"
        promised = MEMORY_PAGES * PAGE - self.store.memory_free_bytes
        assert allocated_bytes(self.fd) <= promised, "more memory than was promised"


TestTieredService = TieredServiceMachine.TestCase
