"""Requests that cannot be answered at once, and who of them goes on when; no sockets here.

Such a request is a generator: it does a bit of its work, yields what it waits for, and returns its
reply at last. Requests of one connection go on one after the other, in their order; connections go
on in turn. Nothing here blocks.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Generic, TypeVar

from memd.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Generator

__all__ = ["Turn", "Wait", "WaitingRoom"]

Result = TypeVar("Result")


class Wait(enum.Enum):
    """What a request waits for."""

    TURN = enum.auto()
    """Nothing: it goes on when the others have had their turn."""
    EVENT = enum.auto()
    """Something to happen: it goes on after ``WaitingRoom.wake``."""


class Turn(Generic[Result]):
    """A request that has begun.

    Args:
        steps: Its work; returns the result. Whatever it raises is the end of it, too.

    Attributes:
        result: What it returned; None before.
        error: What it raised; None if it has not.
        is_over: Whether it has ended.
        is_asleep: Whether it waits for something to happen.
        is_running: Whether it is at work at this moment.
    """

    def __init__(self, steps: Generator[Wait, None, Result]) -> None:
        self._steps = steps
        self.result: Result | None = None
        self.error: Exception | None = None
        self.is_over = False
        self.is_asleep = False
        self.is_running = False

    def go_on(self) -> bool:
        """Work until it waits or is over; whether it is over."""
        self.is_running = True
        try:
            self.is_asleep = next(self._steps) is Wait.EVENT
        except StopIteration as stop:
            self.result, self.is_over = stop.value, True
        except Exception as error:
            self.error, self.is_over = error, True
        finally:
            self.is_running = False
        return self.is_over

    def give_up(self) -> None:
        """End it where it is."""
        self._steps.close()
        self.is_over = True


class WaitingRoom(Generic[Result]):
    """All requests that wait, by connection."""

    def __init__(self) -> None:
        # First the connection whose turn it is; none without requests.
        self._queues: OrderedDict[bytes, deque[Turn[Result]]] = OrderedDict()

    @property
    def has_work(self) -> bool:
        """Whether some request can go on now."""
        return any(not queue[0].is_asleep for queue in self._queues.values())

    @property
    def num_connections(self) -> int:
        """Connections with requests that wait."""
        return len(self._queues)

    def num_waiting(self, connection: bytes) -> int:
        """Requests of a connection that wait."""
        return len(self._queues.get(connection, ()))

    def add(self, connection: bytes, turn: Turn[Result]) -> None:
        """Have a request wait, behind the connection's others."""
        self._queues.setdefault(connection, deque()).append(turn)

    def wake(self) -> None:
        """Something has happened: whoever slept looks whether it was what he waits for."""
        for queue in self._queues.values():
            queue[0].is_asleep = False

    def step(self) -> Turn[Result] | None:
        """Let one connection's first request go on; that request, if it is over now."""
        for connection, queue in self._queues.items():
            turn = queue[0]
            if turn.is_asleep:
                continue
            if not turn.go_on():
                self._queues.move_to_end(connection)
                return None
            # It may have cancelled those behind it.
            queue = self._queues[connection]
            queue.popleft()
            if queue:
                self._queues.move_to_end(connection)
            else:
                del self._queues[connection]
            return turn
        return None

    def cancel(self, connection: bytes) -> list[Turn[Result]]:
        """Forget a connection's requests; they end where they are.

        Not the one that is at work and asks for this itself, as a ``Goodbye`` does that waited.

        Returns:
            Them, in their order.
        """
        queue = self._queues.pop(connection, deque())
        turns = [turn for turn in queue if not turn.is_running]
        if len(turns) < len(queue):
            self._queues[connection] = deque(turn for turn in queue if turn.is_running)
        # Only now: what one of them does at its end may wake the others.
        for turn in turns:
            turn.give_up()
        return turns

    def check_integrity(self) -> None:
        """Verify that every queue has somebody in it who is not over.

        Raises:
            IntegrityError: One has not.
        """
        for connection, queue in self._queues.items():
            if not queue:
                raise IntegrityError(f"connection {connection.hex()} waits for nothing")
            if any(turn.is_over for turn in queue):
                raise IntegrityError(
                    f"a request of connection {connection.hex()} is over and waits"
                )
            if any(turn.is_asleep for turn in list(queue)[1:]):
                raise IntegrityError(
                    f"connection {connection.hex()} sleeps behind its first request"
                )
