from __future__ import annotations

import pytest

from memd.tiers.eviction import eviction_policy
from memd.tiers.mover import PageMover, Progress
from memd.tiers.tiered import Place, TieredPages


class Journal:
    """Moves nothing, and notes what it was asked for; a ``PageIO``."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int]] = []
        self.is_disk_full = False
        self.is_memory_short = False
        self.rotten: set[int] = set()

    def spill(self, page_id: int, generation: int) -> bool:
        assert generation > 0
        self.steps.append(("spill", page_id))
        return not self.is_disk_full

    def promote(self, page_id: int, generation: int) -> bool:
        assert generation > 0
        self.steps.append(("promote", page_id))
        return page_id not in self.rotten

    def discard(self, page_id: int) -> None:
        self.steps.append(("discard", page_id))

    def fill(self, page_id: int) -> bool:
        self.steps.append(("fill", page_id))
        return not self.is_memory_short

    def punch(self, page_id: int) -> None:
        self.steps.append(("punch", page_id))

    def taken(self) -> list[tuple[str, int]]:
        steps, self.steps = self.steps, []
        return steps


class Setup:
    """Four pages, of which two fit."""

    def __init__(self) -> None:
        self.pages = TieredPages(4, 2, eviction_policy("lru", 4))
        self.io = Journal()
        self.mover = PageMover(self.pages, self.io)

    def write(self, *page_ids: int) -> None:
        """Frozen pages, brought in with whatever it takes."""
        self.pages.reserve(page_ids)
        while self.mover.bring(page_ids) is Progress.MOVED:
            pass
        self.pages.commit(page_ids)
        self.pages.freeze(page_ids)
        self.io.taken()


@pytest.fixture
def setup() -> Setup:
    return Setup()


def test_reserved_pages_get_memory_one_a_step(setup: Setup) -> None:
    setup.pages.reserve([0, 1])
    assert setup.mover.bring([0, 1]) is Progress.MOVED
    assert setup.io.taken() == [("fill", 0)]
    assert setup.mover.bring([0, 1]) is Progress.DONE
    assert setup.io.taken() == [("fill", 1)]
    assert setup.mover.bring([0, 1]) is Progress.DONE
    assert setup.io.taken() == []


def test_a_page_leaves_before_another_comes(setup: Setup) -> None:
    setup.write(0, 1)
    setup.pages.reserve([2])
    assert setup.mover.bring([2]) is Progress.MOVED
    assert setup.io.taken() == [("spill", 0), ("punch", 0)]
    assert setup.mover.bring([2]) is Progress.DONE
    assert setup.io.taken() == [("fill", 2)]


def test_a_page_on_disk_comes_back_to_its_place(setup: Setup) -> None:
    setup.write(0, 1)
    setup.write(2)
    setup.pages.pin([0])
    assert setup.mover.bring([0]) is Progress.MOVED
    assert setup.io.taken() == [("spill", 1), ("punch", 1)]
    assert setup.mover.bring([0]) is Progress.DONE
    assert setup.io.taken() == [("fill", 0), ("promote", 0)]
    assert setup.pages.place(0) is Place.HOST


def test_memory_that_nobody_uses_is_not_written_to_disk(setup: Setup) -> None:
    setup.write(0, 1)
    setup.mover.release([0])
    setup.pages.reserve([2])
    assert setup.mover.bring([2]) is Progress.MOVED
    assert setup.io.taken() == [("punch", 0)]


def test_a_page_that_does_not_come_back_is_lost_and_takes_no_memory(setup: Setup) -> None:
    setup.write(0, 1)
    setup.write(2)
    setup.io.rotten.add(0)
    setup.mover.release([1])
    setup.pages.pin([0])
    assert setup.mover.bring([0]) is Progress.MOVED
    setup.io.taken()
    assert setup.mover.bring([0]) is Progress.DONE
    assert setup.io.taken() == [("fill", 0), ("promote", 0), ("punch", 0)]
    assert setup.pages.lost_among([0]).tolist() == [0]


def test_a_full_disk_is_told_and_no_page_leaves(setup: Setup) -> None:
    setup.write(0, 1)
    setup.io.is_disk_full = True
    setup.pages.reserve([2])
    assert setup.mover.bring([2]) is Progress.STUCK
    assert setup.io.taken() == [("spill", 0)]
    assert setup.pages.count(Place.HOST) == 2
    setup.io.is_disk_full = False
    assert setup.mover.bring([2]) is Progress.MOVED


def test_pages_that_are_all_read_are_told(setup: Setup) -> None:
    setup.write(0, 1)
    setup.pages.pin([0, 1])
    setup.pages.reserve([2])
    assert setup.mover.bring([2]) is Progress.STUCK
    setup.pages.unpin([1])
    assert setup.mover.bring([2]) is Progress.MOVED


def test_memory_that_the_kernel_does_not_have_is_told(setup: Setup) -> None:
    setup.io.is_memory_short = True
    setup.pages.reserve([0])
    assert setup.mover.bring([0]) is Progress.STUCK
    assert setup.pages.place(0) is Place.HOLE


def test_a_page_is_not_lost_for_want_of_memory(setup: Setup) -> None:
    setup.write(0, 1)
    setup.write(2)
    setup.mover.release([1, 2])
    setup.pages.pin([0])
    assert setup.mover.bring([0]) is Progress.MOVED
    setup.io.is_memory_short = True
    assert setup.mover.bring([0]) is Progress.STUCK
    assert setup.pages.place(0) is Place.DISK


def test_room_is_kept_ahead_of_need(setup: Setup) -> None:
    setup.write(0, 1)
    assert setup.mover.keep_room(2) is Progress.MOVED
    assert setup.io.taken() == [("spill", 0), ("punch", 0)]
    assert setup.mover.keep_room(2) is Progress.MOVED
    assert setup.mover.keep_room(2) is Progress.DONE
    setup.io.taken()
    assert setup.mover.keep_room(0) is Progress.DONE
    assert setup.io.taken() == []


def test_room_is_not_kept_by_force(setup: Setup) -> None:
    setup.write(0, 1)
    setup.pages.thaw([0, 1])
    assert setup.mover.keep_room(1) is Progress.STUCK


def test_releasing_a_page_on_disk_frees_its_copy(setup: Setup) -> None:
    setup.write(0, 1)
    setup.write(2)
    setup.mover.release([0, 1])
    assert setup.io.taken() == [("discard", 0)]
