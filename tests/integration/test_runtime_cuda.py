"""The policy with its pools on a GPU and its decode steps in CUDA graphs.

Not yet run on a GPU.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from hetero_sglang.cache.transfers import Transfers
from tests.captured_machine import CapturedMachine
from tests.property.cache import test_runtime as eager

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]


class Logged(eager.Machine):
    """The eager runtime on the CPU; notes what attention gave in decode steps."""

    def begin(self, retrieval: str, variant: tuple[str, str, int], seed: int) -> None:
        eager.Machine.start(self, retrieval=retrieval, variant=variant, seed=seed)

    def compare(self, request: Any, layer: int, q: Any, out: Any, seq_len: int, kept: Any) -> None:
        if kept is not None:
            log = self.__dict__.setdefault("log", [])
            log.append(((request.row, seq_len, layer), out.clone()))
        super().compare(request, layer, q, out, seq_len, kept)


class OnCuda(Logged, CapturedMachine):
    """Pools on the GPU, steps captured by ``torch.cuda.graph``; the same notes."""

    device = "cuda"
    impl = "triton"
    step = CapturedMachine.step

    def begin(self, retrieval: str, variant: tuple[str, str, int], seed: int) -> None:
        self.transfers = Transfers(torch.device("cuda"))
        CapturedMachine.begin(self, retrieval, variant, seed)


def drive(machine: Any, seed: int, num_actions: int) -> None:
    """Admissions, steps and ends, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(num_actions):
        action = rng.random()
        if not machine.live or (action < 0.35 and len(machine.live) < eager.ROWS - 1):
            length = rng.randint(1, 40)
            machine.admit(prompt_len=length, chunk=rng.choice([length, 7]))
            while any(r.in_prefill for r in machine.live.values()):
                machine.go_on(chunk=rng.randint(5, 40))
        elif action < 0.45:
            machine.end(which=rng.randrange(4))
        else:
            machine.decode(steps=rng.randint(2, 5))
        machine.pools_agree()


@pytest.mark.parametrize("variant", eager.VARIANTS)
@pytest.mark.parametrize("retrieval", ["sync", "off"])
def test_replayed_graphs_give_the_cpus_tokens(
    retrieval: str, variant: tuple[str, str, int]
) -> None:
    machines: list[Any] = [Logged(), OnCuda()]
    for machine in machines:
        machine.begin(retrieval, variant, 5)
        drive(machine, 3, 15)
    on_cpu, on_cuda = (machine.log for machine in machines)
    assert len(on_cpu) > 100
    assert [key for key, _ in on_cpu] == [key for key, _ in on_cuda]
    for (key, expected), (_, out) in zip(on_cpu, on_cuda, strict=True):
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=2e-5, msg=str(key))
    drifts = [machine.runtime.drift for machine in machines]
    assert drifts[0] == drifts[1]
    assert (drifts[0].events > 0) == (retrieval != "off")
    for machine in machines:
        machine.teardown()


@pytest.mark.parametrize("variant", eager.VARIANTS)
def test_rows_that_come_when_they_come_are_the_right_ones(variant: tuple[str, str, int]) -> None:
    # When rows arrive is the device's business; every step is compared with dense attention over
    # what its heads hold by then.
    machine = OnCuda()
    machine.begin("async", variant, 6)
    with torch.inference_mode():
        drive(machine, 4, 40)
    state = machine.runtime.state()
    assert state["drift"]["events"] > 0
    assert state["rows_installed"] > 0
    machine.teardown()
