"""``quantize_keys`` by torch, on any device.

It runs once a chunk of a prompt and layer, over the keys of one or two heads: next to the chunk's
attention it does not show, so there is no compiled version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels.quantize_keys.format import LARGEST, num_groups

if TYPE_CHECKING:
    from torch import Tensor


def quantize_keys_torch(keys: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """All groups at once; see ``quantize_keys_reference``.

    Args:
        keys: [..., D].
        bits: 8 or 4.

    Returns:
        Elements [..., D * bits / 8] and scales [..., num_groups].
    """
    D, largest = keys.shape[-1], LARGEST[bits]
    groups = num_groups(D, bits)
    grouped = keys.float().reshape(*keys.shape[:-1], groups, D // groups)
    scales = (grouped.abs().amax(dim=-1) / largest).to(torch.bfloat16)
    divisors = scales.float()[..., None]
    # A group of zeros divides by one.
    whole = grouped / torch.where(divisors > 0, divisors, 1.0)
    whole = whole.round_().clamp_(-largest, largest).flatten(-2)
    whole = torch.where((divisors > 0).expand_as(grouped).flatten(-2), whole, 0.0)
    if bits == 8:
        return whole.to(torch.int8), scales
    shifted = (whole + 8).to(torch.uint8)
    return shifted[..., : D // 2] | shifted[..., D // 2 :] << 4, scales
