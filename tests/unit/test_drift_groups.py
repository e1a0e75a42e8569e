"""Checks of drift that would take too much memory at once are made group by group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_sglang import drift
from hetero_sglang.cache.device_bytes import check_bytes
from tests.captured_machine import CapturedMachine
from tests.property.cache import test_runtime as eager

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def begun(is_captured: bool) -> Any:
    machine = CapturedMachine() if is_captured else eager.Machine()
    begin = machine.begin if is_captured else machine.start
    begin(retrieval="sync", variant=("budget", "int8", 4), seed=3)
    return machine


@given(
    lens=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    room=st.sampled_from([1, 5_000, 20_000, 10**9]),
)
def test_groups_hold_each_row_once_and_fit(lens: list[int], room: int) -> None:
    machine = begun(is_captured=False)
    watch, config = machine.runtime.drift, machine.runtime.config
    rows = np.random.default_rng(0).permutation(len(lens)) + 7
    prompt_lens = np.array(lens, dtype=np.int32)
    length_of = dict(zip(rows.tolist(), lens, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drift, "DRIFT_SCRATCH_BYTES", room)
        groups = watch.groups(rows, prompt_lens)
    assert sorted(np.concatenate(groups).tolist()) == sorted(rows.tolist())

    def num_bytes(group: list[int]) -> int:
        longest = max(length_of[row] for row in group)
        one = check_bytes(machine.tables.num_pivots, config.drift_interval, longest)
        return len(group) * one

    for group in groups:
        assert len(group) == 1 or num_bytes(group.tolist()) <= room
    if num_bytes(rows.tolist()) <= room:
        assert len(groups) == 1
        assert np.array_equal(groups[0], rows)
    machine.teardown()


def run(machine: Any) -> list[Any]:
    """What heads keep after each of some steps of three requests, and how often they drifted."""
    seen: list[Any] = []
    for prompt_len in (40, 17, 33):
        machine.admit(prompt_len=prompt_len, chunk=40)
    for _ in range(9):
        machine.step(list(machine.live.values()))
        seen.append([machine.kept(request) for request in machine.live.values()])
    seen.append((machine.runtime.drift.checks, machine.runtime.drift.events))
    machine.teardown()
    return seen


@pytest.mark.parametrize("is_captured", [False, True])
def test_groups_change_nothing_but_the_memory(
    is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run(begun(is_captured))
    sizes: list[int] = []
    measure = drift.DriftWatch.measure

    def counted(self: drift.DriftWatch, rows: Any, *rest: Any, **more: Any) -> Any:
        sizes.append(len(rows))
        return measure(self, rows, *rest, **more)

    monkeypatch.setattr(drift, "DRIFT_SCRATCH_BYTES", 1)
    monkeypatch.setattr(drift.DriftWatch, "measure", counted)
    actual = run(begun(is_captured))
    assert set(sizes) == {1}
    assert len(sizes) > 3
    checks, events = expected[-1]
    assert checks > 0
    assert events > 0
    assert actual[-1] == expected[-1]
    for ours, theirs in zip(actual[:-1], expected[:-1], strict=True):
        for mine, others in zip(ours, theirs, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(mine, others, strict=True))
