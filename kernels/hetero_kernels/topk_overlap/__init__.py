"""The drift check: how far the best positions of new queries still are those of the reference."""

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
    check_scale,
    check_shape,
)
from hetero_kernels.dispatch import resolve
from hetero_kernels.keys import check_keys
from hetero_kernels.topk_overlap.cpu import topk_overlap_native, topk_overlap_torch
from hetero_kernels.topk_overlap.reference import topk_overlap_reference

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.dispatch import Impl
    from hetero_kernels.quantize_keys.format import QuantizedKeys

__all__ = ["topk_overlap"]


def topk_overlap(
    queries: Tensor,
    *,
    keys: Tensor | QuantizedKeys,
    planes: Tensor,
    req_to_token: Tensor,
    rows: Tensor,
    prompt_lens: Tensor,
    top_k: Tensor,
    reference: Tensor,
    scale: float,
    width: int | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Overlap of each query group's best prompt positions with a reference set.

    For each item (a pivot of a request) and each of its S query groups: pooled scores over the
    prompt (``score_positions``), the ``top_k`` best of them (ties: lower position), and the share
    of these that the reference holds.

    Args:
        queries: Oldest first, fp32 / bf16 / fp16 [Q, S, G, D].
        keys: Keys by plane and token slot, in the dtype of ``queries`` or quantised,
            [num_planes, num_slots, D].
        planes: Plane of each item, int32 [Q].
        req_to_token: Token slot by request row and position, int32 [R, max_context].
        rows: Request row of each item, int64 [Q].
        prompt_lens: Prompt tokens N of each item, int32 [Q].
        top_k: Size K of each item's sets, int32 [Q], at most N.
        reference: Bit sets, int32 [Q, num_words]: bit ``p % 32`` of word ``p // 32``;
            ``num_words >= ceil(N / 32)``.
        scale: Factor on the products, positive.
        width: Positions of the longest prompt, or more. ``None``: max(prompt_lens), which is read
            back from its device. With it ``triton`` neither waits for the device nor checks what
            ``prompt_lens`` holds.
        impl: See ``hetero_kernels.dispatch``.

    Returns:
        Overlap in [0, 1], fp32 [Q, S], and the pooled scores of query group S - 1, fp32
        [Q, width], 0 beyond an item's prompt. An item with a negative row is padding and gives
        zeros.

    Raises:
        ValueError: A shape, dtype, stride, device, length or the scale is not as described.
    """
    check_float("queries", queries)
    check_shape("queries", queries, (None, None, None, None))
    num_items, num_queries, group_size, head_dim = queries.shape
    check_count("groups of an item (the second dimension of queries)", num_queries)
    check_count("queries of a group (the third dimension of queries)", group_size)
    check_head_dim(head_dim)
    check_keys("keys", keys, queries)
    check_scale(scale)
    check_devices(
        queries=queries,
        planes=planes,
        req_to_token=req_to_token,
        rows=rows,
        prompt_lens=prompt_lens,
        top_k=top_k,
        reference=reference,
    )
    check_dtype("rows", rows, torch.int64)
    check_dtype("req_to_token", req_to_token, torch.int32)
    check_shape("req_to_token", req_to_token, (None, None))
    check_dense_rows("req_to_token", req_to_token)
    check_dtype("reference", reference, torch.int32)
    check_shape("reference", reference, (num_items, None))
    check_dense_rows("reference", reference)
    for name, tensor in (("planes", planes), ("prompt_lens", prompt_lens), ("top_k", top_k)):
        check_dtype(name, tensor, torch.int32)
    for name, tensor in (
        ("planes", planes),
        ("rows", rows),
        ("prompt_lens", prompt_lens),
        ("top_k", top_k),
    ):
        check_shape(name, tensor, (num_items,))
        check_dense_rows(name, tensor)
    chosen = resolve(impl, queries.device)
    longest = 0 if width is None else width
    if num_items and (width is None or chosen != "triton"):
        shortest, most = (int(length) for length in prompt_lens.aminmax())
        check_count("prompt_lens", shortest, least=0)
        if width is None:
            longest = most
        elif most > width:
            raise ValueError(f"prompt_lens must be at most width ({width}), got {most}")
    if longest > min(32 * reference.shape[1], req_to_token.shape[1]):
        raise ValueError(
            f"prompt_lens must fit reference ({32 * reference.shape[1]} bits) and req_to_token "
            f"({req_to_token.shape[1]} positions), got {longest}"
        )
    if chosen == "triton":
        from hetero_kernels.topk_overlap.triton import topk_overlap_triton

        return topk_overlap_triton(
            *(queries, keys, planes, req_to_token, rows, prompt_lens, top_k, reference, scale),
            width=longest,
        )
    run = {
        "native": topk_overlap_native,
        "torch": topk_overlap_torch,
        "reference": topk_overlap_reference,
    }[chosen]
    overlap, scores = run(
        queries, keys, planes, req_to_token, rows, prompt_lens, top_k, reference, scale
    )
    if scores.shape[1] < longest:
        scores = torch.nn.functional.pad(scores, (0, longest - scores.shape[1]))
    return overlap, scores
