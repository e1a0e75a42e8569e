"""A daemon that imitates a slow interconnect."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from memd.client import MemdClient, spawn_memd
from memd.protocol import KVLayout

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.multiproc

LAYOUT = KVLayout(num_heads=1, head_dim=64, dtype="float32", page_tokens=64)
NUM_PAGES = 16
NUM_ROWS = NUM_PAGES * 64
GBPS = 0.004
SECONDS = NUM_ROWS * LAYOUT.row_bytes / (GBPS * 1e9 / 8)
"""About a second for all rows."""


def test_a_fetch_takes_the_links_time_and_the_daemon_answers_others_meanwhile(
    tmp_path: Path,
) -> None:
    arguments = ("--link-gbps", str(GBPS), "--link-latency-us", "1000")
    with (
        spawn_memd(num_bytes=1 << 22, options=arguments) as daemon,
        MemdClient.connect(
            daemon.address, LAYOUT, num_pages=NUM_PAGES, landing_rows=NUM_ROWS
        ) as client,
    ):
        reserved = client.reserve(NUM_PAGES)
        assert client.wait(reserved, 5.0)
        client.pages[reserved.page_ids] = np.arange(client.pages.size, dtype=np.uint8).reshape(
            client.pages.shape
        )
        client.commit(reserved.page_ids)
        rows = np.arange(NUM_ROWS)[::-1].copy()
        began = time.monotonic()
        ticket = client.fetch(rows)
        assert ticket is not None
        released = client.reserve(0)
        assert client.wait(released, 5.0)
        assert not ticket.is_done

        assert client.wait(ticket, 5.0)

        took = time.monotonic() - began
        assert ticket.error is None
        assert took >= SECONDS
        np.testing.assert_array_equal(
            client.landed(ticket), client.pages.reshape(NUM_ROWS, -1)[::-1]
        )
        client.finish(ticket)
