"""Rows that say whose they are, so that a wrong byte is seen and can be traced to its origin.

A row is a sequence of 64-bit words:

=========  ======================================================================
word       content
=========  ======================================================================
0          owner, a random number for each registration
1          place: page, head and offset in the page
2          salt, a random number for each filling of a page
3 .. n-2   a stream that follows from the first three
n-1        checksum of all before
=========  ======================================================================

A reader knows owner, place and salt, computes the whole row and compares all of it. The checksum is
for the diagnosis: it tells a row of somebody else from one that is torn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from memd.protocol import KVLayout

__all__ = ["MIN_ROW_BYTES", "differences", "expected_rows", "flat_rows"]

_WORD_BYTES = 8
_HEADER_WORDS = 3
MIN_ROW_BYTES = (_HEADER_WORDS + 2) * _WORD_BYTES
"""Header, one word of the stream, checksum."""

_PAGE_SHIFT, _HEAD_SHIFT = 40, 20
_MAX_TOLD = 3


def flat_rows(
    layout: KVLayout,
    pages: npt.NDArray[np.int64],
    heads: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Flat row indices of places, int64 [num_rows]; arguments int64 [num_rows] each."""
    return (pages * layout.num_heads + heads) * layout.page_tokens + offsets


def expected_rows(
    layout: KVLayout,
    owner: int,
    rows: npt.NDArray[np.int64],
    salts: npt.NDArray[np.uint64],
) -> npt.NDArray[np.uint8]:
    """What rows must contain.

    Args:
        layout: Layout with ``row_bytes`` a multiple of 8 and at least ``MIN_ROW_BYTES``.
        owner: The registration's number, 0 .. 2**64 - 1.
        rows: Flat row indices, int64 [num_rows].
        salts: Salt of each row's page, uint64 [num_rows].

    Returns:
        uint8 [num_rows, row_bytes].
    """
    num_words, rest = divmod(layout.row_bytes, _WORD_BYTES)
    if rest or layout.row_bytes < MIN_ROW_BYTES:
        raise ValueError(f"a row of {layout.row_bytes} bytes cannot carry the pattern")
    places, offsets = np.divmod(rows, layout.page_tokens)
    pages, heads = np.divmod(places, layout.num_heads)
    words = np.empty((len(rows), num_words), dtype=np.uint64)
    words[:, 0] = owner
    words[:, 1] = (pages << _PAGE_SHIFT) | (heads << _HEAD_SHIFT) | offsets
    words[:, 2] = salts
    seed = _mixed(words[:, 0] ^ _mixed(words[:, 1] ^ _mixed(words[:, 2])))  # [num_rows]
    steps = np.arange(num_words - _HEADER_WORDS - 1, dtype=np.uint64)
    words[:, _HEADER_WORDS:-1] = _mixed(seed[:, None] + steps)
    words[:, -1] = _checksums(words)
    return words.view(np.uint8)


def differences(
    actual: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8], owner: int
) -> str | None:
    """What is wrong with rows, in words; None when every byte is right.

    Args:
        actual: uint8 [num_rows, row_bytes].
        expected: uint8 [num_rows, row_bytes].
        owner: The reader's number.
    """
    is_wrong = (actual != expected).any(axis=1)  # [num_rows]
    if not is_wrong.any():
        return None
    wrong = np.flatnonzero(is_wrong)
    told = "; ".join(
        f"row {index} of {len(actual)} is {_described(actual[index], owner)}, should be "
        f"{_described(expected[index], owner)}"
        for index in wrong[:_MAX_TOLD].tolist()
    )
    return f"{len(wrong)} wrong rows: {told}"


def _described(row: npt.NDArray[np.uint8], owner: int) -> str:
    """A row's own word about itself."""
    if not row.any():
        return "all zero"
    words = np.ascontiguousarray(row).view(np.uint64)[None, :]
    place = int(words[0, 1])
    whose = "ours" if int(words[0, 0]) == owner else f"of owner {int(words[0, 0]):#x}"
    state = "whole" if int(_checksums(words)[0]) == int(words[0, -1]) else "torn"
    page, head = place >> _PAGE_SHIFT, place >> _HEAD_SHIFT & 0xFFFFF
    return (
        f"{whose}, {state}: page {page}, head {head}, offset {place & 0xFFFFF}, "
        f"salt {int(words[0, 2]):#x}"
    )


def _checksums(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Checksum of each row's words but the last, uint64 [num_rows]; depends on their order."""
    positions = np.arange(1, words.shape[1], dtype=np.uint64)
    return _mixed(np.bitwise_xor.reduce(_mixed(words[:, :-1] + positions), axis=1))


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A bijection of 64-bit words that changes half the bits for one; arithmetic wraps around."""
    words = words * np.uint64(0xD6E8FEB86659FD93)
    words = words ^ words >> np.uint64(32)
    words = words * np.uint64(0xD6E8FEB86659FD93)
    return words ^ words >> np.uint64(32)
