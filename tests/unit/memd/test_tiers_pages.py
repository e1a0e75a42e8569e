from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from memd.errors import IntegrityError
from memd.store import OutOfRange, WrongState
from memd.tiers.eviction import eviction_policy
from memd.tiers.tiered import Place, RoomPlan, TieredPages, Use

if TYPE_CHECKING:
    from collections.abc import Sequence


def tiered(num_pages: int = 8, host_pages: int = 4, policy: str = "lru") -> TieredPages:
    return TieredPages(num_pages, host_pages, eviction_policy(policy, num_pages))


def write(pages: TieredPages, page_ids: Sequence[int]) -> None:
    """Reserve, fill and seal; there must be room."""
    pages.reserve(page_ids)
    for page_id in pages.missing(page_ids).tolist():
        pages.filled(page_id)
    pages.commit(page_ids)


def spill(pages: TieredPages, *page_ids: int) -> None:
    for page_id in page_ids:
        assert pages.spilled(page_id, pages.generation(page_id))


def places(pages: TieredPages) -> list[Place]:
    return [pages.place(page_id) for page_id in range(pages.num_pages)]


class TestLife:
    def test_a_page_is_a_hole_until_it_is_filled(self) -> None:
        pages = tiered()
        pages.reserve([3, 5])
        assert pages.missing([3, 5]).tolist() == [3, 5]
        pages.filled(3)
        assert pages.missing([3, 5]).tolist() == [5]
        assert pages.host_room == 3
        assert pages.use(3) is Use.RESERVED

    def test_a_page_goes_to_disk_and_comes_back(self) -> None:
        pages = tiered()
        write(pages, [0])
        pages.freeze([0])
        spill(pages, 0)
        assert pages.place(0) is Place.DISK
        assert pages.host_room == 4
        assert pages.missing([0]).tolist() == [0]
        pages.promoted(0)
        assert pages.place(0) is Place.HOST
        assert pages.use(0) is Use.FROZEN
        pages.check_integrity()
        counters = pages.counters
        assert (counters.filled, counters.spilled, counters.promoted) == (1, 1, 1)

    def test_a_page_that_does_not_come_back_is_lost_until_it_is_released(self) -> None:
        pages = tiered()
        write(pages, [0, 1])
        pages.freeze([0, 1])
        spill(pages, 0)
        pages.lost(0)
        assert pages.lost_among([0, 1]).tolist() == [0]
        assert not pages.missing([0, 1]).size
        assert pages.counters.lost == 1
        pages.thaw([0])
        assert pages.release([0]).size == 0
        assert pages.place(0) is Place.HOLE

    def test_a_released_page_keeps_its_memory_and_gives_up_its_copy(self) -> None:
        pages = tiered()
        write(pages, [0, 1, 2])
        pages.freeze([0])
        spill(pages, 0)
        assert pages.release([0, 1]).tolist() == [0]
        assert places(pages)[:3] == [Place.HOLE, Place.HOST, Place.HOST]
        pages.reserve([1])
        assert not pages.missing([1]).size

    def test_a_frozen_page_that_was_released_is_not_spilled(self) -> None:
        pages = tiered(host_pages=2)
        write(pages, [0, 1])
        pages.freeze([0, 1])
        pages.release([0])
        pages.reserve([0])
        assert pages.plan_room(2) is None
        pages.check_integrity()

    def test_every_freezing_is_another_generation(self) -> None:
        pages = tiered()
        write(pages, [0, 1])
        pages.freeze([0, 1])
        seen = {pages.generation(0), pages.generation(1)}
        for _ in range(3):
            pages.thaw([0])
            pages.freeze([0])
            assert pages.generation(0) not in seen
            seen.add(pages.generation(0))


class TestWhoMayLeave:
    def test_only_frozen_pages_that_nobody_reads_do(self) -> None:
        pages = tiered(host_pages=4)
        write(pages, [0, 1, 2])
        pages.reserve([3])
        pages.filled(3)
        pages.freeze([1, 2])
        pages.pin([2])
        assert pages.plan_room(1) == RoomPlan([], [1])
        assert pages.plan_room(2) is None
        pages.unpin([2])
        assert pages.plan_room(2) == RoomPlan([], [1, 2])

    def test_two_readers_pin_twice(self) -> None:
        pages = tiered(host_pages=1)
        write(pages, [0])
        pages.freeze([0])
        pages.pin([0])
        pages.pin([0])
        pages.unpin([0])
        assert pages.plan_room(1) is None
        pages.unpin([0])
        assert pages.plan_room(1) is not None

    def test_free_memory_goes_before_pages_that_somebody_wants(self) -> None:
        pages = tiered(host_pages=3)
        write(pages, [0, 1, 2])
        pages.freeze([2])
        pages.release([0, 1])
        assert pages.plan_room(1) == RoomPlan([1], [])
        assert pages.plan_room(3) == RoomPlan([0, 1], [2])

    def test_a_plan_changes_nothing(self) -> None:
        pages = tiered(host_pages=2)
        write(pages, [0, 1])
        pages.freeze([0, 1])
        assert pages.plan_room(1) == pages.plan_room(1) == RoomPlan([], [0])
        assert pages.count(Place.HOST) == 2

    def test_where_there_is_room_nothing_leaves(self) -> None:
        pages = tiered(host_pages=4)
        write(pages, [0])
        assert pages.plan_room(3) == RoomPlan([], [])

    def test_more_than_the_budget_is_never_planned(self) -> None:
        assert tiered(host_pages=4).plan_room(5) is None

    def test_used_pages_stay(self) -> None:
        pages = tiered(host_pages=2)
        write(pages, [0, 1])
        pages.freeze([0, 1])
        pages.touch([0])
        assert pages.plan_room(1) == RoomPlan([], [1])

    def test_the_end_of_a_prompt_leaves_before_its_beginning(self) -> None:
        pages = tiered(host_pages=3, policy="depth")
        write(pages, [0, 1, 2])
        pages.freeze([2, 0, 1], [0, 1, 2])
        assert pages.plan_room(3) == RoomPlan([], [1, 0, 2])

    @pytest.mark.parametrize("verb", ["thaw", "pin", "release"])
    def test_a_copy_made_too_late_is_of_no_use(self, verb: str) -> None:
        pages = tiered()
        write(pages, [0])
        pages.freeze([0])
        generation = pages.generation(0)
        getattr(pages, verb)([0])
        assert not pages.spilled(0, generation)
        assert pages.place(0) is Place.HOST

    def test_two_copies_move_a_page_once(self) -> None:
        pages = tiered()
        write(pages, [0])
        pages.freeze([0])
        spill(pages, 0)
        assert not pages.spilled(0, pages.generation(0))
        assert pages.counters.spilled == 1

    def test_a_copy_of_what_was_there_before_is_of_no_use(self) -> None:
        pages = tiered()
        write(pages, [0])
        pages.freeze([0])
        generation = pages.generation(0)
        pages.thaw([0])
        pages.freeze([0])
        assert not pages.spilled(0, generation)
        spill(pages, 0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("verb", "rule"),
        [
            ("commit", "commit needs RESERVED"),
            ("freeze", "freeze needs SEALED"),
            ("thaw", "thaw needs FROZEN"),
            ("release", "release needs pages that are held"),
            ("pin", "only SEALED pages are readable"),
            ("unpin", "unpin needs pages that are pinned"),
        ],
    )
    def test_a_free_page_is_refused_and_nothing_changes(self, verb: str, rule: str) -> None:
        pages = tiered()
        with pytest.raises(
            WrongState, match=f"{rule}.*: page 1 is FREE, its place HOLE and 1 more"
        ):
            getattr(pages, verb)([1, 2])
        assert places(pages) == [Place.HOLE] * 8

    def test_a_page_that_is_held_is_not_reserved(self) -> None:
        pages = tiered()
        write(pages, [1])
        with pytest.raises(WrongState, match="reserve needs FREE pages: page 1 is SEALED"):
            pages.reserve([0, 1])
        assert pages.use(0) is Use.FREE

    def test_a_page_that_never_had_memory_is_not_sealed(self) -> None:
        pages = tiered()
        pages.reserve([0])
        with pytest.raises(WrongState, match="its place HOLE"):
            pages.commit([0])

    def test_a_page_on_disk_comes_back_before_it_is_thawed(self) -> None:
        pages = tiered()
        write(pages, [0])
        pages.freeze([0])
        spill(pages, 0)
        with pytest.raises(WrongState, match=r"thaw needs pages in host memory: .* its place DISK"):
            pages.thaw([0])

    def test_a_page_that_is_read_is_not_released(self) -> None:
        pages = tiered()
        write(pages, [0])
        pages.pin([0])
        with pytest.raises(WrongState, match="release needs pages that nobody reads"):
            pages.release([0])

    @pytest.mark.parametrize("page_ids", [[-1], [8], [0, 9], [1, 1]])
    def test_ids_that_are_no_pages_are_refused(self, page_ids: list[int]) -> None:
        pages = tiered()
        for verb in (pages.reserve, pages.freeze, pages.touch, pages.missing, pages.release):
            with pytest.raises(OutOfRange):
                verb(page_ids)

    def test_depths_are_one_for_each_page(self) -> None:
        pages = tiered()
        write(pages, [0, 1])
        with pytest.raises(OutOfRange, match="2 pages need as many depths, got 1"):
            pages.freeze([0, 1], [3])
        assert pages.use(0) is Use.SEALED

    def test_no_page_is_always_right(self) -> None:
        pages = tiered()
        for verb in (pages.reserve, pages.commit, pages.freeze, pages.thaw, pages.pin, pages.unpin):
            verb([])
        pages.touch(np.array([], dtype=np.int64))
        assert pages.release([]).size == 0

    @pytest.mark.parametrize("host_pages", [0, 9])
    def test_a_budget_is_some_of_the_pages(self, host_pages: int) -> None:
        with pytest.raises(ValueError, match=f"host_pages must be 1 to 8, got {host_pages}"):
            tiered(host_pages=host_pages)


class TestIntegrity:
    def test_a_wrong_count_is_found(self) -> None:
        pages = tiered()
        pages._places[0] = Place.HOST
        with pytest.raises(IntegrityError, match="pages by place"):
            pages.check_integrity()

    def test_a_page_in_a_place_it_cannot_be_is_found(self) -> None:
        pages = tiered()
        write(pages, [2])
        pages._uses[2] = Use.FREE
        pages.check_integrity()
        pages._uses[1] = Use.SEALED
        with pytest.raises(IntegrityError, match="page 1 is SEALED and its place is HOLE"):
            pages.check_integrity()

    def test_a_page_that_may_go_and_would_not_be_chosen_is_found(self) -> None:
        pages = tiered()
        write(pages, [0])
        pages._uses[0] = Use.FROZEN
        with pytest.raises(IntegrityError, match="the policy would choose among other pages"):
            pages.check_integrity()

    def test_more_pages_than_the_budget_are_found(self) -> None:
        pages = tiered(host_pages=2)
        write(pages, [0, 1])
        pages.host_pages = 1
        with pytest.raises(IntegrityError, match="1 pages more than the budget"):
            pages.check_integrity()
