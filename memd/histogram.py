"""Durations in a fixed set of buckets: percentiles of everything since the start, in a few KB.

A bucket is never wider than 1/32 of the durations in it. So a percentile read from the buckets is
never less than the exact one and at most 1/32 (3.2 %) more. All buckets end at a whole number of
nanoseconds, and every power of two is such an end, so coarser histograms can be read off exactly.

::

    1 2 3 ... 64 | 66 68 ... 128 | 132 136 ... 256 | ...        ends of buckets, in ns
    width 1        width 2         width 4           ...        32 buckets for each power of two
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Buckets", "LogHistogram", "percentile_of"]

Buckets = list[tuple[int, int]]
"""Counts by the end of their bucket in nanoseconds (inclusive), ascending; empty ones left out."""

# 2**5 buckets for each power of two.
_FINE_BITS = 5
_FINE = 1 << _FINE_BITS
# 73 minutes; longer ones count as this.
_MAX_BITS = 42


def percentile_of(buckets: Iterable[tuple[int, int]], share: float) -> int:
    """The end of the bucket that holds a percentile (nearest rank); 0 when there is nothing.

    Args:
        buckets: As in ``Buckets``.
        share: 0 to 1; 0.99 for the 99th percentile.

    Returns:
        Nanoseconds.
    """
    entries = list(buckets)
    rank = max(1, math.ceil(share * sum(count for _, count in entries)))
    for end, count in entries:
        rank -= count
        if rank <= 0:
            return end
    return 0


class LogHistogram:
    """Counts durations.

    Attributes:
        count: Durations recorded.
        total_ns: Their sum.
        max_ns: The longest.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total_ns = 0
        self.max_ns = 0
        # By index; there are some 1,200 of them, and those of one kind of request are few.
        self._counts: dict[int, int] = {}

    def record(self, duration_ns: int) -> None:
        """Count one duration."""
        self.count += 1
        self.total_ns += duration_ns
        self.max_ns = max(self.max_ns, duration_ns)
        index = _index(min(max(duration_ns, 1), 1 << _MAX_BITS))
        self._counts[index] = self._counts.get(index, 0) + 1

    def buckets(self) -> Buckets:
        """What was counted."""
        return [(_end(index), count) for index, count in sorted(self._counts.items())]

    def summary(self) -> dict[str, Any]:
        """Plain data; keys as under ``latencies`` in ``memd.metrics``."""
        buckets = self.buckets()
        shares = {"p50_s": 0.5, "p90_s": 0.9, "p99_s": 0.99}
        return {
            "count": self.count,
            "sum_s": self.total_ns / 1e9,
            "max_s": self.max_ns / 1e9,
            # The end of the last bucket may lie above the longest.
            **{
                key: min(percentile_of(buckets, share), self.max_ns) / 1e9
                for key, share in shares.items()
            },
            "buckets": buckets,
        }


def _index(duration_ns: int) -> int:
    """The bucket of a duration, >= 1."""
    below = duration_ns - 1
    shift = max(0, below.bit_length() - _FINE_BITS - 1)
    return (shift << _FINE_BITS) + (below >> shift)


def _end(index: int) -> int:
    """The longest duration of a bucket."""
    shift = max(0, (index >> _FINE_BITS) - 1)
    return (index - (shift << _FINE_BITS) + 1) << shift
