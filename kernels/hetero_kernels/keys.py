"""Keys to be scored: in the queries' dtype, or quantised.

Owns what the scoring operations share about the two: checks and reading.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels.checks import check_dense_rows, check_devices, check_dtype, check_shape
from hetero_kernels.quantize_keys.format import QuantizedKeys

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_keys", "read_keys"]


def check_keys(name: str, keys: Tensor | QuantizedKeys, queries: Tensor) -> None:
    """Require keys that fit the queries.

    Args:
        name: Argument name for the message.
        keys: [num_planes, num_slots, D].
        queries: [..., D].

    Raises:
        ValueError: Dtype, head dimension, stride or device do not fit.
    """
    head_dim = queries.shape[-1]
    data = keys.data if isinstance(keys, QuantizedKeys) else keys
    check_devices(**{"queries": queries, name: data})
    if isinstance(keys, QuantizedKeys):
        if keys.head_dim != head_dim:
            raise ValueError(f"{name} must have head_dim {head_dim}, got {keys.head_dim}")
        return
    check_dtype(name, keys, queries.dtype)
    check_shape(name, keys, (None, None, head_dim))
    check_dense_rows(name, keys)


def read_keys(keys: Tensor | QuantizedKeys, plane: int, slots: Tensor) -> Tensor:
    """Keys of some slots of a plane.

    Args:
        keys: [num_planes, num_slots, D].
        plane: Plane.
        slots: Slots, int64 [n].

    Returns:
        [n, D], fp32 where the keys are quantised.
    """
    if isinstance(keys, torch.Tensor):
        return keys[plane, slots]
    return keys.dequantize(plane, slots)
