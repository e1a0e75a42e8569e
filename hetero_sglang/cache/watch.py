"""Watch pool: all keys of budgeted pivots, so that they see their attention move.

A pivot needs every prompt key to notice drift, but not the rows to attend with. So its keys
lie here a second time, small: in 8 or 4 bits, or in the KV dtype. Addressed by SGLang's token
id like the resident pool, so allocator, prefix tree and eviction stay SGLang's. Head-major,
so that a check streams one pivot's keys. Generated tokens are never written: drift is measured
over the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hetero_kernels import QuantizedKeys, quantize_keys, quantized_key_bytes
from hetero_kernels.quantize_keys import num_groups
from hetero_sglang.cache.memory import allocate_pool
from hetero_sglang.errors import ConfigError
from hetero_sglang.policy.roles import build_role_tables

if TYPE_CHECKING:
    from hetero_sglang.config import HeteroConfig, WatchDtype
    from hetero_sglang.policy.roles import RoleTables
    from hetero_sglang.profile import HeadProfile

_BITS = {"int8": 8, "int4": 4}


def watched_key_bytes(watch_dtype: WatchDtype, head_dim: int, item_bytes: int) -> int:
    """Bytes of one watched key, its scales included.

    Args:
        watch_dtype: What the keys are kept in.
        head_dim: Head dimension.
        item_bytes: Bytes of an element of the KV dtype.

    Raises:
        ValueError: The head dimension does not suit the format.
    """
    if watch_dtype == "model":
        return head_dim * item_bytes
    return quantized_key_bytes(head_dim, _BITS[watch_dtype])


def tables_for(
    config: HeteroConfig, profile: HeadProfile, item_bytes: int, *, head_dim: int = 0
) -> RoleTables:
    """Index tables of a profile under these settings.

    Args:
        config: Settings.
        profile: Profile of the model.
        item_bytes: Bytes of an element of the KV dtype.
        head_dim: Stands in where the profile does not know its model's.

    Raises:
        ConfigError: The head dimension does not suit the watched keys' format.
    """
    share = 0.0
    if config.has_watch_pool:
        head_dim = profile.model.head_dim or head_dim
        try:
            key_bytes = watched_key_bytes(config.watch_dtype, head_dim, item_bytes)
        except ValueError as error:
            raise ConfigError(
                f"--kv-policy-watch-dtype {config.watch_dtype}: {error}; use model or int8"
            ) from error
        share = key_bytes / (2 * head_dim * item_bytes)
    return build_role_tables(profile, pivot_rows=config.pivot_rows, watched_share=share)


class WatchPool:
    """Watched keys of all pivots.

    Attributes:
        keys: What the scoring kernels read, one plane a pivot id: a tensor
            [num_pivots, num_slots, head_dim], or quantised keys of that shape.
        token_bytes: Bytes of one token, all pivots.
    """

    def __init__(
        self,
        *,
        num_pivots: int,
        num_slots: int,
        head_dim: int,
        watch_dtype: WatchDtype,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        """Allocates the pool.

        Args:
            num_pivots: Pivots of the model.
            num_slots: Token ids, SGLang's padding slot included.
            head_dim: Head dimension.
            watch_dtype: What the keys are kept in.
            dtype: KV dtype.
            device: Where the pool lies.
        """
        self.token_bytes = num_pivots * watched_key_bytes(watch_dtype, head_dim, dtype.itemsize)
        self.keys: torch.Tensor | QuantizedKeys
        if watch_dtype == "model":
            self.keys = allocate_pool((num_pivots, num_slots, head_dim), dtype, device)
            return
        bits = _BITS[watch_dtype]
        self.keys = QuantizedKeys(
            data=allocate_pool(
                (num_pivots, num_slots, head_dim * bits // 8),
                torch.int8 if bits == 8 else torch.uint8,
                device,
            ),
            scales=allocate_pool(
                (num_pivots, num_slots, num_groups(head_dim, bits)), torch.bfloat16, device
            ),
        )

    def write(self, pivots: slice, token_ids: torch.Tensor, keys: torch.Tensor) -> None:
        """Stores the keys of new prompt tokens.

        Args:
            pivots: Pivot ids of one layer.
            token_ids: SGLang's token ids, int64 [n].
            keys: Keys of these pivots, [num_pivots_of_layer, n, head_dim].
        """
        if isinstance(self.keys, torch.Tensor):
            self.keys[pivots].index_copy_(1, token_ids, keys.to(self.keys.dtype))
        else:
            quantize_keys(keys, self.keys, pivots, token_ids)
