"""Rows between pools and the landing area.

``make bench OP=ops/move_rows``
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from benchmarks.ops._harness import DTYPES, Row, main, timed_us
from hetero_kernels import gather_rows, install_rows

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

HEAD_DIM, BLOCK_TOKENS, NUM_BLOCKS = 64, 16, 20_000


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Gather and install for a small and a large fetch; bytes count reading and writing."""
    for name in options.dtypes:
        dtype = DTYPES[name]
        pools = [torch.zeros(NUM_BLOCKS, BLOCK_TOKENS, HEAD_DIM, dtype=dtype) for _ in range(2)]
        for count in (500, 50_000):
            source = torch.randn(count, 2 * HEAD_DIM).to(dtype)
            index = torch.randperm(NUM_BLOCKS * BLOCK_TOKENS)[:count]

            def install(impl: str, source=source, index=index, pools=pools) -> None:
                install_rows(source, index, k_blocks=pools[0], v_blocks=pools[1], impl=impl)

            def gather(impl: str, index=index, pools=pools) -> torch.Tensor:
                return gather_rows(pools[0].flatten(0, 1), index, impl=impl)

            install("native")
            assert torch.equal(gather("native"), source[:, :HEAD_DIM])
            assert torch.equal(gather("native"), gather("reference"))
            for case, call, row_bytes in (("install", install, 2), ("gather", gather, 1)):
                yield Row(
                    case=f"{case}, {count} rows",
                    dtype=name,
                    native_us=timed_us(lambda call=call: call("native")),
                    torch_us=timed_us(lambda call=call: call("torch")),
                    num_bytes=2 * row_bytes * count * HEAD_DIM * dtype.itemsize,
                )


if __name__ == "__main__":
    main("move_rows", rows)
