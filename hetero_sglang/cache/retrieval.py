"""Rows on their way back: targets after drift, fetches in flight, installation.

A satellite with a *target* wants other positions than it holds. Each step the missing
ones of all satellites go to memd in one message, of each the best score first, as many as an empty
landing ring takes; while rows in flight leave less room than that, the message waits. Until rows
land, attention goes on over what is there: stale, but valid. A head has at most one fetch in
flight, so the slots named at issue are still right at installation. A fetch is in flight until its
rows are installed: memd gathers them, then they go to the pools' device (``cache/landing.py``).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hetero_kernels import install_rows
from hetero_sglang.cache.transfers import to_device
from hetero_sglang.errors import ResidencyError
from hetero_sglang.policy.plan import plan_delta

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from hetero_sglang.cache.blocks import BlockPool
    from hetero_sglang.cache.host_store import HostStore
    from hetero_sglang.cache.landing import Landed
    from memd.client import FetchTicket


@dataclass(frozen=True)
class _Exchange:
    row: int
    head: int
    positions: NDArray[np.int64]
    slots: NDArray[np.int64]


@dataclass
class KeptRows:
    """Positions that one request's heads hold, and where they should go.

    Attributes:
        num_tokens: Prompt length, tokens.
        positions: Position in each kept slot by compressed head id, int64 arrays.
        targets: Wanted positions, best first, of heads that are not there yet.
        in_flight: Exchange under way by head.
    """

    num_tokens: int
    positions: list[NDArray[np.int64]]
    targets: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    in_flight: dict[int, _Exchange] = field(default_factory=dict)


@dataclass
class _Flight:
    ticket: FetchTicket
    exchanges: list[_Exchange]
    kept: list[KeptRows]
    landed: Landed | None = None


@dataclass
class RetrievalCounters:
    """What the retrieval path has done since start.

    Attributes:
        issued: Fetch messages sent to memd.
        installed: Fetches whose rows were all installed.
        dropped: Fetches answered with an error, lost with memd, or of finished requests.
        fetched_bytes: Bytes installed.
        installed_rows: Rows installed.
    """

    issued: int = 0
    installed: int = 0
    dropped: int = 0
    fetched_bytes: int = 0
    installed_rows: int = 0


class Retrieval:
    """Plans, issues and installs fetches for all requests.

    Attributes:
        counters: Totals for ``/server_info``.
    """

    def __init__(self, store: HostStore, blocks: BlockPool, max_rows: int) -> None:
        """Starts with nothing in flight.

        Args:
            store: Where rows come from.
            blocks: Where rows go.
            max_rows: Most rows of one fetch.
        """
        self.counters = RetrievalCounters()
        self._store = store
        self._blocks = blocks
        self._max_rows = max_rows
        self._kept: dict[int, KeptRows] = {}
        self._flights: list[_Flight] = []
        # The landing ring had no room for all that is missing, and nothing has left it since.
        self._is_ring_full = False

    @property
    def is_idle(self) -> bool:
        """Nothing wanted and nothing in flight."""
        return not self._flights and not any(kept.targets for kept in self._kept.values())

    @property
    def num_rows_in_flight(self) -> int:
        """Rows of the landing ring that are in use."""
        return sum(flight.ticket.num_rows for flight in self._flights)

    def begin(self, row: int, num_tokens: int, positions: list[NDArray[np.int64]]) -> None:
        """Starts to follow a request.

        Args:
            row: Row of the request table.
            num_tokens: Prompt length, tokens.
            positions: Kept positions by compressed head id, slot order, int64 arrays; owned
                from now on.
        """
        self._kept[row] = KeptRows(num_tokens, positions)

    def kept_positions(self, row: int) -> list[NDArray[np.int64]] | None:
        """Kept positions of a followed row by compressed head id; None when not followed."""
        kept = self._kept.get(row)
        return None if kept is None else kept.positions

    def expected_positions(self, row: int, head: int) -> NDArray[np.int64]:
        """Positions that a head of a followed row will hold once its fetch has landed."""
        kept = self._kept[row]
        exchange = kept.in_flight.get(head)
        if exchange is None:
            return kept.positions[head]
        positions = kept.positions[head].copy()
        positions[exchange.slots] = exchange.positions
        return positions

    def set_target(self, row: int, head: int, target: NDArray[np.int64]) -> None:
        """Names the positions a head shall hold.

        Args:
            row: A followed row.
            head: Compressed head id.
            target: Positions, best first, as many as the head keeps, int64.
        """
        if self._store.has(row) and len(target):
            self._kept[row].targets[head] = target

    def forget(self, row: int) -> None:
        """Stops following a row; its rows in flight are dropped when they land."""
        self._kept.pop(row, None)

    def issue(self) -> None:
        """Sends at most one message for everything that is missing; never blocks."""
        if self._is_ring_full and self._flights:
            return  # a plan would only be thrown away again
        exchanges: list[_Exchange] = []
        indices: list[NDArray[np.int64]] = []
        owners: list[KeptRows] = []
        room = self._max_rows
        for row, kept in self._kept.items():
            if not self._store.is_ready(row):
                continue
            for head in [h for h in kept.targets if h not in kept.in_flight]:
                if room <= 0:
                    break
                target, held = kept.targets[head], kept.positions[head]
                plan = plan_delta(target, held, kept.num_tokens, room)
                if not len(plan.positions):
                    del kept.targets[head]
                    continue
                room -= len(plan.positions)
                exchanges.append(_Exchange(row, head, plan.positions, plan.slots))
                indices.append(self._store.row_indices(row, head, plan.positions))
                owners.append(kept)
        if not exchanges:
            return
        ticket = self._store.fetch(np.concatenate(indices))
        self._is_ring_full = ticket is None
        if ticket is None:
            return
        for exchange, kept in zip(exchanges, owners, strict=True):
            kept.in_flight[exchange.head] = exchange
        self._flights.append(_Flight(ticket, exchanges, owners))
        self.counters.issued += 1

    def install_landed(self, *, wait: bool = False) -> None:
        """Writes the rows of finished fetches into the block pool; never blocks unless told to.

        Args:
            wait: Whether to wait for rows that memd has gathered and the device does not have yet.
        """
        waiting: list[_Flight] = []
        for flight in self._flights:
            if self._is_in_flight(flight, wait):
                waiting.append(flight)
            else:
                self._land(flight)
                self._is_ring_full = False
        self._flights = waiting

    def _is_in_flight(self, flight: _Flight, wait: bool) -> bool:
        if not self._store.is_available:
            # Rows that are on their way to the device may arrive, where nobody takes them.
            return False
        if not flight.ticket.is_done:
            return True
        if flight.ticket.error is not None:
            return False
        if flight.landed is None:
            flight.landed = self._store.land(flight.ticket)
        if wait:
            flight.landed.event.synchronize()
        return not flight.landed.event.query()

    def run_to_completion(self, timeout_s: float) -> bool:
        """Fetches and installs until every head has its target (``sync`` retrieval).

        Args:
            timeout_s: Longest wait in all, seconds.

        Returns:
            False when memd was lost or did not answer in time; what landed stays.
        """
        deadline = time.monotonic() + timeout_s
        self._store.wait_stored()
        while self._store.is_available:
            self.issue()
            if not self._flights:
                return True
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not self._store.client.wait(self._flights[0].ticket, remaining):
                return False
            self._store.poll()
            self.install_landed(wait=True)
        self.install_landed()
        return False

    def drop_targets(self) -> None:
        """Forgets what is still wanted; used when memd is lost."""
        for kept in self._kept.values():
            kept.targets.clear()

    def check_integrity(self) -> None:
        """Raises ResidencyError when positions repeat, leave the prompt or differ from the pool."""
        if not self._kept:
            return
        flat = self._blocks.positions_on_host().reshape(-1)
        for row, kept in self._kept.items():
            for head, positions in enumerate(kept.positions):
                if len(np.unique(positions)) != len(positions):
                    raise ResidencyError(f"row {row} head {head} keeps a position twice")
                if len(positions) and not 0 <= positions.min() <= positions.max() < kept.num_tokens:
                    raise ResidencyError(f"row {row} head {head} keeps a position off its prompt")
                where = self._blocks.row_addresses(row, head, np.arange(len(positions)))
                if not np.array_equal(flat[where], positions):
                    raise ResidencyError(f"row {row} head {head}: pool and table disagree")

    def _land(self, flight: _Flight) -> None:
        is_lost = flight.landed is None or not self._store.is_available
        taken: list[tuple[_Exchange, KeptRows]] = []
        is_taken: list[bool] = []
        for exchange, kept in zip(flight.exchanges, flight.kept, strict=True):
            kept.in_flight.pop(exchange.head, None)
            is_taken.append(not is_lost and self._kept.get(exchange.row) is kept)
            if is_taken[-1]:
                taken.append((exchange, kept))
            elif is_lost:
                kept.targets.pop(exchange.head, None)
        if taken:
            assert flight.landed is not None
            rows = flight.landed.rows
            if not all(is_taken):
                mask = np.repeat(is_taken, [len(e.positions) for e in flight.exchanges])
                rows = rows.index_select(0, to_device(np.flatnonzero(mask), rows.device))
            self._install(taken, rows)
        if all(is_taken):
            self.counters.installed += 1
        else:
            self.counters.dropped += 1
        self._store.client.finish(flight.ticket)

    def _install(self, exchanges: list[tuple[_Exchange, KeptRows]], rows: torch.Tensor) -> None:
        blocks = self._blocks
        where = np.concatenate([blocks.row_addresses(e.row, e.head, e.slots) for e, _ in exchanges])
        positions = np.concatenate([e.positions for e, _ in exchanges])
        install_rows(
            rows.flatten(1),
            to_device(where, rows.device),
            k_blocks=blocks.k,
            v_blocks=blocks.v,
            block_positions=blocks.positions,
            positions=to_device(positions.astype(np.int32), rows.device),
        )
        for exchange, kept in exchanges:
            kept.positions[exchange.head][exchange.slots] = exchange.positions
        self.counters.fetched_bytes += rows.numel() * rows.element_size()
        self.counters.installed_rows += len(rows)
