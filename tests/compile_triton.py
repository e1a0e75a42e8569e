"""Compiles the Triton kernels for an H100 on a machine without one, at Llama-3.1-8B's shape.

A script for a process of its own, without TRITON_INTERPRET: the target is forced and nothing is
launched. Prints a line of JSON for each kernel: what it takes of registers and shared memory, and
whether loads run ahead. It shows that kernels compile and fit, not that they are right.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hetero_kernels import (
    DecodeBatch,
    DecodeLayer,
    QuantizedKeys,
    extend_attention,
    gather_rows,
    install_rows,
    plan_delta,
    quantize_keys,
    top_bits,
    top_positions,
    topk_overlap,
    triton_support,
    window_scores,
)
from hetero_kernels.testing import make_decode_case

DTYPE = torch.bfloat16
G, D = 4, 128
# What is compiled now: at the model's shape; what shall only compile; or, with the name of a group
# of calls, those calls at one of several lengths.
phase = "model"


class Hopper:
    """A driver that knows its target and can do nothing."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: int) -> int:
        return 0


def describe(kernel: Any) -> dict[str, Any]:
    """What a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    ptx = kernel.asm["ptx"]
    return {
        "name": kernel.metadata.name,
        "phase": phase,
        "hash": kernel.hash,
        "registers": int(found[1]),
        "spilled_bytes": int(found[2]),
        "shared_bytes": kernel.metadata.shared,
        "num_async_copies": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "num_tensor_products": len(re.findall(r"wgmma\.mma|mma\.sync", ptx)),
    }


def compile_instead_of_launching() -> None:
    """Make every launch a compilation for the forced target."""
    driver.set_active(Hopper())
    launch = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        sys.stdout.write(json.dumps(describe(kernel)) + "\n")
        return kernel

    JITFunction.run = run
    triton_support.require = lambda device: None
    triton_support.num_programs = lambda device: 264


def decode() -> None:
    for group_size in (G, 8):
        case = make_decode_case(
            prompt_lens=[100] * 4,
            kept_lens=[[50, 0]] * 4,
            generated=[1] * 4,
            head_map=[-2, 0, -1],
            group_size=group_size,
            head_dim=D,
            dtype=DTYPE,
            pivot_map=[-1, 0, -1],
        )
        layer = DecodeLayer(case.layer, impl="triton")
        batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
        layer.append(case.k, case.v, case.q, batch)
        layer.attend(case.q, case.q.clone(), batch)


def move() -> None:
    pool = torch.zeros(10, 16, D, dtype=DTYPE)
    index = torch.arange(20)
    install_rows(
        torch.zeros(20, 2 * D, dtype=DTYPE),
        index,
        k_blocks=pool,
        v_blocks=pool.clone(),
        block_positions=torch.zeros(10, 16, dtype=torch.int32),
        positions=index.int(),
        impl="triton",
    )
    gather_rows(pool.view(-1, D), index, impl="triton")


def score_and_select() -> None:
    int8 = QuantizedKeys(
        torch.zeros(2, 9000, D, dtype=torch.int8), torch.zeros(2, 9000, 1, dtype=torch.bfloat16)
    )
    int4 = QuantizedKeys(
        torch.zeros(2, 9000, D // 2, dtype=torch.uint8),
        torch.zeros(2, 9000, D // 32, dtype=torch.bfloat16),
    )
    for pool in (int8, int4):
        chunk = torch.zeros(2, 512, D, dtype=DTYPE)
        quantize_keys(chunk, pool, slice(0, 2), torch.arange(512), impl="triton")
    exact = torch.zeros(2, 9000, D, dtype=DTYPE)
    for keys, group_size in ((exact, G), (int8, G), (int4, G), (exact, 8)):
        topk_overlap(
            torch.zeros(1, 5, group_size, D, dtype=DTYPE),
            keys=keys,
            planes=torch.zeros(1, dtype=torch.int32),
            req_to_token=torch.zeros(4, 9000, dtype=torch.int32),
            rows=torch.zeros(1, dtype=torch.int64),
            prompt_lens=torch.tensor([9000], dtype=torch.int32),
            top_k=torch.tensor([4500], dtype=torch.int32),
            reference=torch.zeros(1, 300, dtype=torch.int32),
            scale=0.1,
            impl="triton",
        )
    queries = torch.zeros(2, 32, G, D, dtype=DTYPE)
    window_scores(queries, torch.zeros(2, 9000, D, dtype=DTYPE), 0.1, impl="triton")
    top_positions(torch.zeros(3, 9000), 4000, impl="triton")
    top_bits(torch.zeros(3, 9000), 4000, 300, impl="triton")
    positions = torch.arange(4000).int().repeat(3, 1)
    plan_delta(positions, positions, 9000, room=50, impl="triton")


def extend() -> None:
    q, k = torch.zeros(512, G, D, dtype=DTYPE), torch.zeros(1, 9000, D, dtype=DTYPE)
    extend_attention(q, k[:, :576], k[:, :576], prefix_len=64, scale=0.1, impl="triton")
    slots = torch.arange(576).int()
    extend_attention(q, k, k, prefix_len=64, scale=0.1, slots=slots, impl="triton")


def edges() -> None:
    """What makes other kernels: sizes of 1 become constants, strides from 2^31 on are 64 bits."""
    case = make_decode_case(
        prompt_lens=[2],
        kept_lens=[[1]],
        generated=[1],
        head_map=[-1],
        group_size=1,
        head_dim=16,
        dtype=DTYPE,
        block_tokens=1,
    )
    one = torch.zeros(1, dtype=torch.int32)
    # Two planes of a pool; the memory between them is never touched.
    wide = torch.empty(2**31 + 160, dtype=DTYPE).as_strided((2, 10, 16), (2**31, 16, 1))
    tensors = dataclasses.replace(
        case.layer, k_resident=wide, v_resident=wide, head_map=torch.zeros_like(one)
    )
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    for layer in (DecodeLayer(case.layer, "triton"), DecodeLayer(tensors, "triton")):
        layer.append(case.k, case.v, None, batch)
        layer.attend(case.q, case.q.clone(), batch)
    q = case.q[:, :, None]  # [1, 1, 1, D]
    for keys in (wide[:, :1], wide.clone()[:, :1]):
        topk_overlap(
            q,
            keys=keys,
            planes=one,
            req_to_token=one[None],
            rows=one.long(),
            prompt_lens=one,
            top_k=one,
            reference=one[None],
            scale=0.1,
            width=1,
            impl="triton",
        )
        window_scores(q.expand(2, 1, 1, 16), keys, 0.1, impl="triton")
        extend_attention(q[0], keys[:1], keys[1:], prefix_len=0, scale=0.1, impl="triton")
    plan_delta(one[None], one[None], 1, limits=one, room=1, impl="triton")
    gather_rows(one[None], one.long(), impl="triton")
    top_positions(torch.zeros(1, 1), 1, impl="triton")


def lengths() -> None:
    """Calls as they follow each other in a server: numbers divisible by 16, odd ones and 1."""
    global phase
    keys = torch.zeros(1, 400, D, dtype=DTYPE)
    pool = QuantizedKeys(
        torch.zeros(1, 400, D, dtype=torch.int8), torch.zeros(1, 400, 1, dtype=torch.bfloat16)
    )
    blocks = torch.zeros(20, 16, D, dtype=DTYPE)
    for num_new, prefix_len in ((128, 64), (127, 63), (129, 1), (256, 0)):
        phase = f"chunks/{num_new} after {prefix_len}"
        total = num_new + prefix_len
        q, slots = torch.zeros(num_new, G, D, dtype=DTYPE), torch.arange(total)
        options = {"prefix_len": prefix_len, "scale": 0.1, "slots": slots.int()}
        extend_attention(q, keys, keys, **options, impl="triton")
        quantize_keys(keys[:, :total], pool, slice(0, 1), slots, impl="triton")
    for count in (1, 16, 17):
        phase = f"rows/{count}"
        index, rows = torch.arange(count), torch.zeros(count, 2 * D, dtype=DTYPE)
        gather_rows(blocks.view(-1, D), index, impl="triton")
        install_rows(rows, index, k_blocks=blocks, v_blocks=blocks.clone(), impl="triton")
    slots_of = torch.zeros(4, 131_072, dtype=torch.int32)
    # Rows of scores that begin at multiples of 16 are loaded as vectors; these here do not.
    for length, count in ((9_001, 4_500), (131, 1), (120_007, 48_003), (45, 16)):
        phase = f"prompts/{length}"
        queries = torch.zeros(2, 32, G, D, dtype=DTYPE)
        long = torch.zeros(2, length, D, dtype=DTYPE)
        scores = window_scores(queries, long, 0.1, impl="triton")
        top_positions(scores, count, impl="triton")
        top_bits(scores, count, length // 32 + 1, impl="triton")
        kept = torch.arange(count).int().repeat(2, 1)
        plan_delta(kept, kept[:, : count // 2 + 1], length, room=count, impl="triton")
        topk_overlap(
            torch.zeros(2, 5, G, D, dtype=DTYPE),
            keys=long,
            planes=torch.arange(2, dtype=torch.int32),
            req_to_token=slots_of,
            rows=torch.zeros(2, dtype=torch.int64),
            prompt_lens=torch.full((2,), length, dtype=torch.int32),
            top_k=torch.full((2,), count, dtype=torch.int32),
            reference=torch.zeros(2, length // 32 + 1, dtype=torch.int32),
            scale=0.1,
            impl="triton",
        )
    for num_reqs in (9, 15, 16):
        phase = f"batches/{num_reqs}"
        case = make_decode_case(
            prompt_lens=[2] * num_reqs,
            kept_lens=[[1]] * num_reqs,
            generated=[1] * num_reqs,
            head_map=[-1],
            group_size=G,
            head_dim=D,
            dtype=DTYPE,
        )
        batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
        DecodeLayer(case.layer, "triton").attend(case.q, case.q.clone(), batch)


if __name__ == "__main__":
    assert triton.__version__
    compile_instead_of_launching()
    decode()
    move()
    score_and_select()
    extend()
    phase = "edges"
    edges()
    lengths()
