"""A model with Llama-3.1-8B's heads and its published roles runs at a share far under their floor.

32 layers of 8 KV heads, small and with random weights: what is looked at is that all roles, pools
and checks work at that size and share, and that every token is the simulation's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hetero_sglang.simulation.engine import Simulation, prefill
from hetero_sglang.simulation.method import Method, Profile, held_heads
from tests.server.conftest import Reference, policy_flags
from tests.server.harness import start_server
from tests.simulation.compare import DRIFT_TIE_POSITIONS, Stream, compare

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.server.harness import Server

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.timeout(2000)]

ROLES = Path(__file__).parents[1] / "data" / "llama-3.1-8b-roles.json"
LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 32, 32, 8, 32, 128
VOCAB = 49_152  # of the demo model, whose tokenizer SGLang warms up with
RATIO = 0.15
NUM_TOKENS = 32


@pytest.fixture(scope="module")
def model_dir(demo_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model in Llama-3.1-8B's head layout, with the demo model's tokenizer."""
    directory = tmp_path_factory.mktemp("many-heads") / "model"
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=Q_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        # Sharp attention: with the usual small weights every head would look everywhere alike.
        initializer_range=0.06,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (demo_model_dir / name).exists():
            shutil.copy(demo_model_dir / name, directory)
    return directory


@pytest.fixture(scope="module")
def profile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published roles as a profile of this model."""
    data = json.loads(ROLES.read_text())
    weights = torch.tensor(data["allocation"], dtype=torch.float64)
    mean = weights.sum() / (weights > 0).sum()
    profile = {
        "schema_version": 1,
        "model": {
            "num_layers": LAYERS,
            "num_q_heads": Q_HEADS,
            "num_kv_heads": KV_HEADS,
            "architecture": "LlamaForCausalLM",
            "head_dim": HEAD_DIM,
            "hidden_size": HIDDEN,
            "vocab_size": VOCAB,
        },
        "thresholds": {"stable": 0.5, "similarity": 0.5},
        "provenance": {},
        "roles": data["roles"],
        "allocation": (weights / mean).tolist(),
        "stability": [[0.5] * KV_HEADS] * LAYERS,
        "satellites_of": data["satellites_of"],
    }
    path = tmp_path_factory.mktemp("profile") / "many-heads.json"
    path.write_text(json.dumps(profile))
    return path


@pytest.fixture(scope="module")
def server(
    model_dir: Path, profile_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The model under the default preset."""
    flags = policy_flags(
        *(RATIO, "--kv-policy-profile", str(profile_path), "--kv-policy-retrieval", "sync"),
        *("--kv-policy-drift-threshold", "0.3"),
    )
    directory = tmp_path_factory.mktemp("many-heads-server")
    with start_server(model_dir, directory, *flags, max_total_tokens=8192) as running:
        yield running


@pytest.mark.parametrize("num_tokens", [1_100, 3_000])
def test_the_published_roles_run_at_a_share_of_0_15(
    server: Server, model_dir: Path, profile_path: Path, num_tokens: int
) -> None:
    profile, model = Profile.load(profile_path), Reference(model_dir).model
    method = Method(RATIO, drift_threshold=0.3)
    assert held_heads(profile, Method.paper(RATIO), HEAD_DIM) / 256 > 0.19
    generator = torch.Generator().manual_seed(num_tokens)
    ids = torch.randint(0, VOCAB, (num_tokens,), generator=generator).tolist()
    before = server.heterocache()
    answer = server.generate(ids, NUM_TOKENS, with_logprobs=True)
    server.wait_until_idle()
    after = server.heterocache()
    verdict = compare(
        Simulation(model, profile, method),
        prefill(model, ids),
        Stream(answer.token_ids, answer.logprobs),
    )
    assert verdict.is_accepted, verdict.evidence
    # A verdict that is a tie, and that no later token shows, may be another one.
    events = after["drift"]["events"] - before["drift"]["events"]
    ties = sum(check.distance <= DRIFT_TIE_POSITIONS for check in verdict.trace.checks)
    assert events > 0
    assert abs(events - verdict.trace.num_drifts) <= ties
    assert after["integrity"] == "ok"
    assert after["areas"]["blocks"]["used_bytes"] == 0
