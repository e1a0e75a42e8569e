from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import stat

import numpy as np
import pytest

import memd.region
from memd import limits
from memd.errors import ConfigError
from memd.limits import Room
from memd.region import HEADROOM_BYTES, Region

SIZE = (130 << 20) + 5


def test_a_region_is_zero_writable_and_whole_pages() -> None:
    with Region(SIZE) as region:
        assert region.num_bytes == 130 << 20
        assert region.memory.shape == (130 << 20,)
        assert not region.memory[:: 1 << 20].any()
        region.memory[-1] = 7
        assert os.pread(region.fd, 1, region.num_bytes - 1) == b"\7"


def test_every_byte_is_allocated_before_the_region_is_ready() -> None:
    with Region(1 << 20) as region:
        assert os.fstat(region.fd).st_blocks * 512 >= region.num_bytes


def test_nobody_else_can_open_or_resize_it() -> None:
    with Region(1 << 20) as region:
        assert stat.S_IMODE(os.fstat(region.fd).st_mode) == 0o600
        seals = fcntl.fcntl(region.fd, fcntl.F_GET_SEALS)
        assert seals & fcntl.F_SEAL_SHRINK
        assert seals & fcntl.F_SEAL_SEAL
        with pytest.raises(PermissionError):
            os.ftruncate(region.fd, 4096)


def test_the_memory_outlives_the_region_where_it_is_mapped() -> None:
    region = Region(1 << 20)
    fd = os.dup(region.fd)
    region.memory[:5] = np.frombuffer(b"bytes", dtype=np.uint8)
    region.close()
    region.close()
    with mmap.mmap(fd, 1 << 20) as mapping:
        assert mapping[:5] == b"bytes"
    os.close(fd)


def test_how_it_was_made_is_told() -> None:
    with Region(SIZE) as region:
        assert region.pretouched.num_bytes == region.num_bytes
        placed = region.placement()
        assert not placed or sum(placed.values()) == region.num_bytes


def test_progress_ends_with_everything() -> None:
    seen: list[tuple[int, int]] = []
    with Region(SIZE, progress=lambda ready, total: seen.append((ready, total))) as region:
        assert seen[-1] == (region.num_bytes, region.num_bytes)


def test_the_start_can_be_interrupted() -> None:
    with pytest.raises(InterruptedError):
        Region(SIZE, should_stop=lambda: True)


def test_a_region_that_does_not_fit_is_refused_with_the_size_that_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = Room(HEADROOM_BYTES + 12345, "/sys/fs/cgroup/a/memory.max")
    monkeypatch.setattr(limits, "memory_room", lambda: room)
    with pytest.raises(ConfigError, match=r"a/memory.max leaves .* at most --bytes 12345"):
        Region(1 << 20)


def test_locking_more_than_allowed_is_refused_with_the_limit_that_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "lockable_bytes", lambda: (64 << 10) + 5)
    with pytest.raises(ConfigError, match=r"LimitMEMLOCK=1048576,.* at most --bytes 65536"):
        Region(1 << 20, lock=True)
    Region(1 << 20).close()


def test_a_kernel_that_does_not_lock_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        def mlock(self, address: int, length: int) -> int:
            del address, length
            return -1

    monkeypatch.setattr(limits, "lockable_bytes", lambda: None)
    monkeypatch.setattr(limits, "raise_memlock_limit", lambda: None)
    monkeypatch.setattr(memd.region, "_libc", Kernel())
    with pytest.raises(ConfigError, match=r"--lock: the kernel locked 0 B of 1 MiB"):
        Region(1 << 20, lock=True)


@pytest.mark.skipif(
    (limits.lockable_bytes() or 1 << 20) < 1 << 20, reason="this user may not lock a MiB"
)
def test_a_locked_region_is_counted_as_locked_by_the_kernel() -> None:
    def locked_kib() -> int:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmLck:"))

    before = locked_kib()
    with Region(1 << 20, lock=True):
        assert locked_kib() - before == 1024


def test_a_kernel_that_does_not_know_the_seal_against_execution_makes_a_region(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    create = os.memfd_create

    def old_create(name: str, flags: int) -> int:
        if flags & ~(os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING):
            raise OSError(errno.EINVAL, "unknown flag")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", old_create)
    Region(1 << 20).close()


@pytest.mark.parametrize("lock", [False, True])
def test_a_region_that_cannot_be_made_leaves_no_descriptor(
    lock: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def num_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    gc.collect()
    before = num_fds()
    stop_at = [False, True] if lock else [True]
    with pytest.raises(InterruptedError):
        Region(1 << 20, lock=lock, should_stop=lambda: stop_at.pop(0) if stop_at else True)
    # The exception's traceback holds on to the mapping, and the mapping to a descriptor.
    gc.collect()
    assert num_fds() == before
