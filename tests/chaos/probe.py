"""Asks a daemon for its stats, again and again, and times the answers."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import Any

import zmq

from memd.protocol import Stats, StatsReply, decode_reply, encode

__all__ = ["NEVER_MS", "Answer", "Probe"]

NEVER_MS = 1 << 29
"""Time until a connection comes back that must not come back: six days.

ZeroMQ has -1 for this, but then libzmq 4.3.5 gives the session up, and the end of its context may
wait for that session for ever: once in some thousand times when the peer was killed.
"""


@dataclasses.dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        asked_at: Monotonic seconds.
        answered_at: Monotonic seconds.
        stats: Keys in ``memd.metrics``.
    """

    asked_at: float
    answered_at: float
    stats: dict[str, Any]


class Probe:
    """Asks one incarnation of a daemon, over a control connection of its own; a context manager.

    Args:
        address: Where the daemon listens.

    Attributes:
        asked_at: When the last question was asked, in monotonic seconds; 0 before the first.
    """

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._control = self._context.socket(zmq.DEALER)
        self._control.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
        self._control.connect(address)
        self.asked_at = 0.0
        self._open: dict[int, float] = {}
        self._next_id = 0

    def __enter__(self) -> Probe:
        """The probe."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the probe."""
        self.close()

    @property
    def waiting_since(self) -> float | None:
        """When the oldest question without an answer was asked, in monotonic seconds."""
        return min(self._open.values(), default=None)

    def ask(self) -> None:
        """Send a question; returns at once."""
        self._next_id += 1
        self.asked_at = self._open[self._next_id] = time.monotonic()
        with contextlib.suppress(zmq.Again):
            self._control.send(encode(Stats(request_id=self._next_id)), zmq.NOBLOCK)

    def answers(self) -> list[Answer]:
        """The answers that have arrived since the last call."""
        found = []
        while self._control.poll(0):
            reply = decode_reply(self._control.recv())
            assert isinstance(reply, StatsReply), reply
            asked_at = self._open.pop(reply.request_id)
            found.append(Answer(asked_at, time.monotonic(), reply.stats))
        return found

    def wait(self, timeout_s: float) -> Answer | None:
        """Ask and wait for the answer; None if there is none in time."""
        self.ask()
        deadline = time.monotonic() + timeout_s
        newest = self._next_id
        while newest in self._open and (left := deadline - time.monotonic()) > 0:
            if self._control.poll(int(left * 1000) + 1) and (found := self.answers()):
                return found[-1]
        return None

    def close(self) -> None:
        """Close the connection."""
        self._context.destroy(linger=0)
