"""A client and its daemon under any sequence of calls, delays and drops.

Every page is filled with bytes that name the page and the filling, so a row that comes from the
wrong page, or from the right page at the wrong time, is seen.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
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

from memd.protocol import KVLayout
from memd.testing import FakeMemd

if TYPE_CHECKING:
    from memd.client import FetchTicket, ReserveTicket

LAYOUT = KVLayout(num_heads=2, head_dim=4, dtype="float16", page_tokens=4)
NUM_PAGES = 6
LANDING_ROWS = 40


@dataclasses.dataclass
class Flight:
    ticket: FetchTicket
    expected: np.ndarray


class ClientMachine(RuleBasedStateMachine):
    flights = Bundle("flights")
    reservations = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.memd = FakeMemd.create(LAYOUT, num_pages=NUM_PAGES, landing_rows=LANDING_ROWS)
        self.reserved: set[int] = set()
        self.sealed: set[int] = set()
        self.num_fills = 0
        self.landed_views: list[Flight] = []

    def teardown(self) -> None:
        self.memd.resume()
        assert self.memd.drain(5.0)
        self.memd.check_integrity()
        self.memd.close()
        assert self.memd.service.stats()["clients"] == []

    @rule(target=reservations, num_pages=st.integers(0, NUM_PAGES + 1))
    def reserve(self, num_pages: int) -> ReserveTicket:
        return self.memd.reserve(num_pages)

    @rule(ticket=consumes(reservations), is_wanted=st.booleans())
    def settle(self, ticket: ReserveTicket, is_wanted: bool) -> None:
        if not is_wanted:
            self.memd.cancel(ticket)
        elif ticket.page_ids is not None:
            self.reserved |= set(ticket.page_ids.tolist())
        elif not ticket.is_done:
            self.memd.cancel(ticket)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def fill_and_commit(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.reserved)), unique=True))
        for page in ids:
            self.num_fills += 1
            rows = self.memd.pages[page].reshape(-1, LAYOUT.row_bytes)
            rows[:] = np.arange(len(rows))[:, None]
            rows[:, 0], rows[:, 1], rows[:, 2] = page, self.num_fills % 251, self.num_fills // 251
        self.memd.commit(ids)
        self.reserved -= set(ids)
        self.sealed |= set(ids)

    @precondition(lambda self: self.reserved | self.sealed)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        # Also pages that a fetch in flight still reads: memd handles that fetch first.
        ids = data.draw(st.lists(st.sampled_from(sorted(self.reserved | self.sealed)), unique=True))
        self.memd.release(ids)
        self.reserved -= set(ids)
        self.sealed -= set(ids)

    @precondition(lambda self: self.sealed)
    @rule(target=flights, data=st.data())
    def fetch(self, data: st.DataObject) -> object:
        size = LAYOUT.rows_per_page
        row = st.builds(
            lambda page, inner: page * size + inner,
            st.sampled_from(sorted(self.sealed)),
            st.integers(0, size - 1),
        )
        rows = np.array(data.draw(st.lists(row, max_size=25)), dtype=np.int64)
        ticket = self.memd.fetch(rows)
        if ticket is None:
            assert self.memd.landing_rows_used > 0
            return multiple()
        return Flight(ticket, self.memd.pages.reshape(-1, LAYOUT.row_bytes)[rows].copy())

    @rule(flight=consumes(flights))
    def consume(self, flight: Flight) -> None:
        if flight.ticket.is_done:
            assert flight.ticket.error is None
            assert np.array_equal(self.memd.landed(flight.ticket), flight.expected)
        self.memd.finish(flight.ticket)

    @rule(flight=flights)
    def look(self, flight: Flight) -> None:
        if flight.ticket.is_done and not flight.ticket.is_finished:
            assert np.array_equal(self.memd.landed(flight.ticket), flight.expected)

    @rule()
    def hold(self) -> None:
        self.memd.hold()

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        self.memd.step(count)

    @rule()
    def resume(self) -> None:
        self.memd.resume()

    @rule()
    def poll(self) -> None:
        self.memd.poll()

    @invariant()
    def lives(self) -> None:
        assert self.memd.is_alive
        assert self.memd.landing_rows_used <= LANDING_ROWS


TestClientMachine = ClientMachine.TestCase
