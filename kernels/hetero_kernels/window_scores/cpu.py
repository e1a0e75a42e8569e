"""``window_scores`` by torch, on any device.

It runs once a prompt and layer: W queries of a head next to the N that the prompt's attention has.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import avg_pool1d

from hetero_kernels.score_positions.reference import POOL_WIDTH

if TYPE_CHECKING:
    from torch import Tensor


def window_scores_torch(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """One product for all queries of a head; see ``window_scores_reference``.

    Head by head, so that no more than W x G x N scores exist at a time.
    """
    H, W, G, D = q.shape
    N = k.shape[1]
    mean = torch.empty(H, N, dtype=torch.float32, device=q.device)
    hidden = torch.ones(W, W, dtype=torch.bool, device=q.device).triu(1)[:, None]
    for h in range(H):
        scores = (q[h].reshape(W * G, D).float() @ k[h].float().T).mul_(scale).view(W, G, N)
        scores[..., N - W :].masked_fill_(hidden, -math.inf)
        mean[h] = torch.softmax(scores, dim=-1).flatten(0, 1).mean(dim=0)
    if H == 0:
        return mean
    return avg_pool1d(mean, kernel_size=POOL_WIDTH, stride=1, padding=POOL_WIDTH // 2)
