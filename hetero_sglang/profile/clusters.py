"""How heads are grouped and weighed: shared by the profiler and by slices of its profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["greedy_stars", "inverse_stability"]

_STABILITY_EPSILON = 1e-6


def greedy_stars(is_similar: NDArray[np.bool_]) -> list[tuple[int, tuple[int, ...]]]:
    """Clusters of one layer's heads: pivot and satellites, in the order they were found.

    Again and again the unassigned head with most unassigned neighbours becomes a pivot and those
    neighbours its satellites; of equals the lowest index. It ends when no two unassigned heads are
    neighbours.

    Args:
        is_similar: Whether two heads are neighbours, [num_heads, num_heads], symmetric; what the
            diagonal says does not matter.

    Returns:
        (pivot, satellites) of each cluster, satellites ascending.

    Source: HeteroCache (arXiv 2601.13684) section 3.1.
    """
    edges = is_similar.copy()
    np.fill_diagonal(edges, val=False)
    stars: list[tuple[int, tuple[int, ...]]] = []
    while edges.any():
        # argmax returns the first of equal maxima.
        pivot = int(edges.sum(axis=1).argmax())
        satellites = np.flatnonzero(edges[pivot])
        stars.append((pivot, tuple(satellites.tolist())))
        assigned = [pivot, *satellites]
        edges[assigned, :] = False
        edges[:, assigned] = False
    return stars


def inverse_stability(stability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Budget weights before they are normalised: heads that move more keep more.

    Args:
        stability: In [0, 1], any shape.

    Returns:
        1 / (stability + 1e-6), finite for heads without any stability too.
    """
    return np.asarray(1.0 / (stability + _STABILITY_EPSILON))
