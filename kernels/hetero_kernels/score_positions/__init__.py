"""How much a query group attends to each prompt position, pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels.checks import (
    check_dense_rows,
    check_dtype,
    check_float,
    check_head_dim,
    check_shape,
)
from hetero_kernels.dispatch import resolve
from hetero_kernels.score_positions.cpu import score_positions_native, score_positions_torch
from hetero_kernels.score_positions.reference import score_positions_reference

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.dispatch import Impl

__all__ = ["score_positions"]


def score_positions(
    q: Tensor, k: Tensor, scale: float, *, slots: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """Pooled scores of one query group per head over that head's keys.

    Softmax of each query over exactly the N positions, average pool of 5 with zero padding, maximum
    over the group; all in fp32. ``reference.py`` is the definition.

    Args:
        q: Queries, fp32 / bf16 / fp16 [Hc, G, D].
        k: Keys, like ``q``, [Hc, N, D] or, with ``slots``, [Hc, num_slots, D]; dense rows.
        scale: Factor on the products, 1 / sqrt(D).
        slots: Slot of each position in ``k``, int32 [N]; ``None``: position p is slot p.
        impl: See ``hetero_kernels.dispatch``.

    Returns:
        fp32 [Hc, N].

    Raises:
        ValueError: A shape, dtype or stride is not as described.
    """
    check_float("q", q)
    check_dtype("k", k, q.dtype)
    check_shape("q", q, (None, None, None))
    check_shape("k", k, (q.shape[0], None, q.shape[2]))
    check_head_dim(q.shape[2])
    check_dense_rows("k", k)
    if slots is not None:
        check_dtype("slots", slots, torch.int32)
        check_shape("slots", slots, (None,))
        check_dense_rows("slots", slots)
    chosen = resolve(impl, q.device)
    if chosen == "native":
        return score_positions_native(q, k, scale, slots)
    if chosen == "torch":
        return score_positions_torch(q, k, scale, slots)
    return score_positions_reference(q, k, scale, slots)
