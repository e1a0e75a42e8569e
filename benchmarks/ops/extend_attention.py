"""Prefill attention of a chunk at SmolLM2's shape: 9 query and 3 KV heads of 64.

``make bench OP=ops/extend_attention``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.ops._harness import DTYPES, Row, check, main, timed_us
from hetero_kernels import extend_attention
from hetero_kernels.testing import TOLERANCE

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row per chunk and dtype."""
    for name in options.dtypes:
        dtype = DTYPES[name]
        for num_new, prefix_len in ((512, 0), (2048, 0), (2048, 5500), (512, 7000), (16, 7500)):
            total = prefix_len + num_new
            q = torch.randn(num_new, NUM_Q_HEADS, HEAD_DIM).to(dtype)
            k = torch.randn(NUM_KV_HEADS, total, HEAD_DIM).to(dtype)
            v = torch.randn(NUM_KV_HEADS, total, HEAD_DIM).to(dtype)

            def call(impl: str, q=q, k=k, v=v, prefix_len=prefix_len) -> torch.Tensor:
                return extend_attention(q, k, v, prefix_len=prefix_len, scale=0.125, impl=impl)

            # The reference is slow: the last queries, which see most keys, stand for all.
            last = extend_attention(
                q[-4:], k, v, prefix_len=total - 4, scale=0.125, impl="reference"
            )
            check(call("native")[-4:], last, 2 * TOLERANCE[dtype])
            check(call("native"), call("torch"), 2 * TOLERANCE[dtype])
            pairs = num_new * prefix_len + num_new * (num_new + 1) // 2
            yield Row(
                case=f"{num_new} new after {prefix_len}",
                dtype=name,
                native_us=timed_us(lambda call=call: call("native"), 2.0),
                torch_us=timed_us(lambda call=call: call("torch"), 2.0),
                num_flops=4 * pairs * NUM_Q_HEADS * HEAD_DIM,
            )


if __name__ == "__main__":
    main("extend_attention", rows)
