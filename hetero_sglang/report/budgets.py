"""What a profile means in bytes: budgets of a prompt under each preset and ratio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hetero_sglang.config import PRESETS, HeteroConfig, Preset, resolve_preset
from hetero_sglang.errors import BudgetError, ConfigError
from hetero_sglang.policy.budget import allocate_budget

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero_sglang.policy.roles import RoleTables
    from hetero_sglang.profile import HeadProfile

__all__ = ["ITEM_BYTES", "BudgetRow", "budget_rows", "floor", "profile_summary"]

ITEM_BYTES = 2
"""Of KV elements in the tables: 16-bit KV."""


@dataclass(frozen=True)
class BudgetRow:
    """What one ratio means for one prompt length.

    Attributes:
        preset: Preset of the settings.
        ratio: Resident share of the prompt's KV bytes.
        floor: Share that no budget takes away.
        base: Tokens of a head of weight 1; None where the ratio is not above the floor.
        least: Smallest budget of a compressed head, tokens.
        most: Largest budget, tokens.
        num_bytes: Bytes of the prompt on the device, 16-bit KV; None where the model's head
            dimension is not known.
    """

    preset: Preset
    ratio: float
    floor: float
    base: int | None = None
    least: int = 0
    most: int = 0
    num_bytes: int | None = None


def budget_rows(profile: HeadProfile, num_tokens: int, ratios: Sequence[float]) -> list[BudgetRow]:
    """Budgets of a prompt under each preset that the model can have, and each ratio."""
    found: list[BudgetRow] = []
    head_dim = profile.model.head_dim
    for preset in PRESETS:
        for ratio in ratios:
            config = HeteroConfig(ratio=ratio, **resolve_preset(preset, {}))
            try:
                tables = _tables(profile, config)
            except ConfigError:
                continue
            rule = config.budget_rule(tables)
            try:
                budget = allocate_budget(tables.allocation, num_tokens, rule)
            except BudgetError:
                found.append(BudgetRow(preset, ratio, rule.floor))
                continue
            rows = rule.held_heads * num_tokens + int(budget.tokens.sum())
            found.append(
                BudgetRow(
                    preset,
                    ratio,
                    rule.floor,
                    budget.base,
                    int(budget.tokens.min(initial=num_tokens)),
                    int(budget.tokens.max(initial=0)),
                    round(rows * 2 * head_dim * ITEM_BYTES) if head_dim else None,
                )
            )
    return found


def profile_summary(profile: HeadProfile) -> str:
    """Heads, floors and names of a profile, a line each."""
    counts = ", ".join(f"{count} {role.name.lower()}" for role, count in profile.counts.items())
    floors = ", ".join(_floor_text(profile, preset) for preset in PRESETS)
    return (
        f"{profile.num_heads} KV heads: {counts}\n"
        f"--kv-policy-ratio must be above the floor (16-bit KV): {floors}\n"
        f"fingerprint {profile.fingerprint}, digest {profile.digest[:16]}"
    )


def floor(profile: HeadProfile, preset: Preset) -> float:
    """Share of a prompt's bytes that no budget takes away, with 16-bit KV.

    Raises:
        ConfigError: The preset's watched keys do not suit the model's head dimension.
    """
    return _tables(profile, HeteroConfig(ratio=0.5, **resolve_preset(preset, {}))).floor


def _floor_text(profile: HeadProfile, preset: Preset) -> str:
    try:
        return f"{floor(profile, preset):.1%} with --kv-policy-preset {preset}"
    except ConfigError as error:
        return f"not to be had with --kv-policy-preset {preset} ({error})"


def _tables(profile: HeadProfile, config: HeteroConfig) -> RoleTables:
    from hetero_sglang.cache.watch import tables_for

    # The watched share hardly depends on the head dimension; 128 stands in for an unknown one.
    return tables_for(config, profile, ITEM_BYTES, head_dim=128)
