"""A real daemon and a real client, with a CUDA driver that is not there.

The daemon's process gets the fake driver as an argument of ``Server``: no flag or variable leads
there. The device's memory is a file that both processes map.
"""

from __future__ import annotations

import ast
import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from memd.client import MemdClient
from memd.cuda.errors import RingRefused
from memd.cuda.fake_machine import FakeMachine
from memd.cuda.ring import RingHandle
from memd.protocol import KVLayout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.multiproc

LAYOUT = KVLayout(num_heads=2, head_dim=32, dtype="float32", page_tokens=16)
LANDING_ROWS = 64
RING_BYTES = LANDING_ROWS * LAYOUT.row_bytes
RING_START = 1 << 16
DEVICE_BYTES = 1 << 20
BOUND_S = 10.0

DAEMON = """
import os, sys
import numpy as np
from memd.config import MemdConfig
from memd.cuda.fake import FakeDriver
from memd.cuda.fake_machine import FakeMachine
from memd.server import Server

address, memory, num_bytes, report = sys.argv[1:]
machine = FakeMachine()
machine.allocate(int(num_bytes)).memory = np.memmap(memory, dtype=np.uint8, mode="r+")
driver = FakeDriver(machine)
driver.is_automatic = True
config = MemdConfig(address=address, region_bytes=8 << 20, cuda_staging_bytes=1 << 20)
with Server(config, load_cuda=lambda: driver) as server:
    print("READY", flush=True)
    server.run()
with open(report, "w") as file:
    file.write(repr((driver.held(), machine.violations)))
"""


class Daemon:
    def __init__(self, directory: Path, process: subprocess.Popen[str]) -> None:
        self.address = f"ipc://{directory / 'memd' / 'control.sock'}"
        self.process = process
        self.device = np.memmap(directory / "device", dtype=np.uint8, mode="r+")
        self.report = directory / "report"
        machine = FakeMachine()
        self.ring = RingHandle(
            handle=machine.allocate(DEVICE_BYTES).handle,
            base_offset=RING_START,
            num_bytes=RING_BYTES,
            device_uuid=machine.uuids[0],
        )

    def connect(self, ring: RingHandle | None = None) -> MemdClient:
        return MemdClient.connect(
            self.address,
            LAYOUT,
            num_pages=8,
            landing_rows=LANDING_ROWS,
            ring=ring or self.ring,
        )

    def landed(self, start: int, num_rows: int) -> np.ndarray:
        place = self.device[RING_START + start * LAYOUT.row_bytes :]
        return place[: num_rows * LAYOUT.row_bytes].reshape(num_rows, -1)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    (tmp_path / "device").write_bytes(bytes(DEVICE_BYTES))
    arguments = [
        f"ipc://{tmp_path / 'memd' / 'control.sock'}",
        str(tmp_path / "device"),
        str(DEVICE_BYTES),
        str(tmp_path / "report"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", DAEMON, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "READY\n"
        yield Daemon(tmp_path, process)
    finally:
        process.kill()
        process.wait(BOUND_S)
        assert process.stdout is not None
        process.stdout.close()


def write(client: MemdClient, num_pages: int) -> np.ndarray:
    """Seal pages of random bytes; all rows."""
    reserved = client.reserve(num_pages)
    assert client.wait(reserved, BOUND_S)
    client.pages[reserved.page_ids] = np.random.default_rng(1).integers(
        0, 256, client.pages[reserved.page_ids].shape
    )
    client.commit(reserved.page_ids)
    return client.pages.reshape(-1, LAYOUT.row_bytes)


def test_rows_land_on_the_device_and_the_ring_is_closed_at_the_end(daemon: Daemon) -> None:
    with daemon.connect() as client:
        assert client.data_path == "cuda_ipc"
        source = write(client, 4)
        random = np.random.default_rng(2)
        for _ in range(20):
            rows = random.integers(0, 4 * LAYOUT.rows_per_page, 48)
            ticket = client.fetch(rows)
            assert ticket is not None
            assert client.wait(ticket, BOUND_S)
            assert ticket.error is None
            assert np.array_equal(daemon.landed(ticket.landing_start, 48), source[rows])
            client.finish(ticket)
        client.check_integrity()
        # memd's answer comes with the next poll.
        client.stats()
        assert client.drain(BOUND_S)
        cuda = client.stats()["server"]["cuda"]
        assert cuda["counters"]["copies_done"] == 20
    assert client.is_ring_closed
    # With the last ring everything goes, and comes back with the next.
    with daemon.connect() as client:
        assert client.data_path == "cuda_ipc"


def test_a_ring_that_is_none_is_refused_and_the_client_may_go_on_without(daemon: Daemon) -> None:
    unknown = RingHandle(
        handle=bytes(64), base_offset=0, num_bytes=RING_BYTES, device_uuid=daemon.ring.device_uuid
    )
    with pytest.raises(RingRefused, match="cannot map the landing ring"):
        daemon.connect(unknown)
    elsewhere = RingHandle(
        handle=daemon.ring.handle, base_offset=0, num_bytes=RING_BYTES, device_uuid=bytes(16)
    )
    with pytest.raises(RingRefused, match="CUDA_VISIBLE_DEVICES"):
        daemon.connect(elsewhere)
    with daemon.connect() as client:
        write(client, 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_daemon_that_ends_leaves_nothing_on_the_device(
    daemon: Daemon, number: signal.Signals
) -> None:
    client = daemon.connect()
    write(client, 1)
    assert client.fetch(np.arange(32)) is not None
    os.kill(daemon.process.pid, number)
    if number is signal.SIGTERM:
        # It drains: there is time for a goodbye that is answered.
        client.close()
        assert client.is_ring_closed
    assert daemon.process.wait(BOUND_S) == 0
    held, violations = ast.literal_eval(daemon.report.read_text())
    assert held == dict.fromkeys(held, 0)
    assert violations == []
    client.close()


def test_a_client_that_is_killed_gives_staging_back(daemon: Daemon) -> None:
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            client = daemon.connect()
            write(client, 4)
            client.fetch(np.arange(LANDING_ROWS))
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    with daemon.connect() as client:
        deadline = time.monotonic() + BOUND_S
        while True:
            client.stats()
            assert client.drain(BOUND_S)
            stats = client.stats()["server"]
            if stats["cuda"]["devices"][0]["rings"] == 1 and not stats["region"]["dirty_bytes"]:
                break
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert stats["integrity"] == "ok"
        assert len(stats["clients"]) == 1
