"""A memd inside the test's own process: the real client and the real service, no sockets.

``FakeMemd`` is a ``MemdClient`` in every respect. What it adds is control over time and failure: a
test says when frames are handled, and can take the daemon away.
"""

from __future__ import annotations

import collections
import os
import time
from typing import TYPE_CHECKING

import numpy as np

from memd.client import MemdClient
from memd.protocol import (
    PROTOCOL_VERSION,
    ErrorCode,
    ErrorReply,
    Hello,
    HelloReply,
    KVLayout,
    decode_reply,
    decode_request,
    encode,
)
from memd.registration import Registration
from memd.service import Service
from memd.store import Store
from memd.transfer import HostTransfer

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FakeMemd"]

_CONNECTION = b"in-process"


class _Loop:
    """A channel whose other end is a service in the same process."""

    def __init__(self, service: Service) -> None:
        self.requests: collections.deque[bytes] = collections.deque()
        self.replies: collections.deque[bytes] = collections.deque()
        self.is_held = False
        self.is_dead = False
        self.num_to_refuse = 0
        self._service = service

    def send(self, frame: bytes) -> bool:
        if self.is_dead:
            return False
        self.requests.append(frame)
        return True

    def receive(self) -> bytes | None:
        if not self.is_held:
            self.handle(len(self.requests))
        return self.replies.popleft() if self.replies else None

    def handle(self, count: int) -> None:
        for _ in range(min(count, len(self.requests))):
            if self.is_dead:
                return
            frame = self.requests.popleft()
            if self.num_to_refuse:
                self.num_to_refuse -= 1
                refusal = ErrorReply(
                    request_id=decode_request(frame).request_id,
                    code=ErrorCode.INTERNAL,
                    message="the test refuses it",
                )
                self.replies.append(encode(refusal))
            else:
                reply = self._service.handle(_CONNECTION, frame)
                if reply is not None:
                    self.replies.append(reply)
                while self._service.has_work:
                    self.replies.extend(reply for _, reply in self._service.step())

    def peer_has_closed(self) -> bool:
        return self.is_dead

    def wait(self, timeout_s: float) -> None:
        # Nothing arrives while time passes; this only keeps a held wait from spinning.
        time.sleep(min(timeout_s, 0.001))

    def close(self) -> None:
        self.is_dead = True


class FakeMemd(MemdClient):
    """A client together with its daemon; a context manager. Made by ``create``.

    Requests are handled when the client polls. ``hold`` stops that, ``step`` handles single
    requests, ``resume`` goes on; ``kill`` is what SIGKILL is to a real daemon, ``refuse_next`` an
    internal error.

    Attributes:
        service: The daemon's service, for looking at its state.
    """

    service: Service
    _loop: _Loop

    @classmethod
    def create(
        cls,
        layout: KVLayout,
        *,
        num_pages: int,
        landing_rows: int,
        deadline_s: float = 10.0,
        clock: Callable[[], float] | None = None,
    ) -> FakeMemd:
        """A registered client; arguments are those of ``MemdClient.connect``.

        Args:
            layout: Layout of the pages.
            num_pages: Pages of the extent.
            landing_rows: Rows of the landing ring.
            deadline_s: Bound of every request, in seconds of ``clock``.
            clock: Monotonic seconds; by default a clock that stands still.
        """
        extent_bytes = (
            Store(1 << 62)
            .register(pid=0, name="", layout=layout, num_pages=num_pages, landing_rows=landing_rows)
            .extent_bytes
        )
        region = np.zeros(extent_bytes, dtype=np.uint8)
        service = Service(Store(extent_bytes), HostTransfer(region), address="in-process")
        request = Hello(
            request_id=0,
            version=PROTOCOL_VERSION,
            session=service.open_session(os.getpid()),
            pid=os.getpid(),
            layout=layout,
            num_pages=num_pages,
            landing_bytes=landing_rows * layout.row_bytes,
            name="fake",
        )
        welcome = service.handle(_CONNECTION, encode(request))
        assert welcome is not None, "Hello is answered at once"
        hello = decode_reply(welcome)
        assert isinstance(hello, HelloReply), hello
        loop = _Loop(service)
        fake = cls(
            Registration(loop, hello, region, os.getpid()),
            layout,
            num_pages=num_pages,
            address="in-process",
            deadline_s=deadline_s,
            clock=clock if clock is not None else lambda: 0.0,
        )
        fake.service = service
        fake._loop = loop
        return fake

    @property
    def num_unhandled(self) -> int:
        """Requests that the daemon has not handled yet."""
        return len(self._loop.requests)

    def hold(self) -> None:
        """Handle no request until ``resume`` or ``step``."""
        self._loop.is_held = True

    def step(self, count: int = 1) -> None:
        """Handle the next ``count`` requests; the client sees the replies when it polls."""
        self._loop.handle(count)

    def resume(self) -> None:
        """Handle requests at every poll again, those held back first."""
        self._loop.is_held = False

    def refuse_next(self, count: int = 1) -> None:
        """Answer the next ``count`` requests with an internal error."""
        self._loop.num_to_refuse += count

    def kill(self) -> None:
        """Take the daemon away; replies that it has already sent still arrive."""
        self._loop.is_dead = True
