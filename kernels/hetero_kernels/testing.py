"""Tolerances, implementations and made-up memory for tests and benchmarks of the kernels."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from hetero_kernels import native
from hetero_kernels.layer import LayerTensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hetero_kernels.dispatch import Impl

# Largest error of results of order 1; movement of data is exact.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# By how much numbers above 1 may differ besides: by their last digit, which rounding decides.
LAST_DIGIT = {torch.float32: 0.0, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def implementations() -> list[str]:
    """What can be held against the reference here: ``torch`` and every loadable level."""
    names = ["torch"]
    for level in native.runnable_levels():
        try:
            native.open_library(level)
        except native.NativeError:
            continue
        names.append(level)
    return names


@contextmanager
def using(name: str) -> Iterator[Impl]:
    """Make one of ``implementations()`` the active one.

    Args:
        name: ``torch`` or an instruction level; or ``reference``.

    Yields:
        The ``impl`` argument that selects it.
    """
    if name == "torch":
        yield "torch"
        return
    if name == "reference":
        yield "reference"
        return
    found = native.open_library(name)
    with mock.patch.object(native, "_load", return_value=(found, f"native {name}")):
        yield "native"


def on_device(value: Any, device: torch.device | str) -> Any:
    """A copy of a tensor, or of a dataclass or dict of tensors, on another device."""
    if isinstance(value, torch.Tensor):
        return value.clone().to(device)
    if isinstance(value, dict):
        return {name: on_device(part, device) for name, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {
            f.name: on_device(getattr(value, f.name), device) for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **parts)
    return value


@dataclass(frozen=True, eq=False)
class DecodeCase:
    """A layer in the middle of decoding, and the next token of each of its requests.

    Everything that no request owns is NaN (integers: out of range), so that reading it shows.

    Attributes:
        layer: The pools and tables.
        rows: int64 [B].
        seq_lens: int64 [B], including the next token.
        token_ids: int64 [B], slot of the next token.
        q: [B, Hq, D].
        k: [B, H, D].
        v: [B, H, D].
    """

    layer: LayerTensors
    rows: torch.Tensor
    seq_lens: torch.Tensor
    token_ids: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def make_decode_case(
    *,
    prompt_lens: list[int],
    kept_lens: list[list[int]],
    generated: list[int],
    head_map: list[int],
    group_size: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    block_tokens: int = 16,
    pivot_map: list[int] | None = None,
    num_steps: int = 5,
    seed: int = 0,
    spare: int = 3,
    scattered: bool = True,
) -> DecodeCase:
    """Build a layer with random contents in scattered slots and permuted blocks.

    Args:
        prompt_lens: Prompt tokens of each request.
        kept_lens: Kept prompt tokens of each request and compressed head.
        generated: Tokens of each request after the prompt, including the next one; at least 1.
        head_map: As in ``LayerTensors``.
        group_size: Query heads of a KV head.
        head_dim: Elements of a row.
        dtype: Of all rows.
        block_tokens: Rows of a block.
        pivot_map: As in ``LayerTensors``; ``None`` without.
        num_steps: Length of the query rings.
        seed: Of the random numbers.
        spare: Unused request rows, slots and blocks.
        scattered: Slots and blocks in random order; else ascending, as a fresh server has them.

    Returns:
        The case, with the next token not yet appended.
    """
    generator = torch.Generator().manual_seed(seed)

    def order(count: int, limit: int) -> torch.Tensor:
        if scattered:
            return torch.randperm(limit, generator=generator)[:count]
        return torch.arange(count)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    num_reqs = len(prompt_lens)
    num_planes = sum(place >= 0 for place in head_map)
    num_compressed = len(head_map) - num_planes
    seq_lens = [n + g for n, g in zip(prompt_lens, generated, strict=True)]
    num_rows = num_reqs + spare
    rows = order(num_reqs, num_rows)

    num_slots = sum(seq_lens) + spare
    slots = order(sum(seq_lens), num_slots)
    req_to_token = torch.full(
        (num_rows, max(seq_lens, default=0) + spare), 2**30, dtype=torch.int32
    )
    k_resident = torch.full((num_planes, num_slots, head_dim), float("nan"), dtype=dtype)
    v_resident = k_resident.clone()
    token_ids = torch.empty(num_reqs, dtype=torch.int64)
    taken = 0
    for b, row in enumerate(rows.tolist()):
        mine = slots[taken : taken + seq_lens[b]]
        taken += seq_lens[b]
        req_to_token[row, : seq_lens[b]] = mine.to(torch.int32)
        token_ids[b] = mine[-1]
        k_resident[:, mine[:-1]] = normal(num_planes, seq_lens[b] - 1, head_dim)
        v_resident[:, mine[:-1]] = normal(num_planes, seq_lens[b] - 1, head_dim)

    lengths = [[kept + g for kept in kept_lens[b]] for b, g in enumerate(generated)]
    needed = [[-(-length // block_tokens) for length in row] for row in lengths]
    num_blocks = sum(map(sum, needed)) + spare
    blocks = order(sum(map(sum, needed)), num_blocks)
    max_blocks = max((count for row in needed for count in row), default=0) + 1
    block_table = torch.full((num_rows, num_compressed, max_blocks), 2**30, dtype=torch.int32)
    kept_table = torch.full((num_rows, num_compressed), 2**30, dtype=torch.int32)
    prompt_table = torch.full((num_rows,), 2**30, dtype=torch.int32)
    k_blocks = torch.full((num_blocks, block_tokens, head_dim), float("nan"), dtype=dtype)
    v_blocks = k_blocks.clone()
    taken = 0
    for b, row in enumerate(rows.tolist()):
        prompt_table[row] = prompt_lens[b]
        for c in range(num_compressed):
            kept_table[row, c] = kept_lens[b][c]
            mine = blocks[taken : taken + needed[b][c]]
            taken += needed[b][c]
            block_table[row, c, : needed[b][c]] = mine.to(torch.int32)
            index = torch.arange(lengths[b][c] - 1)
            places = mine[index // block_tokens], index % block_tokens
            k_blocks[places] = normal(lengths[b][c] - 1, head_dim)
            v_blocks[places] = normal(lengths[b][c] - 1, head_dim)

    pivots = torch.tensor(pivot_map, dtype=torch.int32) if pivot_map is not None else None
    num_pivots = max(pivot_map, default=-1) + 1 if pivot_map is not None else 0
    ring = torch.full((num_rows, num_pivots, num_steps, group_size, head_dim), float("nan"))
    num_heads = len(head_map)
    return DecodeCase(
        layer=LayerTensors(
            k_resident=k_resident,
            v_resident=v_resident,
            k_blocks=k_blocks,
            v_blocks=v_blocks,
            block_table=block_table,
            kept_lens=kept_table,
            prompt_lens=prompt_table,
            head_map=torch.tensor(head_map, dtype=torch.int32),
            scale=head_dim**-0.5,
            group_size=group_size,
            req_to_token=req_to_token,
            block_positions=torch.full((num_blocks, block_tokens), -7, dtype=torch.int32),
            pivot_queries=ring.to(dtype) if pivots is not None else None,
            pivot_map=pivots,
        ),
        rows=rows,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int64),
        token_ids=token_ids,
        q=normal(num_reqs, num_heads * group_size, head_dim),
        k=normal(num_reqs, num_heads, head_dim),
        v=normal(num_reqs, num_heads, head_dim),
    )
