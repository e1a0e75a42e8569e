"""The simulation is trusted to judge servers, so it is checked first, against other code."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hetero_sglang.simulation.engine import Simulation, prefill
from hetero_sglang.simulation.method import (
    ANCHOR,
    NUM_SINKS,
    PIVOT,
    SATELLITE,
    VOLATILE,
    Method,
    Profile,
    best_first,
    boundary_margin,
    head_budgets,
    held_heads,
    median,
    overlap,
    pooled_scores,
    protect,
    quantise,
    watched_key_bits,
    window_scores,
)
from tests.simulation.compare import Stream, compare
from tests.simulation.texts import prompt_ids

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from hetero_sglang.simulation.engine import Prefill


FILLING = functools.partial(Method.paper, min_tokens=0, is_filling=True)
"""Pivots keep all rows and the last query selects; nothing of a budget is lost."""
BUDGETED = functools.partial(Method, min_tokens=0, window=8)
"""Pivots keep a budget and watch with quantised keys; a window selects."""
both_pivot_rows = pytest.mark.parametrize("make", [FILLING, BUDGETED], ids=["all", "budget"])


def make_profile(num_layers: int, num_heads: int, seed: int = 0) -> Profile:
    """Random roles: each layer one pivot with a satellite, the rest anchors and volatile heads."""
    rng = random.Random(seed)
    roles = []
    satellites = {}
    for layer in range(num_layers):
        rest = [rng.choice((ANCHOR, SATELLITE, VOLATILE)) for _ in range(num_heads - 2)]
        row = [PIVOT, SATELLITE, *rest]
        rng.shuffle(row)
        members = tuple(h for h, role in enumerate(row) if role == SATELLITE)
        satellites[layer, row.index(PIVOT)] = members
        roles.append(row)
    compressed = [role in (ANCHOR, SATELLITE) for row in roles for role in row]
    weights = [rng.uniform(0.3, 3) if c else 0.0 for c in compressed]
    scale = sum(compressed) / sum(weights)
    flat = [weight * scale for weight in weights]
    allocation = [flat[i * num_heads : (i + 1) * num_heads] for i in range(num_layers)]
    return Profile(roles, allocation, satellites)


@pytest.fixture(scope="module")
def tiny_model() -> PreTrainedModel:
    """Random weights, sharp attention: 3 layers, 4 KV heads with 2 query heads each."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        initializer_range=0.25,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny_profile() -> Profile:
    return make_profile(3, 4)


@pytest.fixture(scope="module")
def tiny_prompt() -> list[int]:
    rng = random.Random(3)
    return [rng.randrange(97) for _ in range(150)]


class TestBudget:
    def test_ratio_one_keeps_everything(self, tiny_profile: Profile) -> None:
        budget = head_budgets(tiny_profile, FILLING(1.0), 100, 16)
        assert budget.keeps_all
        assert set(budget.tokens.values()) == {100}

    def test_short_prompts_keep_everything(self, tiny_profile: Profile) -> None:
        assert head_budgets(tiny_profile, Method(0.8, min_tokens=101), 100, 16).keeps_all
        assert not head_budgets(tiny_profile, Method(0.8, min_tokens=100), 100, 16).keeps_all

    @both_pivot_rows
    def test_a_ratio_at_the_floor_is_refused(
        self, tiny_profile: Profile, make: functools.partial[Method]
    ) -> None:
        floor = held_heads(tiny_profile, make(0.9), 64) / 12
        with pytest.raises(ValueError, match="floor"):
            head_budgets(tiny_profile, make(floor), 5000, 64)
        assert head_budgets(tiny_profile, make(floor + 0.01), 5000, 64).base > 0

    def test_budgeted_pivots_cost_their_watched_keys_and_get_a_budget(
        self, tiny_profile: Profile
    ) -> None:
        # int8 with one 16-bit scale against K and V of 64 elements of 32 bits.
        assert watched_key_bits(8, 64) == 64 * 8 + 16
        assert watched_key_bits(4, 64) == 64 * 4 + 2 * 16
        share = (64 * 8 + 16) / (2 * 64 * 32)
        volatile = len(tiny_profile.heads(VOLATILE))
        budget = head_budgets(tiny_profile, BUDGETED(0.5), 1000, 64)
        assert len(budget.tokens) == 12 - volatile
        assert budget.base == int((6 - volatile - share * 3) * 1000 / (12 - volatile))
        pivots = [budget.tokens[head] for head in tiny_profile.heads(PIVOT)]
        assert pivots == [pivots[0]] * 3
        # Nobody watches without retrieval, and where everything is kept.
        for free in (BUDGETED(0.5, is_retrieving=False), BUDGETED(1.0)):
            assert free.watched_share(64) == 0

    def test_the_papers_formula_loses_what_a_full_head_leaves(self) -> None:
        profile = Profile([[ANCHOR, ANCHOR]], [[1.5, 0.5]], {})
        budget = head_budgets(profile, Method.paper(0.8), 100, 64)
        assert list(budget.tokens.values()) == [100, 40]

    def test_what_a_full_head_leaves_goes_to_the_others_in_proportion(self) -> None:
        # Base is 50 of 100; the first head would take 125 and leaves 25 for the other three.
        profile = Profile(
            [[PIVOT, SATELLITE, SATELLITE, SATELLITE, SATELLITE]],
            [[0.0, 2.5, 0.6, 0.6, 0.3]],
            {(0, 0): (1, 2, 3, 4)},
        )
        budget = head_budgets(profile, FILLING(0.6), 100, 16)
        assert budget.base == 50
        assert list(budget.tokens.values()) == [100, 40, 40, 20]

    @given(
        weights=st.lists(st.floats(0.05, 8), min_size=1, max_size=40),
        ratio=st.floats(0.05, 1),
        num_prompt=st.integers(1, 9000),
    )
    def test_budgets_spend_what_the_ratio_allows_and_no_more(
        self, weights: list[float], ratio: float, num_prompt: int
    ) -> None:
        count = len(weights)
        mean = sum(weights) / count
        profile = Profile([[ANCHOR] * count], [[w / mean for w in weights]], {})
        budget = head_budgets(profile, FILLING(ratio), num_prompt, 16)
        if int(ratio * num_prompt + 1e-9) < 1:
            assert budget.keeps_all
            return
        spent = sum(budget.tokens.values())
        assert all(0 <= b <= num_prompt for b in budget.tokens.values())
        # Rounding down loses less than one token a head.
        assert budget.base * count - count < spent <= ratio * count * num_prompt + 1e-6


class TestScores:
    def test_pooling_divides_by_five_at_the_edges_too(self) -> None:
        keys = torch.tensor([[0.0], [0.0], [0.0], [0.0], [100.0]])
        scores = pooled_scores(torch.ones(1, 1), keys, 1.0)
        assert scores.tolist() == pytest.approx([0, 0, 0.2, 0.2, 0.2])

    def test_the_best_query_of_the_group_counts(self) -> None:
        keys = 40 * torch.eye(20)
        one, other = keys[3], keys[15]
        both = pooled_scores(torch.stack([one, other]), keys, 1.0)
        single = [pooled_scores(q[None], keys, 1.0) for q in (one, other)]
        assert torch.equal(both, torch.maximum(*single))

    def test_equal_scores_prefer_the_lower_position(self) -> None:
        assert best_first(torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])).tolist() == [1, 3, 4, 0, 2]

    def test_overlap_and_median(self) -> None:
        reference = torch.tensor([5, 1, 9, 3])
        assert overlap(reference, torch.tensor([9, 2, 5, 8])) == 0.5
        assert median([0.1, 0.9, 0.4]) == 0.4
        assert median([0.2, 0.4, 0.0, 0.9]) == pytest.approx(0.3)

    def test_the_boundary_margin_is_zero_at_a_tie_only(self) -> None:
        scores = torch.tensor([4.0, 2.0, 2.0, 1.0])
        order = best_first(scores)
        assert boundary_margin(scores, order, 2) == 0
        assert boundary_margin(scores, order, 1) == pytest.approx(0.5)
        assert boundary_margin(scores, order, 4) == math.inf


class TestWindow:
    def test_the_mean_of_causal_attention_pooled(self) -> None:
        generator = torch.Generator().manual_seed(1)
        queries = torch.randn(3, 2, 4, generator=generator)
        keys = torch.randn(9, 4, generator=generator)
        expected = torch.zeros(9)
        for w, seen in enumerate((7, 8, 9)):
            for g in range(2):
                products = torch.tensor([float(queries[w, g] @ keys[p]) for p in range(seen)])
                expected[:seen] += torch.softmax(products * 0.5, 0) / 6
        pooled = torch.tensor([expected[max(0, p - 2) : p + 3].sum() / 5 for p in range(9)])
        assert torch.allclose(window_scores(queries, keys, 0.5), pooled, atol=1e-6)

    def test_sinks_and_the_window_come_first(self) -> None:
        scores = torch.rand(40, generator=torch.Generator().manual_seed(2))
        order = best_first(protect(scores, 6)).tolist()
        assert order[:10] == [0, 1, 2, 3, 39, 38, 37, 36, 35, 34]
        assert order[10:] == [p for p in best_first(scores).tolist() if 4 <= p < 34]
        assert torch.equal(protect(scores, 1), scores)


class TestQuantise:
    @pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 7)])
    def test_no_element_moves_further_than_half_a_step(self, bits: int, steps: int) -> None:
        keys = torch.randn(50, 64, generator=torch.Generator().manual_seed(3))
        keys[7] = 0
        size = 64 if bits == 8 else 32
        largest = keys.view(50, -1, size).abs().amax(-1, keepdim=True)
        error = (quantise(keys, bits) - keys).view(50, -1, size).abs()
        # The scale itself is rounded by up to one part in 256.
        assert torch.all(error <= largest / steps * 0.5 * 1.01 + largest / 256)
        assert torch.all(quantise(keys, bits)[7] == 0)

    def test_wider_elements_pass(self) -> None:
        keys = torch.randn(5, 64)
        assert quantise(keys, 16) is keys


class TestSimulation:
    def test_full_residency_is_greedy_generation(
        self, tiny_model: PreTrainedModel, tiny_profile: Profile, tiny_prompt: list[int]
    ) -> None:
        trace = Simulation(tiny_model, tiny_profile, BUDGETED(1.0)).generate(
            prefill(tiny_model, tiny_prompt), 40
        )
        assert trace.tokens == greedy(tiny_model, tiny_prompt, 40)
        assert not trace.checks

    @both_pivot_rows
    def test_following_its_own_tokens_repeats_the_run(
        self,
        tiny_model: PreTrainedModel,
        tiny_profile: Profile,
        tiny_prompt: list[int],
        make: functools.partial[Method],
    ) -> None:
        # `follow` takes S tokens at a time, `generate` one.
        prompt = prefill(tiny_model, tiny_prompt)
        simulation = Simulation(tiny_model, tiny_profile, make(0.55))
        one_by_one = simulation.generate(prompt, 33)
        in_chunks = simulation.follow(prompt, one_by_one.tokens)
        assert in_chunks.tokens == one_by_one.tokens
        assert in_chunks.logprobs == pytest.approx(one_by_one.logprobs, abs=1e-4)
        assert [c.overlaps for c in in_chunks.checks] == [c.overlaps for c in one_by_one.checks]
        assert one_by_one.num_drifts > 0
        assert {c.step for c in one_by_one.checks} == {5, 10, 15, 20, 25, 30}

    @both_pivot_rows
    def test_it_computes_what_the_definition_says(
        self,
        tiny_model: PreTrainedModel,
        tiny_profile: Profile,
        tiny_prompt: list[int],
        make: functools.partial[Method],
    ) -> None:
        # Both verdicts occur, and no selection is so near a tie that rounding decides it.
        method = make(0.6, drift_threshold=0.4 if make is FILLING else 0.6)
        trace = Simulation(tiny_model, tiny_profile, method).generate(
            prefill(tiny_model, tiny_prompt), 17
        )
        logprobs, drifts = by_definition(
            tiny_model, tiny_profile, method, tiny_prompt, trace.tokens
        )
        assert [c.has_drifted for c in trace.checks] == drifts
        assert set(drifts) == {True, False}
        assert trace.logprobs == pytest.approx(logprobs, abs=1e-4)

    def test_dropped_positions_have_no_influence(
        self, tiny_model: PreTrainedModel, tiny_profile: Profile, tiny_prompt: list[int]
    ) -> None:
        prompt = prefill(tiny_model, tiny_prompt)
        method = FILLING(0.55, is_retrieving=False)
        simulation = Simulation(tiny_model, tiny_profile, method)
        before = simulation.generate(prompt, 20)
        for selection in before.selections:
            is_dropped = torch.ones(len(tiny_prompt), dtype=torch.bool)
            is_dropped[selection.positions] = False
            spoil(prompt, selection.layer, selection.head, is_dropped.nonzero().flatten())
        assert simulation.generate(prompt, 20).logprobs == before.logprobs
        kept = before.selections[0]
        spoil(prompt, kept.layer, kept.head, kept.positions[-1:])
        assert simulation.generate(prompt, 20).logprobs != before.logprobs

    def test_the_model_is_left_as_it_was(
        self, tiny_model: PreTrainedModel, tiny_profile: Profile, tiny_prompt: list[int]
    ) -> None:
        before = tiny_model.config._attn_implementation
        Simulation(tiny_model, tiny_profile, Method(0.7)).generate(
            prefill(tiny_model, tiny_prompt), 2
        )
        assert tiny_model.config._attn_implementation == before


class TestCompare:
    @pytest.mark.parametrize(
        "changed",
        [
            {"ratio": 0.57},
            {"ratio": 1.0},
            {"drift_interval": 4},
            {"drift_threshold": 0.0},
            {"is_retrieving": False},
            {"has_budgeted_pivots": True},
            {"window": 8},
            {"refresh_share": 0.5},
        ],
        ids=lambda changed: ",".join(changed),
    )
    def test_a_stream_of_another_method_is_rejected(
        self,
        tiny_model: PreTrainedModel,
        tiny_profile: Profile,
        tiny_prompt: list[int],
        changed: dict[str, float],
    ) -> None:
        method = FILLING(0.55)
        prompt = prefill(tiny_model, tiny_prompt)
        right = Simulation(tiny_model, tiny_profile, method)
        wrong = Simulation(tiny_model, tiny_profile, dataclasses.replace(method, **changed))
        theirs = wrong.generate(prompt, 32)
        assert not compare(right, prompt, Stream(theirs.tokens, theirs.logprobs)).is_accepted
        assert compare(wrong, prompt, Stream(theirs.tokens, theirs.logprobs)).is_accepted

    def test_a_near_tie_is_excused_by_deciding_it_the_other_way(
        self, tiny_model: PreTrainedModel, tiny_profile: Profile, tiny_prompt: list[int]
    ) -> None:
        prompt = prefill(tiny_model, tiny_prompt)
        simulation = Simulation(tiny_model, tiny_profile, FILLING(0.55))
        trace = simulation.generate(prompt, 32)
        # The closest call among the verdicts; with a threshold right there it is a tie.
        closest = min(trace.checks, key=lambda c: c.distance)
        threshold = median(list(closest.overlaps)) + 1e-9
        tied = FILLING(0.55, drift_threshold=threshold)
        event = (closest.step, closest.layer, closest.pivot)
        simulation = Simulation(tiny_model, tiny_profile, tied)
        theirs = simulation.variant(inverted={event}).generate(prompt, 32)
        plain = simulation.follow(prompt, theirs.tokens)
        assert plain.logprobs != pytest.approx(theirs.logprobs, abs=1e-2)
        verdict = compare(simulation, prompt, Stream(theirs.tokens, theirs.logprobs))
        assert verdict.is_accepted
        assert "drift tie" in verdict.evidence


def test_a_profile_that_forgets_a_satellite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    cluster = {"layer": 0, "pivot": 0, "satellites": []}
    data = {"roles": [[PIVOT, SATELLITE]], "allocation": [[0, 1]], "satellites_of": [cluster]}
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="every satellite"):
        Profile.load(path)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("source", "length"), [("prose", 5), ("code", 1100)])
def test_full_residency_is_greedy_generation_on_the_demo_model(
    demo_model_dir: Path, source: str, length: int
) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_model_dir, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(demo_model_dir)
    ids = prompt_ids(tokenizer, source, length)
    config = model.config
    profile = make_profile(config.num_hidden_layers, config.num_key_value_heads)
    trace = Simulation(model, profile, Method(1.0)).generate(prefill(model, ids), 24)
    assert trace.tokens == greedy(model, ids, 24)


@torch.inference_mode()
def spoil(prompt: Prefill, layer: int, head: int, positions: torch.Tensor) -> None:
    """Put values where only a head that may look there would notice."""
    prompt.state.layer(layer).values[head, positions] = 1e4


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """Transformers' own greedy generation."""
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        do_sample=False,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def by_definition(
    model: PreTrainedModel,
    profile: Profile,
    method: Method,
    prompt: list[int],
    tokens: list[int],
) -> tuple[list[float], list[bool]]:
    """Log-probability of every token and all drift verdicts, by loops over heads and positions.

    A second, slow and separate writing of the method: no cache (every step recomputes every layer
    from the hidden states it has kept), no batching of queries, sets as Python sets.
    """
    num_prompt, num_heads = len(prompt), profile.num_heads
    budget = head_budgets(profile, method, num_prompt, model.config.head_dim)
    hidden_of: list[list[torch.Tensor]] = [[] for _ in range(profile.num_layers)]
    kept: dict[tuple[int, int], set[int]] = {}
    reference: dict[tuple[int, int], list[int]] = {}
    history: dict[tuple[int, int], list[list[float]]] = {}
    shares: dict[tuple[int, int], list[list[float]]] = {}
    logprobs, verdicts = [], []
    base = model.model
    with torch.inference_mode():
        for position, token in enumerate([*prompt, *tokens[:-1]]):
            hidden = base.embed_tokens(torch.tensor([[token]]))
            for index, block in enumerate(base.layers):
                hidden_of[index].append(block.input_layernorm(hidden)[0, 0])
                bits = {
                    head: method.watched_bits if method.has_budgeted_pivots else 32
                    for layer, head in profile.heads(PIVOT)
                    if layer == index
                }
                attention, scores, means = _attend(
                    model, index, torch.stack(hidden_of[index]), kept, num_prompt, bits
                )
                for head in range(num_heads):
                    history.setdefault((index, head), []).append(scores[head])
                    shares.setdefault((index, head), []).append(means[head])
                hidden = hidden + block.self_attn.o_proj(attention)[None, None]
                hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
            if position == num_prompt - 1:
                for layer, head in budget.tokens:
                    seen = history[layer, head][-1]
                    if method.window > 1:
                        seen = _window_scores(shares[layer, head][-method.window :], num_prompt)
                    elif (layer, head) in profile.heads(PIVOT) and method.has_budgeted_pivots:
                        raise AssertionError("a last query's exact score is not recorded here")
                    order = _ranking(seen, method.window)
                    kept[layer, head] = set(order[: budget.tokens[layer, head]])
                for head in profile.heads(PIVOT):
                    reference[head] = _ranking(history[head][-1])[: budget.base]
            if position >= num_prompt - 1:
                logits = model.lm_head(base.norm(hidden))[0, 0]
                token_id = tokens[position - num_prompt + 1]
                logprobs.append(torch.log_softmax(logits, 0)[token_id].item())
            step = position - num_prompt + 1
            if step > 0 and step % method.drift_interval == 0:
                for pivot, old in reference.items():
                    recent = history[pivot][-method.drift_interval :]
                    tops = [_ranking(scores)[: budget.base] for scores in recent]
                    overlaps = [len(set(old) & set(top)) / len(old) for top in tops]
                    has_drifted = median(overlaps) < method.drift_threshold
                    verdicts.append(has_drifted)
                    if has_drifted:
                        reference[pivot] = tops[-1]
                        followers = list(profile.satellites_of[pivot])
                        if method.has_budgeted_pivots:
                            followers.append(pivot[1])
                        best = _ranking(recent[-1], method.window)
                        for follower in followers:
                            place = (pivot[0], follower)
                            room = budget.tokens[place]
                            first = math.ceil(method.refresh_share * room)
                            # The best come in, then what was held fills the rest, best first.
                            held = [p for p in best[first:] if p in kept[place]]
                            kept[place] = set([*best[:first], *held][:room])
    return logprobs, verdicts


def _ranking(scores: list[float], window: int = 1) -> list[int]:
    """Positions best first; with a window, sinks and then the window from its end come first."""
    num = len(scores)
    rest = sorted(range(num), key=lambda p: (-scores[p], p))
    if window == 1:
        return rest
    first = [*range(NUM_SINKS), *range(num - 1, num - window - 1, -1)]
    return [*first, *(p for p in rest if p not in first)]


def _window_scores(rows: list[list[float]], num_prompt: int) -> list[float]:
    padded = [row + [0.0] * (num_prompt - len(row)) for row in rows]
    mean = [sum(column) / len(rows) for column in zip(*padded, strict=True)]
    return [sum(mean[max(0, p - 2) : p + 3]) / 5 for p in range(num_prompt)]


def _attend(
    model: PreTrainedModel,
    index: int,
    rows: torch.Tensor,
    kept: dict[tuple[int, int], set[int]],
    num_prompt: int,
    watched_bits: dict[int, int],
) -> tuple[torch.Tensor, list[list[float]], list[list[float]]]:
    """Attention of the newest row, [num_q_heads * D], and of each KV head over the prompt: pooled
    scores (of a pivot with its watched keys) and the group's mean probabilities.
    """
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    attention = model.model.layers[index].self_attn
    dim, group = attention.head_dim, attention.num_key_value_groups
    total = len(rows)
    cos, sin = model.model.rotary_emb(rows[None], torch.arange(total)[None])
    q = attention.q_proj(rows).view(1, total, -1, dim).transpose(1, 2)
    k = attention.k_proj(rows).view(1, total, -1, dim).transpose(1, 2)
    v = attention.v_proj(rows).view(1, total, -1, dim).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    outputs, scores, means = [], [], []
    for query_head in range(q.shape[1]):
        head = query_head // group
        seen = [
            p
            for p in range(total)
            if p >= num_prompt or (index, head) not in kept or p in kept[index, head]
        ]
        logits = k[0, head] @ q[0, query_head, -1] * attention.scaling
        outputs.append(torch.softmax(logits[seen], 0) @ v[0, head, seen])
        # Scores are over the prompt alone, whatever the head may see.
        exact = torch.softmax(logits[:num_prompt], 0).tolist()
        watched = quantise(k[0, head, :num_prompt], watched_bits.get(head, 32))
        watched_logits = watched @ q[0, query_head, -1] * attention.scaling
        share = torch.softmax(watched_logits, 0).tolist()
        pooled = [sum(share[max(0, p - 2) : p + 3]) / 5 for p in range(len(share))]
        if query_head % group == 0:
            scores.append(pooled)
            means.append([p / group for p in exact])
        else:
            scores[-1] = [max(a, b) for a, b in zip(scores[-1], pooled, strict=True)]
            means[-1] = [a + b / group for a, b in zip(means[-1], exact, strict=True)]
    return torch.cat(outputs), scores, means
