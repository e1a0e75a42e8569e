"""What the daemon is doing, and when it is over; pure logic, told of signals and asked by the loop.

::

    STARTING ── ready ──> SERVING ── drain ──> DRAINING
        │                    │                    │  no client left, the bound passed,
        └─ drain, end ───────┴─ end ──────────────┴─ a second drain, end ──> over

A daemon that drains takes no new client. It goes on for those it has, because an engine whose
memory goes away in the middle of a batch loses retrieval for all of it.
"""

from __future__ import annotations

import enum
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DaemonState", "Lifecycle"]


class DaemonState(enum.StrEnum):
    """What ``memd status`` shows."""

    STARTING = "starting"
    """The region is being made; nobody is listened to yet."""
    SERVING = "serving"
    """Clients come and go."""
    DRAINING = "draining"
    """Told to end; goes on for the clients that are there, for a while."""


class Lifecycle:
    """State of one daemon. Its methods may be called from a signal handler of the same thread.

    Args:
        drain_s: Longest time to drain, in seconds; 0: do not drain.
        clock: Monotonic seconds; injected by tests.

    Attributes:
        state: What the daemon is doing.
        end_reason: Why it is over; None while it is not.
        drain_reason: Why it drains; None while it does not.
        drain_deadline: When it stops to wait for its clients, in seconds of the clock; None while
            it does not drain.
    """

    def __init__(self, drain_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.state = DaemonState.STARTING
        self.end_reason: str | None = None
        self.drain_reason: str | None = None
        self.drain_deadline: float | None = None
        self._drain_s = drain_s
        self._clock = clock

    @property
    def is_over(self) -> bool:
        """Whether the daemon should end now."""
        return self.end_reason is not None

    def ready(self) -> None:
        """The region is made and clients may come."""
        self.state = DaemonState.SERVING

    def drain(self, reason: str) -> None:
        """End as soon as no client is left; at once when draining already, or not yet serving."""
        if self.state is not DaemonState.SERVING or self._drain_s <= 0:
            self.end(reason)
            return
        self.drain_reason = reason
        self.drain_deadline = self._clock() + self._drain_s
        self.state = DaemonState.DRAINING

    def end(self, reason: str) -> None:
        """End now; the first reason stays."""
        self.end_reason = self.end_reason or reason

    def check(self, num_clients: int) -> None:
        """End a drain that has reached its aim or its bound.

        Args:
            num_clients: Clients that are registered.
        """
        if self.drain_deadline is None:
            return
        if num_clients == 0:
            self.end(f"{self.drain_reason}, and no client is left")
        elif self._clock() >= self.drain_deadline:
            self.end(
                f"{self.drain_reason}, and {num_clients} client(s) did not leave within "
                f"{self._drain_s:g} s"
            )
