"""Rows from pages to the landing ring, against memcpy of as many bytes in the same run.

Each round draws new rows from a pool far larger than the caches, and memcpy (``numpy.copyto`` of
contiguous fp32) reads a new place of the same pool: both read memory that nobody has just used.
*again* reads the same rows, or the same place, in every round: what fits the caches is in them.
*memd* is the whole way of a fetch: a message to a daemon, its gather, the answer.

    python -m benchmarks.memd.gather
    python -m benchmarks.memd.gather --sizes 1MiB 4MiB --rounds 25
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.memd import _daemon
from benchmarks.memd._harness import Row, best, in_turns, medians, parser, report, require
from memd.region import Region
from memd.sizes import format_bytes, parse_bytes
from memd.transfer import HostTransfer
from memd.transfer.rows import take_rows

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from memd.client import MemdClient

    Bytes = npt.NDArray[np.uint8]
    Indices = npt.NDArray[np.int64]

SHARE_OF_MEMCPY = 0.5
WAYS = (("random", 1), ("ascending", 1), ("again", 1), ("random", 2))
"""Which rows, and threads of either side."""
BYTES_OF_A_CASE = 1 << 30
"""Long fetches get fewer rounds, so that one side moves about this much."""
FEWEST_ROUNDS = 9
SHORTEST_ASKED = {"transfer": 0, "memd": 64 << 20}
"""A message to another process takes longer than memcpy of a megabyte, so short fetches through
memd are measured and have no bound."""


def main() -> int:
    """Run, print a table, write a JSON file; 1 if a bound is missed."""
    arguments = parser(__doc__, rounds=51)
    arguments.add_argument("--rows", type=int, nargs="+", default=[256, 512], help="bytes of a row")
    arguments.add_argument(
        "--sizes",
        type=parse_bytes,
        nargs="+",
        default=[size << 20 for size in (1, 4, 16, 64)],
        help="bytes of a fetch, for example 4MiB",
    )
    arguments.add_argument("--pool", type=parse_bytes, default=1 << 30, help="bytes to draw from")
    return report("gather", arguments.parse_args(), measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """The transfer by itself, then through a daemon."""
    for row_bytes in options.rows:
        yield from measure_transfer(row_bytes, options)
    for row_bytes in options.rows:
        yield from measure_memd(row_bytes, options)


def measure_transfer(row_bytes: int, options: argparse.Namespace) -> Iterator[Row]:
    """What a daemon does in its own memory."""
    with Region(options.pool + max(options.sizes)) as region:
        fill(region.memory)
        for num_bytes in options.sizes:
            for order, num_threads in WAYS:
                yield transfer_row(
                    region.memory,
                    Draws(region.memory[: options.pool], row_bytes, num_bytes, order),
                    num_threads,
                    options.rounds,
                )


def transfer_row(memory: Bytes, draws: Draws, num_threads: int, rounds: int) -> Row:
    """Checks and times one case; the ring lies behind the pool."""
    ring_offset = memory.size - draws.num_bytes
    ring = memory[ring_offset:]
    with (
        Memcpy(num_threads) as copy,
        HostTransfer(memory, num_threads=num_threads) as ours,
        HostTransfer(memory, num_threads=num_threads, copy_rows=take_rows) as numpys,
    ):

        def gather(transfer: HostTransfer, rows: Indices) -> None:
            transfer.gather(
                source_offset=0,
                row_bytes=draws.row_bytes,
                rows=rows,
                landing_offset=ring_offset,
            )

        for name, transfer in (("the gather", ours), ("NumPy's gather", numpys)):
            rows = draws.rows()
            gather(transfer, rows)
            landed = ring.reshape(-1, draws.row_bytes)
            require(np.array_equal(landed, draws.source[rows]), name)
        sides: dict[str, Callable[[], float]] = {
            "memcpy": lambda: timed(copy, ring, draws.place()),
            "gather": lambda: timed(gather, ours, draws.rows()),
            "numpy": lambda: timed(gather, numpys, draws.rows()),
        }
        return compared("transfer", draws, num_threads, sides, rounds)


def measure_memd(row_bytes: int, options: argparse.Namespace) -> Iterator[Row]:
    """What a client waits for; memcpy runs in the client's process, between the same places."""
    sizes = {
        "row_bytes": row_bytes,
        "num_pages": options.pool // 2 // _daemon.layout(row_bytes).page_bytes,
        "landing_rows": max(options.sizes) // row_bytes,
    }
    with _daemon.daemon_for(**sizes) as daemon, _daemon.connect(daemon, **sizes) as client:
        _daemon.fill(client)
        pool = client.pages.reshape(-1)
        for num_bytes in options.sizes:
            yield memd_row(client, Draws(pool, row_bytes, num_bytes, "random"), options.rounds)


def memd_row(client: MemdClient, draws: Draws, rounds: int) -> Row:
    """Checks and times fetches of one size."""

    def fetch(rows: Indices, expected: Bytes | None = None) -> None:
        ticket = client.fetch(rows)
        if ticket is None or not client.wait(ticket, _daemon.WAIT_S):
            raise RuntimeError(f"a fetch was not answered: {client.lost_reason}")
        if expected is not None:
            require(np.array_equal(client.landed(ticket), expected), "a fetch")
        client.finish(ticket)

    rows = draws.rows()
    fetch(rows, draws.source[rows])
    ring = client.landing.reshape(-1)[: draws.num_bytes]
    copy = Memcpy(1)
    sides: dict[str, Callable[[], float]] = {
        "memcpy": lambda: timed(copy, ring, draws.place()),
        "gather": lambda: timed(fetch, draws.rows()),
    }
    return compared("memd", draws, 1, sides, rounds)


class Draws:
    """Which rows the next gather reads, and which place the next memcpy.

    Attributes:
        source: uint8 [num_source_rows, row_bytes].
    """

    def __init__(self, pool: Bytes, row_bytes: int, num_bytes: int, order: str) -> None:
        self.row_bytes, self.num_bytes, self.order = row_bytes, num_bytes, order
        self.source = pool[: pool.size // row_bytes * row_bytes].reshape(-1, row_bytes)
        self._flat = self.source.reshape(-1)
        self._rng = np.random.default_rng(0)
        self._same = self._draw()

    def rows(self) -> Indices:
        """int64 [num_bytes / row_bytes]."""
        return self._same if self.order == "again" else self._draw()

    def place(self) -> Bytes:
        """As many contiguous bytes."""
        last = (self._flat.size - self.num_bytes) // 4096
        start = 0 if self.order == "again" else 4096 * int(self._rng.integers(last + 1))
        return self._flat[start : start + self.num_bytes]

    def _draw(self) -> Indices:
        rows = self._rng.integers(len(self.source), size=self.num_bytes // self.row_bytes)
        return np.sort(rows) if self.order == "ascending" else rows


class Memcpy:
    """``numpy.copyto`` of fp32 in one part a thread, the caller's included."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._helpers = ThreadPoolExecutor(num_threads)

    def __enter__(self) -> Memcpy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._helpers.shutdown()

    def __call__(self, target: Bytes, source: Bytes) -> None:
        parts = zip(
            np.array_split(target.view(np.float32), self._num_threads),
            np.array_split(source.view(np.float32), self._num_threads),
            strict=True,
        )
        mine = next(parts)
        helped = [self._helpers.submit(np.copyto, *part) for part in parts]
        np.copyto(*mine)
        for part in helped:
            part.result()


def timed(function: Callable[..., None], *arguments: object) -> float:
    """Seconds of a call."""
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def compared(
    path: str, draws: Draws, num_threads: int, sides: dict[str, Callable[[], float]], rounds: int
) -> Row:
    """Times the sides of a case."""
    seconds = in_turns(sides, max(FEWEST_ROUNDS, min(rounds, BYTES_OF_A_CASE // draws.num_bytes)))
    shortest, middle = best(seconds), medians(seconds)
    return Row(
        case={
            "path": path,
            "row_bytes": draws.row_bytes,
            "fetch": format_bytes(draws.num_bytes),
            "rows": draws.order,
            "threads": num_threads,
        },
        measured={
            "gather_us": shortest["gather"] * 1e6,
            **{f"{name}_gb_s": draws.num_bytes / taken / 1e9 for name, taken in shortest.items()},
            "median_ratio": middle["memcpy"] / middle["gather"],
        },
        ratio=shortest["memcpy"] / shortest["gather"],
        at_least=SHARE_OF_MEMCPY if draws.num_bytes >= SHORTEST_ASKED[path] else None,
    )


def fill(memory: Bytes) -> None:
    """Random bytes."""
    words = memory[: memory.size // 8 * 8].view(np.uint64)
    words[...] = np.random.default_rng(0).integers(1 << 63, size=words.size, dtype=np.uint64)


if __name__ == "__main__":
    sys.exit(main())
