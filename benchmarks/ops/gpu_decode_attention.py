"""Decode attention on a GPU at Llama-3.1-8B's shape, against dense attention. Not yet run.

32 query and 8 KV heads of 128, bf16; roles and budgets of the published profile. Each method runs
as a CUDA graph over several layers, together far above the second-level cache, and methods take
turns. What a method reads is divided by its time and by the speed of a plain copy. Dense methods
hold every token of every head, ours the share `--ratio`: compare times for what a user gains, and
fractions for what a kernel leaves unused.

``make bench OP=ops/gpu_decode_attention DEVICE=cuda``
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import machine, results
from hetero_kernels import DecodeBatch, DecodeLayer, DecodeWorkspace, LayerTensors
from hetero_sglang.policy.budget import BudgetRule, allocate_budget
from hetero_sglang.profile.roles import HeadRole

if TYPE_CHECKING:
    from collections.abc import Callable

PROFILE = Path(__file__).parents[2] / "tests" / "data" / "llama-3.1-8b-roles.json"
NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM = 8, 4, 128
NUM_Q_HEADS = NUM_KV_HEADS * GROUP_SIZE
DTYPE = torch.bfloat16
ROW_BYTES = 2 * HEAD_DIM * DTYPE.itemsize  # of K and V
TOLERANCE = 2e-2
COLD_BYTES = 2**29  # ten times the second-level cache of an H100
MAX_LAYERS = 32
ROUNDS = 25
SCALE = HEAD_DIM**-0.5


@dataclass
class Row:
    """A method at a shape, per layer."""

    method: str
    num_tokens: int
    batch_size: int
    us: float
    read_bytes: int
    of_copy: float


@dataclass
class Case:
    """A layer of ours with its requests."""

    layer: LayerTensors
    rows: torch.Tensor
    seq_lens: torch.Tensor
    read_bytes: int


def kept_tokens(num_tokens: int, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Roles and, for anchors and satellites, kept prompt tokens, both [num_layers, H]."""
    profile = json.loads(PROFILE.read_text())
    roles = np.array(profile["roles"])
    is_compressed = (roles == HeadRole.ANCHOR) | (roles == HeadRole.SATELLITE)
    rule = BudgetRule(ratio, float((~is_compressed).sum()), roles.size, min_tokens=0)
    weights = np.array(profile["allocation"])[is_compressed]
    kept = np.zeros(roles.shape, dtype=np.int64)
    kept[is_compressed] = allocate_budget(weights, num_tokens, rule).tokens
    return roles, kept


def make_layer(
    roles: np.ndarray, kept: np.ndarray, num_tokens: int, batch_size: int, block_tokens: int
) -> Case:
    """A layer of random rows in scattered slots and blocks, after one generated token."""
    is_compressed = (roles == HeadRole.ANCHOR) | (roles == HeadRole.SATELLITE)
    head_map, planes, compressed = [], 0, 0
    for flag in is_compressed:
        head_map.append(~compressed if flag else planes)
        planes, compressed = planes + (not flag), compressed + flag
    seq_len = num_tokens + 1
    num_slots = batch_size * seq_len
    budgets = kept[is_compressed]
    needed = [math.ceil((int(tokens) + 1) / block_tokens) for tokens in budgets]
    num_blocks = max(1, batch_size * sum(needed))
    blocks = torch.randperm(num_blocks, device="cuda").int()
    table = torch.zeros(
        batch_size, compressed, max(needed, default=1), dtype=torch.int32, device="cuda"
    )
    taken = 0
    for row in range(batch_size):
        for c, count in enumerate(needed):
            table[row, c, :count] = blocks[taken : taken + count]
            taken += count

    def pool(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=DTYPE, device="cuda")

    resident, block_pool = (planes, num_slots, HEAD_DIM), (num_blocks, block_tokens, HEAD_DIM)
    layer = LayerTensors(
        k_resident=pool(*resident),
        v_resident=pool(*resident),
        k_blocks=pool(*block_pool),
        v_blocks=pool(*block_pool),
        block_table=table,
        kept_lens=torch.from_numpy(budgets).int().repeat(batch_size, 1).cuda(),
        prompt_lens=torch.full((batch_size,), num_tokens, dtype=torch.int32, device="cuda"),
        head_map=torch.tensor(head_map, dtype=torch.int32, device="cuda"),
        scale=SCALE,
        group_size=GROUP_SIZE,
        req_to_token=torch.randperm(num_slots, device="cuda").int().view(batch_size, seq_len),
    )
    rows = torch.arange(batch_size, device="cuda")
    num_rows = batch_size * (planes * seq_len + int((budgets + 1).sum()))
    return Case(layer, rows, torch.full_like(rows, seq_len), num_rows * ROW_BYTES)


def copy_bandwidth(num_bytes: int = 2**30) -> float:
    """Bytes a second that a copy reads and writes."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = timed({"copy": lambda: target.copy_(source)})
    return 2 * num_bytes / times["copy"]


def timed(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each call; the calls take turns."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(ROUNDS + 3):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            if index >= 3:
                taken[name].append(begin.elapsed_time(end) / 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def as_graph(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph, so that the time to launch does not count."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ours(cases: list[Case], q: torch.Tensor) -> Callable[[], object]:
    """Our kernel over all layers, after the first has been compared with torch.

    Raises:
        AssertionError: The results differ.
    """
    workspace = DecodeWorkspace.allocate(len(q), NUM_KV_HEADS, GROUP_SIZE, HEAD_DIM, q.device)
    steps = []
    for case in cases:
        layer = DecodeLayer(case.layer, impl="triton", workspace=workspace)
        steps.append((layer, DecodeBatch(case.rows, case.seq_lens)))
    first, batch = steps[0]
    actual = first.attend(q, torch.empty_like(q), batch)
    expected = DecodeLayer(cases[0].layer, impl="torch").attend(q, torch.empty_like(q), batch)
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)
    out = torch.empty_like(q)

    def call() -> None:
        for layer, step in steps:
            layer.attend(q, out, step)

    return as_graph(call)


def dense(
    num_layers: int, num_tokens: int, q: torch.Tensor
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Dense attention by whom can be imported and agrees with torch, and why the others are out."""
    batch_size, seq_len = len(q), num_tokens + 1
    shape = (batch_size * seq_len, NUM_KV_HEADS, HEAD_DIM)
    pools = [
        tuple(torch.randn(*shape, dtype=DTYPE, device="cuda") for _ in range(2))
        for _ in range(num_layers)
    ]
    indptr = torch.arange(batch_size + 1, dtype=torch.int32, device="cuda") * seq_len
    indices = torch.arange(batch_size * seq_len, dtype=torch.int32, device="cuda")

    def sdpa(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        by_request = (batch_size, seq_len, NUM_KV_HEADS, HEAD_DIM)
        keys, values = (part.view(by_request).transpose(1, 2) for part in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q[:, :, None], keys, values, scale=SCALE, enable_gqa=True
        )[:, :, 0]

    expected = sdpa(*pools[0])
    calls, missing = {}, {}
    for name, make in (
        ("torch SDPA, dense", lambda *_: sdpa),
        ("FlashInfer, dense", _flashinfer),
        ("SGLang Triton, dense", _sglang),
    ):
        try:
            attend = make(q, indptr, indices)
            actual = attend(*pools[0])
            torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE)

            def call(attend: Any = attend) -> None:
                for k, v in pools:
                    attend(k, v)

            calls[name] = as_graph(call)
        # Another project's package, for comparison only: whatever fails there is its own affair.
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {error}"
    return calls, missing


def _flashinfer(q: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor) -> Any:
    import flashinfer

    scratch = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(scratch, "NHD", use_tensor_cores=True)
    lasts = torch.ones(len(q), dtype=torch.int32, device="cuda")
    wrapper.plan(
        *(indptr, indices, lasts, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, 1),
        q_data_type=DTYPE,
        kv_data_type=DTYPE,
    )
    return lambda k, v: wrapper.run(q, (k[:, None], v[:, None]))


def _sglang(q: torch.Tensor, indptr: torch.Tensor, indices: torch.Tensor) -> Any:
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    num_splits = 16
    out = torch.empty_like(q)
    logits = torch.empty(len(q), NUM_Q_HEADS, num_splits, HEAD_DIM, device="cuda")
    lse = torch.empty(len(q), NUM_Q_HEADS, num_splits, device="cuda")
    splits = torch.full((len(q),), num_splits, dtype=torch.int32, device="cuda")

    def attend(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        decode_attention_fwd(
            *(q, k, v, out, indptr, indices, logits, lse, splits, num_splits, SCALE, 1.0, 1.0)
        )
        return out

    return attend


def measure(
    num_tokens: int, batch_size: int, options: argparse.Namespace, bandwidth: float
) -> tuple[list[Row], dict[str, str]]:
    """All methods at one shape, and what could not be measured."""
    roles, kept = kept_tokens(num_tokens, options.ratio)
    q = torch.randn(batch_size, NUM_Q_HEADS, HEAD_DIM, dtype=DTYPE, device="cuda")
    dense_bytes = batch_size * (num_tokens + 1) * NUM_KV_HEADS * ROW_BYTES
    num_layers = max(1, min(MAX_LAYERS, math.ceil(COLD_BYTES / (options.ratio * dense_bytes))))
    free = torch.cuda.mem_get_info()[0]
    wanted = num_layers * dense_bytes * (1 + 2 * options.ratio)
    if wanted > 0.9 * free:
        reason = f"needs {wanted / 2**30:.0f} of {free / 2**30:.0f} free GiB"
        return [], {f"{num_tokens} tokens, batch {batch_size}": reason}
    cases = [
        make_layer(roles[i], kept[i], num_tokens, batch_size, options.block_tokens)
        for i in range(num_layers)
    ]
    calls, missing = dense(num_layers, num_tokens, q)
    name = f"heterocache, ratio {options.ratio:g}"
    calls = {name: ours(cases, q), **calls}
    rows = []
    for method, seconds in timed(calls).items():
        read = dense_bytes
        if method == name:
            read = sum(case.read_bytes for case in cases) // num_layers
        per_layer = seconds / num_layers
        share = read / per_layer / bandwidth
        rows.append(Row(method, num_tokens, batch_size, per_layer * 1e6, read, share))
    return rows, missing


def main() -> None:
    """Measure, print the table and write the file; refuses without a CUDA device."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 131072, 229376])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--block-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, help="result file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device; on a CPU: make bench OP=ops/decode_attention")
    torch.manual_seed(0)
    console = Console(width=110)
    bandwidth = copy_bandwidth()
    table = Table(title=f"decode attention, one layer, {torch.cuda.get_device_name()}")
    for column in ("tokens", "batch", "method", "us", "read MB", "GB/s", "of copy"):
        table.add_column(column, justify="left" if column == "method" else "right")
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for num_tokens in options.tokens:
        for batch_size in options.batch:
            found, reasons = measure(num_tokens, batch_size, options, bandwidth)
            torch.cuda.empty_cache()
            missing |= reasons
            rows += found
            for row in found:
                table.add_row(
                    f"{row.num_tokens:,}",
                    str(row.batch_size),
                    row.method,
                    f"{row.us:,.1f}",
                    f"{row.read_bytes / 1e6:,.0f}",
                    f"{row.read_bytes / row.us / 1e3:,.0f}",
                    f"{row.of_copy:.0%}",
                )
    console.print(table)
    console.print(f"a copy reads and writes {bandwidth / 1e9:,.0f} GB/s")
    for name, reason in missing.items():
        console.print(f"not measured: {name} ({reason})")
    report: dict[str, Any] = {
        "machine": machine.describe(),
        "device": torch.cuda.get_device_name(),
        "copy_bandwidth_gb_s": bandwidth / 1e9,
        "options": results.settings(options),
        "not_measured": missing,
        "rows": [asdict(row) for row in rows],
    }
    console.print(f"written: {results.save('ops-gpu_decode_attention', report, options.out)}")


if __name__ == "__main__":
    main()
