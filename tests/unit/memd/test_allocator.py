from __future__ import annotations

import pytest

from memd.allocator import RangeAllocator
from memd.errors import IntegrityError


def test_ranges_are_given_from_the_lowest_address_on() -> None:
    ranges = RangeAllocator(100)
    assert [ranges.allocate(n) for n in (10, 20, 30)] == [0, 10, 30]
    assert ranges.num_free == 40


def test_the_first_hole_that_is_long_enough_is_taken() -> None:
    ranges = RangeAllocator(100)
    starts = [ranges.allocate(20) for _ in range(5)]
    assert starts == [0, 20, 40, 60, 80]
    ranges.free(20)
    ranges.free(60)
    assert ranges.allocate(5) == 20
    assert ranges.allocate(18) == 60


def test_a_request_longer_than_every_hole_gets_none_although_the_sum_would_do() -> None:
    ranges = RangeAllocator(30)
    for _ in range(3):
        ranges.allocate(10)
    ranges.free(0)
    ranges.free(20)
    assert ranges.num_free == 20
    assert ranges.largest_free == 10
    assert ranges.allocate(11) is None


@pytest.mark.parametrize("order", [(0, 10, 20), (20, 10, 0), (0, 20, 10), (10, 0, 20)])
def test_freed_neighbours_merge_in_every_order(order: tuple[int, ...]) -> None:
    ranges = RangeAllocator(30)
    for _ in range(3):
        ranges.allocate(10)
    for start in order:
        assert ranges.free(start) == 10
        ranges.check_integrity()
    assert ranges.allocate(30) == 0


def test_starts_and_lengths_are_multiples_of_the_alignment() -> None:
    ranges = RangeAllocator(10_000, alignment=4096)
    assert ranges.size == 8192
    assert ranges.allocate(1) == 0
    assert ranges.allocate(4096) == 4096
    assert ranges.num_free == 0
    assert ranges.free(0) == 4096


def test_a_range_that_is_not_allocated_cannot_be_freed() -> None:
    ranges = RangeAllocator(10)
    ranges.allocate(4)
    for start in (1, 4, -1):
        with pytest.raises(KeyError):
            ranges.free(start)


def test_a_range_is_freed_once() -> None:
    ranges = RangeAllocator(10)
    ranges.allocate(4)
    ranges.free(0)
    with pytest.raises(KeyError):
        ranges.free(0)


def test_an_empty_space_gives_nothing() -> None:
    ranges = RangeAllocator(0)
    assert ranges.allocate(1) is None
    assert ranges.largest_free == 0
    ranges.check_integrity()


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_must_be_positive(length: int) -> None:
    with pytest.raises(ValueError, match="positive"):
        RangeAllocator(10).allocate(length)


@pytest.mark.parametrize(("size", "alignment"), [(-1, 1), (10, 0)])
def test_sizes_are_checked(size: int, alignment: int) -> None:
    with pytest.raises(ValueError, match="need size"):
        RangeAllocator(size, alignment=alignment)


def test_a_lost_range_is_found_by_the_integrity_check() -> None:
    ranges = RangeAllocator(10)
    start = ranges.allocate(4)
    assert start is not None
    del ranges._allocated[start]
    with pytest.raises(IntegrityError):
        ranges.check_integrity()


def test_a_wrong_count_is_found_by_the_integrity_check() -> None:
    ranges = RangeAllocator(10)
    ranges._num_free -= 1
    with pytest.raises(IntegrityError, match="free count"):
        ranges.check_integrity()
