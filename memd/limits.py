"""How much memory this process may take: what host and cgroups have left, and what may be locked.

Readings only. Nothing here allocates, and nothing here knows what the memory is for.
"""

from __future__ import annotations

import dataclasses
import resource
from pathlib import Path

__all__ = [
    "Room",
    "cgroup_room",
    "lockable_bytes",
    "memory_room",
    "raise_descriptor_limit",
    "raise_memlock_limit",
    "swap_bytes",
]

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_CAP_IPC_LOCK = 14


@dataclasses.dataclass(frozen=True)
class Room:
    """Memory that could still be allocated.

    Attributes:
        num_bytes: How much, >= 0.
        source: Which number says so, for people.
    """

    num_bytes: int
    source: str


def memory_room(
    *,
    meminfo: Path = Path("/proc/meminfo"),
    own: Path = Path("/proc/self/cgroup"),
    cgroup_root: Path = _CGROUP_ROOT,
) -> Room:
    """What this process could still allocate: the host's MemAvailable, or less by its cgroups.

    Args:
        meminfo: File in the form of ``/proc/meminfo``.
        own: File in the form of ``/proc/self/cgroup``.
        cgroup_root: Mount point of the cgroup file systems.
    """
    available = _kib_lines(meminfo).get("MemAvailable", 0)
    host = Room(available, "MemAvailable of this host")
    cgroup = cgroup_room(own=own, cgroup_root=cgroup_root)
    return host if cgroup is None or host.num_bytes <= cgroup.num_bytes else cgroup


def cgroup_room(
    *, own: Path = Path("/proc/self/cgroup"), cgroup_root: Path = _CGROUP_ROOT
) -> Room | None:
    """Room up to the tightest memory limit of this process's cgroups; None without a limit.

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
    rooms: list[Room] = []
    for _, controllers, path in entries:
        if not controllers:
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
                rooms.append(Room(max(0, int(limit) - used), str(directory / limit_name)))
    return min(rooms, key=lambda room: room.num_bytes, default=None)


def lockable_bytes(*, status: Path = Path("/proc/self/status")) -> int | None:
    """Bytes that this process may still lock, up to its hard limit; None without a limit.

    Args:
        status: File in the form of ``/proc/self/status``.
    """
    if _has_capability(status, _CAP_IPC_LOCK):
        return None
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY:
        return None
    return max(0, hard - _kib_lines(status).get("VmLck", 0))


def swap_bytes(*, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that the host could swap out.

    Args:
        meminfo: File in the form of ``/proc/meminfo``.
    """
    return _kib_lines(meminfo).get("SwapTotal", 0)


def raise_memlock_limit() -> None:
    """Raise the soft limit of locked memory to the hard one, which anybody may."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def _kib_lines(file: Path) -> dict[str, int]:
    """Bytes by name in a file of lines such as ``Name:  12 kB``."""
    found = {}
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith("kB"):
            found[name] = int(value.split()[0]) * 1024
    return found


def _has_capability(status: Path, number: int) -> bool:
    for line in status.read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def raise_descriptor_limit() -> None:
    """Allow this process all the descriptors that it may have.

    ZeroMQ takes one for each connection of a client and ends the process when there is none.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
