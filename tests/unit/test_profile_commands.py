"""`hetero-sglang profile show|diff|import`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from hetero_sglang import cli
from hetero_sglang.profile import HeadRole, load_profile, save_profile, shipped_profiles
from hetero_sglang.profile_commands import (
    RoleChange,
    budget_rows,
    kappa,
    rank_correlation,
    role_changes,
)
from tests.unit.profile.test_published import published

if TYPE_CHECKING:
    from pathlib import Path

NAME = "smollm2-135m-instruct"


def test_budgets_of_a_prompt_under_each_preset() -> None:
    rows = budget_rows(shipped_profiles()[NAME], 10_000, [0.3, 0.5, 1.0])
    found = {(row.preset, row.ratio): row for row in rows}
    assert len(found) == 6
    # 30 pivots' int8 keys are 66 bytes of a row's 256.
    held = 2 + 30 * 66 / 256
    assert found["default", 0.3].base == int((27 - held) * 10_000 / 88)
    assert found["default", 0.3].floor == pytest.approx(held / 90)
    full = 90 * 10_000 * 256
    for ratio in (0.3, 0.5):
        num_bytes = found["default", ratio].num_bytes
        assert num_bytes is not None
        # Rounding down loses less than two tokens a head.
        assert ratio * full - 2 * 88 * 256 < num_bytes <= ratio * full
    assert found["default", 1.0].num_bytes == full
    assert found["paper", 0.3].base is None
    assert found["paper", 0.5].base == int(13 * 10_000 / 58)
    # The paper's formula drops something even at 1.
    assert found["paper", 1.0].least < 10_000


def test_show_prints_roles_clusters_and_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", "show", NAME, "--prompt-tokens", "8192", "--ratios", "0.3,0.5"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "90 KV heads: 0 anchor, 2 volatile, 30 pivot, 58 satellite" in text
    assert "10.8% with --kv-policy-preset default, 35.6% with --kv-policy-preset paper" in text
    assert "  17  0 > 2   v: 1" in text
    assert "A prompt of 8,192 tokens" in text
    assert "not above the floor" in text


def test_diff_names_the_heads_that_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    source = shipped_profiles()[NAME]
    save_profile(source, path)
    data = json.loads(path.read_text())
    del data["digest"]
    # Head 17.1 becomes the second satellite of pivot 17.0, with the mean weight.
    data["roles"][17][1] = 4
    data["allocation"][17][1] = 1.0
    next(c for c in data["satellites_of"] if c["layer"] == 17)["satellites"] = [1, 2]
    path.write_text(json.dumps(data))
    changes = role_changes(source, load_profile(path))
    assert changes == [RoleChange(17, 1, HeadRole.VOLATILE, HeadRole.SATELLITE)]
    assert cli.main(["profile", "diff", NAME, str(path)]) == 0
    text = capsys.readouterr().out
    assert "1 of 90 heads have other roles" in text
    assert "1 volatile -> satellite" in text
    assert "17.1" in text
    assert f"kappa of the roles: {kappa(source, load_profile(path)):.3f}" in text
    assert "Rank correlation of the stability: 1.000" in text
    assert "with other satellites: 1" in text
    assert cli.main(["profile", "diff", NAME, NAME]) == 0
    assert "The roles of all 90 heads agree" in capsys.readouterr().out


def test_kappa_is_agreement_beyond_chance() -> None:
    source = shipped_profiles()[NAME]
    assert kappa(source, source) == 1.0
    # Layers in reverse: most heads keep their role, and the counts stay as they are.
    turned = dataclasses.replace(
        source,
        roles=source.roles[::-1],
        allocation=source.allocation[::-1],
        satellites_of={(29 - layer, h): s for (layer, h), s in source.satellites_of.items()},
    )
    agreed = float((source.roles == turned.roles).mean())
    chance = (2**2 + 30**2 + 58**2) / 90**2
    assert kappa(source, turned) == pytest.approx((agreed - chance) / (1 - chance))
    assert 0 < kappa(source, turned) < 1


def test_rank_correlation_shares_ranks_among_equals() -> None:
    values = np.array([[0.1, 0.4], [0.2, 0.9]])
    assert rank_correlation(values, values**3) == pytest.approx(1.0)
    assert rank_correlation(values, -values) == pytest.approx(-1.0)
    # Ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3.
    tied = rank_correlation(np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5.0))
    assert np.isnan(rank_correlation(np.ones(4), np.arange(4.0)))


def test_import_writes_a_profile_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, config, out = (tmp_path / name for name in ("p.json", "config.json", "out.json"))
    source.write_text(json.dumps(published()))
    config.write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "num_hidden_layers": 2,
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "hidden_size": 512,
                "vocab_size": 1000,
            }
        )
    )
    words = ["profile", "import", str(source), "--model-config", str(config), "--out", str(out)]
    assert cli.main([*words, "--name", "toy"]) == 0
    profile = load_profile(out)
    assert profile.model.head_dim == 64
    assert profile.provenance.model == "toy"
    assert "8 KV heads: 2 anchor, 1 volatile, 2 pivot, 3 satellite" in capsys.readouterr().out

    config.write_text(
        config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3')
    )
    out.unlink()
    assert cli.main(words) == 1
    assert "each of the model's 3 layers" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("profile", 2, "required: --model, --out"),
        ("profile --model x", 2, "required: --out"),
        ("profile show nothing.json", 1, "cannot read profile nothing.json"),
        (f"profile show {NAME} --prompt-tokens 0", 1, "--prompt-tokens must be at least 1, got 0"),
        (f"profile show {NAME} --ratios 0.5,2", 2, "--ratios"),
        (f"profile diff {NAME} nothing.json", 1, "cannot read profile nothing.json"),
    ],
)
def test_wrong_usage_is_refused(
    words: str, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = cli.main(words.split())
    except SystemExit as exit_:
        found = exit_.code  # type: ignore[assignment]
    assert found == code
    assert message in capsys.readouterr().err
