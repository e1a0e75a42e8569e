"""What this plugin expects of SGLang, checked before anything is installed.

The manifest holds the signature of every SGLang callable that the adapter hooks,
overrides or relies on. A difference stops the server by name, instead of a wrong answer
later. ``HETERO_ALLOW_UNTESTED=1`` turns the refusal into a warning.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name

from hetero_sglang.errors import ConfigError

logger = logging.getLogger(__name__)

TESTED_VERSION = "0.5.23"
MANIFEST_PATH = Path(__file__).with_name("signatures.json")

_SRT = "sglang.srt."
LAUNCHER_TARGETS: tuple[str, ...] = (
    _SRT + "server_args.ServerArgs.add_cli_args",
    _SRT + "server_args.ServerArgs.from_cli_args",
    _SRT + "arg_groups.choices.add_attention_backend_choices",
    _SRT + "arg_groups.resolution_hooks.register_resolution_hook",
    _SRT + "arg_groups.overrides.resolving_view",
    _SRT + "plugins.hook_registry.HookRegistry.register",
    _SRT + "plugins.hook_registry.HookRegistry.apply_hooks",
)
"""Needed in every process."""

_KVC = _SRT + "mem_cache.kv_cache_configurator.KVCacheConfigurator."
_BASE_ALLOCATOR = _SRT + "mem_cache.allocator.base.BaseTokenToKVPoolAllocator."
_BUDGET = _SRT + "mem_cache.prefill_budget.PrefillBudget."
_POOL = _SRT + "mem_cache.memory_pool."
_BACKEND = _SRT + "layers.attention.base_attn_backend.AttentionBackend."
SCHEDULER_TARGETS: tuple[str, ...] = (
    _KVC + "_build_mha_kv_pool",
    _KVC + "_build_token_to_kv_pool_allocator",
    _SRT + "model_executor.pool_configurator.create_memory_pool_configurator",
    _SRT + "model_executor.pool_configurator.DefaultPoolConfigurator.calculate_pool_sizes",
    _SRT + "models.utils.enable_fused_set_kv_buffer",
    _SRT
    + "managers.scheduler_components.internal_state.SchedulerInternalStateController"
    + ".get_internal_state",
    _SRT + "layers.attention.attention_registry.register_attention_backend",
    _POOL + "ReqToTokenPool.alloc",
    _POOL + "ReqToTokenPool.attach_aux_cache",
    _POOL + "ReqToTokenPool.alloc_aux_to_lengths",
    _POOL + "ReqToTokenPool.free_rows",
    _POOL + "ReqToTokenPool.clear",
    _POOL + "MHATokenToKVPool._create_buffers",
    _POOL + "MHATokenToKVPool._init_data_ptrs_and_strides",
    _POOL + "MHATokenToKVPool.get_kv_size_bytes",
    _POOL + "MHATokenToKVPool.set_kv_buffer",
    _POOL + "MHATokenToKVPool.get_key_buffer",
    _POOL + "MHATokenToKVPool.get_value_buffer",
    _POOL + "MHATokenToKVPool.get_cpu_copy",
    _POOL + "MHATokenToKVPool.load_cpu_copy",
    _POOL + "MHATokenToKVPool.get_contiguous_buf_infos",
    _POOL + "MHATokenToKVPool.get_device_pool_infos",
    _POOL + "MHATokenToKVPool.move_kv_cache",
    _BASE_ALLOCATOR + "create_prefill_budget",
    _BASE_ALLOCATOR + "check_decode_capacity",
    _BUDGET + "__init__",
    _BUDGET + "check_prefill",
    _BUDGET + "can_allocate_prefill",
    _BUDGET + "reserve",
    _SRT + "managers.scheduler.Scheduler.get_prefill_adder_class",
    _SRT + "managers.schedule_policy.PrefillAdder.add_one_req",
    _SRT + "beam_search.coordinator.BeamCoordinator.validate_and_init",
    _BACKEND + "init_forward_metadata",
    _BACKEND + "forward_extend",
    _BACKEND + "forward_decode",
    _BACKEND + "support_triton",
    _BACKEND + "forward",
    _SRT + "layers.radix_attention.RadixAttention.forward",
    _SRT + "model_executor.forward_batch_info.ForwardBatch",
    _SRT + "model_executor.forward_context.ForwardContext",
    _SRT + "model_executor.forward_context.forward_context",
    _SRT + "runtime_context.get_model",
    _SRT + "runtime_context.get_serving",
    _SRT + "utils.hf_transformers_utils.get_tokenizer",
)
"""Needed in the scheduler process as well."""

_RUNNER = _SRT + "model_executor.runner.decode_cuda_graph_runner."
GRAPH_TARGETS: tuple[str, ...] = (
    _BACKEND + "init_cuda_graph_state",
    _BACKEND + "init_forward_metadata_out_graph",
    _BACKEND + "init_forward_metadata_in_graph",
    _BACKEND + "get_cuda_graph_seq_len_fill_value",
    _BACKEND + "on_after_cuda_graph_warmup",
    _BACKEND + "shared_read_ends",
    _RUNNER + "build_replay_fb_view",
    _RUNNER + "DecodeCudaGraphRunner._run_in_graph_metadata_prep",
    _SRT + "model_executor.runner_backend.full_cuda_graph_backend.FullCudaGraphBackend.capture_one",
)
"""Needed where decode steps are captured in CUDA graphs."""


def signature_of(target: str) -> str:
    """Signature of a dotted target, looking through wrappers of other hooks.

    Raises:
        ConfigError: SGLang has no such callable.
    """
    try:
        found = resolve_name(target)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"SGLang has no {target}: {error}") from error
    return str(inspect.signature(inspect.unwrap(found)))


def check_compatibility(targets: tuple[str, ...]) -> None:
    """Compares SGLang with the manifest.

    Args:
        targets: Dotted names to check.

    Raises:
        ConfigError: Another version or signature, unless ``HETERO_ALLOW_UNTESTED=1``.
    """
    problems: list[str] = []
    installed = version("sglang")
    if installed != TESTED_VERSION:
        problems.append(f"version {installed} is installed, {TESTED_VERSION} is tested")
    manifest: dict[str, str] = json.loads(MANIFEST_PATH.read_text(encoding="utf-8"))
    for target in targets:
        try:
            found = signature_of(target)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if found != manifest.get(target):
            problems.append(f"{target}{found} differs from the tested {manifest.get(target)}")
    if not problems:
        return
    text = (
        f"this SGLang does not match what hetero-sglang was tested with: {'; '.join(problems)}. "
        f"Install sglang=={TESTED_VERSION}, or set HETERO_ALLOW_UNTESTED=1 to try anyway"
    )
    if os.environ.get("HETERO_ALLOW_UNTESTED") == "1":
        logger.warning(text)
        return
    raise ConfigError(text)


def write_manifest() -> None:
    """Records the signatures of the installed SGLang; run when moving to a new version."""
    targets = LAUNCHER_TARGETS + SCHEDULER_TARGETS + GRAPH_TARGETS
    manifest = {target: signature_of(target) for target in targets}
    MANIFEST_PATH.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
