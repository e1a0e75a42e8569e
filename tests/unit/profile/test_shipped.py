from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile import (
    HeadProfile,
    HeadRole,
    find_shipped,
    load_profile,
    save_profile,
    shipped_profiles,
)
from hetero_sglang.profile import shipped as shipped_module

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., HeadProfile]

ROOT = Path(__file__).resolve().parents[3]

SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "vocab_size": 49152,
}


def test_every_profile_of_the_repository_is_shipped_and_valid() -> None:
    names = sorted(path.stem for path in (ROOT / "profiles").glob("*.json"))

    assert list(shipped_profiles()) == names
    assert names


def test_every_shipped_file_carries_its_digest_and_provenance() -> None:
    for path in (ROOT / "profiles").glob("*.json"):
        data = json.loads(path.read_text())
        profile = load_profile(path)
        assert data["digest"] == profile.digest
        assert data["fingerprint"] == profile.fingerprint
        assert profile.provenance.model
        assert profile.provenance.text_digest


def test_the_demo_models_profile_is_found_by_its_architecture() -> None:
    profile = find_shipped(SMOLLM2)

    assert profile.origin == "shipped profile smollm2-135m-instruct"
    assert profile.provenance.model == "SmolLM2-135M-Instruct"
    profile.check_fits(SMOLLM2)


def test_the_demo_models_profile_leaves_room_under_half_the_memory() -> None:
    profile = find_shipped(SMOLLM2)

    assert profile.floor <= 0.47
    assert profile.counts[HeadRole.PIVOT] > 0
    assert profile.counts[HeadRole.SATELLITE] > 0


def test_an_unknown_model_is_told_what_there_is() -> None:
    with pytest.raises(ProfileError, match=r"32 query.*shipped are: .*smollm2-135m-instruct \(Ll"):
        find_shipped({**SMOLLM2, "num_attention_heads": 32, "num_key_value_heads": 8})


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(shipped_module, "_folder", lambda: tmp_path)
    return tmp_path


def test_files_that_are_no_json_are_passed_over(
    folder: Path, build_profile: Build, model_config: dict[str, Any]
) -> None:
    (folder / "README.md").write_text("no profile")
    save_profile(build_profile(), folder / "toy.json")

    assert list(shipped_profiles()) == ["toy"]
    assert find_shipped(model_config).origin == "shipped profile toy"


def test_a_damaged_shipped_file_is_named(folder: Path) -> None:
    (folder / "bad.json").write_text("{")

    with pytest.raises(ProfileError, match="shipped profile bad"):
        shipped_profiles()


def test_without_any_shipped_profile_the_message_still_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shipped_module, "_folder", lambda: None)

    with pytest.raises(ProfileError, match=r"shipped are: none.*hetero-sglang profile"):
        find_shipped(SMOLLM2)
