from __future__ import annotations

from typing import Any

import pytest

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile import ModelShape, fingerprint


@pytest.mark.parametrize("change", [{}, {"head_dim": None}], ids=["missing", "null"])
def test_the_width_of_heads_follows_from_the_hidden_size(
    model_config: dict[str, Any], change: dict[str, Any]
) -> None:
    del model_config["head_dim"]

    assert ModelShape.from_config(model_config | change).head_dim == 16


# Model types by what Transformers makes of a word on query heads and none on KV heads: as many, if
# the field is missing or null ...
IF_ABSENT = [
    *("apertus", "arcee", "cohere", "cohere2", "granite", "granitemoe", "hunyuan_v1_dense"),
    *("llama", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3"),
]
# ... if it is null, while a missing one stands for some checkpoint's number ...
IF_NULL = ["ernie4_5", "minicpm3", "qwen2", "qwen3", "seed_oss", "smollm3"]
# ... never, null being that number too, or refused, or passed on ...
NEVER = [
    "dbrx",
    "exaone4",
    "falcon",
    "gemma3_text",
    "gpt_oss",
    "mistral",
    "qwen3_moe",
    "starcoder2",
]
# ... or there is no such field, since all models of the type have as many.
WITHOUT_FIELD = ["gpt_neox", "opt", "persimmon"]

KV_HEADS = "num_key_value_heads"
NULL = {KV_HEADS: None}
WITH_FIELD = [
    *[(name, change, True) for name in IF_ABSENT for change in ({}, NULL)],
    *[(name, change, change == NULL) for name in IF_NULL for change in ({}, NULL)],
    *[(name, change, False) for name in NEVER for change in ({}, NULL)],
]


@pytest.mark.parametrize(
    ("model_type", "change", "is_mha"),
    [*WITH_FIELD, *[(name, {}, True) for name in WITHOUT_FIELD]],
)
def test_unnamed_kv_heads_are_those_of_the_queries_only_where_the_type_says_so(
    model_config: dict[str, Any], model_type: str, change: dict[str, Any], is_mha: bool
) -> None:
    del model_config["num_key_value_heads"]
    model_config |= {"model_type": model_type, **change}

    if is_mha:
        assert ModelShape.from_config(model_config).num_kv_heads == 8
        return
    with pytest.raises(ProfileError, match=f"model type '{model_type}' does not settle") as caught:
        ModelShape.from_config(model_config)
    assert caught.value.field == "config.num_key_value_heads"
    assert caught.value.value == "nothing"
    assert 'Add "num_key_value_heads" to the model\'s config.json: 8 if' in caught.value.remedy


@pytest.mark.parametrize(("model_type", "change", "is_mha"), WITH_FIELD)
def test_kv_heads_are_filled_in_as_transformers_does(
    model_type: str, change: dict[str, Any], is_mha: bool
) -> None:
    from huggingface_hub.errors import StrictDataclassFieldValidationError
    from transformers import AutoConfig

    # No checkpoint's default is 24.
    fields = {"num_attention_heads": 24, "hidden_size": 384, **change}
    try:
        num_kv_heads = AutoConfig.for_model(model_type, **fields).to_dict().get(KV_HEADS)
    except StrictDataclassFieldValidationError:
        num_kv_heads = None

    assert (num_kv_heads == 24) is is_mha


@pytest.mark.parametrize(
    "kv_heads",
    [
        pytest.param({"model_type": "falcon", "num_kv_heads": 8}, id="falcon"),
        pytest.param({"model_type": "falcon", "multi_query": True}, id="falcon-multi-query"),
        pytest.param({"model_type": "chatglm", "multi_query_group_num": 2}, id="chatglm"),
        pytest.param({"model_type": "dbrx", "attn_config": {"kv_n_heads": 8}}, id="dbrx"),
        pytest.param({}, id="no-type"),
        pytest.param({"model_type": ["llama"]}, id="type-that-is-no-name"),
    ],
)
def test_kv_heads_under_another_name_are_asked_for(
    model_config: dict[str, Any], kv_heads: dict[str, Any]
) -> None:
    del model_config["num_key_value_heads"]

    with pytest.raises(ProfileError, match=r"config.num_key_value_heads must be given, .*, got no"):
        ModelShape.from_config(model_config | kv_heads)
    assert ModelShape.from_config(model_config | kv_heads | {"num_key_value_heads": 2})


@pytest.mark.parametrize(
    ("config", "field"),
    [
        pytest.param(
            {"model_type": "gpt2", "n_head": 12, "n_layer": 12, "n_embd": 768},
            "num_attention_heads",
            id="gpt2",
        ),
        pytest.param(
            {"model_type": "t5", "num_heads": 8, "d_model": 512}, "num_attention_heads", id="t5"
        ),
        pytest.param(
            {"model_type": "mamba", "hidden_size": 768, "num_hidden_layers": 24},
            "num_attention_heads",
            id="mamba",
        ),
        pytest.param(
            {
                "model_type": "bert",
                "hidden_size": 768,
                "num_hidden_layers": 12,
                "num_attention_heads": 12,
            },
            "num_key_value_heads",
            id="bert",
        ),
        pytest.param({}, "num_attention_heads", id="nothing"),
    ],
)
def test_what_is_no_decoder_with_kv_heads_is_refused_by_the_field_it_lacks(
    config: dict[str, Any], field: str
) -> None:
    with pytest.raises(
        ProfileError, match=rf"config\.{field} must be .*, got nothing\. "
    ) as caught:
        ModelShape.from_config({"vocab_size": 1000, **config})
    assert caught.value.field == f"config.{field}"
    assert "KV head" in caught.value.remedy


def test_the_type_of_the_language_part_counts(model_config: dict[str, Any]) -> None:
    del model_config["num_key_value_heads"]
    wrapped = {"model_type": "llava", "text_config": {**model_config, "model_type": "llama"}}

    assert ModelShape.from_config(wrapped).num_kv_heads == 8


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
    with pytest.raises(
        ProfileError, match=r"config.kv_lora_rank names multi-head latent attention.*, got 512"
    ):
        ModelShape.from_config({**model_config, "kv_lora_rank": 512})


def test_latent_attention_of_the_language_part_is_refused_too(
    model_config: dict[str, Any],
) -> None:
    with pytest.raises(ProfileError, match=r"config.kv_lora_rank names multi-head latent"):
        ModelShape.from_config({"text_config": {**model_config, "kv_lora_rank": 512}})


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
