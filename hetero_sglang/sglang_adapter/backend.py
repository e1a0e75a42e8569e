"""Attention backend and per-request state under the policy."""

from __future__ import annotations

import atexit
import logging
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from hetero_sglang.cache.blocks import BlockPool
from hetero_sglang.cache.host_store import HostStore
from hetero_sglang.cache.staging import StagingPool
from hetero_sglang.cache.transfers import Transfers
from hetero_sglang.cache.watch import WatchPool
from hetero_sglang.errors import ConfigError
from hetero_sglang.prefill import ExtendSpan
from hetero_sglang.runtime import HeteroRuntime
from hetero_sglang.sglang_adapter.admission import HeteroAllocator
from hetero_sglang.sglang_adapter.hooks import verify_hooks
from hetero_sglang.sglang_adapter.memory_daemon import connect_memory_daemon
from hetero_sglang.sglang_adapter.pool import HeteroKVPool
from hetero_sglang.sglang_adapter.refusals import check_layer

logger = logging.getLogger(__name__)


class RequestState:
    """The runtime as SGLang's per-request auxiliary cache (``ReqToTokenPool`` aux cache).

    Attributes:
        dense_capacity: Logical tokens that may be scheduled.
    """

    def __init__(self, runtime: HeteroRuntime, capacity: int) -> None:
        self._runtime = runtime
        self.dense_capacity = capacity

    @property
    def runtime(self) -> HeteroRuntime:
        """The runtime behind this state."""
        return self._runtime

    def alloc_to_lengths(
        self, *, req_pool_indices_cpu: torch.Tensor, target_seq_lens_cpu: torch.Tensor
    ) -> None:
        """Makes room for each row up to its target length."""
        self._runtime.allocate(req_pool_indices_cpu.numpy(), target_seq_lens_cpu.numpy())

    def free(self, row: int) -> None:
        """Frees a row on finish, abort or retraction."""
        self._runtime.free(int(row))

    def clear(self) -> None:
        """Frees all rows on a cache flush."""
        self._runtime.clear()

    def reset_allocator(self) -> None:
        """Frees all rows when SGLang resets its pools."""
        self._runtime.clear()


class HeteroAttentionBackend(AttentionBackend):
    """Routes SGLang's extend and decode to the runtime.

    Attributes:
        runtime: Residency of all requests.
        runtime_class: What ``runtime`` is made of.
    """

    runtime_class: type[HeteroRuntime] = HeteroRuntime

    def __init__(self, runner: Any) -> None:
        super().__init__()
        verify_hooks()
        pool = runner.token_to_kv_pool
        if not isinstance(pool, HeteroKVPool):
            raise ConfigError(
                f"--kv-policy heterocache found the pool {type(pool).__name__} instead of its "
                "own; another plugin or flag replaced it"
            )
        allocator = runner.token_to_kv_pool_allocator
        if not isinstance(allocator, HeteroAllocator):
            raise ConfigError(
                f"--kv-policy heterocache found the allocator {type(allocator).__name__} instead "
                "of its own; another plugin or flag replaced it"
            )
        self.runtime = _build_runtime(pool, runner.req_to_token_pool, self.runtime_class)
        allocator.runtime = self.runtime
        runner.req_to_token_pool.attach_aux_cache(
            RequestState(self.runtime, runner.max_total_num_tokens)
        )
        self._spans: list[ExtendSpan] = []
        setup = pool.setup
        self._num_q_heads = setup.tables.num_kv_heads * setup.group_size
        self._num_kv_heads = setup.tables.num_kv_heads
        self._head_dim = setup.head_dim

    def support_triton(self) -> bool:
        """False: metadata must take SGLang's torch paths."""
        return False

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepares a batch before its first layer."""
        mode = forward_batch.forward_mode
        if mode.is_decode():
            self.runtime.begin_decode(
                forward_batch.req_pool_indices.long(),
                forward_batch.seq_lens.long(),
                forward_batch.out_cache_loc.long(),
            )
        elif mode.is_extend() and not forward_batch.rids:
            # Warm-ups and captures of SGLang's, which belong to no request.
            self._spans = []
        elif mode.is_extend():
            rows = forward_batch.req_pool_indices.tolist()
            prefix = forward_batch.extend_prefix_lens.tolist()
            lens = forward_batch.extend_seq_lens.tolist()
            spans: list[ExtendSpan] = []
            start = 0
            for row, prefix_len, num_new in zip(rows, prefix, lens, strict=True):
                spans.append(ExtendSpan(row, start, prefix_len, num_new))
                start += num_new
            self._spans = spans
            self.runtime.begin_extend(spans)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of a prompt chunk, [num_tokens, num_q_heads * head_dim]."""
        self._check_layer(layer, save_kv_cache)
        if not self._spans:
            return q.new_zeros(q.shape[0], self._num_q_heads * self._head_dim)
        heads = self._by_head(q, k, v)
        out = self.runtime.extend_layer(layer.layer_id, *heads, self._spans, layer.scaling)
        return out.view(-1, self._num_q_heads * self._head_dim)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attention of one new token a request, [num_reqs, num_q_heads * head_dim]."""
        self._check_layer(layer, save_kv_cache)
        out = self.runtime.decode_layer(
            layer.layer_id, *self._by_head(q, k, v), scale=layer.scaling
        )
        return out.view(-1, self._num_q_heads * self._head_dim)

    def _by_head(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            q.view(-1, self._num_q_heads, self._head_dim),
            k.view(-1, self._num_kv_heads, self._head_dim),
            v.view(-1, self._num_kv_heads, self._head_dim),
        )

    @staticmethod
    def _check_layer(layer: Any, save_kv_cache: bool) -> None:
        if not save_kv_cache:
            raise ConfigError(
                "the model writes KV by a fused kernel, which --kv-policy heterocache cannot serve"
            )
        check_layer(layer)


def _build_runtime(
    pool: HeteroKVPool, req_to_token_pool: Any, runtime_class: type[HeteroRuntime]
) -> HeteroRuntime:
    setup, shape = pool.setup, pool.shape
    req_to_token = req_to_token_pool.req_to_token
    blocks = BlockPool(
        num_blocks=shape.num_blocks,
        block_tokens=shape.block_tokens,
        head_dim=setup.head_dim,
        num_rows=req_to_token.shape[0],
        num_compressed=setup.tables.num_compressed,
        context_tokens=req_to_token.shape[1],
        dtype=setup.dtype,
        device=pool.device,
    )
    staging = StagingPool(
        setup.tables.num_compressed,
        shape.staging_tokens,
        setup.head_dim,
        setup.dtype,
        pool.device,
    )
    store: HostStore | None = None
    if setup.config.retrieval != "off" and setup.tables.num_compressed:
        device = torch.device(pool.device)
        daemon = connect_memory_daemon(setup, shape, device)
        atexit.register(daemon.close)
        store = HostStore(
            daemon.client,
            num_slots=shape.num_slots,
            num_heads=setup.tables.num_compressed,
            head_dim=setup.head_dim,
            page_tokens=setup.config.page_tokens,
            dtype=setup.dtype,
            transfers=None if device.type == "cpu" else Transfers(device),
        )
    watch: WatchPool | None = None
    if setup.config.has_watch_pool:
        watch = WatchPool(
            num_pivots=setup.tables.num_pivots,
            num_slots=shape.num_slots,
            head_dim=setup.head_dim,
            watch_dtype=setup.config.watch_dtype,
            dtype=setup.dtype,
            device=pool.device,
        )
        assert watch.token_bytes == shape.watched_bytes
    runtime = runtime_class(
        tables=setup.tables,
        config=setup.config,
        k_resident=pool.k_resident,
        v_resident=pool.v_resident,
        blocks=blocks,
        staging=staging,
        store=store,
        watch=watch,
        req_to_token=req_to_token,
        group_size=setup.group_size,
    )
    logger.info(
        "HeteroCache: profile %s, preset %s, ratio %.3f (floor %.3f), %d resident and %d "
        "compressed heads, %.1f MiB resident + %.1f MiB watched keys (%s) + %.1f MiB staging + "
        "%.1f MiB blocks, prefix reuse off, memd %s",
        setup.profile.origin,
        setup.config.preset,
        setup.config.ratio,
        setup.tables.floor,
        setup.tables.num_planes,
        setup.tables.num_compressed,
        shape.resident_bytes / 2**20,
        shape.watch_bytes / 2**20,
        setup.config.watch_dtype,
        shape.staging_bytes / 2**20,
        shape.block_bytes / 2**20,
        "off" if store is None else f"{store.client.num_pages} pages",
    )
    return runtime
