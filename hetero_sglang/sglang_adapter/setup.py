"""What the scheduler process knows before any pool exists: settings, profile, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hetero_kernels.triton_support import num_programs
from hetero_sglang.cache.device_bytes import POSITION_BYTES, DeviceTables, transfer_bytes
from hetero_sglang.cache.sizing import SizingRule
from hetero_sglang.cache.watch import tables_for, watched_key_bytes
from hetero_sglang.config import HeteroConfig
from hetero_sglang.sglang_adapter.arguments import resolve_profile
from hetero_sglang.sglang_adapter.refusals import check_kv_dtype, check_model_config

if TYPE_CHECKING:
    from hetero_sglang.policy.roles import RoleTables
    from hetero_sglang.profile import HeadProfile

_EXTRA_TABLE_TOKENS = 4
"""By which SGLang makes rows of its request table longer than the context
(``get_req_to_token_extra_context_len``)."""


@dataclass(frozen=True)
class Setup:
    """Settings of one scheduler process.

    Attributes:
        config: The policy's settings.
        profile: Head profile of the model.
        tables: Index tables of the profile.
        rule: How bytes depend on tokens.
        group_size: Query heads a KV head.
        head_dim: Head dimension.
        dtype: Storage dtype of K and V.
    """

    config: HeteroConfig
    profile: HeadProfile
    tables: RoleTables
    rule: SizingRule
    group_size: int
    head_dim: int
    dtype: torch.dtype


def heads_of(config: HeteroConfig, profile: HeadProfile, item_bytes: int) -> RoleTables:
    """Index tables of a profile under these settings, the ratio checked against the floor.

    Args:
        config: Settings.
        profile: Profile of the model.
        item_bytes: Bytes of an element of the KV dtype.

    Raises:
        BudgetError: The ratio is not above the floor.
        ConfigError: The model's head dimension does not suit the watched keys' format.
    """
    tables = tables_for(config, profile, item_bytes)
    config.budget_rule(tables).check(tables.num_compressed)
    return tables


def _device_bytes(
    configurator: Any, config: HeteroConfig, tables: RoleTables, row_bytes: int
) -> int:
    """Bytes that the policy needs on the device beside its KV areas."""
    model = configurator.model_config
    held = DeviceTables(
        # SGLang never lets more run than was asked for, and row 0 is padding.
        num_rows=configurator.server_args.max_running_requests + 1,
        table_tokens=model.context_len + _EXTRA_TABLE_TOKENS,
        num_kv_heads=tables.num_kv_heads,
        num_compressed=tables.num_compressed,
        num_pivots=tables.num_pivots if config.is_watching else 0,
        group_size=model.num_attention_heads // tables.num_kv_heads,
        head_dim=model.head_dim,
        item_bytes=configurator.kv_cache_dtype.itemsize,
        block_tokens=config.block_tokens,
        drift_interval=config.drift_interval,
        num_programs=num_programs(torch.device(configurator.device)),
    )
    if config.retrieval == "off" or not tables.num_compressed:
        return held.total_bytes
    return held.total_bytes + transfer_bytes(
        num_compressed=tables.num_compressed,
        row_bytes=row_bytes,
        page_tokens=config.page_tokens,
        landing_rows=config.landing_rows,
    )


_cache: dict[int, Setup] = {}


def setup_for(configurator: Any) -> Setup:
    """The setup behind SGLang's KV cache configurator; made once a process.

    Args:
        configurator: ``KVCacheConfigurator`` of the target model.

    Raises:
        HeteroError: The model or the profile cannot be served under the policy.
    """
    key = id(configurator.model_config)
    found = _cache.get(key)
    if found is not None:
        return found
    model = configurator.model_config
    config = HeteroConfig.from_dict(configurator.server_args._hetero)
    plain = model.hf_config.to_dict()
    plain.setdefault("architectures", model.hf_config.architectures)
    check_model_config(plain)
    if config.is_calibrating:
        from hetero_sglang.sglang_adapter.calibration import calibrated_profile

        profile = calibrated_profile(configurator, config, plain)
    else:
        profile = resolve_profile(config, plain)
    dtype: torch.dtype = configurator.kv_cache_dtype
    check_kv_dtype(dtype, model.dtype)
    tables = heads_of(config, profile, dtype.itemsize)
    key_bytes = 0
    if config.has_watch_pool:
        key_bytes = watched_key_bytes(config.watch_dtype, model.head_dim, dtype.itemsize)
    row_bytes = 2 * model.head_dim * dtype.itemsize
    is_on_device = torch.device(configurator.device).type != "cpu"
    rule = SizingRule(
        ratio=config.ratio,
        num_planes=tables.num_planes,
        num_compressed=tables.num_compressed,
        row_bytes=row_bytes,
        block_tokens=config.block_tokens,
        context_tokens=model.context_len,
        watched_bytes=key_bytes * tables.num_pivots,
        position_bytes=POSITION_BYTES if is_on_device else 0,
        device_bytes=_device_bytes(configurator, config, tables, row_bytes) if is_on_device else 0,
    )
    setup = Setup(
        config=config,
        profile=profile,
        tables=tables,
        rule=rule,
        group_size=model.num_attention_heads // tables.num_kv_heads,
        head_dim=model.head_dim,
        dtype=dtype,
    )
    _cache[key] = setup
    return setup
