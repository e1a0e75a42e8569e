"""Index tables that turn a head profile into addresses.

The reference implementation permutes the model's weights so that heads of one role are
adjacent. Index tables do the same without touching weights, so quantised and
tensor-parallel checkpoints load as they are (a deliberate difference).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hetero_sglang.profile import HeadRole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_sglang.profile import HeadProfile


PivotRows = Literal["all", "budget"]
"""What a pivot keeps of its prompt rows: every one (the paper), or a budget like its satellites,
beside all its keys, which it watches with."""


@dataclass(frozen=True)
class LayerHeads:
    """Heads of one layer by the area that holds them.

    Attributes:
        resident: KV head indices in the resident pool, int64 [num_resident].
        compressed: KV head indices in the block pool, int64 [num_compressed].
        pivots: KV head indices of pivots, int64 [num_pivots]; a subset of ``resident`` or, with
            budgeted pivots, of ``compressed``.
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

    @property
    def pivot_ids(self) -> slice:
        """Pivot ids of this layer."""
        return slice(self.first_pivot, self.first_pivot + len(self.pivots))


@dataclass(frozen=True)
class RoleTables:
    """All index tables of one model.

    A *plane* is one head's rows in the resident pool, a *compressed head id* one head's
    column in the block table, a *pivot id* one row of the drift state. Each counts over
    all layers, in layer and head order.

    Attributes:
        layers: One entry a layer.
        num_kv_heads: KV heads a layer.
        num_planes: Heads that keep every row, over all layers.
        num_compressed: Heads that keep a budget of rows, over all layers.
        num_pivots: Pivots, over all layers.
        pivot_rows: Whether pivots are among the former or the latter.
        watched_share: Bytes of a pivot's watched key of one token over those of a full row (K and
            V); 0 where nothing is held beside the rows.
        watched_plane: Where each pivot's watched keys lie, int32 [num_pivots]: a plane of the
            resident pool, or of the watch pool with budgeted pivots.
        refreshed: Compressed head ids that get new rows when a pivot drifts, one int64 array a
            pivot: its satellites and, with budgeted pivots, itself first.
        allocation: Budget weight of each compressed head id, fp64 [num_compressed]; of anchors and
            satellites from the profile (mean 1), of budgeted pivots 1.
    """

    layers: tuple[LayerHeads, ...]
    num_kv_heads: int
    num_planes: int
    num_compressed: int
    num_pivots: int
    pivot_rows: PivotRows
    watched_share: float
    watched_plane: NDArray[np.int32]
    refreshed: tuple[NDArray[np.int64], ...]
    allocation: NDArray[np.float64]

    @property
    def num_heads(self) -> int:
        """KV heads of the whole model."""
        return self.num_planes + self.num_compressed

    @property
    def held_heads(self) -> float:
        """What every prompt token costs whatever the budgets are, in full rows of one head."""
        return self.num_planes + self.watched_share * self.num_pivots

    @property
    def floor(self) -> float:
        """Share of the KV bytes that no budget takes away; the resident ratio must exceed it."""
        return self.held_heads / self.num_heads


def build_role_tables(
    profile: HeadProfile, *, pivot_rows: PivotRows = "all", watched_share: float = 0.0
) -> RoleTables:
    """Builds the tables for a profile.

    Args:
        profile: A validated head profile.
        pivot_rows: Whether pivots keep every row or a budget.
        watched_share: See ``RoleTables``; 0 with ``pivot_rows`` "all", whose rows hold the keys.

    Returns:
        Tables over all layers and heads of the profile.
    """
    assert pivot_rows == "budget" or watched_share == 0.0
    roles = np.asarray(profile.roles)
    num_layers, num_kv_heads = roles.shape
    is_compressed = (roles == HeadRole.ANCHOR) | (roles == HeadRole.SATELLITE)
    if pivot_rows == "budget":
        is_compressed |= roles == HeadRole.PIVOT
    layers: list[LayerHeads] = []
    watched_plane: list[int] = []
    compressed_id = np.full((num_layers, num_kv_heads), -1, dtype=np.int64)
    num_planes = num_compressed = num_pivots = 0
    for layer in range(num_layers):
        resident = np.flatnonzero(~is_compressed[layer])
        compressed = np.flatnonzero(is_compressed[layer])
        pivots = np.flatnonzero(roles[layer] == HeadRole.PIVOT)
        head_map = np.empty(num_kv_heads, dtype=np.int32)
        head_map[resident] = num_planes + np.arange(len(resident))
        compressed_id[layer, compressed] = num_compressed + np.arange(len(compressed))
        head_map[compressed] = ~compressed_id[layer, compressed]
        pivot_map = np.full(num_kv_heads, -1, dtype=np.int32)
        pivot_map[pivots] = num_pivots + np.arange(len(pivots))
        watched_plane += (pivot_map if pivot_rows == "budget" else head_map)[pivots].tolist()
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
    refreshed: list[NDArray[np.int64]] = []
    for layer, heads in enumerate(layers):
        for pivot in heads.pivots.tolist():
            members = list(profile.satellites_of.get((layer, pivot), ()))
            if pivot_rows == "budget":
                members.insert(0, pivot)
            refreshed.append(np.array([compressed_id[layer, h] for h in members], dtype=np.int64))
    weights = np.where(roles == HeadRole.PIVOT, 1.0, np.asarray(profile.allocation))
    return RoleTables(
        layers=tuple(layers),
        num_kv_heads=num_kv_heads,
        num_planes=num_planes,
        num_compressed=num_compressed,
        num_pivots=num_pivots,
        pivot_rows=pivot_rows,
        watched_share=watched_share,
        watched_plane=np.array(watched_plane, dtype=np.int32),
        refreshed=tuple(refreshed),
        allocation=np.asarray(weights[compressed_id >= 0], dtype=np.float64),
    )
