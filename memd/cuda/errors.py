"""Exceptions of ``memd.cuda``.

Tree::

    MemdError
    ├── DriverMissing   there is no CUDA driver in this process's reach, or one that is too old
    ├── CudaError       a driver call failed
    ├── DeviceLost      memd has given up a device that it may still have mappings on
    └── RingRefused     a landing ring that memd cannot or will not write to
"""

from __future__ import annotations

from memd.errors import MemdError

__all__ = ["CudaError", "DeviceLost", "DriverMissing", "RingRefused"]


class DriverMissing(MemdError):
    """The CUDA driver cannot be loaded; the message says what would help."""


class CudaError(MemdError):
    """A driver call failed.

    Args:
        call: Its name in CUDA's documentation, such as ``cuMemHostRegister``.
        name: CUDA's name for the error, such as ``CUDA_ERROR_OUT_OF_MEMORY``.
        detail: What this meant for the caller; may be empty.

    Attributes:
        call: As given.
        name: As given.
    """

    def __init__(self, call: str, name: str, detail: str = "") -> None:
        super().__init__(f"{call}: {name}" + (f" ({detail})" if detail else ""))
        self.call = call
        self.name = name


class DeviceLost(MemdError):
    """memd has given up the device that a ring is on; bytes may still arrive in the ring."""


class RingRefused(MemdError):
    """A landing ring cannot be written to from memd; the message says what to change."""
