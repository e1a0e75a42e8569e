"""The compiled gather does what NumPy's does, for every row size, alignment and list of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memd import native
from memd.transfer import HostTransfer
from memd.transfer.rows import RowCopy, compiled_rows, fastest_copy, take_rows

# Sizes that have code of their own, their neighbours, and sizes below and between cache lines.
ROW_BYTES = st.sampled_from([1, 2, 48, 63, 64, 65, 128, 192, 255, 256, 257, 512, 520, 1024, 4096])
NUM_SOURCE = 50
OFFSETS = st.integers(0, 70)


@st.composite
def row_lists(draw: st.DrawFn) -> list[int]:
    """Row indices: scattered, or in runs of consecutive ones as a satellite's sorted rows."""
    runs = draw(
        st.lists(st.tuples(st.integers(0, NUM_SOURCE - 1), st.integers(1, NUM_SOURCE)), max_size=20)
    )
    return [row for start, length in runs for row in range(start, min(start + length, NUM_SOURCE))]


def gathered(
    copy_rows: RowCopy, rows: list[int], *, row_bytes: int, before: int, between: int
) -> bytes:
    """The whole region after a gather that starts and lands at odd places."""
    rng = np.random.default_rng(row_bytes)
    landing_offset = before + NUM_SOURCE * row_bytes + between
    region = rng.integers(0, 256, landing_offset + len(rows) * row_bytes + 9, dtype=np.uint8)
    HostTransfer(region, copy_rows=copy_rows).gather(
        source_offset=before,
        row_bytes=row_bytes,
        rows=np.array(rows, dtype=np.int64),
        landing_offset=landing_offset,
    )
    return region.tobytes()


def by_definition(rows: list[int], *, row_bytes: int, before: int, between: int) -> bytes:
    """The same, byte range by byte range."""
    region = bytearray(
        gathered(lambda *_: None, rows, row_bytes=row_bytes, before=before, between=between)
    )
    at = before + NUM_SOURCE * row_bytes + between
    for row in rows:
        start = before + row * row_bytes
        region[at : at + row_bytes] = region[start : start + row_bytes]
        at += row_bytes
    return bytes(region)


@given(rows=row_lists(), row_bytes=ROW_BYTES, before=OFFSETS, between=OFFSETS)
def test_both_copies_are_the_definition(
    rows: list[int], row_bytes: int, before: int, between: int
) -> None:
    case = {"row_bytes": row_bytes, "before": before, "between": between}
    expected = by_definition(rows, **case)
    assert gathered(take_rows, rows, **case) == expected
    assert gathered(fastest_copy(), rows, **case) == expected


@given(
    rows=st.lists(st.integers(0, NUM_SOURCE - 1), min_size=1, max_size=300),
    row_bytes=ROW_BYTES,
    num_parts=st.integers(1, 5),
)
def test_a_gather_in_parts_is_the_gather_of_the_whole(
    rows: list[int], row_bytes: int, num_parts: int
) -> None:
    source = np.random.default_rng(0).integers(0, 256, (NUM_SOURCE, row_bytes), dtype=np.uint8)
    index, copy_rows = np.array(rows, dtype=np.int64), fastest_copy()
    whole, parts = np.empty((2, len(rows), row_bytes), dtype=np.uint8)
    copy_rows(source, index, whole)
    for rows_of_part, out in zip(
        np.array_split(index, num_parts), np.array_split(parts, num_parts), strict=True
    ):
        copy_rows(source, rows_of_part, out)
    assert np.array_equal(whole, parts)


def test_rows_beyond_four_gigabytes_are_reached() -> None:
    gather = native.gather()
    if gather is None:
        pytest.skip(native.status())
    # Never touched pages of a private mapping cost nothing.
    source = np.zeros((9 << 20, 512), dtype=np.uint8)
    rows = np.array([(9 << 20) - 1, 0, 1 << 23], dtype=np.int64)
    source[rows] = np.arange(1, 4, dtype=np.uint8)[:, None]
    out = np.zeros((3, 512), dtype=np.uint8)
    compiled_rows(gather)(source, rows, out)
    assert np.array_equal(out, source[rows])
