from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from memd.protocol import (
    PROTOCOL_VERSION,
    REQUEST_TYPES,
    Commit,
    CommitReply,
    ErrorCode,
    ErrorReply,
    Fetch,
    FetchReply,
    Freeze,
    FreezeReply,
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
    ReserveReply,
    Stats,
    StatsReply,
    Thaw,
    ThawReply,
    decode_reply,
    encode,
)
from memd.service import Service
from memd.store import Store
from memd.transfer import HostTransfer

LAYOUT = KVLayout(num_heads=2, head_dim=8, dtype="float32", page_tokens=4)
REGION_BYTES = 1 << 16


class Daemon:
    """A service over plain memory, spoken to as one connection at a time."""

    def __init__(self, **options: Any) -> None:
        self.region = np.zeros(REGION_BYTES, dtype=np.uint8)
        self.now = 0.0
        self.service = Service(
            Store(REGION_BYTES), HostTransfer(self.region), clock=lambda: self.now, **options
        )

    def ask(self, request: Any, connection: bytes = b"c") -> Any:
        """The reply to a request, of a service that may have to do some steps for it."""
        raw = self.service.handle(connection, encode(request))
        while raw is None:
            assert self.service.has_work, "it was never answered"
            raw = next((reply for _, reply in self.service.step()), None)
        return decode_reply(raw)

    def hello(self, connection: bytes = b"c", pid: int = 5, **changes: Any) -> Any:
        self.session = self.service.open_session(pid)
        fields = {
            "version": PROTOCOL_VERSION,
            "session": self.session,
            "pid": pid,
            "layout": LAYOUT,
            "num_pages": 4,
            "landing_bytes": 16 * LAYOUT.row_bytes,
        }
        return self.ask(Hello(request_id=0, **{**fields, **changes}), connection)

    def expect_refusal(self, request: Any, code: ErrorCode, connection: bytes = b"c") -> str:
        before = self.service.stats()["errors"].get(code, 0)
        reply = self.ask(request, connection)
        assert isinstance(reply, ErrorReply), reply
        assert reply.code is code
        assert reply.request_id == request.request_id
        assert self.service.stats()["errors"][code] == before + 1
        return reply.message


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


@pytest.fixture
def client(daemon: Daemon) -> Daemon:
    """A daemon with a client that has pages 0 and 1 sealed, 2 reserved, 3 free."""
    hello = daemon.hello()
    assert isinstance(hello, HelloReply)
    daemon.ask(Reserve(request_id=1, num_pages=3))
    daemon.ask(Commit(request_id=2, page_ids=[0, 1]))
    return daemon


def rows(*indices: int) -> bytes:
    return np.array(indices, dtype="<u4").tobytes()


def test_every_request_gets_its_reply(daemon: Daemon) -> None:
    assert isinstance(daemon.hello(), HelloReply)
    conversation = [
        (Reserve(request_id=1, num_pages=2), ReserveReply),
        (Commit(request_id=2, page_ids=[0, 1]), CommitReply),
        (Fetch(request_id=3, rows=rows(0, 15), landing_row=0), FetchReply),
        (Freeze(request_id=4, page_ids=[0, 1], depths=[0, 1]), FreezeReply),
        (Thaw(request_id=5, page_ids=[0]), ThawReply),
        (Release(request_id=6, page_ids=[1]), ReleaseReply),
        (Stats(request_id=7), StatsReply),
        (Ping(request_id=8), Pong),
        (Goodbye(request_id=9), GoodbyeReply),
    ]
    for request, kind in conversation:
        reply = daemon.ask(request)
        assert isinstance(reply, kind)
        assert reply.request_id == request.request_id
    assert {type(request) for request, _ in conversation} | {Hello} == set(REQUEST_TYPES)
    assert daemon.service.stats()["requests"] == {
        "hello": 1,
        "reserve": 1,
        "commit": 1,
        "fetch": 1,
        "freeze": 1,
        "thaw": 1,
        "release": 1,
        "stats": 1,
        "ping": 1,
        "goodbye": 1,
    }


def test_fetched_rows_lie_in_the_landing_ring(client: Daemon) -> None:
    pages = client.region[: 4 * LAYOUT.page_bytes].reshape(-1, LAYOUT.row_bytes)
    pages[:] = np.arange(len(pages), dtype=np.uint8)[:, None]
    reply = client.ask(Fetch(request_id=3, rows=rows(9, 0, 15, 9), landing_row=5))
    assert isinstance(reply, FetchReply)
    assert reply.num_rows == 4
    landing = client.region[4096:].reshape(-1, LAYOUT.row_bytes)
    assert landing[4:10, 0].tolist() == [0, 9, 0, 15, 9, 0]


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (Fetch(request_id=9, rows=rows(16), landing_row=0), ErrorCode.WRONG_STATE),
        (Fetch(request_id=9, rows=rows(0, 24), landing_row=0), ErrorCode.WRONG_STATE),
        (Fetch(request_id=9, rows=rows(32), landing_row=0), ErrorCode.OUT_OF_RANGE),
        (Fetch(request_id=9, rows=rows(0, 1), landing_row=15), ErrorCode.OUT_OF_RANGE),
        (Fetch(request_id=9, rows=b"", landing_row=17), ErrorCode.OUT_OF_RANGE),
        (Fetch(request_id=9, rows=b"123", landing_row=0), ErrorCode.MALFORMED),
        (Commit(request_id=9, page_ids=[0]), ErrorCode.WRONG_STATE),
        (Commit(request_id=9, page_ids=[4]), ErrorCode.OUT_OF_RANGE),
        (Release(request_id=9, page_ids=[3]), ErrorCode.WRONG_STATE),
        (Release(request_id=9, page_ids=[0, 0]), ErrorCode.OUT_OF_RANGE),
        (Freeze(request_id=9, page_ids=[0, 2]), ErrorCode.WRONG_STATE),
        (Freeze(request_id=9, page_ids=[0, 1], depths=[7]), ErrorCode.OUT_OF_RANGE),
        (Thaw(request_id=9, page_ids=[0]), ErrorCode.WRONG_STATE),
        (Thaw(request_id=9, page_ids=[4]), ErrorCode.OUT_OF_RANGE),
    ],
)
def test_a_refused_request_changes_nothing(client: Daemon, request_: Any, code: ErrorCode) -> None:
    client.region[:] = 3
    before = client.service.stats()["clients"]
    client.expect_refusal(request_, code)
    assert client.service.stats()["clients"] == before
    assert (client.region == 3).all()


def test_a_full_pool_is_an_answer_and_no_error(client: Daemon) -> None:
    reply = client.ask(Reserve(request_id=3, num_pages=2))
    assert reply == ReserveReply(request_id=3, page_ids=None, free_pages=1)


@pytest.mark.parametrize("kind", [Reserve, Commit, Fetch, Release, Goodbye])
def test_a_connection_without_hello_is_refused(daemon: Daemon, kind: Any) -> None:
    fields: dict[Any, dict[str, Any]] = {
        Reserve: {"num_pages": 1},
        Commit: {"page_ids": []},
        Fetch: {"rows": b"", "landing_row": 0},
        Release: {"page_ids": []},
        Goodbye: {},
    }
    daemon.expect_refusal(kind(request_id=1, **fields[kind]), ErrorCode.NOT_REGISTERED)


def test_stats_and_ping_need_no_hello(daemon: Daemon) -> None:
    assert isinstance(daemon.ask(Ping(request_id=1)), Pong)
    assert isinstance(daemon.ask(Stats(request_id=2)), StatsReply)


def test_another_version_is_refused_with_the_remedy(daemon: Daemon) -> None:
    reply = daemon.hello(version=PROTOCOL_VERSION + 1)
    assert reply.code is ErrorCode.VERSION
    assert "same release" in reply.message


def test_a_session_that_nobody_opened_is_refused(daemon: Daemon) -> None:
    assert daemon.hello(session=bytes(16)).code is ErrorCode.UNKNOWN_SESSION


def test_a_closed_session_is_refused(daemon: Daemon) -> None:
    session = daemon.service.open_session(5)
    daemon.service.close_session(session, "test")
    assert daemon.hello(session=session).code is ErrorCode.UNKNOWN_SESSION


def test_one_hello_for_each_session_and_connection(daemon: Daemon) -> None:
    daemon.hello()
    session = daemon.session
    assert daemon.hello(b"other", session=session).code is ErrorCode.ALREADY_REGISTERED
    assert daemon.hello(b"c").code is ErrorCode.ALREADY_REGISTERED
    assert len(daemon.service.stats()["clients"]) == 1


def test_a_landing_ring_of_broken_rows_is_refused(daemon: Daemon) -> None:
    assert daemon.hello(landing_bytes=LAYOUT.row_bytes + 1).code is ErrorCode.OUT_OF_RANGE


def test_a_client_that_asks_for_too_much_is_told_what_is_free(daemon: Daemon) -> None:
    reply = daemon.hello(num_pages=1000)
    assert reply.code is ErrorCode.POOL_FULL
    assert f"{REGION_BYTES} of {REGION_BYTES} bytes are free" in reply.message


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x80", encode(Pong(request_id=1))])
def test_a_malformed_frame_is_answered_and_counted(daemon: Daemon, frame: bytes) -> None:
    reply = decode_reply(daemon.service.handle(b"c", frame))
    assert isinstance(reply, ErrorReply)
    assert reply.code is ErrorCode.MALFORMED
    assert reply.request_id is None
    assert daemon.service.stats()["errors"] == {"malformed": 1}


def test_a_long_frame_is_refused_unread() -> None:
    daemon = Daemon(max_frame_bytes=1024)
    reply = decode_reply(daemon.service.handle(b"c", b"\xc1" * 1025))
    assert isinstance(reply, ErrorReply)
    assert reply.code is ErrorCode.TOO_LARGE


def test_a_failure_inside_is_an_answer_and_the_service_goes_on(
    client: Daemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("a secret of ours")

    monkeypatch.setattr(client.service._transfer, "gather", fail)
    message = client.expect_refusal(
        Fetch(request_id=3, rows=rows(0), landing_row=0), ErrorCode.INTERNAL
    )
    assert "secret" not in message
    assert "a secret of ours" in caplog.text
    assert isinstance(client.ask(Ping(request_id=4)), Pong)


def test_repeated_refusals_are_logged_once(
    daemon: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        daemon.service.handle(b"c", b"\xc1")
    assert len(caplog.records) == 1


def test_a_dead_clients_pages_are_reclaimed(client: Daemon) -> None:
    client.service.close_session(client.session, "test")
    stats = client.service.stats()
    assert stats["clients"] == []
    assert stats["counters"]["clients_reclaimed"] == 1
    assert stats["region"]["dirty_bytes"] > 0
    client.expect_refusal(Reserve(request_id=5, num_pages=1), ErrorCode.NOT_REGISTERED)


def test_goodbye_is_no_death(client: Daemon) -> None:
    client.ask(Goodbye(request_id=3))
    client.service.close_session(client.session, "test")
    stats = client.service.stats()
    assert stats["clients"] == []
    assert stats["counters"]["clients_reclaimed"] == 0


def test_bytes_of_one_client_are_gone_before_the_next_gets_them(client: Daemon) -> None:
    client.region[: 4 * LAYOUT.page_bytes] = 0xAB
    client.service.close_session(client.session, "test")
    assert client.service.scrub(1000)
    # The next client comes before the scrub is through, and needs all of the region.
    reply = client.hello(b"d", num_pages=(REGION_BYTES - 4096) // LAYOUT.page_bytes)
    assert isinstance(reply, HelloReply)
    assert reply.extent_offset == 0
    assert not client.region.any()
    assert client.service.stats()["counters"]["bytes_zeroed"] >= 4 * LAYOUT.page_bytes


def test_requests_behind_a_hello_that_waits_have_their_turn_after_it(client: Daemon) -> None:
    client.service.close_session(client.session, "test")
    session = client.service.open_session(6)
    # All of the region is to be zeroed first.
    hello = Hello(
        request_id=0,
        version=PROTOCOL_VERSION,
        session=session,
        pid=6,
        layout=LAYOUT,
        num_pages=(REGION_BYTES - 4096) // LAYOUT.page_bytes,
        landing_bytes=0,
    )
    requests = [
        hello,
        Reserve(request_id=1, num_pages=2),
        Commit(request_id=2, page_ids=[0, 1]),
        Ping(request_id=3),
        Fetch(request_id=4, rows=b"", landing_row=0),
        Goodbye(request_id=5),
        Release(request_id=6, page_ids=[0]),
    ]
    replies = [client.service.handle(b"d", encode(request)) for request in requests]
    answered = [decode_reply(reply) for reply in replies if reply is not None]
    while client.service.has_work:
        answered += [decode_reply(reply) for _, reply in client.service.step()]
    # A ping waits for nothing, and nothing is done behind a goodbye.
    assert [(type(reply), reply.request_id) for reply in answered] == [
        (Pong, 3),
        (HelloReply, 0),
        (ReserveReply, 1),
        (CommitReply, 2),
        (FetchReply, 4),
        (ErrorReply, 6),
        (GoodbyeReply, 5),
    ]
    assert client.service.stats()["integrity"] == "ok"
    assert not client.service.stats()["clients"]


def test_a_process_that_ends_while_its_hello_waits_leaves_nothing(client: Daemon) -> None:
    client.service.close_session(client.session, "test")
    session = client.service.open_session(6)
    hello = Hello(
        request_id=0,
        version=PROTOCOL_VERSION,
        session=session,
        pid=6,
        layout=LAYOUT,
        num_pages=(REGION_BYTES - 4096) // LAYOUT.page_bytes,
        landing_bytes=0,
    )
    assert client.service.handle(b"d", encode(hello)) is None
    assert client.service.handle(b"d", encode(Reserve(request_id=1, num_pages=1))) is None
    client.service.close_session(session, "test")
    replies = [decode_reply(reply) for _, reply in client.service.step()]
    assert [(type(reply), reply.request_id) for reply in replies] == [
        (ErrorReply, 0),
        (ErrorReply, 1),
    ]
    while client.service.tidy(1 << 20):
        pass
    assert client.service.stats()["region"]["free_bytes"] == REGION_BYTES


def test_who_says_goodbye_right_behind_a_hello_that_waits_is_answered(client: Daemon) -> None:
    client.service.close_session(client.session, "test")
    hello = Hello(
        request_id=0,
        version=PROTOCOL_VERSION,
        session=client.service.open_session(6),
        pid=6,
        layout=LAYOUT,
        num_pages=REGION_BYTES // LAYOUT.page_bytes,
        landing_bytes=0,
    )
    assert client.service.handle(b"d", encode(hello)) is None
    assert client.service.handle(b"d", encode(Goodbye(request_id=1))) is None
    assert client.service.handle(b"d", encode(Reserve(request_id=2, num_pages=1))) is None
    replies = []
    while client.service.has_work:
        replies += [decode_reply(reply) for _, reply in client.service.step()]
    assert [reply.request_id for reply in replies] == [0, 2, 1]
    assert isinstance(replies[0], HelloReply)
    assert replies[1].code is ErrorCode.NOT_REGISTERED
    assert isinstance(replies[2], GoodbyeReply)
    assert client.service.stats()["clients"] == []
    assert client.service.stats()["integrity"] == "ok"


def test_scrub_says_when_it_is_through(client: Daemon) -> None:
    assert not client.service.scrub(4096)
    client.service.close_session(client.session, "test")
    steps = 1
    while client.service.scrub(4096):
        steps += 1
    assert steps == 2
    assert client.service.stats()["region"]["free_bytes"] == REGION_BYTES


def test_clients_do_not_see_each_other(daemon: Daemon) -> None:
    first, second = daemon.hello(b"1"), daemon.hello(b"2")
    assert second.extent_offset >= first.extent_offset + first.extent_bytes
    daemon.ask(Reserve(request_id=1, num_pages=4), b"1")
    daemon.ask(Commit(request_id=2, page_ids=[0, 1, 2, 3]), b"1")
    daemon.expect_refusal(
        Fetch(request_id=3, rows=rows(0), landing_row=0), ErrorCode.WRONG_STATE, b"2"
    )
    daemon.expect_refusal(Release(request_id=4, page_ids=[0]), ErrorCode.WRONG_STATE, b"2")


def test_stats_are_plain_data_with_the_documented_keys(client: Daemon) -> None:
    client.ask(Fetch(request_id=3, rows=rows(0, 1), landing_row=0))
    stats = client.service.stats()
    assert list(stats) == [
        "daemon",
        "region",
        "clients",
        "counters",
        "requests",
        "errors",
        "latencies",
        "integrity",
    ]
    assert stats["integrity"] == "ok"
    assert stats["counters"]["rows_fetched"] == 2
    assert stats["counters"]["bytes_fetched"] == 2 * LAYOUT.row_bytes
    (record,) = stats["clients"]
    assert (record["pages_free"], record["pages_reserved"], record["pages_sealed"]) == (1, 1, 2)
    assert record["pid"] == 5


def test_stats_tell_how_long_a_client_has_been_silent(client: Daemon) -> None:
    client.now = 60.0
    assert client.service.stats()["clients"][0]["silent_s"] == 60.0
    client.ask(Reserve(request_id=3, num_pages=0))
    assert client.service.stats()["clients"][0]["silent_s"] == 0.0


def test_a_broken_invariant_is_told_in_the_stats(client: Daemon) -> None:
    client.service._store.extents._num_free -= 1
    assert client.service.stats()["integrity"] != "ok"
