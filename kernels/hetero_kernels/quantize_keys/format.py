"""Keys as small integers: how they lie in memory and what they cost.

A key is cut into groups of adjacent elements with one scale each. Scales are bf16: the quantiser
divides by the *rounded* scale, so rounding it costs no precision, and widening it is a shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hetero_kernels.checks import (
    check_dense_rows,
    check_devices,
    check_dtype,
    check_head_dim,
    check_shape,
)

if TYPE_CHECKING:
    from torch import Tensor

GROUP_SIZE = {8: None, 4: 32}
"""Elements that share a scale by bits; None: the whole key. One scale is enough for int8; int4
needs finer ones (docs/method.md, "Measured")."""

LARGEST = {8: 127, 4: 7}
"""Largest magnitude by bits; symmetric, so that 0 is exact."""


def num_groups(head_dim: int, bits: int) -> int:
    """Scales of a key.

    Raises:
        ValueError: There is no such format for this head dimension.
    """
    if bits not in GROUP_SIZE:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    check_head_dim(head_dim)
    if bits == 4 and head_dim % 32:
        raise ValueError(f"4-bit keys need a head_dim that is a multiple of 32, got {head_dim}")
    return head_dim // (GROUP_SIZE[bits] or head_dim)


def quantized_key_bytes(head_dim: int, bits: int) -> int:
    """Bytes of one key, its scales included.

    Raises:
        ValueError: There is no such format for this head dimension.
    """
    return head_dim * bits // 8 + 2 * num_groups(head_dim, bits)


@dataclass(frozen=True, eq=False)
class QuantizedKeys:
    """Planes of quantised keys, one plane a head.

    Attributes:
        data: Elements. 8 bits: int8 [num_planes, num_slots, D]. 4 bits: uint8
            [num_planes, num_slots, D / 2], byte j holding element j plus 8 in its lower half and
            element j + D / 2 plus 8 in its upper one.
        scales: bf16 [num_planes, num_slots, num_groups]; an element is worth its integer times
            the scale of its group, and group g covers elements ``g * D / num_groups`` and on.

    Raises:
        ValueError: A shape, dtype, stride or device is not as described.
    """

    data: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        check_dtype("scales", self.scales, torch.bfloat16)
        check_devices(data=self.data, scales=self.scales)
        check_shape("data", self.data, (None, None, None))
        if self.data.dtype not in (torch.int8, torch.uint8):
            raise ValueError(f"data must be int8 (8 bits) or uint8 (4 bits), got {self.data.dtype}")
        groups = num_groups(self.head_dim, self.bits)
        check_shape("scales", self.scales, (*self.data.shape[:2], groups))
        check_dense_rows("data", self.data)
        check_dense_rows("scales", self.scales)

    @property
    def bits(self) -> int:
        """Bits of an element, 8 or 4."""
        return 8 if self.data.dtype == torch.int8 else 4

    @property
    def head_dim(self) -> int:
        """Elements of a key, D."""
        return int(self.data.shape[2]) * 8 // self.bits

    @property
    def device(self) -> torch.device:
        """Where the keys lie."""
        return self.data.device

    def dequantize(self, plane: int, slots: Tensor) -> Tensor:
        """Keys of some slots.

        Args:
            plane: Plane.
            slots: Slots, int64 [n].

        Returns:
            fp32 [n, D].
        """
        data = self.data[plane, slots]
        if self.bits == 4:
            data = torch.cat([data & 15, data >> 4], dim=-1).to(torch.int16) - 8
        scales = self.scales[plane, slots].float()
        grouped = data.float().view(*scales.shape, self.head_dim // scales.shape[-1])
        return (grouped * scales[..., None]).flatten(-2)
