"""Clients with and without rings at one service, while devices fail: right bytes or an error.

What devices and their rings do by themselves is in ``test_cuda_machine``; this is what clients see.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memd.protocol import (
    Commit,
    ErrorCode,
    ErrorReply,
    FetchReply,
    Goodbye,
    GoodbyeReply,
    HelloReply,
    Release,
    Reserve,
    ReserveReply,
)
from tests.unit.memd.cuda_daemon import (
    GUARD,
    LAYOUT,
    NUM_PAGES,
    RING_ROWS,
    ROW,
    CudaDaemon,
)

CELL = 8
NUM_DEVICES = 2
ROWS_PER_PAGE = LAYOUT.rows_per_page
CALLS = [
    "cuInit",
    "cuMemHostRegister",
    "cuIpcOpenMemHandle",
    "cuIpcCloseMemHandle",
    "cuStreamCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuMemcpyHtoDAsync",
]
EXPECTED = {
    ErrorCode.DEVICE_LOST,
    ErrorCode.DEVICE_REFUSED,
    ErrorCode.NOT_REGISTERED,
    ErrorCode.POOL_FULL,
}


@dataclasses.dataclass(eq=False)
class Client:
    """What a client knows.

    Attributes:
        sealed: Its pages.
        open: Rows of its fetches without a reply, by request, and their cell.
        after_close: Its device memory when memd said that the ring is closed.
    """

    connection: bytes
    has_ring: bool
    hello: HelloReply | None = None
    is_gone: bool = False
    goodbye: int | None = None
    next_id: int = 1
    sealed: set[int] = dataclasses.field(default_factory=set)
    open: dict[int, tuple[np.ndarray, int]] = dataclasses.field(default_factory=dict)
    after_close: bytes | None = None

    def request_id(self) -> int:
        self.next_id += 1
        return self.next_id


class Later:
    """Has every fetch wait in line, and arrive in order, when time has passed or at once."""

    def __init__(self, machine: ServiceCudaMachine) -> None:
        self._machine = machine
        self._seconds = itertools.cycle([0.0, 0.5])
        self._last = 0.0

    def finish_time(self, num_bytes: int) -> float:
        del num_bytes
        self._last = max(self._last, self._machine.daemon.now + next(self._seconds))
        return self._last


class ServiceCudaMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.daemon = self.new_daemon(is_later=False)
        self.clients: list[Client] = []
        self.num_seen = 0
        self.num_troubles = 0

    @initialize(is_later=st.booleans())
    def start(self, is_later: bool) -> None:
        self.daemon = self.new_daemon(is_later=is_later)

    def new_daemon(self, *, is_later: bool) -> CudaDaemon:
        return CudaDaemon(
            region_bytes=1 << 16,
            staging_bytes=mmap.PAGESIZE,
            num_devices=NUM_DEVICES,
            delay=Later(self) if is_later else None,
        )

    # What clients do.

    @precondition(lambda self: sum(not c.is_gone for c in self.clients) < 3)
    @rule(
        device=st.sampled_from([None, 0, 0, 0, 1]),
        is_quick=st.sampled_from([True, True, True, False]),
    )
    def connect(self, device: int | None, is_quick: bool) -> None:
        connection = f"client {len(self.clients)}".encode()
        client = Client(connection, device is not None)
        self.clients.append(client)
        ring = None if device is None else self.daemon.ring(connection, device=device)
        reply = self.daemon.hello(connection, ring)
        if reply is not None:
            self.on_reply(client, reply)
        # Rather one that is there: what comes before is soon over.
        for _ in range(8 if is_quick else 0):
            self.daemon.step_workers(2)
            self.look(3)

    @precondition(lambda self: self.present())
    @rule(data=st.data(), num_rows=st.lists(st.integers(0, CELL), min_size=1, max_size=4))
    def fetch(self, data: st.DataObject, num_rows: list[int]) -> None:
        client = data.draw(st.sampled_from(self.present()))
        for count in num_rows:
            used = {cell for _, cell in client.open.values()}
            cells = [cell for cell in range(RING_ROWS // CELL) if cell not in used]
            if not client.sealed or not cells:
                return
            pages = sorted(client.sealed)
            rows = [
                pages[index % len(pages)] * ROWS_PER_PAGE + index % ROWS_PER_PAGE
                for index in data.draw(
                    st.lists(st.integers(0, 1000), min_size=count, max_size=count)
                )
            ]
            request_id = client.request_id()
            expected = self.daemon.rows[client.connection][rows].copy()
            client.open[request_id] = (expected, cells[0])
            reply = self.daemon.fetch(client.connection, request_id, rows, cells[0] * CELL)
            if reply is not None:
                self.on_reply(client, reply)

    @precondition(lambda self: self.present())
    @rule(data=st.data())
    def write_again(self, data: st.DataObject) -> None:
        """Pages are given back under fetches, and written anew if they are free at once."""
        client = data.draw(st.sampled_from(self.present()))
        if not client.sealed:
            return
        page_id = data.draw(st.sampled_from(sorted(client.sealed)))
        client.sealed.remove(page_id)
        self.ask(client, Release(request_id=client.request_id(), page_ids=[page_id]))
        reply = self.ask(client, Reserve(request_id=client.request_id(), num_pages=1))
        assert isinstance(reply, ReserveReply)
        if reply.page_ids is None:
            return
        (page_id,) = reply.page_ids
        rows = self.daemon.rows[client.connection][page_id * ROWS_PER_PAGE :][:ROWS_PER_PAGE]
        rows += 1
        self.ask(client, Commit(request_id=client.request_id(), page_ids=[page_id]))
        client.sealed.add(page_id)

    @precondition(lambda self: self.present())
    @rule(data=st.data())
    def say_goodbye(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.present()))
        client.is_gone, client.goodbye = True, client.request_id()
        reply = self.daemon.ask(client.connection, Goodbye(request_id=client.goodbye))
        if reply is not None:
            self.on_reply(client, reply)

    @precondition(lambda self: any(not c.is_gone for c in self.clients))
    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """At any time, also while its Hello waits."""
        client = data.draw(st.sampled_from([c for c in self.clients if not c.is_gone]))
        client.is_gone = True
        if client.has_ring:
            self.daemon.machine.kill_owner(self.daemon.allocations[client.connection])
        self.daemon.service.close_session(self.daemon.sessions[client.connection], "died")

    # What the rest of the world does.

    @rule(steps=st.integers(0, 6), works=st.integers(0, 6), lands=st.integers(0, 3))
    def go_on(self, steps: int, works: int, lands: int) -> None:
        self.daemon.step_workers(works)
        for stream in self.daemon.driver.busy_streams():
            self.daemon.driver.complete(stream, count=lands)
        self.look(steps)

    @rule()
    def tidy(self) -> None:
        self.daemon.service.tidy(1 << 12)

    @rule(seconds=st.integers(0, 2))
    def wait(self, seconds: int) -> None:
        for _ in range(2 * seconds):
            self.daemon.now += 0.5
            self.look(2)

    @precondition(lambda self: self.num_troubles < 2 and self.present())
    @rule(
        call=st.sampled_from(CALLS),
        error=st.sampled_from(["CUDA_ERROR_OUT_OF_MEMORY", "CUDA_ERROR_LAUNCH_FAILED"]),
    )
    def fail(self, call: str, error: str) -> None:
        self.num_troubles += 1
        self.daemon.driver.fail(call, error)

    @precondition(lambda self: self.num_troubles < 2 and self.present())
    @rule(device=st.integers(0, NUM_DEVICES - 1))
    def break_device(self, device: int) -> None:
        self.num_troubles += 1
        if self.daemon.driver.held()["contexts"]:
            self.daemon.driver.break_device("CUDA_ERROR_ECC_UNCORRECTABLE", device=device)

    # What must hold.

    @invariant()
    def holds(self) -> None:
        stats = self.daemon.check()
        if not any(client.open for client in self.clients):
            assert not any(client["pages_leaving"] for client in stats["clients"]), "still pinned"
        for client in self.clients:
            if client.after_close is not None:
                memory = self.daemon.allocations[client.connection].memory
                assert memory.tobytes() == client.after_close, "written after Goodbye"

    def teardown(self) -> None:
        self.daemon.driver.mend()
        for client in self.clients:
            if not client.is_gone:
                self.daemon.service.close_session(self.daemon.sessions[client.connection], "end")
                client.is_gone = True
        for _ in range(60):
            self.daemon.now += 0.5
            self.daemon.step_workers(2)
            self.daemon.driver.complete()
            self.look(4)
        while self.daemon.service.tidy(1 << 16):
            pass
        self.holds()
        assert not any(client.open for client in self.clients), "a fetch was never answered"
        assert not any(client.goodbye for client in self.clients), "a Goodbye was never answered"
        stats = self.daemon.check()
        held = sum(device["staging_bytes"] for device in stats["cuda"]["devices"])
        assert stats["region"]["free_bytes"] == self.daemon.region.size - held
        assert all(device["lost_reason"] for device in stats["cuda"]["devices"])

    # How the model follows.

    def present(self) -> list[Client]:
        return [c for c in self.clients if c.hello is not None and not c.is_gone]

    def ask(self, client: Client, request: Any) -> Any:
        reply = self.daemon.ask(client.connection, request)
        assert reply is not None
        assert not isinstance(reply, ErrorReply), reply
        return reply

    def look(self, steps: int) -> None:
        self.daemon.step(steps)
        new = self.daemon.replies[self.num_seen :]
        self.num_seen = len(self.daemon.replies)
        for connection, reply in new:
            client = next(c for c in self.clients if c.connection == connection)
            self.on_reply(client, reply)

    def on_reply(self, client: Client, reply: Any) -> None:
        if isinstance(reply, ErrorReply):
            assert reply.code in EXPECTED, reply
        if reply.request_id == 0:
            self.on_hello(client, reply)
        elif reply.request_id == client.goodbye:
            client.goodbye = None
            assert isinstance(reply, GoodbyeReply)
            if client.has_ring and reply.is_ring_closed:
                allocation = self.daemon.allocations[client.connection]
                client.after_close = allocation.memory.tobytes()
                self.daemon.machine.free(allocation)
        else:
            self.on_fetched(client, reply)

    def on_hello(self, client: Client, reply: Any) -> None:
        if isinstance(reply, ErrorReply):
            # As an engine may: it looks for another way, and memd has nothing of the ring.
            if not client.is_gone:
                client.is_gone = True
                self.daemon.service.close_session(
                    self.daemon.sessions[client.connection], "refused"
                )
            return
        assert isinstance(reply, HelloReply)
        assert (reply.data_path == "cuda_ipc") == client.has_ring
        if client.is_gone:
            return
        client.hello = reply
        extent = self.daemon.region[reply.extent_offset :][: NUM_PAGES * LAYOUT.page_bytes]
        assert not extent.any(), "another's bytes"
        extent[:] = np.random.default_rng(reply.client_id).integers(0, 256, extent.size)
        self.daemon.rows[client.connection] = extent.reshape(-1, ROW)
        self.ask(client, Reserve(request_id=client.request_id(), num_pages=NUM_PAGES))
        everything = list(range(NUM_PAGES))
        self.ask(client, Commit(request_id=client.request_id(), page_ids=everything))
        client.sealed = set(everything)

    def on_fetched(self, client: Client, reply: Any) -> None:
        assert reply.request_id == next(iter(client.open)), "out of order"
        expected, cell = client.open.pop(reply.request_id)
        if isinstance(reply, ErrorReply):
            assert client.has_ring or client.is_gone
            return
        assert isinstance(reply, FetchReply)
        assert reply.num_rows == len(expected)
        start = cell * CELL * ROW
        if client.has_ring:
            place = self.daemon.allocations[client.connection].memory[GUARD + start :]
        else:
            assert client.hello is not None
            hello = client.hello
            place = self.daemon.region[hello.extent_offset + hello.landing_offset + start :]
        assert np.array_equal(place[: expected.size].reshape(expected.shape), expected)


TestServiceCudaMachine = ServiceCudaMachine.TestCase
