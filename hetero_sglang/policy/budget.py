"""How many prompt tokens each compressed head keeps on the device.

Source: HeteroCache (arXiv 2601.13684), section on fine-grained budgets. Deliberate
differences: what a head clamped at the prompt length does not use goes to the others
(water-filling), so that ratio 1 is full attention; prompts under ``min_tokens`` keep
everything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.errors import BudgetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ROUND_OFF = 1e-9


@dataclass(frozen=True)
class HeadBudget:
    """Prompt tokens to keep for one request.

    Attributes:
        num_tokens: Prompt length N, tokens.
        base: Budget of a compressed head with allocation 1, tokens; the pivots' reference
            sets have this size (at least 1).
        tokens: Tokens each compressed head keeps, int64 [num_compressed], each in [0, N].
    """

    num_tokens: int
    base: int
    tokens: NDArray[np.int64]

    @property
    def keeps_everything(self) -> bool:
        """True when no head drops a token, so there is nothing to watch or to fetch."""
        return bool(np.all(self.tokens == self.num_tokens))

    @property
    def reference_size(self) -> int:
        """Size K of a pivot's reference set, tokens."""
        return min(max(1, self.base), self.num_tokens)


def base_budget(ratio: float, num_tokens: int, num_resident: int, num_heads: int) -> int:
    """Tokens a compressed head keeps before weighting.

    Args:
        ratio: Resident share of the prompt's KV bytes, in (0, 1].
        num_tokens: Prompt length, tokens.
        num_resident: Heads that keep everything, over the model.
        num_heads: All KV heads of the model.

    Returns:
        ``floor((ratio * num_heads - num_resident) * num_tokens / (num_heads - num_resident))``.

    Raises:
        BudgetError: The ratio does not exceed the floor ``num_resident / num_heads``.
    """
    spare = ratio * num_heads - num_resident
    if num_heads == num_resident:
        return num_tokens
    if spare <= 0:
        raise BudgetError(
            f"--kv-policy-ratio {ratio:g} is not above the floor "
            f"{num_resident / num_heads:.4f} of this profile ({num_resident} of {num_heads} KV "
            "heads keep everything); raise the ratio or use a profile with fewer pivot and "
            "volatile heads"
        )
    return min(num_tokens, math.floor(spare * num_tokens / (num_heads - num_resident) + _ROUND_OFF))


def water_fill(weights: NDArray[np.float64], total: float, cap: float) -> NDArray[np.float64]:
    """Shares ``total`` in proportion to ``weights``, no share above ``cap``.

    Args:
        weights: Positive weights, fp64 [num_heads].
        total: Sum to hand out.
        cap: Largest share.

    Returns:
        Shares, fp64 [num_heads]: ``min(cap, level * weights)`` with one common level. Their
        sum is ``total``, or ``cap`` each where the total would exceed all caps.
    """
    count = len(weights)
    if count == 0 or total >= cap * count:
        return np.full(count, float(cap))
    order = np.argsort(-weights, kind="stable")
    clamped = 0
    weight_left = float(weights.sum())
    total_left = float(total)
    for head in order:
        if total_left / weight_left * float(weights[head]) < cap:
            break
        clamped += 1
        weight_left -= float(weights[head])
        total_left -= cap
    level = total_left / weight_left
    shares = weights * level
    shares[order[:clamped]] = cap
    return np.minimum(shares, cap)


def allocate_budget(
    allocation: NDArray[np.float64],
    num_tokens: int,
    *,
    ratio: float,
    num_resident: int,
    num_heads: int,
    min_tokens: int,
) -> HeadBudget:
    """Budgets of all compressed heads for one prompt.

    Args:
        allocation: Weights of the compressed heads, fp64 [num_compressed], mean 1.
        num_tokens: Prompt length N, tokens.
        ratio: Resident share of the prompt's KV bytes, in (0, 1].
        num_resident: Heads that keep everything, over the model.
        num_heads: All KV heads of the model.
        min_tokens: Shorter prompts keep everything.

    Returns:
        The budget; ``tokens.sum()`` never exceeds the ratio's share.

    Raises:
        BudgetError: The ratio does not exceed the floor.
    """
    base = base_budget(ratio, num_tokens, num_resident, num_heads)
    if num_tokens < min_tokens or base >= num_tokens:
        full = np.full(len(allocation), num_tokens, dtype=np.int64)
        return HeadBudget(num_tokens=num_tokens, base=num_tokens, tokens=full)
    shares = water_fill(allocation, float(base) * len(allocation), float(num_tokens))
    tokens = np.floor(shares + _ROUND_OFF).astype(np.int64)
    return HeadBudget(num_tokens=num_tokens, base=base, tokens=tokens)


def check_ratio(ratio: float, num_resident: int, num_heads: int, min_tokens: int) -> None:
    """Refuses a ratio that leaves the compressed heads nothing on the shortest prompt.

    Args:
        ratio: Resident share, in (0, 1].
        num_resident: Heads that keep everything, over the model.
        num_heads: All KV heads of the model.
        min_tokens: Shortest prompt that is compressed, tokens.

    Raises:
        BudgetError: Naming the smallest ratio that works.
    """
    if not 0.0 < ratio <= 1.0:
        raise BudgetError(f"--kv-policy-ratio must be in (0, 1], got {ratio:g}")
    base = base_budget(ratio, max(min_tokens, 1), num_resident, num_heads)
    if base < 1:
        least = (num_resident + (num_heads - num_resident) / max(min_tokens, 1)) / num_heads
        raise BudgetError(
            f"--kv-policy-ratio {ratio:g} leaves compressed heads no token of a prompt of "
            f"{min_tokens} tokens; use at least {least:.4f} or raise --kv-policy-min-tokens"
        )
