"""Selection of a layer at the end of a prompt: pooled scores, then the best positions.

``make bench OP=ops/selection``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.ops._harness import DTYPES, Row, check, main, timed_us
from hetero_kernels import score_positions, top_positions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

NUM_HEADS, GROUP_SIZE, HEAD_DIM = 3, 3, 64


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Scores by dtype, then the choice, for two prompt lengths."""
    for length in (1024, 7500):
        for name in options.dtypes:
            dtype = DTYPES[name]
            q = torch.randn(NUM_HEADS, GROUP_SIZE, HEAD_DIM).to(dtype)
            k = torch.randn(NUM_HEADS, length, HEAD_DIM).to(dtype)
            scale = HEAD_DIM**-0.5
            expected = score_positions(q[:1], k[:1], scale, impl="reference")
            check(score_positions(q[:1], k[:1], scale, impl="native"), expected, 1e-4)
            yield Row(
                case=f"score_positions, {length} tokens",
                dtype=name,
                native_us=timed_us(lambda q=q, k=k: score_positions(q, k, 0.125, impl="native")),
                torch_us=timed_us(lambda q=q, k=k: score_positions(q, k, 0.125, impl="torch")),
                num_bytes=k.numel() * dtype.itemsize,
            )
        scores = score_positions(q, k, scale)
        for order in ("ascending", "best"):
            count = length // 2

            def call(impl: str, scores=scores, count=count, order=order) -> torch.Tensor:
                return top_positions(scores, count, order=order, impl=impl)

            assert torch.equal(call("native"), call("reference"))
            yield Row(
                case=f"top_positions, {count} of {length}, {order}",
                dtype="float32",
                native_us=timed_us(lambda call=call: call("native")),
                torch_us=timed_us(lambda call=call: call("torch")),
            )


if __name__ == "__main__":
    main("selection", rows)
