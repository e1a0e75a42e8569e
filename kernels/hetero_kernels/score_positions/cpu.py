"""``score_positions`` by the compiled kernel and by torch."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import avg_pool1d

from hetero_kernels.dispatch import loaded
from hetero_kernels.keys import read_keys
from hetero_kernels.native import DTYPE_CODES, ScoreStruct, key_fields, pointer
from hetero_kernels.score_positions.reference import POOL_WIDTH

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.quantize_keys.format import QuantizedKeys


def score_positions_native(
    q: Tensor,
    k: Tensor | QuantizedKeys,
    scale: float,
    planes: Tensor | None,
    slots: Tensor | None,
    length: int,
) -> Tensor:
    """Keys read once for the whole group; see ``score_positions_reference``."""
    num_heads, group_size, head_dim = q.shape
    out = torch.empty(num_heads, length, dtype=torch.float32, device=q.device)
    lengths = torch.full((num_heads,), length, dtype=torch.int32, device=q.device)
    q = q.contiguous()
    struct = ScoreStruct(
        dtype=DTYPE_CODES[q.dtype],
        head_dim=head_dim,
        num_queries=1,
        group_size=group_size,
        num_threads=torch.get_num_threads(),
        scale=scale,
        num_items=num_heads,
        queries=pointer(q),
        **key_fields(k),
        planes=pointer(planes),
        slots=pointer(slots),
        prompt_lens=pointer(lengths),
        newest_scores=pointer(out),
        newest_stride=length,
    )
    loaded().score(ctypes.addressof(struct))
    return out


def pooled_scores_torch(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Pooled scores of query groups, batched.

    Args:
        q: [M, G, D].
        keys: [M, N, D], or [1, N, D] for all.
        scale: Factor on the products.

    Returns:
        fp32 [M, N].
    """
    scores = (q.float() @ keys.float().transpose(1, 2)) * scale  # [M, G, N]
    probabilities = torch.softmax(scores, dim=-1)
    pooled = avg_pool1d(probabilities, kernel_size=POOL_WIDTH, stride=1, padding=POOL_WIDTH // 2)
    return pooled.amax(dim=1)


def score_positions_torch(
    q: Tensor,
    k: Tensor | QuantizedKeys,
    scale: float,
    planes: Tensor | None,
    slots: Tensor | None,
    length: int,
) -> Tensor:
    """Batched products; see ``score_positions_reference``."""
    if length == 0 or q.shape[0] == 0:
        return torch.zeros(q.shape[0], length, dtype=torch.float32, device=q.device)
    index = torch.arange(length, device=q.device) if slots is None else slots.long()
    order = range(q.shape[0]) if planes is None else planes.tolist()
    keys = torch.stack([read_keys(k, plane, index) for plane in order])
    return pooled_scores_torch(q, keys, scale)
