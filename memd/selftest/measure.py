"""Measures this host's memory, and tries a small daemon from its start to its end."""

from __future__ import annotations

import mmap
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from memd.client import MemdClient
from memd.errors import ConfigError, MemdError
from memd.process import spawn_memd
from memd.protocol import KVLayout
from memd.region import Region
from memd.selftest.finding import Finding, Verdict
from memd.sizes import format_bytes
from memd.tiers import BLOCK_BYTES, DiskTier
from memd.tiers.header import PageIdentity

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from memd.numa import Node

__all__ = ["measure_disk", "measure_host", "measure_memcpy", "measure_pretouch", "try_daemon"]

_GIB = 1 << 30
_SAMPLE_BYTES = 256 << 20
_DISK_SAMPLE_BYTES = 128 << 20
_DISK_PAGE_BYTES = 2 << 20
# Less than any host that one would serve a model on.
_SLOW_GIB_PER_S = 1.0

# Rows of 512 bytes, as of a head of 128 elements in 16 bits.
_LAYOUT = KVLayout(num_heads=8, head_dim=128, dtype="float16", page_tokens=64)
_NUM_PAGES = 256
_LANDING_ROWS = 32_768
_NUM_FETCHES = 16
_TIMEOUT_S = 20.0


def measure_host(nodes: Sequence[Node]) -> list[Finding]:
    """All checks that do something; a second or two, and half a GiB of memory.

    Args:
        nodes: NUMA nodes that the region would go to; empty where there is only one.
    """
    return [measure_memcpy(), measure_pretouch(nodes), *try_daemon()]


def measure_memcpy(num_bytes: int = _SAMPLE_BYTES) -> Finding:
    """How fast one thread copies; no gather can be faster on one thread."""
    source = np.ones(num_bytes, dtype=np.uint8)
    target = np.zeros_like(source)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - begin)
    return _speed("memcpy", num_bytes / _GIB / min(seconds), "by one thread")


def measure_pretouch(nodes: Sequence[Node] = (), num_bytes: int = _SAMPLE_BYTES) -> Finding:
    """How fast a region is made."""
    try:
        with Region(num_bytes, nodes=nodes) as region:
            made = region.pretouched
            assert made is not None, "it has no disk below it"
    except ConfigError as error:
        return Finding("pretouch", Verdict.FAIL, str(error), "free memory or raise the limit")
    return _speed("pretouch", made.gib_per_s, f"by {made.method} on {made.num_threads} thread(s)")


def measure_disk(directory: Path, num_bytes: int = _DISK_SAMPLE_BYTES) -> Finding:
    """How fast pages go to disk and come back, checksums included, one after the other.

    Args:
        directory: Of the disk tier.
        num_bytes: Pages to write and read, in all.
    """
    num_pages = num_bytes // _DISK_PAGE_BYTES
    with mmap.mmap(-1, _DISK_PAGE_BYTES) as memory:
        memory.write(np.random.default_rng(0).bytes(_DISK_PAGE_BYTES))
        page = memoryview(memory)
        try:
            with DiskTier(directory, num_pages * (_DISK_PAGE_BYTES + BLOCK_BYTES)) as disk:
                keys = [PageIdentity(0, page_id, 1) for page_id in range(num_pages)]
                slots = [disk.put(key, page) for key in keys]
                for slot, key in zip(slots, keys, strict=True):
                    if slot is None or not disk.get(slot, key, page):
                        return Finding(
                            "disk",
                            Verdict.FAIL,
                            f"{directory}: a page did not come back as it went",
                            "look at the disk's health, or choose another directory",
                        )
                counters, is_direct = disk.counters, disk.is_direct
        except ConfigError as error:
            return Finding("disk", Verdict.FAIL, str(error), "choose another --disk-dir")
        finally:
            page.release()
    put_s, get_s = counters.put_ns / 1e9, counters.get_ns / 1e9
    speeds = {
        "write_gib_per_s": num_bytes / _GIB / put_s,
        "read_gib_per_s": num_bytes / _GIB / get_s,
    }
    way = "past the page cache" if is_direct else "through the page cache"
    detail = (
        f"{speeds['read_gib_per_s']:.2f} GiB/s read, {speeds['write_gib_per_s']:.2f} GiB/s written "
        f"{way}, in pages of {format_bytes(_DISK_PAGE_BYTES)}, the longest took "
        f"{max(counters.get_max_ns, counters.put_max_ns) / 1e6:.0f} ms"
    )
    measured = {name: round(speed, 3) for name, speed in speeds.items()}
    if not is_direct:
        return Finding(
            "disk",
            Verdict.WARN,
            detail,
            "pages on disk stay in memory a second time here; not so with a local ext4 or XFS",
            measured,
        )
    return Finding("disk", Verdict.OK, detail, measured=measured)


def try_daemon() -> list[Finding]:
    """Start a memd, write pages, fetch them back in random order, compare, and stop it."""
    pool_bytes = _NUM_PAGES * _LAYOUT.page_bytes + _LANDING_ROWS * _LAYOUT.row_bytes
    begin = time.perf_counter()
    try:
        with spawn_memd(
            num_bytes=pool_bytes + (1 << 20), options=["--log-level", "warning"]
        ) as daemon:
            started_s = time.perf_counter() - begin
            with MemdClient.connect(
                daemon.address, _LAYOUT, num_pages=_NUM_PAGES, landing_rows=_LANDING_ROWS
            ) as client:
                num_wrong = _fetch_and_compare(client)
                stats = _stats(client)
            begin = time.perf_counter()
        stopped_s = time.perf_counter() - begin
    except (MemdError, OSError) as error:
        remedy = "see its message above; `memd serve --log-level debug` says more"
        return [Finding("daemon", Verdict.FAIL, str(error), remedy)]
    if num_wrong or daemon.returncode != 0:
        detail = f"{num_wrong} rows came back wrong, exit status {daemon.returncode}"
        return [Finding("daemon", Verdict.FAIL, detail, "this is a bug or broken memory")]
    counters, latency = stats["counters"], stats.get("latencies", {}).get("fetch")
    took = "" if latency is None else f", half of them within {latency['p50_s'] * 1e3:.2g} ms"
    return [
        Finding(
            "daemon",
            Verdict.OK,
            f"started in {started_s:.2f} s, {counters['fetches']} fetches of "
            f"{format_bytes(_LANDING_ROWS // 2 * _LAYOUT.row_bytes)} came back right{took}, "
            f"stopped in {stopped_s:.2f} s",
            measured={"start_s": started_s, "stop_s": stopped_s},
        ),
        _speed(
            "gather",
            counters["bytes_fetched"] / _GIB / (counters["gather_ns"] / 1e9),
            f"of rows of {_LAYOUT.row_bytes} bytes in random order",
        ),
    ]


def _fetch_and_compare(client: MemdClient) -> int:
    """Rows that came back other than they were written."""
    rng = np.random.default_rng(0)
    reserved = client.reserve(_NUM_PAGES)
    if not client.wait(reserved, _TIMEOUT_S) or reserved.page_ids is None:
        raise ConfigError(f"no pages: {reserved.error}")
    client.pages[:] = rng.integers(0, 256, client.pages.shape, dtype=np.uint8)
    client.commit(reserved.page_ids)
    written = client.pages.reshape(-1, _LAYOUT.row_bytes)
    num_wrong = 0
    for _ in range(_NUM_FETCHES):
        rows = rng.integers(0, len(written), _LANDING_ROWS // 2)
        ticket = client.fetch(rows)
        if ticket is None or not client.wait(ticket, _TIMEOUT_S) or ticket.error is not None:
            raise ConfigError(f"a fetch failed: {ticket and ticket.error}")
        num_wrong += int((client.landed(ticket) != written[rows]).any(axis=1).sum())
        client.finish(ticket)
    return num_wrong


def _stats(client: MemdClient) -> dict[str, Any]:
    client.stats()
    client.drain(_TIMEOUT_S)
    server: dict[str, Any] = client.stats()["server"]
    return server


def _speed(name: str, gib_per_s: float, how: str) -> Finding:
    is_slow = gib_per_s < _SLOW_GIB_PER_S
    return Finding(
        name,
        Verdict.WARN if is_slow else Verdict.OK,
        f"{gib_per_s:.1f} GiB/s {how}",
        "measure again on an idle host; memory of a virtual machine is slow when first touched"
        if is_slow
        else "",
        {f"{name}_gib_per_s": round(gib_per_s, 2)},
    )
