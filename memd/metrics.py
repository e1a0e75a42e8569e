"""What the daemon counts, and the plain data that ``Stats`` answers with.

Keys of the answer (all counts since the daemon started, sizes in bytes, times in seconds):

=============  ==================================================================================
``daemon``     ``pid``, ``version`` (protocol), ``state`` (``memd.lifecycle``), ``uptime_s``,
               ``address``, ``transfer``
``region``     ``bytes``, ``free_bytes``, ``largest_free_bytes``, ``dirty_bytes``: addresses;
               ``memory_bytes``, ``memory_free_bytes``: memory, of which there is less than
               addresses where there is a disk
``clients``    one map each: ``client_id``, ``pid``, ``name``, ``pages``, ``pages_free``,
               ``pages_reserved``, ``pages_sealed``, ``pages_frozen``, ``pages_leaving`` (released,
               but read by a fetch), ``page_bytes``, ``extent_bytes``, ``memory_bytes`` (promised),
               ``memory_pages``, ``disk_pages``, ``lost_pages`` (where pages are), ``landing_rows``,
               ``pending_bytes`` (still to be copied), ``silent_s`` (since its last request),
               ``data_path`` (where fetched rows land: ``host`` or ``cuda_ipc``)
``disk``       only with one: ``bytes``, ``free_bytes``, ``quarantined_bytes`` (found bad),
               ``pages``, ``is_writable``, ``is_readable``, ``eviction``, and the fields of
               ``memd.tiers.disk.DiskCounters`` (``puts``: spilled, ``gets``: promoted, ...)
``cuda``       only with ``--cuda-staging-bytes``: ``counters``, the fields of ``CudaCounters`` of
               ``memd.transfer.cuda_ipc``, and ``devices``, of which memd holds something now, one
               map each: ``uuid``, ``rings``, ``copies`` (under way), ``staging_bytes``,
               ``staging_bytes_used``, ``lost_reason`` (None as long as it works)
``counters``   the fields of ``Counters``
``requests``   answered requests by tag
``errors``     refused requests by ``ErrorCode``
``latencies``  by tag, from the frame to its reply, refused requests left out: ``count``,
               ``sum_s``, ``max_s``, ``p50_s``, ``p90_s``, ``p99_s`` (error in ``memd.histogram``)
               and ``buckets``, pairs of an end in nanoseconds and a count
``integrity``  ``"ok"``, or what does not hold
=============  ==================================================================================

Of a daemon that is still starting only ``daemon`` (``pid``, ``address``, ``state``) is known, to
the metrics endpoint also ``region`` (``bytes``, ``ready_bytes``). ``memd status --json`` leaves
``buckets`` out.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

from memd.histogram import LogHistogram

__all__ = ["Counters", "Metrics"]


@dataclasses.dataclass
class Counters:
    """Plain counters; only ever grow.

    Attributes:
        clients_registered: ``Hello`` that got an extent.
        clients_reclaimed: Registrations that ended without ``Goodbye``: the client died or
            vanished.
        peers_refused: Connections to the attach socket that were turned away.
        replies_dropped: Replies that nobody was there to receive.
        fetches: Fetches done.
        rows_fetched: Rows gathered.
        bytes_fetched: Bytes gathered.
        gather_ns: Nanoseconds spent in gathers.
        gather_max_ns: Longest gather.
        bytes_zeroed: Bytes scrubbed before they could go to another client.
    """

    clients_registered: int = 0
    clients_reclaimed: int = 0
    peers_refused: int = 0
    replies_dropped: int = 0
    fetches: int = 0
    rows_fetched: int = 0
    bytes_fetched: int = 0
    gather_ns: int = 0
    gather_max_ns: int = 0
    bytes_zeroed: int = 0


@dataclasses.dataclass
class Metrics:
    """Everything counted by one daemon.

    Attributes:
        counters: Plain counters.
        requests: Answered requests by tag.
        errors: Refused requests by error code.
        latencies: How long answered requests took, by tag.
    """

    counters: Counters = dataclasses.field(default_factory=Counters)
    requests: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    latencies: dict[str, LogHistogram] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(LogHistogram)
    )

    def answered(self, tag: str, duration_ns: int) -> None:
        """Count one answered request.

        Args:
            tag: Its type on the wire.
            duration_ns: From its frame to its reply.
        """
        self.requests[tag] += 1
        self.latencies[tag].record(duration_ns)

    def fetched(self, *, num_rows: int, num_bytes: int, gather_ns: int) -> None:
        """Count one gather."""
        counters = self.counters
        counters.fetches += 1
        counters.rows_fetched += num_rows
        counters.bytes_fetched += num_bytes
        counters.gather_ns += gather_ns
        counters.gather_max_ns = max(counters.gather_max_ns, gather_ns)

    def snapshot(self) -> dict[str, Any]:
        """Plain data: ``counters``, ``requests``, ``errors``, ``latencies``."""
        return {
            "counters": dataclasses.asdict(self.counters),
            "requests": dict(self.requests),
            "errors": dict(self.errors),
            "latencies": {tag: latency.summary() for tag, latency in self.latencies.items()},
        }
