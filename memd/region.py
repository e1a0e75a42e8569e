"""The shared memory: an anonymous, sealed, pre-faulted memfd.

It has no name anywhere, so nothing can be left behind: the kernel frees it when the daemon and the
last client that maps it are gone, however they ended. It is sealed against resizing, so that no
holder of the descriptor can truncate it under another's feet (which would be a SIGBUS there). Every
byte is allocated before the daemon says it is ready: memory that is missing is a refusal at start,
never a crash later.
"""

from __future__ import annotations

import concurrent.futures
import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from memd.config import format_bytes
from memd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

__all__ = ["HEADROOM_BYTES", "Region", "available_memory", "cgroup_headroom"]

HEADROOM_BYTES = 128 << 20
"""Memory that a new region leaves to everybody else."""

_CHUNK_BYTES = 64 << 20
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def available_memory(
    *, meminfo: Path = Path("/proc/meminfo"), cgroup_root: Path = _CGROUP_ROOT
) -> int:
    """Bytes that this process could still allocate: the host's MemAvailable or its cgroup's limit.

    Args:
        meminfo: File in the form of ``/proc/meminfo``.
        cgroup_root: Mount point of the cgroup file systems.
    """
    available = 0
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    headroom = cgroup_headroom(cgroup_root=cgroup_root)
    return available if headroom is None else min(available, headroom)


def cgroup_headroom(
    *, own: Path = Path("/proc/self/cgroup"), cgroup_root: Path = _CGROUP_ROOT
) -> int | None:
    """Bytes up to the tightest memory limit of this process's cgroups; None without a limit.

    Reads version 2 (``memory.max``) and version 1 (``memory.limit_in_bytes``), and walks up to the
    root because a limit of any ancestor binds. Files in the page cache do not count as used: a
    container that has just read a model is full of them, and the kernel drops them for us.

    Args:
        own: File in the form of ``/proc/self/cgroup``.
        cgroup_root: Mount point of the cgroup file systems.
    """
    try:
        entries = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    headrooms: list[int] = []
    for _, controllers, path in entries:
        if controllers == "":
            top, limit_name, usage_name = cgroup_root, "memory.max", "memory.current"
            cache_keys = ("active_file", "inactive_file")
        elif "memory" in controllers.split(","):
            top = cgroup_root / "memory"
            limit_name, usage_name = "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache_keys = ("total_active_file", "total_inactive_file")
        else:
            continue
        group = top / path.lstrip("/")
        for directory in (group, *group.parents):
            if not directory.is_relative_to(top):
                break
            try:
                limit = (directory / limit_name).read_text().strip()
                usage = int((directory / usage_name).read_text())
                stat = dict(
                    line.split() for line in (directory / "memory.stat").read_text().splitlines()
                )
            except OSError:
                continue
            if limit != "max":
                used = usage - sum(int(stat.get(key, 0)) for key in cache_keys)
                headrooms.append(max(0, int(limit) - used))
    return min(headrooms, default=None)


class Region:
    """Shared memory of a fixed size, owned by the daemon; a context manager.

    Args:
        num_bytes: Size; rounded down to whole memory pages.
        should_stop: Asked between chunks of the pre-fault; True ends it with ``InterruptedError``.
        progress: Called with the bytes that are ready, from several threads, one at a time.

    Attributes:
        num_bytes: Size.
        fd: The memfd, to be handed to clients.
        memory: Every byte of it, uint8 [num_bytes], writable.

    Raises:
        ConfigError: The host or the cgroup has not that much memory; the message says how much it
            has.
        InterruptedError: ``should_stop`` said so.
    """

    def __init__(
        self,
        num_bytes: int,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.num_bytes = num_bytes - num_bytes % mmap.PAGESIZE
        fits = max(0, available_memory() - HEADROOM_BYTES)
        if self.num_bytes > fits:
            raise ConfigError(
                f"a region of {format_bytes(self.num_bytes)} does not fit: this host (or its "
                f"cgroup) has room for {format_bytes(fits)}; ask for at most {fits} bytes"
            )
        self.fd = os.memfd_create("memd", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.fchmod(self.fd, 0o600)
            os.ftruncate(self.fd, self.num_bytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._mapping = mmap.mmap(self.fd, self.num_bytes)
            self.memory: npt.NDArray[np.uint8] = np.frombuffer(self._mapping, dtype=np.uint8)
            self._prefault(should_stop, progress)
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

    def _prefault(self, should_stop: Callable[[], bool], progress: Callable[[int], None]) -> None:
        """Allocate (posix_fallocate) and map (one touch a page) chunk by chunk, on several threads.

        Both steps leave the interpreter lock, and chunks keep the kernel's uninterruptible work
        short.
        """
        lock, ready = threading.Lock(), 0

        def fault(start: int) -> None:
            nonlocal ready
            if should_stop():
                raise InterruptedError("stopped while pre-faulting the region")
            length = min(_CHUNK_BYTES, self.num_bytes - start)
            try:
                os.posix_fallocate(self.fd, start, length)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                    raise
                raise ConfigError(
                    f"the kernel gave only {format_bytes(ready)} of "
                    f"{format_bytes(self.num_bytes)} of shared memory; ask for less"
                ) from error
            self.memory[start : start + length : mmap.PAGESIZE] = 0
            with lock:
                ready += length
                progress(ready)

        threads = max(1, min(16, len(os.sched_getaffinity(0))))
        with concurrent.futures.ThreadPoolExecutor(threads, "memd-prefault") as pool:
            futures = [pool.submit(fault, at) for at in range(0, self.num_bytes, _CHUNK_BYTES)]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
