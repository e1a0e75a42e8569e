"""What connected clients cost each other: latency of fetches, and throughput of the daemon.

*idle*: all are connected and one fetches, in turns with a client that has a daemon for itself.
*busy*: each has a fetch in flight and asks for the next one when it has landed, so the daemon
always has work. One process drives all clients; its own time is part of what is measured.

    python -m benchmarks.memd.clients
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.memd import _daemon
from benchmarks.memd._harness import Row, best, in_turns, parser, percentile, report, require

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    import numpy.typing as npt

    from memd.client import FetchTicket, MemdClient, MemdProcess

ROW_BYTES, NUM_PAGES = 512, 4
TIMES_ALONE = 1.5
"""Median latency beside idle clients, against that of a client by itself."""
FETCHES_A_TURN = 20


def main() -> int:
    """Run, print a table, write a JSON file; 1 if a bound is missed."""
    arguments = parser(__doc__, rounds=30)
    arguments.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    arguments.add_argument("--rows", type=int, nargs="+", default=[16, 2048], help="of a fetch")
    return report("clients", arguments.parse_args(), measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Both patterns for every number of clients and rows."""
    most = max(options.rows)
    with contextlib.ExitStack() as stack:

        def daemon(num_clients: int) -> MemdProcess:
            return stack.enter_context(
                _daemon.daemon_for(
                    row_bytes=ROW_BYTES,
                    num_pages=NUM_PAGES,
                    landing_rows=most,
                    num_clients=num_clients,
                )
            )

        def driver(daemon: MemdProcess, seed: int) -> Driver:
            client = stack.enter_context(
                _daemon.connect(daemon, row_bytes=ROW_BYTES, num_pages=NUM_PAGES, landing_rows=most)
            )
            _daemon.fill(client, seed)
            return Driver(client, seed)

        alone = driver(daemon(1), seed=0)
        shared, drivers = daemon(max(options.clients)), list[Driver]()
        for num_clients in sorted(options.clients):
            drivers += [driver(shared, seed) for seed in range(len(drivers), num_clients)]
            for num_rows in options.rows:
                for each in (alone, *drivers):
                    each.check(num_rows)
                yield beside_idle(drivers, alone, num_rows, options.rounds)
                yield beside_busy(drivers, num_rows, options.rounds)


def beside_idle(drivers: Sequence[Driver], alone: Driver, num_rows: int, rounds: int) -> Row:
    """One of the clients fetches; compared with one that is alone."""
    taken: dict[str, list[float]] = {"alone": [], "shared": []}
    seconds = in_turns(
        {
            "alone": lambda: alone.turn(num_rows, taken["alone"]),
            "shared": lambda: drivers[0].turn(num_rows, taken["shared"]),
        },
        rounds,
    )
    return Row(
        case={"others": "idle", "clients": len(drivers), "rows": num_rows},
        measured=speeds(taken["shared"], num_rows, sum(taken["shared"])),
        ratio=best(seconds)["shared"] / best(seconds)["alone"],
        at_most=TIMES_ALONE,
    )


def beside_busy(drivers: Sequence[Driver], num_rows: int, rounds: int) -> Row:
    """All fetch, in any order, until enough has landed."""
    latencies: list[float] = []
    to_ask = rounds * FETCHES_A_TURN
    in_flight = list(drivers)
    begin = time.perf_counter()
    for driver in drivers:
        driver.ask(num_rows)
    while in_flight:
        for driver in list(in_flight):
            taken = driver.take()
            if taken is None:
                continue
            latencies.append(taken)
            if to_ask > 0:
                driver.ask(num_rows)
                to_ask -= 1
            else:
                in_flight.remove(driver)
    seconds = time.perf_counter() - begin
    return Row(
        case={"others": "busy", "clients": len(drivers), "rows": num_rows},
        measured=speeds(latencies, num_rows, seconds),
    )


def speeds(latencies: list[float], num_rows: int, seconds: float) -> dict[str, float]:
    """Latency in microseconds, and what was moved in the given time."""
    num_fetches = len(latencies)
    return {
        "p50_us": percentile(latencies, 50) * 1e6,
        "p99_us": percentile(latencies, 99) * 1e6,
        "fetches_per_s": num_fetches / seconds,
        "gb_s": num_fetches * num_rows * ROW_BYTES / seconds / 1e9,
    }


class Driver:
    """One client with at most one fetch in flight."""

    def __init__(self, client: MemdClient, seed: int) -> None:
        self._client = client
        self._rows = client.pages.reshape(-1, ROW_BYTES)
        self._rng = np.random.default_rng(seed)
        self._asked_at = 0.0
        self._ticket: FetchTicket | None = None

    def ask(self, num_rows: int) -> npt.NDArray[np.int64]:
        """Starts a fetch of random rows; returns them."""
        rows = self._rng.integers(len(self._rows), size=num_rows)
        self._asked_at = time.perf_counter()
        self._ticket = self._client.fetch(rows)
        require(self._ticket is not None, "an idle client's ring")
        return rows

    def take(self) -> float | None:
        """Seconds that the fetch took, once it has landed; never waits."""
        assert self._ticket is not None
        self._client.poll()
        if not self._ticket.is_done:
            return None
        taken = time.perf_counter() - self._asked_at
        require(self._ticket.error is None, f"a fetch ({self._ticket.error})")
        self._client.finish(self._ticket)
        return taken

    def turn(self, num_rows: int, latencies: list[float]) -> float:
        """Fetches some times and waits; gives the median latency."""
        for _ in range(FETCHES_A_TURN):
            self.ask(num_rows)
            assert self._ticket is not None
            self._client.wait(self._ticket, _daemon.WAIT_S)
            latencies.append(time.perf_counter() - self._asked_at)
            require(self._ticket.error is None, f"a fetch ({self._ticket.error})")
            self._client.finish(self._ticket)
        return statistics.median(latencies[-FETCHES_A_TURN:])

    def check(self, num_rows: int) -> None:
        """Fetches once and compares the bytes."""
        rows = self.ask(num_rows)
        assert self._ticket is not None
        self._client.wait(self._ticket, _daemon.WAIT_S)
        landed = self._client.landed(self._ticket)
        require(np.array_equal(landed, self._rows[rows]), "a fetch")
        self._client.finish(self._ticket)


if __name__ == "__main__":
    sys.exit(main())
