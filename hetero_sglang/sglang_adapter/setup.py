"""What the scheduler process knows before any pool exists: settings, profile, sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hetero_sglang.cache.sizing import SizingRule
from hetero_sglang.config import HeteroConfig
from hetero_sglang.policy.roles import RoleTables, build_role_tables
from hetero_sglang.sglang_adapter.arguments import resolve_profile
from hetero_sglang.sglang_adapter.refusals import check_model_config

if TYPE_CHECKING:
    import torch

    from hetero_sglang.profile import HeadProfile


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
    profile = resolve_profile(config, plain)
    tables = build_role_tables(profile)
    dtype: torch.dtype = configurator.kv_cache_dtype
    rule = SizingRule(
        ratio=config.ratio,
        num_planes=tables.num_planes,
        num_compressed=tables.num_compressed,
        row_bytes=2 * model.head_dim * dtype.itemsize,
        block_tokens=config.block_tokens,
        context_tokens=model.context_len,
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
