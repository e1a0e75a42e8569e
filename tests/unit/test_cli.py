from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hetero_sglang
from hetero_sglang import cli, demo_model, profiler
from hetero_sglang.errors import ConfigError
from hetero_sglang.profile import HeadProfile, ModelShape, Thresholds, load_profile
from hetero_sglang.profiler import Calibration, CalibrationText

ROOT = Path(__file__).resolve().parents[2]


def usage_exit_status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_help_lists_the_commands_and_shows_how_to_serve(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert usage_exit_status("--help") == 0

    out = capsys.readouterr().out
    assert "demo-model" in out
    assert "profile" in out
    assert "python -m sglang.launch_server" in out


def test_help_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import sys\n"
        "from hetero_sglang.cli import main\n"
        "try: main(['profile', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'sglang', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=30)

    assert done.returncode == 0, done.stderr.decode()


def test_the_defaults_in_the_help_are_those_of_a_calibration(
    capsys: pytest.CaptureFixture[str],
) -> None:
    usage_exit_status("profile", "--help")
    text = " ".join(capsys.readouterr().out.split())
    shown = {
        name: re.search(rf"{name} [A-Z]+ [^()]*\(default: ([^)]*)\)", text)
        for name in SHOWN_DEFAULTS
    }

    defaults = Calibration()
    assert {name: match[1] for name, match in shown.items() if match} == {
        name: str(read(defaults)) for name, read in SHOWN_DEFAULTS.items()
    }


SHOWN_DEFAULTS: dict[str, Any] = {
    "--tokens": lambda c: c.num_prompt_tokens,
    "--steps": lambda c: c.num_decode_steps,
    "--top-k": lambda c: c.top_k,
    "--stable-threshold": lambda c: c.thresholds.stable,
    "--similarity-threshold": lambda c: c.thresholds.similarity,
    "--dtype": lambda c: c.dtype,
}


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str]) -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert pyproject["project"]["version"] == hetero_sglang.__version__
    assert usage_exit_status("--version") == 0
    assert capsys.readouterr().out == f"hetero-sglang {hetero_sglang.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [(), ("unknown",), ("demo-model",), ("profile", "--model", "x")]
)
def test_wrong_usage_is_explained(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert usage_exit_status(*arguments) == 2
    assert "usage: hetero-sglang" in capsys.readouterr().err


def test_a_refusal_is_one_line_on_stderr(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("no GGUF file; install it")

    monkeypatch.setattr(demo_model, "make_demo_model", refuse)

    assert cli.main(["demo-model", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err == "hetero-sglang: error: no GGUF file; install it\n"
    assert not captured.out


def test_an_interrupt_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_model, "make_demo_model", interrupt)

    assert cli.main(["demo-model", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "hetero-sglang: interrupted\n"


@pytest.mark.parametrize(("is_new", "state"), [(True, "made"), (False, "already complete")])
def test_demo_model_says_what_it_did_and_each_stage_once(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    is_new: bool,
    state: str,
) -> None:
    def make(out: Path, *, progress: Any) -> demo_model.DemoModel:
        for done in range(3):
            progress("converting tensors", done, 2)
        return demo_model.DemoModel(out, is_new=is_new, num_bytes=272_000_000)

    monkeypatch.setattr(demo_model, "make_demo_model", make)

    assert cli.main(["demo-model", "--out", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path}: {state}, 272 MB\n"
    assert captured.err == "converting tensors\n"


class _Recorder:
    """Stands in for `profile_model` and remembers how it was called."""

    def __call__(self, model: Path, calibration: Calibration, **others: Any) -> HeadProfile:
        self.model, self.calibration, self.texts = model, calibration, others["texts"]
        return profiler.assign_roles(
            np.array([[0.9, 0.8, 0.2]]),
            np.array([[[1, 0.9, 0.1], [0.9, 1, 0.1], [0.1, 0.1, 1]]]),
            model=ModelShape(num_layers=1, num_q_heads=3, num_kv_heads=3),
            thresholds=calibration.thresholds,
            provenance=profiler.calibration.Provenance(),
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> _Recorder:
    recorder = _Recorder()
    monkeypatch.setattr(profiler, "profile_model", recorder)
    return recorder


def test_profile_writes_a_file_and_sums_it_up(
    recorder: _Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "p.json"

    assert cli.main(["profile", "--model", "some/dir", "--out", str(out)]) == 0

    assert recorder.calibration == Calibration()
    assert recorder.texts == []
    profile = load_profile(out)
    text = capsys.readouterr().out
    assert "3 KV heads: 0 anchor, 1 volatile, 1 pivot, 1 satellite" in text
    assert "--kv-policy-ratio must be above the floor (16-bit KV): " in text
    assert "66.7% with --kv-policy-preset paper" in text
    assert profile.digest[:16] in text


def test_profile_passes_every_option_on(recorder: _Recorder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    options = [
        *("--model", "m", "--tokens", "300", "--steps", "7", "--top-k", "50"),
        *("--stable-threshold", "0.4", "--similarity-threshold", "0.6"),
        *("--dtype", "bfloat16", "--name", "mine"),
    ]
    paths = [f"--text={tmp_path / 'a.txt'}", f"--text={tmp_path / 'b.txt'}"]

    assert cli.main(["profile", *options, *paths, "--out", str(tmp_path / "p.json")]) == 0

    assert recorder.calibration == Calibration(
        num_prompt_tokens=300,
        num_decode_steps=7,
        top_k=50,
        thresholds=Thresholds(stable=0.4, similarity=0.6),
        dtype="bfloat16",
        name="mine",
    )
    assert recorder.texts == [CalibrationText("a.txt", "a"), CalibrationText("b.txt", "b")]


def test_a_threshold_out_of_range_is_refused(
    recorder: _Recorder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["profile", "--model", "m", "--out", str(tmp_path / "p"), "--stable-threshold", "2"]

    assert cli.main(arguments) == 1
    assert "thresholds.stable must be in [0, 1], got 2.0" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
