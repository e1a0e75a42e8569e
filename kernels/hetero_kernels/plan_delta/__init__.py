"""Which rows each head must fetch to reach its target set, and which it gives up for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from hetero_kernels.checks import check_dense_rows, check_devices, check_dtype, check_shape
from hetero_kernels.dispatch import resolve
from hetero_kernels.plan_delta.cpu import plan_delta_torch
from hetero_kernels.plan_delta.reference import plan_delta_reference

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DeltaPlan", "plan_delta"]


class DeltaPlan(NamedTuple):
    """Exchange of rows, an item for each head.

    Attributes:
        positions: Missing positions, best first, int32 [M, T]; ``positions[i, j]`` goes to
            ``slots[i, j]``. Unused places are -1, at the end.
        slots: Kept slots whose rows leave, ascending, int32 [M, T].
        counts: Rows to exchange, int32 [M].
    """

    positions: Tensor
    slots: Tensor
    counts: Tensor


def plan_delta(
    target: Tensor,
    kept: Tensor,
    num_tokens: int,
    *,
    limits: Tensor | None = None,
    room: int | None = None,
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
) -> DeltaPlan:
    """Turn target sets into the smallest exchanges of rows, cut to the best where they must be.

    What is wanted and not kept comes in, in the order of the target; what is kept and not wanted
    leaves, lowest slots first, as many as come. The rows of an item that fits whole make its kept
    set equal its target.

    Args:
        target: Wanted positions of each item, best first, unique in a row, int32 [M, T]; negative
            ones are skipped.
        kept: Position in each kept slot, unique in a row, int32 [M, B]; negative: no row there. It
            holds as many positions as the target has.
        num_tokens: Positions lie below it; the longest prompt, or more. ``triton`` skips those that
            do not, as if they were negative.
        limits: Most rows of each item, int32 [M]; ``None``: no limit.
        room: Most rows of all items together; the first items are served first.
        impl: See ``hetero_kernels.dispatch``; there is no ``native``, and ``auto`` is ``torch`` on
            CPU tensors.

    Returns:
        The exchanges.

    Raises:
        ValueError: A shape, dtype or device is not as described, or ``room`` is negative.
    """
    for name, tensor in (("target", target), ("kept", kept)):
        check_dtype(name, tensor, torch.int32)
        check_shape(name, tensor, (target.shape[0], None))
        check_dense_rows(name, tensor)
    if limits is not None:
        check_dtype("limits", limits, torch.int32)
        check_shape("limits", limits, (target.shape[0],))
        check_dense_rows("limits", limits)
    if room is not None and room < 0:
        raise ValueError(f"room must not be negative, got {room}")
    check_devices(target=target, kept=kept, limits=limits)
    chosen = resolve(impl, target.device, has_native=False)
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]
    if chosen == "triton":
        from hetero_kernels.plan_delta.triton import plan_delta_triton

        run = plan_delta_triton
    else:
        run = plan_delta_reference if chosen == "reference" else plan_delta_torch
    return DeltaPlan(*run(target, kept, num_tokens, limits, room))
