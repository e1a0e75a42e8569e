"""What this host offers: memory, limits, NUMA nodes, system calls, sockets, a CUDA driver.

Each check judges values that it is given; ``look_at_host`` reads them.
"""

from __future__ import annotations

import ctypes
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from memd import limits
from memd.config import runtime_directory
from memd.endpoint import Endpoint, peer_of, private_directory
from memd.errors import ConfigError
from memd.liveness import ProcessWatch
from memd.numa import choose_nodes, read_nodes, running_cpu
from memd.pretouch import can_populate
from memd.region import largest_lockable_region, largest_region
from memd.selftest.finding import Finding, Verdict
from memd.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memd.numa import Node

__all__ = [
    "check_cuda",
    "check_memlock",
    "check_memory",
    "check_numa",
    "check_pidfd",
    "check_populate",
    "check_sockets",
    "check_swap",
    "look_at_host",
]


def look_at_host(num_bytes: int, *, numa: str, lock: bool) -> list[Finding]:
    """All checks that only look.

    Args:
        num_bytes: Size of the region that is planned.
        numa: Policy as for ``memd serve --numa``.
        lock: Whether the region is to be locked.
    """
    with ProcessWatch(os.getpid()) as watch:
        has_pidfd = watch.fileno() is not None
    return [
        check_memory(num_bytes, largest_region()),
        check_memlock(num_bytes, largest_lockable_region(), lock=lock),
        check_swap(limits.swap_bytes(), lock=lock),
        check_numa(numa, read_nodes(), running_cpu()),
        check_populate(can_populate()),
        check_pidfd(has_pidfd),
        check_sockets(runtime_directory()),
        check_cuda(has_library=_has_library("libcuda.so.1"), has_device=_has_nvidia_device()),
    ]


def check_memory(num_bytes: int, largest: limits.Room) -> Finding:
    """Whether the region fits."""
    measured = {"largest_region_bytes": largest.num_bytes}
    detail = f"{largest.source} has room for {format_bytes(largest.num_bytes)}"
    if num_bytes <= largest.num_bytes:
        return Finding("memory", Verdict.OK, detail, measured=measured)
    return Finding(
        "memory",
        Verdict.FAIL,
        f"{detail}, not for {format_bytes(num_bytes)}",
        f"ask for at most --bytes {largest.num_bytes}, free memory, or raise the limit",
        measured,
    )


def check_memlock(num_bytes: int, lockable: int | None, *, lock: bool) -> Finding:
    """Whether the region may be locked."""
    if lockable is None:
        return Finding("memlock", Verdict.OK, "no limit")
    measured = {"lockable_bytes": lockable}
    detail = f"{format_bytes(lockable)} may be locked"
    if num_bytes <= lockable or not lock:
        unused = "" if num_bytes <= lockable else "; only --lock needs more"
        return Finding("memlock", Verdict.OK, detail + unused, measured=measured)
    return Finding(
        "memlock",
        Verdict.FAIL,
        f"{detail}, not {format_bytes(num_bytes)}",
        f"raise RLIMIT_MEMLOCK to {num_bytes} (systemd LimitMEMLOCK=, Docker --ulimit memlock=), "
        f"or leave --lock out",
        measured,
    )


def check_swap(swap_bytes: int, *, lock: bool) -> Finding:
    """Whether the region could be swapped out."""
    if not swap_bytes:
        return Finding("swap", Verdict.OK, "none")
    detail = f"{format_bytes(swap_bytes)} of swap"
    if lock:
        return Finding("swap", Verdict.OK, f"{detail}; --lock keeps the region out of it")
    return Finding(
        "swap",
        Verdict.WARN,
        f"{detail}; a region that is not locked can be swapped out, and fetches then wait for a "
        f"disk",
        "start with --lock, or turn swap off (in a unit: MemorySwapMax=0)",
    )


def check_numa(policy: str, nodes: Sequence[Node], own_cpu: int) -> Finding:
    """Which nodes the region would go to."""
    there = ", ".join(f"node {node.node_id} ({len(node.cpus)} processors)" for node in nodes)
    try:
        chosen = choose_nodes(policy, nodes, own_cpu)
    except ConfigError as error:
        return Finding("numa", Verdict.FAIL, str(error), "name nodes that there are")
    if not chosen:
        return Finding("numa", Verdict.OK, f"{there}; nothing to choose")
    names = ", ".join(str(node.node_id) for node in chosen)
    return Finding("numa", Verdict.OK, f"{there}; --numa {policy} takes {names}")


def check_populate(has_populate: bool) -> Finding:
    """How memory is allocated."""
    if has_populate:
        return Finding("populate", Verdict.OK, "MADV_POPULATE_WRITE is known")
    return Finding(
        "populate",
        Verdict.WARN,
        "the kernel does not know MADV_POPULATE_WRITE; pages are touched one by one",
        "Linux 5.14 or newer starts large regions faster",
    )


def check_pidfd(has_pidfd: bool) -> Finding:
    """How the end of a client is noticed."""
    if has_pidfd:
        return Finding("pidfd", Verdict.OK, "the end of a process is noticed at once")
    return Finding(
        "pidfd",
        Verdict.WARN,
        "no pidfd_open; the end of a process is looked for twice a second",
        "Linux 5.3 or newer, or a seccomp profile that allows pidfd_open",
    )


def check_sockets(directory: Path) -> Finding:
    """Whether sockets work in a private directory, with descriptors and the peer's identity."""
    try:
        with tempfile.TemporaryDirectory(prefix="memd-check-", dir=directory) as name:
            private_directory(Path(name))
            endpoint = Endpoint.parse(f"ipc://{name}/control.sock")
            _try_sockets(endpoint.attach)
    except (ConfigError, OSError) as error:
        return Finding(
            "sockets",
            Verdict.FAIL,
            f"{directory}: {error}",
            "name a short directory of your own on a local file system by --address",
        )
    return Finding("sockets", Verdict.OK, f"{directory} takes private sockets")


def check_cuda(*, has_library: bool, has_device: bool) -> Finding:
    """Whether an engine beside memd could use a GPU; memd itself never does."""
    if has_library and has_device:
        return Finding("cuda", Verdict.OK, "a driver and a device are there")
    if has_device:
        return Finding(
            "cuda",
            Verdict.WARN,
            "there is an NVIDIA device, but libcuda.so.1 does not load",
            "install the driver's libraries; in a container: --gpus, and the toolkit's "
            "capability `compute`",
        )
    if has_library:
        return Finding(
            "cuda",
            Verdict.WARN,
            "libcuda.so.1 loads, but there is no NVIDIA device",
            "in a container: pass the devices (--gpus all)",
        )
    return Finding("cuda", Verdict.OK, "no driver; engines run on the CPU")


def _try_sockets(path: Path) -> None:
    """Send a descriptor through a socket at ``path`` and ask who sent it, as attaching does.

    Raises:
        OSError: It does not work, or the kernel names another process.
    """
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client,
    ):
        listener.bind(os.fspath(path))
        listener.listen(1)
        client.connect(os.fspath(path))
        server, _ = listener.accept()
        with server:
            peer = peer_of(server)
            socket.send_fds(server, [b"\0"], [listener.fileno()])
            _, fds, _, _ = socket.recv_fds(client, 1, 1)
            for fd in fds:
                os.close(fd)
            if peer.pid != os.getpid() or len(fds) != 1:
                raise OSError("the kernel does not pass descriptors or names another process")


def _has_library(name: str) -> bool:
    # Loads it and nothing more: no call, no context on any device.
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _has_nvidia_device() -> bool:
    # The second is what WSL has.
    return Path("/dev/nvidiactl").exists() or Path("/dev/dxg").exists()
