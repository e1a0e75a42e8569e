from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from hetero_sglang.errors import ConfigError, ProfileError
from hetero_sglang.profile import Thresholds
from hetero_sglang.profile.compare import kappa
from hetero_sglang.profiler import (
    Calibration,
    CalibrationText,
    WatchedModel,
    calibration_prompts,
    calibration_texts,
    classify_heads,
    observe,
    profile_model,
    read_text,
    read_texts,
)
from hetero_sglang.profiler.watching import weights_digest

if TYPE_CHECKING:
    from pathlib import Path

TEXT = CalibrationText("words.txt", "the cat sat on the mat and the dog ran to the barn. " * 8)
OTHER = CalibrationText("digits.txt", "0123456789 " * 40)


def settings(**changes: Any) -> Calibration:
    given: dict[str, Any] = {
        "prompt_lengths": (90,),
        "num_decode_steps": 6,
        "top_k": 16,
        # Between the values that the tiny model has, so that several roles come up.
        "thresholds": Thresholds(stable=0.9, similarity=0.55),
    }
    return Calibration(**{**given, **changes})


def attention_by_transformers(
    folder: Path, text: CalibrationText, calibration: Calibration
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `classify_heads` wants, from eager attention that returns everything."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    (num_tokens,) = calibration.prompt_lengths
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
    # Each prompt of 90 tokens counts as one decoded token.
    assert {total for *_, total in told} == {6}
    assert told[-1] == ("done", 6, 6)


def test_every_text_is_read_at_every_length(tiny_model: Path) -> None:
    both = settings(prompt_lengths=(60, 90))
    model = WatchedModel(tiny_model)

    run = observe(model, calibration_prompts(model, [TEXT, OTHER], both.prompt_lengths), both)

    assert [prompt.name for prompt in run.prompts] == [
        f"{name} ({length} tokens)" for name in ("words.txt", "digits.txt") for length in (60, 90)
    ]
    assert {prompt.overlaps.shape for prompt in run.prompts} == {(6, 3, 4)}
    alone = settings(prompt_lengths=(60,))
    expected = observe(model, calibration_prompts(model, [OTHER], (60,)), alone)
    np.testing.assert_array_equal(run.prompts[2].overlaps, expected.prompts[0].overlaps)
    # Pooled: the median over the 24 steps of all four.
    np.testing.assert_array_equal(
        run.profile().stability,
        np.median(np.concatenate([prompt.overlaps for prompt in run.prompts]), axis=0),
    )


def test_a_run_that_was_cut_off_goes_on_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    calibration, saved = settings(), tmp_path / "run.partial"
    model = WatchedModel(tiny_model)
    prompts = calibration_prompts(model, [TEXT, OTHER], calibration.prompt_lengths)

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage.startswith("digits.txt: decoding"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        observe(model, prompts, calibration, progress=interrupt, checkpoint=saved)
    stages: list[str] = []
    # Another process loads the model anew.
    resumed = observe(
        WatchedModel(tiny_model),
        prompts,
        calibration,
        progress=lambda stage, *_: stages.append(stage),
        checkpoint=saved,
    )

    assert not any(stage.startswith("words.txt") for stage in stages)
    assert resumed.profile() == observe(model, prompts, calibration).profile()
    # What is finished needs no run at all, whatever the thresholds are by now.
    stages.clear()
    other = settings(thresholds=Thresholds(stable=0.1, similarity=0.9))
    observe(
        model,
        prompts,
        other,
        progress=lambda stage, *_: stages.append(stage),
        checkpoint=saved,
    )
    assert stages == ["loading the model", "done"]


@pytest.mark.parametrize("changes", [{"top_k": 17}, {"num_decode_steps": 5}])
def test_a_checkpoint_of_another_run_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    saved = tmp_path / "run.partial"
    model = WatchedModel(tiny_model)
    prompts = calibration_prompts(model, [TEXT], (90,))
    observe(model, prompts, settings(), checkpoint=saved)

    with pytest.raises(ConfigError, match=r"run\.partial is of a run with another model, other"):
        observe(model, prompts, settings(**changes), checkpoint=saved)


def test_a_damaged_checkpoint_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "run.partial"
    model = WatchedModel(tiny_model)
    prompts = calibration_prompts(model, [TEXT], (90,))
    observe(model, prompts, settings(), checkpoint=saved)
    saved.write_bytes(saved.read_bytes()[:-100])

    with pytest.raises(ConfigError, match=r"cannot be read .* delete it to start anew"):
        observe(model, prompts, settings(), checkpoint=saved)


def test_agreement_is_over_pairs_of_prompts(tiny_model: Path) -> None:
    calibration = settings()
    model = WatchedModel(tiny_model)
    texts = [TEXT, OTHER, CalibrationText("more.txt", "to be or not to be, " * 30)]
    run = observe(model, calibration_prompts(model, texts, (90,)), calibration)

    found = run.agreement()

    assert found is not None
    alone = {prompt.name: run.profile(prompts=[prompt]) for prompt in run.prompts}
    pairs = [
        (kappa(alone[a], alone[b]), (a, b))
        for a, b in (
            ("words.txt", "digits.txt"),
            ("words.txt", "more.txt"),
            ("digits.txt", "more.txt"),
        )
    ]
    assert found.kappa == pytest.approx(sum(value for value, _ in pairs) / 3)
    assert (found.least_kappa, found.least_pair) == min(pairs)
    assert -1.0 <= found.rank_correlation <= 1.0
    single = observe(model, calibration_prompts(model, [TEXT], (90,)), calibration)
    assert single.agreement() is None


def test_the_digest_of_weights_tells_fine_tunes_apart() -> None:
    weights = {"a": torch.arange(1000.0), "b": torch.ones(3, 4, dtype=torch.bfloat16)}
    digest = weights_digest(weights.items())

    assert digest == weights_digest(reversed(weights.items()))
    tuned = {**weights, "a": weights["a"] * 1.001}
    assert weights_digest(tuned.items()) != digest
    assert weights_digest({**weights, "a": weights["a"].half()}.items()) != digest
    assert weights_digest({**weights, "b": torch.ones(4, 3).bfloat16()}.items()) != digest


def test_a_gpu_that_is_not_there_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(ConfigError, match="device cuda was asked for, but torch sees no GPU"):
        WatchedModel(tiny_model, device="cuda")


def test_a_model_with_sliding_windows_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mistral"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    changes = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, **changes, "sliding_window": 64}))

    with pytest.raises(ConfigError, match="layer 0 attends in a sliding window of 64 tokens"):
        profile_model(folder, settings(), texts=[TEXT])


def test_a_short_text_is_refused_before_the_model_is_loaded(tiny_model: Path) -> None:
    with pytest.raises(ConfigError, match=r"text words.txt has 416 tokens .* needed are 5000"):
        profile_model(tiny_model, settings(prompt_lengths=(5000,)), texts=[TEXT])


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
        ({"top_k": 90}, r"prompt_lengths must be above top_k \(90\), got 90"),
        ({"prompt_lengths": ()}, "prompt_lengths must name at least one length"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_the_defaults_are_the_papers() -> None:
    defaults = Calibration()

    assert (defaults.prompt_lengths, defaults.num_decode_steps) == ((5000,), 100)
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
