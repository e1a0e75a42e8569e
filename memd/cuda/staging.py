"""Who owns which bytes of the page-locked memory that copies to a device read; pure bookkeeping.

The life of a slot::

    FREE --reserve--> FILLING --sent--> IN_FLIGHT --free--> FREE
                         \\_______________free_____________/

FILLING slots are written by the control thread. IN_FLIGHT ones are read by the device at any time,
so nobody writes them until the device is known to be done. A slot is as long as its copy, and never
crosses from one page-locked chunk into the next: to the driver those are two allocations.

::

    | chunk 0                              | chunk 1                       |
    | slot | slot    | free        | slot  | free                          |

This module must not know CUDA, clients or memory.
"""

from __future__ import annotations

import dataclasses
import enum

from memd.allocator import RangeAllocator
from memd.cuda.registration import CHUNK_BYTES
from memd.errors import IntegrityError

__all__ = ["SLOT_ALIGNMENT", "Slot", "SlotState", "Staging"]

SLOT_ALIGNMENT = 512
"""Bytes; what an allocation of CUDA's is aligned to."""


class SlotState(enum.Enum):
    """Who may touch a slot: nobody, the control thread, the device."""

    FREE = "free"
    FILLING = "filling"
    IN_FLIGHT = "in flight"


@dataclasses.dataclass(eq=False)
class Slot:
    """Bytes for one copy.

    Attributes:
        offset: First byte, counted from where the staging memory's offsets count from.
        num_bytes: Bytes of the copy.
        state: Who may touch them; changed by ``Staging`` alone. FREE is for ever.
    """

    offset: int
    num_bytes: int
    state: SlotState = SlotState.FILLING


class Staging:
    """All slots of one device.

    Args:
        offset: Where the staging memory begins; slots carry offsets from the same origin.
        num_bytes: Bytes of it, >= 1.
        chunk_bytes: Bytes that are page-locked by one call, as ``PageLock`` was told.
    """

    def __init__(self, offset: int, num_bytes: int, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        if num_bytes < 1 or chunk_bytes < 1:
            raise ValueError(f"staging needs bytes, got {num_bytes} in chunks of {chunk_bytes}")
        self.offset = offset
        self.num_bytes = num_bytes
        self._chunks = {
            offset + start: RangeAllocator(
                min(chunk_bytes, num_bytes - start), alignment=SLOT_ALIGNMENT
            )
            for start in range(0, num_bytes, chunk_bytes)
        }
        self._chunk_bytes = chunk_bytes
        self._slots: dict[int, Slot] = {}

    @property
    def largest_slot(self) -> int:
        """Bytes of the longest slot that there can be."""
        return max(chunk.size for chunk in self._chunks.values())

    @property
    def bytes_used(self) -> int:
        """Bytes in slots, padding included."""
        return sum(chunk.num_allocated for chunk in self._chunks.values())

    def count(self, state: SlotState) -> int:
        """Slots in a state other than FREE."""
        return sum(slot.state is state for slot in self._slots.values())

    def reserve(self, num_bytes: int) -> Slot | None:
        """A slot to fill; None when no chunk has room for it now.

        Raises:
            ValueError: No slot can be that long.
        """
        if not 1 <= num_bytes <= self.largest_slot:
            raise ValueError(f"a slot has 1 to {self.largest_slot} bytes, got {num_bytes}")
        for start, chunk in self._chunks.items():
            place = chunk.allocate(num_bytes)
            if place is not None:
                slot = Slot(start + place, num_bytes)
                self._slots[slot.offset] = slot
                return slot
        return None

    def sent(self, slot: Slot) -> None:
        """Say that the device reads a slot from now on."""
        assert slot.state is SlotState.FILLING, f"a {slot.state.value} slot was sent"
        slot.state = SlotState.IN_FLIGHT

    def free(self, slot: Slot) -> None:
        """Give a slot back: it will not be sent, or the device is done with it."""
        assert slot.state is not SlotState.FREE, "a slot was freed twice"
        slot.state = SlotState.FREE
        del self._slots[slot.offset]
        start = slot.offset - (slot.offset - self.offset) % self._chunk_bytes
        self._chunks[start].free(slot.offset - start)

    def check_integrity(self) -> None:
        """Verify that slots and allocated ranges are the same, inside one chunk each.

        Raises:
            IntegrityError: They are not.
        """
        found: dict[int, int] = {}
        for start, chunk in self._chunks.items():
            chunk.check_integrity()
            found |= {start + place: length for place, length in chunk.allocated().items()}
        if found.keys() != self._slots.keys():
            raise IntegrityError(f"slots begin at {sorted(self._slots)}, ranges at {sorted(found)}")
        for offset, slot in self._slots.items():
            if slot.offset != offset or not 0 < slot.num_bytes <= found[offset]:
                raise IntegrityError(f"slot {slot} is not its range of {found[offset]} bytes")
            if slot.state is SlotState.FREE:
                raise IntegrityError(f"slot at {offset} is free and still held")
