"""A real daemon with a real disk below it."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from memd.channel import ask_once
from memd.client import MemdClient, spawn_memd
from memd.endpoint import Endpoint
from memd.errors import PoolFull
from memd.protocol import KVLayout, Stats, StatsReply, decode_reply, encode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy.typing as npt

    from memd.process import MemdProcess

pytestmark = pytest.mark.multiproc

LAYOUT = KVLayout(num_heads=2, head_dim=64, dtype="float32", page_tokens=64)
NUM_PAGES, HOST_PAGES = 48, 8
LANDING_ROWS = 8 * LAYOUT.rows_per_page
MEMORY_BYTES, DISK_BYTES = 2 << 20, 8 << 20


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[MemdProcess]:
    options = ("--disk-dir", str(tmp_path), "--disk-bytes", str(DISK_BYTES))
    with spawn_memd(num_bytes=MEMORY_BYTES, options=options) as daemon:
        yield daemon
    assert not list(tmp_path.iterdir()), "its file has no name"


@pytest.fixture
def client(daemon: MemdProcess) -> Iterator[MemdClient]:
    with connect(daemon) as client:
        assert client.has_disk
        assert client.host_pages == HOST_PAGES
        yield client


def connect(daemon: MemdProcess, num_pages: int = NUM_PAGES) -> MemdClient:
    return MemdClient.connect(
        daemon.address,
        LAYOUT,
        num_pages=num_pages,
        landing_rows=LANDING_ROWS,
        host_pages=HOST_PAGES,
    )


def content(page_id: int, salt: int = 0) -> npt.NDArray[np.uint8]:
    """What a page holds; no two the same."""
    rng = np.random.default_rng([page_id, salt])
    return rng.integers(256, size=(2, 64, LAYOUT.row_bytes), dtype=np.uint8)


def store(client: MemdClient, num_pages: int) -> list[int]:
    """Frozen pages."""
    stored: list[int] = []
    for _ in range(num_pages):
        reserved = client.reserve(1)
        assert client.wait(reserved, 10.0)
        assert reserved.page_ids is not None, f"no room for page {len(stored)}"
        (page_id,) = reserved.page_ids.tolist()
        client.pages[page_id] = content(page_id)
        client.commit([page_id])
        client.freeze([page_id], [len(stored)])
        stored.append(page_id)
    return stored


def read(client: MemdClient, page_ids: list[int]) -> npt.NDArray[np.uint8] | str:
    """Pages, fetched; or why they could not be."""
    size = LAYOUT.rows_per_page
    ticket = client.fetch(np.concatenate([np.arange(size) + page * size for page in page_ids]))
    assert ticket is not None
    assert client.wait(ticket, 10.0)
    landed = ticket.error or client.landed(ticket).copy().reshape(-1, 2, 64, LAYOUT.row_bytes)
    client.finish(ticket)
    return landed


def memory_of(daemon: MemdProcess) -> int:
    """Memory that a daemon's region takes, bytes."""
    region = next(
        entry
        for entry in Path(f"/proc/{daemon.pid}/fd").iterdir()
        if os.readlink(entry).startswith("/memfd:memd")
    )
    return region.stat().st_blocks * 512


def until(is_true: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_six_times_the_memory_comes_back_bit_for_bit(
    daemon: MemdProcess, client: MemdClient
) -> None:
    stored = store(client, NUM_PAGES)
    assert memory_of(daemon) <= MEMORY_BYTES
    rng = np.random.default_rng(1)
    for _ in range(30):
        page_ids = rng.choice(stored, size=5, replace=False).tolist()
        landed = read(client, page_ids)
        for page, page_id in zip(landed, page_ids, strict=True):
            np.testing.assert_array_equal(page, content(page_id))
    assert memory_of(daemon) <= MEMORY_BYTES
    client.check_integrity()
    disk = client.stats()["server"]["disk"]
    assert disk["puts"] >= NUM_PAGES - HOST_PAGES
    assert disk["gets"] > 0
    assert disk["corrupt"] == disk["get_errors"] == disk["put_errors"] == 0


def test_a_thawed_page_is_written_and_read_again(client: MemdClient) -> None:
    stored = store(client, 3 * HOST_PAGES)
    ticket = client.thaw(stored[:2])
    assert client.wait(ticket, 10.0)
    assert ticket.error is None
    assert ticket.lost is not None
    assert ticket.lost.size == 0
    np.testing.assert_array_equal(client.pages[stored[0]], content(stored[0]))
    client.pages[stored[0]] = content(stored[0], salt=1)
    client.freeze(stored[:2])
    for first in range(2, len(stored), 4):
        read(client, stored[first : first + 4])
    np.testing.assert_array_equal(read(client, [stored[0]])[0], content(stored[0], salt=1))
    client.check_integrity()


def test_what_rots_on_disk_is_a_miss(daemon: MemdProcess, client: MemdClient) -> None:
    stored = store(client, 3 * HOST_PAGES)
    spoil(daemon)
    outcomes = [read(client, [page_id]) for page_id in stored]
    lost = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert lost
    assert all(reason.startswith("page_lost: page ") for reason in lost)
    for page_id, outcome in zip(stored, outcomes, strict=True):
        if not isinstance(outcome, str):
            np.testing.assert_array_equal(outcome[0], content(page_id))
    client.release(stored)
    client.check_integrity()


def test_a_disk_that_takes_nothing_any_more_leaves_what_there_is(
    daemon: MemdProcess, client: MemdClient
) -> None:
    stored = store(client, 2 * HOST_PAGES)
    # What a disk is that was taken away: every write fails.
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (0, 0))
    full = [client.reserve(1) for _ in range(8)]
    assert client.drain(10.0)
    assert any(ticket.page_ids is None for ticket in full)
    held = [int(ticket.page_ids[0]) for ticket in full if ticket.page_ids is not None]
    in_memory = [page for page in stored if not isinstance(read(client, [page]), str)]
    assert in_memory
    client.release(held + stored)
    client.check_integrity()


def test_a_killed_clients_pages_are_given_back(daemon: MemdProcess) -> None:
    code = f"""
import sys
from memd.client import MemdClient
from tests.integration.memd import test_disk
client = MemdClient.connect({daemon.address!r}, test_disk.LAYOUT, num_pages=test_disk.NUM_PAGES,
    landing_rows=test_disk.LANDING_ROWS, host_pages=test_disk.HOST_PAGES)
test_disk.store(client, test_disk.NUM_PAGES)
print("stored", flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"stored\n"
        assert memory_of(daemon) > HOST_PAGES * LAYOUT.page_bytes // 2
        victim.kill()

    def is_clean() -> bool:
        stats = stats_of(daemon)
        return (
            not stats["clients"]
            and stats["region"]["memory_free_bytes"] == MEMORY_BYTES
            and stats["disk"]["pages"] == 0
        )

    until(is_clean)
    until(lambda: memory_of(daemon) == 0)
    with connect(daemon) as client:
        (page_id, *_) = store(client, NUM_PAGES)
        np.testing.assert_array_equal(read(client, [page_id])[0], content(page_id))


def test_two_clients_cannot_be_promised_the_same_disk(daemon: MemdProcess) -> None:
    with connect(daemon), pytest.raises(PoolFull, match="of disk"):
        connect(daemon, num_pages=90)


def stats_of(daemon: MemdProcess) -> dict[str, Any]:
    reply = decode_reply(
        ask_once(Endpoint.parse(daemon.address), encode(Stats(request_id=1)), timeout_s=5.0)
    )
    assert isinstance(reply, StatsReply)
    return reply.stats


def spoil(daemon: MemdProcess) -> None:
    """Flip bits all over the file that a daemon has on disk."""
    for entry in Path(f"/proc/{daemon.pid}/fd").iterdir():
        if not stat.S_ISREG(entry.stat().st_mode) or entry.stat().st_size != DISK_BYTES:
            continue
        with entry.open("r+b", buffering=0) as file:
            for offset in range(0, DISK_BYTES, 3 << 14):
                file.seek(offset)
                byte = file.read(1)
                file.seek(offset)
                file.write(bytes([byte[0] ^ 0x10]))
            os.fsync(file.fileno())
        return
    raise AssertionError("it has no file")
