"""Definition of ``quantize_keys``: one group at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels.quantize_keys.format import LARGEST, num_groups

if TYPE_CHECKING:
    from torch import Tensor


def quantize_keys_reference(keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Symmetric round-to-nearest quantisation of each group of each key.

    Of a group with largest magnitude a: the scale is ``a / largest`` (127 or 7) rounded to bf16,
    an element the nearest whole number (ties to even) to ``x / scale``, clamped to
    ``-largest .. largest``. A group of zeros has scale 0 and elements 0.

    Args:
        keys: [n, D].
        bits: 8 or 4.

    Returns:
        Elements as in ``QuantizedKeys.data`` [n, D * bits / 8] and scales [n, num_groups].
    """
    n, D = keys.shape
    groups = num_groups(D, bits)
    size, largest = D // groups, LARGEST[bits]
    whole = torch.zeros(n, D, dtype=torch.int16, device=keys.device)
    scales = torch.zeros(n, groups, dtype=torch.bfloat16, device=keys.device)
    for i in range(n):
        for g in range(groups):
            span = slice(g * size, (g + 1) * size)
            x = keys[i, span].float()
            scale = (x.abs().max() / largest).to(torch.bfloat16)
            scales[i, g] = scale
            if scale > 0:
                # round() of torch is half to even.
                whole[i, span] = (x / scale.float()).round().clamp(-largest, largest).short()
    if bits == 8:
        return whole.to(torch.int8), scales
    low, high = whole[:, : D // 2] + 8, whole[:, D // 2 :] + 8
    return (low | high << 4).to(torch.uint8), scales
