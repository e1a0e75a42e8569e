"""Which implementation of an operation runs.

Owns the meaning of ``impl``:

========= ======================================================================================
auto      CUDA tensors: ``triton`` where it is installed; CPU tensors: ``native`` where the compiled
          library is there; else ``torch``
native    the compiled CPU kernels; an error where they are not available
triton    Triton kernels on CUDA tensors (not yet run on a GPU), or in Triton's interpreter
torch     vectorised torch, any device
reference the definition: plain loops in fp32, slow
========= ======================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hetero_kernels import native, triton_support

if TYPE_CHECKING:
    import torch

Impl = Literal["auto", "native", "triton", "torch", "reference"]
Resolved = Literal["native", "triton", "torch", "reference"]


def resolve(impl: Impl, device: torch.device, *, has_native: bool = True) -> Resolved:
    """Turn ``impl`` into what runs for tensors on ``device``.

    Args:
        impl: What is asked for.
        device: Of the tensors.
        has_native: Whether the operation has compiled kernels.

    Raises:
        ValueError: ``impl`` is not one of the five, or what is asked for is not available.
    """
    if impl == "auto":
        if device.type == "cuda" and triton_support.is_installed():
            triton_support.require(device)
            return "triton"
        is_native = has_native and device.type == "cpu" and native.library() is not None
        return "native" if is_native else "torch"
    if impl == "native":
        if not has_native:
            raise ValueError("this operation has no impl='native'; auto takes torch on CPU tensors")
        if device.type != "cpu":
            raise ValueError(f"impl='native' runs on CPU tensors, got {device}")
        if native.library() is None:
            raise ValueError(f"impl='native' is not available: {native.native_status()}")
        return "native"
    if impl == "triton":
        triton_support.require(device)
        return "triton"
    if impl not in ("torch", "reference"):
        raise ValueError(f"impl must be auto, native, triton, torch or reference, got {impl!r}")
    return impl


def loaded() -> native.Library:
    """The compiled kernels, where ``resolve`` has said ``native``."""
    library = native.library()
    assert library is not None
    return library
