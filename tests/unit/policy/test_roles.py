"""Index tables: which area holds a head, and who refreshes whom."""

from __future__ import annotations

import numpy as np
import pytest

from hetero_sglang.policy.roles import build_role_tables
from hetero_sglang.profile import HeadProfile, HeadRole, ModelShape, Thresholds

A, V, P, S = HeadRole.ANCHOR, HeadRole.VOLATILE, HeadRole.PIVOT, HeadRole.SATELLITE
PROFILE = HeadProfile(
    model=ModelShape(num_layers=2, num_q_heads=8, num_kv_heads=4),
    roles=np.array([[P, S, V, A], [S, P, S, P]]),
    allocation=np.array([[0.0, 0.5, 0.0, 1.5], [1.2, 0.0, 0.8, 0.0]]),
    stability=np.full((2, 4), 0.5),
    satellites_of={(0, 0): (1,), (1, 1): (0,), (1, 3): (2,)},
    thresholds=Thresholds(stable=0.5, similarity=0.5),
)


def test_pivots_that_keep_all_rows_watch_with_their_planes() -> None:
    tables = build_role_tables(PROFILE)
    assert (tables.num_planes, tables.num_compressed, tables.num_pivots) == (4, 4, 3)
    assert [heads.resident.tolist() for heads in tables.layers] == [[0, 2], [1, 3]]
    assert tables.watched_plane.tolist() == [0, 2, 3]
    assert [ids.tolist() for ids in tables.refreshed] == [[0], [2], [3]]
    assert tables.allocation.tolist() == [0.5, 1.5, 1.2, 0.8]
    assert tables.held_heads == 4
    assert tables.floor == 0.5


def test_budgeted_pivots_are_compressed_and_refresh_themselves_first() -> None:
    tables = build_role_tables(PROFILE, pivot_rows="budget", watched_share=0.25)
    assert (tables.num_planes, tables.num_compressed, tables.num_pivots) == (1, 7, 3)
    assert [heads.resident.tolist() for heads in tables.layers] == [[2], []]
    assert [heads.compressed.tolist() for heads in tables.layers] == [[0, 1, 3], [0, 1, 2, 3]]
    assert [heads.head_map.tolist() for heads in tables.layers] == [
        [~0, ~1, 0, ~2],
        [~3, ~4, ~5, ~6],
    ]
    # Planes of the watch pool are pivot ids.
    assert tables.watched_plane.tolist() == [0, 1, 2]
    assert [heads.pivot_ids for heads in tables.layers] == [slice(0, 1), slice(1, 3)]
    assert [ids.tolist() for ids in tables.refreshed] == [[0, 1], [4, 3], [6, 5]]
    assert tables.allocation.tolist() == [1.0, 0.5, 1.5, 1.2, 1.0, 0.8, 1.0]
    assert tables.held_heads == 1.75
    assert tables.floor == pytest.approx(1.75 / 8)
