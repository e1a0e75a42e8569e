from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import pytest

from memd import native
from memd.transfer import HostTransfer
from memd.transfer.rows import RowCopy, compiled_rows, take_rows

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


@pytest.fixture(params=["numpy", "native"])
def copy_rows(request: pytest.FixtureRequest) -> RowCopy:
    if request.param == "numpy":
        return take_rows
    gather = native.gather()
    if gather is None:
        pytest.skip(native.status())
    return compiled_rows(gather)


@pytest.mark.parametrize("num_rows", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("row_bytes", [48, 256])
def test_rows_arrive_in_the_order_asked_for_and_nothing_else_is_touched(
    copy_rows: RowCopy, num_rows: int, row_bytes: int
) -> None:
    rng = np.random.default_rng(num_rows)
    source_offset, num_source = 4096, 200
    landing_offset = source_offset + num_source * row_bytes + 100
    region = rng.integers(0, 256, landing_offset + num_rows * row_bytes + 64, dtype=np.uint8)
    before = region.copy()
    rows = rng.integers(0, num_source, num_rows)
    HostTransfer(region, copy_rows=copy_rows).gather(
        source_offset=source_offset, row_bytes=row_bytes, rows=rows, landing_offset=landing_offset
    )
    expected = before.copy()
    for index, row in enumerate(rows):
        start = landing_offset + index * row_bytes
        origin = source_offset + row * row_bytes
        expected[start : start + row_bytes] = before[origin : origin + row_bytes]
    assert np.array_equal(region, expected)


def test_every_second_index_of_a_longer_list_will_do(copy_rows: RowCopy) -> None:
    region = np.arange(20, dtype=np.uint8)
    HostTransfer(region, copy_rows=copy_rows).gather(
        source_offset=0, row_bytes=2, rows=np.array([4, 9, 1, 9, 0])[::2], landing_offset=14
    )
    assert region[14:].tolist() == [8, 9, 2, 3, 0, 1]


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_a_long_gather_is_complete_when_it_returns(copy_rows: RowCopy, num_threads: int) -> None:
    row_bytes, num_source, num_rows = 1024, 4096, 13001
    rng = np.random.default_rng(num_threads)
    region = rng.integers(0, 256, (num_source + num_rows) * row_bytes, dtype=np.uint8)
    source, landing = region.reshape(-1, row_bytes)[:num_source], region[num_source * row_bytes :]
    with HostTransfer(region, num_threads=num_threads, copy_rows=copy_rows) as transfer:
        for _ in range(5):
            rows = rng.integers(0, num_source, num_rows)
            transfer.gather(
                source_offset=0,
                row_bytes=row_bytes,
                rows=rows,
                landing_offset=num_source * row_bytes,
            )
            assert np.array_equal(landing.reshape(-1, row_bytes), source[rows])


@pytest.mark.parametrize(
    ("num_bytes", "shares"),
    [(16 << 20, [10923, 10923, 10922]), (12 << 20, [8192] * 3), (8 << 20, [8192] * 2)],
)
def test_a_long_gather_is_shared_evenly(num_bytes: int, shares: list[int]) -> None:
    assert sorted((size for _, size in _shares(num_bytes)), reverse=True) == shares


def test_a_short_gather_stays_with_its_caller() -> None:
    assert _shares((8 << 20) - 512) == [(threading.get_ident(), 16383)]


def _shares(num_bytes: int) -> list[tuple[int, int]]:
    """Thread and rows of each part of a gather of so many bytes on up to three threads."""
    shares: list[tuple[int, int]] = []

    def copy_rows(source: Bytes, rows: Indices, out: Bytes, /) -> None:
        shares.append((threading.get_ident(), rows.size))
        take_rows(source, rows, out)

    region = np.zeros(20 << 20, dtype=np.uint8)
    rows = np.zeros(num_bytes // 512, dtype=np.int64)
    with HostTransfer(region, num_threads=3, copy_rows=copy_rows) as transfer:
        transfer.gather(source_offset=0, row_bytes=512, rows=rows, landing_offset=4 << 20)
    return shares


def test_its_threads_end_with_it() -> None:
    region = np.zeros(20 << 20, dtype=np.uint8)
    before = set(threading.enumerate())
    with HostTransfer(region, num_threads=2) as transfer:
        rows = np.zeros(16384, dtype=np.int64)
        transfer.gather(source_offset=0, row_bytes=512, rows=rows, landing_offset=4 << 20)
        assert len(set(threading.enumerate()) - before) == 1
    assert set(threading.enumerate()) <= before


def test_no_thread_is_no_number_of_threads() -> None:
    with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
        HostTransfer(np.zeros(8, dtype=np.uint8), num_threads=0)


def test_zero_touches_its_range_only() -> None:
    region = np.full(100, 9, dtype=np.uint8)
    HostTransfer(region).zero(offset=10, length=30)
    assert region.tolist() == [9] * 10 + [0] * 30 + [9] * 60
