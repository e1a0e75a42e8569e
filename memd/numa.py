"""Which NUMA nodes the region's memory goes to, and where it went.

The kernel takes a page from the node of the processor that touches it first. So memory is placed by
touching it from threads that are kept on the processors of a node. That needs no privilege, unlike
``mbind`` and ``set_mempolicy``, which the default seccomp profiles of containers refuse; and a node
that is full falls back to another one instead of failing. What it cannot do is use a node that has
memory but no processor.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from memd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Node", "choose_nodes", "is_policy", "placement", "read_nodes", "running_cpu"]

_ID_LIST = re.compile(r"\d{1,5}(-\d{1,5})?(,\d{1,5}(-\d{1,5})?)*")
_SYSFS = Path("/sys/devices/system/node")


@dataclasses.dataclass(frozen=True)
class Node:
    """One node that this process may use.

    Attributes:
        node_id: The kernel's number.
        cpus: Its processors that this process may run on; never empty.
    """

    node_id: int
    cpus: frozenset[int]


def is_policy(text: str) -> bool:
    """Whether a text names a policy: ``interleave``, ``local``, or nodes such as ``0,2-3``."""
    return text in ("interleave", "local") or _ID_LIST.fullmatch(text) is not None


def read_nodes(
    *, sysfs: Path = _SYSFS, status: Path = Path("/proc/self/status")
) -> tuple[Node, ...]:
    """Nodes with memory and processors that this process may use, ascending; at least one.

    Args:
        sysfs: Directory in the form of ``/sys/devices/system/node``.
        status: File in the form of ``/proc/self/status``.
    """
    own_cpus = frozenset(os.sched_getaffinity(0))
    try:
        with_memory = _ids((sysfs / "has_memory").read_text())
        allowed = re.search(r"^Mems_allowed_list:(.*)$", status.read_text(), re.MULTILINE)
        if allowed is not None:
            with_memory &= _ids(allowed[1])
        nodes = tuple(
            Node(node_id, cpus)
            for node_id in sorted(with_memory)
            if (cpus := own_cpus & _ids((sysfs / f"node{node_id}" / "cpulist").read_text()))
        )
    except OSError:
        nodes = ()
    # A kernel without NUMA, or a sandbox that hides it: one node is as good as the truth.
    return nodes or (Node(0, own_cpus),)


def choose_nodes(policy: str, nodes: Sequence[Node], own_cpu: int) -> tuple[Node, ...]:
    """The nodes that a policy means, in the order in which slices go to them.

    Args:
        policy: As ``is_policy`` takes it.
        nodes: Those that there are.
        own_cpu: Processor that memd runs on; says what is local.

    Returns:
        The nodes; empty where there is only one, because then nothing needs to be placed.

    Raises:
        ConfigError: The policy names a node that this process cannot use.
    """
    if policy == "interleave":
        chosen = tuple(nodes)
    elif policy == "local":
        chosen = tuple(node for node in nodes if own_cpu in node.cpus) or (nodes[0],)
    else:
        wanted = _ids(policy)
        known = {node.node_id for node in nodes}
        if not wanted <= known:
            missing = ", ".join(map(str, sorted(wanted - known)))
            raise ConfigError(
                f"--numa {policy}: this process can use no memory with processors on node "
                f"{missing}; it can on {', '.join(map(str, sorted(known)))}"
            )
        chosen = tuple(node for node in nodes if node.node_id in wanted)
    return chosen if len(nodes) > 1 else ()


def running_cpu(*, stat: Path = Path("/proc/self/stat")) -> int:
    """The processor that this process's main thread ran on last; 0 where nobody says.

    Args:
        stat: File in the form of ``/proc/self/stat``.
    """
    try:
        # Field 39; the second one may hold spaces and ends with the last parenthesis.
        return int(stat.read_text().rpartition(")")[2].split()[36])
    except (OSError, IndexError, ValueError):
        return 0


def placement(
    address: int, length: int, *, numa_maps: Path = Path("/proc/self/numa_maps")
) -> dict[int, int]:
    """Bytes of mapped memory by node; empty where the kernel does not say.

    Args:
        address: First byte.
        length: Bytes.
        numa_maps: File in the form of ``/proc/self/numa_maps``.
    """
    found: dict[int, int] = {}
    try:
        lines = numa_maps.read_text().splitlines()
    except OSError:
        return found
    for line in lines:
        start, *words = line.split()
        if not address <= int(start, 16) < address + length:
            continue
        values = dict(word.partition("=")[::2] for word in words)
        page_bytes = int(values.get("kernelpagesize_kB", 4)) << 10
        for name, value in values.items():
            if node := re.fullmatch(r"N(\d+)", name):
                found[int(node[1])] = found.get(int(node[1]), 0) + int(value) * page_bytes
    return found


def _ids(text: str) -> set[int]:
    """Numbers of a list such as ``0,2-3``, as the kernel writes them."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
