from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import pytest

from memd.limits import Room, cgroup_room, lockable_bytes, memory_room, swap_bytes

if TYPE_CHECKING:
    from pathlib import Path


def meminfo(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "meminfo"
    file.write_text(text)
    return file


def cgroup(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text + "\n" if text else "")


def test_the_hosts_memory_is_read(tmp_path: Path) -> None:
    file = meminfo(tmp_path, "MemTotal: 100 kB\nMemAvailable:   64 kB\nHugePages_Total: 0\n")
    room = memory_room(meminfo=file, cgroup_root=tmp_path / "none")
    assert room == Room(64 << 10, "MemAvailable of this host")


def test_a_tighter_cgroup_binds_and_is_named(tmp_path: Path) -> None:
    file = meminfo(tmp_path, "MemAvailable: 64 kB\n")
    (tmp_path / "own").write_text("0::/a\n")
    cgroup(tmp_path / "fs" / "a", memory__max="5000", memory__current="1000", memory__stat="")
    room = memory_room(meminfo=file, own=tmp_path / "own", cgroup_root=tmp_path / "fs")
    assert room == Room(4000, str(tmp_path / "fs" / "a" / "memory.max"))


def test_the_tightest_limit_of_all_ancestors_binds_in_version_2(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/a/b\n")
    cgroup(tmp_path / "fs" / "a", memory__max="1000", memory__current="400", memory__stat="x 1")
    cgroup(tmp_path / "fs" / "a" / "b", memory__max="max", memory__current="10", memory__stat="")
    room = cgroup_room(own=tmp_path / "own", cgroup_root=tmp_path / "fs")
    assert room is not None
    assert room.num_bytes == 600


def test_the_memory_controller_is_found_in_version_1(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("9:name=systemd:/x\n4:memory:/a\n0::/\n")
    group = tmp_path / "fs" / "memory" / "a"
    cgroup(
        group, memory__limit_in_bytes="500", memory__usage_in_bytes="600", memory__stat="cache 9"
    )
    room = cgroup_room(own=tmp_path / "own", cgroup_root=tmp_path / "fs")
    assert room == Room(0, str(group / "memory.limit_in_bytes"))


def test_cached_files_do_not_count_as_used(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/a\n")
    cgroup(
        tmp_path / "fs" / "a",
        memory__max="1000",
        memory__current="900",
        memory__stat="anon 200\ninactive_file 300\nactive_file 400",
    )
    room = cgroup_room(own=tmp_path / "own", cgroup_root=tmp_path / "fs")
    assert room is not None
    assert room.num_bytes == 800


def test_no_limit_is_none(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/\n")
    assert cgroup_room(own=tmp_path / "own", cgroup_root=tmp_path / "fs") is None
    assert cgroup_room(own=tmp_path / "missing") is None


def test_this_hosts_memory_is_some() -> None:
    assert memory_room().num_bytes > 1 << 20


def test_swap_is_read(tmp_path: Path) -> None:
    assert swap_bytes(meminfo=meminfo(tmp_path, "SwapTotal:  8 kB\n")) == 8 << 10
    assert swap_bytes(meminfo=meminfo(tmp_path, "MemTotal:  8 kB\n")) == 0


@pytest.mark.parametrize(
    ("capabilities", "hard", "lockable"),
    [
        ("0000000000000000", 64 << 10, (64 << 10) - (4 << 10)),
        ("0000000000000000", 1 << 10, 0),
        ("0000000000000000", resource.RLIM_INFINITY, None),
        ("0000000000004000", 64 << 10, None),
    ],
)
def test_what_may_be_locked_depends_on_limit_and_capability(
    capabilities: str,
    hard: int,
    lockable: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 10, hard))
    status = tmp_path / "status"
    status.write_text(f"Name:\tmemd\nVmLck:\t       4 kB\nCapEff:\t{capabilities}\n")
    assert lockable_bytes(status=status) == lockable
