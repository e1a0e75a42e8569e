"""Page-locks a mapping that is there already, so that a device can copy from it by itself.

For the process that issues the copies, and only for that one: a registration belongs to a process.
An engine that copies rows itself locks its mapping of memd's region, memd that copies into an
engine's ring locks its own staging memory.

It is done in chunks. The driver holds its locks while it pins, so one call for a large pool stops
every other CUDA call of the process for as long, and a kill in the middle of a long unpin has left
processes that could not be ended. A copy must not cross from one chunk into the next: to the driver
those are two allocations.

Memory that is not page-locked is copied through a hidden buffer, slowly and while the caller waits.
So a chunk that cannot be locked is an error and never a warning.

Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import mmap
import time
from typing import TYPE_CHECKING

from memd.cuda.errors import CudaError
from memd.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from memd.cuda.driver import Driver

__all__ = ["CHUNK_BYTES", "PageLock"]

CHUNK_BYTES = 256 << 20
"""Locked by one call; some 30 ms at the 8 GiB/s of a server."""


class PageLock:
    """A page-locked mapping; a context manager. The caller's context must be current throughout.

    Args:
        driver: Initialised.
        memory: The mapping, uint8 [num_bytes], beginning at a memory page; kept alive by this.
        device: Device of the current context.
        chunk_bytes: Bytes to lock at a time, a multiple of the memory page.
        progress: Called with the bytes that are locked and all bytes after each chunk. What it
            raises ends the locking, undoes it, and comes out here.

    Attributes:
        num_bytes: Bytes that are page-locked, 0 once closed.
        seconds: Time that locking them took.

    Raises:
        CudaError: A chunk could not be locked; none is any more.
        ValueError: There is nothing to lock, or the numbers are not whole memory pages.
    """

    def __init__(
        self,
        driver: Driver,
        memory: npt.NDArray[np.uint8],
        *,
        device: int,
        chunk_bytes: int = CHUNK_BYTES,
        progress: Callable[[int, int], None] = lambda num_locked, num_bytes: None,
    ) -> None:
        if memory.size == 0:
            raise ValueError("there is nothing to page-lock: the mapping has 0 bytes")
        if chunk_bytes < 1 or chunk_bytes % mmap.PAGESIZE:
            raise ValueError(
                f"chunk_bytes must be a multiple of {mmap.PAGESIZE}, at least once, got "
                f"{chunk_bytes}"
            )
        self._memory = memory
        self._address = int(memory.ctypes.data)
        if self._address % mmap.PAGESIZE:
            raise ValueError("a mapping is page-locked from the start of a memory page on")
        self._chunk_bytes = chunk_bytes
        # Where the device sees each chunk.
        self._device_addresses: list[int] = []
        begin = time.monotonic()
        with contextlib.ExitStack() as stack:
            has_one_address_space = driver.can_use_host_pointers(device)
            for start in range(0, memory.size, chunk_bytes):
                length = min(chunk_bytes, memory.size - start)
                address = self._address + start
                try:
                    driver.register_host(address, length)
                except CudaError as error:
                    raise CudaError(
                        error.call,
                        error.name,
                        f"{format_bytes(start)} of {format_bytes(memory.size)} were page-locked "
                        f"before, and none is now; ask for less, or raise the limits on locked "
                        f"memory",
                    ) from error
                stack.callback(driver.unregister_host, address)
                self._device_addresses.append(
                    address if has_one_address_space else driver.device_pointer(address)
                )
                progress(start + length, memory.size)
            self._chunks = stack.pop_all()
        self.num_bytes = memory.size
        self.seconds = time.monotonic() - begin

    def __enter__(self) -> PageLock:
        """The page-locked mapping."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close it."""
        self.close()

    def device_address(self, offset: int, num_bytes: int) -> int:
        """Where the device sees ``num_bytes`` from ``offset`` on; for kernels, not for copies.

        On most hosts that is the address itself. Where it is not, each chunk has its own place.

        Raises:
            ValueError: The bytes are not in the mapping, or not in one run for the device.
        """
        if not 0 <= offset < offset + num_bytes <= self.num_bytes:
            raise ValueError(
                f"[{offset}, +{num_bytes}) is not within the {self.num_bytes} page-locked bytes"
            )
        first, last = offset // self._chunk_bytes, (offset + num_bytes - 1) // self._chunk_bytes
        base = self._device_addresses[first]
        for chunk in range(first + 1, last + 1):
            if self._device_addresses[chunk] != base + (chunk - first) * self._chunk_bytes:
                raise ValueError(
                    f"[{offset}, +{num_bytes}) is not one run for the device, because it crosses "
                    f"from one chunk of {self._chunk_bytes} bytes into the next; lock it in "
                    f"larger chunks"
                )
        return base + offset - first * self._chunk_bytes

    def close(self) -> None:
        """Unlock, last chunk first, all of them whatever fails; idempotent.

        Raises:
            CudaError: A chunk could not be unlocked.
        """
        self.num_bytes = 0
        self._chunks.close()
