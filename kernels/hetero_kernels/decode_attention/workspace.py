"""Scratch memory of the Triton ``decode_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hetero_kernels import triton_support

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class DecodeWorkspace:
    """What the launches of one ``decode_attention`` leave for each other.

    Its contents mean nothing between calls, so all layers of a model can share one as long as they
    run one after the other on one stream. An *item* is a KV head of a request.

    Attributes:
        num_programs: Programs that share the tiles of all items.
        lengths: Rows of each item, int32 [max_items].
        starts: Tiles of the items before each item, the sum of all last, int32 [max_items + 1].
        sums: Maximum and sum of each partial result, fp32 [num_programs + max_items, 2, G].
        accumulators: Weighted sums of values, fp32 [num_programs + max_items, G, D].
    """

    num_programs: int
    lengths: Tensor
    starts: Tensor
    sums: Tensor
    accumulators: Tensor

    @classmethod
    def allocate(
        cls,
        max_batch: int,
        num_kv_heads: int,
        group_size: int,
        head_dim: int,
        device: torch.device,
        num_programs: int | None = None,
    ) -> DecodeWorkspace:
        """Make one for batches of up to ``max_batch`` requests.

        Args:
            max_batch: Requests.
            num_kv_heads: KV heads of a layer.
            group_size: Query heads of a KV head.
            head_dim: Elements of a row.
            device: Of the pools.
            num_programs: Programs to share the work; ``None``: as many as run at a time.

        Returns:
            The workspace, 4 * (num_programs + max_items) * G * (D + 2) bytes and a little.
        """
        programs = num_programs or triton_support.num_programs(device)
        items = max_batch * num_kv_heads
        return cls(
            num_programs=programs,
            lengths=torch.empty(items, dtype=torch.int32, device=device),
            starts=torch.empty(items + 1, dtype=torch.int32, device=device),
            sums=torch.empty((programs + items, 2, group_size), dtype=torch.float32, device=device),
            accumulators=torch.empty(
                (programs + items, group_size, head_dim), dtype=torch.float32, device=device
            ),
        )

    def check(self, num_items: int, group_size: int, head_dim: int) -> None:
        """Require that a call's partial results fit.

        Raises:
            ValueError: They do not.
        """
        wanted = (group_size, head_dim)
        if tuple(self.accumulators.shape[1:]) != wanted or self.lengths.shape[0] < num_items:
            raise ValueError(
                f"the workspace must be for {num_items} (requests x KV heads) or more and groups "
                f"of {list(wanted)}, got {self.lengths.shape[0]} and "
                f"{list(self.accumulators.shape[1:])}"
            )
