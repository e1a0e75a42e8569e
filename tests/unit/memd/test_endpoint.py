from __future__ import annotations

import fcntl
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from memd.endpoint import (
    Endpoint,
    EndpointLock,
    Peer,
    is_allowed_peer,
    lock_holder,
    peer_of,
    private_directory,
    remove_leftovers,
)
from memd.errors import ConfigError


def test_an_address_names_three_files_in_one_directory() -> None:
    endpoint = Endpoint.parse("ipc:///run/memd/control.sock")
    assert endpoint.address == "ipc:///run/memd/control.sock"
    assert endpoint.control == Path("/run/memd/control.sock")
    assert endpoint.attach == Path("/run/memd/control.sock.attach")
    assert endpoint.lock == Path("/run/memd/control.sock.lock")


@pytest.mark.parametrize(
    "address",
    ["", "/run/x", "tcp://127.0.0.1:1", "ipc://relative/x", "ipc://", "ipc:///run/", "ipc://@x"],
)
def test_what_is_no_address_is_refused_with_an_example(address: str) -> None:
    with pytest.raises(ConfigError, match="for example ipc:///run/memd"):
        Endpoint.parse(address)


def test_a_path_that_no_socket_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 107 bytes"):
        Endpoint.parse("ipc:///" + "x" * 101)


def test_a_missing_directory_is_created_private(tmp_path: Path) -> None:
    assert private_directory(tmp_path / "new")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    assert not private_directory(tmp_path / "new")


def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="mode 0700"):
        private_directory(tmp_path / "open")


def test_a_link_to_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match="no link"):
        private_directory(tmp_path / "link")


def test_a_directory_without_parent_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot create"):
        private_directory(tmp_path / "missing" / "new")


def test_an_endpoint_is_held_by_one_daemon(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "s")
    with EndpointLock(endpoint), pytest.raises(ConfigError, match="another memd already serves"):
        EndpointLock(endpoint)
    with EndpointLock(endpoint):
        pass


def test_leftovers_of_a_killed_daemon_are_removed(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "s")
    for path in (endpoint.control, endpoint.attach, endpoint.lock):
        path.touch()
    with EndpointLock(endpoint):
        assert not endpoint.control.exists()
        assert not endpoint.attach.exists()
    assert list(tmp_path.iterdir()) == []


def test_the_kernel_tells_who_is_connected() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert peer_of(left) == Peer(os.getpid(), os.geteuid(), os.getegid())


def test_leftovers_are_removed_with_their_directory(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "d" / "s")
    endpoint.control.parent.mkdir()
    endpoint.control.touch()
    remove_leftovers(endpoint)
    assert list(tmp_path.iterdir()) == []
    remove_leftovers(endpoint)


def test_a_running_daemons_files_are_no_leftovers(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "s")
    with EndpointLock(endpoint):
        endpoint.control.touch()
        remove_leftovers(endpoint)
        assert endpoint.control.exists()


def test_a_lock_on_a_removed_file_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = Endpoint(tmp_path / "s")
    flock, removals = fcntl.flock, [endpoint.lock]

    def flock_after_removal(fd: int, how: int) -> None:
        # Another daemon ends between our open and our flock.
        if removals:
            removals.pop().unlink()
        flock(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock_after_removal)
    with EndpointLock(endpoint):
        assert endpoint.lock.exists()
        with pytest.raises(ConfigError, match="another memd"):
            EndpointLock(endpoint)


def test_a_taken_endpoint_tells_by_whom(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "s")
    assert lock_holder(endpoint) is None
    with EndpointLock(endpoint):
        assert lock_holder(endpoint) == os.getpid()
    assert lock_holder(endpoint) is None


def test_a_killed_daemons_lock_is_nobodys(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path / "s")
    endpoint.lock.write_text("123\n")
    assert lock_holder(endpoint) is None


def test_looking_for_the_holder_does_not_keep_a_daemon_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memd.endpoint._LOCK_PATIENCE_S", 5.0)
    endpoint = Endpoint(tmp_path / "s")
    endpoint.lock.touch()
    looking = endpoint.lock.open("rb")
    fcntl.flock(looking, fcntl.LOCK_SH)
    threading.Timer(0.02, looking.close).start()
    with EndpointLock(endpoint):
        assert lock_holder(endpoint) == os.getpid()


@pytest.mark.parametrize(
    ("uid", "own_uid", "allowed"),
    [(1000, 1000, True), (0, 0, True), (1001, 1000, False), (0, 1000, False), (1000, 0, False)],
)
def test_only_the_own_user_may_attach(uid: int, own_uid: int, allowed: bool) -> None:
    assert is_allowed_peer(Peer(1, uid, uid), own_uid=own_uid) is allowed
