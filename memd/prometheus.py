"""The daemon's state as Prometheus text (exposition format 0.0.4); pure, from plain stats.

Names and meanings are listed in ``docs/memd.md``. Nothing here names a client: what a scraper sees
are sums, so its series do not multiply with engines that come and go.
"""

from __future__ import annotations

import bisect
import collections
import itertools
from typing import TYPE_CHECKING, Any

from memd.lifecycle import DaemonState
from memd.protocol import REQUEST_TYPES, ErrorCode

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["CONTENT_TYPE", "render"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REQUEST_TAGS = tuple(str(kind.__struct_config__.tag) for kind in REQUEST_TYPES)
# 4 us to 17 s. Powers of two, because those are ends of the buckets of `memd.histogram`.
_BOUNDS_NS = tuple(1 << bits for bits in range(12, 35))

# Field of `memd.metrics.Counters`: name, unit of the field in the unit of the name, help.
_COUNTERS: dict[str, tuple[str, float, str]] = {
    "clients_registered": ("memd_clients_registered_total", 1, "Clients that got an extent."),
    "clients_reclaimed": (
        "memd_clients_reclaimed_total",
        1,
        "Clients that ended without saying goodbye.",
    ),
    "peers_refused": ("memd_peers_refused_total", 1, "Processes that were not let in."),
    "replies_dropped": ("memd_replies_dropped_total", 1, "Replies that nobody received."),
    "fetches": ("memd_fetches_total", 1, "Fetches done."),
    "rows_fetched": ("memd_fetch_rows_total", 1, "Rows gathered."),
    "bytes_fetched": ("memd_fetch_bytes_total", 1, "Bytes gathered."),
    "gather_ns": ("memd_gather_seconds_total", 1e-9, "Time spent in gathers."),
    "gather_max_ns": ("memd_gather_max_seconds", 1e-9, "Longest gather since the start."),
    "bytes_zeroed": ("memd_zeroed_bytes_total", 1, "Bytes zeroed for the next client."),
}

# Field of `memd.transfer.cuda_ipc.CudaCounters`: the same.
_CUDA_COUNTERS: dict[str, tuple[str, float, str]] = {
    "rings_opened": ("memd_cuda_rings_opened_total", 1, "Rings on GPUs that were mapped."),
    "rings_failed": ("memd_cuda_rings_failed_total", 1, "Rings that could not be mapped."),
    "rings_lost": ("memd_cuda_rings_lost_total", 1, "Rings that went with their GPU."),
    "copies_done": ("memd_cuda_copies_total", 1, "Copies that landed on a GPU."),
    "copies_lost": ("memd_cuda_copies_lost_total", 1, "Copies that went with their GPU."),
    "copies_cancelled": ("memd_cuda_copies_cancelled_total", 1, "Copies of clients that left."),
    "bytes_copied": ("memd_cuda_copied_bytes_total", 1, "Bytes that landed on a GPU."),
    "copy_ns": ("memd_cuda_copy_seconds_total", 1e-9, "From slot to landing, summed over copies."),
    "waits_for_slot": (
        "memd_cuda_slot_waits_total",
        1,
        "Times that a fetch found no room in the staging memory.",
    ),
}

_REGION = {
    "bytes": "Size of the region.",
    "ready_bytes": "Bytes of the region that are allocated, while it is made.",
    "free_bytes": "Bytes of the region that no client has.",
    "largest_free_bytes": "Longest run of free bytes; what one more client can have.",
    "dirty_bytes": "Bytes given back that are not zeroed yet.",
    "memory_bytes": "Memory that clients may be promised.",
    "memory_free_bytes": "Memory that no client was promised.",
}

# By key of the disk's stats: name, factor, text.
_DISK = {
    "bytes": ("memd_disk_bytes", 1, "Size of the disk tier."),
    "free_bytes": ("memd_disk_free_bytes", 1, "Bytes of it that no page takes."),
    "quarantined_bytes": ("memd_disk_quarantined_bytes", 1, "Bytes of it that were found bad."),
    "is_writable": ("memd_disk_is_writable", 1, "1 while it takes pages."),
    "is_readable": ("memd_disk_is_readable", 1, "1 while it gives pages back."),
    "puts": ("memd_disk_puts_total", 1, "Pages that went to disk."),
    "puts_full": ("memd_disk_puts_full_total", 1, "Pages for which it had no room."),
    "put_errors": ("memd_disk_put_errors_total", 1, "Pages that could not be written."),
    "gets": ("memd_disk_gets_total", 1, "Pages that came back."),
    "get_errors": ("memd_disk_get_errors_total", 1, "Pages that could not be read."),
    "corrupt": ("memd_disk_corrupt_total", 1, "Pages that came back otherwise than they went."),
    "bytes_written": ("memd_disk_written_bytes_total", 1, "Bytes of pages written."),
    "bytes_read": ("memd_disk_read_bytes_total", 1, "Bytes of pages read."),
    "put_ns": ("memd_disk_put_seconds_total", 1e-9, "Time spent writing pages."),
    "get_ns": ("memd_disk_get_seconds_total", 1e-9, "Time spent reading pages."),
}


def render(stats: dict[str, Any], *, age_s: float) -> str:
    """The text for a scraper.

    Args:
        stats: Keys as in ``memd.metrics``; sections of a daemon that is starting may be missing.
        age_s: How old they are, in seconds.
    """
    page = _Page()
    _daemon(page, stats, age_s)
    for key, text in _REGION.items():
        if key in stats.get("region", {}):
            page.one(f"memd_region_{key}", "gauge", text, stats["region"][key])
    if "clients" in stats:
        _clients(page, stats["clients"])
    for key, (name, unit, text) in _DISK.items():
        if "disk" in stats:
            kind = "counter" if name.endswith("_total") else "gauge"
            page.one(name, kind, text, int(stats["disk"][key]) * unit)
    if "cuda" in stats:
        _cuda(page, stats["cuda"])
    for field, value in stats.get("counters", {}).items():
        if field in _COUNTERS:
            name, unit, text = _COUNTERS[field]
            kind = "counter" if name.endswith("_total") else "gauge"
            page.one(name, kind, text, value * unit)
    if "requests" in stats:
        _requests(page, stats)
    return page.text()


class _Page:
    """Lines of the text."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(self, name: str, kind: str, text: str, samples: Iterable[tuple[str, float]]) -> None:
        """Add a family; a sample is what follows the family's name, and a value."""
        self._lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        self._lines += [f"{name}{labels} {value}" for labels, value in samples]

    def one(self, name: str, kind: str, text: str, value: float) -> None:
        """Add a family of one sample."""
        self.family(name, kind, text, [("", value)])

    def text(self) -> str:
        """Everything that was added."""
        return "".join(line + "\n" for line in self._lines)


def _daemon(page: _Page, stats: dict[str, Any], age_s: float) -> None:
    daemon = stats.get("daemon", {})
    if "version" in daemon:
        info = f'{{protocol_version="{daemon["version"]}",transfer="{daemon["transfer"]}"}}'
        page.family("memd_info", "gauge", "Always 1; what runs.", [(info, 1)])
        page.one("memd_uptime_seconds", "gauge", "Time since the start.", daemon["uptime_s"])
    state = daemon.get("state", DaemonState.STARTING)
    states = [(f'{{state="{each}"}}', int(each == state)) for each in DaemonState]
    page.family("memd_state", "gauge", "1 for the state that the daemon is in.", states)
    page.one("memd_snapshot_age_seconds", "gauge", "Age of these numbers.", age_s)
    if "integrity" in stats:
        is_ok = int(stats["integrity"] == "ok")
        page.one("memd_integrity_ok", "gauge", "1 if all books hold; 0 is a bug.", is_ok)


def _clients(page: _Page, clients: list[dict[str, Any]]) -> None:
    page.one("memd_clients", "gauge", "Clients that are registered.", len(clients))
    pages: collections.Counter[str] = collections.Counter()
    num_bytes: collections.Counter[str] = collections.Counter()
    for client in clients:
        for key, count in client.items():
            if key.startswith("pages_"):
                pages[key.removeprefix("pages_")] += count
                num_bytes[key.removeprefix("pages_")] += count * client["page_bytes"]
    for name, text, sums in (
        ("memd_pages", "Pages of all clients by state.", pages),
        ("memd_pages_bytes", "Bytes of those pages.", num_bytes),
    ):
        samples = [(f'{{state="{state}"}}', count) for state, count in sums.items()]
        page.family(name, "gauge", text, samples)
    places = [
        (f'{{place="{place}"}}', sum(client[f"{place}_pages"] for client in clients))
        for place in ("memory", "disk", "lost")
    ]
    page.family("memd_pages_by_place", "gauge", "Pages of all clients by place.", places)


def _cuda(page: _Page, cuda: dict[str, Any]) -> None:
    devices = cuda["devices"]
    for name, text, key in (
        ("memd_cuda_rings", "Rings on GPUs that are mapped.", "rings"),
        ("memd_cuda_copies_under_way", "Copies that have not landed.", "copies"),
        ("memd_cuda_staging_bytes", "Page-locked memory for copies.", "staging_bytes"),
        ("memd_cuda_staging_used_bytes", "Of it in use.", "staging_bytes_used"),
    ):
        page.one(name, "gauge", text, sum(device[key] for device in devices))
    num_lost = sum(device["lost_reason"] is not None for device in devices)
    page.one("memd_cuda_devices_lost", "gauge", "GPUs that were given up.", num_lost)
    for field, value in cuda["counters"].items():
        if field in _CUDA_COUNTERS:
            name, unit, text = _CUDA_COUNTERS[field]
            page.one(name, "counter", text, value * unit)


def _requests(page: _Page, stats: dict[str, Any]) -> None:
    requests, errors, latencies = stats["requests"], stats["errors"], stats["latencies"]
    page.family(
        "memd_requests_total",
        "counter",
        "Requests answered.",
        [(f'{{type="{tag}"}}', requests.get(tag, 0)) for tag in _REQUEST_TAGS],
    )
    page.family(
        "memd_request_errors_total",
        "counter",
        "Requests refused.",
        [(f'{{code="{code}"}}', errors.get(code, 0)) for code in ErrorCode],
    )
    samples: list[tuple[str, float]] = []
    for tag in _REQUEST_TAGS:
        latency = latencies.get(tag, {"count": 0, "sum_s": 0.0, "buckets": []})
        ends = [end for end, _ in latency["buckets"]]
        sums = [0, *itertools.accumulate(count for _, count in latency["buckets"])]
        for bound in _BOUNDS_NS:
            count = sums[bisect.bisect_right(ends, bound)]
            samples.append((f'_bucket{{type="{tag}",le="{bound / 1e9:.10g}"}}', count))
        samples.append((f'_bucket{{type="{tag}",le="+Inf"}}', latency["count"]))
        samples.append((f'_sum{{type="{tag}"}}', latency["sum_s"]))
        samples.append((f'_count{{type="{tag}"}}', latency["count"]))
    page.family(
        "memd_request_duration_seconds", "histogram", "From a request to its reply.", samples
    )
