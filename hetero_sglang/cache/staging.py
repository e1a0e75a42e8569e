"""Staging pool: full KV of compressed heads while their prompt is in prefill.

A prompt gets one extent of adjacent slots for its whole length at its first chunk. So
attention over a chunk reads a slice instead of a gather, the copy to the host is one
strided copy, and a chunked prompt can never be stranded half way. Extents return when
the prompt has been compressed.
"""

from __future__ import annotations

from bisect import insort
from typing import TYPE_CHECKING

from hetero_sglang.cache.memory import allocate_pool
from hetero_sglang.errors import ResidencyError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch


class ExtentAllocator:
    """First-fit allocator of adjacent slots, coalescing on free.

    Free extents are kept as ascending, disjoint, non-adjacent ``(start, size)`` pairs.
    """

    def __init__(self, capacity: int) -> None:
        """Starts with everything free.

        Args:
            capacity: Number of slots.
        """
        self.capacity = capacity
        self._free: list[tuple[int, int]] = [(0, capacity)] if capacity else []
        self._used: dict[int, int] = {}

    @property
    def used(self) -> int:
        """Slots given out."""
        return sum(self._used.values())

    def allocate(self, size: int) -> int | None:
        """Start of an extent of ``size`` slots, or None when no gap is large enough."""
        for index, (start, gap) in enumerate(self._free):
            if gap >= size:
                if gap == size:
                    del self._free[index]
                else:
                    self._free[index] = (start + size, gap - size)
                self._used[start] = size
                return start
        return None

    def free(self, start: int) -> None:
        """Returns the extent that begins at ``start``."""
        size = self._used.pop(start, None)
        if size is None:
            raise ResidencyError(f"no staging extent begins at slot {start}")
        insort(self._free, (start, size))
        index = self._free.index((start, size))
        if index + 1 < len(self._free) and start + size == self._free[index + 1][0]:
            size += self._free.pop(index + 1)[1]
            self._free[index] = (start, size)
        if index > 0 and sum(self._free[index - 1]) == start:
            before, gap = self._free.pop(index - 1)
            self._free[index - 1] = (before, gap + size)

    def fits(self, sizes: Iterable[int]) -> bool:
        """Whether extents of these sizes could be allocated now, in this order."""
        trial = ExtentAllocator(0)
        trial._free = list(self._free)
        return all(trial.allocate(size) is not None for size in sizes)

    def check_integrity(self) -> None:
        """Raises ResidencyError unless free and used extents tile the pool exactly."""
        spans = sorted([*self._free, *self._used.items()])
        position = 0
        for start, size in spans:
            if start != position or size <= 0:
                raise ResidencyError(f"staging extents overlap or leave a gap at slot {position}")
            position += size
        if position != self.capacity:
            raise ResidencyError(f"staging extents cover {position} of {self.capacity} slots")


class StagingPool:
    """K and V of compressed heads of prompts in prefill.

    Attributes:
        k: Keys, [num_compressed, num_tokens, head_dim].
        v: Values, same shape.
        extents: Who holds which slots.
    """

    def __init__(
        self,
        num_compressed: int,
        num_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Allocates the pool.

        Args:
            num_compressed: Compressed heads of the model.
            num_tokens: Slots.
            head_dim: Head dimension.
            dtype: Storage dtype.
            device: Device of the pool.
        """
        self.k = allocate_pool((num_compressed, num_tokens, head_dim), dtype, device)
        self.v = allocate_pool((num_compressed, num_tokens, head_dim), dtype, device)
        self.extents = ExtentAllocator(num_tokens)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, K and V of all compressed heads."""
        return 2 * self.k.shape[0] * self.k.shape[2] * self.k.element_size()
