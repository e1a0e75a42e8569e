"""The drift check of a whole model: 25 pivots, 5 queries of 3 heads of 64 each.

``make bench OP=ops/topk_overlap``
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.ops._harness import DTYPES, Row, check, main, timed_us
from hetero_kernels import pack_positions, topk_overlap

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

NUM_PIVOTS, NUM_QUERIES, GROUP_SIZE, HEAD_DIM = 25, 5, 3, 64


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row per prompt length and dtype."""
    for name in options.dtypes:
        for length in (1024, 4096, 7500):
            case = make(DTYPES[name], length)
            small = {**case, "queries": case["queries"][:1], "reference": case["reference"][:1]}
            for key in ("planes", "rows", "prompt_lens", "top_k"):
                small[key] = case[key][:1]
            actual = topk_overlap(**small, impl="native")
            expected = topk_overlap(**small, impl="torch")
            check(actual[1], expected[1], 1e-4)
            # Nearly equal scores may swap.
            assert (actual[0] - expected[0]).abs().max() <= 2 / int(case["top_k"][0])
            queries = NUM_PIVOTS * NUM_QUERIES * GROUP_SIZE
            yield Row(
                case=f"{length} tokens",
                dtype=name,
                native_us=timed_us(lambda case=case: topk_overlap(**case, impl="native")),
                torch_us=timed_us(lambda case=case: topk_overlap(**case, impl="torch")),
                num_bytes=NUM_PIVOTS * length * HEAD_DIM * DTYPES[name].itemsize,
                num_flops=2 * queries * length * HEAD_DIM,
            )


def make(dtype: torch.dtype, length: int) -> dict[str, Any]:
    """Arguments for one request whose pivots each have a plane."""
    count = length // 3
    chosen = torch.stack([torch.randperm(length)[:count] for _ in range(NUM_PIVOTS)])
    return {
        "queries": torch.randn(NUM_PIVOTS, NUM_QUERIES, GROUP_SIZE, HEAD_DIM).to(dtype),
        "k_resident": torch.randn(NUM_PIVOTS, length + 8, HEAD_DIM).to(dtype),
        "planes": torch.arange(NUM_PIVOTS, dtype=torch.int32),
        "req_to_token": torch.arange(length, dtype=torch.int32)[None] + 8,
        "rows": torch.zeros(NUM_PIVOTS, dtype=torch.int64),
        "prompt_lens": torch.full((NUM_PIVOTS,), length, dtype=torch.int32),
        "top_k": torch.full((NUM_PIVOTS,), count, dtype=torch.int32),
        "reference": pack_positions(chosen.to(torch.int32), length // 32 + 1),
        "scale": HEAD_DIM**-0.5,
    }


if __name__ == "__main__":
    main("topk_overlap", rows)
