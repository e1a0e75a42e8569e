"""Prompts on their way in: a chunk's rows to their areas, attention, selection at the last chunk.

Owns what is known of a prompt between its first chunk and its last layer, and what is done with its
rows on the device. Knows neither memd nor decode. Chosen positions stay on the device: rows are
moved by index, and the host gets all of a prompt's positions in one copy, when it asks for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from hetero_kernels import extend_attention, score_positions, top_positions, window_scores
from hetero_sglang.cache.transfers import to_device
from hetero_sglang.policy.selection import protect

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_sglang.cache.blocks import BlockPool
    from hetero_sglang.cache.staging import StagingPool
    from hetero_sglang.cache.watch import WatchPool
    from hetero_sglang.config import HeteroConfig
    from hetero_sglang.policy.budget import HeadBudget
    from hetero_sglang.policy.roles import RoleTables


@dataclass(frozen=True)
class ExtendSpan:
    """One request's part of an extend batch.

    Attributes:
        row: Row of the request table.
        start: First query token within the batch.
        prefix_len: Tokens of the prompt that earlier chunks have done.
        num_new: Tokens of this chunk.
    """

    row: int
    start: int
    prefix_len: int
    num_new: int


@dataclass(frozen=True)
class Place:
    """Where a compressed prompt goes.

    Attributes:
        counts: Positions each head keeps, on the device, int32 [num_compressed].
        blocks: Blocks of each head, on the device, int64 [num_compressed, most blocks].
    """

    counts: torch.Tensor
    blocks: torch.Tensor


@dataclass
class Prefill:
    """A prompt on its way in.

    Attributes:
        num_tokens: Its length, tokens.
        end: Position after the last token of this chunk.
        staging_start: First slot of its staging extent; None before it has one.
        budget: How many positions each head keeps; None before its blocks are given out, which is
            when its last chunk gets room.
        token_ids: Token ids of the chunks that have begun, int64; kept for memd's pages.
        pivot_queries: Last prompt query of every pivot, [num_pivots, group_size, head_dim]; None
            before the last chunk, and where nothing is watched.
        place: Where it goes; None before the last chunk has begun.
        kept: Positions that each compressed head keeps, int32, on the device.
        tail_queries: By layer, newest queries of earlier chunks that belong to the selection
            window, [num_tokens, num_kv_heads, group_size, head_dim].
    """

    num_tokens: int
    end: int
    staging_start: int | None = None
    budget: HeadBudget | None = None
    token_ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    pivot_queries: torch.Tensor | None = None
    place: Place | None = None
    kept: list[torch.Tensor] = field(default_factory=list)
    tail_queries: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def is_last_chunk(self) -> bool:
        """Whether the prompt ends with this chunk."""
        return self.end == self.num_tokens

    def kept_positions(self) -> list[NDArray[np.int64]]:
        """Kept positions by compressed head id, int64 arrays; waits for the device, once."""
        assert self.budget is not None
        every = torch.cat(self.kept).cpu().numpy().astype(np.int64)
        ends = np.cumsum(self.budget.tokens)[:-1]
        # Copies: each is changed by itself later on.
        return [positions.copy() for positions in np.split(every, ends)]


class PrefillPath:
    """What chunks of prompts do with the areas on the device."""

    def __init__(
        self,
        *,
        tables: RoleTables,
        config: HeteroConfig,
        k_resident: torch.Tensor,
        v_resident: torch.Tensor,
        blocks: BlockPool,
        staging: StagingPool,
        watch: WatchPool | None,
        req_to_token: torch.Tensor,
        group_size: int,
        is_watching: bool,
    ) -> None:
        """Wires the areas together; arguments are those of ``HeteroRuntime``.

        Args:
            tables: Index tables of the head profile.
            config: Settings.
            k_resident: Resident keys, [num_planes, num_slots, head_dim].
            v_resident: Resident values, same shape.
            blocks: Block pool.
            staging: Staging pool.
            watch: Watch pool, or None.
            req_to_token: SGLang's token ids by row and position, int32 [num_rows, context].
            group_size: Query heads a KV head.
            is_watching: Whether pivots' last queries are wanted.
        """
        self._tables = tables
        self._window = config.window
        self._k_resident = k_resident
        self._v_resident = v_resident
        self._blocks = blocks
        self._staging = staging
        self._watch = watch
        self._req_to_token = req_to_token
        self._group_size = group_size
        self._is_watching = is_watching
        self._head_dim = k_resident.shape[2]
        self._device = device = k_resident.device
        self._head_index = [
            (
                torch.from_numpy(heads.resident).to(device),
                torch.from_numpy(heads.compressed).to(device),
                torch.from_numpy(heads.pivots).to(device),
            )
            for heads in tables.layers
        ]
        self._offsets = torch.arange(blocks.block_tokens, device=device)

    def begin_last_chunk(self, row: int, prefill: Prefill) -> None:
        """Notes on the device which blocks a row was given for its prompt.

        Called on the stream of the forward passes, as what is made here is used and given back
        there. (Room is made on SGLang's stream of the scheduler.)

        Args:
            row: Row of the request table.
            prefill: Its prompt, which has its budget.
        """
        assert prefill.budget is not None
        counts = to_device(prefill.budget.tokens.astype(np.int32), self._device)
        blocks = to_device(self._blocks.kept_blocks(row), self._device)
        prefill.place = Place(counts, blocks)
        nothing = torch.empty(0, dtype=torch.int32, device=self._device)
        prefill.kept = [nothing] * self._tables.num_compressed

    def extend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        span: ExtendSpan,
        prefill: Prefill,
        scale: float,
    ) -> torch.Tensor:
        """Stores a chunk's KV, attends over everything so far, compresses at the last chunk.

        Args:
            layer: Layer index.
            q: Queries of the chunk, [num_new, num_q_heads, head_dim].
            k: Keys, [num_new, num_kv_heads, head_dim].
            v: Values, same shape.
            span: The chunk.
            prefill: Its prompt.
            scale: Softmax scale.

        Returns:
            Attention output, like ``q``.
        """
        keys, values = self._write_chunk(layer, k, v, span, prefill)
        out = extend_attention(q, keys, values, prefix_len=span.prefix_len, scale=scale)
        queries = q.view(span.num_new, -1, self._group_size, self._head_dim)
        if prefill.is_last_chunk:
            self._compress_layer(layer, prefill, queries, keys, values, scale)
        elif prefill.num_tokens - prefill.end < self._window:
            # The window reaches back into this chunk.
            self._keep_tail(layer, prefill, queries)
        return out

    def _keep_tail(self, layer: int, prefill: Prefill, queries: torch.Tensor) -> None:
        newest = queries[-self._window :]
        earlier = prefill.tail_queries.get(layer)
        prefill.tail_queries[layer] = (
            newest.clone() if earlier is None else torch.cat([earlier, newest])
        )

    def _write_chunk(
        self, layer: int, k: torch.Tensor, v: torch.Tensor, span: ExtendSpan, prefill: Prefill
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes a chunk to its areas; returns K and V so far, [num_kv_heads, total, head_dim]."""
        heads = self._tables.layers[layer]
        resident, compressed, pivots = self._head_index[layer]
        assert prefill.staging_start is not None
        total = span.prefix_len + span.num_new
        staged = slice(prefill.staging_start + span.prefix_len, prefill.staging_start + total)
        so_far = slice(prefill.staging_start, prefill.staging_start + total)
        ids = self._req_to_token[span.row, :total].long()
        if self._watch is not None and len(heads.pivots):
            new_keys = k.transpose(0, 1)[pivots].to(self._k_resident.dtype)
            self._watch.write(heads.pivot_ids, ids[span.prefix_len :], new_keys)
        areas = (
            (k, self._k_resident[heads.planes], self._staging.k[heads.compressed_ids]),
            (v, self._v_resident[heads.planes], self._staging.v[heads.compressed_ids]),
        )
        result: list[torch.Tensor] = []
        for rows, pool, stage in areas:
            by_head = rows.transpose(0, 1)
            if len(heads.resident):
                pool.index_copy_(1, ids[span.prefix_len :], by_head[resident].to(pool.dtype))
            if len(heads.compressed):
                stage[:, staged] = by_head[compressed].to(stage.dtype)
            if span.prefix_len == 0:
                result.append(by_head)
                continue
            full = rows.new_empty(self._tables.num_kv_heads, total, self._head_dim)
            if len(heads.resident):
                full[resident] = pool.index_select(1, ids)
            if len(heads.compressed):
                full[compressed] = stage[:, so_far]
            result.append(full)
        return result[0], result[1]

    def _compress_layer(
        self,
        layer: int,
        prefill: Prefill,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> None:
        """Selects and moves the kept rows of one layer; notes the pivots' last queries.

        Args:
            layer: Layer index.
            prefill: The prompt; this is its last chunk.
            queries: Queries of the chunk, [num_new, num_kv_heads, group_size, head_dim].
            keys: Keys of the whole prompt, [num_kv_heads, num_tokens, head_dim].
            values: Values, same shape.
            scale: Softmax scale.
        """
        place, budget = prefill.place, prefill.budget
        assert place is not None
        assert budget is not None
        heads = self._tables.layers[layer]
        _, compressed, pivots = self._head_index[layer]
        if self._is_watching and len(heads.pivots) and not budget.keeps_everything:
            if prefill.pivot_queries is None:
                shape = (self._tables.num_pivots, self._group_size, self._head_dim)
                prefill.pivot_queries = queries.new_empty(shape)
            prefill.pivot_queries[heads.pivot_ids] = queries[-1, pivots]
        if not len(heads.compressed):
            return
        counts = budget.tokens[heads.compressed_ids].tolist()
        if budget.keeps_everything:
            every = torch.arange(budget.num_tokens, dtype=torch.int32, device=self._device)
            chosen = every.expand(len(counts), -1)
        else:
            scores = self._selection_scores(layer, prefill, queries, keys[compressed], scale)
            # With the width nothing waits for the device.
            chosen = top_positions(scores, place.counts[heads.compressed_ids], width=max(counts))
        addresses = self._addresses(place.blocks[heads.compressed_ids])
        for index, head in enumerate(heads.compressed.tolist()):
            kept = chosen[index, : counts[index]]
            where = addresses[index, : counts[index]]
            self._move_rows(where, kept, keys[head], values[head])
            prefill.kept[heads.first_compressed + index] = kept

    def _selection_scores(
        self,
        layer: int,
        prefill: Prefill,
        queries: torch.Tensor,
        keys: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Scores by which the compressed heads of one layer keep positions, [heads, num_tokens]."""
        _, compressed, _ = self._head_index[layer]
        window = min(self._window, prefill.num_tokens)
        if self._window == 1:
            return score_positions(queries[-1, compressed].contiguous(), keys, scale)
        recent = queries[-window:, compressed]
        tail = prefill.tail_queries.pop(layer, None)
        if len(recent) < window:
            assert tail is not None
            recent = torch.cat([tail[:, compressed], recent])[-window:]
        scores = window_scores(recent.transpose(0, 1), keys, scale)
        return protect(scores, self._window)

    def _addresses(self, blocks: torch.Tensor) -> torch.Tensor:
        """Flat row of every slot of these heads, [heads, blocks] -> [heads, blocks * rows]."""
        return (blocks[:, :, None] * self._blocks.block_tokens + self._offsets).flatten(1)

    def _move_rows(
        self, where: torch.Tensor, kept: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        blocks, dim = self._blocks, self._head_dim
        for pool, rows in ((blocks.k, k), (blocks.v, v)):
            pool.view(-1, dim).index_copy_(0, where, rows.index_select(0, kept).to(pool.dtype))
        blocks.positions.view(-1).index_copy_(0, where, kept)
