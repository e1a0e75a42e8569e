"""``plan_delta`` in Triton: marks, counts and two compactions, all by grids of shapes.

1. *mark* (item, block): a bit for each position that is wanted and for each that is kept.
2. *count* (item): how many are missing; an item's share of the room depends on those before it.
3. *plan* (item): compacts the missing positions, in the target's order, and the slots that leave.

Scratch: bit sets, int32 [2, M, ceil(num_tokens / 32)], and counts, int32 [M]. Lengths are not
specialised on, nor where the second set begins: a compilation for each would take a second.
Not yet run on a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from hetero_kernels.triton_support import power_of_2

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["plan_delta_triton"]

# Positions that a program looks at at a time: 16 for each of 128 threads.
BLOCK = 2048
_NO_LIMIT = 2**31 - 1


@triton.jit
def _positions(list_ptr, item, index, num_positions, num_tokens, row_stride):
    """Entries of an item's list; behind its end, as where it skips, -1."""
    at = list_ptr + item.to(tl.int64) * row_stride + index
    position = tl.load(at, mask=index < num_positions, other=-1)
    # Nothing has checked them: in a replayed graph one may lie behind the sets.
    return tl.where(position < num_tokens, position, -1)


@triton.jit
def _words(sets_ptr, item, num_tokens, positions):
    """Where the words of positions lie in an item's set."""
    num_words = tl.cdiv(num_tokens, 32)
    return sets_ptr + item.to(tl.int64) * num_words + positions // 32


@triton.jit
def _is_outside(sets_ptr, item, num_tokens, positions):
    """1 where a position is not in an item's set, 0 elsewhere and for skipped ones."""
    at = _words(sets_ptr, item, num_tokens, positions)
    words = tl.load(at, mask=positions >= 0, other=-1)
    return ((words >> (positions & 31)) & 1) ^ 1


@triton.jit
def _compact(
    list_ptr,
    sets_ptr,
    out_ptr,
    item,
    count,
    num_positions,
    num_tokens,
    row_stride,
    STORES_INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Store the first ``count`` of an item's list that its other set has not, or their indices."""
    rank = tl.zeros((), tl.int32)
    for first in range(0, num_positions, BLOCK):
        index = first + tl.arange(0, BLOCK)
        position = _positions(list_ptr, item, index, num_positions, num_tokens, row_stride)
        is_outside = _is_outside(sets_ptr, item, num_tokens, position)
        place = rank + tl.cumsum(is_outside, axis=0) - is_outside
        is_taken = (is_outside != 0) & (place < count)
        tl.store(out_ptr + place, index if STORES_INDEX else position, mask=is_taken)
        rank += tl.sum(is_outside, axis=0)


@triton.jit(
    do_not_specialize=["num_positions", "num_tokens", "row_stride"],
    do_not_specialize_on_alignment=["sets_ptr"],
)
def _mark(positions_ptr, sets_ptr, num_positions, num_tokens, row_stride, BLOCK: tl.constexpr):
    item = tl.program_id(0)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = _positions(positions_ptr, item, index, num_positions, num_tokens, row_stride)
    tl.atomic_or(
        _words(sets_ptr, item, num_tokens, position),
        1 << (position & 31),
        mask=position >= 0,
    )


@triton.jit(
    do_not_specialize=["num_targets", "num_tokens", "target_stride"],
    do_not_specialize_on_alignment=["kept_sets_ptr"],
)
def _count(
    target_ptr,
    kept_sets_ptr,
    limits_ptr,
    counts_ptr,
    num_targets,
    num_tokens,
    target_stride,
    HAS_LIMITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0)
    count = tl.zeros((), tl.int32)
    for first in range(0, num_targets, BLOCK):
        index = first + tl.arange(0, BLOCK)
        position = _positions(target_ptr, item, index, num_targets, num_tokens, target_stride)
        count += tl.sum(_is_outside(kept_sets_ptr, item, num_tokens, position), axis=0)
    if HAS_LIMITS:
        count = tl.minimum(count, tl.maximum(tl.load(limits_ptr + item), 0))
    tl.store(counts_ptr + item, count)


@triton.jit(
    do_not_specialize=[
        *("num_targets", "num_kept", "num_tokens", "room"),
        *("target_stride", "kept_stride"),
    ],
    do_not_specialize_on_alignment=["kept_sets_ptr"],
)
def _plan(
    target_ptr,
    kept_ptr,
    target_sets_ptr,
    kept_sets_ptr,
    wanted_ptr,
    positions_ptr,
    slots_ptr,
    counts_ptr,
    num_targets,
    num_kept,
    num_tokens,
    room,
    target_stride,
    kept_stride,
    ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    item = tl.program_id(0)
    before = tl.zeros((), tl.int64)
    for first in range(0, item, ITEMS):
        index = first + tl.arange(0, ITEMS)
        before += tl.sum(
            tl.load(wanted_ptr + index, mask=index < item, other=0).to(tl.int64), axis=0
        )
    free = tl.maximum(room - before, 0)
    count = tl.minimum(tl.load(wanted_ptr + item).to(tl.int64), free).to(tl.int32)
    tl.store(counts_ptr + item, count)
    at_out = item.to(tl.int64) * num_targets
    _compact(
        target_ptr,
        kept_sets_ptr,
        positions_ptr + at_out,
        item,
        count,
        num_targets,
        num_tokens,
        target_stride,
        False,
        BLOCK,
    )
    _compact(
        kept_ptr,
        target_sets_ptr,
        slots_ptr + at_out,
        item,
        count,
        num_kept,
        num_tokens,
        kept_stride,
        True,
        BLOCK,
    )


def plan_delta_triton(
    target: Tensor, kept: Tensor, num_tokens: int, limits: Tensor | None, room: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Bit sets and compaction; nothing waits for the device. See ``plan_delta_reference``."""
    num_items, num_targets = target.shape
    num_kept = kept.shape[1]
    device = target.device
    positions = torch.full((num_items, num_targets), -1, dtype=torch.int32, device=device)
    slots = torch.full_like(positions, -1)
    counts = torch.zeros(num_items, dtype=torch.int32, device=device)
    if positions.numel() == 0:
        return positions, slots, counts
    sets = torch.zeros(2, num_items, triton.cdiv(num_tokens, 32), dtype=torch.int32, device=device)
    wanted = torch.empty_like(counts)
    block = BLOCK
    for index, tensor in enumerate((target, kept)):
        if tensor.shape[1]:
            _mark[(num_items, triton.cdiv(tensor.shape[1], block))](
                tensor, sets[index], tensor.shape[1], num_tokens, tensor.stride(0), BLOCK=block
            )
    _count[(num_items,)](
        target,
        sets[1],
        wanted if limits is None else limits,
        wanted,
        num_targets,
        num_tokens,
        target.stride(0),
        HAS_LIMITS=limits is not None,
        BLOCK=block,
    )
    _plan[(num_items,)](
        target,
        kept,
        sets[0],
        sets[1],
        wanted,
        positions,
        slots,
        counts,
        num_targets,
        num_kept,
        num_tokens,
        _NO_LIMIT if room is None else room,
        target.stride(0),
        kept.stride(0),
        ITEMS=min(1024, power_of_2(num_items)),
        BLOCK=block,
    )
    return positions, slots, counts
