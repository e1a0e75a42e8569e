from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from memd.tiers.disk import DiskTier
from memd.tiers.extent import ExtentIO
from memd.tiers.holes import allocated_bytes
from memd.tiers.testing import FakeFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from memd.tiers.mover import Move

PAGE = 16384
OFFSET = 8192
NUM_PAGES = 4


class Setup:
    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(mmap.mmap(fd, 1 << 20), dtype=np.uint8)
        self.file = FakeFile(1 << 20)
        self.disk = DiskTier(Path(), 1 << 20, open_file=lambda directory, num_bytes: self.file)
        self.io = self.extent(owner=1, offset=OFFSET)

    def extent(self, *, owner: int, offset: int, page_bytes: int = PAGE) -> ExtentIO:
        return ExtentIO(
            self.disk,
            owner=owner,
            memory=self.memory,
            fd=self.fd,
            extent_offset=offset,
            page_bytes=page_bytes,
        )

    def page(self, page_id: int) -> npt.NDArray[np.uint8]:
        return self.memory[OFFSET + page_id * PAGE :][:PAGE]


def moved(move: Move | None) -> bool:
    """Whether a page has arrived."""
    return move is not None and move.is_done and move.finish()


@pytest.fixture
def setup() -> Iterator[Setup]:
    fd = os.memfd_create("test")
    os.ftruncate(fd, 1 << 20)
    yield Setup(fd)
    os.close(fd)


def test_a_page_goes_to_disk_and_comes_back_to_its_address(setup: Setup) -> None:
    for page_id in range(NUM_PAGES):
        assert setup.io.fill(page_id)
        setup.page(page_id)[:] = page_id + 1
    assert allocated_bytes(setup.fd) == NUM_PAGES * PAGE
    for page_id in range(NUM_PAGES):
        assert moved(setup.io.spill(page_id, 10 + page_id))
        setup.io.punch(page_id)
    assert allocated_bytes(setup.fd) == 0
    for page_id in (2, 0):
        assert setup.io.fill(page_id)
        assert moved(setup.io.promote(page_id, 10 + page_id))
        assert (setup.page(page_id) == page_id + 1).all()
    assert allocated_bytes(setup.fd) == 2 * PAGE
    assert setup.disk.num_slots == 2, "what is back has no copy any more"


def test_another_generation_does_not_come_back(setup: Setup) -> None:
    setup.page(0)[:] = 1
    assert moved(setup.io.spill(0, 1))
    assert not moved(setup.io.promote(0, 2))
    assert not moved(setup.io.promote(3, 1))


def test_two_owners_with_the_same_pages_do_not_meet(setup: Setup) -> None:
    other = setup.extent(owner=2, offset=OFFSET + NUM_PAGES * PAGE)
    setup.page(0)[:] = 1
    setup.memory[OFFSET + NUM_PAGES * PAGE :][:PAGE] = 2
    assert moved(setup.io.spill(0, 1))
    assert moved(other.spill(0, 1))
    setup.io.punch(0)
    other.punch(0)
    assert moved(setup.io.promote(0, 1))
    assert moved(other.promote(0, 1))
    assert (setup.page(0) == 1).all()
    assert (setup.memory[OFFSET + NUM_PAGES * PAGE :][:PAGE] == 2).all()


def test_a_second_copy_replaces_the_first(setup: Setup) -> None:
    setup.page(0)[:] = 1
    assert moved(setup.io.spill(0, 1))
    setup.page(0)[:] = 2
    assert moved(setup.io.spill(0, 2))
    assert setup.disk.num_slots == 1
    setup.io.punch(0)
    assert moved(setup.io.promote(0, 2))
    assert (setup.page(0) == 2).all()


def test_closing_frees_the_copies_of_this_owner_only(setup: Setup) -> None:
    other = setup.extent(owner=2, offset=OFFSET + NUM_PAGES * PAGE)
    with setup.io as io:
        assert moved(io.spill(0, 1))
        assert moved(io.spill(1, 2))
        assert moved(other.spill(0, 1))
    assert setup.disk.num_slots == 1
    setup.io.close()
    setup.disk.check_integrity()


def test_a_full_disk_is_a_value(setup: Setup) -> None:
    large = setup.extent(owner=1, offset=0, page_bytes=1 << 20)
    assert not moved(large.spill(0, 1))
    large.discard(0)


@pytest.mark.parametrize(("offset", "page_bytes"), [(100, PAGE), (0, 6000)])
def test_pages_that_share_a_memory_page_are_refused(
    setup: Setup, offset: int, page_bytes: int
) -> None:
    with pytest.raises(ValueError, match="pages on disk begin and end with memory pages"):
        setup.extent(owner=1, offset=offset, page_bytes=page_bytes)
