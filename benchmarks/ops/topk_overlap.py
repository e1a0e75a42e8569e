"""The drift check of a whole model: 25 pivots, 5 queries of 3 heads of 64 each.

``make bench OP=ops/topk_overlap``

Beside it stands one layer's decode attention over the same keys and their values, one query of each
head: what a check of them may cost at most.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.ops._harness import DTYPES, Row, check, main, timed_us
from hetero_kernels import (
    DecodeBatch,
    DecodeLayer,
    QuantizedKeys,
    pack_positions,
    quantize_keys,
    quantized_key_bytes,
    topk_overlap,
)
from hetero_kernels.quantize_keys import num_groups
from hetero_kernels.testing import TOLERANCE, make_decode_case

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

NUM_PIVOTS, NUM_QUERIES, GROUP_SIZE, HEAD_DIM = 25, 5, 3, 64


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row per prompt length, dtype and format of the keys."""
    for name in options.dtypes:
        for length, bits in itertools.product((1024, 4096, 7500, 32768), (0, 8, 4)):
            case = make(DTYPES[name], length, bits)
            key_bytes = (
                quantized_key_bytes(HEAD_DIM, bits) if bits else HEAD_DIM * DTYPES[name].itemsize
            )
            small = {**case, "queries": case["queries"][:1], "reference": case["reference"][:1]}
            for key in ("planes", "rows", "prompt_lens", "top_k"):
                small[key] = case[key][:1]
            actual = topk_overlap(**small, impl="native")
            expected = topk_overlap(**small, impl="torch")
            check(actual[1], expected[1], 1e-4)
            # Nearly equal scores may swap.
            assert (actual[0] - expected[0]).abs().max() <= 2 / int(case["top_k"][0])
            queries = NUM_PIVOTS * NUM_QUERIES * GROUP_SIZE
            others = {"attention": attention_us(DTYPES[name], length)} if not bits else {}
            yield Row(
                case=f"{length} tokens" + (f", int{bits} keys" if bits else ""),
                dtype=name,
                native_us=timed_us(lambda case=case: topk_overlap(**case, impl="native")),
                torch_us=timed_us(lambda case=case: topk_overlap(**case, impl="torch")),
                num_bytes=NUM_PIVOTS * length * key_bytes,
                num_flops=2 * queries * length * HEAD_DIM,
                others_us=others,
            )


def attention_us(dtype: torch.dtype, length: int) -> float:
    """Decode attention of one layer with as many KV heads as there are pivots."""
    cases = [
        make_decode_case(
            prompt_lens=[length - 1],
            kept_lens=[[]],
            generated=[1],
            head_map=list(range(NUM_PIVOTS)),
            group_size=GROUP_SIZE,
            head_dim=HEAD_DIM,
            dtype=dtype,
            scattered=False,
            seed=seed,
        )
        for seed in range(2)
    ]
    calls = []
    for case in cases:
        layer = DecodeLayer(case.layer, impl="native")
        batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
        layer.append(case.k, case.v, None, batch)
        calls.append((layer, case.q, torch.empty_like(case.q), batch))
    ours = calls[0][0].attend(*calls[0][1:])
    reference = DecodeLayer(cases[0].layer, impl="reference")
    expected = reference.attend(cases[0].q, torch.empty_like(cases[0].q), calls[0][3])
    check(ours, expected, 2 * TOLERANCE[dtype])
    alternately = itertools.cycle(calls)

    def attend() -> None:
        layer, q, out, batch = next(alternately)
        layer.attend(q, out, batch)

    return timed_us(attend)


def make(dtype: torch.dtype, length: int, bits: int) -> dict[str, Any]:
    """Arguments for one request whose pivots each have a plane; keys in ``bits`` bits, 0: dtype."""
    count = length // 3
    num_slots = length + 8
    keys: torch.Tensor | QuantizedKeys = torch.randn(NUM_PIVOTS, num_slots, HEAD_DIM).to(dtype)
    if bits:
        exact = keys
        keys = QuantizedKeys(
            torch.zeros(
                NUM_PIVOTS,
                num_slots,
                HEAD_DIM * bits // 8,
                dtype=torch.int8 if bits == 8 else torch.uint8,
            ),
            torch.zeros(NUM_PIVOTS, num_slots, num_groups(HEAD_DIM, bits), dtype=torch.bfloat16),
        )
        quantize_keys(exact, keys, slice(0, NUM_PIVOTS), torch.arange(num_slots))
    chosen = torch.stack([torch.randperm(length)[:count] for _ in range(NUM_PIVOTS)])
    return {
        "queries": torch.randn(NUM_PIVOTS, NUM_QUERIES, GROUP_SIZE, HEAD_DIM).to(dtype),
        "keys": keys,
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
