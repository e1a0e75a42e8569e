"""Which implementation of an operation runs.

Owns the meaning of ``impl``:

========= ===================================================================================
auto      ``native`` for CPU tensors where the compiled library is there, else ``torch``
native    the compiled CPU kernels; an error where they are not available
torch     vectorised torch, any device
reference the definition: plain loops in fp32, slow
========= ===================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from hetero_kernels import native

if TYPE_CHECKING:
    import torch

Impl = Literal["auto", "native", "torch", "reference"]
Resolved = Literal["native", "torch", "reference"]


def resolve(impl: Impl, device: torch.device) -> Resolved:
    """Turn ``impl`` into what runs for tensors on ``device``.

    Raises:
        ValueError: ``impl`` is not one of the four, or ``native`` is asked for and not available.
    """
    if impl == "auto":
        return "native" if device.type == "cpu" and native.library() is not None else "torch"
    if impl == "native":
        if device.type != "cpu":
            raise ValueError(f"impl='native' runs on CPU tensors, got {device}")
        if native.library() is None:
            raise ValueError(f"impl='native' is not available: {native.native_status()}")
        return "native"
    if impl not in ("torch", "reference"):
        raise ValueError(f"impl must be auto, native, torch or reference, got {impl!r}")
    return impl


def loaded() -> native.Library:
    """The compiled kernels, where ``resolve`` has said ``native``."""
    library = native.library()
    assert library is not None
    return library
