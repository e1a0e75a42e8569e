"""A daemon that says anything at all: the client never fails, never hangs, never trusts a lie.

Rules that are checked after every word:

- whatever arrives, no call raises, and each returns;
- a ticket is open exactly as long as its request is in flight, so nobody waits for ever;
- a client that has lost memd has no open ticket;
- pages that it was given exist, are its own, and were not its own before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from memd.errors import IntegrityError, MemdTimeout
from memd.protocol import (
    REPLY_TYPES,
    CommitReply,
    ErrorCode,
    ErrorReply,
    FetchReply,
    GoodbyeReply,
    Pong,
    ReleaseReply,
    Reply,
    ReserveReply,
    Stats,
    StatsReply,
    encode,
)
from memd.store import PageState
from tests.chaos.hostile import hostile_frame
from tests.chaos.lying import (
    DEADLINE_S,
    LANDING_ROWS,
    LAYOUT,
    NUM_PAGES,
    LyingChannel,
    client_of,
    honest_reply,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from memd.client import FetchTicket, MemdClient, ReserveTicket, Ticket


class NonsenseMachine(RuleBasedStateMachine):
    """memd says honest things, and between them garbage, errors, and answers to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.channel = LyingChannel()
        self.client = client_of(self.channel)
        self.open_tickets: list[Ticket] = []
        self.reserves: list[ReserveTicket] = []
        self.fetches: list[FetchTicket] = []
        # What this side believes to hold.
        self.held: dict[int, PageState] = {}

    def teardown(self) -> None:
        self.channel.open.clear()
        for _ in range(int(DEADLINE_S) + 2):
            self.channel.now += 1.0
            self.client.poll()
        assert self.client.num_in_flight == 0, "silence is no answer"
        self.settle()
        self.check()
        # A client whose memd is silent says goodbye for a second; once is enough, in a test below.
        self.channel.close()
        self.client.poll()
        self.client.close()

    @rule(num_pages=st.integers(0, NUM_PAGES + 1))
    def reserve(self, num_pages: int) -> None:
        ticket = self.client.reserve(num_pages)
        self.reserves.append(ticket)
        self.open_tickets.append(ticket)

    @rule(cancels=st.booleans())
    def settle(self, cancels: bool = False) -> None:
        """Take over what was reserved; maybe give up what is still open."""
        for ticket in [ticket for ticket in self.reserves if ticket.is_done or cancels]:
            self.reserves.remove(ticket)
            if not ticket.is_done:
                self.client.cancel(ticket)
            elif ticket.error is None and ticket.page_ids is not None:
                ids = ticket.page_ids.tolist()
                assert len(set(ids)) == len(ids) == ticket.num_pages
                assert all(0 <= page < NUM_PAGES and page not in self.held for page in ids)
                self.held |= dict.fromkeys(ids, PageState.RESERVED)

    @rule()
    def commit(self) -> None:
        ids = [page for page, state in self.held.items() if state is PageState.RESERVED]
        self.client.commit(ids)
        self.held |= dict.fromkeys(ids, PageState.SEALED)

    @precondition(lambda self: self.held)
    @rule(count=st.integers(1, NUM_PAGES))
    def release(self, count: int) -> None:
        ids = list(self.held)[:count]
        self.client.release(ids)
        for page in ids:
            del self.held[page]

    @rule(num_rows=st.integers(0, LANDING_ROWS))
    def fetch(self, num_rows: int) -> None:
        ticket = self.client.fetch(np.arange(num_rows))
        if ticket is not None:
            self.fetches.append(ticket)
            self.open_tickets.append(ticket)

    @precondition(lambda self: self.fetches)
    @rule(index=st.integers(0, 5))
    def finish(self, index: int) -> None:
        ticket = self.fetches.pop(index % len(self.fetches))
        if ticket.is_done and ticket.error is None:
            assert self.client.landed(ticket).shape == (ticket.num_rows, LAYOUT.row_bytes)
        self.client.finish(ticket)

    @rule()
    def ask_for_stats(self) -> None:
        self.client.stats()

    @rule()
    def poll(self) -> None:
        self.client.poll()

    @rule()
    def check(self) -> None:
        with contextlib.suppress(IntegrityError, MemdTimeout):
            self.client.check_integrity(0.001)

    @rule(count=st.integers(1, 5))
    def answer_honestly(self, count: int) -> None:
        for _ in range(min(count, len(self.channel.open))):
            request = self.channel.open.pop(min(self.channel.open))
            free = [page for page in range(NUM_PAGES) if page not in self.taken()]
            self.channel.frames.append(encode(honest_reply(request, free)))
            self.client.poll()
            self.settle()

    def refusable(self) -> list[int]:
        """Open requests; without stats, whose refusal is a matter of its own (below)."""
        return [
            request_id
            for request_id, request in self.channel.open.items()
            if not isinstance(request, Stats)
        ]

    def taken(self) -> set[int]:
        """Pages that the client holds by its own books."""
        return set(np.flatnonzero(self.client._states != PageState.FREE).tolist())

    @precondition(lambda self: self.refusable())
    @rule(code=st.sampled_from(ErrorCode))
    def refuse(self, code: ErrorCode) -> None:
        request_id = self.refusable()[0]
        del self.channel.open[request_id]
        self.channel.frames.append(encode(ErrorReply(request_id=request_id, code=code, message="")))

    @rule(seed=st.integers(0, 2**64 - 1))
    def babble(self, seed: int) -> None:
        self.channel.frames.append(hostile_frame(np.random.default_rng(seed)))

    @rule(request_id=st.integers(1 << 20, 2**63 - 1), kind=st.sampled_from([Pong, CommitReply]))
    def answer_nobody(self, request_id: int, kind: type[Pong | CommitReply]) -> None:
        self.channel.frames.append(encode(kind(request_id=request_id)))

    @rule(seconds=st.floats(0, 3))
    def let_time_pass(self, seconds: float) -> None:
        self.channel.now += seconds

    @invariant()
    def nobody_waits_for_ever(self) -> None:
        self.open_tickets = [ticket for ticket in self.open_tickets if not ticket.is_done]
        in_flight = {
            id(pending.ticket)
            for pending in self.client._in_flight.values()
            if pending.ticket is not None
        }
        assert {id(ticket) for ticket in self.open_tickets} <= in_flight
        assert self.client.is_alive or not self.open_tickets

    @invariant()
    def the_ring_holds(self) -> None:
        self.client._ring.check_integrity()
        assert self.client.landing_rows_used <= LANDING_ROWS


TestNonsenseMachine = NonsenseMachine.TestCase

small_numbers = st.integers(-2, NUM_PAGES + 2) | st.sampled_from([-(2**63), 2**63 - 1, 2**64 - 1])
plain = st.recursive(
    st.none() | st.booleans() | small_numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


class LyingMachine(NonsenseMachine):
    """memd also answers open requests with the wrong kind of reply, or with wrong numbers."""

    @precondition(lambda self: self.channel.open)
    @rule(
        kind=st.sampled_from(REPLY_TYPES),
        numbers=st.lists(small_numbers, max_size=10),
        number=small_numbers,
        stats=st.dictionaries(st.sampled_from(["integrity", "clients", "x"]), plain),
    )
    def lie(
        self, kind: type[Reply], numbers: list[int], number: int, stats: dict[str, Any]
    ) -> None:
        request_id = min(self.channel.open)
        del self.channel.open[request_id]
        words: dict[str, Any] = {
            **dict.fromkeys(kind.__struct_fields__, number),
            "type": kind.__struct_config__.tag,
            "request_id": request_id,
            "page_ids": numbers,
            "stats": stats,
            "code": "internal",
            "message": "no",
        }
        self.channel.frames.append(msgspec.msgpack.encode(words))


TestLyingMachine = LyingMachine.TestCase


@dataclasses.dataclass
class Lied:
    """A client with pages 0 and 1 sealed and one request open, and what came of a lie.

    Attributes:
        client: The client.
        channel: Its channel.
        ticket: Of the open request.
    """

    client: MemdClient
    channel: LyingChannel
    ticket: Any

    def tell(self, reply: Callable[[int], Reply]) -> None:
        self.channel.frames.append(encode(reply(max(self.channel.open))))
        self.client.poll()


@pytest.fixture
def fetching() -> Iterator[Lied]:
    yield from asked(lambda client: client.fetch(np.arange(10)))


@pytest.fixture
def reserving() -> Iterator[Lied]:
    yield from asked(lambda client: client.reserve(2))


def asked(ask: Callable[[MemdClient], Any]) -> Iterator[Lied]:
    channel = LyingChannel()
    client = client_of(channel)
    reserved = client.reserve(2)
    channel.frames.append(encode(ReserveReply(request_id=1, page_ids=[0, 1], free_pages=6)))
    client.poll()
    client.commit(reserved.page_ids if reserved.page_ids is not None else [])
    yield Lied(client, channel, ask(client))
    channel.close()
    client.poll()
    client.close()


@pytest.mark.parametrize("num_rows", [0, 9, 11, -1])
def test_a_fetch_of_another_length_is_no_success(fetching: Lied, num_rows: int) -> None:
    fetching.tell(lambda i: FetchReply(request_id=i, num_rows=num_rows))
    assert fetching.ticket.error is not None
    assert not fetching.client.is_alive


@pytest.mark.parametrize(
    "kind",
    [
        Pong,
        CommitReply,
        ReleaseReply,
        GoodbyeReply,
        lambda request_id: StatsReply(request_id=request_id, stats={}),
        lambda request_id: ReserveReply(request_id=request_id, page_ids=[2], free_pages=0),
    ],
    ids=["pong", "commit", "release", "goodbye", "stats", "reserve"],
)
def test_a_fetch_answered_with_another_reply_ends_and_memd_is_lost(
    fetching: Lied, kind: Callable[..., Reply]
) -> None:
    fetching.tell(lambda i: kind(request_id=i))
    assert fetching.ticket.is_done
    assert not fetching.client.is_alive


@pytest.mark.parametrize(
    "page_ids",
    [[8, 9], [-1, -2], [1 << 63, 3], [0, 2], [2, 2], [2, 3, 4], [2], []],
    ids=["outside", "negative", "huge", "held", "twice", "too many", "too few", "none at all"],
)
def test_pages_that_cannot_be_are_not_taken(reserving: Lied, page_ids: list[int]) -> None:
    reserving.tell(lambda i: ReserveReply(request_id=i, page_ids=page_ids, free_pages=0))
    assert not reserving.client.is_alive
    assert reserving.ticket.is_done
    assert reserving.client.pages_used == 2


def test_stats_that_were_refused_are_asked_for_again(reserving: Lied) -> None:
    client = reserving.client
    client.stats()
    reserving.tell(lambda i: ErrorReply(request_id=i, code=ErrorCode.INTERNAL, message="no"))
    client.stats()
    assert sum(isinstance(request, Stats) for request in reserving.channel.open.values()) == 2


@pytest.mark.parametrize("stats", [{}, {"integrity": "ok"}, {"integrity": "ok", "clients": [{}]}])
def test_stats_of_another_shape_are_an_integrity_error(stats: dict[str, Any]) -> None:
    channel = LyingChannel()
    channel.stats = stats
    with pytest.raises(IntegrityError):
        client_of(channel).check_integrity(1.0)


def test_a_poll_ends_although_memd_never_stops_talking(fetching: Lied) -> None:
    fetching.channel.endless = encode(Pong(request_id=1 << 40))
    fetching.client.poll()
    assert not fetching.client.is_alive


def test_a_goodbye_that_nobody_answers_takes_a_second_at_most() -> None:
    begin = time.monotonic()
    client_of(LyingChannel()).close()
    assert time.monotonic() - begin < DEADLINE_S - 1.0
