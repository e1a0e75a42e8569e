"""A small valid profile and a way to spoil it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hetero_sglang.profile import HeadProfile, ModelShape, Provenance, Thresholds

if TYPE_CHECKING:
    from collections.abc import Callable

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "hidden_size": 128,
    "vocab_size": 1000,
}


@pytest.fixture
def model_config() -> dict[str, Any]:
    """Configuration of the model that `build_profile` is about."""
    return dict(CONFIG)


@pytest.fixture
def build_profile() -> Callable[..., HeadProfile]:
    """Makes a profile with one head of each role in layer 0 and a whole cluster in layer 1."""

    def build(**changes: Any) -> HeadProfile:
        fields: dict[str, Any] = {
            "model": ModelShape.from_config(CONFIG),
            "roles": np.array([[1, 2, 3, 4], [4, 4, 4, 3]]),
            "allocation": np.array([[0.5, 0, 0, 1.5], [0.75, 1.0, 1.25, 0]]),
            "stability": np.array([[0.9, 0.2, 0.5, 0.6], [0.7, 0.6, 0.5, 1.0]]),
            "satellites_of": {(1, 3): (0, 1, 2), (0, 2): (3,)},
            "thresholds": Thresholds(stable=0.5, similarity=0.5),
            "provenance": Provenance(model="toy", top_k=8, num_prompt_tokens=32, texts=("a.txt",)),
        }
        return HeadProfile(**{**fields, **changes})

    return build
