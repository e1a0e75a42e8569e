"""Combinations that the policy refuses at start, each by name and with a remedy."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hetero_sglang.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNTESTED_CUDA = "HETERO_SGLANG_UNTESTED_CUDA"
"""Set to 1, it lets the policy start on a CUDA device, where nobody has run it yet."""


@dataclass(frozen=True)
class Refusal:
    """One feature that does not go together with the policy.

    Attributes:
        flag: What the user wrote.
        applies: Whether the resolved arguments ask for it.
        reason: Why not.
        remedy: What to do instead.
    """

    flag: str
    applies: Callable[[Any], bool]
    reason: str
    remedy: str = "drop the flag or serve without --kv-policy heterocache"


def _set(name: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, name, None))


def _above_one(name: str) -> Callable[[Any], bool]:
    return lambda args: (getattr(args, name, 1) or 1) > 1


def _is_untested_cuda(args: Any) -> bool:
    return str(getattr(args, "device", "cpu")) == "cuda" and os.environ.get(UNTESTED_CUDA) == "1"


def _is_refused_device(args: Any) -> bool:
    return str(getattr(args, "device", "cpu")) != "cpu" and not _is_untested_cuda(args)


def _is_prefill_captured(args: Any) -> bool:
    """Whether a graph holds the attention of prompts too; breakable ones leave it out."""
    given = getattr(args, "cuda_graph_backend_prefill", None)
    if str(getattr(args, "device", "cpu")) == "cuda":
        prefill = getattr(getattr(args, "cuda_graph_config", None), "prefill", None)
        given = getattr(prefill, "backend", given)
    return given in ("full", "tc_piecewise")


_OWN_TIER = "it moves KV of all heads of a token between tiers by itself"
_ONE_RANK = "head roles are not split over ranks yet"

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "--device",
        _is_refused_device,
        "its path through CUDA is written but has not been run on a GPU yet, and there is none "
        "for other devices",
        "use --device cpu (with SGLANG_USE_CPU_ENGINE=1), serve without --kv-policy heterocache, "
        f"or set {UNTESTED_CUDA}=1 to try it on a CUDA device",
    ),
    Refusal(
        "--speculative-algorithm",
        _set("speculative_algorithm"),
        "draft tokens would be appended to heads and rolled back",
    ),
    Refusal(
        "--disaggregation-mode",
        lambda args: getattr(args, "disaggregation_mode", "null") not in (None, "null"),
        "KV transfer between servers expects all heads of a token together",
    ),
    Refusal("--pp-size", _above_one("pp_size"), "head roles are not split over pipeline stages"),
    Refusal("--tp-size", _above_one("tp_size"), _ONE_RANK),
    Refusal("--dp-size", _above_one("dp_size"), _ONE_RANK, "run one server a replica"),
    Refusal("--enable-dp-attention", _set("enable_dp_attention"), _ONE_RANK),
    Refusal("--attn-cp-size", _above_one("attn_cp_size"), _ONE_RANK),
    Refusal("--dcp-size", _above_one("dcp_size"), _ONE_RANK),
    Refusal("--enable-kv-cache-sharding", _set("enable_kv_cache_sharding"), _ONE_RANK),
    Refusal("--enable-hierarchical-cache", _set("enable_hierarchical_cache"), _OWN_TIER),
    Refusal("--enable-hisparse", _set("enable_hisparse"), _OWN_TIER),
    Refusal("--enable-lmcache", _set("enable_lmcache"), _OWN_TIER),
    Refusal("--enable-flexkv", _set("enable_flexkv"), _OWN_TIER),
    Refusal(
        "--enable-unified-cache-external-linker",
        _set("enable_unified_cache_external_linker"),
        _OWN_TIER,
    ),
    Refusal("--enable-unified-memory", _set("enable_unified_memory"), _OWN_TIER),
    Refusal(
        "--radix-cache-backend",
        _set("radix_cache_backend"),
        "prefix reuse is off under the policy so far",
    ),
    Refusal(
        "--enable-mixed-chunk",
        _set("enable_mixed_chunk"),
        "a batch must be all prefill or all decode",
    ),
    Refusal(
        "--enable-streaming-session",
        _set("enable_streaming_session"),
        "a session keeps KV of a request that has ended",
    ),
    Refusal(
        "--enable-session-radix-cache",
        _set("enable_session_radix_cache"),
        "prefix reuse is off under the policy so far",
    ),
    Refusal(
        "--kv-cache-dtype",
        lambda args: getattr(args, "kv_cache_dtype", "auto") not in ("auto", "bfloat16", "bf16"),
        "rows are kept in the model's dtype",
        "use --kv-cache-dtype auto",
    ),
    Refusal(
        "--page-size",
        lambda args: getattr(args, "page_size", 1) not in (None, 1),
        "resident rows are addressed by single token ids",
        "use --page-size 1",
    ),
    Refusal("--use-ray", _set("use_ray"), "plugins are not loaded in Ray actors"),
    Refusal(
        "--enable-deterministic-inference",
        _set("enable_deterministic_inference"),
        "asynchronous retrieval makes results depend on timing",
    ),
    Refusal("--enable-two-batch-overlap", _set("enable_two_batch_overlap"), "a step is one batch"),
    Refusal("--enable-pdmux", _set("enable_pdmux"), "a step is one batch"),
    Refusal("--dllm-algorithm", _set("dllm_algorithm"), "diffusion decoding rewrites KV"),
    Refusal(
        "--enable-memory-saver",
        _set("enable_memory_saver"),
        "it releases KV that memd's bookkeeping still counts",
    ),
    Refusal(
        "--prefill-only-disable-kv-cache",
        _set("prefill_only_disable_kv_cache"),
        "there is no KV to keep",
    ),
    Refusal(
        "--kv-canary",
        lambda args: getattr(args, "kv_canary", "none") not in (None, "none"),
        "it reads the stock pool's layout",
    ),
    Refusal(
        "--enable-nvidia-megakernel",
        _set("enable_nvidia_megakernel"),
        "it brings its own attention",
    ),
    Refusal(
        "--enable-torch-compile",
        _set("enable_torch_compile"),
        "the attention backend is not traceable",
    ),
    Refusal(
        "--cuda-graph-backend-prefill",
        _is_prefill_captured,
        "selection at the end of a prompt is host work too, which a graph does not hold",
        "use --cuda-graph-backend-prefill breakable or disabled",
    ),
    Refusal("--encoder-only", _set("encoder_only"), "there is no KV to keep"),
)


def check_server_args(args: Any) -> None:
    """Refuses resolved server arguments that do not go with the policy.

    Args:
        args: View of the resolved ``ServerArgs``.

    Raises:
        ConfigError: Naming the flag, its value, the reason and the remedy.
    """
    for refusal in REFUSALS:
        if refusal.applies(args):
            value = getattr(args, refusal.flag.lstrip("-").replace("-", "_"), None)
            raise ConfigError(
                f"{refusal.flag} {value} does not go with --kv-policy heterocache: "
                f"{refusal.reason}; {refusal.remedy}"
            )
    if _is_untested_cuda(args):
        logger.warning(
            "%s=1: --kv-policy heterocache has not been run on a GPU yet; compare its answers with "
            "stock SGLang's before you trust them",
            UNTESTED_CUDA,
        )


def check_kv_dtype(kv_dtype: torch.dtype, model_dtype: torch.dtype) -> None:
    """Refuses KV of another dtype than the model's, whether a flag or the checkpoint asks for it.

    Raises:
        ConfigError: Naming both.
    """
    if kv_dtype != model_dtype or kv_dtype not in KV_DTYPES:
        raise ConfigError(
            f"KV of {kv_dtype} for a model of {model_dtype} does not go with --kv-policy "
            "heterocache: rows are kept in the model's dtype, which is float32, bfloat16 or "
            "float16; name one of these with --dtype and leave --kv-cache-dtype to auto, or serve "
            "without --kv-policy heterocache"
        )


def check_layer(layer: Any, *, has_sinks: bool = False) -> None:
    """Refuses a layer whose attention is not causal attention over all tokens.

    Args:
        layer: SGLang's ``RadixAttention``.
        has_sinks: Whether its call brought attention sinks.

    Raises:
        ConfigError: Naming the layer and what it asks for.
    """
    window = layer.sliding_window_size
    if (
        layer.is_cross_attention
        or layer.logit_cap
        or (window is not None and window != -1)
        or has_sinks
    ):
        raise ConfigError(
            f"layer {layer.layer_id} attends in a way that --kv-policy heterocache does not serve "
            f"(cross attention: {layer.is_cross_attention}, logit cap: {layer.logit_cap}, window: "
            f"{window}, sinks: {has_sinks}); serve this model without the flag"
        )


def check_model_config(config: dict[str, Any]) -> None:
    """Refuses models whose attention the policy cannot represent.

    Args:
        config: Contents of the model's ``config.json``.

    Raises:
        ConfigError: Sliding window, hybrid, latent attention or encoder-decoder models.
    """
    text = {**config, **(config.get("text_config") or {})}
    layer_types = {str(kind) for kind in text.get("layer_types") or []}
    rules = [
        (bool(text.get("kv_lora_rank")), "multi-head latent attention has no KV heads"),
        (bool(text.get("is_encoder_decoder")), "encoder-decoder models have two kinds of KV"),
        (
            bool(layer_types - {"full_attention"}),
            f"layers of type {', '.join(sorted(layer_types - {'full_attention'}))} do not keep "
            "full KV",
        ),
        (
            bool(text.get("sliding_window")) and text.get("use_sliding_window", True) is True,
            "sliding-window attention drops KV by itself",
        ),
        (
            any(key in text for key in ("mamba_d_state", "ssm_cfg", "linear_attn_config")),
            "state-space layers have no KV heads",
        ),
    ]
    for applies, reason in rules:
        if applies:
            raise ConfigError(
                f"--kv-policy heterocache does not serve this model: {reason}; "
                "serve it without the flag"
            )
