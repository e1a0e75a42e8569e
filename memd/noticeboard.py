"""Where the control thread leaves word of itself for other threads, which never ask it anything.

A reader gets what was posted last and how long ago. It takes no lock and touches neither store nor
sockets, so nothing that it does, or that hangs in it, can hold the daemon up; and it can tell when
the control thread itself has stopped.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Notice", "Noticeboard"]


@dataclasses.dataclass(frozen=True)
class Notice:
    """What the control thread knew at one time.

    Attributes:
        stats: Keys as in ``memd.metrics``; never changed after it was posted.
        posted_at: Seconds of the board's clock.
    """

    stats: dict[str, Any]
    posted_at: float


class Noticeboard:
    """One writer, any readers. Each attribute is replaced as a whole.

    Args:
        clock: Monotonic seconds; injected by tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._notice = Notice({}, clock())
        self._beat_at = clock()

    def beat(self) -> None:
        """The control thread is alive."""
        self._beat_at = self._clock()

    def post(self, stats: dict[str, Any]) -> None:
        """Leave a notice; the caller does not touch ``stats`` any more."""
        self._notice = Notice(stats, self._clock())
        self.beat()

    @property
    def notice(self) -> Notice:
        """The last notice."""
        return self._notice

    @property
    def age_s(self) -> float:
        """Seconds since the last notice."""
        return self._clock() - self._notice.posted_at

    @property
    def silence_s(self) -> float:
        """Seconds since the control thread's last sign of life."""
        return self._clock() - self._beat_at
