"""`hetero-sglang profile show|diff`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hetero_sglang import cli
from hetero_sglang.profile import (
    HeadRole,
    load_profile,
    save_profile,
    shard_profile,
    shipped_profiles,
)
from hetero_sglang.profile.compare import RoleChange, kappa, role_changes

if TYPE_CHECKING:
    from pathlib import Path

NAME = "smollm2-135m-instruct"


def test_show_prints_roles_clusters_and_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["profile", "show", NAME, "--prompt-tokens", "8192", "--ratios", "0.3,0.5"]
    assert cli.main(words) == 0
    text = capsys.readouterr().out
    assert "90 KV heads: 0 anchor, 2 volatile, 30 pivot, 58 satellite" in text
    assert "10.8% with --kv-policy-preset default, 35.6% with --kv-policy-preset paper" in text
    assert "  17  0 > 2   v: 1" in text
    assert "A prompt of 8,192 tokens" in text
    assert "not above the floor" in text


def test_show_splits_a_profile_over_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "show", NAME, "--ranks", "3"]) == 0
    text = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in text.splitlines() if line.startswith("│")]
    table = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}
    assert table["whole"] == ["0", "2", "30", "58", "10.8%", "35.6%"]
    whole = shipped_profiles()[NAME]
    for rank in range(3):
        part = shard_profile(whole, rank, 3)
        assert [int(cell) for cell in table[str(rank)][:4]] == list(part.counts.values())
        assert table[str(rank)][5] == f"{part.floor:.1%}"

    assert cli.main(["profile", "show", NAME, "--ranks", "2"]) == 1
    assert "num_ranks" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("profile", 2, "required: --model, --out"),
        ("profile --model x", 2, "required: --out"),
        ("profile show nothing.json", 1, "cannot read profile nothing.json"),
        (f"profile show {NAME} --prompt-tokens 0", 1, "--prompt-tokens must be at least 1, got 0"),
        (f"profile show {NAME} --ratios 0.5,2", 1, "--ratios must be above 0 and at most 1, got 2"),
        (f"profile show {NAME} --ratios 0.5,x", 2, "argument --ratios: invalid"),
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
