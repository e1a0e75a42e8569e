"""A service with rings on devices that are not there; a test says when a worker works."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from memd.cuda.export import export_ring
from memd.cuda.fake import FakeDriver
from memd.cuda.fake_machine import FakeAllocation, FakeMachine
from memd.cuda.worker import Timeouts, Worker
from memd.protocol import (
    PROTOCOL_VERSION,
    Commit,
    DeviceRing,
    ErrorReply,
    Fetch,
    Hello,
    KVLayout,
    Reserve,
    decode_reply,
    encode,
)
from memd.rings import Rings
from memd.service import Service
from memd.store import Store
from memd.tiers import DiskTier, Tiers
from memd.tiers.testing import FakeFile
from memd.transfer import HostTransfer

if TYPE_CHECKING:
    from memd.cuda.driver import Driver

LAYOUT = KVLayout(num_heads=2, head_dim=16, dtype="float32", page_tokens=8)
ROW = LAYOUT.row_bytes
NUM_PAGES = 4
RING_ROWS = 32
RING_BYTES = RING_ROWS * ROW
STAGING_BYTES = 2 * mmap.PAGESIZE
GUARD = 512


class CudaDaemon:
    """memd without sockets, engines with a ring between two guards each, and a device or two.

    With ``fd``, a memfd, its region has memory for half of its addresses and a disk below.
    """

    def __init__(
        self,
        *,
        region_bytes: int = 1 << 18,
        staging_bytes: int = STAGING_BYTES,
        num_devices: int = 1,
        fd: int | None = None,
        **options: Any,
    ) -> None:
        self.machine = FakeMachine(num_devices)
        self.driver = FakeDriver(self.machine)
        self.engine = FakeDriver(self.machine)
        self.engine.init()
        self.now = 0.0
        self.num_loads = 0
        self.workers: list[Worker] = []
        if fd is not None:
            os.ftruncate(fd, region_bytes)
        mapping = mmap.mmap(-1 if fd is None else fd, region_bytes)
        self.region = np.frombuffer(mapping, dtype=np.uint8)
        self.store, tiers = Store(region_bytes), None
        if fd is not None:
            file = FakeFile(region_bytes)
            disk = DiskTier(Path(), region_bytes, open_file=lambda _, __: file)
            tiers = Tiers(disk, eviction="lru", memory=self.region, fd=fd)
            self.store = Store(
                region_bytes, memory_bytes=region_bytes // 2, disk_bytes=region_bytes
            )
        self.rings = Rings(
            self.store,
            self.region,
            staging_bytes=staging_bytes,
            fill=None if tiers is None else tiers.fill,
            load=self.load,
            notify=lambda: self.service.note_news(),
            timeouts=Timeouts(start_s=8.0, call_s=4.0, copy_s=4.0),
            spawn=self.workers.append,
            clock=lambda: self.now,
        )
        self.service = Service(
            self.store,
            HostTransfer(self.region),
            rings=self.rings,
            tiers=tiers,
            clock=lambda: self.now,
            **options,
        )
        self.allocations: dict[bytes, FakeAllocation] = {}
        self.sessions: dict[bytes, bytes] = {}
        self.rows: dict[bytes, np.ndarray] = {}
        self.replies: list[tuple[bytes, Any]] = []

    def load(self) -> Driver:
        self.num_loads += 1
        return self.driver

    # An engine's side.

    def ring(self, connection: bytes, *, device: int = 0) -> DeviceRing:
        allocation = self.machine.allocate(GUARD + RING_BYTES + GUARD, device=device)
        self.allocations[connection] = allocation
        handle = export_ring(
            self.engine, device=device, address=allocation.address + GUARD, num_bytes=RING_BYTES
        )
        return DeviceRing(
            handle=handle.handle,
            base_offset=handle.base_offset,
            num_bytes=handle.num_bytes,
            device_uuid=handle.device_uuid,
        )

    def ask(self, connection: bytes, request: Any) -> Any:
        """The reply, if it is given at once."""
        reply = self.service.handle(connection, encode(request))
        return None if reply is None else decode_reply(reply)

    def hello(self, connection: bytes, ring: DeviceRing | None, **changes: Any) -> Any:
        session = self.sessions[connection] = self.service.open_session(5)
        return self.hello_again(connection, session, ring, **changes)

    def hello_again(
        self, connection: bytes, session: bytes, ring: DeviceRing | None, **changes: Any
    ) -> Any:
        fields = {
            "version": PROTOCOL_VERSION,
            "session": session,
            "pid": 5,
            "layout": LAYOUT,
            "num_pages": NUM_PAGES,
            "landing_bytes": 0 if ring else RING_BYTES,
            "ring": ring,
        }
        return self.ask(connection, Hello(request_id=0, **{**fields, **changes}))

    def join(self, connection: bytes, *, device: int = 0, has_ring: bool = True) -> Any:
        """A client whose pages are all sealed and full of bytes; memd's answer to its Hello."""
        ring = self.ring(connection, device=device) if has_ring else None
        hello = self.hello(connection, ring)
        if hello is None:
            self.work()
            hello = self.last(connection)
        if isinstance(hello, ErrorReply):
            return hello
        extent = self.region[hello.extent_offset :][: NUM_PAGES * LAYOUT.page_bytes]
        extent[:] = np.random.default_rng(hello.client_id).integers(0, 256, extent.size)
        self.rows[connection] = extent.reshape(-1, ROW)
        self.ask(connection, Reserve(request_id=1, num_pages=NUM_PAGES))
        self.ask(connection, Commit(request_id=2, page_ids=list(range(NUM_PAGES))))
        return hello

    def fetch(
        self, connection: bytes, request_id: int, rows: list[int], landing_row: int = 0
    ) -> Any:
        packed = np.array(rows, dtype="<u4").tobytes()
        return self.ask(
            connection, Fetch(request_id=request_id, rows=packed, landing_row=landing_row)
        )

    def landed(self, connection: bytes, landing_row: int, num_rows: int) -> np.ndarray:
        start = GUARD + landing_row * ROW
        return self.allocations[connection].memory[start:][: num_rows * ROW].reshape(-1, ROW)

    # The world's.

    def step_workers(self, count: int = 1) -> None:
        for worker in self.workers:
            with self.driver.as_thread(worker.name):
                for _ in range(count):
                    worker.step()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.replies += [
                (connection, decode_reply(reply)) for connection, reply in self.service.step()
            ]

    def work(self, *, completes: bool = True) -> None:
        """Until nothing more happens by itself; copies land, unless they must not."""
        for _ in range(12):
            self.step(3)
            self.step_workers(3)
            if completes:
                self.driver.complete()
        self.step(3)

    def last(self, connection: bytes) -> Any:
        return next((r for to, r in reversed(self.replies) if to == connection), None)

    def reply(self, connection: bytes, request_id: int) -> Any:
        found = [r for to, r in self.replies if (to, r.request_id) == (connection, request_id)]
        assert len(found) <= 1, "answered twice"
        return found[0] if found else None

    def pass_time(self, seconds: float) -> None:
        for _ in range(int(2 * seconds)):
            self.now += 0.5
            self.step()

    def check(self) -> dict[str, Any]:
        stats = self.service.stats()
        assert stats["integrity"] == "ok", stats["integrity"]
        assert self.machine.violations == []
        for allocation in self.allocations.values():
            assert (allocation.memory[:GUARD] == 0xEE).all(), "written before the ring"
            assert (allocation.memory[GUARD + RING_BYTES :] == 0xEE).all(), "written behind it"
        return stats
