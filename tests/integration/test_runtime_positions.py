"""The runtime under a Transformers model: it holds exactly the positions the simulation says.

No server here: the model's attention function calls the runtime's pools, policy and kernels, and
memd's service runs in this process, so that every head's positions can be seen after every step
and a fetch can be held back for an exact number of steps.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from hetero_sglang.cache.blocks import BlockPool
from hetero_sglang.cache.host_store import HostStore
from hetero_sglang.cache.staging import StagingPool
from hetero_sglang.cache.watch import WatchPool, watched_key_bytes
from hetero_sglang.config import HeteroConfig
from hetero_sglang.policy.roles import build_role_tables
from hetero_sglang.prefill import ExtendSpan
from hetero_sglang.profile import load_profile
from hetero_sglang.runtime import HeteroRuntime
from hetero_sglang.simulation.engine import Simulation, Trace, prefill
from hetero_sglang.simulation.method import ANCHOR, PIVOT, SATELLITE, VOLATILE, Method, Profile
from memd.protocol import KVLayout
from memd.testing import FakeMemd

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

ATTENTION_NAME = "heterocache_runtime"
LAYERS, KV_HEADS, GROUP, DIM, VOCAB = 3, 4, 2, 32, 97
CONTEXT, NUM_ROWS, NUM_SLOTS, BLOCK, PAGE = 384, 4, 700, 8, 16
INTERVAL, NUM_TOKENS = 5, 33


@dataclass(frozen=True)
class Variant:
    """Settings of the method, and a threshold at which both verdicts occur on this model."""

    ratio: float
    threshold: float
    pivot_rows: str = "all"
    watch_dtype: str = "model"
    window: int = 1
    refresh_share: float = 1.0
    is_filling: bool = True

    @property
    def settings(self) -> dict[str, Any]:
        """For the server's configuration."""
        fields = vars(self).copy()
        fields["drift_threshold"] = fields.pop("threshold")
        return fields


VARIANTS = {
    "all": Variant(0.55, 0.3),
    # So large a share that heads are clamped at the prompt's length.
    "paper": Variant(0.85, 0.75, is_filling=False),
    "budget-model": Variant(0.55, 0.3, "budget"),
    "budget-int8-window": Variant(0.55, 0.45, "budget", "int8", 9, 0.25),
    "budget-int4-window": Variant(0.55, 0.48, "budget", "int4", 9, 0.5),
}
LENGTHS = (150, 101)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
ROLES = (
    (PIVOT, SATELLITE, SATELLITE, ANCHOR),
    (SATELLITE, PIVOT, SATELLITE, VOLATILE),
    (PIVOT, SATELLITE, SATELLITE, PIVOT),
)
SATELLITES = {(0, 0): [1, 2], (1, 1): [0, 2], (2, 0): [1], (2, 3): [2]}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Random weights, attention sharp enough to differ between positions."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=KV_HEADS * GROUP,
        num_key_value_heads=KV_HEADS,
        head_dim=DIM,
        max_position_embeddings=CONTEXT,
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def profile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile with every role, some heads of which are clamped at the prompt's length."""
    rng = random.Random(1)
    weights = [
        [rng.choice((0.4, 1.0, 1.9, 3.0)) if role in (ANCHOR, SATELLITE) else 0.0 for role in row]
        for row in ROLES
    ]
    mean = sum(map(sum, weights)) / sum(w > 0 for row in weights for w in row)
    path = tmp_path_factory.mktemp("profile") / "tiny.json"
    data = {
        "schema_version": 1,
        "model": {
            "num_layers": LAYERS,
            "num_q_heads": KV_HEADS * GROUP,
            "num_kv_heads": KV_HEADS,
            "head_dim": DIM,
        },
        "thresholds": {"stable": 0.5, "similarity": 0.5},
        "provenance": {},
        "roles": ROLES,
        "allocation": [[w / mean for w in row] for row in weights],
        "stability": [[0.5] * KV_HEADS] * LAYERS,
        "satellites_of": [
            {"layer": layer, "pivot": pivot, "satellites": heads}
            for (layer, pivot), heads in SATELLITES.items()
        ],
    }
    path.write_text(json.dumps(data))
    return path


class Engine:
    """Runs requests of a Transformers model over the runtime's pools, one forward at a time."""

    def __init__(
        self, model: PreTrainedModel, profile_path: Path, retrieval: str, variant: str
    ) -> None:
        self.model = model
        settings = VARIANTS[variant]
        share = 0.0
        if settings.pivot_rows == "budget":
            share = watched_key_bytes(settings.watch_dtype, DIM, 4) / (2 * DIM * 4)
        self.tables = tables = build_role_tables(
            load_profile(profile_path), pivot_rows=settings.pivot_rows, watched_share=share
        )
        num_heads = tables.num_compressed
        self.memd = FakeMemd.create(
            KVLayout(num_heads=num_heads, head_dim=DIM, dtype="float32", page_tokens=PAGE),
            num_pages=NUM_SLOTS // PAGE + 1,
            landing_rows=4096,
        )
        self.req_to_token = torch.zeros(NUM_ROWS, CONTEXT, dtype=torch.int32)
        self.lengths = [0] * NUM_ROWS
        # Neither ascending nor adjacent, as in a server that has run for a while.
        self.free_ids = random.Random(5).sample(range(1, NUM_SLOTS + 1), NUM_SLOTS)
        self.spans: list[ExtendSpan] = []
        resident = torch.full((tables.num_planes, NUM_SLOTS + 1, DIM), float("nan"))
        self.runtime = HeteroRuntime(
            tables=tables,
            config=HeteroConfig(
                min_tokens=16,
                drift_interval=INTERVAL,
                block_tokens=BLOCK,
                page_tokens=PAGE,
                landing_rows=4096,
                retrieval=retrieval,
                **settings.settings,
            ),
            k_resident=resident,
            v_resident=resident.clone(),
            blocks=BlockPool(
                num_blocks=num_heads * (CONTEXT // BLOCK + 1) * NUM_ROWS,
                block_tokens=BLOCK,
                head_dim=DIM,
                num_rows=NUM_ROWS,
                num_compressed=num_heads,
                context_tokens=CONTEXT,
                dtype=torch.float32,
                device="cpu",
            ),
            staging=StagingPool(num_heads, CONTEXT, DIM, torch.float32, "cpu"),
            store=HostStore(
                self.memd,
                num_slots=NUM_SLOTS + 1,
                num_heads=num_heads,
                head_dim=DIM,
                page_tokens=PAGE,
                dtype=torch.float32,
            ),
            watch=WatchPool(
                num_pivots=tables.num_pivots,
                num_slots=NUM_SLOTS + 1,
                head_dim=DIM,
                watch_dtype=settings.watch_dtype,
                dtype=torch.float32,
                device="cpu",
            )
            if settings.pivot_rows == "budget"
            else None,
            req_to_token=self.req_to_token,
            group_size=GROUP,
        )

    def prefill(self, row: int, prompt: list[int], chunk: int) -> torch.Tensor:
        """Log-probabilities after a prompt, [vocab]."""
        for start in range(0, len(prompt), chunk):
            tokens = prompt[start : start + chunk]
            end = start + len(tokens)
            self.runtime.begin_prefill(row, len(prompt), end)
            self._take_ids(row, len(tokens))
            self.runtime.allocate(np.array([row]), np.array([end]))
            self.spans = [ExtendSpan(row, 0, start, len(tokens))]
            self.runtime.begin_extend(self.spans)
            logits = self._forward([tokens], [list(range(start, end))])
        return logits[0, -1].log_softmax(-1)

    def decode(self, tokens: dict[int, int]) -> torch.Tensor:
        """Log-probabilities after one more token of each row, [num_rows, vocab]."""
        rows = torch.tensor(list(tokens))
        ids = torch.tensor([self._take_ids(row, 1)[0] for row in tokens])
        lengths = torch.tensor([self.lengths[row] for row in tokens])
        self.runtime.allocate(rows.numpy(), lengths.numpy())
        self.spans = []
        self.runtime.begin_decode(rows, lengths, ids)
        positions = [[self.lengths[row] - 1] for row in tokens]
        logits = self._forward([[token] for token in tokens.values()], positions)
        return logits[:, -1].log_softmax(-1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attention of a layer; q, k, v and the result are [num_reqs, n, heads, D]."""
        runtime = self.runtime
        if self.spans:
            out = runtime.extend_layer(layer, q[0], k[0], v[0], self.spans, scale)
            return out[None]
        out = runtime.decode_layer(layer, *(t[:, 0].contiguous() for t in (q, k, v)), scale)
        return out[:, None]

    def positions(self, row: int) -> dict[tuple[int, int], list[int]]:
        """Prompt positions that each compressed head holds, ascending, from the block pool."""
        blocks = self.runtime.blocks
        flat = blocks.positions.numpy().reshape(-1)
        held = {}
        for layer, heads in enumerate(self.tables.layers):
            for index, head in enumerate(heads.compressed.tolist()):
                cid = heads.first_compressed + index
                count = int(blocks.kept_lens[row, cid])
                addresses = blocks.row_addresses(row, cid, np.arange(count))
                held[layer, head] = sorted(flat[addresses].tolist())
        return held

    def _take_ids(self, row: int, count: int) -> list[int]:
        ids = [self.free_ids.pop() for _ in range(count)]
        start = self.lengths[row]
        self.req_to_token[row, start : start + count] = torch.tensor(ids, dtype=torch.int32)
        self.lengths[row] += count
        return ids

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]], positions: list[list[int]]) -> Tensor:
        restore = self.model.config._attn_implementation
        self.model.set_attn_implementation(ATTENTION_NAME)
        try:
            output = self.model(
                input_ids=torch.tensor(tokens),
                position_ids=torch.tensor(positions),
                use_cache=False,
                engine=self,
            )
        finally:
            self.model.set_attn_implementation(restore)
        logits: Tensor = output.logits
        return logits


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    engine: Engine,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention interface: [num_reqs, heads, n, D] in, heads and n swapped out."""
    q, k, v = (t.transpose(1, 2) for t in (query, key, value))
    return engine.attend(module.layer_idx, q, k, v, scaling), None


AttentionInterface.register(ATTENTION_NAME, _attention)


def make_prompt(num_tokens: int) -> list[int]:
    rng = random.Random(num_tokens)
    return [rng.randrange(VOCAB) for _ in range(num_tokens)]


def simulate(
    model: PreTrainedModel,
    profile_path: Path,
    prompt: list[int],
    landing_steps: int,
    variant: str,
) -> Trace:
    settings = VARIANTS[variant]
    method = Method(
        settings.ratio,
        min_tokens=16,
        drift_interval=INTERVAL,
        drift_threshold=settings.threshold,
        landing_steps=landing_steps,
        has_budgeted_pivots=settings.pivot_rows == "budget",
        watched_bits={"model": 32, "int8": 8, "int4": 4}[settings.watch_dtype],
        window=settings.window,
        refresh_share=settings.refresh_share,
        is_filling=settings.is_filling,
    )
    simulation = Simulation(model, Profile.load(profile_path), method)
    trace = simulation.generate(prefill(model, prompt), NUM_TOKENS)
    # Data on which rounding cannot decide anything, and both verdicts of a check occur.
    assert min(selection.margin for selection in trace.selections) > 1e-5
    assert min(check.distance for check in trace.checks) > 1e-6
    assert min(trace.gaps) > 1e-4
    assert 0 < trace.num_drifts < len(trace.checks)
    return trace


class Follower:
    """One request in the engine, checked against its simulation at every step."""

    def __init__(self, engine: Engine, row: int, prompt: list[int], trace: Trace) -> None:
        self.engine, self.row, self.prompt, self.trace = engine, row, prompt, trace
        self.step = 0

    @property
    def is_done(self) -> bool:
        return self.step == NUM_TOKENS - 1

    def begin(self, chunk: int) -> None:
        logprobs = self.engine.prefill(self.row, self.prompt, chunk)
        self._check(logprobs)

    def next_token(self) -> int:
        return self.trace.tokens[self.step]

    def after_step(self, logprobs: Tensor) -> None:
        self.step += 1
        held = self.engine.positions(self.row)
        assert set(held) == set(self.trace.budget.tokens)
        for head, positions in held.items():
            # What counts in a step is what was decided by the end of the step before.
            selection = self.trace.selection(*head, step=self.step - 1)
            expected = selection.positions.tolist()
            assert positions == expected, f"step {self.step}, head {head}"
        self._check(logprobs)

    def _check(self, logprobs: Tensor) -> None:
        token = self.trace.tokens[self.step]
        assert int(logprobs.argmax()) == token
        assert logprobs[token].item() == pytest.approx(self.trace.logprobs[self.step], abs=1e-4)


def step_all(engine: Engine, followers: list[Follower]) -> None:
    tokens = {f.row: f.next_token() for f in followers}
    for follower, logprobs in zip(followers, engine.decode(tokens), strict=True):
        follower.after_step(logprobs)


# Chunks of 37 leave 2 tokens of the first prompt to its last chunk: the window reaches further.
@every_variant
@pytest.mark.parametrize("chunk", [400, 37], ids=["whole", "chunked"])
def test_sync_retrieval_holds_the_simulations_positions_at_every_step(
    model: PreTrainedModel, profile_path: Path, chunk: int, variant: str
) -> None:
    engine = Engine(model, profile_path, "sync", variant)
    first, second = (
        Follower(engine, row, prompt, simulate(model, profile_path, prompt, 0, variant))
        for row, prompt in zip((1, 3), map(make_prompt, LENGTHS), strict=True)
    )
    first.begin(chunk)
    # Checks of the two fall on different steps.
    for _ in range(3):
        step_all(engine, [first])
    second.begin(chunk)
    while not second.is_done:
        step_all(engine, [f for f in (first, second) if not f.is_done])
    assert engine.runtime.drift.events == sum(
        f.trace.num_drifts - last_step_drifts(f.trace) for f in (first, second)
    )
    finish(engine, [first, second])


@pytest.mark.parametrize("variant", ["all", "budget-int8-window"])
@pytest.mark.parametrize("landing_steps", [1, 2, 4])
def test_async_rows_land_late_and_are_the_simulations(
    model: PreTrainedModel, profile_path: Path, landing_steps: int, variant: str
) -> None:
    engine = Engine(model, profile_path, "async", variant)
    prompts = dict(zip((1, 3), map(make_prompt, LENGTHS), strict=True))
    followers = [
        Follower(engine, row, prompt, simulate(model, profile_path, prompt, landing_steps, variant))
        for row, prompt in prompts.items()
    ]
    # Without this the test could not tell early from late, or a fetch from none.
    for follower in followers:
        refreshes = {s.step for s in follower.trace.selections if s.step}
        assert refreshes <= {5 * i + landing_steps for i in range(1, 7)}
        assert len(refreshes) > 1
        follower.begin(chunk=64)
    for step in range(1, NUM_TOKENS):
        # A check after step t is made when step t + 1 begins; then the fetch is sent.
        since_check = (step - 1) % INTERVAL
        if step > INTERVAL and since_check == landing_steps:
            engine.memd.resume()
        step_all(engine, followers)
        engine.memd.hold()
    engine.memd.resume()
    finish(engine, followers)


def last_step_drifts(trace: Trace) -> int:
    """Drifts after the very last step, which the runtime has no later step to notice in."""
    return sum(c.has_drifted for c in trace.checks if c.step == NUM_TOKENS - 1)


def finish(engine: Engine, followers: list[Follower]) -> None:
    """Free everything; nothing may be left on either side."""
    for follower in followers:
        assert follower.is_done
        engine.runtime.free(follower.row)
    engine.runtime.check_integrity()
    areas = engine.runtime.state()["areas"]
    assert {name: area["used_bytes"] for name, area in areas.items() if name != "landing"} == {
        "staging": 0,
        "blocks": 0,
    }
    engine.memd.check_integrity()
