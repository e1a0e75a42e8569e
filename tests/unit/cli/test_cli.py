from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import hetero_sglang
from hetero_sglang import cli, demo_model
from hetero_sglang.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


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
        "for words in (['--help'], ['profile', '--help'], ['profile', 'sweep', '--help']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'transformers', 'sglang', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)

    assert done.returncode == 0, done.stderr.decode()


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
