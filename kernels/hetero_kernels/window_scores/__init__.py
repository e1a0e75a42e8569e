"""How much the last tokens of a prompt attend to each of its positions, pooled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hetero_kernels.checks import (
    check_count,
    check_devices,
    check_dtype,
    check_float,
    check_head_dim,
    check_shape,
)
from hetero_kernels.dispatch import resolve
from hetero_kernels.window_scores.cpu import window_scores_torch
from hetero_kernels.window_scores.reference import window_scores_reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["window_scores"]


def window_scores(
    q: Tensor,
    k: Tensor,
    scale: float,
    *,
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
) -> Tensor:
    """Mean attention of the last W prompt tokens over W and the group, pooled; all in fp32.

    ``reference.py`` is the definition.

    Args:
        q: Queries of the last W prompt tokens, fp32 / bf16 / fp16 [H, W, G, D].
        k: Keys of the whole prompt, like ``q``, [H, N, D] with N >= W.
        scale: Factor on the products, 1 / sqrt(D).
        impl: See ``hetero_kernels.dispatch``; there is no ``native``, and ``auto`` is ``torch`` on
            CPU tensors.

    Returns:
        fp32 [H, N].

    Raises:
        ValueError: A shape, dtype or device is not as described, or D is not a multiple of 16 up
            to 256.
    """
    check_float("q", q)
    check_dtype("k", k, q.dtype)
    check_shape("q", q, (None, None, None, None))
    check_head_dim(q.shape[3])
    check_shape("k", k, (q.shape[0], None, q.shape[3]))
    check_count("query heads of a KV head (the third dimension of q)", q.shape[2])
    check_devices(q=q, k=k)
    if not 1 <= q.shape[1] <= k.shape[1]:
        raise ValueError(f"the window must be 1 to {k.shape[1]} (prompt) tokens, got {q.shape[1]}")
    chosen = resolve(impl, q.device, has_native=False)
    if chosen == "triton":
        from hetero_kernels.window_scores.triton import window_scores_triton

        return window_scores_triton(q, k, scale)
    run = window_scores_reference if chosen == "reference" else window_scores_torch
    return run(q, k, scale)
