"""Decode step of all layers at SmolLM2's shape: 3 KV heads of 64, one resident, two compressed.

``make bench OP=ops/decode_attention``

SGLang's own decode on CPU stands beside it, over the whole context: what the policy saves and what
the kernel saves, together. "Of memory" is of the machine's own read bandwidth, over the rows kept.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

from benchmarks.ops._harness import DTYPES, Row, check, main, timed_us
from hetero_kernels import DecodeBatch, DecodeLayer
from hetero_kernels.testing import TOLERANCE, make_decode_case

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from hetero_kernels.dispatch import Impl

# Together far above the last cache: in a model the weights pass through it between two layers.
POOL_BYTES = 256 * 2**20
MAX_LAYERS = 256
# The last two keep 8,192 and 32,768 rows in each compressed head.
CONTEXTS = (128, 1024, 4096, 8192, 16384, 65536)
SHARE_KEPT = 0.5
NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 3, 3, 64
SCALE = HEAD_DIM**-0.5


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row per context, batch and dtype; times are per layer."""
    for name in options.dtypes:
        dtype = DTYPES[name]
        for batch_size, context in [(1, n) for n in CONTEXTS] + [(5, 1024), (5, 8192)]:
            yield measure(dtype, name, batch_size, context, scattered=False)
        yield measure(dtype, name, 1, 8192, scattered=True)


def measure(dtype: torch.dtype, name: str, batch_size: int, context: int, scattered: bool) -> Row:
    """Check one layer against the reference, then time them, a call for each in turn."""
    kept = int(context * SHARE_KEPT)
    tokens = batch_size * (context + 8 + 2 * (kept + 8))
    layer_bytes = tokens * 2 * HEAD_DIM * dtype.itemsize
    cases = [
        make_decode_case(
            prompt_lens=[context] * batch_size,
            kept_lens=[[kept, kept]] * batch_size,
            generated=[8] * batch_size,
            head_map=[-1, 0, -2],
            group_size=GROUP_SIZE,
            head_dim=HEAD_DIM,
            dtype=dtype,
            scattered=scattered,
            seed=seed,
        )
        for seed in range(max(6, min(MAX_LAYERS, POOL_BYTES // layer_bytes)))
    ]
    batches = [DecodeBatch(case.rows, case.seq_lens, case.token_ids) for case in cases]
    out = torch.empty_like(cases[0].q)

    def layers(impl: Impl) -> list[DecodeLayer]:
        return [DecodeLayer(case.layer, impl=impl) for case in cases]

    native = layers("native")
    for layer, case, batch in zip(native, cases, batches, strict=True):
        layer.append(case.k, case.v, None, batch)
    expected = DecodeLayer(cases[0].layer, impl="reference").attend(
        cases[0].q, torch.empty_like(out), batches[0]
    )
    check(native[0].attend(cases[0].q, out, batches[0]), expected, 2 * TOLERANCE[dtype])

    def next_layer(impl: Impl) -> Callable[[], object]:
        calls = itertools.cycle(zip(layers(impl), cases, batches, strict=True))

        def call() -> None:
            layer, case, batch = next(calls)
            layer.attend(case.q, out, batch)

        return call

    return Row(
        case=f"batch {batch_size}, {context} tokens{', scattered' if scattered else ''}",
        dtype=name,
        native_us=timed_us(next_layer("native"), 2.0),
        torch_us=timed_us(next_layer("torch")),
        num_bytes=layer_bytes,
        others_us={"stock": stock_us(dtype, batch_size, context + 8)},
    )


def stock_us(dtype: torch.dtype, batch_size: int, num_tokens: int) -> float:
    """One layer of SGLang's own decode on CPU, every head over every token."""
    num_slots = batch_size * num_tokens + 1
    layer_bytes = 2 * num_slots * NUM_KV_HEADS * HEAD_DIM * dtype.itemsize
    num_layers = max(3, min(MAX_LAYERS, POOL_BYTES // layer_bytes))
    shape = num_layers, num_slots, NUM_KV_HEADS, HEAD_DIM
    keys, values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    q = torch.randn(batch_size, NUM_KV_HEADS * GROUP_SIZE, HEAD_DIM).to(dtype)
    req_to_token = torch.arange(1, num_slots, dtype=torch.int32).view(batch_size, num_tokens)
    rows = torch.arange(batch_size)
    seq_lens = torch.full((batch_size,), num_tokens, dtype=torch.int64)
    # The method reads nothing of the backend, which cannot be made without a whole server.
    stock = TorchNativeAttnBackend.__new__(TorchNativeAttnBackend)
    decode = stock._run_sdpa_forward_decode  # noqa: SLF001
    out = torch.empty_like(q)

    def attend(layer: int) -> torch.Tensor:
        k, v = keys[layer], values[layer]
        decode(q, out, k, v, req_to_token, rows, seq_lens, scaling=SCALE, enable_gqa=True)
        return out

    k, v = (pool[0, req_to_token.long()].transpose(1, 2).float() for pool in (keys, values))
    grouped = q.float().view(batch_size, NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM)
    expected = torch.softmax(grouped @ k.transpose(2, 3) * SCALE, dim=-1) @ v
    check(attend(0).float(), expected.view(q.shape), 2 * TOLERANCE[dtype])
    layers = itertools.cycle(range(num_layers))
    return timed_us(lambda: attend(next(layers)))


if __name__ == "__main__":
    main("decode_attention", rows)
