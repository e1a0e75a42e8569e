"""The new token's rows of one layer at SmolLM2's shape, with the queries of one pivot.

``make bench OP=ops/append_rows``
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from benchmarks.ops._harness import DTYPES, Row, main, timed_us
from hetero_kernels import DecodeBatch, DecodeLayer
from hetero_kernels.testing import make_decode_case

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

POOLS = ("k_resident", "v_resident", "k_blocks", "v_blocks", "block_positions", "pivot_queries")


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row per batch and dtype."""
    for name in options.dtypes:
        for batch_size in (1, 5, 64):
            case = make_decode_case(
                prompt_lens=[100] * batch_size,
                kept_lens=[[50, 50]] * batch_size,
                generated=[8] * batch_size,
                head_map=[-1, 0, -2],
                group_size=3,
                head_dim=64,
                dtype=DTYPES[name],
                pivot_map=[-1, 0, -1],
            )
            batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
            layers = {}
            for impl in ("native", "torch", "reference"):
                pools = {pool: getattr(case.layer, pool).clone() for pool in POOLS}
                layers[impl] = DecodeLayer(dataclasses.replace(case.layer, **pools), impl=impl)
                layers[impl].append(case.k, case.v, case.q, batch)
            for pool in POOLS:
                native, reference = (
                    getattr(layers[impl].tensors, pool).view(torch.uint8)
                    for impl in ("native", "reference")
                )
                assert torch.equal(native, reference), pool

            def call(impl: str, layers=layers, case=case, batch=batch) -> None:
                layers[impl].append(case.k, case.v, case.q, batch)

            yield Row(
                case=f"batch {batch_size}",
                dtype=name,
                native_us=timed_us(lambda: call("native")),
                torch_us=timed_us(lambda: call("torch")),
            )


if __name__ == "__main__":
    main("append_rows", rows)
