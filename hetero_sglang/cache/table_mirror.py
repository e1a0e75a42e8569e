"""The block pool's tables as kernels on the device read them.

The truth is on the host (``BlockPool``), where the scheduler changes it while the device still
works on the step before. The mirror is changed on the stream of the forward passes only, between
two of them, and by what has changed: new blocks of the batch's rows, and lengths of rows that are
new. A freed row's entries stay as they were, because nobody reads them. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from hetero_sglang.cache.transfers import to_device

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_sglang.cache.blocks import BlockPool


class TableMirror:
    """Block table and lengths on the device, brought up to date for the rows of a step.

    Attributes:
        block_table: As ``BlockPool.table``.
        kept_lens: As ``BlockPool.kept_lens``.
        prompt_lens: As ``BlockPool.prompt_lens``.
    """

    def __init__(self, blocks: BlockPool, device: torch.device) -> None:
        """Starts empty.

        Args:
            blocks: The truth.
            device: Device of the pools.
        """
        self._blocks = blocks
        self._device = device
        self.block_table = torch.full_like(blocks.table, -1, device=device)
        self.kept_lens = torch.zeros_like(blocks.kept_lens, device=device)
        self.prompt_lens = torch.zeros_like(blocks.prompt_lens, device=device)
        self._num_known = np.zeros(tuple(blocks.kept_lens.shape), dtype=np.int64)
        self._is_known = np.zeros(blocks.prompt_lens.shape[0], dtype=np.bool_)

    def forget(self, row: int) -> None:
        """Notes that a row was freed: what it has next is all new."""
        self._is_known[row] = False
        self._num_known[row] = 0

    def sync(self, rows: NDArray[np.int64]) -> int:
        """Brings rows up to date; called between steps, does not wait for the device.

        Args:
            rows: Distinct rows of the next step, int64 [num_reqs].

        Returns:
            Bytes that were sent.
        """
        return self._sync_lengths(rows[~self._is_known[rows]]) + self._sync_blocks(rows)

    def _sync_lengths(self, rows: NDArray[np.int64]) -> int:
        if not len(rows):
            return 0
        index = to_device(rows, self._device)
        kept = to_device(self._blocks.kept_lens.numpy()[rows], self._device)
        prompt = to_device(self._blocks.prompt_lens.numpy()[rows], self._device)
        self.kept_lens.index_copy_(0, index, kept)
        self.prompt_lens.index_copy_(0, index, prompt)
        self._is_known[rows] = True
        return index.nbytes + kept.nbytes + prompt.nbytes

    def _sync_blocks(self, rows: NDArray[np.int64]) -> int:
        owned, known = self._blocks.num_owned[rows], self._num_known[rows]
        which, heads = np.nonzero(owned > known)
        if not len(which):
            return 0
        counts = (owned - known)[which, heads]
        each = np.repeat(np.arange(len(counts)), counts)
        offsets = np.arange(len(each)) - np.repeat(np.cumsum(counts) - counts, counts)
        num_heads, width = self.block_table.shape[1:]
        entries = (rows[which[each]] * num_heads + heads[each]) * width
        entries += known[which, heads][each] + offsets
        index = to_device(entries, self._device)
        values = to_device(self._blocks.table.numpy().reshape(-1)[entries], self._device)
        self.block_table.view(-1).index_copy_(0, index, values)
        self._num_known[rows] = owned
        return index.nbytes + values.nbytes
