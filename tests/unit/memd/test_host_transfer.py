from __future__ import annotations

import numpy as np
import pytest

from memd.transfer import HostTransfer


@pytest.mark.parametrize("num_rows", [0, 1, 63, 64, 65, 1000])
def test_rows_arrive_in_the_order_asked_for_and_nothing_else_is_touched(num_rows: int) -> None:
    rng = np.random.default_rng(num_rows)
    source_offset, row_bytes, num_source = 4096, 48, 200
    landing_offset = source_offset + num_source * row_bytes + 100
    region = rng.integers(0, 256, landing_offset + num_rows * row_bytes + 64, dtype=np.uint8)
    before = region.copy()
    rows = rng.integers(0, num_source, num_rows)
    HostTransfer(region).gather(
        source_offset=source_offset, row_bytes=row_bytes, rows=rows, landing_offset=landing_offset
    )
    expected = before.copy()
    for index, row in enumerate(rows):
        start = landing_offset + index * row_bytes
        origin = source_offset + row * row_bytes
        expected[start : start + row_bytes] = before[origin : origin + row_bytes]
    assert np.array_equal(region, expected)


def test_zero_touches_its_range_only() -> None:
    region = np.full(100, 9, dtype=np.uint8)
    HostTransfer(region).zero(offset=10, length=30)
    assert region.tolist() == [9] * 10 + [0] * 30 + [9] * 60
