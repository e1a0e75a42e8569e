"""The mirror of the block tables: after a sync the step's rows are the host's."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hetero_sglang.cache.blocks import BlockPool
from hetero_sglang.cache.table_mirror import TableMirror
from hetero_sglang.cache.transfers import to_device

ROWS, HEADS, BLOCK, CONTEXT = 5, 3, 4, 40


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockPool(
            num_blocks=ROWS * HEADS * (CONTEXT // BLOCK + 1),
            block_tokens=BLOCK,
            head_dim=16,
            num_rows=ROWS,
            num_compressed=HEADS,
            context_tokens=CONTEXT,
            dtype=torch.float32,
            device="cpu",
        )
        self.mirror = TableMirror(self.blocks, torch.device("cpu"))
        self.tables = (self.mirror.block_table, self.mirror.kept_lens, self.mirror.prompt_lens)
        self.addresses = [t.data_ptr() for t in self.tables]
        self.lens: dict[int, int] = {}

    @rule(row=st.integers(1, ROWS - 1), prompt=st.integers(1, 20), seed=st.integers(0, 99))
    def begin(self, row: int, prompt: int, seed: int) -> None:
        if row in self.lens:
            return
        kept = np.random.default_rng(seed).integers(0, prompt + 1, HEADS)
        self.blocks.begin(row, prompt, kept)
        self.lens[row] = prompt

    @precondition(lambda self: self.lens)
    @rule(picks=st.sets(st.integers(1, ROWS - 1), min_size=1), steps=st.integers(1, 6))
    def step(self, picks: set[int], steps: int) -> None:
        rows = np.array([row for row in self.lens if row in picks], dtype=np.int64)
        for _ in range(steps):
            rows = rows[[self.lens[row] < CONTEXT for row in rows.tolist()]] if len(rows) else rows
            if not len(rows):
                return
            for row in rows.tolist():
                self.lens[row] += 1
            self.blocks.grow(rows, np.array([self.lens[row] for row in rows.tolist()]))
            self.mirror.sync(rows)
            for row in rows.tolist():
                for head in range(HEADS):
                    owned = int(self.blocks.num_owned[row, head])
                    held = self.mirror.block_table[row, head, :owned]
                    assert torch.equal(held, self.blocks.table[row, head, :owned])
                assert torch.equal(self.mirror.kept_lens[row], self.blocks.kept_lens[row])
                assert self.mirror.prompt_lens[row] == self.blocks.prompt_lens[row]
            # What is up to date is not sent again.
            assert self.mirror.sync(rows) == 0

    @precondition(lambda self: self.lens)
    @rule(which=st.integers(0, ROWS))
    def free(self, which: int) -> None:
        row = list(self.lens)[which % len(self.lens)]
        del self.lens[row]
        self.blocks.free_row(row)
        self.mirror.forget(row)

    @invariant()
    def addresses_stay(self) -> None:
        assert [t.data_ptr() for t in self.tables] == self.addresses


TestTableMirror = Machine.TestCase
TestTableMirror.settings = settings(stateful_step_count=20, max_examples=30)


def test_a_copy_to_the_device_is_a_copy() -> None:
    array = np.arange(4)
    copied = to_device(array, torch.device("cpu"))
    array[:] = 0
    assert copied.tolist() == [0, 1, 2, 3]
