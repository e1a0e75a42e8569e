"""Devices for tests: what processes share of them, with real memory behind every allocation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from memd.cuda.driver import IPC_HANDLE_BYTES

if TYPE_CHECKING:
    import numpy.typing as npt

__all__ = ["FakeAllocation", "FakeMachine"]


@dataclasses.dataclass(eq=False)
class FakeAllocation:
    """Device memory.

    Attributes:
        device: Ordinal of its device.
        address: First byte in the process that allocated it.
        memory: What it holds, uint8 [num_bytes]; poisoned when made.
        has_handle: Whether it can be shared by an IPC handle.
        is_freed: Whether its owner gave it back.
        num_mappings: Processes that map it, its owner not counted.
    """

    device: int
    address: int
    memory: npt.NDArray[np.uint8]
    has_handle: bool = True
    is_freed: bool = False
    num_mappings: int = 0

    @property
    def handle(self) -> bytes:
        """Its IPC handle; has zero bytes inside, as real ones do."""
        return self.address.to_bytes(8, "big") + bytes(IPC_HANDLE_BYTES - 9) + b"\x01"

    @property
    def is_held(self) -> bool:
        """Whether it still takes the device's memory."""
        return not self.is_freed or self.num_mappings > 0


class FakeMachine:
    """Devices and what processes share of them.

    Args:
        num_devices: How many.
        one_address_space: Whether devices address registered memory as the processor does.

    Attributes:
        uuids: Of the devices, by ordinal.
        allocations: All that were ever made.
        violations: What would have done damage, in words.
    """

    def __init__(self, num_devices: int = 1, *, one_address_space: bool = True) -> None:
        self.uuids = [bytes([0xD0 + ordinal]) * 16 for ordinal in range(num_devices)]
        self.one_address_space = one_address_space
        self.allocations: list[FakeAllocation] = []
        self.violations: list[str] = []
        # Processes map the same allocation at addresses of their own.
        self._next_address = 0x7000_0000_0000

    def allocate(
        self, num_bytes: int, *, device: int = 0, has_handle: bool = True
    ) -> FakeAllocation:
        """Device memory of an engine; ``has_handle`` False is that of expandable segments."""
        memory = np.full(num_bytes, 0xEE, dtype=np.uint8)
        allocation = FakeAllocation(device, self.place(num_bytes), memory, has_handle)
        self.allocations.append(allocation)
        return allocation

    def free(self, allocation: FakeAllocation) -> None:
        """The owner gives memory back in an orderly way."""
        if allocation.num_mappings:
            self.violations.append("memory was freed that another process maps")
        self.kill_owner(allocation)

    def kill_owner(self, allocation: FakeAllocation) -> None:
        """The owner's process ends; memory that others map stays until they unmap it."""
        allocation.is_freed = True

    def held_bytes(self, device: int = 0) -> int:
        """Device memory that is taken."""
        return sum(
            allocation.memory.size
            for allocation in self.allocations
            if allocation.device == device and allocation.is_held
        )

    def allocation_at(self, address: int) -> FakeAllocation | None:
        """The allocation around an address in its owner's process."""
        for allocation in self.allocations:
            if 0 <= address - allocation.address < allocation.memory.size:
                return allocation
        return None

    def place(self, num_bytes: int) -> int:
        """Addresses that nobody else has."""
        address = self._next_address
        self._next_address += (num_bytes // (1 << 21) + 2) << 21
        return address
