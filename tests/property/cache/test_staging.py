"""Staging extents: a state machine against a plain model."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from hetero_sglang.cache.staging import ExtentAllocator

CAPACITY = 64


class Extents(RuleBasedStateMachine):
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.allocator = ExtentAllocator(CAPACITY)
        self.model = [False] * CAPACITY

    @rule(target=held, size=st.integers(1, CAPACITY))
    def allocate(self, size: int) -> object:
        gaps = "".join("x" if used else "." for used in self.model)
        predicted = self.allocator.fits([size])
        start = self.allocator.allocate(size)
        assert predicted == (start is not None)
        if start is None:
            assert "." * size not in gaps
            return multiple()
        assert start == gaps.find("." * size)
        self.model[start : start + size] = [True] * size
        return start, size

    @rule(extent=consumes(held))
    def free(self, extent: tuple[int, int]) -> None:
        start, size = extent
        self.allocator.free(start)
        self.model[start : start + size] = [False] * size

    @rule(sizes=st.lists(st.integers(1, 20), max_size=5))
    def ask(self, sizes: list[int]) -> None:
        before = list(self.allocator._free)
        if self.allocator.fits(sizes):
            assert sum(sizes) <= CAPACITY - self.allocator.used
        assert self.allocator._free == before

    @invariant()
    def holds(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.used == sum(self.model)


TestExtents = Extents.TestCase
