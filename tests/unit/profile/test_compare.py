from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from hetero_sglang.profile import shipped_profiles
from hetero_sglang.profile.compare import kappa, rank_correlation

NAME = "smollm2-135m-instruct"


def test_kappa_is_agreement_beyond_chance() -> None:
    source = shipped_profiles()[NAME]
    assert kappa(source, source) == 1.0
    # Layers in reverse: most heads keep their role, and the counts stay as they are.
    turned = dataclasses.replace(
        source,
        roles=source.roles[::-1],
        allocation=source.allocation[::-1],
        satellites_of={(29 - layer, h): s for (layer, h), s in source.satellites_of.items()},
    )
    agreed = float((source.roles == turned.roles).mean())
    chance = (2**2 + 30**2 + 58**2) / 90**2
    assert kappa(source, turned) == pytest.approx((agreed - chance) / (1 - chance))
    assert 0 < kappa(source, turned) < 1


def test_rank_correlation_shares_ranks_among_equals() -> None:
    values = np.array([[0.1, 0.4], [0.2, 0.9]])
    assert rank_correlation(values, values**3) == pytest.approx(1.0)
    assert rank_correlation(values, -values) == pytest.approx(-1.0)
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    tied = rank_correlation(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0)))
