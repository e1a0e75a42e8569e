"""memd, the memory daemon: KV pages in shared memory, served to engines on the same host.

``memd.client`` is what an engine imports, ``memd.protocol`` what both sides share, ``memd.testing``
a daemon inside the test's own process. ``docs/memd.md`` tells the whole story.

memd knows neither SGLang nor the policy: it speaks of pages and rows, never of roles.
"""

from __future__ import annotations

from memd.client import FetchTicket, MemdClient, ReserveTicket, Ticket
from memd.errors import (
    ConfigError,
    IntegrityError,
    MemdError,
    MemdTimeout,
    MemdUnavailable,
    PoolFull,
    ProtocolError,
)
from memd.process import MemdProcess, spawn_memd
from memd.protocol import KVLayout

__all__ = [
    "ConfigError",
    "FetchTicket",
    "IntegrityError",
    "KVLayout",
    "MemdClient",
    "MemdError",
    "MemdProcess",
    "MemdTimeout",
    "MemdUnavailable",
    "PoolFull",
    "ProtocolError",
    "ReserveTicket",
    "Ticket",
    "spawn_memd",
]
