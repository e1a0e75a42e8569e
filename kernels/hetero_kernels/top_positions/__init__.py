"""The positions with the highest scores, with one exact rule for ties."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hetero_kernels.checks import check_dense_rows, check_devices, check_dtype, check_shape
from hetero_kernels.dispatch import resolve
from hetero_kernels.top_positions.cpu import (
    pack_positions_torch,
    top_bits_native,
    top_positions_native,
    top_positions_torch,
)
from hetero_kernels.top_positions.reference import (
    pack_positions_reference,
    top_positions_reference,
)

if TYPE_CHECKING:
    from hetero_kernels.dispatch import Impl

__all__ = ["pack_positions", "top_bits", "top_positions"]


def top_positions(
    scores: Tensor,
    k: int | Tensor,
    *,
    order: Literal["ascending", "best"] = "ascending",
    width: int | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Positions of the highest scores of each row; of equal scores the lower position wins.

    Args:
        scores: fp32 [..., N], dense rows, no NaN.
        k: How many: one number, or int32 [...] with one for each row. More than N counts as N.
        order: ``ascending`` by position, or ``best`` first (ties: lower position first).
        width: Places of a row of the result, at least each k that is below N, and at most N.
            ``None``: min(max(k), N), for which a tensor ``k`` is read back from its device.
            With it nothing waits for the device and nothing checks what ``k`` holds.
        impl: See ``hetero_kernels.dispatch``.

    Returns:
        int32 [..., width]; places that a row does not use are -1, at its end.

    Raises:
        ValueError: A shape, dtype or ``order`` is not as described, or ``k`` is negative.
    """
    if order not in ("ascending", "best"):
        raise ValueError(f"order must be ascending or best, got {order!r}")
    flat, counts = _flatten(scores, k, is_trusted=width is not None)
    if width is not None and not 0 <= width <= flat.shape[1]:
        raise ValueError(f"width must be 0 to {flat.shape[1]} (positions), got {width}")
    if width is None:
        largest = k if isinstance(k, int) else int(counts.max()) if counts.numel() else 0
        width = min(largest, flat.shape[1])
    shape = (*scores.shape[:-1], width)
    chosen = resolve(impl, scores.device)
    if chosen == "triton":
        from hetero_kernels.top_positions.triton import top_positions_triton

        return top_positions_triton(flat, counts, best_first=order == "best", width=width).view(
            shape
        )
    run = {
        "native": top_positions_native,
        "torch": top_positions_torch,
        "reference": top_positions_reference,
    }[chosen]
    out = run(flat, counts, best_first=order == "best")
    if out.shape[1] < width:
        out = torch.nn.functional.pad(out, (0, width - out.shape[1]), value=-1)
    return out.view(shape)


def top_bits(scores: Tensor, k: int | Tensor, num_words: int, *, impl: Impl = "auto") -> Tensor:
    """The same choice as ``top_positions``, as bit sets: bit ``p % 32`` of word ``p // 32``.

    Args:
        scores: fp32 [..., N], dense rows, no NaN.
        k: One number, or int32 [...]. More than N counts as N.
        num_words: Words of a set, at least ceil(N / 32).
        impl: See ``hetero_kernels.dispatch``.

    Returns:
        int32 [..., num_words], bits beyond N zero.

    Raises:
        ValueError: A shape or dtype is not as described, or the sets are too short.
    """
    chosen = resolve(impl, scores.device)
    flat, counts = _flatten(scores, k, is_trusted=chosen == "triton")
    if num_words * 32 < flat.shape[1]:
        raise ValueError(f"num_words must hold {flat.shape[1]} positions, got {num_words}")
    if chosen == "native":
        out = top_bits_native(flat, counts, num_words)
    elif chosen == "triton":
        from hetero_kernels.top_positions.triton import top_bits_triton

        out = top_bits_triton(flat, counts, num_words)
    elif chosen == "torch":
        out = pack_positions_torch(top_positions_torch(flat, counts, best_first=False), num_words)
    else:
        positions = top_positions_reference(flat, counts, best_first=False)
        out = pack_positions_reference(positions, num_words)
    return out.view(*scores.shape[:-1], num_words)


def pack_positions(positions: Tensor, num_words: int) -> Tensor:
    """Bit sets of positions: bit ``p % 32`` of word ``p // 32``.

    Args:
        positions: int32 [..., K], below ``32 * num_words`` (checked on CPU tensors, trusted on
            others); negative ones are skipped.
        num_words: Words of a set.

    Returns:
        int32 [..., num_words].

    Raises:
        ValueError: The dtype is not int32, or a position lies behind the last word.
    """
    check_dtype("positions", positions, torch.int32)
    if positions.dim() == 0:
        raise ValueError("positions must have at least one dimension, got 0")
    if positions.is_cpu and positions.numel() and int(positions.max()) >= 32 * num_words:
        raise ValueError(
            f"positions must be below {32 * num_words} (num_words x 32), got {int(positions.max())}"
        )
    flat = positions.reshape(positions.shape[:-1].numel(), positions.shape[-1])
    return pack_positions_torch(flat, num_words).view(*positions.shape[:-1], num_words)


def _flatten(scores: Tensor, k: int | Tensor, is_trusted: bool) -> tuple[Tensor, Tensor]:
    """Scores as [M, N] with dense rows and counts as int32 [M]; unless trusted none is negative."""
    check_dtype("scores", scores, torch.float32)
    if scores.dim() == 0:
        raise ValueError("scores must have at least one dimension, got 0")
    flat = scores.reshape(scores.shape[:-1].numel(), scores.shape[-1])
    check_dense_rows("scores", flat)
    if isinstance(k, Tensor):
        check_dtype("k", k, torch.int32)
        check_devices(scores=scores, k=k)
        check_shape("k", k, tuple(scores.shape[:-1]))
        counts = k.reshape(-1).contiguous()
        lowest = int(counts.min()) if counts.numel() and not is_trusted else 0
    else:
        counts = torch.full((flat.shape[0],), k, dtype=torch.int32, device=scores.device)
        lowest = k
    if lowest < 0:
        raise ValueError(f"k must not be negative, got {lowest}")
    return flat, counts
