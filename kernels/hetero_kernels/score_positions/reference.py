"""Definition of ``score_positions``: one query head at a time, in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels.keys import read_keys

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.quantize_keys.format import QuantizedKeys

POOL_WIDTH = 5


def pooled_scores(q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Pooled attention of one query group over the keys of one KV head.

    Softmax over exactly the given keys; each position then takes the mean of the 5 probabilities
    around it, where positions outside count as 0 and the divisor stays 5; last the maximum over the
    group.

    Args:
        q: Queries of the group, [G, D].
        keys: [N, D].
        scale: Factor on the products.

    Returns:
        fp32 [N].

    Source: HeteroCache (arXiv 2601.13684), section on prefill selection.
    """
    G, N = q.shape[0], keys.shape[0]
    out = torch.zeros(N, dtype=torch.float32, device=q.device)
    for g in range(G):
        probabilities = torch.softmax((keys.float() @ q[g].float()) * scale, dim=0)
        for p in range(N):
            near = probabilities[max(0, p - POOL_WIDTH // 2) : p + POOL_WIDTH // 2 + 1]
            out[p] = torch.maximum(out[p], near.sum() / POOL_WIDTH)
    return out


def score_positions_reference(
    q: Tensor,
    k: Tensor | QuantizedKeys,
    scale: float,
    planes: Tensor | None,
    slots: Tensor | None,
    length: int,
) -> Tensor:
    """Pooled scores of each head's query group.

    Args:
        q: [Hc, G, D].
        k: [num_planes, num_slots, D]; quantised keys count as what they dequantise to.
        scale: Factor on the products.
        planes: Plane of each head, int32 [Hc]; ``None``: head h is plane h.
        slots: Slot of each position, int32 [N]; ``None``: position p is slot p.
        length: Positions, N.

    Returns:
        fp32 [Hc, N].
    """
    index = torch.arange(length, device=q.device) if slots is None else slots.long()
    out = torch.empty(q.shape[0], length, dtype=torch.float32, device=q.device)
    for h in range(q.shape[0]):
        plane = h if planes is None else int(planes[h])
        out[h] = pooled_scores(q[h], read_keys(k, plane, index), scale)
    return out
