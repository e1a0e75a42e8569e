"""Positions that a head never gives up."""

from __future__ import annotations

import torch

from hetero_sglang.policy.selection import NUM_SINKS, protect


def test_sinks_come_first_then_the_window_from_its_end_then_the_scores() -> None:
    scores = torch.rand(2, 50, generator=torch.Generator().manual_seed(0))
    plain = scores.argsort(dim=1, descending=True)
    order = protect(scores.clone(), 8).argsort(dim=1, descending=True)
    for row in range(2):
        assert order[row, :NUM_SINKS].tolist() == list(range(NUM_SINKS))
        assert order[row, NUM_SINKS : NUM_SINKS + 8].tolist() == list(range(49, 41, -1))
        rest = [p for p in plain[row].tolist() if NUM_SINKS <= p < 42]
        assert order[row, NUM_SINKS + 8 :].tolist() == rest


def test_a_window_of_one_protects_nothing() -> None:
    scores = torch.rand(9)
    assert torch.equal(protect(scores.clone(), 1), scores)


def test_protected_scores_differ_from_each_other_at_the_widest_window() -> None:
    scores = protect(torch.ones(600), 256)
    assert len(set(scores[344:].tolist())) == 256
    assert float(scores[344:].min()) > 1.0


def test_a_prompt_shorter_than_the_window_is_protected_whole() -> None:
    scores = protect(torch.zeros(3), 32)
    assert scores.argsort(descending=True).tolist() == [0, 1, 2]
