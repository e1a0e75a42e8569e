"""Any sequence of allocate and free keeps ranges apart, merges holes, and is first fit."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from memd.allocator import RangeAllocator


class AllocatorMachine(RuleBasedStateMachine):
    live = Bundle("live")

    @initialize(size=st.integers(0, 400), alignment=st.sampled_from([1, 8]))
    def start(self, size: int, alignment: int) -> None:
        self.ranges = RangeAllocator(size, alignment=alignment)
        # The model: the owner of every unit.
        self.units: list[int | None] = [None] * self.ranges.size

    def first_fit(self, length: int) -> int | None:
        run = 0
        for unit, owner in enumerate(self.units):
            run = 0 if owner is not None else run + 1
            if run == length:
                return unit - length + 1
        return None

    @rule(target=live, length=st.integers(1, 120))
    def allocate(self, length: int) -> object:
        padded = self.ranges.padded(length)
        expected = self.first_fit(padded)
        start = self.ranges.allocate(length)
        assert start == expected
        if start is None:
            return multiple()
        self.units[start : start + padded] = [start] * padded
        return start

    @rule(start=consumes(live))
    def free(self, start: int) -> None:
        length = self.ranges.free(start)
        assert self.units[start : start + length] == [start] * length
        assert start not in self.units[start + length :]
        self.units[start : start + length] = [None] * length

    @invariant()
    def holds(self) -> None:
        if not hasattr(self, "ranges"):
            return
        self.ranges.check_integrity()
        assert self.ranges.num_free == self.units.count(None)
        longest = run = 0
        for owner in self.units:
            run = 0 if owner is not None else run + 1
            longest = max(longest, run)
        assert self.ranges.largest_free == longest


TestAllocatorMachine = AllocatorMachine.TestCase
