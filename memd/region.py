"""The shared memory: an anonymous, sealed, pre-touched memfd.

It has no name anywhere, so nothing can be left behind: the kernel frees it when the daemon and the
last client that maps it are gone, however they ended. It is sealed against resizing, so that no
holder of the descriptor can truncate it under another's feet (which would be a SIGBUS there). Every
byte is allocated before the daemon says it is ready: memory that is missing is a refusal at start,
never a crash later. Above a disk tier it has more addresses than memory and begins without any;
there memory is put behind a page before anybody is told to write it (``memd.tiers``).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from typing import TYPE_CHECKING

import numpy as np

from memd import limits, numa
from memd.errors import ConfigError
from memd.pretouch import pretouch
from memd.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from memd.pretouch import Pretouched

__all__ = ["HEADROOM_BYTES", "Region", "largest_lockable_region", "largest_region"]

HEADROOM_BYTES = 128 << 20
"""Memory that a new region leaves to everybody else."""

_MFD_NOEXEC_SEAL = 8
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
# Locked at a time: some 30 ms in which no signal is handled.
_LOCK_BYTES = 1 << 30

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mlock.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.mlock.restype = ctypes.c_int


def largest_region() -> limits.Room:
    """The largest region that fits now, and by which number."""
    room = limits.memory_room()
    return limits.Room(max(0, room.num_bytes - HEADROOM_BYTES), room.source)


def largest_lockable_region() -> int | None:
    """The largest region that may be locked into memory, in bytes; None without a limit."""
    allowed = limits.lockable_bytes()
    return None if allowed is None else allowed - allowed % mmap.PAGESIZE


class Region:
    """Shared memory of a fixed size, owned by the daemon; a context manager.

    Args:
        num_bytes: Its memory; rounded down to whole memory pages.
        address_bytes: Its size, if it is to have more addresses than memory: then it begins without
            any, and whoever uses it has to see that it takes no more than ``num_bytes``.
        nodes: NUMA nodes that it is spread over; empty: where the kernel likes.
        lock: Whether it must never be swapped out.
        should_stop: Asked between slices of the pre-touch; True ends it with ``InterruptedError``.
        progress: Called with the bytes that are ready and all bytes, from several threads, one at a
            time.

    Attributes:
        num_bytes: Size, in addresses.
        memory_bytes: How much of it may have memory.
        fd: The memfd, to be handed to clients.
        memory: Every byte of it, uint8 [num_bytes], writable.
        pretouched: How fast it was made; None if it began without memory.

    Raises:
        ConfigError: The host, the cgroup or the limit of locked memory has not that much; the
            message says how much would fit.
        InterruptedError: ``should_stop`` said so.
    """

    def __init__(
        self,
        num_bytes: int,
        *,
        address_bytes: int | None = None,
        nodes: Sequence[numa.Node] = (),
        lock: bool = False,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda num_ready, num_bytes: None,
    ) -> None:
        self.memory_bytes = num_bytes - num_bytes % mmap.PAGESIZE
        self.num_bytes = self.memory_bytes
        if address_bytes is not None:
            self.num_bytes = address_bytes - address_bytes % mmap.PAGESIZE
        self._require_room(lock)
        self.fd = _memfd()
        try:
            os.fchmod(self.fd, 0o600)
            os.ftruncate(self.fd, self.num_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = mmap.mmap(self.fd, self.num_bytes)
            self.memory: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, dtype=np.uint8)
            self.pretouched: Pretouched | None = None
            if address_bytes is None:
                self.pretouched = pretouch(
                    self.memory, self.fd, nodes=nodes, should_stop=should_stop, progress=progress
                )
            if lock:
                self._lock(should_stop)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> Region:
        """The region."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the region."""
        self.close()

    def close(self) -> None:
        """Let go of the memory; clients that map it keep it until they unmap."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            # The mapping goes with the last array that points into it.
            self.memory = np.empty(0, dtype=np.uint8)
            del self._mapping

    def placement(self) -> dict[int, int]:
        """Bytes by NUMA node, empty where the kernel does not say; walks every page."""
        return numa.placement(self.memory.ctypes.data, self.num_bytes)

    def _require_room(self, lock: bool) -> None:
        wanted = self.memory_bytes
        largest = largest_region()
        if wanted > largest.num_bytes:
            raise ConfigError(
                f"a region of {format_bytes(wanted)} does not fit: {largest.source} leaves "
                f"room for {format_bytes(largest.num_bytes)}; ask for at most "
                f"--bytes {largest.num_bytes}"
            )
        lockable = largest_lockable_region()
        if lock and lockable is not None and wanted > lockable:
            raise ConfigError(
                f"--lock: RLIMIT_MEMLOCK lets this process lock {format_bytes(lockable)}, the "
                f"region needs {wanted} bytes; raise it (systemd: "
                f"LimitMEMLOCK={wanted}, Docker: --ulimit memlock={wanted}, shell: "
                f"ulimit -l {-(-wanted // 1024)}), ask for at most --bytes {lockable}, or "
                f"leave --lock out"
            )

    def _lock(self, should_stop: Callable[[], bool]) -> None:
        limits.raise_memlock_limit()
        for start in range(0, self.num_bytes, _LOCK_BYTES):
            if should_stop():
                raise InterruptedError("stopped while the region was locked")
            length = min(_LOCK_BYTES, self.num_bytes - start)
            if _libc.mlock(self.memory.ctypes.data + start, length) != 0:
                reason = os.strerror(ctypes.get_errno())
                raise ConfigError(
                    f"--lock: the kernel locked {format_bytes(start)} of "
                    f"{format_bytes(self.num_bytes)} ({reason}); raise RLIMIT_MEMLOCK to "
                    f"{self.num_bytes} (rootless containers: on the host), or leave --lock out"
                )


def _memfd() -> int:
    """An empty memfd that can be sealed, and that nobody can run as a program.

    Hosts with ``vm.memfd_noexec=2`` refuse all others; kernels before 6.3 do not know the flag.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create("memd", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create("memd", flags)
