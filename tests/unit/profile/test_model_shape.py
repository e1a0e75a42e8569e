from __future__ import annotations

from typing import Any

import pytest

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile import ModelShape, fingerprint


def test_missing_head_fields_are_filled_in_as_transformers_does(
    model_config: dict[str, Any],
) -> None:
    del model_config["num_key_value_heads"], model_config["head_dim"]

    shape = ModelShape.from_config(model_config)

    assert (shape.num_kv_heads, shape.head_dim, shape.group_size) == (8, 16, 1)


def test_null_counts_as_missing(model_config: dict[str, Any]) -> None:
    model_config |= {"num_key_value_heads": None, "head_dim": None}

    assert ModelShape.from_config(model_config).num_kv_heads == 8


def test_the_language_part_of_a_multimodal_model_counts(model_config: dict[str, Any]) -> None:
    text = {k: v for k, v in model_config.items() if k != "architectures"}
    wrapped = {"architectures": ["LlavaForConditionalGeneration"], "text_config": text}

    shape = ModelShape.from_config(wrapped)

    assert shape.architecture == "LlavaForConditionalGeneration"
    assert shape.num_heads == 8


def test_the_fingerprint_ignores_what_does_not_shape_heads(model_config: dict[str, Any]) -> None:
    assert fingerprint(model_config) == fingerprint({**model_config, "eos_token_id": 7})
    assert len(fingerprint(model_config)) == 16


@pytest.mark.parametrize(
    "field", ["num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size", "head_dim"]
)
def test_the_fingerprint_tells_shapes_apart(model_config: dict[str, Any], field: str) -> None:
    changed = {**model_config, field: model_config[field] * 2}

    assert fingerprint(model_config) != fingerprint(changed)


@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "8", True])
def test_a_field_that_is_no_positive_number_is_named(
    model_config: dict[str, Any], value: object
) -> None:
    model_config["num_attention_heads"] = value

    with pytest.raises(ProfileError, match=r"config.num_attention_heads must be a positive"):
        ModelShape.from_config(model_config)


def test_latent_attention_is_refused_by_name(model_config: dict[str, Any]) -> None:
    with pytest.raises(ProfileError, match="multi-head latent attention"):
        ModelShape.from_config({**model_config, "kv_lora_rank": 512})


def test_query_heads_that_do_not_divide_into_groups_are_refused(
    model_config: dict[str, Any],
) -> None:
    with pytest.raises(ProfileError, match=r"num_q_heads must be a multiple"):
        ModelShape.from_config({**model_config, "num_key_value_heads": 3})


def test_a_shape_of_numbers_only_is_not_known(model_config: dict[str, Any]) -> None:
    assert ModelShape.from_config(model_config).is_known
    assert not ModelShape(num_layers=1, num_q_heads=2, num_kv_heads=1).is_known
    with pytest.raises(ProfileError, match=r"model.head_dim must not be negative"):
        ModelShape(num_layers=1, num_q_heads=2, num_kv_heads=1, head_dim=-1)
    with pytest.raises(ProfileError, match=r"model.num_layers must be at least 1"):
        ModelShape(num_layers=0, num_q_heads=2, num_kv_heads=1)
