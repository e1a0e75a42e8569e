"""First-fit allocation of contiguous ranges of an integer space; pure bookkeeping, no memory.

Used twice: memd carves clients' extents (bytes) out of its region, and a client hands out runs of
its landing ring (rows). Freed neighbours are merged at once, so the free list holds as few ranges
as the live ones force, and both operations cost O(number of free ranges), a handful in practice.
"""

from __future__ import annotations

import bisect

from memd.errors import IntegrityError

__all__ = ["RangeAllocator"]


class RangeAllocator:
    """Ranges of ``[0, size)``, first fit, lowest address first.

    Every unit is either in exactly one allocated range or in exactly one free range, and two free
    ranges never touch.

    Args:
        size: Units to hand out, >= 0.
        alignment: Every allocated start and length is a multiple of it, >= 1.
    """

    def __init__(self, size: int, *, alignment: int = 1) -> None:
        if size < 0 or alignment < 1:
            raise ValueError(f"need size >= 0 and alignment >= 1, got {size} and {alignment}")
        self.size = size - size % alignment
        self.alignment = alignment
        # Free ranges by ascending start, as two parallel lists so that bisect works on plain ints.
        self._starts: list[int] = [0] if self.size else []
        self._lengths: list[int] = [self.size] if self.size else []
        self._allocated: dict[int, int] = {}
        self._num_free = self.size

    @property
    def num_free(self) -> int:
        """Free units in total."""
        return self._num_free

    @property
    def num_allocated(self) -> int:
        """Allocated units in total, padding to the alignment included."""
        return self.size - self._num_free

    @property
    def largest_free(self) -> int:
        """Units of the longest free range: the most that one ``allocate`` can give."""
        return max(self._lengths, default=0)

    def padded(self, length: int) -> int:
        """``length`` rounded up to the alignment."""
        return -(-length // self.alignment) * self.alignment

    def allocate(self, length: int) -> int | None:
        """Start of a new range of ``length`` (rounded up) units; None when no free range holds it.

        Raises:
            ValueError: ``length`` is not positive.
        """
        if length <= 0:
            raise ValueError(f"length must be positive, got {length}")
        length = self.padded(length)
        for index, free in enumerate(self._lengths):
            if free < length:
                continue
            start = self._starts[index]
            if free == length:
                del self._starts[index], self._lengths[index]
            else:
                self._starts[index] += length
                self._lengths[index] -= length
            self._allocated[start] = length
            self._num_free -= length
            return start
        return None

    def free(self, start: int) -> int:
        """Give the range that begins at ``start`` back, and say how many units it had.

        Raises:
            KeyError: No allocated range begins there.
        """
        length = self._allocated.pop(start)
        self._num_free += length
        index = bisect.bisect_left(self._starts, start)
        joins_next = index < len(self._starts) and self._starts[index] == start + length
        joins_previous = index > 0 and self._starts[index - 1] + self._lengths[index - 1] == start
        if joins_previous:
            self._lengths[index - 1] += length
            if joins_next:
                self._lengths[index - 1] += self._lengths[index]
                del self._starts[index], self._lengths[index]
        elif joins_next:
            self._starts[index] = start
            self._lengths[index] += length
        else:
            self._starts.insert(index, start)
            self._lengths.insert(index, length)
        return length

    def allocated(self) -> dict[int, int]:
        """Allocated ranges as ``start -> length``, a copy."""
        return dict(self._allocated)

    def check_integrity(self) -> None:
        """Verify that allocated and free ranges tile the space and that free neighbours are merged.

        Raises:
            IntegrityError: They do not.
        """
        free = dict(zip(self._starts, self._lengths, strict=True))
        tiles = sorted(
            [(start, length, False) for start, length in self._allocated.items()]
            + [(start, length, True) for start, length in free.items()]
        )
        end, was_free = 0, False
        for start, length, is_free in tiles:
            if start != end or length <= 0 or start % self.alignment or length % self.alignment:
                raise IntegrityError(f"range [{start}, +{length}) does not follow {end}")
            if is_free and was_free:
                raise IntegrityError(f"free ranges touch at {start}")
            end, was_free = start + length, is_free
        if end != self.size:
            raise IntegrityError(f"ranges end at {end}, the space at {self.size}")
        if sum(self._lengths) != self._num_free:
            raise IntegrityError(f"free count {self._num_free}, ranges hold {sum(self._lengths)}")
