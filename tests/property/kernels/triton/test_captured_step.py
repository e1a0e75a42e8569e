"""A layer's decode step over static tables, captured once and replayed over other contents.

Captured means: Triton's launches and torch's operations are recorded, and a replay runs them
without Python (`tests/fake_graph.py`), after a warm-up whose batch is nothing but padding.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetero_kernels import DecodeBatch, DecodeLayer, DecodeWorkspace, triton_support
from hetero_kernels.testing import make_decode_case, on_device
from hetero_sglang.cache.decode_tables import DecodeTables
from tests.fake_graph import FakeGraph

MAX_REQS, HEAD_MAP, GROUP, DIM = 4, [-1, 0, -2], 2, 32
POOLS = ("k_resident", "v_resident", "k_blocks", "v_blocks", "block_positions", "pivot_queries")

pytestmark = pytest.mark.skipif(
    not triton_support.is_installed() or not triton_support.is_interpreted(),
    reason="needs Triton's interpreter",
)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def make_case(prompts, kept, generated, seed, size):
    """A case of these requests inside tables of a common size, row 0 nobody's."""
    case = make_decode_case(
        prompt_lens=prompts,
        kept_lens=kept,
        generated=generated,
        head_map=HEAD_MAP,
        group_size=GROUP,
        head_dim=DIM,
        pivot_map=[-1, 0, -1],
        seed=seed,
    )
    layer, grown = case.layer, {}
    for name in (*POOLS, "block_table", "kept_lens", "prompt_lens", "req_to_token"):
        tensor = getattr(layer, name)
        shape = size[name]
        poison = float("nan") if tensor.is_floating_point() else 2**30
        whole = torch.full(shape, poison, dtype=tensor.dtype)
        by_row = name in ("block_table", "kept_lens", "prompt_lens", "req_to_token")
        first = 1 if by_row or name == "pivot_queries" else 0
        region = [slice(first, first + tensor.shape[0])]
        region += [slice(0, length) for length in tensor.shape[1:]]
        whole[tuple(region)] = tensor
        grown[name] = whole
    return dataclasses.replace(case, layer=dataclasses.replace(layer, **grown), rows=case.rows + 1)


ROWS, SLOTS, BLOCKS, WIDTH, BLOCK = 9, 700, 150, 12, 16
SIZES = {
    "k_resident": (1, SLOTS, DIM),
    "v_resident": (1, SLOTS, DIM),
    "k_blocks": (BLOCKS, BLOCK, DIM),
    "v_blocks": (BLOCKS, BLOCK, DIM),
    "block_positions": (BLOCKS, BLOCK),
    "pivot_queries": (ROWS, 1, 5, GROUP, DIM),
    "block_table": (ROWS, 2, WIDTH),
    "kept_lens": (ROWS, 2),
    "prompt_lens": (ROWS,),
    "req_to_token": (ROWS, 200),
}


@st.composite
def cases(draw):
    lengths = st.sampled_from([1, 5, 16, 63, 64, 65, 130])
    prompts = draw(st.lists(lengths, min_size=1, max_size=MAX_REQS))
    kept = [[draw(st.sampled_from(sorted({0, n // 2, n}))) for _ in range(2)] for n in prompts]
    generated = [draw(st.integers(1, 20)) for _ in prompts]
    return make_case(prompts, kept, generated, draw(st.integers(0, 99)), SIZES)


class Captured:
    """SGLang's static inputs, the static tables and one graph a batch size."""

    def __init__(self) -> None:
        warm = make_case([3], [[1, 2]], [1], 0, SIZES)
        self.layer = on_device(warm.layer, "cpu")
        for name in (*POOLS, "block_table", "kept_lens", "prompt_lens", "req_to_token"):
            tensor = getattr(self.layer, name)
            tensor.fill_(float("nan") if tensor.is_floating_point() else 2**30)
        self.tables = DecodeTables(MAX_REQS, "cpu")
        self.rows = torch.zeros(MAX_REQS, dtype=torch.int64)
        self.seq_lens = torch.ones(MAX_REQS, dtype=torch.int64)
        self.token_ids = torch.zeros(MAX_REQS, dtype=torch.int64)
        heads = len(HEAD_MAP)
        self.q = torch.full((MAX_REQS, heads * GROUP, DIM), float("nan"))
        self.k = torch.full((MAX_REQS, heads, DIM), float("nan"))
        self.v = self.k.clone()
        self.out = torch.full_like(self.q, float("nan"))
        workspace = DecodeWorkspace.allocate(
            MAX_REQS, heads, GROUP, DIM, torch.device("cpu"), num_programs=3
        )
        self.launcher = DecodeLayer(self.layer, impl="triton", workspace=workspace)
        self.untouched = {name: getattr(self.layer, name).clone() for name in POOLS}
        self.graphs = {size: self.capture(size) for size in range(MAX_REQS, 0, -1)}

    def capture(self, size: int) -> FakeGraph:
        def call() -> None:
            batch = self.tables.stage(self.rows[:size], self.seq_lens[:size], self.token_ids[:size])
            out = torch.empty_like(self.q[:size])
            self.launcher.append(self.k[:size], self.v[:size], self.q[:size], batch)
            self.launcher.attend(self.q[:size], out, batch)
            self.out[:size].copy_(out)

        self.tables.set_num_real(0)
        call()
        self.tables.reset()
        graph = FakeGraph.capture(call)
        assert graph.num_launches == 4
        return graph

    def fill(self, case, size: int) -> None:
        count = len(case.rows)
        for target, source, pad in (
            (self.rows, case.rows, 0),
            (self.seq_lens, case.seq_lens, 1),
            (self.token_ids, case.token_ids, 0),
            (self.q, case.q, float("nan")),
            (self.k, case.k, float("nan")),
            (self.v, case.v, float("nan")),
        ):
            target[:count] = source
            target[count:size] = pad
        for name in (*POOLS, "block_table", "kept_lens", "prompt_lens", "req_to_token"):
            getattr(self.layer, name).copy_(getattr(case.layer, name))
        self.tables.set_num_real(count)
        self.out.fill_(float("nan"))


def reference(case):
    case = on_device(case, "cpu")
    launcher = DecodeLayer(case.layer, impl="reference")
    batch = DecodeBatch(case.rows, case.seq_lens, case.token_ids)
    launcher.append(case.k, case.v, case.q, batch)
    return case.layer, launcher.attend(case.q, torch.empty_like(case.q), batch)


@pytest.fixture(scope="module")
def captured() -> Captured:
    return Captured()


def test_warming_up_and_capturing_write_nothing(captured: Captured) -> None:
    fresh = Captured()
    for name in POOLS:
        assert torch.equal(bits(getattr(fresh.layer, name)), bits(fresh.untouched[name])), name
    assert torch.equal(fresh.out, torch.zeros_like(fresh.out))


@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(case=cases(), extra=st.integers(0, MAX_REQS - 1))
def test_a_replay_is_the_reference_of_what_lies_there_now(captured, case, extra):
    count = len(case.rows)
    size = min(count + extra, MAX_REQS)
    tables = captured.tables
    tensors = (tables.rows, tables.seq_lens, tables.token_ids, *vars(captured.layer).values())
    before = [t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)]
    captured.fill(case, size)
    captured.graphs[size].replay()
    expected_layer, expected = reference(case)
    torch.testing.assert_close(captured.out[:count], expected, rtol=0, atol=2e-5)
    assert torch.equal(captured.out[count:size], torch.zeros_like(captured.out[count:size]))
    for name in POOLS:
        assert torch.equal(bits(getattr(captured.layer, name)), bits(getattr(expected_layer, name)))
    assert [t.data_ptr() for t in tensors if isinstance(t, torch.Tensor)] == before


def test_padding_in_the_middle_writes_nothing(captured: Captured) -> None:
    case = make_case([40, 70], [[20, 40], [10, 0]], [3, 2], 7, SIZES)
    captured.fill(case, 3)
    # Row 0, though it is among the first num_real entries.
    for target in (captured.rows, captured.seq_lens, captured.token_ids, captured.q, captured.k):
        target[2] = target[1]
    captured.v[2] = captured.v[1]
    captured.rows[1], captured.seq_lens[1], captured.token_ids[1] = 0, 1, 0
    captured.tables.set_num_real(3)
    captured.graphs[3].replay()
    expected_layer, expected = reference(case)
    torch.testing.assert_close(captured.out[[0, 2]], expected, rtol=0, atol=2e-5)
    assert torch.equal(captured.out[1], torch.zeros_like(captured.out[1]))
    for name in POOLS:
        assert torch.equal(bits(getattr(captured.layer, name)), bits(getattr(expected_layer, name)))
