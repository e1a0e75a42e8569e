"""Watch pool: what it holds, and what it costs."""

from __future__ import annotations

import pytest
import torch

from hetero_kernels import QuantizedKeys
from hetero_sglang.cache.watch import WatchPool, watched_key_bytes


@pytest.mark.parametrize(
    ("watch_dtype", "item_bytes", "expected"),
    [("model", 4, 256), ("model", 2, 128), ("int8", 2, 66), ("int4", 2, 36)],
)
def test_the_pool_takes_the_bytes_that_are_charged_for_it(
    watch_dtype: str, item_bytes: int, expected: int
) -> None:
    assert watched_key_bytes(watch_dtype, 64, item_bytes) == expected
    dtype = {4: torch.float32, 2: torch.bfloat16}[item_bytes]
    pool = WatchPool(
        num_pivots=3,
        num_slots=50,
        head_dim=64,
        watch_dtype=watch_dtype,
        dtype=dtype,
        device="cpu",
    )
    assert pool.token_bytes == 3 * expected
    tensors = [pool.keys.data, pool.keys.scales] if watch_dtype != "model" else [pool.keys]
    assert sum(t.numel() * t.element_size() for t in tensors) == 50 * pool.token_bytes


@pytest.mark.parametrize("watch_dtype", ["model", "int8", "int4"])
def test_keys_lie_at_their_token_ids_and_nowhere_else(watch_dtype: str) -> None:
    pool = WatchPool(
        num_pivots=3,
        num_slots=20,
        head_dim=32,
        watch_dtype=watch_dtype,
        dtype=torch.float32,
        device="cpu",
    )
    keys = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([7, 2, 19, 11])
    pool.write(slice(1, 3), ids, keys)

    def read(plane: int, slots: torch.Tensor) -> torch.Tensor:
        if isinstance(pool.keys, QuantizedKeys):
            return pool.keys.dequantize(plane, slots)
        return pool.keys[plane, slots]

    tolerance = {"model": 0.0, "int8": 0.02, "int4": 0.3}[watch_dtype]
    for plane in (1, 2):
        assert (read(plane, ids) - keys[plane - 1]).abs().max() <= tolerance
    others = torch.tensor([slot for slot in range(20) if slot not in ids.tolist()])
    # Memory is zeroed: an unwritten key is worth zero in every format (int4 scales are zero).
    for plane, slots in ((0, torch.arange(20)), (1, others), (2, others)):
        assert torch.all(read(plane, slots) == 0)


def test_a_head_dimension_that_int4_cannot_pack_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32, got 80"):
        watched_key_bytes("int4", 80, 2)
