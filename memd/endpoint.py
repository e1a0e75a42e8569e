"""Where a daemon listens: its socket paths, the directory that guards them, and who connects.

An address ``ipc:///DIR/NAME`` stands for three files in DIR, which must be private to its owner
(mode 0700):

===============  ===============================================================================
``NAME``         control: ZeroMQ ROUTER, MessagePack frames
``NAME.attach``  Unix SEQPACKET: hands the region's descriptor over, open while the client lives
``NAME.lock``    flock of the running daemon, and its process id; the kernel drops the lock however
                 the daemon ends
===============  ===============================================================================
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
import stat
import struct
import time
from pathlib import Path

from memd.errors import ConfigError

__all__ = [
    "Endpoint",
    "EndpointLock",
    "Peer",
    "is_allowed_peer",
    "lock_holder",
    "peer_of",
    "private_directory",
    "remove_leftovers",
]

_MAX_SOCKET_PATH_BYTES = 107
# Somebody who only looks (`lock_holder`) holds a lock for microseconds.
_LOCK_PATIENCE_S = 0.1
_UCRED = struct.Struct("3i")


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Paths behind an address.

    Attributes:
        control: Path of the ZeroMQ socket.
    """

    control: Path

    @classmethod
    def parse(cls, address: str) -> Endpoint:
        """The endpoint of an ``ipc://`` address.

        Raises:
            ConfigError: Not ``ipc://`` with an absolute path that fits a socket address.
        """
        scheme, separator, path = address.partition("://")
        if scheme != "ipc" or not separator or not path.startswith("/") or path.endswith("/"):
            raise ConfigError(
                f"an address is ipc:// and an absolute path of a socket, for example "
                f"ipc:///run/memd/control.sock; got {address!r}"
            )
        endpoint = cls(Path(path))
        length = len(os.fsencode(endpoint.attach))
        if length > _MAX_SOCKET_PATH_BYTES:
            raise ConfigError(
                f"the socket path must have at most {_MAX_SOCKET_PATH_BYTES} bytes, "
                f"{endpoint.attach} has {length}; choose a shorter directory"
            )
        return endpoint

    @property
    def address(self) -> str:
        """The address as ZeroMQ wants it."""
        return f"ipc://{self.control}"

    @property
    def attach(self) -> Path:
        """Path of the socket that hands the region over."""
        return self.control.with_name(self.control.name + ".attach")

    @property
    def lock(self) -> Path:
        """Path of the lock file."""
        return self.control.with_name(self.control.name + ".lock")


def private_directory(directory: Path) -> bool:
    """Make sure that only this user can enter ``directory``; True if it had to be created.

    Raises:
        ConfigError: It is no directory, is another user's, or lets others in.
    """
    try:
        directory.mkdir(mode=0o700)
        created = True
    except FileExistsError:
        created = False
    except OSError as error:
        raise ConfigError(f"cannot create {directory}: {error.strerror}") from error
    info = directory.lstat()
    mode = stat.S_IMODE(info.st_mode)
    if not stat.S_ISDIR(info.st_mode):
        raise ConfigError(f"{directory} must be a directory, and no link to one")
    if info.st_uid != os.geteuid() or mode & 0o077:
        raise ConfigError(
            f"{directory} must belong to user {os.geteuid()} with mode 0700, it belongs to "
            f"{info.st_uid} with mode {mode:04o}; choose a directory of your own in the address"
        )
    return created


class EndpointLock:
    """Holds an endpoint for one daemon; a context manager.

    The lock lives as long as its file descriptor, so a killed daemon never leaves one behind, and
    sockets found under a free lock are leftovers that may be removed.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._fd = self._acquire()
        for leftover in (endpoint.control, endpoint.attach):
            leftover.unlink(missing_ok=True)

    def __enter__(self) -> EndpointLock:
        """The lock."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Remove the endpoint's files, then let go of it."""
        for path in (self._endpoint.control, self._endpoint.attach, self._endpoint.lock):
            path.unlink(missing_ok=True)
        os.close(self._fd)

    def _acquire(self) -> int:
        path = self._endpoint.lock
        deadline = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # A daemon that ended in between has removed the file that we opened: a lock on that
                # one says nothing about the file that others see.
                if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                    return fd
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    os.close(fd)
                    raise ConfigError(
                        f"another memd already serves {self._endpoint.address}; see `memd status`"
                    ) from error
                time.sleep(_LOCK_PATIENCE_S / 10)
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)


def lock_holder(endpoint: Endpoint) -> int | None:
    """Process id of the daemon that has taken an endpoint, even if it does not listen yet.

    Returns:
        None if nobody has taken it.
    """
    try:
        with endpoint.lock.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(file.read() or b"0")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    return None


def remove_leftovers(endpoint: Endpoint) -> None:
    """Remove what a daemon that is gone left at an endpoint; nothing if one is running there."""
    directory = endpoint.control.parent
    with contextlib.suppress(ConfigError, FileNotFoundError), EndpointLock(endpoint):
        pass
    # Not empty, or somebody else's: then it is not ours to remove.
    with contextlib.suppress(OSError):
        directory.rmdir()


@dataclasses.dataclass(frozen=True)
class Peer:
    """The process at the other end of a Unix socket, as the kernel reports it.

    Attributes:
        pid: In this process's pid namespace.
        uid: Effective user id when it connected.
        gid: Effective group id when it connected.
    """

    pid: int
    uid: int
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """Who is connected; the answer cannot be forged by the peer."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return Peer(*_UCRED.unpack(raw))


def is_allowed_peer(peer: Peer, *, own_uid: int) -> bool:
    """Whether a process may attach: it must run as the daemon's own user, root is no exception."""
    return peer.uid == own_uid
