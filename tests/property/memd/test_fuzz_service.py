"""Any frames from any peers: one right answer each, in bounded time, and an error changes nothing.

``tests.chaos.model`` says what is right, ``tests.chaos.judged`` compares, ``tests.chaos.hostile``
draws the frames. ``benchmarks/memd/fuzz.py`` runs the same over many more inputs.
"""

from __future__ import annotations

import gc
import time
import tracemalloc
from typing import TypeVar

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from memd.histogram import LogHistogram
from memd.protocol import (
    Commit,
    Fetch,
    Freeze,
    Goodbye,
    HelloReply,
    Ping,
    Release,
    Reserve,
    ReserveReply,
    Stats,
    Thaw,
    encode,
)
from tests.chaos.hostile import REQUEST_TAGS, hostile_frame, valid_request
from tests.chaos.judged import (
    LANDING_ROWS,
    LAYOUT,
    NUM_PAGES,
    JudgedService,
    hello_frame,
    send_hostile_frames,
)
from tests.chaos.model import FROZEN, RESERVED, SEALED

T = TypeVar("T")

CONNECTIONS = [b"one", b"two", b"three"]
MAX_FRAME_BYTES = 1 << 14

seeds = st.integers(0, 2**64 - 1)
connections = st.sampled_from(CONNECTIONS)


@given(seeds=st.lists(seeds, min_size=1, max_size=60), is_slow=st.booleans())
def test_every_hostile_frame_gets_its_answer_and_changes_nothing(
    seeds: list[int], is_slow: bool
) -> None:
    with JudgedService(is_slow=is_slow) as judged:
        send_hostile_frames(judged, seeds)


def mostly(usual: st.SearchStrategy[T], else_: st.SearchStrategy[T]) -> st.SearchStrategy[T]:
    """Three times out of four the usual."""
    return st.one_of(usual, usual, usual, else_)


has_clients = precondition(lambda self: self.judged.model.clients)


class ServiceMachine(RuleBasedStateMachine):
    """Peers come, ask for what is right or wrong, talk nonsense, and go, in any order."""

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.judged = JudgedService(max_frame_bytes=MAX_FRAME_BYTES, is_slow=True)
        self.num_fills = 0
        self.next_id = 1

    def teardown(self) -> None:
        try:
            self.judged.finish()
        finally:
            self.judged.close()

    def request_id(self) -> int:
        self.next_id += 1
        return self.next_id

    @rule(target=sessions)
    def attach(self) -> bytes:
        return self.judged.attach()

    @rule(session=consumes(sessions))
    def die(self, session: bytes) -> None:
        self.judged.detach(session)

    @rule(
        connection=connections,
        session=sessions | st.just(bytes(16)),
        changes=st.fixed_dictionaries(
            {},
            optional={
                "version": st.integers(0, 3),
                "num_pages": st.integers(1, 12) | st.integers(1, 2**32 - 1),
                "landing_bytes": st.integers(0, 40).map(lambda rows: rows * LAYOUT.row_bytes)
                | st.integers(0, 2**63 - 1),
            },
        ),
    )
    def say_hello(self, connection: bytes, session: bytes, changes: dict[str, int]) -> None:
        self.judged.send(connection, hello_frame(session, **changes))

    @has_clients
    @rule(index=st.integers(0, 2), num_pages=st.integers(0, NUM_PAGES + 1))
    def reserve(self, index: int, num_pages: int) -> None:
        self.reserve_and_fill(self.client(index), num_pages)

    @has_clients
    @rule(index=st.integers(0, 2), data=st.data())
    def commit(self, index: int, data: st.DataObject) -> None:
        connection = self.client(index)
        ids = data.draw(self.pages(connection, RESERVED))
        self.judged.send(connection, encode(Commit(request_id=self.request_id(), page_ids=ids)))

    @has_clients
    @rule(index=st.integers(0, 2), data=st.data())
    def release(self, index: int, data: st.DataObject) -> None:
        connection = self.client(index)
        ids = data.draw(self.pages(connection, RESERVED, SEALED, FROZEN))
        self.judged.send(connection, encode(Release(request_id=self.request_id(), page_ids=ids)))

    @has_clients
    @rule(index=st.integers(0, 2), data=st.data(), has_depths=st.booleans())
    def freeze(self, index: int, data: st.DataObject, has_depths: bool) -> None:
        connection = self.client(index)
        ids = data.draw(self.pages(connection, SEALED))
        depths = ids if has_depths else []
        request = Freeze(request_id=self.request_id(), page_ids=ids, depths=depths)
        self.judged.send(connection, encode(request))

    @has_clients
    @rule(index=st.integers(0, 2), data=st.data())
    def thaw(self, index: int, data: st.DataObject) -> None:
        connection = self.client(index)
        ids = data.draw(self.pages(connection, FROZEN))
        self.judged.send(connection, encode(Thaw(request_id=self.request_id(), page_ids=ids)))

    @has_clients
    @rule(
        index=st.integers(0, 2),
        data=st.data(),
        landing_row=mostly(st.integers(0, LANDING_ROWS // 2), st.integers(0, 2**40)),
        end=mostly(st.just(b""), st.binary(max_size=3)),
    )
    def fetch(self, index: int, data: st.DataObject, landing_row: int, end: bytes) -> None:
        connection, size = self.client(index), LAYOUT.rows_per_page
        pages = data.draw(self.pages(connection, SEALED, FROZEN))
        inner = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=12))
        rows = [pages[at % len(pages)] * size + row for at, row in enumerate(inner) if pages]
        packed = np.array(rows, dtype="<u4").tobytes() + end
        request = Fetch(request_id=self.request_id(), rows=packed, landing_row=landing_row)
        self.judged.send(connection, encode(request))

    @rule(connection=connections, tag=st.sampled_from(REQUEST_TAGS), seed=seeds)
    def ask_anything(self, connection: bytes, tag: str, seed: int) -> None:
        request = valid_request(tag, np.random.default_rng(seed))
        self.judged.send(connection, msgspec.msgpack.encode(request))

    def client(self, index: int) -> bytes:
        """Connection of one of the registered clients."""
        registered = list(self.judged.model.clients)
        return registered[index % len(registered)]

    def reserve_and_fill(self, connection: bytes, num_pages: int) -> list[int]:
        """Pages that were reserved, each row of them written."""
        request = Reserve(request_id=self.request_id(), num_pages=num_pages)
        reply = self.judged.send(connection, encode(request))
        assert isinstance(reply, ReserveReply)
        for page in reply.page_ids or []:
            self.num_fills += 1
            self.judged.fill(self.judged.model.clients[connection], page, salt=self.num_fills)
        return reply.page_ids or []

    def pages(self, connection: bytes, *states: str) -> st.SearchStrategy[list[int]]:
        """Some pages of a client, mostly in these states, sometimes any, sometimes twice."""
        found = self.judged.model.clients[connection].states
        fitting = [page for page, state in enumerate(found) if state in states]
        anything = st.lists(st.integers(0, NUM_PAGES), max_size=4)
        if not fitting:
            return anything
        some = st.lists(st.sampled_from(fitting), min_size=1, max_size=4, unique=True)
        return mostly(some, anything)

    @rule(connection=connections)
    def say_goodbye(self, connection: bytes) -> None:
        self.judged.send(connection, encode(Goodbye(request_id=self.request_id())))

    @rule(connection=connections | st.just(b"a stranger"), kind=st.sampled_from([Ping, Stats]))
    def look(self, connection: bytes, kind: type[Ping | Stats]) -> None:
        self.judged.send(connection, encode(kind(request_id=self.request_id())))

    @rule(connection=connections, seed=seeds, session=sessions | st.just(bytes(16)))
    def talk_nonsense(self, connection: bytes, seed: int, session: bytes) -> None:
        self.judged.send(connection, hostile_frame(np.random.default_rng(seed), session))

    @rule(connection=connections, extra=st.integers(1, 1000))
    def say_too_much(self, connection: bytes, extra: int) -> None:
        self.judged.send(connection, bytes(MAX_FRAME_BYTES + extra))

    @rule(max_bytes=st.integers(1, 1 << 16))
    def scrub(self, max_bytes: int) -> None:
        self.judged.service.scrub(max_bytes)

    @precondition(lambda self: self.judged.has_flights)
    @rule()
    def step(self) -> None:
        self.judged.step()

    @rule(target=sessions, connection=connections)
    def attach_and_register(self, connection: bytes) -> object:
        """The common case, so that most runs have clients with pages."""
        if connection in self.judged.model.clients:
            return multiple()
        session = self.judged.attach()
        if isinstance(self.judged.send(connection, hello_frame(session)), HelloReply):
            ids = self.reserve_and_fill(connection, 5)[:4]
            self.judged.send(connection, encode(Commit(request_id=self.request_id(), page_ids=ids)))
        return session

    @invariant()
    def books_hold(self) -> None:
        self.judged.check_books()


TestServiceMachine = ServiceMachine.TestCase


@pytest.mark.parametrize("tag", REQUEST_TAGS)
def test_every_prefix_and_every_flipped_bit_of_a_request_is_answered(tag: str) -> None:
    with JudgedService() as judged:
        judged.send(b"one", hello_frame(judged.attach()))
        frame = msgspec.msgpack.encode(valid_request(tag, np.random.default_rng(3)))
        for end in range(len(frame)):
            judged.send(b"one", frame[:end])
        for at in range(len(frame)):
            for bit in range(8):
                judged.send(b"two", frame[:at] + bytes([frame[at] ^ 1 << bit]) + frame[at + 1 :])
        judged.finish()


MAX_BYTES = 16 << 20
FILLED = MAX_BYTES - 64
LONG_FRAMES = {
    "zeros": bytes(MAX_BYTES),
    "a long string as tag": msgspec.msgpack.encode({"type": "x" * FILLED}),
    "a long name": msgspec.msgpack.encode({"type": "ping", "request_id": 1, "x": "x" * FILLED}),
    "many elements nobody asked for": b"\x83\xa4type\xa4ping\xaarequest_id\x01\xa1x\xdd"
    + (FILLED).to_bytes(4, "big")
    + bytes(FILLED),
    "many keys": b"\xdf" + (FILLED // 3).to_bytes(4, "big") + b"\xa1k\x00" * (FILLED // 3),
    "many page ids": msgspec.msgpack.encode(
        {"type": "commit", "request_id": 1, "page_ids": [2**32 - 1] * (1 << 20)}
    ),
    "the same page a million times": msgspec.msgpack.encode(
        {"type": "release", "request_id": 1, "page_ids": [0] * (1 << 20)}
    ),
    "many rows": msgspec.msgpack.encode(
        {"type": "fetch", "request_id": 1, "rows": bytes(FILLED - 64), "landing_row": 0}
    ),
    "deep nesting": b"\x91" * MAX_BYTES,
}


@pytest.mark.parametrize("name", LONG_FRAMES)
def test_the_longest_frames_take_bounded_time_and_memory(name: str) -> None:
    frame = LONG_FRAMES[name]
    with JudgedService(max_frame_bytes=MAX_BYTES) as judged:
        judged.send(b"one", hello_frame(judged.attach()))
        begin = time.thread_time()
        judged.service.handle(b"one", frame)
        took = time.thread_time() - begin
        # None of them changes anything. Traced, the same takes some times longer.
        tracemalloc.start()
        try:
            judged.service.handle(b"one", frame)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert took < 3.0
    assert peak < 6 * MAX_BYTES


def test_hostile_frames_leave_no_memory_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    # How long each frame took is kept by orders of magnitude: a new one is no leak.
    monkeypatch.setattr(LogHistogram, "record", lambda *_: None)
    rng = np.random.default_rng(20261122)
    frames = [hostile_frame(rng) for _ in range(500)]
    with JudgedService() as judged:
        judged.send(b"one", hello_frame(judged.attach()))
        tracemalloc.start()
        try:
            sizes = []
            for _ in range(8):
                for frame in frames:
                    judged.service.handle(b"one", frame)
                gc.collect()
                sizes.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert sizes[-1] - sizes[0] < 16 << 10, sizes


@pytest.mark.parametrize(
    "frame",
    [
        msgspec.msgpack.encode({"type": "x" * (1 << 20), "request_id": 1}),
        hello_frame(bytes(16)).replace(b"\xa7float16", b"\xdb\x00\x10\x00\x00" + b"x" * (1 << 20)),
    ],
    ids=["a tag of a mebibyte", "a dtype of a mebibyte"],
)
def test_a_refusal_is_short_whatever_was_refused(frame: bytes) -> None:
    with JudgedService(max_frame_bytes=2 << 20) as judged:
        reply = judged.service.handle(b"one", frame)
    assert reply is not None
    assert len(reply) < 4096
