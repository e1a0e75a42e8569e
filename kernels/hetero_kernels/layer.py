"""The memory of one model layer as the decode operations see it.

Owns the checked bundle of tensors behind ``append_rows`` and ``decode_attention`` and its C mirror.
Every KV head of the layer is in exactly one of two places, named by ``head_map``::

    head_map[h] >= 0   resident    row of token t: k_resident[head_map[h], req_to_token[row, t]]
    head_map[h] <  0   compressed  c = ~head_map[h]; row j (kept prompt tokens first, then generated
                                   ones): k_blocks[block_table[row, c, j // block_tokens],
                                                   j % block_tokens]

A compressed head of request ``row`` has ``kept_lens[row, c] + seq_len - prompt_lens[row]`` rows.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hetero_kernels.checks import (
    check_count,
    check_dense_rows,
    check_devices,
    check_dtype,
    check_float,
    check_head_dim,
    check_same,
    check_shape,
)
from hetero_kernels.native import DTYPE_CODES, BatchStruct, LayerStruct, pointer

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class LayerTensors:
    """Where the keys and values of one layer lie. No tensor is copied or owned.

    Attributes:
        k_resident: Keys of resident heads, [num_planes, num_slots, head_dim].
        v_resident: Values, same shape and strides.
        k_blocks: Keys of compressed heads, [num_blocks, block_tokens, head_dim].
        v_blocks: Values, same shape and strides.
        block_table: Blocks of each request row and compressed head in row order, int32
            [R, C, max_blocks].
        kept_lens: Prompt tokens that are kept, int32 [R, C].
        prompt_lens: Tokens of the prompt, int32 [R].
        head_map: Place of each KV head (module docstring), int32 [num_kv_heads].
        scale: Factor on the scores, 1 / sqrt(head_dim).
        group_size: Query heads of each KV head.
        req_to_token: Token slots of each request row by position, int32 [R, max_context]; only
            attention needs it.
        block_positions: Position of each row in the blocks, int32 [num_blocks, block_tokens]; only
            appending writes it.
        pivot_queries: Ring of the last S queries of each pivot, [R, P, S, group_size, head_dim];
            only appending writes it.
        pivot_map: Pivot index of each KV head or -1, int32 [num_kv_heads].

    Raises:
        ValueError: A shape, dtype, stride, device or the head map is not as described.
    """

    k_resident: Tensor
    v_resident: Tensor
    k_blocks: Tensor
    v_blocks: Tensor
    block_table: Tensor
    kept_lens: Tensor
    prompt_lens: Tensor
    head_map: Tensor
    scale: float
    group_size: int
    req_to_token: Tensor | None = None
    block_positions: Tensor | None = None
    pivot_queries: Tensor | None = None
    pivot_map: Tensor | None = None

    def __post_init__(self) -> None:
        check_float("k_blocks", self.k_blocks)
        check_shape("k_blocks", self.k_blocks, (None, None, None))
        head_dim = self.head_dim
        check_head_dim(head_dim)
        check_count("group_size", self.group_size)
        check_count("block_tokens (the second dimension of k_blocks)", self.block_tokens)
        check_devices(
            k_blocks=self.k_blocks,
            v_blocks=self.v_blocks,
            k_resident=self.k_resident,
            v_resident=self.v_resident,
            block_table=self.block_table,
            kept_lens=self.kept_lens,
            prompt_lens=self.prompt_lens,
            head_map=self.head_map,
            req_to_token=self.req_to_token,
            block_positions=self.block_positions,
            pivot_queries=self.pivot_queries,
            pivot_map=self.pivot_map,
        )
        check_shape("k_resident", self.k_resident, (None, None, head_dim))
        for keys, values, name in (
            (self.k_resident, self.v_resident, "resident"),
            (self.k_blocks, self.v_blocks, "blocks"),
        ):
            check_dtype(f"k_{name}", keys, self.dtype)
            check_dtype(f"v_{name}", values, self.dtype)
            check_shape(f"v_{name}", values, tuple(keys.shape))
            check_same(f"k_{name} and v_{name} must have the same strides", *_strides(keys, values))
            check_dense_rows(f"k_{name}", keys)
        check_shape("head_map", self.head_map, (None,))
        check_shape("block_table", self.block_table, (None, None, None))
        num_rows, num_compressed = self.block_table.shape[:2]
        check_shape("kept_lens", self.kept_lens, (num_rows, num_compressed))
        check_shape("prompt_lens", self.prompt_lens, (num_rows,))
        check_dense_rows("block_table", self.block_table)
        if self.req_to_token is not None:
            check_shape("req_to_token", self.req_to_token, (num_rows, None))
            check_dense_rows("req_to_token", self.req_to_token)
        if self.block_positions is not None:
            check_shape("block_positions", self.block_positions, tuple(self.k_blocks.shape[:2]))
            check_dense_rows("block_positions", self.block_positions)
        for name in ("block_table", "kept_lens", "prompt_lens", "head_map"):
            check_dtype(name, getattr(self, name), torch.int32)
        for name in ("req_to_token", "block_positions", "pivot_map"):
            if (table := getattr(self, name)) is not None:
                check_dtype(name, table, torch.int32)
        for name in ("prompt_lens", "head_map", "pivot_map"):
            if (table := getattr(self, name)) is not None:
                check_dense_rows(name, table)
        for h, place in enumerate(self.head_map.tolist()):
            limit = self.k_resident.shape[0] if place >= 0 else num_compressed
            if (place if place >= 0 else ~place) >= limit:
                kind = "planes" if place >= 0 else "compressed heads"
                raise ValueError(f"head_map[{h}] = {place} is outside the {limit} {kind}")
        if (self.pivot_map is None) != (self.pivot_queries is None):
            raise ValueError("pivot_map and pivot_queries go together, got one of them")
        if self.pivot_map is not None and self.pivot_queries is not None:
            check_shape("pivot_map", self.pivot_map, (self.num_kv_heads,))
            check_shape(
                "pivot_queries",
                self.pivot_queries,
                (num_rows, None, None, self.group_size, head_dim),
            )
            check_dtype("pivot_queries", self.pivot_queries, self.dtype)
            check_dense_rows("pivot_queries", self.pivot_queries, 3)
            if int(self.pivot_map.max()) >= self.pivot_queries.shape[1]:
                raise ValueError(
                    f"pivot_map must be below {self.pivot_queries.shape[1]} (pivots of "
                    f"pivot_queries), got {self.pivot_map.tolist()}"
                )

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of all keys, values and queries."""
        return self.k_blocks.dtype

    @property
    def device(self) -> torch.device:
        """Device of the pools."""
        return self.k_blocks.device

    @property
    def head_dim(self) -> int:
        """Elements of a key or value row."""
        return self.k_blocks.shape[2]

    @property
    def block_tokens(self) -> int:
        """Rows of a block."""
        return self.k_blocks.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """KV heads of the layer."""
        return self.head_map.shape[0]

    @property
    def num_q_heads(self) -> int:
        """Query heads of the layer."""
        return self.num_kv_heads * self.group_size

    def slots(self, head: int, row: int, length: int) -> Tensor:
        """Places of the first ``length`` rows of a head, int64 [length].

        Returns:
            Token slots for a resident head; ``block * block_tokens + offset`` for a compressed one.
        """
        place = int(self.head_map[head])
        if place >= 0:
            assert self.req_to_token is not None
            return self.req_to_token[row, :length].long()
        index = torch.arange(length, device=self.device)
        blocks = self.block_table[row, ~place, index // self.block_tokens].long()
        return blocks * self.block_tokens + index % self.block_tokens

    def length(self, head: int, row: int, seq_len: int) -> int:
        """Rows that a head of request ``row`` attends to at ``seq_len`` tokens."""
        place = int(self.head_map[head])
        if place >= 0:
            return seq_len
        return int(self.kept_lens[row, ~place]) + seq_len - int(self.prompt_lens[row])

    def to_struct(self) -> LayerStruct:
        """The C mirror. Valid as long as the tensors live and keep their storage."""
        table, kept, ring = self.block_table, self.kept_lens, self.pivot_queries
        return LayerStruct(
            dtype=DTYPE_CODES[self.dtype],
            head_dim=self.head_dim,
            num_kv_heads=self.num_kv_heads,
            group_size=self.group_size,
            block_tokens=self.block_tokens,
            num_steps=0 if ring is None else ring.shape[2],
            scale=self.scale,
            k_resident=pointer(self.k_resident),
            v_resident=pointer(self.v_resident),
            resident_plane_stride=self.k_resident.stride(0),
            resident_slot_stride=self.k_resident.stride(1),
            k_blocks=pointer(self.k_blocks),
            v_blocks=pointer(self.v_blocks),
            block_stride=self.k_blocks.stride(0),
            block_row_stride=self.k_blocks.stride(1),
            block_positions=pointer(self.block_positions),
            block_positions_stride=_stride(self.block_positions, 0),
            block_table=pointer(table),
            block_table_row_stride=table.stride(0),
            block_table_head_stride=table.stride(1),
            kept_lens=pointer(kept),
            kept_lens_row_stride=kept.stride(0),
            kept_lens_head_stride=kept.stride(1),
            prompt_lens=pointer(self.prompt_lens),
            req_to_token=pointer(self.req_to_token),
            req_to_token_stride=_stride(self.req_to_token, 0),
            head_map=pointer(self.head_map),
            pivot_map=pointer(self.pivot_map),
            pivot_queries=pointer(ring),
            pivot_row_stride=_stride(ring, 0),
            pivot_head_stride=_stride(ring, 1),
        )


class DecodeBatch:
    """The requests of one decode step; made once a step and used for every layer.

    The tensors are not copied: until the step's last layer has run, nobody may change them.

    Args:
        rows: Row of each request in the tables, int64 [B].
        seq_lens: Tokens of each request including the new one, int64 [B].
        token_ids: Token slot of the new token, int64 [B]; only appending needs it.

    Raises:
        ValueError: A dtype or shape is not as described, a tensor is not contiguous, or they lie on
            several devices.
    """

    __slots__ = ("_struct", "address", "is_cpu", "rows", "seq_lens", "size", "token_ids")

    def __init__(self, rows: Tensor, seq_lens: Tensor, token_ids: Tensor | None = None) -> None:
        self.size = rows.shape[0]
        self.is_cpu = rows.is_cpu
        check_devices(rows=rows, seq_lens=seq_lens, token_ids=token_ids)
        for name, tensor in (("rows", rows), ("seq_lens", seq_lens), ("token_ids", token_ids)):
            if tensor is not None:
                check_dtype(name, tensor, torch.int64)
                check_shape(name, tensor, (self.size,))
                check_dense_rows(name, tensor)
        self.rows = rows
        self.seq_lens = seq_lens
        self.token_ids = token_ids
        self._struct = BatchStruct(
            size=self.size,
            rows=pointer(rows),
            seq_lens=pointer(seq_lens),
            token_ids=pointer(token_ids),
            num_threads=torch.get_num_threads(),
        )
        #: Address of the C mirror, for the compiled kernels.
        self.address = ctypes.addressof(self._struct)


def _stride(tensor: Tensor | None, dim: int) -> int:
    return 0 if tensor is None else tensor.stride(dim)


def _strides(keys: Tensor, values: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Strides of a pair where they matter (an empty tensor's are arbitrary)."""
    if keys.numel() == 0:
        return (), ()
    return keys.stride(), values.stride()
