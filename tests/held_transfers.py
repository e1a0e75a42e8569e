"""Copies between device and host that happen as late as a device may let them happen.

``HeldTransfers`` does a copy when it is waited for, or when somebody looks while copies are not
held back: with what lies at its source by then. So memory that was given to somebody else too early
is seen in the rows.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

from hetero_sglang.cache.transfers import Transfers

if TYPE_CHECKING:
    from collections.abc import Callable

    from hetero_sglang.cache.transfers import Event


class _Late:
    def __init__(self, transfers: HeldTransfers) -> None:
        self._transfers = transfers
        self.is_passed = False

    def query(self) -> bool:
        if not self._transfers.is_held:
            self.synchronize()
        return self.is_passed

    def synchronize(self) -> None:
        while not self.is_passed:
            self._transfers.do_next()


class HeldTransfers(Transfers):
    """Transfers of a CPU that are done late, in the order in which they were begun.

    Attributes:
        is_held: Whether looking at a copy leaves it undone.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.is_held = False
        self._waiting: deque[tuple[Callable[[], None], _Late]] = deque()

    @property
    def num_waiting(self) -> int:
        """Copies that were begun and not done."""
        return len(self._waiting)

    def begin(self, copy: Callable[[], None]) -> Event:
        late = _Late(self)
        self._waiting.append((copy, late))
        return late

    def do_next(self) -> None:
        """Does the oldest copy."""
        copy, late = self._waiting.popleft()
        copy()
        late.is_passed = True
