"""What ``memd top`` shows of one daemon: a frame out of two samples of its stats; pure.

Rates and percentiles are those of the time between the two samples, taken from the difference of
their counters and histograms. Nothing has to be kept in the daemon for it.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from memd.histogram import percentile_of
from memd.sizes import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.console import RenderableType

__all__ = ["Sample", "frame"]

_FETCH = "fetch"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A daemon's stats at one time.

    Attributes:
        stats: Keys as in ``memd.metrics``; those of a daemon that has answered.
        taken_at: Monotonic seconds.
    """

    stats: dict[str, Any]
    taken_at: float


def frame(before: Sample | None, now: Sample) -> RenderableType:
    """One frame.

    Args:
        before: An earlier sample of the same daemon; None: rates since its start.
        now: The newest one.
    """
    stats = now.stats
    daemon = stats["daemon"]
    span_s = daemon["uptime_s"] if before is None else now.taken_at - before.taken_at
    change = _Change({} if before is None else before.stats, stats, max(span_s, 1e-3))
    parts: list[RenderableType] = [
        _pool(stats["region"]),
        *_disk(stats),
        _fetches(change),
        *_devices(stats.get("cuda", {}), change),
        Text(),
        _latencies(change),
        Text(),
        _clients(stats["clients"]),
        Text(),
        _errors(stats),
    ]
    # The address last: it is what may be cut off.
    title = f"memd {daemon['pid']}  {daemon.get('state', 'serving')}  "
    title += f"up {daemon['uptime_s']:.0f} s  {daemon['address']}"
    is_well = stats["integrity"] == "ok"
    return Panel(
        Group(*parts),
        title=title,
        title_align="left",
        subtitle=f"integrity {stats['integrity']}",
        subtitle_align="left",
        border_style="" if is_well else "red",
    )


class _Change:
    """What happened between two samples.

    Args:
        before: Earlier stats; empty: since the start.
        now: Later stats.
        span_s: Seconds between them.
    """

    def __init__(self, before: dict[str, Any], now: dict[str, Any], span_s: float) -> None:
        self._before = before
        self._now = now
        self.span_s = span_s

    def counter(self, name: str) -> int:
        """Growth of a field of ``counters``."""
        before = self._before.get("counters", {}).get(name, 0)
        return int(self._now["counters"][name]) - int(before)

    def rate(self, name: str) -> float:
        """Growth of a field of ``counters`` a second."""
        return self.counter(name) / self.span_s

    def cuda_counter(self, name: str) -> int:
        """Growth of a counter of ``cuda``, which both samples may lack."""
        before, now = (
            int(stats.get("cuda", {}).get("counters", {}).get(name, 0))
            for stats in (self._before, self._now)
        )
        return now - before

    def buckets(self, tags: Iterable[str]) -> list[tuple[int, int]]:
        """Durations of some kinds of requests, as ``memd.histogram.Buckets``."""
        counts: collections.Counter[int] = collections.Counter()
        for tag in tags:
            for stats, sign in ((self._now, 1), (self._before, -1)):
                latency = stats.get("latencies", {}).get(tag, {"buckets": []})
                for end, count in latency["buckets"]:
                    counts[end] += sign * count
        return sorted((end, count) for end, count in counts.items() if count)

    def tags(self) -> list[str]:
        """Kinds of requests that there were."""
        return list(self._now.get("latencies", {}))


def _pool(region: dict[str, Any]) -> RenderableType:
    total = region["memory_bytes"]
    used = total - region["memory_free_bytes"]
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        "pool",
        ProgressBar(total=total, completed=used, width=24),
        f"{format_bytes(used)} of {format_bytes(total)} given to clients, longest free "
        f"run {format_bytes(region['largest_free_bytes'])}, "
        f"{format_bytes(region['dirty_bytes'])} to be zeroed",
    )
    return grid


def _disk(stats: dict[str, Any]) -> list[RenderableType]:
    if "disk" not in stats:
        return []
    disk = stats["disk"]
    used = disk["bytes"] - disk["free_bytes"]
    num_lost = sum(client["lost_pages"] for client in stats["clients"])
    state = "" if disk["is_writable"] else ", takes no more"
    state = state if disk["is_readable"] else ", off"
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        "disk",
        ProgressBar(total=disk["bytes"], completed=used, width=24),
        f"{format_bytes(used)} of {format_bytes(disk['bytes'])}, {disk['pages']:,} pages, "
        f"{disk['puts']:,} went and {disk['gets']:,} came back, {num_lost:,} lost{state}",
    )
    return [grid]


def _fetches(change: _Change) -> RenderableType:
    gather_s = change.counter("gather_ns") / 1e9
    while_gathering = change.counter("bytes_fetched") / gather_s if gather_s else 0
    return Text(
        f"fetch {change.rate('fetches'):,.0f}/s, {change.rate('rows_fetched'):,.0f} rows/s, "
        f"{_rate(change.rate('bytes_fetched'))} ({_rate(while_gathering)} while gathering, "
        f"{gather_s / change.span_s:.0%} of the time)"
    )


def _devices(cuda: dict[str, Any], change: _Change) -> list[RenderableType]:
    """A line for each GPU that memd holds something of, and one for all copies if there are any."""
    devices = cuda.get("devices", [])
    if not devices:
        return []
    lines: list[RenderableType] = [
        Text(f"to GPUs {_rate(change.cuda_counter('bytes_copied') / change.span_s)}")
    ]
    for device in devices:
        told = (
            f"{device['uuid']}: {device['rings']} ring(s), {device['copies']} copies under way, "
            f"{format_bytes(device['staging_bytes_used'])} of "
            f"{format_bytes(device['staging_bytes'])} staging"
        )
        lost = device["lost_reason"]
        lines.append(Text(told if lost is None else f"{device['uuid']}: lost, {lost}"))
    return lines


def _latencies(change: _Change) -> RenderableType:
    table = Table(box=None, pad_edge=False)
    table.add_column("requests")
    for column in ("a second", "p50", "p90", "p99"):
        table.add_column(column, justify="right")
    control = [tag for tag in change.tags() if tag != _FETCH]
    for name, tags in (("fetch", [_FETCH]), ("control", control)):
        buckets = change.buckets(tags)
        count = sum(count for _, count in buckets)
        percentiles = (
            _duration(percentile_of(buckets, share)) if count else "-" for share in (0.5, 0.9, 0.99)
        )
        table.add_row(name, f"{count / change.span_s:,.0f}", *percentiles)
    return table


def _clients(clients: list[dict[str, Any]]) -> RenderableType:
    if not clients:
        return Text("no clients")
    table = Table(box=None, pad_edge=False)
    for column in ("client", "pid", "pages", "of", "bytes", "landing rows", "silent"):
        table.add_column(column, justify="right")
    table.add_column("name")
    for client in clients:
        held = client["pages"] - client["pages_free"]
        table.add_row(
            str(client["client_id"]),
            str(client["pid"]),
            f"{held:,}",
            f"{client['pages']:,}",
            format_bytes(held * client["page_bytes"]),
            f"{client['landing_rows']:,}",
            f"{client.get('silent_s', 0):.0f} s",
            Text(client["name"] or "-"),
        )
    return table


def _errors(stats: dict[str, Any]) -> RenderableType:
    counters = stats["counters"]
    troubles = {
        **stats["errors"],
        "replies dropped": counters["replies_dropped"],
        "processes refused": counters["peers_refused"],
        "clients reclaimed": counters["clients_reclaimed"],
    }
    told = ", ".join(f"{name} {count}" for name, count in troubles.items() if count)
    return Text(f"since the start: {told or 'no errors'}")


def _rate(bytes_per_s: float) -> str:
    return f"{format_bytes(int(bytes_per_s))}/s"


def _duration(duration_ns: int) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if duration_ns >= size:
            return f"{duration_ns / size:.3g} {unit}"
    return f"{duration_ns} ns"
