"""Argument checks that several operations share.

Every failure is a ``ValueError`` with the rule and the value got.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Require one dtype."""
    if tensor.dtype != dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")


def check_float(name: str, tensor: Tensor) -> None:
    """Require fp32, bf16 or fp16."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """Require a shape; ``None`` stands for any size."""
    actual = tuple(tensor.shape)
    if len(actual) != len(shape) or any(
        want is not None and want != got for want, got in zip(shape, actual, strict=True)
    ):
        wanted = "[" + ", ".join("any" if want is None else str(want) for want in shape) + "]"
        raise ValueError(f"{name} must have shape {wanted}, got {list(actual)}")


def check_dense_rows(name: str, tensor: Tensor, dims: int = 1) -> None:
    """Require that the last ``dims`` dimensions lie contiguous in memory."""
    expected = 1
    for dim in range(1, dims + 1):
        if tensor.shape[-dim] != 1 and tensor.stride(-dim) != expected:
            raise ValueError(
                f"the last {dims} dimension(s) of {name} must be contiguous, "
                f"got strides {tensor.stride()} for shape {list(tensor.shape)}"
            )
        expected *= tensor.shape[-dim]


def check_head_dim(head_dim: int) -> None:
    """Require a head dimension that the kernels are made for."""
    if head_dim % 16 != 0 or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be a multiple of 16 up to {MAX_HEAD_DIM}, got {head_dim}")


def check_devices(**tensors: Tensor | None) -> None:
    """Require that tensors lie on the device of the first."""
    (first, like), *others = tensors.items()
    assert like is not None
    for name, tensor in others:
        if tensor is not None and tensor.device != like.device:
            raise ValueError(
                f"{name} must be on {like.device} like {first}, got {tensor.device}: move it there"
            )


def check_count(rule: str, count: int, least: int = 1) -> None:
    """Require a number that is large enough."""
    if count < least:
        raise ValueError(f"{rule} must be at least {least}, got {count}")


def check_scale(scale: float) -> None:
    """Require a factor on products that keeps their order."""
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")


def check_same(rule: str, *values: object) -> None:
    """Require that all values are equal."""
    if any(value != values[0] for value in values[1:]):
        raise ValueError(f"{rule}, got {', '.join(str(value) for value in values)}")
