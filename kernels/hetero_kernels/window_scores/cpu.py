"""``window_scores`` by torch, on any device.

It runs once a prompt and layer: W queries of a head next to the N that the prompt's attention has.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import avg_pool1d

from hetero_kernels.window_scores.reference import POOL_WIDTH

if TYPE_CHECKING:
    from torch import Tensor


def window_scores_torch(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """One product for all queries of a head; see ``window_scores_reference``."""
    H, W, G, D = q.shape
    N = k.shape[1]
    if H == 0 or N == 0:
        return torch.zeros(H, N, device=q.device)
    scores = torch.bmm(q.reshape(H, W * G, D).float(), k.float().transpose(1, 2)).mul_(scale)
    scores = scores.view(H, W, G, N)
    hidden = torch.ones(W, W, dtype=torch.bool, device=q.device).triu(1)
    scores[..., N - W :].masked_fill_(hidden[None, :, None], -math.inf)
    mean = torch.softmax(scores, dim=-1).flatten(1, 2).mean(dim=1)
    return avg_pool1d(mean, kernel_size=POOL_WIDTH, stride=1, padding=POOL_WIDTH // 2)
