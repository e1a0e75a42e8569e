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


def refresh_target(
    best: NDArray[np.int64], held: NDArray[np.int64], scores: NDArray[np.float32]
) -> NDArray[np.int64]:
    """What a head shall hold after its pivot has drifted.

    The pivot's best positions come in; of what the head holds, the worst by the pivot's scores make
    room. (The paper gives the whole budget to the pivot's best: ``best`` as long as ``held``. One
    query of one head is a poor judge of low ranks, and what a head chose for itself by a window of
    queries is worth keeping: docs/method.md, "Measured".)

    Args:
        best: The pivot's best positions, best first, int64 [n], unique.
        held: Positions that the head holds, int64 [budget], unique, n <= budget.
        scores: The pivot's scores, fp32 [num_tokens].

    Returns:
        Wanted positions, best first, int64 [budget].
    """
    if len(best) == len(held):
        return best
    is_rest = np.zeros(len(scores), dtype=np.bool_)
    is_rest[held] = True
    is_rest[best] = False
    rest = _best_first(np.flatnonzero(is_rest), scores)
    return np.concatenate([best, rest[: len(held) - len(best)]])


def _best_first(positions: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Positions by falling score, of equal scores the lower one first.

    Score and position become one integer, because a decode step waits for this: integers are sorted
    by vector instructions, pairs are compared one by one (8 times slower).
    """
    bits = (scores[positions] + np.float32(0.0)).view(np.int32)  # -0 becomes 0
    # As integers, negative floats order the wrong way round.
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).astype(np.int64)
    keys = (~ordered << 32) | positions
    keys.sort()
    return np.asarray(keys & 0xFFFFFFFF)


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
