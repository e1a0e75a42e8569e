from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

from memd.liveness import ProcessWatch


@pytest.fixture(params=[True, False], ids=["pidfd", "polling"])
def use_pidfd(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def start() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_the_end_of_a_process_is_noticed(use_pidfd: bool) -> None:
    with start() as child, ProcessWatch(child.pid, use_pidfd=use_pidfd) as watch:
        assert not watch.is_dead
        child.kill()
        child.wait(10)
        assert watch.is_dead


def test_a_zombie_is_dead_to_a_pidfd() -> None:
    with start() as child, ProcessWatch(child.pid) as watch:
        fd = watch.fileno()
        assert fd is not None
        child.kill()
        assert select.select([fd], [], [], 10)[0] == [fd]
        assert watch.is_dead
        child.wait(10)


def test_a_process_that_is_gone_already_is_dead(use_pidfd: bool) -> None:
    with start() as child:
        child.kill()
        child.wait(10)
    with ProcessWatch(child.pid, use_pidfd=use_pidfd) as watch:
        assert watch.is_dead


def test_the_last_answer_stays_after_close(use_pidfd: bool) -> None:
    with start() as child:
        watch = ProcessWatch(child.pid, use_pidfd=use_pidfd)
        child.kill()
        child.wait(10)
        assert watch.is_dead
        watch.close()
        assert watch.is_dead
        assert watch.fileno() is None


def test_another_users_process_is_alive(use_pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    with ProcessWatch(os.getpid(), use_pidfd=use_pidfd) as watch:
        assert not watch.is_dead


def test_a_kernel_without_pidfd_is_polled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with ProcessWatch(os.getpid()) as watch:
        assert watch.fileno() is None
        assert not watch.is_dead
