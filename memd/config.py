"""Settings of the daemon, and the only module of memd that reads the environment."""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from pathlib import Path

from memd.endpoint import Endpoint
from memd.errors import ConfigError
from memd.logs import LOG_FORMATS, LOG_LEVELS
from memd.numa import is_policy
from memd.tiers.eviction import POLICY_NAMES

__all__ = ["MemdConfig", "default_address", "runtime_directory"]


def runtime_directory() -> Path:
    """Where socket directories go: ``$XDG_RUNTIME_DIR``, else the temporary directory."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime) if runtime and Path(runtime).is_dir() else Path(tempfile.gettempdir())


def default_address() -> str:
    """Address of this user's stand-alone daemon."""
    return f"ipc://{runtime_directory() / f'memd-{os.geteuid()}' / 'control.sock'}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemdConfig:
    """Settings of one daemon. Those with a flag of ``memd serve`` are refused by the flag's name.

    Attributes:
        address: Control endpoint, ``ipc://`` and an absolute path.
        region_bytes: Size of the shared region, at least 1 MiB; rounded down to whole memory pages.
        numa: Where its memory goes: ``interleave`` over all NUMA nodes, ``local`` to memd's own, or
            a list of nodes such as ``0,2-3``. No matter where there is only one.
        lock: Whether the region must never be swapped out; needs the limit of locked memory.
        parent_pid: Process whose end ends the daemon, None for a stand-alone daemon.
        max_clients: Processes that may be attached at a time, >= 1.
        client_bytes: Most bytes of the region for one client, 0 for no bound but the region.
        drain_s: How long SIGTERM lets clients go on, in seconds, 0 to 3600.
        metrics_port: Port of the metrics and probes on 127.0.0.1, 0 for none.
        disk_dir: Directory for pages that leave memory, empty for none.
        disk_bytes: Disk space for them, 0 for none; goes with ``disk_dir``.
        eviction: Which pages leave first: ``depth``, ``lru`` or ``lfu``.
        cuda_staging_bytes: Page-locked memory for each GPU that landing rings are on, 0 for none;
            taken out of the region for as long as there is such a ring. No ring can be longer.
        link_gbps: Rate of the interconnect to imitate, gigabits a second, 0 for none.
        link_latency_us: Its latency, microseconds, 0 for none.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        log_format: ``text`` or ``json``.
        max_frame_bytes: Longest request that is read, 1 KiB to 1 GiB; 16 MiB are 4 million rows.
        hello_grace_s: Time that an attached process has to say ``Hello``, in seconds, > 0.
        watch_interval_s: How often deaths are looked for where the kernel has no pidfd, in seconds,
            > 0.
        scrub_bytes: Bytes zeroed between two looks at the sockets, >= 4096; 16 MiB are some 3 ms.
    """

    address: str
    region_bytes: int
    numa: str = "interleave"
    lock: bool = False
    parent_pid: int | None = None
    max_clients: int = 64
    client_bytes: int = 0
    drain_s: float = 5.0
    metrics_port: int = 0
    disk_dir: str = ""
    disk_bytes: int = 0
    eviction: str = "depth"
    cuda_staging_bytes: int = 0
    link_gbps: float = 0.0
    link_latency_us: float = 0.0
    log_level: str = "info"
    log_format: str = "text"
    max_frame_bytes: int = 16 << 20
    hello_grace_s: float = 10.0
    watch_interval_s: float = 0.5
    scrub_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        """Check every setting; the message names the flag, the rule, the value and a remedy."""
        Endpoint.parse(self.address)
        _require(
            self.region_bytes >= 1 << 20,
            f"--bytes must be at least 1 MiB, got {self.region_bytes}",
            "ask for 1MiB or more; a pool for a model has gigabytes",
        )
        _require(
            is_policy(self.numa),
            f"--numa must be interleave, local or a list of nodes, got {self.numa}",
            "for example --numa 0,2-3; `memd check` shows the nodes",
        )
        _require(
            self.parent_pid is None or self.parent_pid >= 1,
            f"--parent-pid must be a process id, got {self.parent_pid}",
            "leave it out for a daemon of its own",
        )
        _require(
            self.max_clients >= 1,
            f"--max-clients must be at least 1, got {self.max_clients}",
            f"the default is {MemdConfig.max_clients}",
        )
        _require(
            self.client_bytes >= 0,
            f"--client-bytes must be 0 or more, got {self.client_bytes}",
            "0 lets one client have the whole region",
        )
        _require(
            0 <= self.drain_s <= 3600,
            f"--drain-s must be 0 to 3600 seconds, got {self.drain_s}",
            "0 ends at once; a supervisor has to wait longer than this before it kills",
        )
        _require(
            0 <= self.metrics_port <= 65535,
            f"--metrics-port must be 0 to 65535, got {self.metrics_port}",
            "0 serves no metrics",
        )
        self._check_disk()
        self._check_cuda()
        for name, unit in (("link_gbps", "Gbit/s"), ("link_latency_us", "microseconds")):
            value = getattr(self, name)
            _require(
                math.isfinite(value) and value >= 0,
                f"--{name.replace('_', '-')} must be 0 or more {unit}, got {value}",
                "0 imitates nothing",
            )
        _require(
            self.log_level in LOG_LEVELS,
            f"--log-level must be one of {', '.join(LOG_LEVELS)}, got {self.log_level}",
            f"the default is {MemdConfig.log_level}",
        )
        _require(
            self.log_format in LOG_FORMATS,
            f"--log-format must be one of {', '.join(LOG_FORMATS)}, got {self.log_format}",
            f"the default is {MemdConfig.log_format}",
        )
        _require(
            1 << 10 <= self.max_frame_bytes <= 1 << 30,
            f"max_frame_bytes must be between 1 KiB and 1 GiB, got {self.max_frame_bytes}",
            "16 MiB are 4 million rows",
        )
        _require(
            self.hello_grace_s > 0,
            f"hello_grace_s must be positive, got {self.hello_grace_s}",
            "a client says Hello within milliseconds",
        )
        _require(
            self.watch_interval_s > 0,
            f"watch_interval_s must be positive, got {self.watch_interval_s}",
            f"the default is {MemdConfig.watch_interval_s}",
        )
        _require(
            self.scrub_bytes >= 4096,
            f"scrub_bytes must be at least 4096, got {self.scrub_bytes}",
            "16 MiB are some 3 ms",
        )

    def _check_cuda(self) -> None:
        if not self.cuda_staging_bytes:
            return
        _require(
            1 << 20 <= self.cuda_staging_bytes < self.region_bytes,
            f"--cuda-staging-bytes must be 0, or at least 1 MiB and less than --bytes, got "
            f"{self.cuda_staging_bytes}",
            "the bytes of the longest landing ring are enough, twice that is better; 0 copies to "
            "no GPU",
        )
        _require(
            not (self.link_gbps or self.link_latency_us),
            "--link-gbps and --link-latency-us do not go with --cuda-staging-bytes, whose link is "
            "a real one",
            "leave one of them out",
        )

    def _check_disk(self) -> None:
        _require(
            bool(self.disk_dir) == bool(self.disk_bytes),
            f"--disk-dir and --disk-bytes go together, got {self.disk_dir or 'no directory'} and "
            f"{self.disk_bytes} bytes",
            "for example --disk-dir /mnt/nvme --disk-bytes 256GiB",
        )
        _require(
            self.eviction in POLICY_NAMES,
            f"--eviction must be one of {', '.join(POLICY_NAMES)}, got {self.eviction}",
            f"the default is {MemdConfig.eviction}",
        )
        if not self.disk_dir:
            return
        _require(
            self.disk_bytes >= 1 << 20,
            f"--disk-bytes must be at least 1 MiB, got {self.disk_bytes}",
            "a tier that is worth it has many gigabytes",
        )
        _require(
            not self.lock,
            "--lock does not go with --disk-dir, which gives memory back that a page has left",
            "leave one of them out",
        )
        _require(
            self.numa == MemdConfig.numa,
            f"--numa {self.numa} does not go with --disk-dir, where the kernel places memory as "
            "pages come and go",
            "leave one of them out, or run memd under numactl",
        )


def _require(holds: bool, broken: str, remedy: str) -> None:
    if not holds:
        raise ConfigError(f"{broken}; {remedy}")
