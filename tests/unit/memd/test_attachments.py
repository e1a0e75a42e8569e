from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import os
import select
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

import memd.attachments
from memd.attachments import Attachments
from memd.config import MemdConfig
from memd.protocol import (
    PROTOCOL_VERSION,
    ErrorReply,
    Hello,
    HelloReply,
    KVLayout,
    Welcome,
    decode_reply,
    decode_welcome,
    encode,
)
from memd.region import Region
from memd.service import Service
from memd.store import Store
from memd.transfer import HostTransfer

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

LAYOUT = KVLayout(num_heads=1, head_dim=4, dtype="float32", page_tokens=8)
CONFIG = MemdConfig(address="ipc:///x/y", region_bytes=1 << 20, max_clients=16)


class Hall:
    """Attachments with a listener of their own, looked after by hand."""

    def __init__(self, directory: Path, stack: contextlib.ExitStack) -> None:
        self._path = os.fspath(directory / "attach")
        self._stack = stack
        self.listener = stack.enter_context(
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        )
        self.listener.bind(self._path)
        self.listener.listen(16)
        self.region = stack.enter_context(Region(CONFIG.region_bytes))
        self.service = Service(Store(CONFIG.region_bytes), HostTransfer(self.region.memory))
        stack.callback(lambda: delattr(self, "service"))
        self.attachments = self.attach(CONFIG)

    def attach(self, config: MemdConfig, listener: Any = None) -> Attachments:
        """Attachments that listen from now on."""
        return self._stack.enter_context(
            Attachments(listener or self.listener, self.service, self.region, config)
        )

    def connect(self) -> socket.socket:
        """A connection of this process that nobody has accepted yet."""
        peer = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        peer.settimeout(5.0)
        peer.connect(self._path)
        return peer

    def connect_child(self) -> subprocess.Popen[str]:
        """A child process that has connected, and lives until it is killed."""
        code = (
            "import socket, sys\n"
            "s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)\n"
            "s.connect(sys.argv[1])\n"
            "print('connected', flush=True)\n"
            "sys.stdin.read()\n"
        )
        child = self._stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", code, self._path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        self._stack.callback(child.kill)
        assert child.stdout is not None
        assert child.stdout.readline() == "connected\n"
        return child

    def say_hello(self, peer: socket.socket) -> None:
        """Read the welcome and answer it."""
        data, fds, _, _ = socket.recv_fds(peer, 4096, 1)
        for fd in fds:
            os.close(fd)
        welcome = decode_welcome(data)
        assert isinstance(welcome, Welcome), welcome
        hello = Hello(
            request_id=0,
            version=PROTOCOL_VERSION,
            session=welcome.session,
            pid=os.getpid(),
            layout=LAYOUT,
            num_pages=1,
            landing_bytes=0,
        )
        reply = self.service.handle(welcome.session, encode(hello))
        assert reply is not None
        assert isinstance(decode_reply(reply), HelloReply)

    def look(self) -> None:
        """What the loop does when it wakes up."""
        if is_readable(self.attachments):
            self.attachments.on_readable()
        self.attachments.check_time()

    @property
    def num_sessions(self) -> int:
        return len(self.service._sessions)


def is_readable(it: Attachments, timeout_ms: int = 0) -> bool:
    poller = select.poll()
    poller.register(it.fileno(), select.POLLIN)
    return bool(poller.poll(timeout_ms))


@pytest.fixture
def hall(tmp_path: Path) -> Iterator[Hall]:
    with contextlib.ExitStack() as stack:
        yield Hall(tmp_path, stack)


def test_with_all_known_and_idle_there_is_nothing_to_look_at(hall: Hall) -> None:
    assert not hall.attachments.needs_polling
    peers = []
    for _ in range(5):
        peers.append(hall.connect())
        hall.look()
    assert hall.attachments.needs_polling
    for peer in peers[:4]:
        hall.say_hello(peer)
    hall.look()
    assert hall.attachments.needs_polling, "one has not said Hello"
    hall.say_hello(peers[4])
    hall.look()
    assert not hall.attachments.needs_polling
    assert not is_readable(hall.attachments)
    assert hall.num_sessions == 5


@pytest.mark.parametrize("has_said_hello", [False, True])
def test_a_connection_that_closes_is_let_go(hall: Hall, has_said_hello: bool) -> None:
    peer, other = hall.connect(), hall.connect()
    hall.look()
    hall.look()
    hall.say_hello(other)
    if has_said_hello:
        hall.say_hello(peer)
    hall.look()
    peer.close()
    hall.look()
    assert hall.num_sessions == 1
    assert not hall.attachments.needs_polling
    assert not is_readable(hall.attachments)


def test_words_on_the_connection_are_ignored(hall: Hall) -> None:
    peer = hall.connect()
    hall.look()
    hall.say_hello(peer)
    peer.send(b"anybody there?")
    hall.look()
    assert hall.num_sessions == 1
    assert not is_readable(hall.attachments)


def test_who_never_says_hello_is_let_go(hall: Hall) -> None:
    hall.attachments = hall.attach(dataclasses.replace(CONFIG, hello_grace_s=0.2))
    peer = hall.connect()
    hall.look()
    assert hall.num_sessions == 1
    select.select([], [], [], 0.25)
    hall.look()
    assert hall.num_sessions == 0
    assert not hall.attachments.needs_polling
    assert peer.recv(4096) != b""
    assert peer.recv(4096) == b""


def test_without_a_pidfd_a_process_is_polled_until_it_ends(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.ENOSYS, "no pidfd")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    peer = hall.connect()
    hall.look()
    hall.say_hello(peer)
    hall.look()
    assert hall.attachments.needs_polling
    peer.close()
    hall.look()
    assert hall.num_sessions == 0
    assert not hall.attachments.needs_polling


def test_a_process_that_ends_is_let_go_once(hall: Hall) -> None:
    child = hall.connect_child()
    hall.look()
    assert hall.num_sessions == 1
    child.kill()
    child.wait(10)
    assert is_readable(hall.attachments)
    hall.look()
    assert hall.num_sessions == 0
    assert not is_readable(hall.attachments)


def test_a_limit_counts_those_that_are_there(hall: Hall) -> None:
    hall.attachments = hall.attach(dataclasses.replace(CONFIG, max_clients=1))
    first, second = hall.connect(), hall.connect()
    hall.look()
    hall.look()
    hall.say_hello(first)
    assert isinstance(decode_welcome(second.recv(4096)), ErrorReply)
    first.close()
    hall.look()
    third = hall.connect()
    hall.look()
    hall.say_hello(third)


class Reordered:
    """An epoll that reports first what is no pidfd, and the listener before those."""

    def __init__(self, epoll: select.epoll, order: list[int]) -> None:
        self._epoll = epoll
        self._order = order

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        return sorted(self._epoll.poll(timeout), key=lambda event: self._order.index(event[0]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


def test_a_newcomer_with_the_descriptors_of_one_that_just_left_stays(hall: Hall) -> None:
    gc.collect()  # what earlier tests left must give no lower number back meanwhile
    child = hall.connect_child()
    hall.look()
    ((connection, pidfd),) = [
        (each.connection.fileno(), each.watch.fileno())
        for each in hall.attachments._attached.values()
    ]
    assert pidfd is not None
    child.kill()
    child.wait(10)
    peer = hall.connect()
    # Left by its connection, its numbers given to the newcomer, and only then its pidfd is told of.
    order = [connection, hall.listener.fileno(), pidfd]
    hall.attachments._epoll = Reordered(hall.attachments._epoll, order)  # type: ignore[assignment]
    hall.look()
    ((new_connection, new_pidfd),) = [
        (each.connection.fileno(), each.watch.fileno())
        for each in hall.attachments._attached.values()
    ]
    assert {new_connection, new_pidfd} == {connection, pidfd}
    hall.say_hello(peer)
    hall.look()
    assert hall.num_sessions == 1


class Failing:
    """A listener that cannot accept so many times."""

    def __init__(self, listener: socket.socket, num_failures: int) -> None:
        self._listener = listener
        self.num_failures = num_failures

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> tuple[socket.socket, Any]:
        if self.num_failures:
            self.num_failures -= 1
            raise OSError(errno.EMFILE, "too many open files")
        return self._listener.accept()


def test_a_listener_that_cannot_accept_rests_and_is_asked_again(
    hall: Hall, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memd.attachments, "_REST_S", 0.05)
    hall.attachments = hall.attach(CONFIG, Failing(hall.listener, 2))
    peer = hall.connect()
    for _ in range(2):
        assert is_readable(hall.attachments)
        hall.look()
        assert not is_readable(hall.attachments), "it would be asked again at once"
        assert hall.attachments.needs_polling
        assert hall.num_sessions == 0
        select.select([], [], [], 0.06)
        hall.attachments.check_time()
    hall.look()
    hall.say_hello(peer)
    hall.look()
    assert hall.num_sessions == 1
    assert not hall.attachments.needs_polling


def test_leaving_gives_every_descriptor_back(hall: Hall, tmp_path: Path) -> None:
    def num_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    peers = [hall.connect() for _ in range(3)]
    gc.collect()  # what earlier tests left must not go meanwhile
    before = num_fds()
    with hall.attach(CONFIG) as attachments:
        for _ in peers:
            attachments.on_readable()
        assert num_fds() == before + 1 + 2 * len(peers)
    assert num_fds() == before
