"""`hetero-sglang profile`: the command that makes one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from hetero_sglang import cli
from hetero_sglang.profile import Thresholds, load_profile
from hetero_sglang.profiler import Calibration, read_text
from hetero_sglang.profiler import calibration as calibration_module

if TYPE_CHECKING:
    from pathlib import Path

SHOWN_DEFAULTS: dict[str, Any] = {
    "--tokens": lambda c: c.prompt_lengths[0],
    "--steps": lambda c: c.num_decode_steps,
    "--top-k": lambda c: c.top_k,
    "--stable-threshold": lambda c: c.thresholds.stable,
    "--similarity-threshold": lambda c: c.thresholds.similarity,
    "--dtype": lambda c: c.dtype,
    "--device": lambda c: c.device,
}


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "letters.txt").write_text("the quick brown fox jumps over the lazy dog. " * 5)
    (folder / "numbers.txt").write_text("3.14159 2.71828 1.41421 " * 10)
    return folder


def words(model: Path, texts: Path, out: Path, *more: str) -> list[str]:
    options = ["profile", "--model", str(model), "--text", str(texts), "--out", str(out)]
    return [*options, "--tokens", "60", "--steps", "4", "--top-k", "16", *more]


def test_the_defaults_in_the_help_are_those_of_a_calibration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["profile", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    shown = {
        name: re.search(rf"{name} [A-Z]+ .*?\(default: ([^)]*)\)", text) for name in SHOWN_DEFAULTS
    }

    defaults = Calibration()
    assert {name: match[1] for name, match in shown.items() if match} == {
        name: str(read(defaults)) for name, read in SHOWN_DEFAULTS.items()
    }


def test_profile_writes_a_file_sums_it_up_and_says_whether_texts_agree(
    tiny_model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"

    assert cli.main(words(tiny_model, texts, out, "--similarity-threshold", "0")) == 0

    profile = load_profile(out)
    text = capsys.readouterr().out
    assert "12 KV heads: 0 anchor, 0 volatile, 3 pivot, 9 satellite" in text
    assert "--kv-policy-ratio must be above the floor (16-bit KV): " in text
    assert "25.0% with --kv-policy-preset paper" in text
    assert profile.digest[:16] in text
    # With one cluster a layer both texts give the same roles.
    assert (
        "agreement of the 2 prompts, each taken alone: Cohen's kappa of roles 1.00 (least 1.00: "
        "letters.txt and numbers.txt), rank correlation of stability "
    ) in text
    assert [path.name for path in tmp_path.iterdir() if path != texts] == ["p.json"]


def test_profile_does_what_its_options_say(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.json"
    more = ["--stable-threshold", "0.4", "--similarity-threshold", "0.6", "--name", "mine"]

    command = words(tiny_model, texts, out, *more, "--dtype", "bfloat16", "--device", "cpu")
    assert cli.main([*command, "--tokens", "50,60"]) == 0

    profile = load_profile(out)
    assert profile.thresholds == Thresholds(stable=0.4, similarity=0.6)
    made = profile.provenance
    assert (made.model, made.dtype, made.top_k) == ("mine", "bfloat16", 16)
    assert (made.num_prompt_tokens, made.num_decode_steps) == (60, 4)
    assert made.texts == tuple(
        f"{name}.txt ({length} tokens)" for name in ("letters", "numbers") for length in (50, 60)
    )


def test_a_run_that_is_cut_off_leaves_no_profile_and_goes_on_when_repeated(
    tiny_model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p.json"
    original, began = calibration_module.HeadObserver.begin_prompt, []

    def begin(self: Any, probabilities: Any) -> None:
        began.append(1)
        if len(began) == 2:
            raise KeyboardInterrupt
        original(self, probabilities)

    monkeypatch.setattr(calibration_module.HeadObserver, "begin_prompt", begin)
    assert cli.main(words(tiny_model, texts, out)) == 130
    assert not out.exists()
    assert (tmp_path / "p.json.partial").exists()

    began.append(1)  # the interrupt is over
    assert cli.main(words(tiny_model, texts, out)) == 0
    # Of the two texts only the second one was run again.
    assert len(began) == 4
    assert not (tmp_path / "p.json.partial").exists()

    fresh = tmp_path / "fresh.json"
    assert cli.main(words(tiny_model, texts, fresh)) == 0
    assert load_profile(fresh) == load_profile(out)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stable-threshold", "2"], "thresholds.stable must be in [0, 1], got 2.0"),
        (["--tokens", "10"], "prompt_lengths must be above top_k (16), got 10"),
        (["--tokens", "9999"], "text letters.txt has 225 tokens for this model, needed are 9999"),
        (
            ["--tokens", "200", "--steps", "2000"],
            "200 and 2000 decoded tokens do not fit the context",
        ),
        (["--dtype", "int4"], "dtype must be one of auto, float32, bfloat16, float16, got 'int4'"),
        (["--text", "nowhere.txt"], "cannot read text nowhere.txt"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny_model: Path,
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    message: str,
) -> None:
    out = tmp_path / "p.json"

    assert cli.main(words(tiny_model, texts, out, *more)) == 1
    assert message in capsys.readouterr().err
    assert [path for path in tmp_path.iterdir() if path != texts] == []


def test_the_texts_name_is_its_files(texts: Path) -> None:
    assert read_text(texts / "letters.txt").name == "letters.txt"
