"""Who is attached: the processes at the attach socket, from their first byte to their end.

A process that connects is told who it must be (this user's, one of at most ``max_clients``), gets a
session and the region's descriptor, and is watched from then on by its pidfd and its connection.
Whichever of the two says first that it is gone closes its session. What a session means is the
service's business.

All of them are behind one descriptor, so that a look at it costs the same beside many idle
processes as beside none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import resource
import select
import socket
import time
from typing import TYPE_CHECKING

from memd.endpoint import Peer, is_allowed_peer, peer_of
from memd.lifecycle import DaemonState
from memd.liveness import ProcessWatch
from memd.protocol import PROTOCOL_VERSION, ErrorCode, ErrorReply, Welcome, encode

if TYPE_CHECKING:
    from memd.config import MemdConfig
    from memd.region import Region
    from memd.service import Service

__all__ = ["Attachments"]

_LOG = logging.getLogger(__name__)

_REST_S = 0.5
# ZeroMQ ends the process when a client connects to the control socket and there is none left.
_SPARE_DESCRIPTORS = 32


@dataclasses.dataclass
class _Attachment:
    """One process on the attach socket."""

    connection: socket.socket
    watch: ProcessWatch
    session: bytes
    hello_deadline: float


class Attachments:
    """All attached processes; a context manager, which lets go of them.

    Args:
        listener: The attach socket, listening; stays the caller's.
        service: Opens and closes sessions.
        region: What is handed out.
        config: Settings.
    """

    def __init__(
        self,
        listener: socket.socket,
        service: Service,
        region: Region,
        config: MemdConfig,
    ) -> None:
        self._listener = listener
        self._service = service
        self._region = region
        self._config = config
        # By session: all of them, and those that no descriptor tells enough about (`check_time`).
        self._attached: dict[bytes, _Attachment] = {}
        self._by_time: dict[bytes, _Attachment] = {}
        # By descriptor: connection and pidfd of each process.
        self._by_fd: dict[int, _Attachment] = {}
        self._num_failures = 0
        # When the listener is looked at again; None while it is.
        self._resume_at: float | None = None
        self._epoll = select.epoll()
        self._epoll.register(listener.fileno(), select.EPOLLIN)

    def __enter__(self) -> Attachments:
        """The attachments."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Let go of every process; its session ends with the service."""
        for attachment in list(self._attached.values()):
            self._forget(attachment)
        self._epoll.close()

    def fileno(self) -> int:
        """Descriptor that is readable when ``on_readable`` has something to do."""
        return self._epoll.fileno()

    def on_readable(self) -> None:
        """See to whoever comes, goes or says something."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._by_fd:
                self._on_descriptor(fd, self._by_fd[fd])

    @property
    def needs_polling(self) -> bool:
        """Whether ``check_time`` has to be called now and then."""
        return self._resume_at is not None or bool(self._by_time)

    def check_time(self) -> None:
        """What no descriptor reports: deaths without a pidfd, clients that never say Hello."""
        if not self.needs_polling:
            return
        now = time.monotonic()
        if self._resume_at is not None and now >= self._resume_at:
            self._resume_at = None
            self._epoll.modify(self._listener.fileno(), select.EPOLLIN)
        for attachment in list(self._by_time.values()):
            has_pidfd = attachment.watch.fileno() is not None
            if not has_pidfd and attachment.watch.is_dead:
                self._detach(attachment, "its process ended")
            elif self._service.has_said_hello(attachment.session):
                if has_pidfd:
                    del self._by_time[attachment.session]
            elif now > attachment.hello_deadline:
                self._detach(attachment, "it never said Hello")

    def _rest(self, error: OSError) -> None:
        """Leave the listener alone for a while: it stays readable, and asking again at once fails.

        The usual reason is that all descriptors are taken; each client that leaves gives some back.
        """
        if self._num_failures == 0:
            _LOG.warning("cannot accept (further failures are only counted): %s", error)
        self._num_failures += 1
        self._epoll.modify(self._listener.fileno(), 0)
        self._resume_at = time.monotonic() + _REST_S

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            self._rest(error)
            return
        connection.setblocking(False)
        peer = peer_of(connection)
        refusal = self._refusal(peer) or self._descriptors_refusal(connection)
        if refusal is not None:
            self._turn_away(connection, peer, *refusal)
            return
        attachment = _Attachment(
            connection=connection,
            watch=ProcessWatch(peer.pid),
            session=self._service.open_session(peer.pid),
            hello_deadline=time.monotonic() + self._config.hello_grace_s,
        )
        self._attached[attachment.session] = attachment
        self._by_time[attachment.session] = attachment
        welcome = Welcome(
            version=PROTOCOL_VERSION,
            session=attachment.session,
            pid=os.getpid(),
            region_bytes=self._region.num_bytes,
        )
        try:
            for fd in (connection.fileno(), attachment.watch.fileno()):
                if fd is not None:
                    self._epoll.register(fd, select.EPOLLIN)
                    self._by_fd[fd] = attachment
            socket.send_fds(connection, [encode(welcome)], [self._region.fd])
        except OSError as error:
            self._detach(attachment, f"its attach connection failed: {error}")

    def _refusal(self, peer: Peer) -> tuple[ErrorCode, str] | None:
        if not is_allowed_peer(peer, own_uid=os.geteuid()):
            return (
                ErrorCode.PEER_REFUSED,
                f"memd serves user {os.geteuid()} only, this process is user {peer.uid}'s",
            )
        if self._service.state is DaemonState.DRAINING:
            return ErrorCode.DRAINING, "memd is ending and takes no new clients"
        num_attached = len(self._attached)
        if num_attached >= self._config.max_clients:
            return (
                ErrorCode.PEER_REFUSED,
                f"{num_attached} processes are attached already, the limit is "
                f"--max-clients {self._config.max_clients}",
            )
        return None

    @staticmethod
    def _descriptors_refusal(connection: socket.socket) -> tuple[ErrorCode, str] | None:
        """Why there are too few descriptors for another process; None if there are enough.

        The kernel gives the lowest number that is free.
        """
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if connection.fileno() < limit - _SPARE_DESCRIPTORS:
            return None
        return (
            ErrorCode.PEER_REFUSED,
            f"memd has {limit} descriptors at most and too few of them left; raise "
            "RLIMIT_NOFILE (systemd: LimitNOFILE, shell: ulimit -n)",
        )

    def _turn_away(
        self, connection: socket.socket, peer: Peer, code: ErrorCode, reason: str
    ) -> None:
        # That memd is ending is nothing to complain of.
        if code is not ErrorCode.DRAINING:
            counters = self._service.metrics.counters
            counters.peers_refused += 1
            if counters.peers_refused == 1:
                _LOG.warning(
                    "refused pid %d (further ones are only counted): %s",
                    peer.pid,
                    reason,
                    extra={"client_pid": peer.pid},
                )
        answer = ErrorReply(request_id=None, code=code, message=reason)
        with connection, contextlib.suppress(OSError):
            connection.send(encode(answer))

    def _on_descriptor(self, fd: int, attachment: _Attachment) -> None:
        """Look at a process; what was reported may have been about an earlier one's descriptor."""
        if fd == attachment.watch.fileno():
            if attachment.watch.is_dead:
                self._detach(attachment, "its process ended")
            return
        # A client never speaks on the attach socket: readable means closed; words are ignored.
        try:
            said = attachment.connection.recv(64)
        except BlockingIOError:
            return
        except OSError:
            said = b""
        if not said:
            self._detach(attachment, "its attach connection closed")

    def _detach(self, attachment: _Attachment, reason: str) -> None:
        self._forget(attachment)
        self._service.close_session(attachment.session, reason)

    def _forget(self, attachment: _Attachment) -> None:
        del self._attached[attachment.session]
        self._by_time.pop(attachment.session, None)
        for fd in (attachment.connection.fileno(), attachment.watch.fileno()):
            if fd is not None and self._by_fd.pop(fd, None) is not None:
                self._epoll.unregister(fd)
        attachment.connection.close()
        attachment.watch.close()
