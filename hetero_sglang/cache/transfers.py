"""Copies between the pools' device and the host that nobody waits for.

A device works on what it was asked for while the host goes on, so a copy is *begun* here and known
to be done later. Memory at either end of it is nobody else's until then: a staging extent, a row of
memd's landing ring, a page. Whoever begins a copy keeps its event and looks at it between two
steps. Where the pools are CPU tensors a copy is done when it has been begun. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray


class Event(Protocol):
    """A point in the device's work (``torch.cuda.Event``)."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Waits until it has."""


class _Passed:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        return


PASSED: Event = _Passed()
"""A point that was passed before anyone asked."""


def record_event(device: torch.device) -> Event:
    """The end of what has been asked of the device's current stream so far."""
    if device.type != "cuda":
        return PASSED
    event: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """A copy of an array on a device; the host does not wait, and may change the array at once.

    On CUDA the copy goes through page-locked memory of torch's caching allocator, which gives a
    piece out again only when the copy from it is done.

    Args:
        array: Any array.
        device: Where to.
    """
    copied = torch.from_numpy(np.array(array))
    if device.type != "cuda":
        return copied.to(device)
    return copied.pin_memory().to(device, non_blocking=True)


class Transfers:
    """Begins copies beside the forward passes.

    Copies run one after the other, in the order in which they were begun, each behind everything
    that had been asked of the device's current stream by then. So the current stream's earlier work
    is visible to a copy, and a copy's result to whatever is asked of any stream after its event was
    seen to be passed.

    Attributes:
        device: Device of the pools.
    """

    def __init__(self, device: torch.device) -> None:
        """Makes the stream of the copies.

        Args:
            device: Device of the pools.
        """
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, copy: Callable[[], None]) -> Event:
        """Runs ``copy``, which asks the device for copies, on the copies' stream.

        Args:
            copy: Launches and ``non_blocking`` copies; tensors that it makes are its own.

        Returns:
            The point at which they are done.
        """
        if self._stream is None:
            copy()
            return record_event(self.device)
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            copy()
            return record_event(self.device)

    def host_buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Host memory that copies can reach by themselves; page-locked for a GPU."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")
