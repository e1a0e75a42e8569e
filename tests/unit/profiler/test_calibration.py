from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from hetero_sglang.errors import ConfigError, ProfileError
from hetero_sglang.profile import Thresholds
from hetero_sglang.profiler import (
    Calibration,
    CalibrationText,
    calibration_texts,
    classify_heads,
    profile_model,
    read_text,
    read_texts,
)

if TYPE_CHECKING:
    from pathlib import Path

TEXT = CalibrationText("words.txt", "the cat sat on the mat and the dog ran to the barn. " * 8)
OTHER = CalibrationText("digits.txt", "0123456789 " * 40)


def settings(**changes: Any) -> Calibration:
    given: dict[str, Any] = {
        "num_prompt_tokens": 90,
        "num_decode_steps": 6,
        "top_k": 16,
        # Between the values that the tiny model has, so that several roles come up.
        "thresholds": Thresholds(stable=0.9, similarity=0.55),
    }
    return Calibration(**{**given, **changes})


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random weights with three query heads for each KV head; tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=8,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def attention_by_transformers(
    folder: Path, text: CalibrationText, calibration: Calibration
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `classify_heads` wants, from eager attention that returns everything."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    num_tokens = calibration.num_prompt_tokens
    token_ids = tokenizer(text.text, return_tensors="pt").input_ids[:, :num_tokens]
    rows = []
    with torch.inference_mode():
        for _ in range(calibration.num_decode_steps + 1):
            output = model(token_ids, output_attentions=True)
            newest = [layer[0, :, -1, :num_tokens] for layer in output.attentions]
            rows.append(torch.stack(newest))  # [num_layers, num_q_heads, num_tokens]
            token_ids = torch.cat([token_ids, output.logits[:, -1:].argmax(dim=-1)], dim=1)
    return rows[0], torch.stack(rows[1:])


def test_the_run_sees_what_eager_attention_returns(tiny_model: Path) -> None:
    calibration = settings()
    prefill, decode = attention_by_transformers(tiny_model, TEXT, calibration)
    expected = classify_heads(
        prefill,
        decode,
        top_k=calibration.top_k,
        stable_threshold=calibration.thresholds.stable,
        similarity_threshold=calibration.thresholds.similarity,
        num_kv_heads=4,
    )

    profile = profile_model(tiny_model, calibration, texts=[TEXT])

    # A position on the edge of a set may fall to the other side by rounding.
    one_position = 1.01 / calibration.top_k
    np.testing.assert_allclose(profile.stability, expected.stability, atol=one_position)
    assert profile.similarity is not None
    assert expected.similarity is not None
    np.testing.assert_allclose(profile.similarity, expected.similarity, atol=one_position)
    np.testing.assert_array_equal(profile.roles, expected.roles)
    assert len(np.unique(profile.roles)) >= 3


def test_two_runs_give_one_profile_with_its_provenance(tiny_model: Path) -> None:
    first = profile_model(tiny_model, settings(name="tiny"), texts=[TEXT, OTHER])
    second = profile_model(tiny_model, settings(name="tiny"), texts=[TEXT, OTHER])

    assert first == second
    assert first.provenance.model == "tiny"
    assert first.provenance.texts == ("words.txt", "digits.txt")
    assert first.provenance.tool.startswith("hetero-sglang ")
    assert len(first.provenance.text_digest) == 64
    assert first.model.is_known


def test_the_models_name_is_that_of_its_directory_by_default(tiny_model: Path) -> None:
    profile = profile_model(tiny_model, settings(num_decode_steps=1), texts=[TEXT])

    assert profile.provenance.model == tiny_model.name


def test_progress_runs_from_nothing_to_all(tiny_model: Path) -> None:
    told: list[tuple[str, int, int]] = []

    profile_model(
        tiny_model,
        settings(num_decode_steps=2),
        texts=[TEXT, OTHER],
        progress=lambda *step: told.append(step),
    )

    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert {total for *_, total in told} == {6}
    assert told[-1] == ("done", 6, 6)


def test_a_short_text_is_refused_before_the_model_is_loaded(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"text words.txt has 416 tokens .* needed are 5000"):
        profile_model(tiny_model, settings(num_prompt_tokens=5000), texts=[TEXT])


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no Transformers model directory"):
        profile_model(tmp_path, settings(), texts=[TEXT])

    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        profile_model(tmp_path, settings(), texts=[TEXT])


def test_a_model_without_kv_heads_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "latent"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "kv_lora_rank": 512}))

    with pytest.raises(ProfileError, match="multi-head latent attention"):
        profile_model(folder, settings(), texts=[TEXT])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_decode_steps": 0}, "num_decode_steps must be at least 1, got 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_k": 90}, r"num_prompt_tokens must be above top_k \(90\), got 90"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_the_defaults_are_the_papers() -> None:
    defaults = Calibration()

    assert (defaults.num_prompt_tokens, defaults.num_decode_steps) == (5000, 100)
    assert defaults.top_k == 1024
    assert defaults.thresholds == Thresholds(stable=0.5, similarity=0.5)


def test_the_shipped_texts_are_of_three_kinds_and_small() -> None:
    texts = calibration_texts()

    assert [text.name for text in texts] == ["code.txt", "conversation.txt", "narrative.txt"]
    assert sum(len(text.text.encode()) for text in texts) <= 100_000
    assert min(len(text.text) for text in texts) > 25_000


def test_a_text_of_the_user_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("größer", encoding="utf-8")

    assert read_text(tmp_path / "mine.txt") == CalibrationText("mine.txt", "größer")


def test_a_text_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("größer".encode("latin-1"))

    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        read_text(tmp_path / "latin.txt")
    with pytest.raises(ConfigError, match="cannot read text"):
        read_text(tmp_path / "none.txt")


def test_a_directory_stands_for_its_text_files_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "notes.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "deeper.txt").mkdir()
    assert [text.name for text in read_texts(tmp_path)] == ["a.txt", "b.txt"]
    assert read_texts(tmp_path / "b.txt") == (CalibrationText("b.txt", "b.txt"),)
    with pytest.raises(ConfigError, match=r"deeper\.txt holds no \.txt file"):
        read_texts(tmp_path / "deeper.txt")
