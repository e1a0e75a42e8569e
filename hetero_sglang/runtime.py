"""A request's life under the policy, readable from top to bottom.

``begin_prefill`` -> ``allocate`` -> ``extend_layer`` (a chunk, layer by layer; the last
chunk compresses) -> ``allocate`` + ``begin_decode`` + ``decode_layer`` (a step) ->
``free``. Called on SGLang's scheduler thread only; knows the areas and the policy, not
SGLang. Nothing here waits for memd or the device during decode unless retrieval is ``sync``;
a prefill may.
"""

from __future__ import annotations

import logging
import math
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hetero_kernels import (
    DecodeBatch,
    DecodeLayer,
    LayerTensors,
    native_status,
    top_positions,
)
from hetero_sglang.cache.retrieval import Retrieval, RetrievalCounters
from hetero_sglang.drift import DriftWatch
from hetero_sglang.errors import HeteroError, ResidencyError
from hetero_sglang.policy.budget import HeadBudget, allocate_budget
from hetero_sglang.policy.plan import refresh_target
from hetero_sglang.policy.selection import protect
from hetero_sglang.prefill import Prefill, PrefillPath

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_sglang.cache.blocks import BlockPool
    from hetero_sglang.cache.host_store import HostStore
    from hetero_sglang.cache.staging import StagingPool
    from hetero_sglang.cache.watch import WatchPool
    from hetero_sglang.config import HeteroConfig
    from hetero_sglang.policy.roles import RoleTables
    from hetero_sglang.prefill import ExtendSpan

logger = logging.getLogger(__name__)

_RESERVE_WAIT_S = 0.25
"""Longest wait for memd at the end of a prefill. It answers in a fraction of a millisecond and was
asked when the chunk began, so only a stopped daemon makes anyone wait."""


class HeteroRuntime:
    """Residency of all requests of one model on one device.

    Attributes:
        tables: Index tables of the head profile.
        config: Settings.
        blocks: Block pool.
        staging: Staging pool.
        store: Host copy in memd; None when retrieval is off.
        watch: Watched keys of budgeted pivots; None where pivots watch with their rows, or not.
        drift: What drift checks know.
    """

    def __init__(
        self,
        *,
        tables: RoleTables,
        config: HeteroConfig,
        k_resident: torch.Tensor,
        v_resident: torch.Tensor,
        blocks: BlockPool,
        staging: StagingPool,
        store: HostStore | None,
        watch: WatchPool | None,
        req_to_token: torch.Tensor,
        group_size: int,
    ) -> None:
        """Wires the areas together.

        Args:
            tables: Index tables of the head profile.
            config: Settings.
            k_resident: Resident keys, [num_planes, num_slots, head_dim].
            v_resident: Resident values, same shape.
            blocks: Block pool for the same rows.
            staging: Staging pool.
            store: Host copy, or None for retrieval "off".
            watch: Watch pool where the settings ask for one, else None.
            req_to_token: SGLang's token ids by row and position, int32 [num_rows, context].
            group_size: Query heads a KV head.
        """
        self.tables = tables
        self.config = config
        self.blocks = blocks
        self.staging = staging
        self.store = store
        self.watch = watch
        self.store_skipped = 0
        self._k_resident = k_resident
        self._v_resident = v_resident
        self._req_to_token = req_to_token
        self._group_size = group_size
        self._head_dim = k_resident.shape[2]
        self._prefills: dict[int, Prefill] = {}
        # Staging extents that are being read by copies to memd: first slot and slots.
        self._leaving: dict[int, int] = {}
        self._decoding: dict[int, HeadBudget] = {}
        self._is_watching = store is not None and config.is_watching
        assert watch is not None or not (self._is_watching and config.has_watch_pool)
        self.drift = DriftWatch(
            tables=tables,
            config=config,
            keys=k_resident if watch is None else watch.keys,
            req_to_token=req_to_token,
            queries_like=k_resident,
            group_size=group_size,
            is_on=self._is_watching,
        )
        self._rule = config.budget_rule(tables)
        self._prompts = PrefillPath(
            tables=tables,
            config=config,
            k_resident=k_resident,
            v_resident=v_resident,
            blocks=blocks,
            staging=staging,
            watch=watch,
            req_to_token=req_to_token,
            group_size=group_size,
            is_watching=self._is_watching,
        )
        self._layers: list[DecodeLayer | None] = [None] * len(tables.layers)
        self._batch: DecodeBatch | None = None
        self._retrieval = (
            Retrieval(store, blocks, config.landing_rows) if store is not None else None
        )
        self._is_memd_lost = False
        self._scale = self._head_dim**-0.5
        self.budget_for = lru_cache(maxsize=4096)(self._budget_for)

    # -- admission ---------------------------------------------------------------------

    def blocks_for_prompt(self, num_tokens: int) -> int:
        """Blocks that a prompt of this length will own once compressed."""
        return self.blocks.blocks_for(self.budget_for(num_tokens).tokens)

    @property
    def num_promised_blocks(self) -> int:
        """Blocks of prompts whose prefill has begun and that do not own them yet."""
        return sum(
            self.blocks_for_prompt(prefill.num_tokens)
            for prefill in self._prefills.values()
            if prefill.budget is None
        )

    def blocks_for_growth(self, num_tokens: int) -> int:
        """Blocks that this many generated tokens fill, in all compressed heads."""
        return -(-num_tokens * self.tables.num_compressed // self.blocks.block_tokens)

    @property
    def is_empty(self) -> bool:
        """No request is in prefill or decode."""
        return not self._prefills and not self._decoding

    def blocks_to_grow(self, rows: NDArray[np.int64], seq_lens: NDArray[np.int64]) -> int:
        """Blocks that the next decode step of these rows takes."""
        decoding = np.fromiter((row in self._decoding for row in rows.tolist()), np.bool_)
        if not decoding.any():
            return 0
        return self.blocks.blocks_to_grow(rows[decoding], seq_lens[decoding])

    # -- memory ------------------------------------------------------------------------

    def begin_prefill(self, row: int, num_tokens: int, end: int) -> None:
        """Announces a chunk of a prompt.

        Args:
            row: Row of the request table.
            num_tokens: Whole prompt length, tokens.
            end: Position after the last token of this chunk.
        """
        prefill = self._prefills.get(row)
        if prefill is None:
            self._prefills[row] = Prefill(num_tokens, end)
        else:
            prefill.num_tokens, prefill.end = num_tokens, end

    def allocate(self, rows: NDArray[np.int64], seq_lens: NDArray[np.int64]) -> None:
        """Gives each row the room for its tokens up to ``seq_lens``.

        Args:
            rows: Rows of one batch, int64 [num_reqs].
            seq_lens: Length each row grows to, int64 [num_reqs].

        Raises:
            ResidencyError: A pool is exhausted; admission should have prevented it.
        """
        decoding: list[int] = []
        for index, row in enumerate(rows.tolist()):
            prefill = self._prefills.get(row)
            if prefill is None:
                if row not in self._decoding:
                    raise ResidencyError(
                        f"row {row} was given no prompt by the request table: a feature of SGLang "
                        "makes rows by itself, which --kv-policy heterocache does not serve"
                    )
                decoding.append(index)
                continue
            if prefill.staging_start is None:
                prefill.staging_start = self.staging.extents.allocate(prefill.num_tokens)
                if prefill.staging_start is None:
                    raise ResidencyError(
                        f"staging pool exhausted: {prefill.num_tokens} tokens wanted, "
                        f"{self.staging.extents.used} of {self.staging.extents.capacity} in use"
                    )
            if prefill.is_last_chunk and prefill.budget is None:
                budget = self.budget_for(prefill.num_tokens)
                self.blocks.begin(row, prefill.num_tokens, budget.tokens)
                prefill.budget = budget
        if decoding:
            self.blocks.grow(rows[decoding], seq_lens[decoding])

    def free(self, row: int) -> None:
        """Returns all that a row holds; fetches in flight are dropped when they land."""
        prefill = self._prefills.pop(row, None)
        if prefill is not None and prefill.staging_start is not None:
            self.staging.extents.free(prefill.staging_start)
        self._decoding.pop(row, None)
        self.drift.end(row)
        self.blocks.free_row(row)
        if self._retrieval is not None:
            self._retrieval.forget(row)
        if self.store is not None:
            self.store.free_row(row)

    def poll(self) -> None:
        """Takes what has arrived; never blocks. Staging comes back by this."""
        if self.store is not None:
            self.store.poll()

    def clear(self) -> None:
        """Frees every row (cache flush)."""
        for row in {*self._prefills, *self._decoding}:
            self.free(row)

    # -- prefill -----------------------------------------------------------------------

    def begin_extend(self, spans: list[ExtendSpan]) -> None:
        """Prepares a batch of chunks: their blocks on the device, memd's pages for their tokens."""
        self.poll()
        for span in spans:
            prefill = self._prefills[span.row]
            if prefill.is_last_chunk:
                self._prompts.begin_last_chunk(span.row, prefill)
            if self.store is not None and self._wants_store(self.budget_for(prefill.num_tokens)):
                end = span.prefix_len + span.num_new
                # The one time that the host reads a chunk's token ids; on a device it waits here.
                ids = self._req_to_token[span.row, span.prefix_len : end].cpu().numpy()
                earlier = prefill.token_ids[: span.prefix_len]
                prefill.token_ids = np.concatenate([earlier, ids.astype(np.int64)])
                self.store.reserve(span.row, prefill.token_ids[span.prefix_len :])

    def extend_layer(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: list[ExtendSpan],
        scale: float,
    ) -> torch.Tensor:
        """Stores a chunk's KV, attends over everything so far, compresses at the last chunk.

        Args:
            layer: Layer index.
            q: Queries, [num_tokens, num_q_heads, head_dim].
            k: Keys, [num_tokens, num_kv_heads, head_dim].
            v: Values, same shape.
            spans: Requests of the batch.
            scale: Softmax scale.

        Returns:
            Attention output, like ``q``.
        """
        self._scale = scale
        parts: list[torch.Tensor] = []
        for span in spans:
            tokens = slice(span.start, span.start + span.num_new)
            prefill = self._prefills[span.row]
            parts.append(
                self._prompts.extend(layer, q[tokens], k[tokens], v[tokens], span, prefill, scale)
            )
            if prefill.is_last_chunk and layer == len(self.tables.layers) - 1:
                self._finish_prefill(span.row, prefill)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _finish_prefill(self, row: int, prefill: Prefill) -> None:
        """Copies the prompt to memd, gives staging back, opens the row for decode."""
        budget, start = prefill.budget, prefill.staging_start
        assert budget is not None
        assert start is not None
        self._leaving[start] = prefill.num_tokens
        if self.store is not None and self._wants_store(budget):
            assert self._retrieval is not None
            extent = slice(start, start + prefill.num_tokens)
            is_sync = self.config.retrieval == "sync"
            wait_s = self.config.sync_timeout_s if is_sync else _RESERVE_WAIT_S
            if (
                len(prefill.token_ids) == prefill.num_tokens
                and self.store.wait_reserved(row, wait_s)
                and self.store.store(
                    row,
                    prefill.token_ids,
                    self.staging.k[:, extent],
                    self.staging.v[:, extent],
                    partial(self._free_staging, start),
                )
            ):
                self._retrieval.begin(row, prefill.num_tokens, prefill.kept_positions())
                if prefill.pivot_queries is not None:
                    self.drift.begin(row, prefill.pivot_queries, budget, self._scale)
            else:
                self.store_skipped += 1
                self.store.free_row(row)
                self._free_staging(start)
        else:
            self._free_staging(start)
        del self._prefills[row]
        self._decoding[row] = budget

    def _free_staging(self, start: int) -> None:
        """Gives back an extent that nobody reads any more."""
        del self._leaving[start]
        self.staging.extents.free(start)

    def _wants_store(self, budget: HeadBudget) -> bool:
        return self._is_watching and self._store_is_there and not budget.keeps_everything

    @property
    def _store_is_there(self) -> bool:
        return self.store is not None and self.store.is_available

    # -- decode ------------------------------------------------------------------------

    def begin_decode(
        self, rows: torch.Tensor, seq_lens: torch.Tensor, token_ids: torch.Tensor
    ) -> None:
        """Prepares one step: installs landed rows, checks drift, sends what is missing.

        Args:
            rows: Rows of the batch, int64 [num_reqs].
            seq_lens: Tokens of each row, the new one included, int64 [num_reqs].
            token_ids: Token id of the new token of each row, int64 [num_reqs].
        """
        self._batch = DecodeBatch(rows, seq_lens, token_ids)
        if self.store is None or self._retrieval is None:
            return
        self.store.poll()
        if not self.store.is_available:
            self._lose_memd()
            return
        self._retrieval.install_landed()
        rows_np = rows.numpy()
        steps = seq_lens.numpy() - self.blocks.prompt_lens.numpy()[rows_np] - 1
        is_due = self.drift.is_due(rows_np, steps)
        if is_due.any():
            self._check_drift(rows_np[is_due])
        if self._retrieval.is_idle:
            return
        if self.config.retrieval == "sync":
            if not self._retrieval.run_to_completion(self.config.sync_timeout_s):
                logger.warning("sync retrieval did not finish; decode goes on with stale rows")
        else:
            self._retrieval.issue()

    def decode_layer(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Appends the new token's KV to every head and attends.

        Args:
            layer: Layer index.
            q: Queries, [num_reqs, num_q_heads, head_dim].
            k: Keys, [num_reqs, num_kv_heads, head_dim].
            v: Values, same shape.
            scale: Softmax scale.

        Returns:
            Attention output, like ``q``.
        """
        launcher = self._layers[layer]
        if launcher is None:
            launcher = self._layers[layer] = self._make_layer(layer, scale)
        assert self._batch is not None
        out = torch.empty_like(q)
        launcher.append(k, v, q if self._watches(layer) else None, self._batch)
        launcher.attend(q, out, self._batch)
        return out

    def _watches(self, layer: int) -> bool:
        return self._is_watching and len(self.tables.layers[layer].pivots) > 0

    def _make_layer(self, layer: int, scale: float) -> DecodeLayer:
        return DecodeLayer(self._layer_tensors(layer, scale))

    def _layer_tensors(self, layer: int, scale: float) -> LayerTensors:
        heads = self.tables.layers[layer]
        watch = self._watches(layer)
        return LayerTensors(
            k_resident=self._k_resident,
            v_resident=self._v_resident,
            k_blocks=self.blocks.k,
            v_blocks=self.blocks.v,
            block_table=self.blocks.table,
            kept_lens=self.blocks.kept_lens,
            prompt_lens=self.blocks.prompt_lens,
            head_map=torch.from_numpy(heads.head_map),
            scale=scale,
            group_size=self._group_size,
            req_to_token=self._req_to_token,
            block_positions=self.blocks.positions,
            pivot_queries=self.drift.pivot_queries if watch else None,
            pivot_map=torch.from_numpy(heads.pivot_map) if watch else None,
        )

    def _check_drift(self, rows: NDArray[np.int64]) -> None:
        """Compares the pivots' newest attention with their references; sets targets."""
        if self.tables.num_pivots == 0:
            return
        for group in self.drift.groups(rows, self.blocks.prompt_lens.numpy()[rows]):
            overlap, newest = self.drift.measure(group, self.blocks.prompt_lens, self._scale)
            for row, pivot, entry in self.drift.drifted(group, overlap.numpy()):
                best, scores = self._rank_anew(row, pivot, newest[entry])
                self._retarget(row, pivot, best.numpy(), scores.numpy())

    def _refresh_sizes(self, row: int, pivot: int) -> list[int]:
        """How many of the pivot's best each head that it refreshes must have."""
        tokens, share = self._decoding[row].tokens, self.config.refresh_share
        return [math.ceil(share * tokens[h]) for h in self.tables.refreshed[pivot].tolist()]

    def _rank_anew(
        self, row: int, pivot: int, scores: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replaces a pivot's reference; its best positions, best first, and scores to rank by."""
        budget = self._decoding[row]
        scores = scores[: budget.num_tokens]
        self.drift.set_reference(row, pivot, scores, budget.reference_size)
        scores = protect(scores, self.config.window)
        count = max(self._refresh_sizes(row, pivot), default=0)
        return top_positions(scores, count, order="best"), scores

    def _retarget(
        self, row: int, pivot: int, best: NDArray[np.int32], scores: NDArray[np.float32]
    ) -> None:
        """Names the positions that a drifted pivot's heads shall hold."""
        assert self._retrieval is not None
        positions = best.astype(np.int64)
        heads = self.tables.refreshed[pivot].tolist()
        for head, size in zip(heads, self._refresh_sizes(row, pivot), strict=True):
            held = self._retrieval.expected_positions(row, head)
            target = refresh_target(positions[:size], held, scores)
            self._retrieval.set_target(row, head, target)

    def _lose_memd(self) -> None:
        assert self._retrieval is not None
        self._retrieval.install_landed()
        self._retrieval.drop_targets()
        self.drift.end_all()
        if not self._is_memd_lost:
            self._is_memd_lost = True
            logger.warning(
                "memd is gone: decoding goes on with the rows that are resident, nothing is "
                "fetched any more; restart the server to get retrieval back"
            )

    # -- state -------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Raises ResidencyError when pools, tables and requests disagree."""
        self.blocks.check_integrity()
        self.staging.extents.check_integrity()
        staged = sum(
            prefill.num_tokens
            for prefill in self._prefills.values()
            if prefill.staging_start is not None
        )
        staged += sum(self._leaving.values())
        if staged != self.staging.extents.used:
            raise ResidencyError(
                f"{self.staging.extents.used} staging slots in use, {staged} by known prompts and "
                "copies"
            )
        if self.store is not None:
            self.store.check_integrity()
        if self._retrieval is not None:
            self._retrieval.check_integrity()

    def state(self) -> dict[str, Any]:
        """Plain data for ``/server_info``; the adapter adds what only SGLang knows."""
        counters = RetrievalCounters() if self._retrieval is None else self._retrieval.counters
        try:
            self.check_integrity()
            integrity = "ok"
        except HeteroError as error:
            integrity = str(error)
        in_flight = 0 if self._retrieval is None else self._retrieval.num_rows_in_flight
        row_bytes = self.staging.slot_bytes // max(self.tables.num_compressed, 1)
        return {
            "ratio": self.config.ratio,
            "floor": self.tables.floor,
            "preset": self.config.preset,
            "pivot_rows": self.config.pivot_rows,
            "watch_dtype": self.config.watch_dtype,
            "window": self.config.window,
            "refresh_share": self.config.refresh_share,
            "min_tokens": self.config.min_tokens,
            "is_filling": self.config.is_filling,
            "retrieval": self.config.retrieval,
            "areas": {
                "staging": {
                    "capacity_bytes": self.staging.extents.capacity * self.staging.slot_bytes,
                    "used_bytes": self.staging.extents.used * self.staging.slot_bytes,
                },
                "blocks": {
                    "capacity_bytes": self.blocks.num_blocks * self.blocks.block_bytes,
                    "used_bytes": self.blocks.num_used * self.blocks.block_bytes,
                },
                "landing": {
                    "capacity_bytes": (
                        self.config.landing_rows * row_bytes if self.store is not None else 0
                    ),
                    "used_bytes": in_flight * row_bytes,
                },
            },
            "drift": {"checks": self.drift.checks, "events": self.drift.events},
            "fetches": {
                "issued": counters.issued,
                "installed": counters.installed,
                "dropped": counters.dropped,
            },
            "rows_installed": counters.installed_rows,
            "bytes_fetched": counters.fetched_bytes,
            "store_skipped": self.store_skipped,
            "requests": {"prefill": len(self._prefills), "decode": len(self._decoding)},
            "memd": self._memd_state(),
            "integrity": integrity,
            "kernels": native_status(),
        }

    def _memd_state(self) -> dict[str, Any]:
        if self.store is None:
            return {"state": "off"}
        return {
            **self.store.client.stats(),
            "pages_used": self.store.num_pages_used,
            "stored_bytes": self.store.stored_bytes,
        }

    def kept_positions(self, row: int) -> list[NDArray[np.int64]] | None:
        """Kept prompt positions of a watched row by compressed head id, for tests and study."""
        return None if self._retrieval is None else self._retrieval.kept_positions(row)

    def _budget_for(self, num_tokens: int) -> HeadBudget:
        return allocate_budget(self.tables.allocation, num_tokens, self._rule)
