"""Hooks of the scheduler process: pool, allocator, sizes, requests and state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from hetero_sglang.errors import ConfigError
from hetero_sglang.sglang_adapter.arguments import ATTENTION_BACKEND

if TYPE_CHECKING:
    from collections.abc import Callable

_KVC = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator."


def build_pool(original: Any, self: Any, **kwargs: Any) -> Any:
    """Builds the resident pool in place of SGLang's (AROUND ``_build_mha_kv_pool``)."""
    from hetero_sglang.sglang_adapter.pool import HeteroKVPool
    from hetero_sglang.sglang_adapter.setup import setup_for

    kwargs["mha_pool_class"] = type("HeteroKVPool", (HeteroKVPool,), {"setup": setup_for(self)})
    return original(self, **kwargs)


def build_allocator(original: Any, self: Any, **kwargs: Any) -> Any:
    """Gives SGLang's token allocator the policy's checks (AROUND)."""
    from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator

    from hetero_sglang.sglang_adapter.admission import HeteroAllocator

    allocator = original(self, **kwargs)
    if type(allocator) is not TokenToKVPoolAllocator:
        raise ConfigError(
            f"--kv-policy heterocache needs SGLang's token allocator, got "
            f"{type(allocator).__name__}; use --page-size 1"
        )
    allocator.__class__ = HeteroAllocator
    return allocator


def size_pools(original: Any, configurator: Any) -> Any:
    """Counts what a token costs under the policy (AROUND)."""
    from sglang.srt.model_executor.pool_configurator import DefaultPoolConfigurator

    from hetero_sglang.sglang_adapter.setup import setup_for

    sizes = original(configurator)
    if type(sizes) is not DefaultPoolConfigurator:
        raise ConfigError(
            f"--kv-policy heterocache cannot size the pools of {type(sizes).__name__} models"
        )
    rule = setup_for(configurator).rule
    sizes._cell_size = rule.bytes_per_token
    sizes._fixed_overhead_bytes += rule.fixed_bytes()
    return sizes


def announce_requests(original: Any, self: Any, reqs: list[Any]) -> Any:
    """Tells the runtime how long each prompt is and how far its chunk goes (AROUND).

    ``alloc_for_extend`` calls this for every chunk; decode never does.
    """
    rows = original(self, reqs)
    state = self._aux_cache
    if rows is not None and state is not None:
        for req, row in zip(reqs, rows, strict=True):
            state.runtime.begin_prefill(row, len(req.full_untruncated_fill_ids), req.extend_end)
    return rows


def choose_prefill_adder(original: Any, self: Any) -> Any:
    """Admission that can wait for staging (AROUND ``Scheduler.get_prefill_adder_class``)."""
    from sglang.srt.managers.schedule_policy import PrefillAdder

    from hetero_sglang.sglang_adapter.admission import HeteroPrefillAdder

    chosen = original(self)
    if chosen is not PrefillAdder:
        raise ConfigError(
            f"--kv-policy heterocache needs SGLang's PrefillAdder, got {chosen.__name__}"
        )
    return HeteroPrefillAdder


def refuse_beam_search(original: Any, *args: Any, **kwargs: Any) -> str:
    """Answers requests for beam search, which no flag announces, with an error (AROUND).

    Beams are rows that share token ids; the rows of compressed heads would have to be copied for
    each, which nobody does.
    """
    return (
        "Beam search is not supported with --kv-policy heterocache; send beam_width 1, or serve "
        "without the flag."
    )


def refuse_fused_write(original: Any, *args: Any, **kwargs: Any) -> bool:
    """Keeps models from writing the stock KV layout themselves (AROUND)."""
    return False


def add_state(result: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Adds ``heterocache`` to the internal state (AFTER)."""
    from hetero_sglang.sglang_adapter.state import server_state

    result.internal_state["heterocache"] = server_state(self.scheduler)
    return result


_HOOKS: dict[str, tuple[Callable[..., Any], HookType]] = {
    _KVC + "_build_mha_kv_pool": (build_pool, HookType.AROUND),
    _KVC + "_build_token_to_kv_pool_allocator": (build_allocator, HookType.AROUND),
    "sglang.srt.model_executor.pool_configurator.create_memory_pool_configurator": (
        size_pools,
        HookType.AROUND,
    ),
    "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.alloc": (announce_requests, HookType.AROUND),
    "sglang.srt.managers.scheduler.Scheduler.get_prefill_adder_class": (
        choose_prefill_adder,
        HookType.AROUND,
    ),
    "sglang.srt.beam_search.coordinator.BeamCoordinator.validate_and_init": (
        refuse_beam_search,
        HookType.AROUND,
    ),
    "sglang.srt.models.utils.enable_fused_set_kv_buffer": (refuse_fused_write, HookType.AROUND),
    "sglang.srt.managers.scheduler_components.internal_state.SchedulerInternalStateController"
    ".get_internal_state": (add_state, HookType.AFTER),
}


def register_scheduler_hooks() -> None:
    """Registers hooks and the attention backend; SGLang applies the hooks."""
    from sglang.srt.layers.attention.attention_registry import register_attention_backend

    for target, (hook, kind) in _HOOKS.items():
        HookRegistry.register(target, hook, kind)

    @register_attention_backend(ATTENTION_BACKEND)
    def build(runner: Any) -> Any:
        if str(runner.device).startswith("cuda"):
            from hetero_sglang.sglang_adapter.graph import GraphAttentionBackend

            return GraphAttentionBackend(runner)
        from hetero_sglang.sglang_adapter.backend import HeteroAttentionBackend

        return HeteroAttentionBackend(runner)


def verify_hooks() -> None:
    """Makes sure that SGLang applied every hook; it only logs when one fails.

    Raises:
        ConfigError: Naming the missing hooks.
    """
    missing = sorted(set(_HOOKS) - HookRegistry._patched)
    if missing:
        raise ConfigError(
            f"SGLang did not apply these hooks of --kv-policy heterocache: {', '.join(missing)}; "
            "see its log for the reason"
        )
