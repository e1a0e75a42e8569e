"""Prompts on a device: what waits for it, and when."""

from __future__ import annotations

import contextlib
import importlib

import numpy as np
import pytest
import torch

from hetero_kernels import triton_support
from hetero_sglang.errors import ResidencyError
from hetero_sglang.prefill import ExtendSpan
from tests.fake_graph import NoHostSync, guarded
from tests.property.cache import test_runtime as eager

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.skipif(
        not triton_support.is_installed() or not triton_support.is_interpreted(),
        reason="needs Triton's interpreter",
    ),
]


class Guarded(eager.Machine):
    """The layers of a prompt are guarded; between them nothing is."""

    def prefill(self, row: int, chunk: int) -> None:
        runtime, request = self.runtime, self.live[row]
        start, end = request.done, min(request.done + chunk, request.prompt_len)
        runtime.begin_prefill(row, request.prompt_len, end)
        self.extend_ids(request, end - start)
        runtime.allocate(np.array([row]), np.array([end]))
        spans = [ExtendSpan(row, 0, start, end - start)]
        runtime.begin_extend(spans)
        for layer in range(2):
            q = self.random(end - start, eager.HEADS * eager.GROUP, eager.DIM)
            k = self.random(end - start, eager.HEADS, eager.DIM)
            v = self.random(end - start, eager.HEADS, eager.DIM)
            is_finished = layer == 1 and end == request.prompt_len and self.store is not None
            # At the very end the host takes the kept positions, once.
            guard = contextlib.nullcontext() if is_finished else guarded(NoHostSync())
            with guard:
                runtime.extend_layer(layer, q, k, v, spans, eager.SCALE)
        request.done = end


@pytest.mark.parametrize("variant", eager.VARIANTS)
@pytest.mark.parametrize("retrieval", ["async", "off"])
def test_selection_and_moves_wait_for_nothing(
    retrieval: str, variant: tuple[str, str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernels that a GPU would run; those of the CPU may look at their tensors.
    for name in ("extend_attention", "score_positions", "top_positions", "window_scores"):
        # The package's name is taken by the function in it.
        module = importlib.import_module(f"hetero_kernels.{name}")
        monkeypatch.setattr(module, "resolve", lambda *_, **__: "triton")
    machine = Guarded()
    machine.start(retrieval=retrieval, variant=variant, seed=3)
    for prompt_len, chunk in ((5, 5), (40, 40), (33, 31)):
        machine.admit(prompt_len=prompt_len, chunk=chunk)
        while any(request.in_prefill for request in machine.live.values()):
            machine.go_on(chunk=chunk)
        machine.pools_agree()
        machine.flush()
    machine.teardown()


def test_a_row_that_nobody_announced_gets_nothing() -> None:
    machine = eager.Machine()
    machine.start(retrieval="off", variant=eager.VARIANTS[0], seed=1)
    machine.admit(prompt_len=20, chunk=20)
    (mine,) = machine.live
    before = machine.runtime.blocks.num_free
    with pytest.raises(ResidencyError, match="row 3 was given no prompt"):
        machine.runtime.allocate(np.array([mine, 3]), np.array([21, 40]))
    assert machine.runtime.blocks.num_free == before
    machine.teardown()


def test_kept_positions_come_to_the_host_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = eager.Machine()
    machine.start(retrieval="async", variant=eager.VARIANTS[1], seed=1)
    copies: list[int] = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(
        torch.Tensor, "cpu", lambda tensor: (copies.append(tensor.numel()), original(tensor))[1]
    )
    monkeypatch.setattr(machine, "compare", lambda *_: None)
    machine.admit(prompt_len=40, chunk=40)
    # The prompt's token ids when its chunk begins, what it keeps when it ends; of the test's own,
    # attention of two layers.
    kept = machine.runtime.kept_positions(1)
    attention = 40 * eager.HEADS * eager.GROUP * eager.DIM
    assert sorted(copies) == sorted([40, sum(map(len, kept)), attention, attention])
    machine.teardown()
