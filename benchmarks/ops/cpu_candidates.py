"""Ways to write decode attention for a CPU, held against the one that was kept.

``make bench OP=ops/cpu_candidates``; numba is timed where it is installed, which this project does
not ask for. Every way computes one layer's decode attention over scattered rows of three KV heads
with different lengths, and is checked before it is timed.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.ops._harness import DTYPES, Row, check, main, timed_us
from hetero_kernels import DecodeBatch, DecodeLayer
from hetero_kernels.testing import TOLERANCE, make_decode_case

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

GROUP_SIZE, HEAD_DIM = 3, 64
SCALE = HEAD_DIM**-0.5
POOL_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Rows:
    """One layer's rows as a way without block tables wants them.

    Attributes:
        q: [num_kv_heads, GROUP_SIZE, HEAD_DIM].
        k: Keys of all slots, [num_slots, HEAD_DIM].
        v: Values, same shape.
        index: Slots of each head, int64.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    index: list[torch.Tensor]


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """One row per context and dtype."""
    for name, context in itertools.product(options.dtypes, (1024, 8192)):
        yield measure(DTYPES[name], name, context)


def measure(dtype: torch.dtype, name: str, context: int) -> Row:
    """All ways at one shape, over several layers in turn, as in a model."""
    lengths = [context, context // 2, context // 2]
    row_bytes = 2 * HEAD_DIM * dtype.itemsize
    num_layers = max(4, min(128, POOL_BYTES // (sum(lengths) * row_bytes)))
    layers = [make(dtype, lengths) for _ in range(num_layers)]
    expected = attend(layers[0], torch.float32)
    ways: dict[str, Callable[[Rows], torch.Tensor]] = {
        "gathered": attend,
        "padded batch": attend_padded,
        "Inductor": torch.compile(attend, dynamic=True),
    }
    if importlib.util.find_spec("numba") is not None and dtype is torch.float32:
        ways["numba"] = numba_way()
    times = {}
    for way, function in ways.items():
        check(function(layers[0]).float(), expected, 2 * TOLERANCE[dtype])
        turn = itertools.cycle(layers)
        times[way] = timed_us(partial(_next, function, turn))
    return Row(
        case=f"{context} tokens, half kept",
        dtype=name,
        native_us=native_us(dtype, context, num_layers),
        num_bytes=sum(lengths) * row_bytes,
        others_us=times,
    )


def _next(function: Callable[[Rows], torch.Tensor], layers: Iterator[Rows]) -> None:
    function(next(layers))


def make(dtype: torch.dtype, lengths: list[int]) -> Rows:
    """Random rows of heads with these lengths, scattered over the slots."""
    num_slots = sum(lengths)
    order = torch.randperm(num_slots)
    shape = num_slots, HEAD_DIM
    return Rows(
        torch.randn(len(lengths), GROUP_SIZE, HEAD_DIM).to(dtype),
        torch.randn(shape).to(dtype),
        torch.randn(shape).to(dtype),
        list(order.split(lengths)),
    )


def attend(layer: Rows, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Head by head: gather, multiply, softmax, multiply."""
    out = []
    for head, index in enumerate(layer.index):
        k, v, q = layer.k[index], layer.v[index], layer.q[head]
        if dtype is not None:
            k, v, q = k.to(dtype), v.to(dtype), q.to(dtype)
        out.append(torch.softmax((q @ k.T) * SCALE, dim=-1) @ v)
    return torch.stack(out)


def attend_padded(layer: Rows) -> torch.Tensor:
    """All heads as one batch, padded to the longest."""
    longest = max(map(len, layer.index))
    lengths = torch.tensor([len(index) for index in layer.index])
    index = torch.stack([torch.nn.functional.pad(i, (0, longest - len(i))) for i in layer.index])
    scores = torch.bmm(layer.q, layer.k[index].transpose(1, 2)) * SCALE
    is_padding = torch.arange(longest)[None] >= lengths[:, None]
    scores = scores.masked_fill(is_padding[:, None], -math.inf)
    return torch.bmm(torch.softmax(scores, dim=-1), layer.v[index])


def numba_way() -> Callable[[Rows], torch.Tensor]:
    """A compiled loop over spans of all heads, merged at the end; fp32 only."""
    import numba
    import numpy as np

    span = 512

    def spans(k: Any, v: Any, q: Any, index: Any, starts: Any, heads: Any, ends: Any) -> Any:
        num = len(starts)
        group, dim = q.shape[1], q.shape[2]
        out = np.zeros((num, group, dim), np.float32)
        top = np.full((num, group), -np.inf, np.float32)
        total = np.zeros((num, group), np.float32)
        for s in numba.prange(num):
            scores = np.empty(span, np.float32)
            for g in range(group):
                query = q[heads[s], g]
                best = np.float32(-np.inf)
                for i in range(starts[s], ends[s]):
                    row = k[index[i]]
                    score = np.float32(0)
                    for d in range(dim):
                        score += query[d] * row[d]
                    score *= np.float32(SCALE)
                    scores[i - starts[s]] = score
                    best = max(best, score)
                top[s, g] = best
                for i in range(starts[s], ends[s]):
                    weight = np.exp(scores[i - starts[s]] - best)
                    total[s, g] += weight
                    row = v[index[i]]
                    for d in range(dim):
                        out[s, g, d] += weight * row[d]
        return out, top, total

    compiled = numba.njit(parallel=True, fastmath={"contract", "reassoc", "nsz", "arcp"})(spans)
    numba.set_num_threads(torch.get_num_threads())
    plans: dict[int, tuple[Any, ...]] = {}

    def plan(layer: Rows) -> tuple[Any, ...]:
        starts, ends, heads, begin = [], [], [], 0
        for head, index in enumerate(layer.index):
            for start in range(begin, begin + len(index), span):
                starts.append(start)
                ends.append(min(start + span, begin + len(index)))
                heads.append(head)
            begin += len(index)
        index = torch.cat(layer.index).numpy()
        return index, np.array(starts), np.array(heads), np.array(ends)

    def run(layer: Rows) -> torch.Tensor:
        if id(layer) not in plans:
            plans[id(layer)] = plan(layer)
        index, starts, heads, ends = plans[id(layer)]
        arrays = layer.k.numpy(), layer.v.numpy(), layer.q.numpy()
        out, top, total = compiled(*arrays, index, starts, heads, ends)
        merged = np.empty(layer.q.shape, np.float32)
        for head in range(len(layer.index)):
            mine = heads == head
            weight = np.exp(top[mine] - top[mine].max(axis=0))
            weighted = (out[mine] * weight[..., None]).sum(axis=0)
            merged[head] = weighted / (total[mine] * weight).sum(axis=0)[:, None]
        return torch.from_numpy(merged)

    return run


def native_us(dtype: torch.dtype, context: int, num_layers: int) -> float:
    """The library over scattered slots and permuted blocks of the same lengths."""
    cases = [
        make_decode_case(
            prompt_lens=[context - 1],
            kept_lens=[[context // 2 - 1] * 2],
            generated=[1],
            head_map=[-1, 0, -2],
            group_size=GROUP_SIZE,
            head_dim=HEAD_DIM,
            dtype=dtype,
            seed=seed,
        )
        for seed in range(num_layers)
    ]
    calls = []
    for case in cases:
        layer = DecodeLayer(case.layer, impl="native")
        batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
        layer.append(case.k, case.v, None, batch)
        calls.append(partial(layer.attend, case.q, torch.empty_like(case.q), batch))
    reference = DecodeLayer(cases[0].layer, impl="reference")
    batch = DecodeBatch(cases[0].rows, cases[0].seq_lens, cases[0].token_ids)
    expected = reference.attend(cases[0].q, torch.empty_like(cases[0].q), batch)
    check(calls[0](), expected, 2 * TOLERANCE[dtype])
    turn = itertools.cycle(calls)
    return timed_us(lambda: next(turn)())


if __name__ == "__main__":
    main("cpu_candidates", rows)
