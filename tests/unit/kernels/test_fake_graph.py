"""The guard and the recorder that the tests of captured decode steps rest on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from hetero_kernels import triton_support
from tests.fake_graph import FakeGraph, HostSyncError, NoHostSync, guarded

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    not triton_support.is_installed() or not triton_support.is_interpreted(),
    reason="needs Triton's interpreter",
)

X = torch.tensor([1, 0, 3])

FORBIDDEN: dict[str, Callable[[], object]] = {
    "item": lambda: X[0].item(),
    "int": lambda: int(X[0]),
    "tolist": lambda: X.tolist(),
    "truth": lambda: bool(X[0]),
    "nonzero": lambda: X.nonzero(),
    "boolean index": lambda: X[X > 0],
    "boolean assignment": lambda: X.clone().__setitem__(X > 9, X[:0]),
    "repeat by a tensor": lambda: X.repeat_interleave(X),
    "numpy": lambda: X.numpy(),
    "new tensor": lambda: torch.tensor([1, 2]),
    "to a device": lambda: X.to("meta"),
    "cuda-like copy": lambda: torch.empty(3, dtype=torch.int64, device="meta").copy_(X),
    "unique": lambda: X.unique(),
    "equal": lambda: torch.equal(X, X),
}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_waits_for_a_device_is_refused(name: str) -> None:
    with pytest.raises(HostSyncError), guarded(NoHostSync()):
        FORBIDDEN[name]()
    assert len(X.numpy()) == 3


def test_what_a_graph_can_hold_passes() -> None:
    y = torch.zeros(3, dtype=torch.int64)
    with guarded(NoHostSync()):
        y.copy_(X)
        y.masked_fill_(y == 0, -1)
        y.index_copy_(0, X[1:2], X[:1])
        y.fill_(7)
        X.to(torch.float32)
        torch.empty_like(X)
    assert y.tolist() == [7, 7, 7]


def test_a_replay_reads_contents_and_not_decisions() -> None:
    source, target = torch.tensor([1.0, 2.0]), torch.zeros(2)
    factor = 2

    def call() -> None:
        scratch = torch.empty_like(source)
        torch.mul(source, factor, out=scratch)
        target.copy_(scratch[:1] + scratch)

    graph = FakeGraph.capture(call)
    assert target.tolist() == [4, 6]
    source.copy_(torch.tensor([5.0, 7.0]))
    factor = 100
    graph.replay()
    assert target.tolist() == [20, 24]
    assert graph.num_launches == 0


def test_memory_that_a_graph_makes_is_not_there_before_it_is_written() -> None:
    target = torch.zeros(2)
    graph = FakeGraph.capture(lambda: target.copy_(torch.empty_like(target)))
    graph.replay()
    assert target.isnan().all()
