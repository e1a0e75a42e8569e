"""What a drift check knows: pivots' newest queries, the sets they are held against, the totals.

Whose turn it is, what to do about a drift and when results are there is the runtime's matter.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from hetero_kernels import score_positions, top_bits, topk_overlap
from hetero_sglang.cache.device_bytes import DRIFT_SCRATCH_BYTES, check_bytes
from hetero_sglang.cache.transfers import to_device
from hetero_sglang.policy.drift import drift_verdict, is_check_due

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_kernels import QuantizedKeys
    from hetero_kernels.dispatch import Impl
    from hetero_sglang.config import HeteroConfig
    from hetero_sglang.policy.budget import HeadBudget
    from hetero_sglang.policy.roles import RoleTables


class DriftWatch:
    """The pivots of all rows that are watched.

    Attributes:
        pivot_queries: Newest S queries of each pivot, [num_rows, num_pivots, S, G, D], written by
            ``append_rows``; no rows where nobody watches.
        reference: Positions that each pivot attended to when it was last looked at, bit sets, int32
            [num_rows, num_pivots, ceil(context / 32)].
        checks: Pivots checked since start.
        events: Pivots found to have drifted since start.
    """

    def __init__(
        self,
        *,
        tables: RoleTables,
        config: HeteroConfig,
        keys: torch.Tensor | QuantizedKeys,
        req_to_token: torch.Tensor,
        queries_like: torch.Tensor,
        group_size: int,
        is_on: bool,
    ) -> None:
        """Makes room for every row.

        Args:
            tables: Index tables of the head profile.
            config: Settings.
            keys: The keys that pivots watch, [num_planes, num_slots, D], owned by a pool.
            req_to_token: SGLang's token ids by row and position, int32 [num_rows, context].
            queries_like: A tensor of the queries' D, dtype and device.
            group_size: Query heads a KV head, G.
            is_on: Whether any row will be watched.
        """
        num_rows, context = req_to_token.shape
        device = queries_like.device
        self.checks = 0
        self.events = 0
        self._config = config
        self._num_pivots = tables.num_pivots
        self._keys = keys
        self._plane = torch.from_numpy(tables.watched_plane).to(device)
        self._req_to_token = req_to_token
        self._is_watched = np.zeros(num_rows, dtype=np.bool_)
        self._top_k = np.zeros(num_rows, dtype=np.int32)
        num_words = -(-context // 32)
        watching_rows = num_rows if is_on else 0
        self.reference = torch.zeros(
            watching_rows, tables.num_pivots, num_words, dtype=torch.int32, device=device
        )
        self.pivot_queries = torch.zeros(
            *(watching_rows, tables.num_pivots, config.drift_interval, group_size),
            queries_like.shape[-1],
            dtype=queries_like.dtype,
            device=device,
        )

    def begin(self, row: int, queries: torch.Tensor, budget: HeadBudget, scale: float) -> None:
        """Watches a row from now on; references are what its last prompt queries attend to.

        Args:
            row: Row of the request table.
            queries: Last prompt query of each pivot, [num_pivots, G, D].
            budget: Its prompt's budget.
            scale: Softmax scale.
        """
        scores = score_positions(
            queries,
            self._keys,
            scale,
            planes=self._plane,
            slots=self._req_to_token[row, : budget.num_tokens],
        )
        self.reference[row] = top_bits(scores, budget.reference_size, self.reference.shape[2])
        self._top_k[row] = budget.reference_size
        self._is_watched[row] = True

    def end(self, row: int) -> None:
        """Watches a row no longer."""
        self._is_watched[row] = False

    def end_all(self) -> None:
        """Watches no row any more."""
        self._is_watched[:] = False

    def is_due(self, rows: NDArray[np.int64], steps: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the rows, after so many decode steps each, are to be checked now."""
        return self._is_watched[rows] & is_check_due(steps, self._config.drift_interval)

    def groups(
        self, rows: NDArray[np.int64], prompt_lens: NDArray[np.int32]
    ) -> list[NDArray[np.int64]]:
        """Rows to measure together: as many as ``DRIFT_SCRATCH_BYTES`` hold, and one at least.

        Prompts of like length go together, because scores are as wide as the longest of a group.

        Args:
            rows: Rows that are due, int64 [num_due].
            prompt_lens: Their prompts' tokens, [num_due].

        Returns:
            Each row once; all of them, in their order, where they fit.
        """

        def num_bytes(count: int, longest: int) -> int:
            return count * check_bytes(self._num_pivots, self._config.drift_interval, longest)

        if num_bytes(len(rows), int(prompt_lens.max())) <= DRIFT_SCRATCH_BYTES:
            return [rows]
        found: list[NDArray[np.int64]] = []
        order = np.argsort(prompt_lens, kind="stable")
        begin = 0
        for end in range(1, len(order) + 1):
            is_last = end == len(order)
            # Ascending: the next one would be the longest of its group.
            if is_last or num_bytes(end + 1 - begin, int(prompt_lens[order[end]])) > (
                DRIFT_SCRATCH_BYTES
            ):
                found.append(rows[order[begin:end]])
                begin = end
        return found

    def measure(
        self,
        rows: NDArray[np.int64],
        prompt_lens: torch.Tensor,
        scale: float,
        *,
        width: int | None = None,
        impl: Impl = "auto",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Holds every pivot of these rows against its reference.

        Args:
            rows: Rows of the request table, int64 [num_due]; one of ``groups``.
            prompt_lens: Prompt tokens by row, int32 [num_rows], on the keys' device.
            scale: Softmax scale.
            width: Longest of these prompts, or more; None: looked up, which waits for a device.
            impl: Kernel.

        Returns:
            Overlap with the reference, fp32 [num_due * num_pivots, S], and the pooled scores of the
            newest queries, fp32 [num_due * num_pivots, width].
        """
        device = self.pivot_queries.device
        index = to_device(rows, device)
        num_pivots = self._num_pivots
        return topk_overlap(
            self.pivot_queries.index_select(0, index).flatten(0, 1),
            keys=self._keys,
            planes=self._plane.repeat(len(rows)),
            req_to_token=self._req_to_token,
            rows=index.repeat_interleave(num_pivots),
            prompt_lens=prompt_lens.index_select(0, index).repeat_interleave(num_pivots),
            top_k=to_device(self._top_k[rows], device).repeat_interleave(num_pivots),
            reference=self.reference.index_select(0, index).flatten(0, 1),
            scale=scale,
            width=width,
            impl=impl,
        )

    def drifted(
        self, rows: NDArray[np.int64], overlap: NDArray[np.float32]
    ) -> list[tuple[int, int, int]]:
        """Who drifted, counted.

        Args:
            rows: Rows that were measured.
            overlap: What ``measure`` gave for them, on the host.

        Returns:
            Row, pivot and entry of ``overlap`` of each pivot that drifted.
        """
        found = np.flatnonzero(drift_verdict(overlap, self._config.drift_threshold))
        self.checks += overlap.shape[0]
        self.events += len(found)
        num_pivots = self._num_pivots
        return [(int(rows[i // num_pivots]), i % num_pivots, i) for i in found.tolist()]

    def set_reference(self, row: int, pivot: int, scores: torch.Tensor, size: int) -> None:
        """Replaces one pivot's set by the ``size`` best of ``scores``, fp32 [num_tokens]."""
        self.reference[row, pivot] = top_bits(scores, size, self.reference.shape[2])
