"""Block pool: a state machine over rows that begin, grow and end."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hetero_sglang.cache.blocks import BlockPool
from hetero_sglang.errors import ResidencyError

ROWS, HEADS, BLOCK, BLOCKS, CONTEXT = 4, 3, 4, 40, 40


class Blocks(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(
            num_blocks=BLOCKS,
            block_tokens=BLOCK,
            head_dim=16,
            num_rows=ROWS,
            num_compressed=HEADS,
            context_tokens=CONTEXT,
            dtype=torch.float32,
            device="cpu",
        )
        self.live: dict[int, tuple[int, list[int], int]] = {}

    def expected(self, row: int) -> list[int]:
        prompt, kept, seq = self.live[row]
        return [-(-(k + seq - prompt) // BLOCK) for k in kept]

    @rule(
        row=st.integers(0, ROWS - 1),
        prompt=st.integers(1, CONTEXT // 2),
        shares=st.lists(st.floats(0, 1), min_size=HEADS, max_size=HEADS),
    )
    def begin(self, row: int, prompt: int, shares: list[float]) -> None:
        kept = np.array([int(share * prompt) for share in shares])
        if row in self.live:
            if any(self.expected(row)):
                try:
                    self.pool.begin(row, prompt, kept)
                except ResidencyError:
                    return
                raise AssertionError("a row with blocks must not begin again")
            return
        if self.pool.blocks_for(kept) > self.pool.num_free:
            return
        self.pool.begin(row, prompt, kept)
        self.live[row] = (prompt, kept.tolist(), prompt)

    @precondition(lambda self: bool(self.live))
    @rule()
    def step_all(self) -> None:
        rows = [r for r, (_, _, seq) in self.live.items() if seq < CONTEXT]
        if not rows:
            return
        index = np.array(rows)
        lens = np.array([self.live[r][2] + 1 for r in rows])
        needed = self.pool.blocks_to_grow(index, lens)
        if needed > self.pool.num_free:
            before = self.pool.num_free
            try:
                self.pool.grow(index, lens)
            except ResidencyError:
                assert self.pool.num_free == before
                return
            raise AssertionError("growth beyond the pool must be refused")
        used = self.pool.num_used
        self.pool.grow(index, lens)
        assert self.pool.num_used == used + needed
        for row in rows:
            prompt, kept, seq = self.live[row]
            self.live[row] = (prompt, kept, seq + 1)

    @rule(row=st.integers(0, ROWS - 1))
    def end(self, row: int) -> None:
        self.pool.free_row(row)
        self.live.pop(row, None)

    @invariant()
    def holds(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == sum(sum(self.expected(row)) for row in self.live)

    @invariant()
    def addresses_are_distinct(self) -> None:
        seen: list[int] = []
        for row, (prompt, kept, seq) in self.live.items():
            for head, count in enumerate(kept):
                slots = np.arange(count + seq - prompt)
                seen += self.pool.row_addresses(row, head, slots).tolist()
        assert len(seen) == len(set(seen))


TestBlocks = Blocks.TestCase
