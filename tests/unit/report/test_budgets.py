from __future__ import annotations

import pytest

from hetero_sglang.profile import shipped_profiles
from hetero_sglang.report import budget_rows

NAME = "smollm2-135m-instruct"


def test_budgets_of_a_prompt_under_each_preset() -> None:
    rows = budget_rows(shipped_profiles()[NAME], 10_000, [0.3, 0.5, 1.0])
    found = {(row.preset, row.ratio): row for row in rows}
    assert len(found) == 6
    # 30 pivots' int8 keys are 66 bytes of a row's 256.
    held = 2 + 30 * 66 / 256
    assert found["default", 0.3].base == int((27 - held) * 10_000 / 88)
    assert found["default", 0.3].floor == pytest.approx(held / 90)
    full = 90 * 10_000 * 256
    for ratio in (0.3, 0.5):
        num_bytes = found["default", ratio].num_bytes
        assert num_bytes is not None
        # Rounding down loses less than two tokens a head.
        assert ratio * full - 2 * 88 * 256 < num_bytes <= ratio * full
    assert found["default", 1.0].num_bytes == full
    assert found["paper", 0.3].base is None
    assert found["paper", 0.5].base == int(13 * 10_000 / 58)
    # The paper's formula drops something even at 1.
    assert found["paper", 1.0].least < 10_000
