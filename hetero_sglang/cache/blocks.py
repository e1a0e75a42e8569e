"""Block pool: rows of compressed heads, one head a block, and who owns which block.

A row of SGLang's request table (``row``) and a compressed head id address a list of
blocks. Its first ``kept_lens`` rows are kept prompt tokens, the rest generated ones. The
order of rows does not matter to attention (positions are already rotated in), so a
fetched row takes the place of an evicted one; ``positions`` says what sits where.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from hetero_sglang.cache.memory import allocate_pool
from hetero_sglang.errors import ResidencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class BlockPool:
    """K and V blocks, their tables and the free list.

    Tables are CPU tensors with numpy views of the same memory: Python bookkeeping and
    native kernels read one truth. Rows and their positions lie on the pools' device.

    Attributes:
        k: Keys, [num_blocks, block_tokens, head_dim].
        v: Values, same shape.
        positions: Position of each row, int32 [num_blocks, block_tokens].
        table: Block ids, int32 [num_rows, num_compressed, max_blocks]; -1 where unset.
        kept_lens: Kept prompt rows, int32 [num_rows, num_compressed].
        prompt_lens: Prompt length of each row, int32 [num_rows].
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_tokens: int,
        head_dim: int,
        num_rows: int,
        num_compressed: int,
        context_tokens: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Allocates pool and tables.

        Args:
            num_blocks: Blocks in the pool.
            block_tokens: Rows of one block.
            head_dim: Head dimension.
            num_rows: Rows of SGLang's request table, padding row included.
            num_compressed: Compressed heads of the model.
            context_tokens: Longest request, tokens.
            dtype: Storage dtype of K and V.
            device: Device of K, V and positions.
        """
        self.block_tokens = block_tokens
        self.num_blocks = num_blocks
        self.k = allocate_pool((num_blocks, block_tokens, head_dim), dtype, device)
        self.v = allocate_pool((num_blocks, block_tokens, head_dim), dtype, device)
        self.positions = torch.full(
            (num_blocks, block_tokens), -1, dtype=torch.int32, device=device
        )
        max_blocks = -(-(context_tokens + 1) // block_tokens)
        self.table = torch.full((num_rows, num_compressed, max_blocks), -1, dtype=torch.int32)
        self.kept_lens = torch.zeros(num_rows, num_compressed, dtype=torch.int32)
        self.prompt_lens = torch.zeros(num_rows, dtype=torch.int32)
        self._table = self.table.numpy()
        self._kept = self.kept_lens.numpy()
        self._prompt = self.prompt_lens.numpy()
        self._num_owned = np.zeros((num_rows, num_compressed), dtype=np.int64)
        self._free = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)
        self._num_free = num_blocks

    @property
    def num_free(self) -> int:
        """Free blocks."""
        return self._num_free

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - self._num_free

    @property
    def num_owned(self) -> NDArray[np.int64]:
        """Blocks of each row and compressed head, int64 [num_rows, num_compressed]; not a copy."""
        return self._num_owned

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, K and V."""
        return 2 * self.block_tokens * self.k.shape[2] * self.k.element_size()

    def blocks_for(self, lens: NDArray[np.int64]) -> int:
        """Blocks that heads with these row counts own together."""
        return int((-(-lens // self.block_tokens)).sum())

    def begin(self, row: int, prompt_len: int, kept: NDArray[np.int64]) -> None:
        """Gives a row the blocks of its kept prompt tokens.

        Args:
            row: Row of the request table; owns nothing yet.
            prompt_len: Prompt length, tokens.
            kept: Rows each compressed head keeps, int64 [num_compressed].

        Raises:
            ResidencyError: The row still owns blocks, or the pool is exhausted (admission
                must have prevented it).
        """
        if self._num_owned[row].any():
            raise ResidencyError(f"row {row} still owns blocks")
        self._prompt[row] = prompt_len
        self._kept[row] = kept
        self._extend(np.array([row]), kept[None])

    def grow(self, rows: NDArray[np.int64], seq_lens: NDArray[np.int64]) -> None:
        """Makes room for the newest generated token of each row.

        Args:
            rows: Rows in decode, int64 [num_reqs].
            seq_lens: Tokens including the new one, int64 [num_reqs].
        """
        self._extend(rows, self._lens(rows, seq_lens))

    def blocks_to_grow(self, rows: NDArray[np.int64], seq_lens: NDArray[np.int64]) -> int:
        """Blocks that ``grow`` would take."""
        lens = self._lens(rows, seq_lens)
        short = -(-lens // self.block_tokens) - self._num_owned[rows]
        return int(np.maximum(short, 0).sum())

    def free_row(self, row: int) -> None:
        """Returns all blocks of a row; harmless when it owns none."""
        owned = self._num_owned[row]
        total = int(owned.sum())
        if total:
            # Not over the whole context's width, which is mostly nobody's.
            table = self._table[row, :, : owned.max()]
            mask = np.arange(table.shape[1])[None] < owned[:, None]
            self._free[self._num_free : self._num_free + total] = table[mask]
            self._num_free += total
            table[mask] = -1
            self._num_owned[row] = 0
        self._kept[row] = 0
        self._prompt[row] = 0

    def row_addresses(self, row: int, head: int, slots: NDArray[np.int64]) -> NDArray[np.int64]:
        """Flat row indices (block * block_tokens + offset) of slots of one head.

        Args:
            row: Row of the request table.
            head: Compressed head id.
            slots: Row numbers within the head, int64 [n].

        Returns:
            int64 [n], into ``k.view(-1, head_dim)``.
        """
        blocks = self._table[row, head, slots // self.block_tokens].astype(np.int64)
        return np.asarray(blocks * self.block_tokens + slots % self.block_tokens)

    def kept_blocks(self, row: int) -> NDArray[np.int64]:
        """Blocks of a row's kept prompt tokens.

        Args:
            row: Row of the request table.

        Returns:
            int64 [num_compressed, most blocks of a head]; kept row ``s`` of a head lies in its
            block ``s // block_tokens``. Entries behind a head's own blocks are -1.
        """
        most = -(-int(self._kept[row].max(initial=0)) // self.block_tokens)
        return self._table[row, :, :most].astype(np.int64)

    def positions_on_host(self) -> NDArray[np.int32]:
        """``positions`` as they are when all that was asked of the device is done; waits for it."""
        if self.positions.device.type == "cuda":
            # Of every stream: who asks is not on that of the forward passes.
            torch.cuda.synchronize(self.positions.device)
        return np.asarray(self.positions.cpu().numpy())

    def check_integrity(self) -> None:
        """Raises ResidencyError unless every block has exactly one owner or is free."""
        owners = np.zeros(self.num_blocks, dtype=np.int64)
        np.add.at(owners, self._free[: self._num_free], 1)
        mask = np.arange(self._table.shape[2])[None, None] < self._num_owned[..., None]
        np.add.at(owners, self._table[mask], 1)
        if not np.all(owners == 1):
            block = int(np.flatnonzero(owners != 1)[0])
            raise ResidencyError(f"block {block} has {owners[block]} owners")
        if np.any(self._table[~mask] != -1):
            raise ResidencyError("block table holds a block beyond its row's length")
        if np.any(self._kept > self._num_owned * self.block_tokens):
            raise ResidencyError("a head keeps more rows than its blocks hold")

    def _lens(self, rows: NDArray[np.int64], seq_lens: NDArray[np.int64]) -> NDArray[np.int64]:
        generated = seq_lens - self._prompt[rows]
        return np.asarray(self._kept[rows] + generated[:, None], dtype=np.int64)

    def _extend(self, rows: NDArray[np.int64], lens: NDArray[np.int64]) -> None:
        wanted = -(-lens // self.block_tokens)
        owned = self._num_owned[rows]
        short = wanted - owned
        if short.max(initial=0) <= 0:
            return
        index, heads = np.nonzero(short > 0)
        counts = short[index, heads]
        total = int(counts.sum())
        if total > self._num_free:
            raise ResidencyError(
                f"block pool exhausted: {total} blocks wanted, {self._num_free} free"
            )
        self._num_free -= total
        blocks = self._free[self._num_free : self._num_free + total]
        which = np.repeat(np.arange(len(counts)), counts)
        offset = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        target_rows, target_heads = rows[index[which]], heads[which]
        self._table[target_rows, target_heads, owned[index, heads][which] + offset] = blocks
        self._num_owned[rows[index], heads] = wanted[index, heads]
