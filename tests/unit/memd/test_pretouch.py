from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

import memd.pretouch
from memd.errors import ConfigError
from memd.numa import Node
from memd.pretouch import SLICE_BYTES, can_populate, pretouch

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

SIZE = 5 * SLICE_BYTES + 8192

METHODS = [False] + ([True] if can_populate() else [])


@pytest.fixture
def mapping() -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, SIZE)
    yield np.frombuffer(mmap.mmap(fd, SIZE), dtype=np.uint8), fd
    os.close(fd)


@pytest.mark.parametrize("populate", METHODS)
def test_every_page_is_there_afterwards_and_zero(
    mapping: tuple[npt.NDArray[np.uint8], int], populate: bool
) -> None:
    memory, fd = mapping
    made = pretouch(memory, fd, populate=populate)
    assert os.fstat(fd).st_blocks * 512 >= SIZE
    assert not memory.any()
    assert made.num_bytes == SIZE
    assert made.method == ("populate" if populate else "touch")
    assert made.gib_per_s > 0


@pytest.mark.parametrize("populate", METHODS)
def test_what_is_written_already_stays(
    mapping: tuple[npt.NDArray[np.uint8], int], populate: bool
) -> None:
    memory, fd = mapping
    memory[100] = 7
    if populate:
        pretouch(memory, fd, populate=True)
        assert memory[100] == 7


def test_progress_grows_to_everything(mapping: tuple[npt.NDArray[np.uint8], int]) -> None:
    seen: list[tuple[int, int]] = []
    pretouch(*mapping, progress=lambda ready, total: seen.append((ready, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (SIZE, SIZE)
    assert len(seen) == 6


def test_it_can_be_interrupted(mapping: tuple[npt.NDArray[np.uint8], int]) -> None:
    asked: list[None] = []

    def should_stop() -> bool:
        asked.append(None)
        return len(asked) > 3

    with pytest.raises(InterruptedError):
        pretouch(*mapping, should_stop=should_stop)


@pytest.mark.parametrize("populate", METHODS)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM, errno.EFAULT])
def test_memory_that_ends_is_a_refusal_that_says_how_much_there_was(
    number: int,
    populate: bool,
    mapping: tuple[npt.NDArray[np.uint8], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Kernel:
        def madvise(self, address: int, length: int, advice: int) -> int:
            del address, length, advice
            ctypes.set_errno(number)
            return -1

    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(memd.pretouch, "_libc", Kernel())
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ConfigError, match=r"gave only 0 B of 20\.01 MiB"):
        pretouch(*mapping, populate=populate)


def test_an_error_that_is_not_about_memory_is_no_refusal(
    mapping: tuple[npt.NDArray[np.uint8], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EBADF, "bad descriptor")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="bad descriptor"):
        pretouch(*mapping, populate=False)


def test_slices_go_to_the_nodes_in_turn_by_threads_that_run_there(
    mapping: tuple[npt.NDArray[np.uint8], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, fd = mapping
    cpus_of_thread: dict[int, frozenset[int]] = {}
    touched: dict[int, frozenset[int]] = {}

    def pin(pid: int, cpus: frozenset[int]) -> None:
        assert pid == 0, "only the thread itself"
        cpus_of_thread[threading.get_ident()] = cpus

    def fallocate(fd: int, start: int, length: int) -> None:
        touched[start] = cpus_of_thread[threading.get_ident()]

    monkeypatch.setattr(os, "sched_setaffinity", pin)
    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    even, odd = frozenset({0, 1}), frozenset({2})
    made = pretouch(memory, fd, nodes=[Node(3, even), Node(7, odd)], populate=False)
    assert [touched[start] for start in sorted(touched)] == [even, odd] * 3
    assert made.num_threads == 3


def test_the_callers_own_processors_stay(mapping: tuple[npt.NDArray[np.uint8], int]) -> None:
    before = os.sched_getaffinity(0)
    pretouch(*mapping, nodes=[Node(0, frozenset({min(before)}))])
    assert os.sched_getaffinity(0) == before
