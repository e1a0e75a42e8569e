"""Captured decode steps in any mix of requests, with mail that comes late: dense attention's."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize

from tests.captured_machine import CapturedMachine
from tests.property.cache.test_runtime import VARIANTS


class Machine(CapturedMachine):
    @initialize(
        retrieval=st.sampled_from(["async", "sync", "off"]),
        variant=st.sampled_from(VARIANTS),
        seed=st.integers(0, 99),
    )
    def start(self, retrieval: str, variant: tuple[str, str, int], seed: int) -> None:
        self.begin(retrieval, variant, seed)


TestGraphRuntime = Machine.TestCase
TestGraphRuntime.settings = settings(stateful_step_count=30, max_examples=40)
TestGraphRuntime.pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
