"""Keys in 8 or 4 bits, to be scored but not attended to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from hetero_kernels.checks import check_devices, check_dtype, check_float, check_shape
from hetero_kernels.dispatch import resolve
from hetero_kernels.quantize_keys.cpu import quantize_keys_torch
from hetero_kernels.quantize_keys.format import QuantizedKeys, num_groups, quantized_key_bytes
from hetero_kernels.quantize_keys.reference import quantize_keys_reference

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["QuantizedKeys", "num_groups", "quantize_keys", "quantized_key_bytes"]


def quantize_keys(
    keys: Tensor,
    out: QuantizedKeys,
    planes: slice,
    slots: Tensor,
    *,
    impl: Literal["auto", "triton", "torch", "reference"] = "auto",
) -> None:
    """Quantise keys into their slots.

    Args:
        keys: fp32 / bf16 / fp16 [num_heads, n, D].
        out: Where to; only the named planes and slots change.
        planes: Planes of the heads, as many as ``num_heads``.
        slots: Slot of each key, int64 [n], unique. A negative one is padding and is not written, by
            ``triton``, which CUDA graphs may hold, and by the definition; ``torch``, which would
            have to wait for the device to leave it out, takes none.
        impl: See ``hetero_kernels.dispatch``; there is no ``native``, and ``auto`` is ``torch`` on
            CPU tensors.

    Raises:
        ValueError: A shape, dtype or device is not as described.
    """
    check_float("keys", keys)
    check_devices(keys=keys, out=out.data, slots=slots)
    num_heads = len(range(*planes.indices(out.data.shape[0])))
    check_dtype("slots", slots, torch.int64)
    check_shape("slots", slots, (None,))
    check_shape("keys", keys, (num_heads, slots.shape[0], out.head_dim))
    chosen = resolve(impl, keys.device, has_native=False)
    if chosen == "triton":
        from hetero_kernels.quantize_keys.triton import quantize_keys_triton

        dense = keys if keys.stride(2) == 1 else keys.contiguous()
        quantize_keys_triton(dense, out, planes, slots)
        return
    if chosen == "reference":
        is_real = slots >= 0
        for index, plane in enumerate(range(*planes.indices(out.data.shape[0]))):
            data, scales = quantize_keys_reference(keys[index, is_real], out.bits)
            out.data[plane, slots[is_real]] = data
            out.scales[plane, slots[is_real]] = scales
        return
    data, scales = quantize_keys_torch(keys, out.bits)
    out.data[planes].index_copy_(1, slots, data)
    out.scales[planes].index_copy_(1, slots, scales)
