"""The tier below host memory: pages that nobody writes or reads go to disk and come back.

::

    Tiers          all clients of a region
    └── ClientTier     one of them
        └── PageMover      one page at a time           knows who waits for what: no
            ├── TieredPages    which page is where, and who may leave
            │   └── EvictionPolicy     in which order
            └── ExtentIO       the bytes of one client
                ├── DiskTier       slots with checksums, in an AnonymousFile
                ├── ThreadRunner   where the disk is waited for
                └── holes          memory given back and taken again

``DiskTier`` and ``ThreadRunner`` are everybody's, the rest below ``ClientTier`` is one client's.
"""

from __future__ import annotations

from memd.tiers.client import ClientTier, Tiers, tier_stats
from memd.tiers.disk import DiskTier
from memd.tiers.eviction import POLICY_NAMES
from memd.tiers.files import BLOCK_BYTES
from memd.tiers.mover import Progress
from memd.tiers.runner import ThreadRunner

__all__ = [
    "BLOCK_BYTES",
    "POLICY_NAMES",
    "ClientTier",
    "DiskTier",
    "Progress",
    "ThreadRunner",
    "Tiers",
    "tier_stats",
]
