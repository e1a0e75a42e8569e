"""How the programs of an item share what lies along it, in Triton.

Grids are (item, split): the second axis cuts a line of tiles or blocks into equal shares. Which
split gets which tiles is decided here, because kernels that run one after the other rely on having
the same ones.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["share_of"]


@triton.jit
def share_of(num_parts):
    """First part of this program's share and the first behind it; an empty share ends first."""
    split = tl.program_id(1)
    share = tl.cdiv(num_parts, tl.num_programs(1))
    return split * share, tl.minimum((split + 1) * share, num_parts)
