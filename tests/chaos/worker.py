"""A client process with a random program; it verifies every byte that it gets.

    python -m tests.chaos.worker ADDRESS SEED

It registers, works until memd is lost or the conductor wants it to leave, and registers again. What
it says on its standard output:

=============  ============================================================================
event          details
=============  ============================================================================
``connected``  ``client_id``, ``deadline_s``
``lost``       ``reason``, ``since`` (when it connected), ``deadline_s``
``progress``   ``counts``: all that it did so far
``violation``  ``what``: an invariant does not hold
``left``       ``counts``: it left politely
=============  ============================================================================
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from memd.client import MemdClient
from memd.errors import IntegrityError, MemdError, MemdTimeout
from memd.protocol import KVLayout
from tests.chaos.pattern import differences, expected_rows, flat_rows
from tests.chaos.reporting import Orders, Progress, say

if TYPE_CHECKING:
    import collections
    from collections.abc import Callable

    import numpy.typing as npt

    from memd.client import FetchTicket, ReserveTicket, ThawTicket

__all__ = ["Program", "main"]

_HEADS, _HEAD_DIMS, _PAGE_TOKENS = (1, 3, 8), (16, 32, 64), (4, 16, 64)
_DTYPES = ("float16", "bfloat16", "float32")
_BLOCK_BYTES = 4096
_EXTENT_BYTES = (64 << 10, 12 << 20)
_LANDING_ROWS = (16, 2048)
# The impatient lose a memd that is stopped for a moment; the patient never do.
_DEADLINES_S = (0.5, 30.0)
_PACES_S = (0.0, 0.001, 0.01)
_WAIT_S = 5.0
_RETRY_S = 0.05
_MEAN_LIFE_S = 8.0
_MAX_STEPS_HELD = 30


class Violation(Exception):
    """An invariant that does not hold."""


@dataclasses.dataclass
class Flight:
    """A fetch and what it must bring.

    Attributes:
        ticket: As given by the client.
        expected: uint8 [num_rows, row_bytes].
        steps_held: Steps to go on holding the landed rows, which must not change meanwhile.
    """

    ticket: FetchTicket
    expected: npt.NDArray[np.uint8]
    steps_held: int


@dataclasses.dataclass(frozen=True)
class Reservation:
    """A request for pages and what must come of it.

    Attributes:
        ticket: As given by the client.
        must_fit: So many pages are free by then, whatever else happens.
        may_fit: So many pages may be free: some of them wait for fetches that still read them.
    """

    ticket: ReserveTicket
    must_fit: bool
    may_fit: bool


class Program:
    """Random work over one registration.

    Args:
        client: The registration.
        rng: Source of every decision.
        counts: What was done, added to.
    """

    def __init__(
        self, client: MemdClient, rng: np.random.Generator, counts: collections.Counter[str]
    ) -> None:
        self._client = client
        self._layout = client.layout
        self._rng = rng
        self._counts = counts
        self._owner = int(rng.integers(2**64, dtype=np.uint64))
        # Of every page: the salt of its rows, and how many tokens of each head are written.
        self._salts = np.zeros(client.num_pages, dtype=np.uint64)
        self._num_written = np.zeros(client.num_pages, dtype=np.int64)
        self._reserved: set[int] = set()
        self._sealed: set[int] = set()
        self._frozen: set[int] = set()
        # With the pages that were not released since.
        self._thaws: list[tuple[ThawTicket, set[int]]] = []
        self._reservation: Reservation | None = None
        self._flights: list[Flight] = []
        self._dropped: list[FetchTicket] = []
        self._actions: dict[Callable[[], None], float] = {
            self._reserve: 6,
            self._write_and_commit: 8,
            self._append: 3,
            self._fetch: 20,
            self._fetch_and_release: 2,
            self._fetch_unsealed: 1,
            self._freeze: 10,
            self._thaw: 2,
            self._store_a_prompt: 4,
            self._release: 3,
            self._exhaust_ring: 0.3,
            self._cancel: 0.5,
            self._check_books: 0.2,
            self._fork: 0.02,
            self._hold: 0.3,
        }
        self._weights = np.array(list(self._actions.values())) / sum(self._actions.values())

    def check_clean(self) -> None:
        """A new extent holds no byte of anybody."""
        for name, array in (("pages", self._client.pages), ("landing", self._client.landing)):
            if name == "pages" and self._client.has_disk:
                # Looking at a page without memory gives it some; they are looked at when they have.
                continue
            if array.any():
                raise Violation(f"a new client's {name} hold {np.count_nonzero(array)} old bytes")

    def step(self) -> None:
        """One random action, then whatever has arrived."""
        action = list(self._actions)[self._rng.choice(len(self._weights), p=self._weights)]
        action()
        self._client.poll()
        self._settle()

    def check_lost(self) -> None:
        """After the loss every ticket is done, memory is intact, and calls do nothing."""
        self._require(all(thaw.is_done for thaw, _ in self._thaws), "a thaw is open after the loss")
        for flight in self._flights:
            self._require(flight.ticket.is_done, "a fetch is open after the loss of memd")
            if flight.ticket.error is None:
                self._compare(flight)
            self._client.finish(flight.ticket)
        if self._reservation is not None:
            self._require(self._reservation.ticket.is_done, "a reservation is open after the loss")
        rows = self._written_rows(self._reserved | self._sealed)
        found = differences(self._memory()[rows], self._expected(rows), self._owner)
        self._require(found is None, f"own pages after the loss of memd: {found}")
        self._require(self._client.fetch(rows[:1]) is None or not len(rows), "a fetch after loss")
        self._client.release(sorted(self._sealed | self._frozen))
        self._client.check_integrity()

    def leave(self) -> None:
        """Give back some of it, let the rest go with the goodbye."""
        if self._rng.random() < 0.5:
            self._client.release(sorted(self._sealed | self._frozen))
            self._sealed.clear()
            self._frozen.clear()
        for flight in self._flights:
            self._client.finish(flight.ticket)
        self._flights.clear()
        self._check_books()

    def _settle(self) -> None:
        """Take in what is done."""
        if self._reservation is not None and self._reservation.ticket.is_done:
            reservation, self._reservation = self._reservation, None
            if (error := reservation.ticket.error) is not None:
                self._require(not self._client.is_alive, f"a reservation failed: {error}")
            elif not reservation.ticket.is_cancelled:
                self._on_reserved(reservation)
        thaws, self._thaws = self._thaws, []
        for thaw, pages in thaws:
            if thaw.is_done:
                self._on_thawed(thaw, pages)
            else:
                self._thaws.append((thaw, pages))
        self._dropped = [ticket for ticket in self._dropped if not ticket.is_done]
        flying = []
        for flight in self._flights:
            if not flight.ticket.is_done:
                flying.append(flight)
            elif (error := flight.ticket.error) is not None:
                reason = error.split(":")[0]
                is_of_disk = self._client.has_disk and reason in ("page_lost", "no_room")
                self._require(is_of_disk or not self._client.is_alive, f"a fetch failed: {error}")
                self._counts[f"fetches: {reason}"] += is_of_disk
                self._client.finish(flight.ticket)
            elif flight.steps_held > 0:
                flight.steps_held -= 1
                flying.append(flight)
            else:
                self._compare(flight)
                self._client.finish(flight.ticket)
        self._flights = flying

    def _on_reserved(self, reservation: Reservation) -> None:
        ticket = reservation.ticket
        if ticket.page_ids is None:
            self._require(
                not reservation.must_fit, f"{ticket.num_pages} pages were free and were not given"
            )
            self._counts["pools_full"] += 1
            return
        self._require(
            reservation.may_fit, f"{ticket.num_pages} pages were given, so many were not free"
        )
        ids = set(ticket.page_ids.tolist())
        self._require(len(ids) == ticket.num_pages, "another number of pages than asked for")
        self._require(not ids & self._held, "a page was given twice")
        if self._client.has_disk:
            self._check_new(ticket.page_ids)
        self._num_written[ticket.page_ids] = 0
        self._reserved |= ids
        self._counts["pages_reserved"] += len(ids)

    @property
    def _held(self) -> set[int]:
        return self._reserved | self._sealed | self._frozen

    def _check_new(self, page_ids: npt.NDArray[np.int64]) -> None:
        """Pages that were reserved hold zeros, or this client's own rows."""
        size = self._layout.rows_per_page
        rows = (page_ids[:, None] * size + np.arange(size)).ravel()
        rows = rows[self._memory()[rows].any(axis=1)]
        owners = set(self._memory()[rows].view(np.uint64)[:, 0].tolist())
        self._require(owners <= {self._owner}, f"new pages hold rows of {owners}")

    def _on_thawed(self, thaw: ThawTicket, pages: set[int]) -> None:
        """The pages may be written again, but for those that are lost."""
        if thaw.error is not None:
            reason = thaw.error.split(":")[0]
            # Pages that were released meanwhile are not thawed, nor are the others then.
            is_fair = reason in ("no_room", "wrong_state") or not self._client.is_alive
            self._require(is_fair, f"a thaw failed: {thaw.error}")
            return
        assert thaw.lost is not None
        thawed = pages & self._frozen
        lost = thawed & set(thaw.lost.tolist())
        self._frozen -= thawed
        self._sealed |= thawed - lost
        self._client.release(sorted(lost))
        self._counts["pages_lost"] += len(lost)
        self._counts["pages_thawed"] += len(thawed)
        rows = self._written_rows(thawed - lost)
        found = differences(self._memory()[rows], self._expected(rows), self._owner)
        self._require(found is None, f"thawed pages hold {found}")

    def _freeze(self) -> None:
        pages = self._some(self._sealed)
        self._client.freeze(pages, [int(page) for page in pages])
        self._sealed -= set(pages)
        self._frozen |= set(pages)
        self._counts["pages_frozen"] += len(pages)

    def _store_a_prompt(self) -> None:
        """Fill pages one after the other and freeze them, so that others have to leave."""
        for depth in range(int(self._rng.integers(1, 16))):
            if self._reservation is not None or not self._client.has_disk:
                return
            reserved = self._client.reserve(1)
            self._client.wait(reserved, _WAIT_S)
            if not reserved.is_done:
                self._client.cancel(reserved)
            if reserved.page_ids is None or not reserved.is_done:
                return
            self._on_reserved(Reservation(reserved, must_fit=False, may_fit=True))
            (page,) = reserved.page_ids.tolist()
            self._salts[page] = self._rng.integers(2**64, dtype=np.uint64)
            self._write(page, self._layout.page_tokens)
            self._client.commit([page])
            self._client.freeze([page], [depth])
            self._reserved.remove(page)
            self._frozen.add(page)

    def _thaw(self) -> None:
        pages = self._some(self._frozen)[:3]
        busy = {page for _, asked in self._thaws for page in asked}
        if pages and not busy & set(pages):
            self._thaws.append((self._client.thaw(pages), set(pages)))

    def _reserve(self) -> None:
        if self._reservation is not None:
            return
        # memd handles this after everything that was sent before, so what is free then is known.
        free = self._client.num_pages - len(self._held)
        wish = int(self._rng.choice([1, 2, 4, free, free + 1], p=[0.4, 0.3, 0.2, 0.05, 0.05]))
        is_reading = bool(self._dropped) or not all(f.ticket.is_done for f in self._flights)
        self._reservation = Reservation(
            self._client.reserve(wish),
            # Above a disk, pages that are not frozen may take all of the memory, and while this
            # waits for room others may be released.
            must_fit=wish <= free and not is_reading and not self._client.has_disk,
            may_fit=wish <= free or self._client.has_disk,
        )

    def _write_and_commit(self) -> None:
        pages = self._some(self._reserved)
        for page in pages:
            self._salts[page] = self._rng.integers(2**64, dtype=np.uint64)
            self._write(page, int(self._rng.integers(1, self._layout.page_tokens + 1)))
        self._client.commit(pages)
        self._reserved -= set(pages)
        self._sealed |= set(pages)

    def _append(self) -> None:
        """Write rows of a sealed page that nobody was told of yet."""
        for page in self._some(self._sealed)[:1]:
            written = int(self._num_written[page])
            if written < self._layout.page_tokens:
                self._write(page, int(self._rng.integers(written, self._layout.page_tokens)) + 1)

    def _fetch(self) -> None:
        pages = self._some(self._sealed | self._frozen)
        if pages:
            self._fetch_rows(self._random_rows(pages, int(self._rng.integers(1, 400))))

    def _fetch_and_release(self) -> None:
        """Release a page right behind a fetch that reads it: memd answers in order."""
        pages = self._some(self._sealed | self._frozen)[:2]
        if pages:
            self._fetch_rows(self._random_rows(pages, 50))
            self._give_back(pages)

    def _fetch_unsealed(self) -> None:
        everything = set(range(self._client.num_pages))
        pages = self._some(everything - self._sealed - self._frozen)[:1]
        if not pages:
            return
        ticket = self._client.fetch(np.array(pages) * self._layout.rows_per_page)
        if ticket is None:
            return
        self._client.wait(ticket, _WAIT_S)
        was_refused = ticket.error is not None and ticket.error.startswith("wrong_state")
        # A reservation in flight can have arrived, but nothing has sealed the page.
        self._require(
            was_refused or not ticket.is_done or not self._client.is_alive,
            f"a fetch of the unsealed page {pages[0]} gave {ticket.error}",
        )
        self._client.finish(ticket)
        self._counts["fetches_refused"] += 1

    def _release(self) -> None:
        self._give_back(self._some(self._held))

    def _exhaust_ring(self) -> None:
        pages = self._some(self._sealed)
        while pages and self._fetch_rows(self._random_rows(pages, 100)):
            pass
        self._counts["rings_full"] += 1

    def _cancel(self) -> None:
        if self._reservation is not None:
            self._client.cancel(self._reservation.ticket)
            self._counts["reservations_cancelled"] += 1

    def _check_books(self) -> None:
        try:
            self._client.check_integrity(_WAIT_S)
        except MemdTimeout:
            self._counts["integrity_timeouts"] += 1
        except IntegrityError as error:
            raise Violation(f"books differ: {error}") from error

    def _fork(self) -> None:
        """A child that holds the connection's descriptor for a while, as a compiler would."""
        if os.fork() == 0:
            time.sleep(3.0)
            os._exit(0)

    def _hold(self) -> None:
        time.sleep(float(self._rng.uniform(0, 0.3)))

    def _fetch_rows(self, rows: npt.NDArray[np.int64]) -> bool:
        """Issue a fetch; whether there was room for it."""
        ticket = self._client.fetch(rows)
        if ticket is None:
            is_idle = self._client.is_alive and self._client.landing_rows_used == 0
            self._require(not is_idle or len(rows) > len(self._client.landing), "an idle ring full")
            return False
        if self._rng.random() < 0.05:
            self._client.finish(ticket)
            self._dropped.append(ticket)
            self._counts["fetches_dropped"] += 1
        else:
            held = int(self._rng.integers(_MAX_STEPS_HELD)) if self._rng.random() < 0.3 else 0
            self._flights.append(Flight(ticket, self._expected(rows), held))
        self._counts["fetches"] += 1
        return True

    def _give_back(self, pages: list[int]) -> None:
        self._client.release(pages)
        self._reserved -= set(pages)
        self._sealed -= set(pages)
        self._frozen -= set(pages)
        for _, asked in self._thaws:
            asked -= set(pages)
        self._counts["pages_released"] += len(pages)

    def _write(self, page: int, num_tokens: int) -> None:
        """Write the rows of every head from what is written up to ``num_tokens``."""
        begin = int(self._num_written[page])
        self._num_written[page] = num_tokens
        heads, offsets = np.divmod(
            np.arange(self._layout.num_heads * (num_tokens - begin)), num_tokens - begin
        )
        rows = flat_rows(self._layout, np.full_like(heads, page), heads, offsets + begin)
        self._memory()[rows] = self._expected(rows)

    def _written_rows(self, pages: set[int]) -> npt.NDArray[np.int64]:
        """All rows that were written in some pages."""
        places = [
            np.arange(self._layout.num_heads)[:, None] * self._layout.page_tokens
            + np.arange(self._num_written[page])
            + page * self._layout.rows_per_page
            for page in sorted(pages)
        ]
        return np.concatenate([np.empty(0, dtype=np.int64), *(place.ravel() for place in places)])

    def _random_rows(self, pages: list[int], num_rows: int) -> npt.NDArray[np.int64]:
        """Rows that were written, of sealed pages; repetitions happen."""
        num_rows = max(1, min(num_rows, len(self._client.landing) // 2))
        chosen = self._rng.choice(np.array(pages), num_rows)
        heads = self._rng.integers(self._layout.num_heads, size=num_rows)
        offsets = self._rng.integers(self._num_written[chosen])
        return flat_rows(self._layout, chosen, heads, offsets)

    def _some(self, pages: set[int]) -> list[int]:
        """A few of the pages, in random order; mostly few, sometimes all."""
        if not pages:
            return []
        most = len(pages) if self._rng.random() < 0.05 else min(len(pages), 4)
        count = int(self._rng.integers(1, most + 1))
        return [int(page) for page in self._rng.choice(sorted(pages), count, replace=False)]

    def _memory(self) -> npt.NDArray[np.uint8]:
        """All rows of the client's pages, a view."""
        return self._client.pages.reshape(-1, self._layout.row_bytes)

    def _expected(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        salts = self._salts[rows // self._layout.rows_per_page]
        return expected_rows(self._layout, self._owner, rows, salts)

    def _compare(self, flight: Flight) -> None:
        found = differences(self._client.landed(flight.ticket), flight.expected, self._owner)
        self._require(found is None, f"a fetch brought {found}")
        self._counts["rows_verified"] += len(flight.expected)
        self._counts["bytes_verified"] += flight.expected.size

    def _require(self, holds: bool, what: str) -> None:
        if not holds:
            raise Violation(what)


def main(address: str, seed: int) -> int:
    """Work until told to leave; 0, or 1 after a violation."""
    orders, progress = Orders(), Progress()
    rng = np.random.default_rng(seed)
    try:
        while not orders.is_leaving:
            progress.tell()
            deadline_s = float(rng.choice(_DEADLINES_S))
            # Before it connects: memd may be killed as soon as it has answered.
            since = time.monotonic()
            client = _connect(address, rng, deadline_s, progress.counts)
            if client is None:
                time.sleep(_RETRY_S)
                continue
            say("connected", client_id=client.client_id, deadline_s=deadline_s)
            with client:
                program = Program(client, rng, progress.counts)
                _work(program, client, rng, progress, orders)
                if not client.is_alive:
                    reason = client.lost_reason
                    say("lost", reason=reason, since=since, deadline_s=deadline_s)
                    program.check_lost()
                    progress.counts["losses"] += 1
    except Violation as violation:
        say("violation", what=str(violation))
        return 1
    say("left", counts=progress.counts)
    return 0


def _connect(
    address: str, rng: np.random.Generator, deadline_s: float, counts: collections.Counter[str]
) -> MemdClient | None:
    """Register with a random layout and size; None when that fails in a documented way."""
    layout = KVLayout(
        num_heads=int(rng.choice(_HEADS)),
        head_dim=int(rng.choice(_HEAD_DIMS)),
        dtype=str(rng.choice(_DTYPES)),
        page_tokens=int(rng.choice(_PAGE_TOKENS)),
    )
    num_bytes = np.exp(rng.uniform(*np.log(_EXTENT_BYTES)))
    num_pages = max(1, int(num_bytes / layout.page_bytes))
    # Most of those that can have a part of their pages on disk, where the daemon has one.
    can_leave = layout.page_bytes % _BLOCK_BYTES == 0 and rng.random() < 0.7
    try:
        client = MemdClient.connect(
            address,
            layout,
            num_pages=num_pages,
            host_pages=min(num_pages, int(rng.integers(2, 12))) if can_leave else 0,
            landing_rows=int(rng.integers(*_LANDING_ROWS)),
            deadline_s=deadline_s,
            name=f"worker {os.getpid()}",
        )
    except MemdError as error:
        # No room, nobody there, a stop or a death between attaching and the answer to Hello.
        counts[f"refused: {type(error).__name__}"] += 1
        return None
    counts["registrations"] += 1
    return client


def _work(
    program: Program,
    client: MemdClient,
    rng: np.random.Generator,
    progress: Progress,
    orders: Orders,
) -> None:
    """Random steps over one registration, until it is lost, has lived its life, or shall leave."""
    end = time.monotonic() + rng.exponential(_MEAN_LIFE_S)
    pace_s = float(rng.choice(_PACES_S))
    program.check_clean()
    while client.is_alive:
        program.step()
        progress.counts["steps"] += 1
        if progress.tell() and (orders.is_leaving or time.monotonic() > end):
            program.leave()
            return
        if pace_s:
            time.sleep(pace_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
