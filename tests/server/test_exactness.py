"""A server's greedy tokens are stock's at ratio 1, and the simulation's below."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from hetero_sglang.simulation.method import Method
from tests.server.conftest import PromptSpec, policy_flags

if TYPE_CHECKING:
    from tests.server.conftest import Reference, ServerPool
    from tests.server.harness import Answer, Server

logger = logging.getLogger(__name__)

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(4000)]

NUM_TOKENS = 64
# Five prompts: shorter than one pooling window up to most of the context, on both sides of the
# 1,024 tokens from which on a prompt is compressed.
PROMPTS = (
    PromptSpec("prose", 5, 20_000),
    PromptSpec("code", 700, 30_000),
    PromptSpec("code", 1_400),
    PromptSpec("prose", 3_000, 100_000),
    PromptSpec("code", 6_000, 9_000),
)
COMPRESSED = tuple(spec for spec in PROMPTS if spec.num_tokens >= 1_024)
SYNC = ("--kv-policy-retrieval", "sync")
PAPER = ("--kv-policy-preset", "paper")
# What a scheduler may do differently must not change a token: chunks and overlap. Chunks of 1,487
# leave 13 and 26 tokens to the last chunk of two prompts, less than the selection window.
RESCHEDULED = ("--chunked-prefill-size", "1487", "--disable-overlap-schedule")
SERVERS = {
    "all kept": (Method(1.0), policy_flags(1.0)),
    "half": (Method(0.5), policy_flags(0.5, *SYNC)),
    "a third, rescheduled": (Method(0.3), policy_flags(0.3, *SYNC, *RESCHEDULED)),
    "paper, half, rescheduled": (
        Method.paper(0.5),
        policy_flags(0.5, *SYNC, *PAPER, *RESCHEDULED),
    ),
}
# Every server answers five requests at once; one at a time is looked at for two of them.
RUNS = [
    ("half", "single"),
    ("half", "concurrent"),
    ("a third, rescheduled", "concurrent"),
    ("paper, half, rescheduled", "concurrent"),
]


@pytest.fixture(params=["single", "concurrent"])
def mode(request: pytest.FixtureRequest) -> str:
    """One request at a time, or five at once."""
    kind: str = request.param
    return kind


_answers: dict[tuple[int, str], dict[PromptSpec, Answer]] = {}


def ask(server: Server, reference: Reference, mode: str) -> dict[PromptSpec, Answer]:
    """Every prompt's answer; a server is asked once per mode."""
    key = (server.pid, mode)
    if key not in _answers:
        prompts = [reference.ids(spec) for spec in PROMPTS]
        if mode == "single":
            answers = [server.generate(p, NUM_TOKENS, with_logprobs=True) for p in prompts]
        else:
            answers = server.generate_all(prompts, NUM_TOKENS, with_logprobs=True)
        _answers[key] = dict(zip(PROMPTS, answers, strict=True))
    return _answers[key]


def test_ratio_one_gives_stocks_tokens(
    servers: ServerPool, reference: Reference, mode: str
) -> None:
    stock = ask(servers.get(), reference, "single")
    policy = ask(servers.get(*SERVERS["all kept"][1]), reference, mode)
    for spec in PROMPTS:
        assert len(policy[spec].token_ids) == NUM_TOKENS
        if policy[spec].token_ids != stock[spec].token_ids:
            # Only a tie of logits may part them, and then the model itself must allow both.
            for side in (stock[spec], policy[spec]):
                verdict = reference.judge(Method(1.0), spec, side)
                assert verdict.is_accepted, f"{spec}: {verdict.evidence}"
        error = max(
            abs(a - b)
            for a, b, same in zip(
                policy[spec].logprobs,
                stock[spec].logprobs,
                _same_context(policy[spec].token_ids, stock[spec].token_ids),
                strict=True,
            )
            if same
        )
        assert error < 2e-3, spec


def _same_context(ours: list[int], theirs: list[int]) -> list[bool]:
    """Whether all earlier tokens and this one agree, for every token."""
    first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    return [first is None or i < first for i in range(len(ours))]


@pytest.mark.parametrize(("name", "how"), RUNS)
def test_sync_retrieval_gives_the_simulations_tokens(
    servers: ServerPool, reference: Reference, name: str, how: str
) -> None:
    method, flags = SERVERS[name]
    answers = ask(servers.get(*flags), reference, how)
    for spec in PROMPTS:
        assert len(answers[spec].token_ids) == NUM_TOKENS
        verdict = reference.judge(method, spec, answers[spec])
        error = f"{verdict.logprob_error:.1e}"
        logger.info(
            "%s, %s: %s, %d drifts, log-probabilities within %s",
            *(name, spec, verdict.evidence, verdict.trace.num_drifts, error),
        )
        assert verdict.is_accepted, f"{spec}: {verdict.evidence}"


def test_the_comparison_would_notice_another_method(
    servers: ServerPool, reference: Reference
) -> None:
    answers = ask(servers.get(*SERVERS["half"][1]), reference, "single")
    for spec in COMPRESSED:
        for wrong in (Method(1.0), Method(0.49), Method.paper(0.5, min_tokens=1024)):
            assert not reference.judge(wrong, spec, answers[spec]).is_accepted, (spec, wrong)
    # Not every prompt makes attention drift; where it does, these must be seen.
    for wrong in (
        Method(0.5, is_retrieving=False),
        Method(0.5, drift_interval=6),
        Method(0.5, drift_threshold=0.4),
        Method(0.5, window=31),
    ):
        # Until the first that is seen: a judgement takes seconds.
        verdicts = (reference.judge(wrong, spec, answers[spec]) for spec in COMPRESSED)
        assert not all(verdict.is_accepted for verdict in verdicts), wrong
