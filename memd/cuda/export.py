"""The engine's side of ``cuda_ipc``: what memd needs to know of a landing ring on the device.

An IPC handle names a whole allocation, so a ring that lies somewhere inside one travels as the
handle and an offset. Memory of PyTorch's expandable segments has no such handle.

Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from memd.cuda.errors import RingRefused
from memd.cuda.ring import RingHandle

if TYPE_CHECKING:
    from memd.cuda.driver import Driver

__all__ = ["export_ring"]


def export_ring(driver: Driver, *, device: int, address: int, num_bytes: int) -> RingHandle:
    """Describe device memory so that memd can open it.

    The exporter keeps it allocated until memd has closed it: freeing memory that another process
    maps is undefined. It gets memory pages of its own best by an allocation of its own; memd maps
    the whole allocation, though it writes to the ring only.

    Args:
        driver: Initialised; a context of the device is current.
        device: Where the memory lies.
        address: First byte of the ring, such as a tensor's ``data_ptr()``.
        num_bytes: Bytes of the ring, >= 1.

    Raises:
        RingRefused: The memory cannot be shared, or is not one allocation.
        CudaError: A driver call failed.
    """
    if not driver.is_ipc_capable(address):
        raise RingRefused(
            "the landing ring's memory has no CUDA IPC handle, as that of PyTorch's "
            "expandable_segments has none: leave expandable_segments out of "
            "PYTORCH_CUDA_ALLOC_CONF (PYTORCH_ALLOC_CONF), or use another data path"
        )
    base, allocation_bytes = driver.allocation_of(address)
    offset = address - base
    if offset + num_bytes > allocation_bytes:
        raise RingRefused(
            f"the landing ring ends {offset + num_bytes - allocation_bytes} bytes behind its "
            f"allocation of {allocation_bytes} bytes"
        )
    return RingHandle(
        handle=driver.ipc_handle(base),
        base_offset=offset,
        num_bytes=num_bytes,
        device_uuid=driver.device_uuid(device),
    )
