"""Allocation of the big pools.

Decode reads rows scattered over pools of hundreds of megabytes. With 4 KiB pages most of
those reads also miss the TLB; on huge pages the same reads are up to 1.5 times faster
(docs/kernels.md).
"""

from __future__ import annotations

import ctypes
import logging
import os

import torch

logger = logging.getLogger(__name__)

_HUGE_PAGE_BYTES = 2 * 2**20
_MADV_HUGEPAGE = 14


def allocate_pool(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """A zeroed pool; on the CPU its memory is advised to be backed by huge pages.

    The advice costs nothing and touches nothing. Where the kernel does not take it (huge
    pages off), the pool works as before, only slower.

    Args:
        shape: Shape.
        dtype: Element type.
        device: Device.

    Returns:
        Zeros of that shape.
    """
    pool = torch.zeros(shape, dtype=dtype, device=device)
    if pool.device.type == "cpu":
        _advise_huge_pages(pool.data_ptr(), pool.numel() * pool.element_size())
    return pool


def _advise_huge_pages(address: int, num_bytes: int) -> None:
    start = -(-address // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
    end = (address + num_bytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
    if end <= start:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if libc.madvise(start, end - start, _MADV_HUGEPAGE):
        logger.debug("no huge pages for a pool: %s", os.strerror(ctypes.get_errno()))
