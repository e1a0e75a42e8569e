"""The four roles a KV head can have."""

from __future__ import annotations

import enum

__all__ = ["HeadRole"]


class HeadRole(enum.IntEnum):
    """What a KV head may drop, decided offline.

    Source: HeteroCache (arXiv 2601.13684) section 3; the numbers are those of the published
    profile files.
    """

    ANCHOR = 1
    """Stable and unlike its neighbours: keeps its best prompt tokens, chosen once."""
    VOLATILE = 2
    """Drifting and unlike its neighbours: keeps every token."""
    PIVOT = 3
    """Centre of a cluster: watches for drift on behalf of its satellites. Keeps every token in the
    paper's method, else all its keys to watch with and its best prompt tokens."""
    SATELLITE = 4
    """Like its pivot: keeps its best prompt tokens, replaced when the pivot drifts."""

    @property
    def is_compressed(self) -> bool:
        """Whether heads of this role keep only a part of the prompt on the device."""
        return self in (HeadRole.ANCHOR, HeadRole.SATELLITE)
