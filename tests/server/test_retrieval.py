"""Attention drifts on real prompts, and then memd's rows are fetched and installed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from hetero_sglang.simulation.method import Method
from tests.server.conftest import PromptSpec, policy_flags
from tests.simulation.compare import DRIFT_TIE_POSITIONS, SELECTION_TIE

if TYPE_CHECKING:
    from hetero_sglang.simulation.engine import Trace
    from tests.server.conftest import Reference, ServerPool
    from tests.server.harness import Answer, Server

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(2000)]

# Code drifts more than prose: every definition looks somewhere else.
PROMPT = PromptSpec("code", 2_000)
# Small sets change more often than large ones.
RATIO = 0.3
# 93 steps: the last check, after step 90, is one whose outcome three tokens still show.
NUM_TOKENS = 94


def counted(server: Server, reference: Reference) -> tuple[Answer, dict[str, Any]]:
    """The answer to one request, and what the request added to the counters."""
    server.wait_until_landed()  # what another test has left
    before = server.heterocache()
    answer = server.generate(reference.ids(PROMPT), NUM_TOKENS, with_logprobs=True)
    server.wait_until_landed()
    after = server.heterocache()
    assert after["integrity"] == "ok"
    delta: dict[str, Any] = {
        f"{group}.{name}": after[group][name] - before[group][name]
        for group in ("drift", "fetches")
        for name in after[group]
    }
    delta["bytes_fetched"] = after["bytes_fetched"] - before["bytes_fetched"]
    return answer, delta


def num_missing_rows(trace: Trace) -> int:
    """Rows that refreshed heads did not already hold: what a fetch has to bring."""
    missing = 0
    for new in trace.selections:
        if new.step > 0:
            old = trace.selection(new.layer, new.head, step=new.step - 1)
            missing += len(set(new.positions.tolist()) - set(old.positions.tolist()))
    return missing


def test_sync_counters_are_the_simulations(servers: ServerPool, reference: Reference) -> None:
    server = servers.get(*policy_flags(RATIO, "--kv-policy-retrieval", "sync"))
    answer, delta = counted(server, reference)
    # The log-probabilities settle which side of a tie the server took.
    verdict = reference.judge(Method(RATIO), PROMPT, answer)
    assert verdict.is_accepted, verdict.evidence
    trace = verdict.trace
    assert trace.num_drifts > 0
    assert delta["drift.checks"] == len(trace.checks)
    # A verdict that is a tie, and that no later token shows, may be another one.
    ties = sum(check.distance <= DRIFT_TIE_POSITIONS for check in trace.checks)
    assert abs(delta["drift.events"] - trace.num_drifts) <= ties
    assert delta["fetches.issued"] == delta["fetches.installed"] > 0
    assert delta["fetches.dropped"] == 0
    # Only what is missing travels. A tie at a set's boundary may move a row.
    expected = num_missing_rows(trace)
    assert expected > 0
    if delta["drift.events"] == trace.num_drifts:
        edges = sum(new.step > 0 and new.margin < SELECTION_TIE for new in trace.selections)
        rows = delta["bytes_fetched"] / reference.row_bytes
        assert rows == pytest.approx(expected, abs=4 + edges)


def test_async_fetches_are_installed(servers: ServerPool, reference: Reference) -> None:
    server = servers.get(*policy_flags(RATIO))
    answer, delta = counted(server, reference)
    assert len(answer.token_ids) == NUM_TOKENS
    assert delta["drift.events"] > 0
    assert delta["fetches.issued"] > 0
    assert delta["fetches.installed"] > 0
    # What is still under way when a request ends is dropped, nothing is lost or counted twice.
    assert delta["fetches.issued"] == delta["fetches.installed"] + delta["fetches.dropped"]
    assert delta["bytes_fetched"] > 0
    assert delta["bytes_fetched"] % reference.row_bytes == 0


def test_retrieval_off_never_fetches_and_answers_differently(
    servers: ServerPool, reference: Reference
) -> None:
    server = servers.get(*policy_flags(RATIO, "--kv-policy-retrieval", "off"))
    before = server.heterocache()
    answer = server.generate(reference.ids(PROMPT), NUM_TOKENS, with_logprobs=True)
    after = server.heterocache()
    assert after["fetches"]["issued"] == before["fetches"]["issued"] == 0
    assert after["memd"]["state"] == "off"
    stale = reference.judge(Method(RATIO, is_retrieving=False), PROMPT, answer)
    assert stale.is_accepted, stale.evidence
    # So retrieval is what the sync server's answer owes to memd.
    assert not reference.judge(Method(RATIO), PROMPT, answer).is_accepted
