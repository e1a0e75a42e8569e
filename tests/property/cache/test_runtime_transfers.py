"""The runtime with copies to and from memd that are done late, captured steps and late mail too.

Staging, landing rows and pages are somebody else's only when the copies at them are done: a copy
reads its source as late as can be, so rows of another prompt would show in attention, and what a
request leaves behind in what is in use at the end.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from tests.captured_machine import CapturedMachine
from tests.held_transfers import HeldTransfers
from tests.property.cache import test_runtime as eager

TESTED = settings(stateful_step_count=30, max_examples=40)
MARKS = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Late:
    """Rules over copies; beside a machine of the runtime."""

    @rule()
    def hold_copies_back(self) -> None:
        self.transfers.is_held = True

    @rule()
    def let_copies_be_done(self) -> None:
        self.transfers.is_held = False

    @precondition(lambda self: self.transfers is not None and self.transfers.num_waiting)
    @rule()
    def do_one_copy(self) -> None:
        self.transfers.do_next()

    @invariant()
    def rows_on_their_way_are_nobody_elses(self) -> None:
        retrieval = self.runtime._retrieval
        for flight in [] if retrieval is None else retrieval._flights:
            assert not flight.ticket.is_finished

    def teardown(self) -> None:
        if self.transfers is not None:
            self.transfers.is_held = False
        super().teardown()
        if self.transfers is not None:
            assert self.transfers.num_waiting == 0


class EagerMachine(Late, eager.Machine):
    @initialize(
        retrieval=st.sampled_from(["async", "sync", "off"]),
        variant=st.sampled_from(eager.VARIANTS),
        seed=st.integers(0, 99),
    )
    def start(self, retrieval: str, variant: tuple[str, str, int], seed: int) -> None:
        self.transfers = HeldTransfers()
        eager.Machine.start(self, retrieval=retrieval, variant=variant, seed=seed)


class LateMachine(Late, CapturedMachine):
    @initialize(
        retrieval=st.sampled_from(["async", "sync"]),
        variant=st.sampled_from(eager.VARIANTS),
        seed=st.integers(0, 99),
    )
    def start(self, retrieval: str, variant: tuple[str, str, int], seed: int) -> None:
        self.transfers = HeldTransfers()
        self.begin(retrieval, variant, seed)


TestEager = EagerMachine.TestCase
TestEager.settings = TESTED
TestEager.pytestmark = MARKS
TestCaptured = LateMachine.TestCase
TestCaptured.settings = TESTED
TestCaptured.pytestmark = MARKS
