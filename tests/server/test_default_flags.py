"""A server with the policy's defaults: what it takes, what it holds, what it refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import requests

from tests.server.conftest import PROFILE_PATH, PromptSpec, policy_flags

if TYPE_CHECKING:
    from tests.server.conftest import Reference, ServerPool
    from tests.server.harness import Server

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture
def server(servers: ServerPool) -> Server:
    """The same one as that of the client programs."""
    return servers.get(*policy_flags(0.5))


def test_auto_takes_the_shipped_profile_and_says_which(server: Server) -> None:
    assert server.heterocache()["profile"].endswith(PROFILE_PATH.stem)
    assert PROFILE_PATH.stem in server.log()


def test_beam_search_is_refused_and_nothing_else_with_it(server: Server) -> None:
    # No flag announces it: it is a parameter of a request.
    payload = {
        "input_ids": list(range(100, 130)),
        "sampling_params": {"max_new_tokens": 4, "temperature": 0.0},
    }
    beams = payload | {"sampling_params": {"max_new_tokens": 4, "beam_width": 4}}
    reply = requests.post(f"{server.url}/generate", json=beams, timeout=120)
    assert reply.status_code == 400
    assert "Beam search is not supported with --kv-policy heterocache" in reply.text
    assert server.post("/generate", payload).json()["meta_info"]["completion_tokens"] == 4
    server.wait_until_idle()
    assert server.heterocache()["integrity"] == "ok"


def test_used_bytes_while_decoding_are_the_ratios_share(
    server: Server, reference: Reference
) -> None:
    # Until nobody reads them any more.
    with server.stream(reference.ids(PromptSpec("code", 4_000)), 1_000) as chunks:
        # The prompt's rows have gone to memd a few steps later, and staging is free.
        for chunk in chunks:
            if chunk.num_tokens < 10:
                continue
            state = server.heterocache()
            if not state["areas"]["staging"]["used_bytes"]:
                break
    used = {name: area["used_bytes"] for name, area in state["areas"].items()}
    held = used["resident"] + used["watch"] + used["blocks"]
    assert used["staging"] == 0
    assert state["memd"]["pages_used"] > 0
    # Half of the prompt, all of the tail, and blocks that are not full.
    assert 0.48 <= held / state["full_equivalent_bytes"] <= 0.54
