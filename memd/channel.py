"""How a client's frames reach memd, and how the client learns that memd is gone."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
import weakref
from typing import TYPE_CHECKING, Protocol

import zmq

from memd.errors import MemdTimeout, MemdUnavailable, ProtocolError
from memd.protocol import PROTOCOL_VERSION, ErrorReply, Welcome, decode_welcome

if TYPE_CHECKING:
    from memd.endpoint import Endpoint

__all__ = ["Channel", "ZmqChannel", "ask_once", "attach"]

_MAX_WELCOME_BYTES = 4096
# Six days.
_NEVER_MS = 1 << 29
_LINGER_MS = 200
# As an enum's member, asking for it would take longer than asking ZeroMQ.
_POLLIN = int(zmq.POLLIN)


class Channel(Protocol):
    """An ordered, non-blocking path to one daemon."""

    def send(self, frame: bytes) -> bool:
        """Queue a frame; False when the path is broken. Never blocks."""
        ...

    def receive(self) -> bytes | None:
        """The next reply frame that has arrived, if any. Never blocks."""
        ...

    def peer_has_closed(self) -> bool:
        """Whether the daemon is gone for good; costs about a microsecond."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Sleep until a reply or the daemon's end, at most ``timeout_s`` seconds."""
        ...

    def close(self) -> None:
        """Give everything back; frames already queued still go out, within a bound."""
        ...


def attach(endpoint: Endpoint, timeout_s: float) -> tuple[socket.socket, Welcome, int]:
    """Connect to the attach socket.

    Returns:
        The connection (its end is memd's end), memd's welcome, and the region's file descriptor.

    Raises:
        MemdUnavailable: Nobody listens, or memd refused this process.
        MemdTimeout: Somebody listens but did not answer in ``timeout_s`` seconds.
        ProtocolError: The answer is not that of a memd of this version.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fds: list[int] = []
    try:
        connection.settimeout(timeout_s)
        connection.connect(os.fspath(endpoint.attach))
        data, fds, _, _ = socket.recv_fds(connection, _MAX_WELCOME_BYTES, 1)
        if not data:
            raise MemdUnavailable(f"memd at {endpoint.address} closed the connection")
        welcome = decode_welcome(data)
        if isinstance(welcome, ErrorReply):
            raise MemdUnavailable(f"memd at {endpoint.address} refused: {welcome.message}")
        if welcome.version != PROTOCOL_VERSION or len(fds) != 1:
            raise ProtocolError(
                f"memd at {endpoint.address} speaks protocol version {welcome.version}, this "
                f"client {PROTOCOL_VERSION}; run the same release on both sides"
            )
        os.set_inheritable(fds[0], False)
        connection.setblocking(False)
    except BaseException as error:
        connection.close()
        for fd in fds:
            os.close(fd)
        if isinstance(error, TimeoutError):
            raise MemdTimeout(
                f"memd at {endpoint.address} did not answer in {timeout_s:g} s"
            ) from error
        if isinstance(error, OSError):
            raise MemdUnavailable(
                f"nobody serves {endpoint.address} ({error.strerror}); start one with "
                f"`memd serve --address {endpoint.address} --bytes 4GiB`"
            ) from error
        raise
    return connection, welcome, fds[0]


def _open_control(context: zmq.Context[zmq.Socket[bytes]], endpoint: Endpoint) -> zmq.Socket[bytes]:
    """A DEALER to the control socket that neither drops frames nor comes back after a break."""
    control: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    # Bounded by the client's own limits; a high-water mark would block or drop.
    control.setsockopt(zmq.SNDHWM, 0)
    control.setsockopt(zmq.RCVHWM, 0)
    # A daemon that comes back is another daemon: it knows nothing of this client. With -1, ZeroMQ's
    # word for never, the end of its context may wait for a lost session for ever (libzmq 4.3.5).
    control.setsockopt(zmq.RECONNECT_IVL, _NEVER_MS)
    control.setsockopt(zmq.LINGER, _LINGER_MS)
    control.connect(endpoint.address)
    return control


class ZmqChannel:
    """The real path: ZeroMQ for frames, the attach connection for memd's end.

    Args:
        endpoint: Where memd listens.
        connection: From ``attach``; owned and closed by the channel.
    """

    def __init__(self, endpoint: Endpoint, connection: socket.socket) -> None:
        self._connection = connection
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._control = _open_control(self._context, endpoint)
        # The kernel closes the connection however memd ends, SIGKILL included.
        self._end = select.poll()
        self._end.register(connection.fileno(), select.POLLIN)
        self._any = zmq.Poller()
        self._any.register(self._control, zmq.POLLIN)
        self._any.register(connection.fileno(), zmq.POLLIN)
        # A channel that was forgotten in a cycle is collected together with all that only it knows,
        # and then a context can wait for ever for a socket that is garbage, too. So what is to be
        # closed is also known here, which closes it as soon as the channel itself is gone.
        self._forgotten = weakref.finalize(
            self, _close_forgotten, self._context, self._control, connection, os.getpid()
        )

    def send(self, frame: bytes) -> bool:
        """Queue a frame; see ``Channel.send``."""
        try:
            self._control.send(frame, zmq.NOBLOCK)
        except zmq.ZMQError:
            return False
        return True

    def receive(self) -> bytes | None:
        """The next reply; see ``Channel.receive``."""
        if not int(self._control.getsockopt(zmq.EVENTS)) & _POLLIN:
            return None
        try:
            frames = self._control.recv_multipart(zmq.NOBLOCK)
        except zmq.ZMQError:
            return None
        return frames[-1]

    def peer_has_closed(self) -> bool:
        """Whether memd is gone; see ``Channel.peer_has_closed``."""
        # memd says nothing after its welcome, so anything to read here is the end.
        return bool(self._end.poll(0))

    def wait(self, timeout_s: float) -> None:
        """Sleep; see ``Channel.wait``."""
        self._any.poll(max(0, int(timeout_s * 1000)))

    def close(self) -> None:
        """Close both; see ``Channel.close``."""
        self._forgotten.detach()
        with contextlib.suppress(zmq.ZMQError):
            self._context.destroy(linger=_LINGER_MS)
        self._connection.close()


def _close_forgotten(
    context: zmq.Context[zmq.Socket[bytes]],
    control: zmq.Socket[bytes],
    connection: socket.socket,
    owner_pid: int,
) -> None:
    """Close what a channel that nobody closed has left; frames that are still queued are lost."""
    # A forked child has nothing of it but the connection.
    if os.getpid() == owner_pid:
        with contextlib.suppress(zmq.ZMQError):
            control.close(linger=0)
            context.term()
    connection.close()


def ask_once(endpoint: Endpoint, frame: bytes, timeout_s: float) -> bytes:
    """Send one request that needs no ``Hello`` and give the reply frame.

    Attaches nowhere, so it takes no client's place.

    Raises:
        MemdUnavailable: Nobody listens.
        MemdTimeout: No reply within ``timeout_s`` seconds.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        # ZeroMQ would silently wait for a socket to appear; a plain connect tells at once. To the
        # daemon it is a connection that ends before its first byte.
        probe.settimeout(timeout_s)
        try:
            probe.connect(os.fspath(endpoint.control))
        except OSError as error:
            raise MemdUnavailable(f"nobody serves {endpoint.address}: {error.strerror}") from error
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
    try:
        control = _open_control(context, endpoint)
        control.send(frame)
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > 0:
            if control.poll(int(left * 1000) + 1):
                return control.recv_multipart()[-1]
        raise MemdTimeout(f"memd at {endpoint.address} did not answer in {timeout_s:g} s")
    finally:
        context.destroy(linger=0)
