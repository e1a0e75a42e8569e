"""How two profiles of one model differ: role for role, and in numbers for all heads together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.errors import ConfigError
from hetero_sglang.profile.roles import HeadRole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_sglang.profile.head_profile import HeadProfile

__all__ = ["RoleChange", "kappa", "rank_correlation", "role_changes"]


@dataclass(frozen=True)
class RoleChange:
    """A head that two profiles see differently.

    Attributes:
        layer: Layer.
        head: KV head in the layer.
        before: Role in the first profile.
        after: Role in the second.
    """

    layer: int
    head: int
    before: HeadRole
    after: HeadRole


def role_changes(first: HeadProfile, second: HeadProfile) -> list[RoleChange]:
    """Heads whose roles differ, in order.

    Raises:
        ConfigError: The profiles have not the same number of layers and heads.
    """
    if first.roles.shape != second.roles.shape:
        shapes = [f"{p.num_layers} layers of {p.num_kv_heads} KV heads" for p in (first, second)]
        raise ConfigError(f"the profiles are of different models: {shapes[0]} and {shapes[1]}")
    return [
        RoleChange(
            layer, head, HeadRole(first.roles[layer, head]), HeadRole(second.roles[layer, head])
        )
        for layer, head in np.argwhere(first.roles != second.roles).tolist()
    ]


def kappa(first: HeadProfile, second: HeadProfile) -> float:
    """Cohen's kappa of the roles: 1 is agreement on every head, 0 what chance would give.

    Where both profiles give every head one and the same role, there is nothing to agree on by
    chance and the result is 1.
    """
    a, b = first.roles.ravel(), second.roles.ravel()
    observed = float((a == b).mean())
    expected = sum(float((a == role).mean() * (b == role).mean()) for role in HeadRole)
    return 1.0 if expected == 1.0 else (observed - expected) / (1.0 - expected)


def rank_correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Spearman's correlation: 1 if both order all values alike, NaN if one has no order.

    Args:
        first: Values, any shape.
        second: Values of the same shape.
    """
    a, b = _ranks(first.ravel()), _ranks(second.ravel())
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 0; equal values share the mean of theirs."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    means = last - (counts + 1) / 2
    return np.asarray(means[group], dtype=np.float64)
