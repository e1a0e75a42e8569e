from __future__ import annotations

import errno
import fcntl
import gc
import mmap
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from memd.tiers.holes import allocated_bytes, fill_hole, punch_hole

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 1 << 20
SIZE = 16 * MIB


@pytest.fixture
def memfd() -> Iterator[int]:
    """A sealed memfd, as regions are."""
    fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    yield fd
    os.close(fd)


def shared_rss_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssShmem:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def test_memory_goes_back_reads_as_zeros_and_can_be_written_again(memfd: int) -> None:
    with mmap.mmap(memfd, SIZE) as memory:
        memory[:] = b"\1" * SIZE
        gc.collect()  # no other test's mapping may go meanwhile
        full_rss = shared_rss_bytes()
        assert allocated_bytes(memfd) == SIZE

        punch_hole(memfd, 4 * MIB, 8 * MIB)

        assert allocated_bytes(memfd) == 8 * MIB
        # Some kernels count a few pages of each processor later.
        assert full_rss - shared_rss_bytes() == pytest.approx(8 * MIB, abs=MIB)
        assert memory[4 * MIB - 1] == 1
        assert memory[12 * MIB] == 1
        assert memory[4 * MIB : 12 * MIB] == bytes(8 * MIB)
        memory[5 * MIB] = 2
        assert os.pread(memfd, 1, 5 * MIB) == b"\2"


def test_another_mapping_sees_the_hole_at_once(memfd: int) -> None:
    with mmap.mmap(memfd, SIZE) as ours, mmap.mmap(memfd, SIZE) as theirs:
        ours[:MIB] = b"\1" * MIB
        assert theirs[0] == 1
        punch_hole(memfd, 0, MIB)
        assert theirs[:MIB] == bytes(MIB)
        theirs[0] = 3
        assert ours[0] == 3


def test_filling_takes_memory_and_keeps_what_is_there(memfd: int) -> None:
    os.pwrite(memfd, b"kept", 2 * MIB)
    assert fill_hole(memfd, MIB, 2 * MIB)
    assert allocated_bytes(memfd) == 2 * MIB
    assert os.pread(memfd, 4, 2 * MIB) == b"kept"


def test_neighbours_in_the_same_memory_page_keep_their_bytes(memfd: int) -> None:
    os.pwrite(memfd, b"\1" * 8192, 0)
    punch_hole(memfd, 100, 4096)
    assert os.pread(memfd, 8192, 0) == b"\1" * 100 + bytes(4096) + b"\1" * 3996
    assert allocated_bytes(memfd) == 8192


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (-4096, 4096), (0, -1)])
def test_a_range_that_is_none_is_an_error(memfd: int, offset: int, length: int) -> None:
    with pytest.raises(OSError) as caught:
        punch_hole(memfd, offset, length)
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(OSError):
        fill_hole(memfd, offset, length)


def test_memory_that_is_not_there_is_a_value(memfd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "posix_fallocate", no_memory)
    assert not fill_hole(memfd, 0, 4096)
