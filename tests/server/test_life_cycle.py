"""Whatever happens to requests, every byte comes back."""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.server.conftest import PromptSpec, policy_flags
from tests.server.harness import RETRACTED, Server, wait_until

if TYPE_CHECKING:
    from tests.server.conftest import Reference, ServerPool

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(3000)]

NUM_REQUESTS = 200
NUM_CLIENTS = 12
# Compress from 128 tokens on, so that short prompts exercise what long ones would. The pool holds
# less than the clients ask for at once and the scheduler is told to be bold, so requests wait, and
# running ones may be retracted.
FLAGS = policy_flags(
    *(0.5, "--kv-policy-min-tokens", "128"),
    *("--chunked-prefill-size", "256", "--context-length", "2048"),
    *("--schedule-conservativeness", "0.1"),
)
MAX_TOTAL_TOKENS = 3_000


def leftovers(server: Server) -> dict[str, int]:
    """Bytes and pages still in use, by area."""
    server.sweep()
    state = server.heterocache()
    used = {name: area["used_bytes"] for name, area in state["areas"].items()}
    used["memd pages"] = state["memd"]["pages_used"]
    return {name: amount for name, amount in used.items() if amount}


def run_mixed(server: Server, reference: Reference, seed: int) -> str:
    """One random request; how it ended ('length', 'open', 'abort' or 'dropped')."""
    rng = random.Random(seed)
    num_prompt = rng.choice((5, 40, 127, 128, 300, 500, 900))
    num_tokens = rng.randint(1, 30)
    ending = rng.choice(("length", "length", "open", "abort", "dropped"))
    spec = PromptSpec(rng.choice(("code", "prose")), num_prompt, 97 * seed)
    prompt, rid = reference.ids(spec), f"mixed-{seed}"
    if ending == "length":
        answer = server.generate(prompt, num_tokens)
        assert answer.finish_reason == "length"
        assert len(answer.token_ids) == num_tokens
        return ending
    if ending == "open":
        # The scheduler cannot know how long such a request will be.
        sampling = {"max_new_tokens": 50, "temperature": 0.0}
        answer = server.generate(prompt, 50, sampling_params=sampling)
        assert answer.finish_reason in ("length", "stop")
        return ending
    with server.stream(prompt, 40, rid=rid) as chunks:
        # Some end while they wait or are in prefill, some in the middle of decoding.
        after = rng.choice((0, 1, 7, 20))
        if after:
            for chunk in chunks:
                if chunk.num_tokens >= after:
                    break
        if ending == "abort":
            server.abort(rid)
            for _ in chunks:
                pass
    return ending


def test_200_mixed_requests_with_aborts_leave_nothing(
    servers: ServerPool, reference: Reference
) -> None:
    server = servers.get(*FLAGS, max_total_tokens=MAX_TOTAL_TOKENS)
    # Tokenizers are not meant for many threads; the prompts are made before.
    seeds = range(NUM_REQUESTS)
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        endings = list(pool.map(lambda seed: run_mixed(server, reference, seed), seeds))
    assert min(Counter(endings).values()) > 20
    assert len(set(endings)) == 4
    server.wait_until_idle()
    wait_until(lambda: not leftovers(server), 60, lambda: f"still in use: {leftovers(server)}")
    state = server.heterocache()
    assert state["integrity"] == "ok"
    assert state["full_equivalent_bytes"] == 0
    assert state["memd"]["state"] == "alive"
    # Otherwise this test would have exercised nothing.
    assert state["drift"]["checks"] > 0


def test_retracted_requests_finish(servers: ServerPool, reference: Reference) -> None:
    server = servers.get(*FLAGS, max_total_tokens=MAX_TOTAL_TOKENS)
    # Six times 300 tokens fit, six times 600 do not; that they will come to 600 the scheduler
    # cannot know.
    prompts = [reference.ids(PromptSpec("code", 300, 2_000 * i)) for i in range(6)]
    sampling = {"max_new_tokens": 300, "min_new_tokens": 300, "temperature": 0.0}
    num_before = server.log().count(RETRACTED)
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda p: server.generate(p, 0, sampling_params=sampling), prompts))
    assert [len(answer.token_ids) for answer in answers] == [300] * len(prompts)
    assert server.log().count(RETRACTED) > num_before
    server.wait_until_idle()
    wait_until(lambda: not leftovers(server), 60, lambda: f"still in use: {leftovers(server)}")
    assert server.heterocache()["integrity"] == "ok"


def test_answers_after_the_storm_are_those_of_before(
    servers: ServerPool, reference: Reference
) -> None:
    server = servers.get(*FLAGS, max_total_tokens=MAX_TOTAL_TOKENS)
    spec = PromptSpec("code", 900, 500)
    before = server.generate(reference.ids(spec), 7)
    others = [reference.ids(PromptSpec("prose", 400, 900 * i)) for i in range(6)]
    server.generate_all(others, 4)
    server.get("/flush_cache")
    # These come before any fetch could land, so async retrieval cannot change them.
    assert server.generate(reference.ids(spec), 7).token_ids == before.token_ids
