"""A client's landing ring on the device: what names it, and the ring opened in this process.

Owns one mapping, one stream and the events of copies under way. Copies into one ring are done in
the order in which they were sent, because they share a stream; rings do not wait for each other.
Nothing here waits: ``landed`` asks whether events are done.

Must not know where the bytes come from, nor who the client is.

Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import deque
from typing import TYPE_CHECKING

from memd.cuda.driver import IPC_HANDLE_BYTES, UUID_BYTES
from memd.cuda.errors import CudaError, RingRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memd.cuda.driver import Driver

__all__ = ["DeviceRing", "RingHandle"]

_ADDRESS_SPACE = 1 << 63
# PyTorch puts a version and a kind before the handle of its caching allocator's memory.
_TORCH_PREFIX_BYTES = 2
_TORCH_EXPANDABLE = b"e"
# What the driver says when it will not map one allocation, or has no room for one ring more. Any
# other error may be of the device itself.
_REFUSALS = frozenset(
    {
        "CUDA_ERROR_ALREADY_MAPPED",
        "CUDA_ERROR_INVALID_CONTEXT",
        "CUDA_ERROR_INVALID_HANDLE",
        "CUDA_ERROR_INVALID_VALUE",
        "CUDA_ERROR_MAP_FAILED",
        "CUDA_ERROR_NOT_FOUND",
        "CUDA_ERROR_NOT_PERMITTED",
        "CUDA_ERROR_NOT_SUPPORTED",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
        "CUDA_ERROR_TOO_MANY_PEERS",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingHandle:
    """What another process needs in order to write to a landing ring on the device.

    Attributes:
        handle: CUDA's IPC handle of the allocation that holds the ring, 64 bytes.
        base_offset: Where the ring begins in the allocation, in bytes.
        num_bytes: Bytes of the ring, >= 1.
        device_uuid: The device that the memory is on, 16 bytes.

    Raises:
        RingRefused: It cannot be one; the message says why.
    """

    handle: bytes
    base_offset: int
    num_bytes: int
    device_uuid: bytes

    def __post_init__(self) -> None:
        """Check what can be checked without a driver."""
        if len(self.handle) != IPC_HANDLE_BYTES:
            raise RingRefused(_refusal_of(self.handle))
        if len(self.device_uuid) != UUID_BYTES:
            raise RingRefused(
                f"a device's UUID has {UUID_BYTES} bytes, got {len(self.device_uuid)}"
            )
        if self.num_bytes < 1 or self.base_offset < 0:
            raise RingRefused(
                f"a ring has at least 1 byte and begins in its allocation, got {self.num_bytes} "
                f"bytes at {self.base_offset}"
            )
        if self.base_offset + self.num_bytes > _ADDRESS_SPACE:
            raise RingRefused("the ring leaves the address space")


class DeviceRing:
    """A ring that was opened; made, used and closed on the thread whose context is current.

    Args:
        driver: Initialised.
        handle: What to open.

    Attributes:
        num_bytes: Of the ring.

    Raises:
        RingRefused: CUDA does not take the handle, or the ring is longer than its allocation.
        CudaError: The device fails.
    """

    def __init__(self, driver: Driver, handle: RingHandle) -> None:
        self._driver = driver
        self.num_bytes = handle.num_bytes
        # Oldest first: (copy id, event).
        self._in_flight: deque[tuple[int, int]] = deque()
        self._idle_events: list[int] = []
        # The refusals inside: when undoing fails, that is the device's trouble and not the ring's.
        with contextlib.ExitStack() as stack, _refusals():
            base = driver.open_ipc(handle.handle)
            stack.callback(driver.close_ipc, base)
            _, allocation_bytes = driver.allocation_of(base)
            if handle.base_offset + handle.num_bytes > allocation_bytes:
                raise RingRefused(
                    f"a ring of {handle.num_bytes} bytes at {handle.base_offset} does not fit its "
                    f"allocation of {allocation_bytes} bytes"
                )
            self._address = base + handle.base_offset
            self._stream = driver.create_stream()
            stack.callback(driver.destroy_stream, self._stream)
            self._resources = stack.pop_all()

    @property
    def num_in_flight(self) -> int:
        """Copies that were sent and have not landed."""
        return len(self._in_flight)

    def send(self, copy_id: int, *, source: int, offset: int, num_bytes: int) -> None:
        """Begin one copy, which reads its source until ``landed`` names it.

        Args:
            copy_id: What ``landed`` is to say.
            source: Address of page-locked memory, all of it locked by one call.
            offset: Where the bytes go in the ring.
            num_bytes: How many, >= 1.

        Raises:
            CudaError: The device fails.
            ValueError: The bytes leave the ring; they were not copied.
        """
        if not 0 <= offset < offset + num_bytes <= self.num_bytes:
            raise ValueError(
                f"[{offset}, +{num_bytes}) leaves a landing ring of {self.num_bytes} bytes"
            )
        event = self._idle_events.pop() if self._idle_events else self._driver.create_event()
        self._in_flight.append((copy_id, event))
        self._driver.copy_to_device(self._address + offset, source, num_bytes, self._stream)
        self._driver.record_event(event, self._stream)

    def landed(self) -> list[int]:
        """Copies that are done and were not named before, in the order in which they were sent.

        Raises:
            CudaError: The device fails.
        """
        done = []
        while self._in_flight and self._driver.is_done(self._in_flight[0][1]):
            copy_id, event = self._in_flight.popleft()
            self._idle_events.append(event)
            done.append(copy_id)
        return done

    def close(self) -> None:
        """Unmap the ring; only when no copy is in flight.

        Raises:
            CudaError: The device fails.
        """
        assert not self._in_flight, "a ring is closed when its last copy has landed"
        while self._idle_events:
            self._driver.destroy_event(self._idle_events.pop())
        self._resources.close()


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn the errors that concern one ring alone into ``RingRefused``."""
    try:
        yield
    except CudaError as error:
        if error.name not in _REFUSALS:
            raise
        raise RingRefused(
            f"memd cannot map the landing ring ({error}): the engine and memd must share the IPC "
            f"and PID namespaces (docker: --ipc host --pid host), and its memory must be a plain "
            f"allocation, without expandable_segments; else use another data path"
        ) from error


def _refusal_of(handle: bytes) -> str:
    kind = handle[_TORCH_PREFIX_BYTES - 1 : _TORCH_PREFIX_BYTES]
    if kind == _TORCH_EXPANDABLE:
        return (
            "this is a handle of PyTorch's expandable_segments, which memd does not open: leave "
            "expandable_segments out of PYTORCH_CUDA_ALLOC_CONF (PYTORCH_ALLOC_CONF), or use "
            "another data path"
        )
    return (
        f"a CUDA IPC handle has {IPC_HANDLE_BYTES} bytes, got {len(handle)}; take it from "
        f"memd.cuda.export_ring, not from PyTorch's storage, which adds a prefix of its own"
    )
