"""Attention of one new token per request over resident and compressed heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hetero_kernels.checks import check_dense_rows, check_devices, check_dtype, check_shape
from hetero_kernels.decode_attention.cpu import decode_attention_native, decode_attention_torch
from hetero_kernels.decode_attention.reference import decode_attention_reference
from hetero_kernels.decode_attention.workspace import DecodeWorkspace
from hetero_kernels.dispatch import resolve
from hetero_kernels.layer import DecodeBatch, LayerTensors

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.dispatch import Impl

__all__ = ["DecodeWorkspace", "decode_attention"]


def decode_attention(
    q: Tensor,
    out: Tensor,
    *,
    k_resident: Tensor,
    v_resident: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
    req_to_token: Tensor,
    block_table: Tensor,
    kept_lens: Tensor,
    prompt_lens: Tensor,
    rows: Tensor,
    seq_lens: Tensor,
    head_map: Tensor,
    scale: float,
    impl: Impl = "auto",
) -> Tensor:
    """Attend with each request's newest token; its row must have been appended before.

    A resident head attends to all ``seq_len`` tokens through ``req_to_token``; a compressed one to
    its ``kept_lens + seq_len - prompt_len`` rows through its block table. Scores, softmax and sums
    are fp32. A head without rows gives zeros. The order of rows does not matter beyond rounding.
    A request with a negative row or a ``seq_len`` of 0 is padding and gives zeros.

    On a GPU this call reads ``head_map`` back; CUDA graphs capture ``DecodeLayer.attend``.

    Args:
        q: Queries, fp32 / bf16 / fp16 [B, Hq, D], dense over heads.
        out: Result, like ``q``; overwritten.
        k_resident: [num_planes, num_slots, D].
        v_resident: [num_planes, num_slots, D].
        k_blocks: [num_blocks, block_tokens, D].
        v_blocks: [num_blocks, block_tokens, D].
        req_to_token: int32 [R, max_context].
        block_table: int32 [R, C, max_blocks].
        kept_lens: int32 [R, C].
        prompt_lens: int32 [R].
        rows: int64 [B].
        seq_lens: Tokens including the newest, int64 [B].
        head_map: int32 [H]: plane, or ``~c`` for compressed head ``c``.
        scale: Factor on the scores.
        impl: See ``hetero_kernels.dispatch``.

    Returns:
        ``out``.

    Raises:
        ValueError: A shape, dtype or stride is not as described.
    """
    layer = LayerTensors(
        k_resident=k_resident,
        v_resident=v_resident,
        k_blocks=k_blocks,
        v_blocks=v_blocks,
        block_table=block_table,
        kept_lens=kept_lens,
        prompt_lens=prompt_lens,
        head_map=head_map,
        scale=scale,
        group_size=q.shape[1] // max(1, head_map.shape[0]),
        req_to_token=req_to_token,
    )
    batch = DecodeBatch(rows, seq_lens)
    check_queries(q, out, layer, batch)
    chosen = resolve(impl, q.device)
    if chosen == "native":
        decode_attention_native(q, out, layer, batch)
    elif chosen == "triton":
        from hetero_kernels.decode_attention.triton import decode_attention_triton

        decode_attention_triton(q, out, layer, batch)
    elif chosen == "torch":
        decode_attention_torch(q, out, layer, batch)
    else:
        decode_attention_reference(q, out, layer, batch)
    return out


def check_queries(q: Tensor, out: Tensor, layer: LayerTensors, batch: DecodeBatch) -> None:
    """Check queries and result against the layer they read.

    Raises:
        ValueError: A shape, dtype, stride or device does not fit.
    """
    if layer.req_to_token is None:
        raise ValueError("attention needs the layer's req_to_token, got None")
    check_devices(k_blocks=layer.k_blocks, rows=batch.rows, q=q, out=out)
    for name, tensor in (("q", q), ("out", out)):
        check_dtype(name, tensor, layer.dtype)
        check_shape(name, tensor, (batch.size, layer.num_q_heads, layer.head_dim))
        check_dense_rows(name, tensor, 2)
