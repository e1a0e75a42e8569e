"""A CUDA driver for tests: it copies real memory, when the test says so, and fails when told to.

A `FakeDriver` is one process's driver on a `FakeMachine`. Copies stay queued in their stream until
the test has them done (`FakeDriver.complete`), and read their source only then, as a device does.

What a real device would answer with an error is a `CudaError`. What it would answer with silent
damage is a *violation*: it is noted in ``FakeMachine.violations``, which a test requires to be
empty. Those are writes outside an allocation or to one that is unmapped, sources that are not
page-locked, cross registrations or change under a copy, and memory that is freed, unmapped or
unlocked while a copy or another process needs it.

It imitates what CUDA documents, not a device's speed.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import threading
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from memd.cuda.errors import CudaError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator

    from memd.cuda.fake_machine import FakeAllocation, FakeMachine

__all__ = ["Block", "FakeDriver"]

_BLOCK_WAIT_S = 30.0


@dataclasses.dataclass(eq=False)
class _Mapping:
    """An allocation that was opened in one process."""

    allocation: FakeAllocation
    count: int


@dataclasses.dataclass(eq=False)
class _Copy:
    """A copy in a stream."""

    allocation: FakeAllocation
    mapped_at: int
    offset: int
    source: int
    num_bytes: int
    # The source as it was when the copy was asked for: nobody may change it before it is done.
    expected: bytes


@dataclasses.dataclass(eq=False)
class _Marker:
    """An event's record in a stream."""

    event: int


@dataclasses.dataclass(eq=False)
class Block:
    """A driver call that hangs.

    Attributes:
        entered: Set when a thread is inside.
        released: Lets it go on; set by the test.
    """

    entered: threading.Event = dataclasses.field(default_factory=threading.Event)
    released: threading.Event = dataclasses.field(default_factory=threading.Event)

    def __call__(self) -> None:
        """Hang, in the calling thread."""
        self.entered.set()
        self.released.wait(_BLOCK_WAIT_S)


class FakeDriver:
    """One process's driver; a `Driver` with a test's view behind it.

    Args:
        machine: What it shares with other processes.

    Attributes:
        machine: As given.
        calls: Names of the calls that were made, and the thread of each.
        is_automatic: Whether copies are done as soon as an event is asked for.
        ended_by_release: What was left to a context's end instead of being closed; empty when all
            went well.
    """

    def __init__(self, machine: FakeMachine) -> None:
        self.machine = machine
        self.calls: list[tuple[str, int]] = []
        self.is_automatic = False
        self.ended_by_release: list[str] = []
        self._is_initialised = False
        self._next_handle = 1
        # References of primary contexts, by device.
        self._contexts: collections.Counter[int] = collections.Counter()
        self._mappings: dict[int, _Mapping] = {}
        self._streams: dict[int, deque[_Copy | _Marker]] = {}
        # Markers that are not done, by event.
        self._events: dict[int, int] = {}
        self._registrations: dict[int, int] = {}
        # Whose context ends a thing, by its kind and key.
        self._device_of: dict[tuple[str, int], int] = {}
        self._failures: dict[str, deque[str | None]] = collections.defaultdict(deque)
        self._once: dict[str, Callable[[], None]] = {}
        self._sticky: dict[int, str] = {}
        self._current: dict[Hashable, int | None] = {}
        self._thread: Hashable = None
        self._lock = threading.RLock()

    # What a test does to it.

    def fail(self, call: str, name: str, *, after: int = 0) -> None:
        """Have one call of this name fail, the first or the one after some that succeed."""
        self._failures[call].extend([None] * after + [name])

    def mend(self) -> None:
        """Forget failures and actions that have not come about."""
        self._failures.clear()
        self._once.clear()

    def break_device(self, name: str, *, device: int = 0) -> None:
        """Have every call fail that needs the device's context, until that is ended."""
        self._sticky[device] = name

    def during(self, call: str, action: Callable[[], None]) -> None:
        """Run something inside the next call of this name, before it takes effect."""
        self._once[call] = action

    def block(self, call: str) -> Block:
        """Have the next call of this name hang until the block is released."""
        block = Block()
        self.during(call, block)
        return block

    @contextlib.contextmanager
    def as_thread(self, key: Hashable) -> Iterator[None]:
        """Let calls count as those of another thread, for tests that run all on one."""
        before, self._thread = self._thread, key
        try:
            yield
        finally:
            self._thread = before

    def complete(self, stream: int | None = None, *, count: int | None = None) -> int:
        """Do copies in order; by default all of all streams. Returns how many were done."""
        done = 0
        with self._lock:
            for key in list(self._streams) if stream is None else [stream]:
                queue = self._streams[key]
                # A record behind the last copy takes no time.
                while queue and (done != count or isinstance(queue[0], _Marker)):
                    done += self._do(queue.popleft())
        return done

    def busy_streams(self) -> list[int]:
        """Streams with copies that are not done, oldest first."""
        with self._lock:
            return [stream for stream, queue in self._streams.items() if queue]

    def held(self) -> dict[str, int]:
        """What this process holds of each kind; a test that ends well finds zeros."""
        with self._lock:
            return {
                "contexts": self._contexts.total(),
                "mappings": sum(mapping.count for mapping in self._mappings.values()),
                "streams": len(self._streams),
                "events": len(self._events),
                "registrations": len(self._registrations),
            }

    @property
    def registered_bytes(self) -> int:
        """Host memory that is page-locked."""
        return sum(self._registrations.values())

    # What a process asks of it.

    def init(self) -> None:
        """See `Driver`."""
        self._enter("cuInit")
        self._is_initialised = True

    def device_count(self) -> int:
        """See `Driver`."""
        self._enter("cuDeviceGetCount")
        return len(self.machine.uuids)

    def device(self, ordinal: int) -> int:
        """See `Driver`."""
        self._enter("cuDeviceGet")
        self._require(ordinal in range(len(self.machine.uuids)), "cuDeviceGet", "INVALID_DEVICE")
        return ordinal

    def device_uuid(self, device: int) -> bytes:
        """See `Driver`."""
        self._enter("cuDeviceGetUuid")
        return self.machine.uuids[device]

    def can_use_host_pointers(self, device: int) -> bool:
        """See `Driver`."""
        del device
        self._enter("cuDeviceGetAttribute")
        return self.machine.one_address_space

    def retain_context(self, device: int) -> int:
        """See `Driver`."""
        self._enter("cuDevicePrimaryCtxRetain")
        with self._lock:
            self._contexts[device] += 1
        return 0xC000 + device

    def release_context(self, device: int) -> None:
        """See `Driver`."""
        self._enter("cuDevicePrimaryCtxRelease")
        with self._lock:
            held = self._contexts[device]
            self._require(held > 0, "cuDevicePrimaryCtxRelease", "INVALID_CONTEXT")
            self._contexts[device] -= 1
            if held == 1:
                self._sticky.pop(device, None)
                self._end_everything_of(device)

    def set_current(self, context: int | None) -> None:
        """See `Driver`."""
        self._enter("cuCtxSetCurrent")
        self._current[self._this_thread()] = None if context is None else context - 0xC000

    def open_ipc(self, handle: bytes) -> int:
        """See `Driver`."""
        device = self._enter_context("cuIpcOpenMemHandle")
        with self._lock:
            for address, mapping in self._mappings.items():
                if mapping.allocation.handle == handle:
                    mapping.count += 1
                    return address
            for allocation in self.machine.allocations:
                if allocation.handle == handle and allocation.is_held and allocation.has_handle:
                    allocation.num_mappings += 1
                    address = self.machine.place(allocation.memory.size)
                    self._mappings[address] = _Mapping(allocation, 1)
                    self._device_of["mapping", address] = device
                    return address
        raise CudaError("cuIpcOpenMemHandle", "CUDA_ERROR_INVALID_HANDLE")

    def close_ipc(self, address: int) -> None:
        """See `Driver`."""
        self._enter_context("cuIpcCloseMemHandle")
        with self._lock:
            mapping = self._mappings.get(address)
            self._require(mapping is not None, "cuIpcCloseMemHandle", "INVALID_VALUE")
            assert mapping is not None
            mapping.count -= 1
            if mapping.count:
                return
            if any(copy.mapped_at == address for copy in self._copies()):
                self.machine.violations.append("a ring was unmapped under a copy")
            self._unmap(address)

    def ipc_handle(self, address: int) -> bytes:
        """See `Driver`."""
        self._enter("cuIpcGetMemHandle")
        allocation = self.machine.allocation_at(address)
        is_shareable = allocation is not None and allocation.has_handle
        self._require(is_shareable, "cuIpcGetMemHandle", "INVALID_VALUE")
        assert allocation is not None
        return allocation.handle

    def is_ipc_capable(self, address: int) -> bool:
        """See `Driver`."""
        self._enter("cuPointerGetAttribute")
        allocation = self.machine.allocation_at(address)
        return allocation is not None and allocation.has_handle

    def allocation_of(self, address: int) -> tuple[int, int]:
        """See `Driver`."""
        self._enter("cuMemGetAddressRange")
        with self._lock:
            for base, mapping in self._mappings.items():
                if 0 <= address - base < mapping.allocation.memory.size:
                    return base, mapping.allocation.memory.size
        allocation = self.machine.allocation_at(address)
        self._require(allocation is not None, "cuMemGetAddressRange", "NOT_FOUND")
        assert allocation is not None
        return allocation.address, allocation.memory.size

    def create_stream(self) -> int:
        """See `Driver`."""
        device = self._enter_context("cuStreamCreate")
        with self._lock:
            stream = self._new_handle("stream", device)
            self._streams[stream] = deque()
            return stream

    def destroy_stream(self, stream: int) -> None:
        """See `Driver`."""
        self._enter_context("cuStreamDestroy")
        with self._lock:
            self._require(stream in self._streams, "cuStreamDestroy", "INVALID_HANDLE")
            if self._streams.pop(stream):
                self.machine.violations.append("a stream was destroyed under a copy")

    def copy_to_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        """See `Driver`."""
        call = "cuMemcpyHtoDAsync"
        self._enter_context(call)
        with self._lock:
            self._require(stream in self._streams, call, "INVALID_HANDLE")
            for base, mapping in self._mappings.items():
                if 0 <= target - base < mapping.allocation.memory.size:
                    break
            else:
                self.machine.violations.append("a copy went to memory that is not mapped")
                raise CudaError(call, "CUDA_ERROR_INVALID_VALUE")
            offset = target - base
            if offset + num_bytes > mapping.allocation.memory.size:
                self.machine.violations.append("a copy left its allocation")
                raise CudaError(call, "CUDA_ERROR_INVALID_VALUE")
            if not self._is_registered(source, num_bytes):
                self.machine.violations.append("a copy read memory that is not page-locked")
            expected = ctypes.string_at(source, num_bytes)
            self._streams[stream].append(
                _Copy(mapping.allocation, base, offset, source, num_bytes, expected)
            )

    def create_event(self) -> int:
        """See `Driver`."""
        device = self._enter_context("cuEventCreate")
        with self._lock:
            event = self._new_handle("event", device)
            self._events[event] = 0
            return event

    def record_event(self, event: int, stream: int) -> None:
        """See `Driver`."""
        self._enter_context("cuEventRecord")
        with self._lock:
            self._require(
                event in self._events and stream in self._streams,
                "cuEventRecord",
                "INVALID_HANDLE",
            )
            self._events[event] += 1
            self._streams[stream].append(_Marker(event))

    def is_done(self, event: int) -> bool:
        """See `Driver`."""
        self._enter_context("cuEventQuery")
        if self.is_automatic:
            self.complete()
        with self._lock:
            self._require(event in self._events, "cuEventQuery", "INVALID_HANDLE")
            return self._events[event] == 0

    def destroy_event(self, event: int) -> None:
        """See `Driver`."""
        self._enter_context("cuEventDestroy")
        with self._lock:
            self._require(event in self._events, "cuEventDestroy", "INVALID_HANDLE")
            del self._events[event]

    def register_host(self, address: int, num_bytes: int) -> None:
        """See `Driver`."""
        call = "cuMemHostRegister"
        device = self._enter_context(call)
        with self._lock:
            self._require(num_bytes > 0, call, "INVALID_VALUE")
            overlaps = any(
                address < start + length and start < address + num_bytes
                for start, length in self._registrations.items()
            )
            self._require(not overlaps, call, "HOST_MEMORY_ALREADY_REGISTERED")
            self._registrations[address] = num_bytes
            self._device_of["registration", address] = device

    def unregister_host(self, address: int) -> None:
        """See `Driver`."""
        call = "cuMemHostUnregister"
        self._enter_context(call)
        with self._lock:
            self._require(address in self._registrations, call, "HOST_MEMORY_NOT_REGISTERED")
            num_bytes = self._registrations.pop(address)
            if any(address <= copy.source < address + num_bytes for copy in self._copies()):
                self.machine.violations.append("memory was unlocked under a copy")

    def device_pointer(self, address: int) -> int:
        """See `Driver`."""
        self._enter_context("cuMemHostGetDevicePointer")
        is_known = address in self._registrations
        self._require(is_known, "cuMemHostGetDevicePointer", "INVALID_VALUE")
        # Somewhere else, and not in one piece with its neighbours.
        return address if self.machine.one_address_space else self.machine.place(1)

    def _enter(self, call: str) -> None:
        self.calls.append((call, threading.get_ident()))
        action = self._once.pop(call, None)
        if action is not None:
            action()
        failure = self._failures[call].popleft() if self._failures[call] else None
        if failure is not None:
            raise CudaError(call, failure)
        self._require(self._is_initialised or call == "cuInit", call, "NOT_INITIALIZED")

    def _enter_context(self, call: str) -> int:
        """Enter a call that needs a current context; its device."""
        self._enter(call)
        device = self._current.get(self._this_thread())
        is_there = device is not None and self._contexts[device] > 0
        self._require(is_there, call, "INVALID_CONTEXT")
        assert device is not None
        if device in self._sticky:
            raise CudaError(call, self._sticky[device])
        return device

    def _require(self, holds: bool, call: str, name: str) -> None:
        if not holds:
            raise CudaError(call, f"CUDA_ERROR_{name}")

    def _this_thread(self) -> Hashable:
        return threading.get_ident() if self._thread is None else self._thread

    def _new_handle(self, kind: str, device: int) -> int:
        handle = self._next_handle
        self._next_handle += 1
        self._device_of[kind, handle] = device
        return handle

    def _copies(self) -> Iterator[_Copy]:
        for queue in self._streams.values():
            for operation in queue:
                if isinstance(operation, _Copy):
                    yield operation

    def _is_registered(self, address: int, num_bytes: int) -> bool:
        return any(
            start <= address and address + num_bytes <= start + length
            for start, length in self._registrations.items()
        )

    def _do(self, operation: _Copy | _Marker) -> int:
        """Let the device do one thing; 1 for a copy."""
        if isinstance(operation, _Marker):
            if operation.event in self._events:
                self._events[operation.event] -= 1
            return 0
        violations = self.machine.violations
        if operation.mapped_at not in self._mappings:
            violations.append("a copy arrived in a ring that is unmapped")
        if not self._is_registered(operation.source, operation.num_bytes):
            violations.append("a copy read memory that is not page-locked any more")
            return 1
        found = ctypes.string_at(operation.source, operation.num_bytes)
        if found != operation.expected:
            violations.append("staging memory was written under a copy")
        target = operation.allocation.memory[operation.offset :][: operation.num_bytes]
        target[:] = np.frombuffer(found, dtype=np.uint8)
        return 1

    def _unmap(self, address: int) -> None:
        self._mappings.pop(address).allocation.num_mappings -= 1

    def _end_everything_of(self, device: int) -> None:
        """What the end of a primary context does: copies stop, all that it held is gone."""
        for kind, table in (
            ("stream", self._streams),
            ("event", self._events),
            ("registration", self._registrations),
            ("mapping", self._mappings),
        ):
            for key in [key for key in table if self._device_of[kind, key] == device]:
                self.ended_by_release.append(kind)
                if kind == "mapping":
                    self._unmap(key)
                else:
                    table.pop(key)
