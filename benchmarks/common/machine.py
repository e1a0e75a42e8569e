"""Describes the machine a result belongs to, and measures how fast it reads memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("hetero-sglang", "sglang", "torch", "transformers", "numpy")
BUSY_SHARE = 0.25
"""A machine that is busier than this before we start spoils timings."""


def describe() -> dict[str, Any]:
    """Hardware, versions and the state of the checkout, as plain data."""
    return {
        "cpu": cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "load_before": [round(load, 2) for load in os.getloadavg()],
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cpu_model() -> str:
    """Name of the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def busy_share(seconds: float = 2.0) -> float:
    """Share of all cores that somebody uses, measured for a moment."""
    return psutil.cpu_percent(interval=seconds) / 100


def read_bandwidth_gb_s(num_bytes: int = 2**29, rounds: int = 15) -> float:
    """Gigabytes (1e9) a second that a sum over fp32 memory reads, median of several rounds.

    Args:
        num_bytes: Size of the array; far above the caches.
        rounds: Timed passes.
    """
    import torch

    data = torch.ones(num_bytes // 4)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        data.sum()
        times.append(time.perf_counter() - start)
    return num_bytes / statistics.median(times) / 1e9


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout, with '+' where files differ from it; None outside of one."""
    root = Path(__file__).parents[2]
    try:
        head = _git(root, "rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
