"""Results on their way from the device to the host, without anyone waiting for them.

Decisions are the host's, and a device that has work queued must not be waited for. So what a step
found out is copied to page-locked memory behind the work that makes it, and read at a later step,
when the copy is known to be done. Not yet run on a GPU.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hetero_sglang.cache.transfers import record_event

if TYPE_CHECKING:
    from collections.abc import Callable

    from hetero_sglang.cache.transfers import Event


@dataclass
class _Letter:
    handle: Callable[..., None]
    contents: list[torch.Tensor]
    event: Event


class Mailbox:
    """Letters from the device, delivered in the order of posting."""

    def __init__(
        self, device: torch.device, record: Callable[[torch.device], Event] = record_event
    ) -> None:
        """Starts empty.

        Args:
            device: Where letters come from.
            record: Marks the end of the work so far; tests give marks that are passed late.
        """
        self._device = device
        self._record = record
        self._letters: deque[_Letter] = deque()

    @property
    def num_letters(self) -> int:
        """Letters on their way."""
        return len(self._letters)

    def post(self, handle: Callable[..., None], *tensors: torch.Tensor) -> None:
        """Copies tensors to the host behind the work that makes them; returns at once.

        Args:
            handle: Called on delivery with the contents as NumPy arrays, in the same order.
            tensors: On the device. They may be overwritten by later work of the same stream.
        """
        self._letters.append(
            _Letter(handle, [self._copy(tensor) for tensor in tensors], self._record(self._device))
        )

    def deliver(self) -> None:
        """Hands over what has arrived, letters included that handlers post; never waits."""
        while self._letters and self._letters[0].event.query():
            self._hand_over()

    def wait(self) -> None:
        """Hands over everything, and waits for it (``sync`` retrieval)."""
        while self._letters:
            self._letters[0].event.synchronize()
            self._hand_over()

    def drop(self) -> None:
        """Forgets what is on its way."""
        self._letters.clear()

    def _hand_over(self) -> None:
        letter = self._letters.popleft()
        arrays: list[Any] = [tensor.numpy() for tensor in letter.contents]
        letter.handle(*arrays)

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return tensor.clone()
        # torch's host allocator keeps the memory from others until the copy into it is done.
        target = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return target.copy_(tensor, non_blocking=True)
