"""The policy with its pools on a GPU and its decode steps in CUDA graphs.

Not yet run on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from hetero_sglang.cache.transfers import Transfers
from tests.captured_machine import CapturedMachine
from tests.compared_machines import Logged, assert_same_steps, drive
from tests.property.cache import test_runtime as eager

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::UserWarning")]


class OnCuda(Logged, CapturedMachine):
    """Pools on the GPU, steps captured by ``torch.cuda.graph``; the same notes."""

    device = "cuda"
    impl = "triton"
    step = CapturedMachine.step

    def begin(self, retrieval: str, variant: tuple[str, str, int], seed: int) -> None:
        self.transfers = Transfers(torch.device("cuda"))
        CapturedMachine.begin(self, retrieval, variant, seed)


@pytest.mark.parametrize("variant", eager.VARIANTS)
@pytest.mark.parametrize("retrieval", ["sync", "off"])
def test_replayed_graphs_give_the_cpus_tokens(
    retrieval: str, variant: tuple[str, str, int]
) -> None:
    assert_same_steps(OnCuda(), retrieval, variant, rtol=1e-4)


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
