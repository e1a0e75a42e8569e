from __future__ import annotations

import pytest

from memd.cuda.staging import SLOT_ALIGNMENT, Slot, SlotState, Staging
from memd.errors import IntegrityError

CHUNK = 4 * SLOT_ALIGNMENT


def staging(num_slots: int = 6) -> Staging:
    return Staging(1 << 20, num_slots * SLOT_ALIGNMENT, chunk_bytes=CHUNK)


def taken(slots: Staging, num_bytes: int) -> Slot:
    slot = slots.reserve(num_bytes)
    assert slot is not None
    return slot


def test_a_slot_goes_from_free_to_filling_to_in_flight_to_free() -> None:
    slots = staging()
    slot = taken(slots, 100)
    assert (slot.offset, slot.num_bytes, slot.state) == (1 << 20, 100, SlotState.FILLING)
    slots.sent(slot)
    assert slots.count(SlotState.IN_FLIGHT) == 1
    slots.free(slot)
    assert (slot.state, slots.bytes_used) == (SlotState.FREE, 0)


def test_a_slot_that_is_not_sent_can_be_given_back() -> None:
    slots = staging()
    slots.free(taken(slots, 100))
    assert slots.bytes_used == 0


def test_no_room_is_a_value_and_room_comes_back() -> None:
    slots = staging(num_slots=4)
    first = taken(slots, CHUNK // 2)
    taken(slots, CHUNK // 2)
    assert slots.reserve(1) is None
    slots.free(first)
    assert taken(slots, 1).offset == first.offset


def test_a_slot_never_crosses_from_one_page_locked_chunk_into_the_next() -> None:
    slots = staging(num_slots=8)
    taken(slots, 3 * SLOT_ALIGNMENT)
    across = taken(slots, 2 * SLOT_ALIGNMENT)
    assert across.offset == (1 << 20) + CHUNK


def test_a_slot_of_a_later_chunk_goes_back_to_its_chunk() -> None:
    slots = staging(num_slots=8)
    first, second = taken(slots, CHUNK), taken(slots, CHUNK)
    slots.free(second)
    slots.check_integrity()
    assert taken(slots, CHUNK).offset == second.offset != first.offset


def test_a_slot_longer_than_a_chunk_is_a_mistake_of_the_caller() -> None:
    slots = staging(num_slots=12)
    assert slots.largest_slot == CHUNK
    with pytest.raises(ValueError, match=f"1 to {CHUNK} bytes, got {CHUNK + 1}"):
        slots.reserve(CHUNK + 1)
    with pytest.raises(ValueError, match="got 0"):
        slots.reserve(0)


def test_a_slot_cannot_be_sent_or_freed_twice() -> None:
    slots = staging()
    slot = taken(slots, 8)
    slots.sent(slot)
    with pytest.raises(AssertionError):
        slots.sent(slot)
    slots.free(slot)
    with pytest.raises(AssertionError):
        slots.free(slot)


def test_staging_without_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        Staging(0, 0)


def test_integrity_notices_a_slot_that_is_not_its_range() -> None:
    slots = staging()
    slot = taken(slots, 8)
    slots.check_integrity()
    slot.num_bytes = SLOT_ALIGNMENT + 1
    with pytest.raises(IntegrityError, match="is not its range"):
        slots.check_integrity()


def test_integrity_notices_a_free_slot_that_is_still_held() -> None:
    slots = staging()
    taken(slots, 8).state = SlotState.FREE
    with pytest.raises(IntegrityError, match="free and still held"):
        slots.check_integrity()
