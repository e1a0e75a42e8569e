"""Which scores of a row are the K highest, in Triton, by radix search; nothing is sorted.

A score becomes an unsigned integer of the same order. Four launches (row, split) each make a
histogram of eight bits of those integers that agree with the bits found so far; from the histogram
of one launch every program of the next finds the following eight bits of the K-th highest. Then one
launch marks what is higher, and of what is equal the lowest positions. Its order comes from counts
of each split that the launches before have left, so positions are compacted without atomics, and
every byte of scratch that is read was written by the same call.

Whatever K is, the rows are read five times, from the second-level cache where they fit: a row of
128K positions has 512 KiB.

Numbers that follow a row's length are not specialised on: another length makes no other kernels,
but for rows that begin at multiples of 16 scores or not (the first are loaded as vectors). Not yet
run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Selection", "select", "share_of"]

# Scores that a program holds at a time: 16 for each of 128 threads.
BLOCK = 2048
# Scores of a split: few enough that a single long row fills many programs.
SPLIT_SCORES = 4096
MAX_SPLITS = 32
_NUM_PASSES = 4


@triton.jit
def share_of(num_parts):
    """First part of this program's share, and the first behind it, of what lies along an item.

    Grids are (item, split): the second axis cuts a line of tiles or blocks into equal shares, the
    same ones in all launches that rely on each other. An empty share ends before it begins.
    """
    split = tl.program_id(1)
    share = tl.cdiv(num_parts, tl.num_programs(1))
    return split * share, tl.minimum((split + 1) * share, num_parts)


@triton.jit
def _ordered(scores):
    """Unsigned integers in the order of the scores; both zeros are the same."""
    bits = scores.to(tl.uint32, bitcast=True)
    bits = tl.where(bits == 0x80000000, 0, bits)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _block(scores_ptr, row, row_stride, N, block, BLOCK: tl.constexpr):
    """Positions of a block of a row, and the scores there as ordered integers."""
    position = block * BLOCK + tl.arange(0, BLOCK)
    at = scores_ptr + row.to(tl.int64) * row_stride + position
    return position, _ordered(tl.load(at, mask=position < N, other=0.0))


@triton.jit
def _limits(row, counts_ptr, lens_ptr, length, REPEAT: tl.constexpr, HAS_LENS: tl.constexpr):
    """Length of a row and how many of it are wanted."""
    num_scores = length + tl.zeros((), tl.int32)
    if HAS_LENS:
        num_scores = tl.minimum(tl.maximum(tl.load(lens_ptr + row // REPEAT), 0), length)
    wanted = tl.load(counts_ptr + row // REPEAT)
    return num_scores, tl.minimum(tl.maximum(wanted, 0), num_scores)


@triton.jit
def _digit(histograms_ptr, row, needed, num_splits, SPLITS: tl.constexpr):
    """The eight bits of the K-th highest, how many are above, and each split's histogram."""
    split = tl.arange(0, SPLITS)
    digit = tl.arange(0, 256)
    at = (row.to(tl.int64) * num_splits + split[:, None]) * 256 + digit[None, :]
    counts = tl.load(histograms_ptr + at, mask=(split < num_splits)[:, None], other=0)
    total = tl.sum(counts, axis=0)  # [256]
    at_least = tl.sum(total, axis=0) - tl.cumsum(total, axis=0) + total
    # The largest digit with enough at or above it; with nothing needed that is the largest.
    found = tl.sum((at_least >= needed).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(digit > found, total, 0), axis=0)
    return found, above, counts


@triton.jit(do_not_specialize=["length"])
def _count(
    scores_ptr,
    counts_ptr,
    lens_ptr,
    before_ptr,
    after_ptr,
    above_ptr,
    found_ptr,
    length,
    row_stride,
    PASS: tl.constexpr,
    REPEAT: tl.constexpr,
    HAS_LENS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    N, needed = _limits(row, counts_ptr, lens_ptr, length, REPEAT, HAS_LENS)
    prefix = tl.zeros((), tl.uint32)
    at_above = above_ptr + row * num_splits + split
    if PASS == 0:
        tl.store(at_above, 0)
    else:
        # What the launch before found out: bits of the K-th highest, and its rank among equals.
        at_found = found_ptr + (row * 4 + PASS - 1) * 2
        if PASS > 1:
            prefix = tl.load(at_found).to(tl.uint32, bitcast=True)
            needed = tl.load(at_found + 1)
        digit, above, counts = _digit(before_ptr, row, needed, num_splits, SPLITS)
        prefix = (prefix << 8) | digit.to(tl.uint32)
        needed -= above
        tl.store(at_found + 2, prefix.to(tl.int32, bitcast=True))
        tl.store(at_found + 3, needed)
        is_mine = (tl.arange(0, SPLITS) == split)[:, None]
        is_above = (tl.arange(0, 256) > digit)[None, :]
        mine = tl.sum(tl.sum(tl.where(is_mine & is_above, counts, 0), axis=1), axis=0)
        tl.store(at_above, tl.load(at_above) + mine)

    histogram = tl.zeros([256], tl.int32)
    first, last = share_of(tl.cdiv(N, BLOCK))
    for block in range(first, last):
        position, bits = _block(scores_ptr, row, row_stride, N, block, BLOCK)
        is_counted = position < N
        if PASS > 0:
            is_counted = is_counted & ((bits >> (32 - 8 * PASS)) == prefix)
        digits = ((bits >> (24 - 8 * PASS)) & 255).to(tl.int32)
        histogram += tl.histogram(digits, 256, mask=is_counted)
    at = (row.to(tl.int64) * num_splits + split) * 256 + tl.arange(0, 256)
    tl.store(after_ptr + at, histogram)


@triton.jit(
    do_not_specialize=[
        *("length", "num_places"),
        *("positions_stride", "bits_stride", "reference_stride"),
    ]
)
def _choose(
    scores_ptr,
    counts_ptr,
    lens_ptr,
    histograms_ptr,
    above_ptr,
    found_ptr,
    positions_ptr,
    bits_ptr,
    reference_ptr,
    common_ptr,
    length,
    row_stride,
    num_places,
    positions_stride,
    bits_stride,
    reference_stride,
    REPEAT: tl.constexpr,
    HAS_LENS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_POSITIONS: tl.constexpr,
    HAS_BITS: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
):
    row = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    N, _ = _limits(row, counts_ptr, lens_ptr, length, REPEAT, HAS_LENS)
    at_found = found_ptr + (row * 4 + 3) * 2
    prefix = tl.load(at_found).to(tl.uint32, bitcast=True)
    needed = tl.load(at_found + 1)
    digit, above, counts = _digit(histograms_ptr, row, needed, num_splits, SPLITS)
    threshold = (prefix << 8) | digit.to(tl.uint32)
    needed -= above
    splits = tl.arange(0, SPLITS)
    digits = tl.arange(0, 256)[None, :]
    higher = tl.load(above_ptr + row * num_splits + splits, mask=splits < num_splits, other=0)
    higher += tl.sum(tl.where(digits > digit, counts, 0), axis=1)  # [SPLITS]
    equal = tl.sum(tl.where(digits == digit, counts, 0), axis=1)
    is_before = splits[None, :] < splits[:, None]
    equal_before = tl.sum(tl.where(is_before, equal[None, :], 0), axis=1)
    taken = higher + tl.minimum(tl.maximum(needed - equal_before, 0), equal)
    num_equal = tl.sum(tl.where(splits < split, equal, 0), axis=0)
    num_taken = tl.sum(tl.where(splits < split, taken, 0), axis=0)

    common = tl.zeros((), tl.int32)
    first, last = share_of(tl.cdiv(N, BLOCK))
    for block in range(first, last):
        position, bits = _block(scores_ptr, row, row_stride, N, block, BLOCK)
        is_equal = ((bits == threshold) & (position < N)).to(tl.int32)
        rank = num_equal + tl.cumsum(is_equal, axis=0) - is_equal
        is_higher = ((bits > threshold) & (position < N)).to(tl.int32)
        is_taken = is_higher | (is_equal & (rank < needed).to(tl.int32))
        if HAS_POSITIONS:
            place = num_taken + tl.cumsum(is_taken, axis=0) - is_taken
            tl.store(
                positions_ptr + row.to(tl.int64) * positions_stride + place,
                position,
                # Counts are not checked: more than there are places would lie in the next row.
                mask=(is_taken != 0) & (place < num_places),
            )
        if HAS_BITS:
            word = tl.sum(
                tl.reshape(is_taken, [BLOCK // 32, 32]) << tl.arange(0, 32)[None, :], axis=1
            )
            index = block * (BLOCK // 32) + tl.arange(0, BLOCK // 32)
            tl.store(bits_ptr + row.to(tl.int64) * bits_stride + index, word, mask=index * 32 < N)
        if HAS_REFERENCE:
            words = tl.load(
                reference_ptr + (row // REPEAT).to(tl.int64) * reference_stride + position // 32,
                mask=is_taken != 0,
                other=0,
            )
            common += tl.sum((words >> (position % 32)) & 1, axis=0)
        num_equal += tl.sum(is_equal, axis=0)
        num_taken += tl.sum(is_taken, axis=0)
    if HAS_REFERENCE:
        tl.store(common_ptr + row * num_splits + split, common)


@dataclass(frozen=True, eq=False)
class Selection:
    """What to select from, and where to put it.

    Attributes:
        scores: fp32 [rows, N], dense rows, no NaN.
        counts: How many of each row, or of each ``repeat`` rows, int32 [rows / repeat].
        lengths: Scores of each (repeat) row, int32 [rows / repeat]; ``None``: N.
        repeat: Rows that share a count, a length and a reference.
        positions: Out: the chosen positions, ascending, int32 [rows, at least the largest count];
            further places stay as they are, and what finds no place is dropped.
        bits: Out: the chosen positions as bit sets, int32 [rows, num_words]; words beyond the
            length stay as they are.
        reference: Bit sets to compare with, int32 [rows / repeat, num_words].
    """

    scores: Tensor
    counts: Tensor
    lengths: Tensor | None = None
    repeat: int = 1
    positions: Tensor | None = None
    bits: Tensor | None = None
    reference: Tensor | None = None


def select(selection: Selection) -> Tensor | None:
    """Choose the highest scores of each row; of equal ones the lower position.

    Scratch, int32: two histograms [rows, splits, 256], counts [rows, splits], what was found
    [rows, 4, 2].

    Returns:
        With a reference how many of the chosen it holds, int32 [rows]; else ``None``.
    """
    scores = selection.scores
    num_rows, length = scores.shape
    device = scores.device
    num_splits = max(1, min(MAX_SPLITS, triton.cdiv(length, SPLIT_SCORES)))
    common = torch.empty(num_rows, num_splits, dtype=torch.int32, device=device)
    if num_rows == 0 or length == 0:
        return None if selection.reference is None else common.zero_().sum(1, dtype=torch.int32)
    histograms = torch.empty(2, num_rows, num_splits, 256, dtype=torch.int32, device=device)
    above = torch.empty(num_rows, num_splits, dtype=torch.int32, device=device)
    found = torch.empty(num_rows, 4, 2, dtype=torch.int32, device=device)
    options = {
        "REPEAT": selection.repeat,
        "HAS_LENS": selection.lengths is not None,
        "SPLITS": MAX_SPLITS,
        "BLOCK": BLOCK,
    }
    lengths = selection.counts if selection.lengths is None else selection.lengths
    grid = (num_rows, num_splits)
    for index in range(_NUM_PASSES):
        before, after = histograms[(index + 1) % 2], histograms[index % 2]
        _count[grid](
            scores,
            selection.counts,
            lengths,
            before,
            after,
            above,
            found,
            length,
            scores.stride(0),
            PASS=index,
            **options,
        )
    positions, bits, reference = selection.positions, selection.bits, selection.reference
    _choose[grid](
        scores,
        selection.counts,
        lengths,
        histograms[(_NUM_PASSES - 1) % 2],
        above,
        found,
        common if positions is None else positions,
        common if bits is None else bits,
        common if reference is None else reference,
        common,
        length,
        scores.stride(0),
        0 if positions is None else positions.shape[1],
        0 if positions is None else positions.stride(0),
        0 if bits is None else bits.stride(0),
        0 if reference is None else reference.stride(0),
        HAS_POSITIONS=positions is not None,
        HAS_BITS=bits is not None,
        HAS_REFERENCE=reference is not None,
        **options,
    )
    return None if reference is None else common.sum(1, dtype=torch.int32)
