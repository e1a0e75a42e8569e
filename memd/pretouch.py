"""Has the kernel give every page of a mapping now, on several threads, instead of at first use.

Each slice is one ``madvise(MADV_POPULATE_WRITE)`` (Linux 5.14), which allocates, zeroes and maps it
inside the kernel; where that is not known, the slice is allocated by ``posix_fallocate`` and mapped
by writing a byte to each page. Either way the interpreter lock is free meanwhile, slices keep the
kernel's uninterruptible work short, and memory that is missing is an error here and not a SIGBUS
later. Huge pages are left to the administrator: compacting memory for them is what makes the
pre-touch of a large pool take minutes.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import dataclasses
import errno
import mmap
import os
import queue
import threading
import time
from typing import TYPE_CHECKING, Literal

from memd.errors import ConfigError
from memd.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import numpy.typing as npt

    from memd.numa import Node

__all__ = ["SLICE_BYTES", "Pretouched", "can_populate", "pretouch"]

SLICE_BYTES = 4 << 20
"""Touched at a time; also what follows on one node before the next one's turn."""

_MAX_THREADS = 32
_MADV_POPULATE_WRITE = 23
# EFAULT is a fault that would have been SIGBUS, 133 (EHWPOISON) a page with a memory error.
_NO_MEMORY = frozenset({errno.ENOMEM, errno.ENOSPC, errno.EFAULT, 133})

# mmap.madvise would keep the interpreter lock.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


@dataclasses.dataclass(frozen=True)
class Pretouched:
    """How a pre-touch went.

    Attributes:
        num_bytes: Bytes touched.
        seconds: Time it took.
        num_threads: Threads that did it.
        method: The kernel's populate, or touching page by page.
    """

    num_bytes: int
    seconds: float
    num_threads: int
    method: Literal["populate", "touch"]

    @property
    def gib_per_s(self) -> float:
        """Speed in GiB/s."""
        return self.num_bytes / (1 << 30) / max(self.seconds, 1e-9)


def can_populate() -> bool:
    """Whether the kernel knows ``MADV_POPULATE_WRITE``."""
    # No bytes, so the kernel only looks at the advice.
    return int(_libc.madvise(None, 0, _MADV_POPULATE_WRITE)) == 0


def pretouch(
    memory: npt.NDArray[np.uint8],
    fd: int,
    *,
    nodes: Sequence[Node] = (),
    should_stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda num_ready, num_bytes: None,
    populate: bool | None = None,
) -> Pretouched:
    """Touch all of a shared mapping.

    Args:
        memory: The mapping, uint8 [num_bytes], writable; zeroes where it was not touched before.
        fd: File behind it.
        nodes: Slices go to these in turn; empty: wherever the threads happen to run.
        should_stop: Asked between slices; True ends it with ``InterruptedError``.
        progress: Called with the bytes that are ready and all bytes, from several threads, one at a
            time.
        populate: Whether to use ``MADV_POPULATE_WRITE``; by default if the kernel has it.

    Raises:
        ConfigError: The kernel had less memory than it said; the message says how much it gave.
        InterruptedError: ``should_stop`` said so.
    """
    populate = can_populate() if populate is None else populate
    touch = _Populate(memory) if populate else _Touch(memory, fd)
    shares: list[queue.SimpleQueue[int]] = [queue.SimpleQueue() for _ in nodes or (None,)]
    for index, start in enumerate(range(0, memory.size, SLICE_BYTES)):
        shares[index % len(shares)].put(start)
    lock, num_ready, is_over = threading.Lock(), 0, threading.Event()

    def work(share: queue.SimpleQueue[int], node: Node | None) -> None:
        nonlocal num_ready
        if node is not None:
            # Of this thread alone, which ends with the pre-touch.
            os.sched_setaffinity(0, node.cpus)
        try:
            while not is_over.is_set():
                if should_stop():
                    raise InterruptedError("stopped while the region was pre-touched")
                start = share.get_nowait()
                length = min(SLICE_BYTES, memory.size - start)
                touch(start, length)
                with lock:
                    num_ready += length
                    progress(num_ready, memory.size)
        except queue.Empty:
            return
        except BaseException:
            is_over.set()
            raise

    workers = _workers(shares, nodes)
    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(len(workers), "memd-pretouch") as pool:
        futures = [pool.submit(work, share, node) for share, node in workers]
    try:
        for future in futures:
            future.result()
    except OSError as error:
        if error.errno not in _NO_MEMORY:
            raise
        raise ConfigError(
            f"the kernel gave only {format_bytes(num_ready)} of {format_bytes(memory.size)} of "
            f"shared memory, less than it said it had; ask for less"
        ) from error
    return Pretouched(
        num_bytes=memory.size,
        seconds=time.monotonic() - begin,
        num_threads=len(workers),
        method="populate" if populate else "touch",
    )


def _workers(
    shares: Sequence[queue.SimpleQueue[int]], nodes: Sequence[Node]
) -> list[tuple[queue.SimpleQueue[int], Node | None]]:
    """A share and its node for each thread; no more threads than processors or slices."""
    if not nodes:
        num_threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)), shares[0].qsize())
        return [(shares[0], None)] * max(1, num_threads)
    most = max(1, _MAX_THREADS // len(nodes))
    return [
        (share, node)
        for share, node in zip(shares, nodes, strict=True)
        for _ in range(max(1, min(most, len(node.cpus), share.qsize())))
    ]


class _Populate:
    """Touches a slice by one call into the kernel."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self._address = memory.ctypes.data

    def __call__(self, start: int, length: int) -> None:
        while _libc.madvise(self._address + start, length, _MADV_POPULATE_WRITE) != 0:
            number = ctypes.get_errno()
            if number not in (errno.EINTR, errno.EAGAIN):
                raise OSError(number, os.strerror(number))


class _Touch:
    """Touches a slice page by page."""

    def __init__(self, memory: npt.NDArray[np.uint8], fd: int) -> None:
        self._memory = memory
        self._fd = fd

    def __call__(self, start: int, length: int) -> None:
        # First: a write to a page that cannot be had would be a SIGBUS.
        os.posix_fallocate(self._fd, start, length)
        self._memory[start : start + length : mmap.PAGESIZE] = 0
