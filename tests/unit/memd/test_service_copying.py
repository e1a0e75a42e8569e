"""Fetches that are answered later than they are asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memd.protocol import (
    PROTOCOL_VERSION,
    Commit,
    ErrorCode,
    ErrorReply,
    Fetch,
    FetchReply,
    Goodbye,
    GoodbyeReply,
    Hello,
    KVLayout,
    Ping,
    Pong,
    Release,
    Reserve,
    decode_reply,
    encode,
)
from memd.service import MAX_FETCHES_IN_FLIGHT, Service
from memd.store import Store
from memd.transfer import HostTransfer

LAYOUT = KVLayout(num_heads=2, head_dim=8, dtype="float32", page_tokens=4)
REGION_BYTES = 1 << 16


class HeldBack:
    """An interconnect that nothing arrives over until the test says so."""

    def __init__(self) -> None:
        self.due = 1.0

    def finish_time(self, num_bytes: int) -> float:
        del num_bytes
        return self.due


class Faulty(HostTransfer):
    """Copies, unless the test breaks it."""

    is_broken = False

    def gather(self, **arguments: Any) -> None:
        if self.is_broken:
            raise MemoryError("the test breaks it")
        super().gather(**arguments)


class Daemon:
    def __init__(self, delay: HeldBack | None) -> None:
        self.now = 0.0
        self.region = np.zeros(REGION_BYTES, dtype=np.uint8)
        self.transfer = Faulty(self.region)
        self.service = Service(
            Store(REGION_BYTES),
            self.transfer,
            delay=delay,
            clock=lambda: self.now,
        )

    def ask(self, request: Any, connection: bytes = b"c") -> Any:
        reply = self.service.handle(connection, encode(request))
        return None if reply is None else decode_reply(reply)

    def join(self, connection: bytes = b"c", pid: int = 5) -> bytes:
        """A client with pages 0 and 1 sealed."""
        session = self.service.open_session(pid)
        self.ask(
            Hello(
                request_id=0,
                version=PROTOCOL_VERSION,
                session=session,
                pid=pid,
                layout=LAYOUT,
                num_pages=4,
                landing_bytes=16 * LAYOUT.row_bytes,
            ),
            connection,
        )
        self.ask(Reserve(request_id=1, num_pages=2), connection)
        self.ask(Commit(request_id=2, page_ids=[0, 1]), connection)
        return session

    def arrived(self) -> list[tuple[bytes, Any]]:
        self.now += 1.0
        return [(to, decode_reply(frame)) for to, frame in self.service.step()]

    def pages(self) -> dict[str, int]:
        client = self.service.stats()["clients"][0]
        return {name: client[f"pages_{name}"] for name in ("free", "sealed", "leaving")}


@pytest.fixture
def daemon() -> Daemon:
    daemon = Daemon(HeldBack())
    daemon.join()
    return daemon


def fetch(request_id: int, *rows: int) -> Fetch:
    return Fetch(request_id=request_id, rows=np.array(rows, dtype="<u4").tobytes(), landing_row=0)


def test_a_fetch_is_answered_once_it_has_arrived_and_others_meanwhile(daemon: Daemon) -> None:
    assert daemon.ask(fetch(3, 0, 9)) is None
    assert isinstance(daemon.ask(Ping(request_id=4)), Pong)
    assert daemon.service.has_work
    assert daemon.service.step() == []
    assert not daemon.service.has_work
    assert daemon.service.next_due() == 1.0

    ((connection, reply),) = daemon.arrived()

    assert connection == b"c"
    assert isinstance(reply, FetchReply)
    assert (reply.request_id, reply.num_rows) == (3, 2)
    assert daemon.service.step() == []
    assert daemon.service.stats()["counters"]["rows_fetched"] == 2


def test_a_page_released_under_a_fetch_is_free_when_the_fetch_is_over(daemon: Daemon) -> None:
    # Row 9 is of page 1.
    daemon.ask(fetch(3, 9))
    daemon.ask(fetch(4, 9))
    daemon.ask(Release(request_id=5, page_ids=[0, 1]))
    assert daemon.pages() == {"free": 3, "sealed": 0, "leaving": 1}
    reserved = daemon.ask(Reserve(request_id=6, num_pages=3))
    assert reserved.page_ids == [0, 2, 3]

    # A page that was released is nobody's to read or release again.
    assert daemon.ask(fetch(7, 9)).code is ErrorCode.WRONG_STATE
    assert daemon.ask(Release(request_id=8, page_ids=[1])).code is ErrorCode.WRONG_STATE
    assert len(daemon.arrived()) == 2
    assert daemon.pages() == {"free": 1, "sealed": 0, "leaving": 0}
    assert daemon.service.stats()["integrity"] == "ok"


def test_who_leaves_with_fetches_open_gets_an_answer_to_each(daemon: Daemon) -> None:
    daemon.ask(fetch(3, 0))
    daemon.ask(fetch(4, 1))
    assert isinstance(daemon.ask(Goodbye(request_id=5)), GoodbyeReply)

    assert daemon.service.has_work
    replies = [reply for _, reply in daemon.arrived()]
    assert [reply.request_id for reply in replies] == [3, 4]
    assert all(isinstance(reply, ErrorReply) for reply in replies)
    assert {reply.code for reply in replies} == {ErrorCode.NOT_REGISTERED}
    assert not daemon.service.has_work
    assert daemon.service.next_due() is None


def test_fetches_of_the_dead_do_not_touch_those_of_the_living(daemon: Daemon) -> None:
    session = daemon.join(b"d", pid=6)
    daemon.ask(fetch(3, 0), b"c")
    daemon.ask(fetch(3, 0), b"d")
    daemon.service.close_session(session, "killed")

    answered = [(to, reply) for to, reply in daemon.arrived() if isinstance(reply, FetchReply)]
    assert [to for to, _ in answered] == [b"c"]
    while daemon.service.scrub(1 << 20):
        pass
    assert daemon.service.stats()["integrity"] == "ok"


def test_fetches_in_flight_are_bounded(daemon: Daemon) -> None:
    for request_id in range(MAX_FETCHES_IN_FLIGHT):
        assert daemon.ask(fetch(request_id, 0)) is None

    reply = daemon.ask(fetch(9999, 0))

    assert isinstance(reply, ErrorReply)
    assert reply.code is ErrorCode.TOO_MANY
    while daemon.service.has_work:
        daemon.service.step()
    daemon.arrived()
    assert daemon.ask(fetch(10_000, 0)) is None


def test_a_copy_that_fails_is_an_error_of_that_fetch_alone(daemon: Daemon) -> None:
    assert daemon.ask(fetch(3, 0)) is None
    daemon.service.step()
    daemon.transfer.is_broken = True
    assert daemon.ask(fetch(4, 1)) is None
    failed = [decode_reply(frame) for _, frame in daemon.service.step()]
    daemon.transfer.is_broken = False

    assert [(reply.request_id, reply.code) for reply in failed] == [(4, ErrorCode.INTERNAL)]
    assert daemon.ask(fetch(5, 2)) is None
    assert [reply.request_id for _, reply in daemon.arrived()] == [3, 5]
    daemon.ask(Release(request_id=6, page_ids=[0, 1]))
    assert daemon.pages()["leaving"] == 0
    assert daemon.service.stats()["integrity"] == "ok"


def test_nothing_is_left_of_a_fetch_that_failed_at_once() -> None:
    daemon = Daemon(None)
    daemon.join()
    assert isinstance(daemon.ask(fetch(2, 0)), FetchReply)
    daemon.transfer.is_broken = True
    assert daemon.ask(fetch(3, 0)).code is ErrorCode.INTERNAL
    daemon.transfer.is_broken = False

    assert not daemon.service.has_work
    daemon.ask(Release(request_id=4, page_ids=[0, 1]))
    assert daemon.pages() == {"free": 4, "sealed": 0, "leaving": 0}


def test_a_client_may_not_have_more_than_its_quota() -> None:
    service = Service(
        Store(REGION_BYTES),
        HostTransfer(np.zeros(REGION_BYTES, dtype=np.uint8)),
        max_client_bytes=3 * LAYOUT.page_bytes,
    )

    def hello(num_pages: int) -> Any:
        request = Hello(
            request_id=0,
            version=PROTOCOL_VERSION,
            session=service.open_session(5),
            pid=5,
            layout=LAYOUT,
            num_pages=num_pages,
            landing_bytes=LAYOUT.page_bytes,
        )
        reply = service.handle(b"%d" % num_pages, encode(request))
        assert reply is not None
        return decode_reply(reply)

    refused = hello(3)
    assert refused.code is ErrorCode.QUOTA
    assert "2 pages would fit" in refused.message
    assert hello(2).extent_bytes > 0
