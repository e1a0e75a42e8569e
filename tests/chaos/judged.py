"""A service whose every answer is judged: by the model, its own books, and what it touched."""

from __future__ import annotations

import collections
import dataclasses
import functools
import gc
import logging
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from memd.copying import QUANTUM_BYTES, CopyQueue
from memd.protocol import (
    PROTOCOL_VERSION,
    Commit,
    ErrorCode,
    ErrorReply,
    Fetch,
    FetchReply,
    GoodbyeReply,
    Hello,
    HelloReply,
    KVLayout,
    Reply,
    Reserve,
    ReserveReply,
    decode_reply,
    encode,
)
from memd.service import Service
from memd.store import Store
from memd.transfer import HostTransfer
from tests.chaos.hostile import hostile_frame
from tests.chaos.model import Expectation, Model, ModelClient

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

__all__ = ["LAYOUT", "NUM_PAGES", "JudgedService", "hello_frame", "send_hostile_frames"]

_LOG = logging.getLogger("memd")

FRAME_BOUND_S = 0.5
"""Processor time for one frame of a few kilobytes."""

LAYOUT = KVLayout(num_heads=2, head_dim=8, dtype="float16", page_tokens=4)
"""Layout of the clients that `hello_frame` registers."""

NUM_PAGES = 6
LANDING_ROWS = 24

# A few rows a turn: most fetches then have to wait for theirs, as only large ones do in earnest.
_QUANTUM_BYTES = 128


@dataclasses.dataclass
class _Flight:
    """A fetch without its reply.

    Attributes:
        connection: Who asked.
        expected: The reply.
        rows: What must land, uint8 [num_rows, row_bytes].
        landing: Where, a view of the region of the same shape.
    """

    connection: bytes
    expected: Expectation
    rows: npt.NDArray[np.uint8]
    landing: npt.NDArray[np.uint8]


def hello_frame(session: bytes, **changes: Any) -> bytes:
    """A ``Hello`` for `NUM_PAGES` pages of `LAYOUT` and `LANDING_ROWS` rows, or with changes."""
    fields: dict[str, Any] = {
        "request_id": 0,
        "version": PROTOCOL_VERSION,
        "session": session,
        "pid": 1,
        "layout": LAYOUT,
        "num_pages": NUM_PAGES,
        "landing_bytes": LANDING_ROWS * LAYOUT.row_bytes,
    }
    return encode(Hello(**{**fields, **changes}))


class JudgedService:
    """The real service over plain memory, a frame at a time; a context manager.

    Meanwhile memd logs its own failures only: refusals come by the thousand here.

    Args:
        region_bytes: Size of the region.
        max_frame_bytes: Longest frame that is read.
        is_slow: Whether fetches wait for their turn.

    Attributes:
        service: The service.
        model: What it must answer.
        region: Its memory, uint8 [region_bytes].
        counts: Frames by what they were answered with.
        longest_s: Most processor time that a frame took.
    """

    def __init__(
        self, region_bytes: int = 1 << 16, max_frame_bytes: int = 1 << 14, *, is_slow: bool = False
    ) -> None:
        self.region = np.zeros(region_bytes, dtype=np.uint8)
        self._store = Store(region_bytes)
        self._transfer = HostTransfer(self.region)
        queue = functools.partial(
            CopyQueue, quantum_bytes=_QUANTUM_BYTES if is_slow else QUANTUM_BYTES
        )
        with mock.patch("memd.fetches.CopyQueue", queue):
            self.service = Service(self._store, self._transfer, max_frame_bytes=max_frame_bytes)
        self.model = Model(region_bytes, max_frame_bytes)
        self.counts: collections.Counter[str] = collections.Counter()
        self.longest_s = 0.0
        self._flights: list[_Flight] = []
        self._log_level = _LOG.level
        _LOG.setLevel(logging.ERROR)

    def __enter__(self) -> JudgedService:
        """The service."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give threads and the log's level back."""
        self._transfer.close()
        _LOG.setLevel(self._log_level)

    @property
    def has_flights(self) -> bool:
        """Whether a fetch waits for its reply."""
        return bool(self._flights)

    def attach(self, pid: int = 1) -> bytes:
        """A process attaches; its session."""
        session = self.service.open_session(pid)
        self.model.attach(session)
        return session

    def detach(self, session: bytes) -> None:
        """A process is gone."""
        gone = self.model.detach(session)
        self.service.close_session(session, "test")
        self._end_flights(gone)
        self.check_books()

    def send(self, connection: bytes, frame: bytes) -> Reply | None:
        """Send a frame and judge the reply; None if it has to wait."""
        expected = self.model.expect(connection, frame)
        before = self._state()
        # A look through all that this process holds is no part of what the frame costs.
        gc.disable()
        try:
            begin = time.thread_time()
            raw = self.service.handle(connection, frame)
            took = time.thread_time() - begin
        finally:
            gc.enable()
        self.longest_s = max(self.longest_s, took)
        assert took < FRAME_BOUND_S, f"{took:.3f} s for {frame[:200]!r}"
        if raw is None and expected.kind is HelloReply:
            raw = self._step_until(connection, expected.request_id)
        if raw is None:
            assert expected.kind is FetchReply, expected
            self._begin_fetch(connection, expected)
            self.counts["waiting"] += 1
            self.check_books()
            return None
        reply = decode_reply(raw)
        expected.check(reply)
        if isinstance(reply, ErrorReply):
            assert reply.code is not ErrorCode.INTERNAL, reply
            self.counts[str(reply.code)] += 1
            if reply.code is not ErrorCode.POOL_FULL:  # it may have zeroed what was to be zeroed
                assert self._state() == before, f"{reply} changed something"
        else:
            self.counts[type(reply).__name__] += 1
        if isinstance(reply, FetchReply):
            self._judge_landed(self._flight(connection, expected))
        leaving = expected.client
        self.model.happen(connection, expected, reply)
        if isinstance(reply, GoodbyeReply):
            self._end_flights(leaving)
        elif isinstance(reply, HelloReply):
            extent = self.region[reply.extent_offset :][: reply.extent_bytes]
            assert not extent.any(), "another client's bytes"
        self.check_books()
        return reply

    def step(self) -> None:
        """Let it copy for one turn, and judge the replies that come of it."""
        for connection, raw in self.service.step():
            self._on_fetch_over(connection, decode_reply(raw))
        self.check_books()

    def _step_until(self, connection: bytes, request_id: int | None) -> bytes:
        """Let it go on until a Hello that waits for clean memory is answered; the reply."""
        while self.service.has_work:
            mine = None
            for sender, raw in self.service.step():
                reply = decode_reply(raw)
                if (sender, reply.request_id) == (connection, request_id):
                    mine = raw
                else:
                    self._on_fetch_over(sender, reply)
            if mine is not None:
                return mine
        raise AssertionError("a Hello was never answered")

    def _on_fetch_over(self, connection: bytes, reply: Reply) -> None:
        """Judge the reply to a fetch that had to wait."""
        index = next(
            index
            for index, flight in enumerate(self._flights)
            if flight.connection == connection and flight.expected.request_id == reply.request_id
        )
        # A client's own fetches are answered in the order in which they came.
        assert not any(
            flight.connection == connection
            and flight.expected.client is self._flights[index].expected.client
            for flight in self._flights[:index]
        )
        flight = self._flights.pop(index)
        flight.expected.check(reply)
        if isinstance(reply, FetchReply):
            self._judge_landed(flight)
            assert flight.expected.client is not None
            flight.expected.client.unpin(flight.expected.page_ids or [])

    def finish(self) -> None:
        """Let it copy until nothing waits."""
        while self.service.has_work:
            self.step()
        assert not self._flights, "a fetch was never answered"

    def check_books(self) -> None:
        """Its own books hold, and page states are those of the model."""
        assert self.service.stats()["integrity"] == "ok"
        records = {record.client_id: record for record in self._store.clients}
        assert len(records) == len(self.model.clients)
        for client in self.model.clients.values():
            pages = records[client.hello.client_id].pages
            found = [pages.state(page).name.lower() for page in range(pages.num_pages)]
            assert found == client.states

    def fill(self, client: ModelClient, page: int, salt: int) -> None:
        """Write a page as its client would; each row says which it is."""
        rows = self._pages(client)[page * client.layout.rows_per_page :]
        rows = rows[: client.layout.rows_per_page]
        rows[:] = np.arange(len(rows), dtype=np.uint8)[:, None]
        rows[:, 0], rows[:, 1] = page % 251, salt % 251

    def _begin_fetch(self, connection: bytes, expected: Expectation) -> None:
        assert expected.client is not None
        for page in expected.page_ids or []:
            expected.client.readers[page] += 1
        self._flights.append(self._flight(connection, expected))

    def _flight(self, connection: bytes, expected: Expectation) -> _Flight:
        client, request = expected.client, expected.request
        assert client is not None
        assert isinstance(request, Fetch)
        rows = np.frombuffer(request.rows, dtype=f"<u{client.hello.row_index_bytes}")
        row_bytes = client.layout.row_bytes
        begin = client.hello.extent_offset + client.hello.landing_offset
        begin += request.landing_row * row_bytes
        landing = self.region[begin : begin + len(rows) * row_bytes].reshape(-1, row_bytes)
        return _Flight(connection, expected, self._pages(client)[rows].copy(), landing)

    def _judge_landed(self, flight: _Flight) -> None:
        # Others of the same client may write to the same landing rows: that is its own affair.
        others = [other.landing for other in self._flights if other is not flight]
        if not any(np.shares_memory(flight.landing, other) for other in others):
            assert np.array_equal(flight.landing, flight.rows), "wrong rows landed"

    def _pages(self, client: ModelClient) -> npt.NDArray[np.uint8]:
        """All rows of a client's pages, uint8 [num_rows, row_bytes], a view."""
        num_bytes = len(client.states) * client.layout.page_bytes
        pages = self.region[client.hello.extent_offset :][:num_bytes]
        return pages.reshape(-1, client.layout.row_bytes)

    def _end_flights(self, gone: ModelClient | None) -> None:
        """Fetches of a client that left are refused."""
        for flight in self._flights:
            if flight.expected.client is gone:
                flight.expected.kind = ErrorReply
                flight.expected.codes = (ErrorCode.NOT_REGISTERED,)

    def _state(self) -> Any:
        """Everything that an error must not change."""
        stats = self.service.stats()
        return (
            [
                (r.client_id, r.pages._states.tobytes(), r.extent_offset)
                for r in self._store.clients
            ],
            self._store.extents.allocated(),
            self._store.dirty_bytes,
            {
                token: (session.connection, session.client is not None)
                for token, session in self.service._sessions._by_token.items()
            },
            set(self.service._sessions._by_connection),
            stats["counters"],
            stats["requests"],
            self.region.tobytes(),
        )


def send_hostile_frames(judged: JudgedService, seeds: Iterable[int]) -> None:
    """Send the `hostile_frame` of each seed, from a client with pages or from a stranger."""
    session, stranger = judged.attach(), judged.attach()
    salt = 0
    for seed in seeds:
        if b"client" not in judged.model.clients:
            judged.detach(session)
            session = judged.attach()
            judged.send(b"client", hello_frame(session))
            reply = judged.send(b"client", encode(Reserve(request_id=1, num_pages=NUM_PAGES - 1)))
            assert isinstance(reply, ReserveReply)
            assert reply.page_ids is not None
            for page in reply.page_ids:
                judged.fill(judged.model.clients[b"client"], page, salt := salt + 1)
            judged.send(b"client", encode(Commit(request_id=2, page_ids=reply.page_ids[:-1])))
        rng = np.random.default_rng(seed)
        connection = b"client" if rng.random() < 0.8 else b"stranger"
        judged.send(connection, hostile_frame(rng, stranger))
        if judged.has_flights and rng.random() < 0.5:
            judged.step()
    judged.finish()
    for token in list(judged.model.sessions):
        judged.detach(token)
