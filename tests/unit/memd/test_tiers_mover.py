from __future__ import annotations

import dataclasses

import pytest

from memd.tiers.eviction import eviction_policy
from memd.tiers.mover import PageMover, Progress
from memd.tiers.tiered import Place, TieredPages


@dataclasses.dataclass
class FakeMove:
    """A page that arrives when the test says so."""

    is_whole: bool
    is_done: bool

    def finish(self) -> bool:
        assert self.is_done
        return self.is_whole


class Journal:
    """Moves nothing, and notes what it was asked for; a ``PageIO``."""

    def __init__(self) -> None:
        self.is_slow = False
        self.last: FakeMove | None = None
        self.steps: list[tuple[str, int]] = []
        self.is_disk_full = False
        self.is_disk_broken = False
        self.gone: set[int] = set()
        self.is_memory_short = False
        self.rotten: set[int] = set()

    def spill(self, page_id: int, generation: int) -> FakeMove | None:
        assert generation > 0
        self.steps.append(("spill", page_id))
        return None if self.is_disk_full else self._move(not self.is_disk_broken)

    def promote(self, page_id: int, generation: int) -> FakeMove | None:
        assert generation > 0
        self.steps.append(("promote", page_id))
        return None if page_id in self.gone else self._move(page_id not in self.rotten)

    def arrive(self) -> None:
        """Let the page that is on its way arrive."""
        assert self.last is not None
        self.last.is_done = True

    def _move(self, is_whole: bool) -> FakeMove:
        self.last = FakeMove(is_whole, not self.is_slow)
        return self.last

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


def test_a_page_that_cannot_be_written_stays(setup: Setup) -> None:
    setup.write(0, 1)
    setup.io.is_disk_broken = True
    setup.pages.reserve([2])
    assert setup.mover.bring([2]) is Progress.STUCK
    assert setup.io.taken() == [("spill", 0)]
    assert setup.pages.place(0) is Place.HOST


def test_a_page_without_a_copy_is_lost_and_takes_no_memory(setup: Setup) -> None:
    setup.write(0, 1)
    setup.write(2)
    setup.io.gone.add(0)
    setup.mover.release([1])
    setup.pages.pin([0])
    assert setup.mover.bring([0]) is Progress.MOVED
    setup.io.taken()
    assert setup.mover.bring([0]) is Progress.DONE
    assert setup.io.taken() == [("fill", 0), ("promote", 0), ("punch", 0)]
    assert setup.pages.place(0) is Place.LOST


class TestOnItsWay:
    """While a page is on its way to disk or back, nothing else of the client is moved."""

    def begin_to_spill(self, setup: Setup) -> None:
        setup.write(0, 1)
        setup.io.is_slow = True
        setup.pages.reserve([2])
        assert setup.mover.bring([2]) is Progress.MOVING
        assert setup.mover.is_moving
        assert setup.io.taken() == [("spill", 0)]

    def test_everybody_waits_for_it(self, setup: Setup) -> None:
        self.begin_to_spill(setup)
        assert setup.mover.bring([2]) is Progress.MOVING
        assert setup.mover.keep_room(1) is Progress.MOVING
        assert setup.io.taken() == []
        setup.io.arrive()
        assert not setup.mover.is_moving
        assert setup.mover.bring([2]) is Progress.DONE
        assert setup.io.taken() == [("punch", 0), ("fill", 2)]

    @pytest.mark.parametrize("verb", ["pin", "thaw", "release"])
    def test_a_page_that_is_wanted_meanwhile_stays(self, setup: Setup, verb: str) -> None:
        self.begin_to_spill(setup)
        if verb == "release":
            setup.mover.release([0])
        else:
            getattr(setup.pages, verb)([0])
        setup.io.arrive()
        setup.mover.keep_room(0)
        assert setup.io.taken() == [("discard", 0)], "the copy is of no use"
        assert setup.pages.place(0) is Place.HOST
        setup.pages.check_integrity()

    def test_a_page_comes_back_when_it_has_arrived(self, setup: Setup) -> None:
        setup.write(0, 1)
        setup.write(2)
        setup.mover.release([1])
        setup.pages.pin([0])
        assert setup.mover.bring([0]) is Progress.MOVED
        setup.io.is_slow = True
        assert setup.mover.bring([0]) is Progress.MOVING
        assert setup.pages.place(0) is Place.DISK
        setup.io.arrive()
        assert setup.mover.bring([0]) is Progress.DONE
        assert setup.pages.place(0) is Place.HOST
