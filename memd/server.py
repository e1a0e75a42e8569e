"""The daemon's loop: sockets, deaths and signals around a ``Service``. One thread, no locks.

Life of a client, as the loop sees it::

    connects to NAME.attach ── uid checked ──> Welcome + region fd, pidfd opened, session opened
    Hello over NAME         ─────────────────> extent
    ...
    pidfd readable or attach connection closed ──> session closed, extent reclaimed, zeroed, free

What the loop waits on: the ZeroMQ ROUTER, the attach listener, every attach connection, every
client's pidfd, the parent's pidfd, and a pipe that signals write to. Returned memory is zeroed in
small steps between two looks at those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import socket
import time
from typing import TYPE_CHECKING

import zmq

from memd.endpoint import (
    Endpoint,
    EndpointLock,
    Peer,
    is_allowed_peer,
    peer_of,
    private_directory,
)
from memd.errors import ConfigError
from memd.liveness import ProcessWatch
from memd.protocol import PROTOCOL_VERSION, ErrorCode, ErrorReply, Welcome, encode
from memd.region import Region
from memd.service import Service
from memd.store import Store
from memd.transfer import HostTransfer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from memd.config import MemdConfig

__all__ = ["Server", "serve"]

_LOG = logging.getLogger(__name__)

# Requests handled before the loop looks at the other sockets again.
_BURST = 256
# Replies that may wait for one client; more than that means that it does not read them.
_MAX_QUEUED_REPLIES = 100_000
_LINGER_MS = 500


@dataclasses.dataclass
class _Attachment:
    """One process on the attach socket."""

    connection: socket.socket
    watch: ProcessWatch
    session: bytes
    hello_deadline: float


class Server:
    """Serves one region until told to stop; a context manager, entered once.

    Entering takes the endpoint, allocates the region and starts to listen; leaving gives everything
    back in the opposite order: sockets, region, endpoint files, directory.

    Args:
        config: Settings.

    Raises:
        ConfigError: On entering: the address or the host's memory does not allow a start.
        InterruptedError: On entering: told to stop while the region was made.
    """

    def __init__(self, config: MemdConfig) -> None:
        self._config = config
        self._endpoint = Endpoint.parse(config.address)
        self._stop_reason: str | None = None
        self._attachments: dict[int, _Attachment] = {}
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Server:
        """Start to listen."""
        with contextlib.ExitStack() as stack:
            self._open(stack)
            self._resources = stack.pop_all()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop to listen and give everything back."""
        for attachment in list(self._attachments.values()):
            self._detach(attachment, "memd ends", reclaim=False)
        self._resources.close()

    def stop(self, reason: str) -> None:
        """Make ``run`` return soon; may be called from a signal handler."""
        self._stop_reason = self._stop_reason or reason
        with contextlib.suppress(OSError, AttributeError):
            self._wake_writer.send(b"\0")

    def run(self) -> None:
        """Serve until ``stop`` is called or the parent process ends."""
        more_to_scrub = False
        while self._stop_reason is None:
            events = dict(self._poller.poll(0 if more_to_scrub else self._timeout_ms()))
            if self._router in events:
                self._serve_requests()
            for fd in events:
                if isinstance(fd, int):
                    self._on_fd(fd)
            self._check_time()
            more_to_scrub = self._service.scrub(self._config.scrub_bytes)
        _LOG.info("stopping: %s", self._stop_reason)

    def _open(self, stack: contextlib.ExitStack) -> None:
        config, endpoint = self._config, self._endpoint
        wake_reader, self._wake_writer = socket.socketpair()
        stack.enter_context(wake_reader)
        stack.enter_context(self._wake_writer)
        wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        self._wake_reader = wake_reader
        stack.enter_context(self._signals())

        self._parent: ProcessWatch | None = None
        if config.parent_pid is not None:
            self._parent = stack.enter_context(ProcessWatch(config.parent_pid))

        directory = endpoint.control.parent
        if private_directory(directory):
            stack.callback(self._remove_directory)
        stack.enter_context(EndpointLock(endpoint))

        begin = time.monotonic()
        region = stack.enter_context(
            Region(config.region_bytes, should_stop=self._should_stop, progress=self._on_progress)
        )
        self._region = region
        _LOG.info("%d bytes ready after %.2f s", region.num_bytes, time.monotonic() - begin)
        self._service = Service(
            Store(region.num_bytes),
            HostTransfer(region.memory),
            address=endpoint.address,
            max_frame_bytes=config.max_frame_bytes,
        )
        stack.callback(self._drop_service)

        self._listener = stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        )
        self._listener.bind(os.fspath(endpoint.attach))
        os.chmod(endpoint.attach, 0o600)
        context = zmq.Context(io_threads=1)
        stack.callback(context.destroy, linger=_LINGER_MS)
        self._router = context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.SNDHWM, _MAX_QUEUED_REPLIES)
        self._router.setsockopt(zmq.RCVHWM, _MAX_QUEUED_REPLIES)
        # Unroutable and blocked replies are errors to be counted here, instead of being dropped
        # inside.
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # The service refuses long frames with a reply; far longer ones end the connection unread.
        self._router.setsockopt(zmq.MAXMSGSIZE, 4 * config.max_frame_bytes)
        self._router.bind(endpoint.address)
        os.chmod(endpoint.control, 0o600)
        # Attaching is the first thing a client does, so it opens last.
        self._listener.listen(config.max_clients)

        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._listener.fileno(), zmq.POLLIN)
        self._poller.register(wake_reader.fileno(), zmq.POLLIN)
        if self._parent is not None and self._parent.fileno() is not None:
            self._poller.register(self._parent.fileno(), zmq.POLLIN)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT stop the loop for the time of this context."""

        def on_signal(number: int, frame: FrameType | None) -> None:
            del frame
            self.stop(signal.Signals(number).name)

        previous = {
            number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _should_stop(self) -> bool:
        if self._parent is not None and self._parent.is_dead:
            self._stop_reason = self._stop_reason or "its parent process has ended"
        return self._stop_reason is not None

    def _on_progress(self, num_ready: int) -> None:
        _LOG.debug("%d of %d bytes ready", num_ready, self._config.region_bytes)

    def _remove_directory(self) -> None:
        # Somebody else's file in it is no reason to fail at the very end.
        with contextlib.suppress(OSError):
            self._endpoint.control.parent.rmdir()

    def _drop_service(self) -> None:
        # Its transfer points into the region; the mapping can only go when nothing does.
        del self._service

    def _timeout_ms(self) -> int | None:
        """How long the loop may sleep: for ever, unless something has to be polled or is due."""
        needs_polling = (self._parent is not None and self._parent.fileno() is None) or any(
            attachment.watch.fileno() is None
            or not self._service.has_said_hello(attachment.session)
            for attachment in self._attachments.values()
        )
        return int(self._config.watch_interval_s * 1000) if needs_polling else None

    def _check_time(self) -> None:
        """What no descriptor reports: deaths without a pidfd, clients that never say Hello."""
        if self._parent is not None and self._parent.is_dead:
            self.stop("its parent process has ended")
        now = time.monotonic()
        for attachment in list(self._attachments.values()):
            if attachment.watch.fileno() is None and attachment.watch.is_dead:
                self._detach(attachment, "its process ended")
            elif now > attachment.hello_deadline and not self._service.has_said_hello(
                attachment.session
            ):
                self._detach(attachment, "it never said Hello")

    def _on_fd(self, fd: int) -> None:
        if fd == self._wake_reader.fileno():
            with contextlib.suppress(BlockingIOError):
                while self._wake_reader.recv(64):
                    pass
        elif fd == self._listener.fileno():
            self._accept()
        elif fd in self._attachments:
            attachment = self._attachments[fd]
            if fd == attachment.watch.fileno():
                self._detach(attachment, "its process ended")
            else:
                self._on_attach_readable(attachment)

    def _on_attach_readable(self, attachment: _Attachment) -> None:
        """A client never speaks on the attach socket: readable means closed; words are ignored."""
        try:
            said = attachment.connection.recv(64)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            self._detach(attachment, "its attach connection closed")

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            _LOG.warning("accept: %s", error)
            return
        connection.setblocking(False)
        peer = peer_of(connection)
        refusal = self._refusal(peer)
        if refusal is not None:
            counters = self._service.metrics.counters
            counters.peers_refused += 1
            if counters.peers_refused == 1:
                _LOG.warning(
                    "refused pid %d (further ones are only counted): %s", peer.pid, refusal
                )
            answer = ErrorReply(request_id=None, code=ErrorCode.PEER_REFUSED, message=refusal)
            with connection, contextlib.suppress(OSError):
                connection.send(encode(answer))
            return
        attachment = _Attachment(
            connection=connection,
            watch=ProcessWatch(peer.pid),
            session=self._service.open_session(peer.pid),
            hello_deadline=time.monotonic() + self._config.hello_grace_s,
        )
        for fd in (connection.fileno(), attachment.watch.fileno()):
            if fd is not None:
                self._attachments[fd] = attachment
                self._poller.register(fd, zmq.POLLIN)
        welcome = Welcome(
            version=PROTOCOL_VERSION,
            session=attachment.session,
            pid=os.getpid(),
            region_bytes=self._region.num_bytes,
        )
        try:
            socket.send_fds(connection, [encode(welcome)], [self._region.fd])
        except OSError as error:
            self._detach(attachment, f"its attach connection failed: {error}")

    def _refusal(self, peer: Peer) -> str | None:
        if not is_allowed_peer(peer, own_uid=os.geteuid()):
            return f"memd serves user {os.geteuid()} only, this process is user {peer.uid}'s"
        num_attached = len({id(attachment) for attachment in self._attachments.values()})
        if num_attached >= self._config.max_clients:
            return f"{num_attached} processes are attached already, the limit is max_clients"
        return None

    def _detach(self, attachment: _Attachment, reason: str, *, reclaim: bool = True) -> None:
        for fd in (attachment.connection.fileno(), attachment.watch.fileno()):
            if fd is not None and self._attachments.pop(fd, None) is not None:
                self._poller.unregister(fd)
        attachment.connection.close()
        attachment.watch.close()
        if reclaim:
            self._service.close_session(attachment.session, reason)

    def _serve_requests(self) -> None:
        for _ in range(_BURST):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # Anything but [sender, frame] is answered as the malformed request that it is.
            sender, frame = frames[0], frames[1] if len(frames) == 2 else b""
            reply = self._service.handle(sender, frame)
            try:
                self._router.send_multipart([sender, reply], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                # It left (its attach connection tells the rest) or does not read its replies.
                self._service.metrics.counters.replies_dropped += 1
                _LOG.debug("a reply found no reader: %s", error)


def serve(config: MemdConfig) -> None:
    """Run a daemon in this process until a signal or its parent's end; print ``READY`` first.

    Raises:
        ConfigError: The address or the host's memory does not allow a start.
    """
    try:
        with Server(config) as server:
            # The one line on stdout: scripts and parents wait for it.
            os.write(1, f"READY {config.address}\n".encode())
            server.run()
    except InterruptedError as error:
        _LOG.info("stopped before it was ready: %s", error)
    except OSError as error:
        raise ConfigError(f"cannot serve {config.address}: {error}") from error
