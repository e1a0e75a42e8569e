"""The tier below host memory: pages that nobody writes or reads go to disk and come back.

::

    PageMover      one page a step          knows who waits for what: no
    ├── TieredPages    which page is where, and who may leave
    │   └── EvictionPolicy     in which order
    └── ExtentIO       the bytes of one client
        ├── DiskTier           slots with checksums, in an AnonymousFile
        └── holes              memory given back and taken again

Everything but ``DiskTier`` is one client's.

Not wired into the service yet: no flag reaches it.
"""

from __future__ import annotations

from memd.tiers.disk import DiskTier
from memd.tiers.eviction import POLICY_NAMES, EvictionPolicy, eviction_policy
from memd.tiers.extent import ExtentIO
from memd.tiers.mover import PageMover, Progress
from memd.tiers.tiered import Place, TieredPages, Use

__all__ = [
    "POLICY_NAMES",
    "DiskTier",
    "EvictionPolicy",
    "ExtentIO",
    "PageMover",
    "Place",
    "Progress",
    "TieredPages",
    "Use",
    "eviction_policy",
]
