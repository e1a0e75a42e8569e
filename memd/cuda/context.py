"""Which device a client means, and its primary context for as long as somebody copies to it.

The primary context and not one of memd's own: it is the one that peers, libraries and tools know,
and in a process without other users of CUDA the last release ends it with all that it holds. It
takes hundreds of MiB of the device, which is why it lives no longer than the clients that need it.

Not yet run on a GPU.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from memd.cuda.errors import RingRefused

if TYPE_CHECKING:
    from memd.cuda.driver import Driver

__all__ = ["PrimaryContext", "device_name", "find_device"]


def device_name(device_uuid: bytes) -> str:
    """A UUID as ``nvidia-smi -L`` shows it."""
    return f"GPU-{uuid.UUID(bytes=device_uuid)}"


def find_device(driver: Driver, device_uuid: bytes) -> int:
    """The device with a UUID; ordinals differ between processes, UUIDs do not.

    Raises:
        RingRefused: This process sees no such device.
        CudaError: The driver cannot list its devices.
    """
    driver.init()
    visible = []
    for ordinal in range(driver.device_count()):
        device = driver.device(ordinal)
        found = driver.device_uuid(device)
        if found == device_uuid:
            return device
        visible.append(device_name(found))
    raise RingRefused(
        f"memd sees no device {device_name(device_uuid)}, only {', '.join(visible) or 'none'}; "
        f"start it with the engine's CUDA_VISIBLE_DEVICES, in a container with the engine's GPUs"
    )


class PrimaryContext:
    """A device's primary context, current on the thread that made this; a context manager.

    Args:
        driver: Initialised.
        device: Whose.

    Raises:
        CudaError: The device cannot have one, for example for want of memory.
    """

    def __init__(self, driver: Driver, device: int) -> None:
        self._driver = driver
        self._device = device
        context = driver.retain_context(device)
        try:
            driver.set_current(context)
        except BaseException:
            driver.release_context(device)
            raise

    def __enter__(self) -> PrimaryContext:
        """The context."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Take it off the thread and release it."""
        try:
            self._driver.set_current(None)
        finally:
            self._driver.release_context(self._device)
