"""Fetched rows between memd's landing ring and the block pool.

Where the pools are CPU tensors, rows are installed from the ring itself. Where they are on a
device, rows are copied there first, into a ring of the same length and addresses, so whoever holds
rows of memd's ring holds the same rows of the device's. Rows of memd's ring are given back when the
copy from them is done. Not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from hetero_sglang.cache.transfers import PASSED, Event, Transfers

if TYPE_CHECKING:
    from memd.client import FetchTicket


@dataclass(frozen=True)
class Landed:
    """Rows of a fetch, where they can be installed from.

    Attributes:
        rows: [num_rows, 2, head_dim] on the pools' device, valid once ``event`` is passed and until
            the ticket is finished.
        event: Passed when the rows are there and memd's ring is not read any more.
    """

    rows: torch.Tensor
    event: Event


class Landing(Protocol):
    """Brings a finished fetch's rows to the pools' device."""

    def begin(self, ticket: FetchTicket) -> Landed:
        """Begins to bring the rows of a fetch that memd has answered; waits for nothing."""


class HostLanding:
    """Rows are installed from memd's ring."""

    def __init__(self, ring: torch.Tensor) -> None:
        """Looks at memd's ring.

        Args:
            ring: [landing_rows, 2, head_dim], the shared memory itself.
        """
        self._ring = ring

    def begin(self, ticket: FetchTicket) -> Landed:
        """The rows where they lie."""
        return Landed(_rows_of(self._ring, ticket), PASSED)


class DeviceLanding:
    """Rows are copied to a ring on the device."""

    def __init__(self, ring: torch.Tensor, transfers: Transfers) -> None:
        """Allocates the ring on the device.

        Args:
            ring: [landing_rows, 2, head_dim], the shared memory itself, page-locked where
                ``transfers`` are of a GPU.
            transfers: Begins the copies.
        """
        self._host_ring = ring
        self._ring = torch.empty_like(ring, device=transfers.device)
        self._transfers = transfers

    def begin(self, ticket: FetchTicket) -> Landed:
        """Asks the device for the copy.

        It runs behind what was asked of the forward passes' stream so far, so also behind the
        installation of rows that had the same place before.
        """
        source, target = _rows_of(self._host_ring, ticket), _rows_of(self._ring, ticket)

        def copy() -> None:
            target.copy_(source, non_blocking=True)

        return Landed(target, self._transfers.begin(copy))


def _rows_of(ring: torch.Tensor, ticket: FetchTicket) -> torch.Tensor:
    return ring[ticket.landing_start : ticket.landing_start + ticket.num_rows]
