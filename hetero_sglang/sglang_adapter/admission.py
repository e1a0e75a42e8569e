"""Admission and decode checks that count blocks and staging beside tokens.

SGLang's scheduler counts logical tokens; those stay as they are. A request also needs a
staging extent for its prompt, blocks for what its compressed heads keep, and blocks for
what it will generate. What staging has free depends on when this process's copies to memd are done:
ranks, which must admit alike, would have to agree on it first (they are refused so far).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from sglang.srt.managers.schedule_policy import AddReqResult, PrefillAdder
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.prefill_budget import PrefillBudget

if TYPE_CHECKING:
    from hetero_sglang.runtime import HeteroRuntime

EXPECTED_GENERATION_SHARE = 0.3
"""Share of ``max_new_tokens`` that a new request without ``ignore_eos`` is expected to use.

Requests mostly stop early (a chat without a limit asks for the whole context). Where
they do not, SGLang's retraction makes room.
"""


class HeteroPrefillBudget(PrefillBudget):
    """One prefill pass over tokens, staging extents and blocks."""

    def __init__(
        self,
        allocator: HeteroAllocator,
        tree_cache: Any,
        *,
        num_mixed_decode_tokens: int = 0,
    ) -> None:
        super().__init__(allocator, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens)
        self._runtime = allocator.runtime
        self._reserved_tokens = self.total_offset
        self._staged: list[int] = []
        self._blocks = 0
        self._candidate = (0, 0)

    def check_prefill(
        self,
        *,
        extend_input_len: int,
        total_tokens: int,
        max_new_tokens: int,
        input_tokens: int,
        swa_host_hit_length: int,
        chunk_limit: int | None,
        auxiliary_swa_host_hit_length: int = 0,
    ) -> tuple[bool, int | None]:
        """Admits a request when tokens, staging and blocks suffice."""
        admitted, limit = super().check_prefill(
            extend_input_len=extend_input_len,
            total_tokens=total_tokens,
            max_new_tokens=max_new_tokens,
            input_tokens=input_tokens,
            swa_host_hit_length=swa_host_hit_length,
            chunk_limit=chunk_limit,
            auxiliary_swa_host_hit_length=auxiliary_swa_host_hit_length,
        )
        expected = math.ceil(max_new_tokens * EXPECTED_GENERATION_SHARE)
        if admitted and self._fits(extend_input_len, expected):
            return True, limit
        return False, None

    def can_allocate_prefill(
        self,
        *,
        paged_input: int,
        extend_input_len: int,
        max_new_tokens: int,
        chunk_limit: int | None,
    ) -> bool:
        """The same for requests that are sure to generate ``max_new_tokens``."""
        return super().can_allocate_prefill(
            paged_input=paged_input,
            extend_input_len=extend_input_len,
            max_new_tokens=max_new_tokens,
            chunk_limit=chunk_limit,
        ) and self._fits(extend_input_len, max_new_tokens)

    def reserve(
        self,
        extend_input_len: int,
        max_new_tokens: int,
        *,
        extra_tokens: int = 0,
        chunk_limit: int | None = None,
        is_chunked_continuation: bool = False,
    ) -> None:
        """Charges an admitted request; the last one that was checked."""
        before = self.total_offset
        super().reserve(
            extend_input_len,
            max_new_tokens,
            extra_tokens=extra_tokens,
            chunk_limit=chunk_limit,
            is_chunked_continuation=is_chunked_continuation,
        )
        self._reserved_tokens += self.total_offset - before
        # A continuing chunk has had its whole prompt's room since its first chunk.
        if not is_chunked_continuation:
            num_tokens, blocks = self._candidate
            self._staged.append(num_tokens)
            self._blocks += blocks

    def has_staging(self, num_tokens: int) -> bool:
        """Whether a prompt of this length can be staged beside those admitted in this pass."""
        return self._runtime.staging.extents.fits([*self._staged, num_tokens])

    def _fits(self, num_tokens: int, new_tokens: int) -> bool:
        runtime = self._runtime
        blocks = runtime.blocks_for_prompt(num_tokens) + runtime.blocks_for_growth(new_tokens)
        self._candidate = (num_tokens, blocks)
        # What SGLang expects of running requests is in the offset that we did not reserve.
        running = runtime.blocks_for_growth(math.ceil(self.total_offset - self._reserved_tokens))
        free = runtime.blocks.num_free - runtime.num_promised_blocks - running - self._blocks
        if runtime.is_empty and not self._staged:
            # Alone, any request that fits the context fits the pool (cache/sizing.py).
            return runtime.blocks_for_prompt(num_tokens) <= free
        return blocks <= free


class HeteroPrefillAdder(PrefillAdder):
    """SGLang's admission, with a wait for staging that does not mark the batch as full.

    A full token pool stops admission until a request ends. Staging is free again after the
    next prefill, so a prompt that does not fit beside another one only waits for the next pass.
    """

    def add_one_req(
        self, req: Any, has_chunked_req: bool, truncation_align_size: int | None
    ) -> AddReqResult:
        """Admits a request, or says why not."""
        if not self.memory_budget.has_staging(len(req.full_untruncated_fill_ids)):
            return AddReqResult.OTHER
        return super().add_one_req(req, has_chunked_req, truncation_align_size)


class HeteroAllocator(TokenToKVPoolAllocator):
    """SGLang's token allocator with the policy's admission and decode checks.

    Attributes:
        runtime: Set by the attention backend before the first request.
    """

    runtime: HeteroRuntime

    def create_prefill_budget(
        self, tree_cache: Any, *, num_mixed_decode_tokens: int = 0
    ) -> HeteroPrefillBudget:
        """Budget of one prefill pass."""
        # Staging comes back when copies from it are done, also where nothing decodes meanwhile.
        self.runtime.poll()
        return HeteroPrefillBudget(
            self, tree_cache, num_mixed_decode_tokens=num_mixed_decode_tokens
        )

    def check_decode_capacity(
        self,
        *,
        num_tokens: int,
        tree_cache: Any,
        requests: Any = None,
        spec_algorithm: Any = None,
    ) -> bool:
        """Whether the next step fits, in tokens and in blocks."""
        if not super().check_decode_capacity(
            num_tokens=num_tokens,
            tree_cache=tree_cache,
            requests=requests,
            spec_algorithm=spec_algorithm,
        ):
            return False
        if not requests:
            return True
        rows = np.array([request.kv.req_pool_idx for request in requests], dtype=np.int64)
        lens = np.array([request.kv.kv_allocated_len + 1 for request in requests], dtype=np.int64)
        free = self.runtime.blocks.num_free - self.runtime.num_promised_blocks
        return self.runtime.blocks_to_grow(rows, lens) <= free
