"""A spawned memd with one client whose pages are all sealed and hold known bytes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from memd.client import MemdClient, MemdProcess, spawn_memd
from memd.protocol import KVLayout

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_S = 30.0
# Of one compressed model: 47 heads as in the demo model, pages as the engine makes them.
NUM_HEADS, PAGE_TOKENS = 47, 64
_SLACK_BYTES = 1 << 20


def layout(row_bytes: int) -> KVLayout:
    """A layout with rows of this size."""
    return KVLayout(
        num_heads=NUM_HEADS, head_dim=row_bytes // 8, dtype="float32", page_tokens=PAGE_TOKENS
    )


@contextlib.contextmanager
def daemon_for(
    *, row_bytes: int, num_pages: int, landing_rows: int, num_clients: int = 1
) -> Iterator[MemdProcess]:
    """A daemon with room for clients of this size."""
    shape = layout(row_bytes)
    each = num_pages * shape.page_bytes + landing_rows * row_bytes + _SLACK_BYTES
    with spawn_memd(num_bytes=num_clients * each) as daemon:
        yield daemon


def connect(
    daemon: MemdProcess, *, row_bytes: int, num_pages: int, landing_rows: int
) -> MemdClient:
    """A client that holds no page yet."""
    return MemdClient.connect(
        daemon.address,
        layout(row_bytes),
        num_pages=num_pages,
        landing_rows=landing_rows,
        deadline_s=WAIT_S,
    )


def fill(client: MemdClient, seed: int = 0) -> None:
    """Write random bytes into every page and seal them."""
    ticket = client.reserve(client.num_pages)
    if not client.wait(ticket, WAIT_S) or ticket.page_ids is None:
        raise RuntimeError(f"no pages: {ticket.error or client.lost_reason}")
    rng = np.random.default_rng(seed)
    for page_id in ticket.page_ids:
        page = client.pages[page_id]
        page[...] = rng.integers(0, 256, page.shape, dtype=np.uint8)
    client.commit(ticket.page_ids)
    if not client.drain(WAIT_S):
        raise RuntimeError(f"commit was not answered: {client.lost_reason}")
