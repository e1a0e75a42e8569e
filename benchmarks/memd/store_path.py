"""Pages on their way into memd, against memcpy of the same bytes in the same run.

*pages* is what a client does with one prompt after another: it takes the pages that it reserved
while it wrote the prompt before, reserves for the next, copies into the shared memory and commits.
memd handles messages in order, so nobody has to wait for the answer to a commit. *keys, values*
interleaves K and V of every row, as an engine has to that keeps them apart; it moves the same bytes
in pieces of half a row and has no bound. memcpy (``numpy.copyto`` of contiguous fp32) writes the
same pages.

    python -m benchmarks.memd.store_path
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.memd import _daemon
from benchmarks.memd._harness import Row, best, in_turns, medians, parser, report, require
from memd.sizes import format_bytes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from memd.client import MemdClient

    Bytes = npt.NDArray[np.uint8]

SHARE_OF_MEMCPY = 0.7


def main() -> int:
    """Run, print a table, write a JSON file; 1 if a bound is missed."""
    arguments = parser(__doc__, rounds=31)
    arguments.add_argument("--rows", type=int, nargs="+", default=[256, 512], help="bytes of a row")
    arguments.add_argument(
        "--tokens", type=int, nargs="+", default=[1024, 4096, 16384], help="of a prompt"
    )
    return report("store_path", arguments.parse_args(), measure)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Every length of a prompt with every row size."""
    counts = [-(-num_tokens // _daemon.PAGE_TOKENS) for num_tokens in options.tokens]
    for row_bytes in options.rows:
        sizes = {"row_bytes": row_bytes, "num_pages": 2 * max(counts), "landing_rows": 1}
        with _daemon.daemon_for(**sizes) as daemon, _daemon.connect(daemon, **sizes) as client:
            for num_pages in counts:
                yield measure_pages(client, num_pages, options.rounds)


def measure_pages(client: MemdClient, num_pages: int, rounds: int) -> Row:
    """Prompts of one length."""
    layout = client.layout
    shape = (num_pages, layout.num_heads, layout.page_tokens, layout.row_bytes)
    words = np.random.default_rng(0).integers(1 << 63, size=np.prod(shape) // 8)
    pages = words.view(np.uint8).reshape(shape)
    halves = np.split(pages, 2, axis=-1)
    keys, values = (np.ascontiguousarray(half) for half in halves)

    def whole(target: Bytes, page: int) -> None:
        target[...] = pages[page]

    def interleaved(target: Bytes, page: int) -> None:
        half = layout.row_bytes // 2
        target[..., :half] = keys[page]
        target[..., half:] = values[page]

    with Prompts(client, num_pages) as prompts:
        for write in (whole, interleaved):
            client.pages[:] = 0
            prompts.store(write)
            require(np.array_equal(client.pages[prompts.page_ids], pages), "a stored page")
        seconds = in_turns(
            {
                "memcpy": lambda: prompts.memcpy(pages),
                "pages": lambda: prompts.store(whole),
                "keys_values": lambda: prompts.store(interleaved),
            },
            rounds,
        )
    shortest, middle = best(seconds), medians(seconds)
    return Row(
        case={
            "row_bytes": layout.row_bytes,
            "tokens": num_pages * layout.page_tokens,
            "bytes": format_bytes(pages.nbytes),
        },
        measured={
            **{f"{name}_gb_s": pages.nbytes / taken / 1e9 for name, taken in shortest.items()},
            "median_ratio": middle["memcpy"] / middle["pages"],
        },
        ratio=shortest["memcpy"] / shortest["pages"],
        at_least=SHARE_OF_MEMCPY,
    )


class Prompts:
    """Stores prompts of as many pages, one after another; gives the pages back at its end.

    Attributes:
        page_ids: Pages of the prompt that was stored last.
    """

    def __init__(self, client: MemdClient, num_pages: int) -> None:
        self._client, self._num_pages = client, num_pages
        self.page_ids = np.empty(0, dtype=np.int64)
        self._next = client.reserve(num_pages)

    def __enter__(self) -> Prompts:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._client.cancel(self._next)
        self._client.release(self.page_ids)
        self._settle()

    def store(self, write: Callable[[Bytes, int], None]) -> float:
        """Stores a prompt instead of the last one; gives the seconds from reserve to commit."""
        client = self._client
        client.release(self.page_ids)
        self._settle()
        begin = time.perf_counter()
        ticket, self._next = self._next, client.reserve(self._num_pages)
        if not client.wait(ticket, _daemon.WAIT_S) or ticket.page_ids is None:
            raise RuntimeError(f"no pages: {ticket.error or client.lost_reason}")
        self.page_ids = ticket.page_ids
        for page, page_id in enumerate(self.page_ids):
            write(client.pages[page_id], page)
        client.commit(self.page_ids)
        return time.perf_counter() - begin

    def memcpy(self, pages: Bytes) -> float:
        """Seconds that one copy takes to where the next prompt will be stored."""
        first = 0 if self.page_ids[0] else self._num_pages
        target = self._client.pages[first : first + self._num_pages]
        begin = time.perf_counter()
        np.copyto(target.reshape(-1).view(np.float32), pages.reshape(-1).view(np.float32))
        return time.perf_counter() - begin

    def _settle(self) -> None:
        if not self._client.drain(_daemon.WAIT_S):
            raise RuntimeError(f"a message was not answered: {self._client.lost_reason}")


if __name__ == "__main__":
    sys.exit(main())
