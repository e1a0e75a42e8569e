"""Index tables that turn a head profile into addresses.

The reference implementation permutes the model's weights so that heads of one role are
adjacent. Index tables do the same without touching weights, so quantised and
tensor-parallel checkpoints load as they are (a deliberate difference).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.profile import HeadRole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_sglang.profile import HeadProfile


@dataclass(frozen=True)
class LayerHeads:
    """Heads of one layer by the area that holds them.

    Attributes:
        resident: KV head indices in the resident pool, int64 [num_resident].
        compressed: KV head indices in the block pool, int64 [num_compressed].
        pivots: KV head indices of pivots (a subset of ``resident``), int64 [num_pivots].
        first_plane: First plane of this layer in the resident pool.
        first_compressed: First compressed head id of this layer.
        first_pivot: First pivot id of this layer.
        head_map: int32 [num_kv_heads]; ``>= 0`` is a resident plane, ``< 0`` is
            ``~compressed_id``.
        pivot_map: int32 [num_kv_heads]; pivot id or -1.
    """

    resident: NDArray[np.int64]
    compressed: NDArray[np.int64]
    pivots: NDArray[np.int64]
    first_plane: int
    first_compressed: int
    first_pivot: int
    head_map: NDArray[np.int32]
    pivot_map: NDArray[np.int32]

    @property
    def planes(self) -> slice:
        """Planes of this layer in the resident pool."""
        return slice(self.first_plane, self.first_plane + len(self.resident))

    @property
    def compressed_ids(self) -> slice:
        """Compressed head ids of this layer."""
        return slice(self.first_compressed, self.first_compressed + len(self.compressed))


@dataclass(frozen=True)
class RoleTables:
    """All index tables of one model.

    A *plane* is one head's rows in the resident pool, a *compressed head id* one head's
    column in the block table, a *pivot id* one row of the drift state. Each counts over
    all layers, in layer and head order.

    Attributes:
        layers: One entry a layer.
        num_kv_heads: KV heads a layer.
        num_planes: Heads that keep everything (volatile and pivot), over all layers.
        num_compressed: Anchors and satellites, over all layers.
        num_pivots: Pivots, over all layers.
        pivot_plane: Resident plane of each pivot id, int32 [num_pivots].
        satellites: Compressed head ids of each pivot's satellites, one int64 array a pivot.
        allocation: Budget weight of each compressed head id, fp64 [num_compressed], mean 1.
    """

    layers: tuple[LayerHeads, ...]
    num_kv_heads: int
    num_planes: int
    num_compressed: int
    num_pivots: int
    pivot_plane: NDArray[np.int32]
    satellites: tuple[NDArray[np.int64], ...]
    allocation: NDArray[np.float64]

    @property
    def num_heads(self) -> int:
        """KV heads of the whole model."""
        return self.num_planes + self.num_compressed

    @property
    def floor(self) -> float:
        """Share of the KV heads that keep everything; the resident ratio must exceed it."""
        return self.num_planes / self.num_heads


def build_role_tables(profile: HeadProfile) -> RoleTables:
    """Builds the tables for a profile.

    Args:
        profile: A validated head profile.

    Returns:
        Tables over all layers and heads of the profile.
    """
    roles = np.asarray(profile.roles)
    num_layers, num_kv_heads = roles.shape
    layers: list[LayerHeads] = []
    pivot_plane: list[int] = []
    satellites: list[NDArray[np.int64]] = []
    compressed_id = np.full((num_layers, num_kv_heads), -1, dtype=np.int64)
    num_planes = num_compressed = num_pivots = 0
    for layer in range(num_layers):
        is_compressed = (roles[layer] == HeadRole.ANCHOR) | (roles[layer] == HeadRole.SATELLITE)
        resident = np.flatnonzero(~is_compressed)
        compressed = np.flatnonzero(is_compressed)
        pivots = np.flatnonzero(roles[layer] == HeadRole.PIVOT)
        head_map = np.empty(num_kv_heads, dtype=np.int32)
        head_map[resident] = num_planes + np.arange(len(resident))
        compressed_id[layer, compressed] = num_compressed + np.arange(len(compressed))
        head_map[compressed] = ~compressed_id[layer, compressed]
        pivot_map = np.full(num_kv_heads, -1, dtype=np.int32)
        pivot_map[pivots] = num_pivots + np.arange(len(pivots))
        pivot_plane += [int(head_map[h]) for h in pivots]
        layers.append(
            LayerHeads(
                resident=resident,
                compressed=compressed,
                pivots=pivots,
                first_plane=num_planes,
                first_compressed=num_compressed,
                first_pivot=num_pivots,
                head_map=head_map,
                pivot_map=pivot_map,
            )
        )
        num_planes += len(resident)
        num_compressed += len(compressed)
        num_pivots += len(pivots)
    for layer, heads in enumerate(layers):
        for pivot in heads.pivots:
            members = profile.satellites_of.get((layer, int(pivot)), ())
            satellites.append(np.array([compressed_id[layer, h] for h in members], dtype=np.int64))
    allocation = np.asarray(profile.allocation, dtype=np.float64)[compressed_id >= 0]
    return RoleTables(
        layers=tuple(layers),
        num_kv_heads=num_kv_heads,
        num_planes=num_planes,
        num_compressed=num_compressed,
        num_pivots=num_pivots,
        pivot_plane=np.array(pivot_plane, dtype=np.int32),
        satellites=tuple(satellites),
        allocation=allocation,
    )
