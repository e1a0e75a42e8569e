"""Which rows a head must fetch, and which it gives up for them.

Deliberate differences from the reference (``docs/method.md``): a refresh fetches only
what is missing, best score first, and may be cut anywhere without losing its best part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class HeadPlan:
    """Exchange of rows for one compressed head.

    Attributes:
        positions: Missing positions, best first, int64 [n].
        slots: Kept slots whose rows leave, int64 [n]; ``positions[i]`` goes to ``slots[i]``.
    """

    positions: NDArray[np.int64]
    slots: NDArray[np.int64]


def plan_delta(
    target: NDArray[np.int64], kept: NDArray[np.int64], num_tokens: int, limit: int | None = None
) -> HeadPlan:
    """Turns a target set into the smallest exchange of rows.

    Args:
        target: Wanted positions, best first, unique, int64 [budget], each under ``num_tokens``.
        kept: Position in each kept slot, int64 [budget], unique.
        num_tokens: Prompt length, tokens.
        limit: Most rows to exchange; the best ones are taken.

    Returns:
        The exchange. Installing it without a limit makes the kept set equal the target.
    """
    is_kept = np.zeros(num_tokens, dtype=np.bool_)
    is_kept[kept] = True
    missing = target[~is_kept[target]]
    if limit is not None:
        missing = missing[:limit]
    is_wanted = np.zeros(num_tokens, dtype=np.bool_)
    is_wanted[target] = True
    leaving = np.flatnonzero(~is_wanted[kept])[: len(missing)]
    return HeadPlan(positions=missing, slots=leaving)
