"""Bytes on a device beside the KV areas: what SGLang's sizing must leave free for the policy.

Owns no memory. Each function counts what a module of this package (or the runtime) allocates where
the pools are on a device; ``tests/unit/cache/test_device_bytes.py`` compares them with what is
allocated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hetero_sglang.cache.prompt_copies import num_scratch_pages

POSITION_BYTES = 4
"""Of a row of the block pool, beside its K and V."""

DRIFT_SCRATCH_BYTES = 256 * 2**20
"""Scores that one check of drift may hold on a device: more rows are checked group by group. The
newest query's scores of every group live until the host has read which pivots drifted."""

_WORD_BYTES = 4
_WORD_BITS = 32


def check_bytes(num_pivots: int, num_queries: int, num_tokens: int) -> int:
    """Bytes of the scores of one row's check of drift: of each query, and the newest one's twice.

    Args:
        num_pivots: Pivots of the model.
        num_queries: Queries of a pivot, S.
        num_tokens: Tokens of the prompt, or of the longest that is checked with it.
    """
    return num_pivots * (num_queries + 1) * num_tokens * _WORD_BYTES


@dataclass(frozen=True)
class DeviceTables:
    """What the sizes of tables, scratch and drift state depend on.

    Attributes:
        num_rows: Rows of SGLang's request table, padding row included.
        table_tokens: Longest row of that table, tokens.
        num_kv_heads: KV heads a layer.
        num_compressed: Heads in the block pool, over the model.
        num_pivots: Pivots that watch drift, over the model; 0 where drift is not looked for.
        group_size: Query heads a KV head.
        head_dim: Head dimension.
        item_bytes: Bytes of an element of the KV dtype.
        block_tokens: Rows of one block.
        drift_interval: Queries that a pivot's ring holds.
        num_programs: Programs that share the work of decode attention on this device.
    """

    num_rows: int
    table_tokens: int
    num_kv_heads: int
    num_compressed: int
    num_pivots: int
    group_size: int
    head_dim: int
    item_bytes: int
    block_tokens: int
    drift_interval: int
    num_programs: int

    @property
    def mirror_bytes(self) -> int:
        """Bytes of ``TableMirror``."""
        entries = math.ceil((self.table_tokens + 1) / self.block_tokens) + 1
        return self.num_rows * (self.num_compressed * entries + 1) * _WORD_BYTES

    @property
    def batch_bytes(self) -> int:
        """Bytes of ``DecodeTables``: four int64 and two flags a request, and a count."""
        return self._max_reqs * (4 * 8 + 2) + 8

    @property
    def workspace_bytes(self) -> int:
        """Bytes of ``DecodeWorkspace``."""
        items = self._max_reqs * self.num_kv_heads
        partial = (self.num_programs + items) * self.group_size * (2 + self.head_dim)
        return _WORD_BYTES * (2 * items + 1 + partial)

    @property
    def drift_bytes(self) -> int:
        """Bytes of the pivots' rings of queries and of their reference sets."""
        queries = self.drift_interval * self.group_size * self.head_dim * self.item_bytes
        reference = math.ceil(self.table_tokens / _WORD_BITS) * _WORD_BYTES
        return self.num_rows * self.num_pivots * (queries + reference)

    @property
    def drift_scratch_bytes(self) -> int:
        """Bytes of scores (``check_bytes``) while a group of rows is checked for drift."""
        one = check_bytes(self.num_pivots, self.drift_interval, self.table_tokens)
        return min(self.num_rows * one, max(DRIFT_SCRATCH_BYTES, one))

    @property
    def total_bytes(self) -> int:
        """Bytes of all of them."""
        return (
            self.mirror_bytes
            + self.batch_bytes
            + self.workspace_bytes
            + self.drift_bytes
            + self.drift_scratch_bytes
        )

    @property
    def _max_reqs(self) -> int:
        return max(self.num_rows - 1, 1)


def transfer_bytes(
    *, num_compressed: int, row_bytes: int, page_tokens: int, landing_rows: int
) -> int:
    """Bytes of the landing ring on the device and of the scratch in which pages are put together.

    Args:
        num_compressed: Heads in the block pool, over the model.
        row_bytes: Bytes of K and V of one head of one token.
        page_tokens: Token ids of one page of memd.
        landing_rows: Rows of the landing ring.
    """
    page_bytes = num_compressed * page_tokens * row_bytes
    return landing_rows * row_bytes + num_scratch_pages(page_bytes) * page_bytes
