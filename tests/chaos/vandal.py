"""A process that breaks every rule: garbage, floods, silence, stolen sessions, abrupt ends.

    python -m tests.chaos.vandal ADDRESS SEED

The one thing it may expect is an answer to every frame that is not too long. What it says on its
standard output: ``progress`` and ``left`` with ``counts``, ``violation`` with ``what``, and
``unanswered`` with ``count`` and ``since``, for the conductor to judge: a daemon that was killed
owes nothing.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import zmq

from memd.errors import ProtocolError
from memd.protocol import SESSION_BYTES, Welcome, decode_reply, decode_welcome
from tests.chaos.hostile import hostile_frame, valid_request
from tests.chaos.probe import NEVER_MS
from tests.chaos.reporting import Orders, Progress, say

if TYPE_CHECKING:
    import collections
    from collections.abc import Callable, Iterator

__all__ = ["Vandal", "main"]

_ANSWER_BOUND_S = 10
_TOO_LONG_BYTES = 17 << 20
_FAR_TOO_LONG_BYTES = 65 << 20
# More than a daemon attaches at a time, with its default of 64.
_FLOOD = 70
_DEAF_PINGS = 3000


class Vandal:
    """Random mischief against one address.

    Args:
        address: Where memd listens.
        rng: Source of every decision.
        counts: What was done, added to.
    """

    def __init__(
        self, address: str, rng: np.random.Generator, counts: collections.Counter[str]
    ) -> None:
        self._address = address
        self._path = address.removeprefix("ipc://")
        self._rng = rng
        self._counts = counts
        self._actions: dict[Callable[[], None], float] = {
            self._garbage: 10,
            self._garbage_of_a_client: 4,
            self._oversize: 0.3,
            self._far_oversize: 0.3,
            self._silence: 1,
            self._words_on_the_attach_socket: 1,
            self._flood: 0.3,
            self._deafness: 0.3,
            self._no_zmtp: 1,
            self._many_parts: 0.5,
            self._same_name: 0.5,
        }
        self._weights = np.array(list(self._actions.values())) / sum(self._actions.values())
        self._acting_since = 0.0

    def act(self) -> None:
        """One random misdeed; a daemon that is not there spoils it."""
        action = list(self._actions)[self._rng.choice(len(self._weights), p=self._weights)]
        self._counts[action.__name__.lstrip("_")] += 1
        self._acting_since = time.monotonic()
        with contextlib.suppress(OSError, zmq.Again):
            action()

    def _garbage(self) -> None:
        with self._control() as control:
            self._expect_answers(control, [hostile_frame(self._rng) for _ in range(100)])

    def _garbage_of_a_client(self) -> None:
        """Registered, then nonsense, then gone without a word."""
        with self._control() as control, self._attached() as (_, session):
            hello = msgspec.msgpack.encode(valid_request("hello", self._rng, session))
            frames = [hostile_frame(self._rng, session) for _ in range(100)]
            self._expect_answers(control, [hello, *frames])

    def _oversize(self) -> None:
        with self._control() as control:
            self._expect_answers(control, [bytes(_TOO_LONG_BYTES)])

    def _far_oversize(self) -> None:
        """memd ends the connection unread; nobody may wait for an answer."""
        with self._control() as control:
            control.send(bytes(_FAR_TOO_LONG_BYTES))
            control.poll(200)

    def _silence(self) -> None:
        with contextlib.ExitStack() as stack:
            for _ in range(self._rng.integers(1, 5)):
                stack.enter_context(self._attached())
            time.sleep(float(self._rng.uniform(0, 0.5)))

    def _words_on_the_attach_socket(self) -> None:
        with self._attached() as (connection, _):
            connection.send(self._rng.bytes(int(self._rng.integers(1, 2000))))

    def _flood(self) -> None:
        """More processes than memd takes; the last ones are told so."""
        with contextlib.ExitStack() as stack:
            for _ in range(_FLOOD):
                stack.enter_context(self._attached())

    def _deafness(self) -> None:
        """Ask much, read nothing, leave."""
        with self._control(receive_limit=1) as control:
            ping = msgspec.msgpack.encode({"type": "ping", "request_id": 1})
            for _ in range(_DEAF_PINGS):
                control.send(ping)
            time.sleep(float(self._rng.uniform(0, 0.2)))

    def _no_zmtp(self) -> None:
        """Something else than ZeroMQ on the control socket, or only half of its greeting."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
            stream.settimeout(1.0)
            stream.connect(self._path)
            greeting = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03"
            stream.sendall(greeting if self._rng.random() < 0.5 else self._rng.bytes(200))
            time.sleep(float(self._rng.uniform(0, 0.2)))

    def _many_parts(self) -> None:
        with self._control() as control:
            control.send_multipart([b"part"] * int(self._rng.integers(2, 500)))
            self._take_answers(control, 1)

    def _same_name(self) -> None:
        """Two connections that claim the same routing id."""
        with self._control(b"twin") as one, self._control(b"twin") as other:
            ping = msgspec.msgpack.encode({"type": "ping", "request_id": 1})
            for control in (one, other):
                control.send(ping)
            # ZeroMQ serves the first and ignores the second; which is which is not said.
            one.poll(100)
            other.poll(100)

    def _expect_answers(self, control: zmq.Socket[bytes], frames: list[bytes]) -> None:
        for frame in frames:
            control.send(frame)
        self._take_answers(control, len(frames))
        self._counts["frames_answered"] += len(frames)

    def _take_answers(self, control: zmq.Socket[bytes], count: int) -> None:
        """Every frame gets one reply, and each reply can be decoded."""
        for index in range(count):
            if not control.poll(_ANSWER_BOUND_S * 1000):
                say("unanswered", count=count - index, since=self._acting_since)
                return
            try:
                decode_reply(control.recv())
            except ProtocolError as error:
                say("violation", what=f"memd sent what is no reply: {error}")
        if control.poll(0):
            say("violation", what=f"more than {count} replies to {count} frames")

    @contextlib.contextmanager
    def _control(
        self, name: bytes | None = None, receive_limit: int = 0
    ) -> Iterator[zmq.Socket[bytes]]:
        """A connection to the control socket, left without ceremony."""
        # ZeroMQ would wait for ever for an address that nobody serves.
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(self._path)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        try:
            control = context.socket(zmq.DEALER)
            control.setsockopt(zmq.RECONNECT_IVL, NEVER_MS)
            control.setsockopt(zmq.RCVHWM, receive_limit)
            # A daemon that was killed takes nothing, and never comes back for this connection.
            control.setsockopt(zmq.SNDTIMEO, 1000)
            if name is not None:
                control.setsockopt(zmq.ROUTING_ID, name)
            control.connect(self._address)
            yield control
        finally:
            context.destroy(linger=0)

    @contextlib.contextmanager
    def _attached(self) -> Iterator[tuple[socket.socket, bytes]]:
        """A connection to the attach socket and its session; all zero if memd refused it."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_ANSWER_BOUND_S)
            connection.connect(self._path + ".attach")
            data, fds, _, _ = socket.recv_fds(connection, 4096, 1)
            for fd in fds:
                os.close(fd)
            welcome = decode_welcome(data) if data else None
            session = welcome.session if isinstance(welcome, Welcome) else bytes(SESSION_BYTES)
            yield connection, session


def main(address: str, seed: int) -> int:
    """Misbehave until told to leave."""
    orders, progress = Orders(), Progress()
    rng = np.random.default_rng(seed)
    vandal = Vandal(address, rng, progress.counts)
    while not orders.is_leaving:
        vandal.act()
        progress.counts["steps"] += 1
        progress.tell()
        time.sleep(float(rng.exponential(0.05)))
    say("left", counts=progress.counts)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
