"""``plan_delta`` in Triton: exactly the reference's plan."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from hetero_kernels import plan_delta
from hetero_kernels.testing import on_device
from tests.property.kernels.test_plan_delta import exchanges

few = settings(max_examples=20, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def _small_blocks(device, monkeypatch):
    """Several blocks for short lists."""
    from hetero_kernels.plan_delta import triton

    if device == "cpu":
        monkeypatch.setattr(triton, "BLOCK", 32)


@few
@given(case=exchanges())
def test_the_plan_is_the_references(device, case):
    expected = plan_delta(**case, impl="reference")
    actual = plan_delta(**on_device(case, device), impl="triton")
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


def test_positions_that_no_prompt_has_are_skipped(device):
    # In a replayed graph nobody looks: one beyond num_tokens must not be marked in other memory.
    target = torch.tensor([[5, 2**31 - 1, 3, 70], [9, 1, 2**20, -1]], dtype=torch.int32)
    kept = torch.tensor([[3, 64, 2**30, 1], [1, 63, 8, 2]], dtype=torch.int32)
    skipped = [torch.where(positions < 64, positions, -1) for positions in (target, kept)]
    expected = plan_delta(*skipped, 64, impl="reference")
    actual = plan_delta(target.to(device), kept.to(device), 64, impl="triton")
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine.cpu(), theirs)


def test_a_replay_plans_for_what_is_kept_now(device, replay):
    target = torch.stack([torch.randperm(90)[:60] for _ in range(3)]).int().to(device)
    kept = target.flip(1).contiguous()
    results = []

    def call():
        results[:] = plan_delta(target, kept, 90, room=40, impl="triton")

    again = replay(call)
    for _ in range(3):
        kept.copy_(torch.stack([torch.randperm(90)[:60] for _ in range(3)]).int())
        again()
        expected = plan_delta(target.cpu(), kept.cpu(), 90, room=40, impl="reference")
        for mine, theirs in zip(results, expected, strict=True):
            assert torch.equal(mine.cpu(), theirs)
