from __future__ import annotations

import fcntl
import mmap
import os
import stat
from typing import TYPE_CHECKING

import numpy as np
import pytest

import memd.region
from memd.errors import ConfigError
from memd.region import HEADROOM_BYTES, Region, available_memory, cgroup_headroom

if TYPE_CHECKING:
    from pathlib import Path

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


def test_progress_ends_with_everything() -> None:
    seen: list[int] = []
    with Region(SIZE, progress=seen.append) as region:
        assert seen == sorted(seen)
        assert seen[-1] == region.num_bytes
        assert len(seen) == 3


def test_the_start_can_be_interrupted() -> None:
    with pytest.raises(InterruptedError):
        Region(SIZE, should_stop=lambda: True)


def test_a_region_that_does_not_fit_is_refused_with_the_size_that_would(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(memd.region, "available_memory", lambda: HEADROOM_BYTES + 12345)
    with pytest.raises(ConfigError, match="at most 12345 bytes"):
        Region(1 << 20)


def test_memory_that_ends_while_it_is_allocated_is_a_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match="gave only 0 B of 1 MiB"):
        Region(1 << 20)


def test_the_hosts_memory_is_read(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:   64 kB\n")
    found = available_memory(meminfo=tmp_path / "meminfo", cgroup_root=tmp_path / "none")
    assert found == 64 << 10


def cgroup(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text + "\n" if text else "")


def test_the_tightest_limit_of_all_ancestors_binds_in_version_2(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/a/b\n")
    cgroup(tmp_path / "fs" / "a", memory__max="1000", memory__current="400", memory__stat="x 1")
    cgroup(tmp_path / "fs" / "a" / "b", memory__max="max", memory__current="10", memory__stat="")
    headroom = cgroup_headroom(own=tmp_path / "own", cgroup_root=tmp_path / "fs")
    assert headroom == 600


def test_the_memory_controller_is_found_in_version_1(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("9:name=systemd:/x\n4:memory:/a\n0::/\n")
    group = tmp_path / "fs" / "memory" / "a"
    cgroup(
        group, memory__limit_in_bytes="500", memory__usage_in_bytes="600", memory__stat="cache 9"
    )
    assert cgroup_headroom(own=tmp_path / "own", cgroup_root=tmp_path / "fs") == 0


def test_cached_files_do_not_count_as_used(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/a\n")
    cgroup(
        tmp_path / "fs" / "a",
        memory__max="1000",
        memory__current="900",
        memory__stat="anon 200\ninactive_file 300\nactive_file 400",
    )
    headroom = cgroup_headroom(own=tmp_path / "own", cgroup_root=tmp_path / "fs")
    assert headroom == 800


def test_no_limit_is_none(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    assert cgroup_headroom(own=tmp_path / "own", cgroup_root=tmp_path / "fs") is None
    assert cgroup_headroom(own=tmp_path / "missing") is None


def test_this_hosts_memory_is_some() -> None:
    assert available_memory() > 1 << 20
