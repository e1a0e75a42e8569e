"""When a pivot's attention has moved.

Source: HeteroCache (arXiv 2601.13684), pivot-guided retrieval; upstream
``cache_utils.py`` ``decode_select``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def drift_verdict(overlap: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Which pivots have drifted.

    Args:
        overlap: Share of the reference set found in each query's top-K set, fp32
            [num_pivots, num_queries], in [0, 1].
        threshold: A pivot drifts when the median over its queries is below this.

    Returns:
        bool [num_pivots]. With an even number of queries the median is the mean of the
        two middle values.
    """
    if overlap.size == 0:
        return np.zeros(overlap.shape[0], dtype=np.bool_)
    return np.asarray(np.median(overlap, axis=1) < threshold)


def is_check_due(num_steps: NDArray[np.int64], interval: int) -> NDArray[np.bool_]:
    """Whether so many finished decode steps end a drift interval.

    Args:
        num_steps: Steps of each request, int64 [num_reqs].
        interval: Steps from check to check, S.

    Returns:
        bool [num_reqs].
    """
    return np.asarray((num_steps > 0) & (num_steps % interval == 0))
