"""Definition of ``extend_attention``: one query at a time, in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def extend_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, prefix_len: int, scale: float
) -> Tensor:
    """Causal attention of new tokens; query ``i`` sees keys ``0 .. prefix_len + i``."""
    num_new, num_q_heads, _ = q.shape
    group_size = num_q_heads // k.shape[0]
    out = torch.empty_like(q)
    for i in range(num_new):
        end = prefix_len + i + 1
        for j in range(num_q_heads):
            h = j // group_size
            scores = (k[h, :end].float() @ q[i, j].float()) * scale
            out[i, j] = (torch.softmax(scores, dim=0) @ v[h, :end].float()).to(q.dtype)
    return out
