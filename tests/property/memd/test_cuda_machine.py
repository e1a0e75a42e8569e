"""Clients come, copy and go or die while the driver fails and hangs: who writes, what ends how.

The workers run here, on one thread with the control thread, a step at a time; what happens inside a
driver call that takes long is part of the sequence too.
"""

from __future__ import annotations

import collections
import dataclasses
import mmap
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from memd.cuda.device import (
    CopyEnd,
    CopyEnded,
    RingClosed,
    RingFailed,
    RingLost,
    RingOpened,
    RingState,
    StagedCopy,
)
from memd.cuda.errors import RingRefused
from memd.cuda.export import export_ring
from memd.cuda.fake import FakeDriver
from memd.cuda.fake_machine import FakeAllocation, FakeMachine
from memd.cuda.staging import SlotState
from memd.cuda.worker import Timeouts, Worker
from memd.transfer import HostTransfer
from memd.transfer.cuda_ipc import CudaIpc

if TYPE_CHECKING:
    from memd.cuda.device import DeviceEvent

NUM_DEVICES = 2
ROW = 128
NUM_ROWS = 64
CELL = 8 * ROW
NUM_CELLS = 4
RING = NUM_CELLS * CELL
GUARD = 256
CHUNK = mmap.PAGESIZE
STAGING = 2 * CHUNK
# Of one command; copies and starts may take longer.
CALL_S = 4.0

# All but the last release of a context, after which nothing more can be done about anything.
CALLS = [
    "cuInit",
    "cuDevicePrimaryCtxRetain",
    "cuCtxSetCurrent",
    "cuMemHostRegister",
    "cuMemHostUnregister",
    "cuIpcOpenMemHandle",
    "cuIpcCloseMemHandle",
    "cuMemGetAddressRange",
    "cuStreamCreate",
    "cuStreamDestroy",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuEventDestroy",
    "cuMemcpyHtoDAsync",
]
ERRORS = ["CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_LAUNCH_FAILED"]

BATCHES = st.lists(st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=8), max_size=6)


@dataclasses.dataclass(eq=False)
class Client:
    """An engine with a ring between two guards.

    Attributes:
        end: What memd said last of its ring; None until then.
        after_close: Its device memory when memd said that the ring is closed.
        sent: Copies that were sent, in order.
        is_alive: Whether it still owns its device memory.
        has_left: Whether its ring was closed.
    """

    client_id: int
    allocation: FakeAllocation
    end: DeviceEvent | None = None
    after_close: bytes | None = None
    sent: list[StagedCopy] = dataclasses.field(default_factory=list)
    is_alive: bool = True
    has_left: bool = False


class CudaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.machine = FakeMachine(NUM_DEVICES)
        self.driver = FakeDriver(self.machine)
        self.engine = FakeDriver(self.machine)
        self.engine.init()
        self.now = 0.0
        self.workers: list[Worker] = []
        pages = NUM_ROWS * ROW
        self.memory = np.frombuffer(mmap.mmap(-1, pages + NUM_DEVICES * STAGING), dtype=np.uint8)
        self.rows = self.memory[:pages].reshape(NUM_ROWS, ROW)
        self.rows[:] = np.random.default_rng(1).integers(0, 256, self.rows.shape)
        self.transfer = HostTransfer(self.memory)
        self.free_staging = [pages + n * STAGING for n in range(NUM_DEVICES)]
        self.path = CudaIpc(
            self.memory,
            set_aside=lambda num_bytes: self.free_staging.pop(),
            give_back=self.free_staging.append,
            staging_bytes=STAGING,
            chunk_bytes=CHUNK,
            load=lambda: self.driver,
            timeouts=Timeouts(start_s=8.0, call_s=CALL_S, copy_s=CALL_S),
            spawn=self.workers.append,
            clock=lambda: self.now,
        )
        self.clients: dict[int, Client] = {}
        self.num_troubles = 0
        self.filling: list[StagedCopy] = []
        # Rows of every copy there was, and how it ended.
        self.rows_of: dict[StagedCopy, list[int]] = {}
        self.ends: collections.defaultdict[StagedCopy, list[str]] = collections.defaultdict(list)

    # What clients do.

    @initialize(devices=st.lists(st.integers(0, NUM_DEVICES - 1), min_size=1, max_size=3))
    def start(self, devices: list[int]) -> None:
        for device in devices:
            self.connect(device)
        for worker in self.workers:
            self.step(worker, 8)
        self.take()

    @precondition(lambda self: len(self.present()) < 3 and len(self.clients) < 12)
    @rule(device=st.integers(0, NUM_DEVICES - 1))
    def connect(self, device: int) -> None:
        client_id = len(self.clients) + 1
        allocation = self.machine.allocate(GUARD + RING + GUARD, device=device)
        handle = export_ring(
            self.engine, device=device, address=allocation.address + GUARD, num_bytes=RING
        )
        client = Client(client_id, allocation)
        try:
            self.path.open(client_id, handle)
        except RingRefused as refused:
            # Of a lost device, which is known at once.
            client.end = RingFailed(client_id, str(refused))
        self.clients[client_id] = client

    @precondition(lambda self: self.filling)
    @rule(data=st.data(), is_sent=st.booleans())
    def decide(self, data: st.DataObject, is_sent: bool) -> None:
        copy = self.filling.pop(data.draw(st.integers(0, len(self.filling) - 1)))
        if is_sent:
            self.send(copy)
        else:
            self.path.cancel(copy)
            self.ends[copy].append("cancelled")

    @precondition(lambda self: self.present())
    @rule(data=st.data(), dies=st.booleans())
    def leave(self, data: st.DataObject, dies: bool) -> None:
        # Rather one whose copies are under way.
        busy = [client for client in self.present() if any(not self.ends[c] for c in client.sent)]
        client = data.draw(st.sampled_from(busy or self.present()))
        if dies and client.is_alive:
            client.is_alive = False
            self.machine.kill_owner(client.allocation)
        self.close(client)

    # What the rest of the world does.

    # Fetches belong to it, so that there are some in every sequence.
    @rule(
        data=st.data(),
        batches=BATCHES,
        is_sent=st.sampled_from([True, True, False]),
        steps=st.integers(0, 8),
        num_landing=st.integers(0, 4),
        is_polled=st.booleans(),
    )
    def go_on(
        self,
        data: st.DataObject,
        batches: list[list[int]],
        is_sent: bool,
        steps: int,
        num_landing: int,
        is_polled: bool,
    ) -> None:
        """Clients fetch, workers work, then copies land, in every stream as many."""
        for rows in batches:
            if places := self.free_cells():
                self.fetch(*data.draw(st.sampled_from(places)), rows, is_sent=is_sent)
        for worker in self.workers:
            self.step(worker, steps)
        for stream in self.driver.busy_streams():
            self.driver.complete(stream, count=num_landing)
        if is_polled:
            self.take()

    # At most a few troubles in one run: what ends everything at once hides all else.
    @precondition(lambda self: self.num_troubles < 3)
    @rule(call=st.sampled_from(CALLS), error=st.sampled_from(ERRORS), after=st.integers(0, 4))
    def fail(self, call: str, error: str, after: int) -> None:
        self.num_troubles += 1
        self.driver.fail(call, error, after=after)

    @precondition(lambda self: self.num_troubles < 3 and len(self.rows_of) > 2)
    @rule(device=st.integers(0, NUM_DEVICES - 1))
    def break_device(self, device: int) -> None:
        self.num_troubles += 1
        if self.driver.held()["contexts"]:
            self.driver.break_device("CUDA_ERROR_ECC_UNCORRECTABLE", device=device)

    @precondition(lambda self: self.num_troubles < 3)
    @rule(
        call=st.sampled_from(CALLS),
        seconds=st.sampled_from([0, 1, 1, 1, 9]),
        leaves=st.booleans(),
    )
    def take_long(self, call: str, seconds: int, leaves: bool) -> None:
        """Inside the next such call, the control thread goes on."""
        self.num_troubles += 1

        def meanwhile() -> None:
            if leaves:
                self.close(next(iter(self.clients.values())))
            self.look(seconds)
            self.holds()

        self.driver.during(call, meanwhile)

    @rule(seconds=st.integers(0, 1), stopped_s=st.sampled_from([0.0, 3600.0]))
    def look(self, seconds: int, stopped_s: float = 0.0) -> None:
        """Time passes, and the control thread looks; or memd itself is stopped for a while."""
        self.now += stopped_s
        self.take()
        for _ in range(2 * seconds):
            self.now += 0.5
            self.take()

    # What must hold.

    @invariant()
    def holds(self) -> None:
        self.path.check_integrity()
        assert self.machine.violations == []
        for client in self.clients.values():
            memory = client.allocation.memory
            assert (memory[:GUARD] == 0xEE).all(), "written before the ring"
            assert (memory[GUARD + RING :] == 0xEE).all(), "written behind the ring"
            if client.after_close is not None:
                assert memory.tobytes() == client.after_close, "written after its close"
        assert all(len(ends) <= 1 for ends in self.ends.values()), "a copy ended twice"

    def teardown(self) -> None:
        self.driver.mend()
        for client in self.clients.values():
            self.close(client)
        for _ in range(40):
            self.driver.complete()
            for worker in self.workers:
                self.step(worker, 1)
            self.take()
            self.holds()
        assert all(len(self.ends[copy]) == 1 for copy in self.rows_of), "a copy has not ended"
        assert all(client.end is not None for client in self.clients.values())
        assert self.driver.held() == dict.fromkeys(self.driver.held(), 0)
        lost = [device for device in self.path.stats()["devices"] if device["lost_reason"]]
        assert len(self.path.stats()["devices"]) == len(lost)
        assert len(self.free_staging) == NUM_DEVICES - len(lost)
        for client in self.clients.values():
            if client.is_alive:
                # The device is lost, and memd's context on it is gone.
                self.machine.free(client.allocation)
        assert self.machine.violations == []
        assert sum(self.machine.held_bytes(device) for device in range(NUM_DEVICES)) == 0

    # How the model follows.

    def take(self) -> None:
        for event in self.path.poll():
            match event:
                case RingOpened(client_id):
                    assert self.clients[client_id].end is None
                case RingFailed(client_id) | RingLost(client_id):
                    self.end(client_id, event)
                case RingClosed(client_id):
                    self.end(client_id, event)
                    client = self.clients[client_id]
                    client.after_close = client.allocation.memory.tobytes()
                case CopyEnded(copy, end):
                    self.end_copy(copy, end)

    def end(self, client_id: int, event: DeviceEvent) -> None:
        assert self.clients[client_id].end is None, "a ring ended twice"
        assert "memd failed" not in getattr(event, "reason", ""), event
        assert self.path.ring_state(client_id) is None
        client = self.clients[client_id]
        client.end = event
        if client.is_alive and not isinstance(event, RingLost):
            # As an engine may, once memd has closed the ring or refused it.
            client.is_alive = False
            self.machine.free(client.allocation)

    def end_copy(self, copy: StagedCopy, end: CopyEnd) -> None:
        self.ends[copy].append(end.value)
        if copy in self.filling:
            self.filling.remove(copy)
        if end is not CopyEnd.DONE:
            return
        client = self.clients[copy.client_id]
        before = client.sent[: client.sent.index(copy)]
        assert all(self.ends[earlier] for earlier in before), "a later copy ended first"
        assert copy.slot.state is SlotState.FREE
        ring = client.allocation.memory[GUARD + copy.ring_offset :]
        expected = self.rows[self.rows_of[copy]]
        assert np.array_equal(ring[: expected.size].reshape(expected.shape), expected)

    def close(self, client: Client) -> None:
        client.has_left = True
        for copy in self.path.close(client.client_id):
            self.ends[copy].append("cancelled")
            if copy in self.filling:
                self.filling.remove(copy)

    def fetch(self, client: Client, cell: int, rows: list[int], *, is_sent: bool) -> None:
        copy = self.path.begin(client.client_id, ring_offset=cell * CELL, num_bytes=len(rows) * ROW)
        if copy is None:
            return
        self.transfer.gather(
            source_offset=0,
            row_bytes=ROW,
            rows=np.array(rows, dtype=np.int64),
            landing_offset=copy.slot.offset,
        )
        self.rows_of[copy] = rows
        if is_sent:
            self.send(copy)
        else:
            self.filling.append(copy)

    def send(self, copy: StagedCopy) -> None:
        self.path.send(copy)
        self.clients[copy.client_id].sent.append(copy)

    def step(self, worker: Worker, count: int) -> None:
        with self.driver.as_thread(worker.name):
            for _ in range(count):
                worker.step()

    def present(self) -> list[Client]:
        """Those that have not left and whose ring has not ended."""
        return [c for c in self.clients.values() if c.end is None and not c.has_left]

    def free_cells(self) -> list[tuple[Client, int]]:
        """Of open rings; a cell is used again when its copy has ended, as an engine does."""
        used = {
            (copy.client_id, copy.ring_offset // CELL)
            for copy in self.rows_of
            if not self.ends[copy]
        }
        return [
            (client, cell)
            for client in self.clients.values()
            if self.path.ring_state(client.client_id) is RingState.OPEN
            for cell in range(NUM_CELLS)
            if (client.client_id, cell) not in used
        ]


TestCudaMachine = CudaMachine.TestCase
