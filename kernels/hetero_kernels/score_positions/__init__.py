"""How much a query group attends to each prompt position, pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels.checks import (
    check_count,
    check_dense_rows,
    check_devices,
    check_dtype,
    check_float,
    check_head_dim,
    check_same,
    check_scale,
    check_shape,
)
from hetero_kernels.dispatch import resolve
from hetero_kernels.keys import check_keys
from hetero_kernels.score_positions.cpu import score_positions_native, score_positions_torch
from hetero_kernels.score_positions.reference import score_positions_reference

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.dispatch import Impl
    from hetero_kernels.quantize_keys.format import QuantizedKeys

__all__ = ["score_positions"]


def score_positions(
    q: Tensor,
    k: Tensor | QuantizedKeys,
    scale: float,
    *,
    planes: Tensor | None = None,
    slots: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Pooled scores of one query group per head over that head's keys.

    Softmax of each query over exactly the N positions, average pool of 5 with zero padding, maximum
    over the group; all in fp32. ``reference.py`` is the definition.

    Args:
        q: Queries, fp32 / bf16 / fp16 [Hc, G, D].
        k: Keys, in the dtype of ``q`` or quantised, [num_planes, N, D] or, with ``slots``,
            [num_planes, num_slots, D]; dense rows.
        scale: Factor on the products, positive: 1 / sqrt(D).
        planes: Plane of each head in ``k``, int32 [Hc]; ``None``: head h is plane h.
        slots: Slot of each position in ``k``, int32 [N]; ``None``: position p is slot p.
        impl: See ``hetero_kernels.dispatch``.

    Returns:
        fp32 [Hc, N].

    Raises:
        ValueError: A shape, dtype, stride, device or the scale is not as described.
    """
    check_float("q", q)
    check_shape("q", q, (None, None, None))
    check_count("queries of a head (the second dimension of q)", q.shape[1])
    check_head_dim(q.shape[2])
    check_keys("k", k, q)
    check_scale(scale)
    check_devices(q=q, planes=planes, slots=slots)
    num_planes, num_slots = (k if isinstance(k, torch.Tensor) else k.data).shape[:2]
    if planes is None:
        check_same("k must have a plane for each head of q", num_planes, q.shape[0])
    else:
        check_dtype("planes", planes, torch.int32)
        check_shape("planes", planes, (q.shape[0],))
        check_dense_rows("planes", planes)
    if slots is not None:
        check_dtype("slots", slots, torch.int32)
        check_shape("slots", slots, (None,))
        check_dense_rows("slots", slots)
    length = num_slots if slots is None else slots.shape[0]
    chosen = resolve(impl, q.device)
    if chosen == "triton":
        from hetero_kernels.score_positions.triton import score_positions_triton

        return score_positions_triton(q, k, scale, planes, slots, length)
    run = {
        "native": score_positions_native,
        "torch": score_positions_torch,
        "reference": score_positions_reference,
    }[chosen]
    return run(q, k, scale, planes, slots, length)
