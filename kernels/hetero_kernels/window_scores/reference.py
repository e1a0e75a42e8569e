"""Definition of ``window_scores``: one query at a time, in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels.score_positions.reference import POOL_WIDTH

if TYPE_CHECKING:
    from torch import Tensor


def window_scores_reference(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Mean attention of the last W tokens of a prompt, pooled.

    Query w of W is that of position ``N - W + w`` and sees the positions up to its own. Softmax
    over exactly those; the mean over the W tokens and the G query heads; then each position takes
    the mean of the 5 values around it, where positions outside count as 0 and the divisor stays 5.

    Args:
        q: [H, W, G, D].
        k: [H, N, D], N >= W.
        scale: Factor on the products.

    Returns:
        fp32 [H, N].

    Source: the observation window of SnapKV (arXiv 2404.14469), section 3. Deliberate differences:
    the mean instead of the sum (the order is the same), the pool of HeteroCache instead of a
    maximum pool, and the window's own positions have scores too.
    """
    H, W, G, _ = q.shape
    N = k.shape[1]
    out = torch.zeros(H, N, dtype=torch.float32, device=q.device)
    for h in range(H):
        mean = torch.zeros(N, dtype=torch.float32, device=q.device)
        for w in range(W):
            seen = N - W + w + 1
            for g in range(G):
                products = (k[h, :seen].float() @ q[h, w, g].float()) * scale
                mean[:seen] += torch.softmax(products, dim=0) / (W * G)
        for p in range(N):
            near = mean[max(0, p - POOL_WIDTH // 2) : p + POOL_WIDTH // 2 + 1]
            out[h, p] = near.sum() / POOL_WIDTH
    return out
