"""How many prompt tokens each compressed head keeps on the device.

Source: HeteroCache (arXiv 2601.13684), section on fine-grained budgets. Deliberate
differences, which the ``paper`` preset does not have: what a head clamped at the prompt length
does not use goes to the others (water-filling), so that ratio 1 is full attention; prompts under
``min_tokens`` keep everything; pivots may have a budget and all their keys, quantised, instead
of all their rows.
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
_SHORTEST_CHECKED = 1024
"""A ratio must leave heads something of prompts this long, tokens, whatever ``min_tokens`` is."""


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


@dataclass(frozen=True)
class BudgetRule:
    """How the resident share of a prompt is split between what is always held and the budgets.

    Attributes:
        ratio: Resident share of the prompt's KV bytes, in (0, 1].
        held_heads: Rows that every prompt token costs whatever the budgets are: heads that keep
            everything, and watched keys by their share of a row's bytes.
        num_heads: All KV heads of the model, T.
        min_tokens: Shorter prompts keep everything.
        is_filling: Whether what a head clamped at the prompt length does not use goes to the
            others. False is the paper's formula.
    """

    ratio: float
    held_heads: float
    num_heads: int
    min_tokens: int
    is_filling: bool = True

    @property
    def floor(self) -> float:
        """Share of the KV bytes that no budget takes away."""
        return self.held_heads / self.num_heads

    def base(self, num_tokens: int, num_compressed: int) -> int:
        """Tokens a compressed head of weight 1 keeps.

        Args:
            num_tokens: Prompt length N, tokens.
            num_compressed: Heads that keep a budget, over the model.

        Returns:
            ``floor((ratio * T - held_heads) * N / num_compressed)``, at most N.

        Raises:
            BudgetError: The ratio does not exceed the floor.
        """
        if num_compressed == 0:
            return num_tokens
        spare = self.ratio * self.num_heads - self.held_heads
        if spare <= 0:
            raise BudgetError(
                f"--kv-policy-ratio {self.ratio:g} is not above the floor {self.floor:.4f} of this "
                f"profile ({self.held_heads:g} of {self.num_heads} KV heads' bytes are always "
                "held); raise the ratio, use --kv-policy-pivot-rows budget or a smaller "
                "--kv-policy-watch-dtype, or a profile with fewer pivot and volatile heads"
            )
        return min(num_tokens, math.floor(spare * num_tokens / num_compressed + _ROUND_OFF))

    def check(self, num_compressed: int) -> None:
        """Refuses a ratio that leaves the compressed heads nothing.

        Args:
            num_compressed: Heads that keep a budget, over the model.

        Raises:
            BudgetError: Naming the smallest ratio that works.
        """
        if not 0.0 < self.ratio <= 1.0:
            raise BudgetError(f"--kv-policy-ratio must be in (0, 1], got {self.ratio:g}")
        shortest = max(self.min_tokens, _SHORTEST_CHECKED)
        if self.base(shortest, num_compressed) < 1:
            least = (self.held_heads + num_compressed / shortest) / self.num_heads
            raise BudgetError(
                f"--kv-policy-ratio {self.ratio:g} leaves compressed heads no token of a prompt of "
                f"{shortest} tokens; use at least {least:.4f}"
            )


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
    allocation: NDArray[np.float64], num_tokens: int, rule: BudgetRule
) -> HeadBudget:
    """Budgets of all compressed heads for one prompt.

    Args:
        allocation: Weights of the compressed heads, fp64 [num_compressed].
        num_tokens: Prompt length N, tokens.
        rule: What is held anyway, and what the rest is.

    Returns:
        The budget; ``tokens.sum()`` never exceeds the ratio's share, except for prompts that keep
        everything: those under ``min_tokens``, and those whose base would be no token at all.

    Raises:
        BudgetError: The ratio does not exceed the floor.
    """
    base = rule.base(num_tokens, len(allocation))
    if num_tokens < rule.min_tokens or base < 1 or (rule.is_filling and base >= num_tokens):
        full = np.full(len(allocation), num_tokens, dtype=np.int64)
        return HeadBudget(num_tokens=num_tokens, base=num_tokens, tokens=full)
    if rule.is_filling:
        # Weights of mean 1 share the base of each; budgeted pivots (weight 1) keep that mean.
        shares = water_fill(allocation, float(base) * len(allocation), float(num_tokens))
    else:
        shares = np.minimum(allocation * base, float(num_tokens))
    tokens = np.floor(shares + _ROUND_OFF).astype(np.int64)
    return HeadBudget(num_tokens=num_tokens, base=base, tokens=tokens)
