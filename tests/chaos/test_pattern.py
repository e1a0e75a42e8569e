from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from memd.protocol import KVLayout
from tests.chaos.pattern import MIN_ROW_BYTES, differences, expected_rows, flat_rows

if TYPE_CHECKING:
    import numpy.typing as npt

LAYOUT = KVLayout(num_heads=3, head_dim=16, dtype="float16", page_tokens=4)
OWNER = 0xFEEDFACECAFEBEEF


def rows(owner: int = OWNER, salt: int = 7, count: int = 40) -> npt.NDArray[np.uint8]:
    places = np.arange(count)
    return expected_rows(LAYOUT, owner, places, np.full(count, salt, dtype=np.uint64))


def test_the_same_row_is_the_same_bytes_wherever_it_is_asked_for() -> None:
    one = expected_rows(LAYOUT, OWNER, np.array([17, 3]), np.array([7, 7], dtype=np.uint64))
    assert np.array_equal(one, rows()[[17, 3]])


def test_rows_differ_by_owner_place_and_salt() -> None:
    everything = np.concatenate([rows(), rows(owner=OWNER + 1), rows(salt=8)])
    assert len(np.unique(everything, axis=0)) == 120


def test_flat_rows_are_those_of_the_documented_formula() -> None:
    index = flat_rows(LAYOUT, np.array([5]), np.array([2]), np.array([3]))
    assert index.tolist() == [(5 * 3 + 2) * 4 + 3]


def test_right_bytes_have_no_difference() -> None:
    assert differences(rows(), rows(), OWNER) is None


def test_every_single_wrong_byte_is_seen() -> None:
    for byte in range(LAYOUT.row_bytes):
        actual = rows(count=2)
        actual[1, byte] ^= 1
        found = differences(actual, rows(count=2), OWNER)
        assert found is not None
        assert found.startswith("1 wrong rows: row 1 of 2 is")
        assert "torn" in found


@pytest.mark.parametrize(
    ("actual", "words"),
    [
        (rows(owner=0xABC), "of owner 0xabc, whole: page 0"),
        (rows(salt=9), "ours, whole: page 0, head 0, offset 0, salt 0x9"),
        (rows()[::-1], "ours, whole: page 3, head 0, offset 3"),
        (np.zeros_like(rows()), "all zero"),
    ],
    ids=["another owner's", "an older filling", "another place", "never written"],
)
def test_a_wrong_row_is_traced_to_its_origin(actual: npt.NDArray[np.uint8], words: str) -> None:
    found = differences(actual, rows(), OWNER)
    assert found is not None
    assert words in found


def test_a_row_too_short_for_the_pattern_is_refused() -> None:
    small = KVLayout(num_heads=1, head_dim=MIN_ROW_BYTES // 4 - 2, dtype="float16", page_tokens=1)
    with pytest.raises(ValueError, match="cannot carry"):
        expected_rows(small, OWNER, np.arange(1), np.zeros(1, dtype=np.uint64))
