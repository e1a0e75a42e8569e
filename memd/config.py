"""Settings of the daemon, and the only module of memd that reads the environment."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from pathlib import Path

from memd.endpoint import Endpoint
from memd.errors import ConfigError

__all__ = ["MemdConfig", "default_address", "format_bytes", "parse_bytes", "runtime_directory"]

_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def parse_bytes(text: str) -> int:
    """Bytes in ``"123"``, ``"64MiB"`` or ``"1.5GiB"``; binary units only, so nobody has to guess.

    Raises:
        ConfigError: The text is something else, or not a whole positive number of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(|KiB|MiB|GiB|TiB)\s*", text)
    num_bytes = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if num_bytes < 1 or num_bytes != int(num_bytes):
        raise ConfigError(
            f"a size is a number with KiB, MiB, GiB or TiB, for example 4GiB; got {text!r}"
        )
    return int(num_bytes)


def format_bytes(num_bytes: int) -> str:
    """``num_bytes`` for people, in the largest binary unit that leaves at least 1."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if num_bytes >= _UNITS[unit]:
            return f"{num_bytes / _UNITS[unit]:.4g} {unit}"
    return f"{num_bytes} B"


def runtime_directory() -> Path:
    """Where socket directories go: ``$XDG_RUNTIME_DIR``, else the temporary directory."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime) if runtime and Path(runtime).is_dir() else Path(tempfile.gettempdir())


def default_address() -> str:
    """Address of this user's stand-alone daemon."""
    return f"ipc://{runtime_directory() / f'memd-{os.geteuid()}' / 'control.sock'}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemdConfig:
    """Settings of one daemon.

    Attributes:
        address: Control endpoint, ``ipc://`` and an absolute path.
        region_bytes: Size of the shared region, at least 1 MiB; rounded down to whole memory pages.
        parent_pid: Process whose end ends the daemon, None for a stand-alone daemon.
        max_clients: Processes that may be attached at a time, >= 1.
        max_frame_bytes: Longest request that is read, 1 KiB to 1 GiB; 16 MiB are 4 million rows.
        hello_grace_s: Time that an attached process has to say ``Hello``, in seconds, > 0.
        watch_interval_s: How often deaths are looked for where the kernel has no pidfd, in seconds,
            > 0.
        scrub_bytes: Bytes zeroed between two looks at the sockets, >= 4096; 16 MiB are some 3 ms.
    """

    address: str
    region_bytes: int
    parent_pid: int | None = None
    max_clients: int = 64
    max_frame_bytes: int = 16 << 20
    hello_grace_s: float = 10.0
    watch_interval_s: float = 0.5
    scrub_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        """Check every setting; the message names the rule and the value."""
        Endpoint.parse(self.address)
        for rule, value, holds in (
            (
                "region_bytes must be at least 1 MiB",
                self.region_bytes,
                self.region_bytes >= 1 << 20,
            ),
            ("parent_pid must be a process id", self.parent_pid, (self.parent_pid or 1) >= 1),
            ("max_clients must be at least 1", self.max_clients, self.max_clients >= 1),
            (
                "max_frame_bytes must be between 1 KiB and 1 GiB",
                self.max_frame_bytes,
                1 << 10 <= self.max_frame_bytes <= 1 << 30,
            ),
            ("hello_grace_s must be positive", self.hello_grace_s, self.hello_grace_s > 0),
            ("watch_interval_s must be positive", self.watch_interval_s, self.watch_interval_s > 0),
            ("scrub_bytes must be at least 4096", self.scrub_bytes, self.scrub_bytes >= 4096),
        ):
            if not holds:
                raise ConfigError(f"{rule}, got {value}")
