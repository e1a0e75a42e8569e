"""Causal attention of a chunk of new prompt tokens over everything before it."""

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
    check_shape,
)
from hetero_kernels.dispatch import resolve
from hetero_kernels.extend_attention.cpu import extend_attention_native, extend_attention_torch
from hetero_kernels.extend_attention.reference import extend_attention_reference

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.dispatch import Impl

__all__ = ["extend_attention"]


def extend_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prefix_len: int,
    scale: float,
    slots: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Attend with ``n`` new tokens; token ``i`` sees positions ``0 .. prefix_len + i``.

    The cost grows with new x total tokens, not with total x total. Resident and compressed heads
    lie in two pools with slots of their own: one call for each.

    Args:
        q: Queries, fp32 / bf16 / fp16 [n, Hq, D], dense over heads.
        k: Keys by position, like ``q``, [H, prefix_len + n, D], dense rows; with ``slots`` a pool,
            [H, num_slots, D].
        v: Values, like ``k``.
        prefix_len: Tokens before the new ones.
        scale: Factor on the scores.
        slots: Slot of each position in the pool, int32 [prefix_len + n]; ``triton`` reads the pool
            where it lies, the others gather it first.
        impl: See ``hetero_kernels.dispatch``.

    Returns:
        [n, Hq, D], contiguous.

    Raises:
        ValueError: A shape, dtype, stride or device is not as described.
    """
    check_float("q", q)
    check_shape("q", q, (None, None, None))
    num_new, num_q_heads, head_dim = q.shape
    check_head_dim(head_dim)
    check_dense_rows("q", q, 2)
    check_count("prefix_len", prefix_len, least=0)
    check_count("query heads (the second dimension of q)", num_q_heads)
    check_devices(q=q, k=k, v=v, slots=slots)
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(name, tensor, q.dtype)
        rows = prefix_len + num_new if slots is None else None
        check_shape(name, tensor, (None, rows, head_dim))
        check_dense_rows(name, tensor)
    if k.shape[0] != v.shape[0] or k.shape[0] == 0 or num_q_heads % k.shape[0] != 0:
        raise ValueError(
            f"the {num_q_heads} query heads must be a multiple of the KV heads, "
            f"got {k.shape[0]} of k and {v.shape[0]} of v"
        )
    if slots is not None:
        check_dtype("slots", slots, torch.int32)
        check_shape("slots", slots, (prefix_len + num_new,))
        check_dense_rows("slots", slots)
    chosen = resolve(impl, q.device)
    if chosen == "triton":
        from hetero_kernels.extend_attention.triton import extend_attention_triton

        return extend_attention_triton(q, k, v, prefix_len, scale, slots)
    if slots is not None:
        k, v = k[:, slots.long()], v[:, slots.long()]
    run = {
        "native": extend_attention_native,
        "torch": extend_attention_torch,
        "reference": extend_attention_reference,
    }[chosen]
    return run(q, k, v, prefix_len, scale)
