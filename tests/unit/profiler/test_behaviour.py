from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from hetero_sglang.errors import ConfigError, ProfileError
from hetero_sglang.profile import HeadProfile, ModelShape, Provenance
from hetero_sglang.profiler import WatchedModel
from hetero_sglang.profiler.behaviour import watch_behaviour

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

TEXT = "the cat sat on the mat and the dog ran to the barn. " * 2
TOP_K, NUM_STEPS, NUM_BINS = 16, 5, 7

# Satellite (layer, head) to its pivot; layer 1 has no cluster.
PIVOT_OF = {(0, 0): 1, (0, 3): 1, (2, 0): 3}


def profile_of(shape: ModelShape) -> HeadProfile:
    roles = np.array([[4, 3, 1, 4], [1, 2, 1, 2], [4, 2, 1, 3]])
    return HeadProfile(
        model=shape,
        roles=roles,
        allocation=np.isin(roles, [1, 4]).astype(np.float64),
        satellites_of={(0, 1): (0, 3), (2, 3): (0,)},
        provenance=Provenance(model="tiny"),
    )


class Scripted:
    """A model of 3 layers and 4 KV heads whose heads look at random, and that counts what is kept.

    Attributes:
        most_alive: Steps of attention that somebody still held when the next one was asked for.
    """

    name = "scripted"
    dtype = "float32"
    shape = ModelShape(num_layers=3, num_q_heads=4, num_kv_heads=4)

    def __init__(self) -> None:
        self.most_alive = 0

    def tokenize(self, text: str) -> torch.Tensor:
        return torch.zeros(len(text), dtype=torch.int64)

    def digest(self) -> str:
        return ""

    def attention(self, token_ids: torch.Tensor, num_steps: int) -> Iterator[torch.Tensor]:
        random = torch.Generator().manual_seed(0)
        given: list[weakref.ref[torch.Tensor]] = []
        for _ in range(num_steps + 1):
            step = torch.rand(3, 4, len(token_ids), generator=random).softmax(dim=-1)
            given.append(weakref.ref(step))
            yield step
            del step
            self.most_alive = max(self.most_alive, sum(ref() is not None for ref in given))


def eager_attention(folder: Path, token_ids: torch.Tensor) -> list[NDArray[np.float64]]:
    """Probabilities over the prompt by step, [num_layers, num_kv_heads, num_tokens] each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    num_tokens = len(token_ids)
    token_ids = token_ids[None]
    steps = []
    with torch.inference_mode():
        for _ in range(NUM_STEPS + 1):
            output = model(token_ids, output_attentions=True)
            rows = [layer[0, :, -1, :num_tokens] for layer in output.attentions]
            steps.append(
                torch.stack(rows).reshape(3, 4, 3, num_tokens).mean(dim=2).double().numpy()
            )
            token_ids = torch.cat([token_ids, output.logits[:, -1:].argmax(dim=-1)], dim=1)
    return steps


def best_positions(row: NDArray[np.float64]) -> set[int]:
    pooled = np.convolve(row, np.full(5, 0.2), mode="same")
    return set(np.argsort(-pooled, kind="stable")[:TOP_K].tolist())


def test_the_run_records_what_eager_attention_shows(tiny_model: Path) -> None:
    model = WatchedModel(tiny_model)
    prompt = model.tokenize(TEXT)[:90]

    found = watch_behaviour(
        model, prompt, profile_of(model.shape), top_k=TOP_K, num_steps=NUM_STEPS, num_bins=NUM_BINS
    )

    steps = eager_attention(tiny_model, prompt)
    assert (found.num_prompt_tokens, found.top_k, found.num_steps) == (90, TOP_K, NUM_STEPS)
    assert found.overlap_by_chance == pytest.approx(TOP_K / 90)
    # A position on the edge of a set may fall to the other side by rounding.
    one_position, its_mass = 1.01 / TOP_K, 0.02
    for step, attention in enumerate(steps):
        for layer, head in np.ndindex(3, 4):
            row = attention[layer, head]
            own = best_positions(row)
            if step > 0:
                common = own & best_positions(steps[0][layer, head])
                assert found.overlap_with_prompt[step - 1, layer, head] == pytest.approx(
                    len(common) / TOP_K, abs=one_position
                )
            masses = [
                sum(row[p] for p in range(90) if p * 7 // 90 == bin_id) for bin_id in range(7)
            ]
            assert found.mass_by_bin[step, layer, head] == pytest.approx(masses, abs=1e-5)
            pairs = (
                found.overlap_with_pivot[step, layer, head],
                found.mass_on_pivot[step, layer, head],
                found.mass_on_own[step, layer, head],
            )
            if (layer, head) not in PIVOT_OF:
                assert np.isnan(pairs).all()
                continue
            pivots = best_positions(attention[layer, PIVOT_OF[layer, head]])
            assert pairs[0] == pytest.approx(len(own & pivots) / TOP_K, abs=one_position)
            assert pairs[1] == pytest.approx(sum(row[p] for p in pivots), abs=its_mass)
            assert pairs[2] == pytest.approx(sum(row[p] for p in own), abs=its_mass)


def test_mass_at_the_prompts_end_is_whole_and_decoded_tokens_take_from_it(tiny_model: Path) -> None:
    model = WatchedModel(tiny_model)

    found = watch_behaviour(
        model, model.tokenize(TEXT), profile_of(model.shape), top_k=TOP_K, num_steps=NUM_STEPS
    )

    assert found.mass_by_bin.shape == (NUM_STEPS + 1, 3, 4, 64)
    assert found.mass_by_bin.dtype == np.float32
    totals = found.mass_by_bin.sum(axis=-1)
    np.testing.assert_allclose(totals[0], 1.0, rtol=1e-5)
    assert (totals[1:] < 1.0 + 1e-5).all()
    assert totals[1:].mean() < 0.99


def test_a_profile_without_satellites_has_no_pairs() -> None:
    model = Scripted()
    roles = np.full((3, 4), 2)
    profile = HeadProfile(
        model=model.shape, roles=roles, allocation=np.zeros((3, 4)), satellites_of={}
    )

    found = watch_behaviour(model, model.tokenize("x" * 40), profile, top_k=8, num_steps=2)

    assert np.isnan(found.overlap_with_pivot).all()
    assert found.overlap_with_pivot.shape == (3, 3, 4)
    assert np.isfinite(found.overlap_with_prompt).all()


def test_no_more_than_one_step_of_attention_is_kept() -> None:
    model = Scripted()

    watch_behaviour(model, model.tokenize("x" * 40), profile_of(model.shape), top_k=8, num_steps=20)

    assert model.most_alive == 1


def test_a_prompt_with_fewer_tokens_than_stretches_has_one_for_each_token() -> None:
    model = Scripted()
    prompt = model.tokenize("x" * 12)

    found = watch_behaviour(model, prompt, profile_of(model.shape), top_k=4, num_steps=1)

    expected = torch.stack(list(model.attention(prompt, 1)))
    np.testing.assert_allclose(found.mass_by_bin, expected.numpy())


def test_progress_counts_passes_through_the_model() -> None:
    told: list[tuple[str, int, int]] = []
    model = Scripted()

    watch_behaviour(
        model,
        model.tokenize("x" * 40),
        profile_of(model.shape),
        top_k=8,
        num_steps=3,
        progress=lambda *step: told.append(step),
    )

    assert told[0] == ("reading the prompt", 0, 4)
    assert told[1:] == [("decoding", done, 4) for done in (1, 2, 3, 4)]


def test_a_profile_of_other_heads_is_refused() -> None:
    model = Scripted()
    other = HeadProfile(
        model=ModelShape(num_layers=2, num_q_heads=8, num_kv_heads=8),
        roles=np.full((2, 8), 2),
        allocation=np.zeros((2, 8)),
        satellites_of={},
        provenance=Provenance(model="other"),
    )

    with pytest.raises(
        ProfileError,
        match="profile of other has 2 layers of 8 KV heads, model scripted has 3 of 4",
    ):
        watch_behaviour(model, model.tokenize("x" * 40), other, top_k=8, num_steps=1)


@pytest.mark.parametrize(
    ("top_k", "num_steps", "num_bins", "message"),
    [
        (0, 1, 1, "top_k must be at least 1, got 0"),
        (8, 0, 1, "num_steps must be at least 1, got 0"),
        (8, 1, 0, "num_bins must be at least 1, got 0"),
        (40, 1, 1, r"more than top_k \(40\) tokens, got 40"),
    ],
)
def test_numbers_out_of_range_are_refused(
    top_k: int, num_steps: int, num_bins: int, message: str
) -> None:
    model = Scripted()

    with pytest.raises(ConfigError, match=message):
        watch_behaviour(
            model,
            model.tokenize("x" * 40),
            profile_of(model.shape),
            top_k=top_k,
            num_steps=num_steps,
            num_bins=num_bins,
        )
