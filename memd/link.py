"""Model of the interconnect that fetched rows cross on their way to the engine; pure arithmetic.

On the machine of a test the way from memd's memory to the engine's is a copy in the same memory. A
link says how long it would take over a slower one, and whoever answers a fetch waits until then. It
never makes a copy, and never sleeps.

Transfers occupy the link one after another, whoever asked for them. Each has its bytes on the wire
for ``bytes / rate``, and the last of them arrives ``latency`` later; by then the next transfer's
bytes are on the wire already::

    asked for     A B           C
    on the wire   AAAAAABBB     CCCC
    arrived               A  B        C        each ``latency`` after its last byte left

A link that had nothing to do has saved nothing: the next transfer starts when it is asked for.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Link"]

_BYTES_PER_GIGABIT = 1e9 / 8


class Link:
    """One direction of an interconnect, shared by all clients.

    Args:
        gbps: Rate in gigabits (1e9 bits) a second; 0 means no limit. The 64 GB/s of PCIe 5.0 x16
            are 512.
        latency_us: Time that the last byte of a transfer takes to arrive, in microseconds.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        gbps: float = 0.0,
        latency_us: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("gbps", gbps), ("latency_us", latency_us)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number and not negative, got {value}")
        self._seconds_per_byte = 1 / (gbps * _BYTES_PER_GIGABIT) if gbps else 0.0
        self._latency_s = latency_us * 1e-6
        self._clock = clock
        self._free_at = -math.inf

    def finish_time(self, num_bytes: int) -> float:
        """Put a transfer on the link, behind those that are there.

        Args:
            num_bytes: Its bytes, >= 0.

        Returns:
            When its last byte has arrived, in seconds of the clock. Never before an earlier
            transfer's.
        """
        if num_bytes < 0:
            raise ValueError(f"num_bytes must not be negative, got {num_bytes}")
        self._free_at = max(self._free_at, self._clock()) + num_bytes * self._seconds_per_byte
        return self._free_at + self._latency_s
