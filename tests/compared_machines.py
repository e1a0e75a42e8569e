"""The same requests through two runtimes, compared step by step."""

from __future__ import annotations

import random
from typing import Any

import torch

from tests.property.cache import test_runtime as eager


class Logged(eager.Machine):
    """The eager runtime on the CPU; notes what attention gave in decode steps."""

    def begin(self, retrieval: str, variant: tuple[str, str, int], seed: int) -> None:
        eager.Machine.start(self, retrieval=retrieval, variant=variant, seed=seed)

    def compare(self, request: Any, layer: int, q: Any, out: Any, seq_len: int, kept: Any) -> None:
        if kept is not None:
            log = self.__dict__.setdefault("log", [])
            log.append(((request.row, seq_len, layer), out.clone()))
        super().compare(request, layer, q, out, seq_len, kept)


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


def assert_same_steps(
    other: Any, retrieval: str, variant: tuple[str, str, int], *, rtol: float
) -> None:
    """Drives the eager runtime and another machine, and compares every decode step of both.

    Args:
        other: A machine that logs as ``Logged`` does; not begun.
        retrieval: As ``--kv-policy-retrieval``; asynchronous only where rows come at once.
        variant: One of the machines' variants.
        rtol: Relative tolerance of attention's results.
    """
    machines: list[Any] = [Logged(), other]
    for machine in machines:
        machine.begin(retrieval, variant, 5)
        drive(machine, 3, 15)
    expected_log, log = (machine.log for machine in machines)
    assert len(expected_log) > 100
    assert [key for key, _ in expected_log] == [key for key, _ in log]
    for (key, expected), (_, out) in zip(expected_log, log, strict=True):
        torch.testing.assert_close(out, expected, rtol=rtol, atol=2e-5, msg=str(key))
    drifts = [(m.runtime.drift.checks, m.runtime.drift.events) for m in machines]
    assert drifts[0] == drifts[1]
    assert (drifts[0][1] > 0) == (retrieval != "off")
    for machine in machines:
        machine.teardown()
