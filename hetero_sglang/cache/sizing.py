"""How bytes are split between the device areas.

A logical token (SGLang's unit) costs its resident rows and its pivots' watched keys always and,
on average, the ratio's share of block rows. Staging is a fixed area on top. Rows are counted as K
and V of one head of one token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hetero_sglang.errors import ConfigError

GENERATED_SHARE = 1.0 / 32.0
"""Block rows set aside for generated tokens, as a share of the logical tokens.

Generated tokens are appended to every head, so they cost full rows in the block pool. A
workload that generates more is admitted more slowly or retracted, as in stock SGLang.
"""


@dataclass(frozen=True)
class PoolShape:
    """Sizes of the device areas.

    Attributes:
        num_slots: Token ids of the resident pool, including SGLang's padding slot 0.
        staging_tokens: Tokens the staging pool holds; the longest prompt that can be prefilled.
        num_blocks: Blocks of the block pool.
        block_tokens: Rows of one block.
        row_bytes: Bytes of K and V of one head of one token.
        num_planes: Heads in the resident pool.
        num_compressed: Heads in staging and block pool.
        watched_bytes: Bytes of one token's watched keys, all pivots; 0 without a watch pool.
    """

    num_slots: int
    staging_tokens: int
    num_blocks: int
    block_tokens: int
    row_bytes: int
    num_planes: int
    num_compressed: int
    watched_bytes: int = 0

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident pool."""
        return self.num_slots * self.num_planes * self.row_bytes

    @property
    def watch_bytes(self) -> int:
        """Bytes of the watch pool."""
        return self.num_slots * self.watched_bytes

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging pool."""
        return self.staging_tokens * self.num_compressed * self.row_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of the block pool, rows only."""
        return self.num_blocks * self.block_tokens * self.row_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of the four KV areas."""
        return self.resident_bytes + self.watch_bytes + self.staging_bytes + self.block_bytes


@dataclass(frozen=True)
class SizingRule:
    """What the sizes depend on, apart from the number of tokens.

    Attributes:
        ratio: Resident share of a prompt's KV.
        num_planes: Heads that keep everything, over the model.
        num_compressed: Anchors and satellites, over the model.
        row_bytes: Bytes of K and V of one head of one token.
        block_tokens: Rows of one block.
        context_tokens: Longest request, tokens.
        watched_bytes: Bytes of one token's watched keys, all pivots; 0 without a watch pool.
        position_bytes: Bytes beside each row of the block pool that are counted with it.
        device_bytes: Bytes of tables and buffers that lie on the pools' device beside the areas; 0
            for CPU pools, whose tables are the host's anyway.
    """

    ratio: float
    num_planes: int
    num_compressed: int
    row_bytes: int
    block_tokens: int
    context_tokens: int
    watched_bytes: int = 0
    position_bytes: int = 0
    device_bytes: int = 0

    @property
    def block_rows_per_token(self) -> float:
        """Block rows budgeted for a logical token: kept prompt rows and generated rows."""
        num_heads = self.num_planes + self.num_compressed
        held = self.num_planes + self.watched_bytes / self.row_bytes
        kept = max(self.ratio * num_heads - held, 0.0)
        return min(kept + GENERATED_SHARE * self.num_compressed, float(self.num_compressed))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a logical token, staging not included."""
        rows = self.num_planes + self.block_rows_per_token
        position_bytes = self.block_rows_per_token * self.position_bytes
        return math.ceil(rows * self.row_bytes + position_bytes) + self.watched_bytes

    def fixed_bytes(self) -> int:
        """Bytes that do not grow with the tokens: staging for one longest prompt, tables."""
        return self.context_tokens * self.num_compressed * self.row_bytes + self.device_bytes

    def shape_for(self, num_tokens: int) -> PoolShape:
        """Sizes the areas for ``num_tokens`` logical tokens.

        Args:
            num_tokens: SGLang's ``max_total_num_tokens``.

        Returns:
            The sizes. The block pool always holds one longest request that keeps everything,
            so a single request can never starve.

        Raises:
            ConfigError: There is not room for a single token.
        """
        if num_tokens < 1:
            raise ConfigError(
                f"no room for KV: {num_tokens} tokens; raise --mem-fraction-static or "
                "--max-total-tokens, or lower --context-length"
            )
        longest = min(self.context_tokens, num_tokens)
        rows = math.ceil(self.block_rows_per_token * num_tokens)
        least = self.num_compressed * math.ceil((longest + 1) / self.block_tokens)
        num_blocks = max(math.ceil(rows / self.block_tokens), least) if self.num_compressed else 0
        return PoolShape(
            num_slots=num_tokens + 1,
            staging_tokens=longest,
            num_blocks=num_blocks,
            block_tokens=self.block_tokens,
            row_bytes=self.row_bytes,
            num_planes=self.num_planes,
            num_compressed=self.num_compressed,
            watched_bytes=self.watched_bytes,
        )
