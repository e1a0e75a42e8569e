"""How bytes move between a client's pages and its landing ring; ``Transfer`` is the contract."""

from __future__ import annotations

from memd.transfer.base import Transfer
from memd.transfer.host import HostTransfer

__all__ = ["HostTransfer", "Transfer"]
