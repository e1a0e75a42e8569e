"""`hetero-sglang profile report`: what it asks for, what it refuses, what it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from hetero_sglang import cli
from hetero_sglang.profile import HeadProfile, Provenance, save_profile
from hetero_sglang.profiler import WatchedModel

if TYPE_CHECKING:
    from pathlib import Path

NAME = "smollm2-135m-instruct"
TEXT = "the cat sat on the mat and the dog ran to the barn. " * 4


@pytest.fixture
def profile(tiny_model: Path, tmp_path: Path) -> Path:
    """A profile of the tiny model that compares 16 best positions."""
    roles = np.array([[4, 3, 1, 2]] * 3)
    path = tmp_path / "tiny.json"
    made = HeadProfile(
        model=WatchedModel(tiny_model).shape,
        roles=roles,
        allocation=np.isin(roles, [1, 4]).astype(np.float64),
        satellites_of={(layer, 1): (0,) for layer in range(3)},
        provenance=Provenance(model="tiny", top_k=16),
    )
    save_profile(made, path)
    return path


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "pages" / "page.html"


def report(*words: object) -> int:
    return cli.main(["profile", "report", *map(str, words)])


def test_a_profile_alone_becomes_a_page(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(NAME, "--html", out) == 0

    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "Attention while decoding" not in out.read_text(encoding="utf-8")
    assert f"{out}: written" in capsys.readouterr().out
    # Nothing is left of the writing.
    assert list(out.parent.iterdir()) == [out]


def test_a_model_and_a_prompt_add_what_heads_did(
    tiny_model: Path,
    profile: Path,
    prompt: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--model", tiny_model, "--prompt", prompt, "--tokens", 90, "--steps", 3]

    assert report(profile, *options, "--html", out) == 0

    page = out.read_text(encoding="utf-8")
    assert "One more prompt of 90 tokens was read and 3 tokens decoded" in page
    # The size of the sets is the profile's.
    assert "Of a head's 16 best positions" in page
    assert "Is the pivot representative?" in page
    assert str(tiny_model) not in page
    assert str(prompt) not in page
    assert capsys.readouterr().err.split("\n")[:2] == ["reading the prompt", "decoding"]


def test_a_short_text_is_read_whole(
    tiny_model: Path, profile: Path, prompt: Path, out: Path
) -> None:
    options = ["--model", tiny_model, "--prompt", prompt, "--steps", 1]

    assert report(profile, *options, "--html", out) == 0

    assert f"prompt of {len(TEXT)} tokens" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "p.txt"], "--prompt needs the model that reads it; add --model DIR"),
        (["--model", "m"], "--model needs a text to read; add --prompt FILE"),
        (["--tokens", "90"], "--tokens is about running a model; add --model DIR and --prompt"),
        (["--steps", "9"], "--steps is about running a model"),
        (["--dtype", "float32"], "--dtype is about running a model"),
        (["--device", "cpu"], "--device is about running a model"),
    ],
)
def test_a_part_of_what_a_run_needs_is_refused_by_name(
    options: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(NAME, *options, "--html", out) == 1

    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", 16], "--tokens must be above the 16 best positions"),
        (["--tokens", 500], f"has {len(TEXT)} tokens for this model, needed are 500; give a long"),
        (["--steps", 0], "num_steps must be at least 1, got 0"),
        (["--device", "tpu"], "device must be one of"),
    ],
)
def test_numbers_out_of_range_are_refused(
    options: list[object],
    message: str,
    tiny_model: Path,
    profile: Path,
    prompt: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = ["--model", tiny_model, "--prompt", prompt, *options]

    assert report(profile, *run, "--html", out) == 1

    assert message in capsys.readouterr().err


def test_a_text_no_longer_than_the_compared_sets_is_refused(
    tiny_model: Path,
    profile: Path,
    tmp_path: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("sixteen letters.")

    assert report(profile, "--model", tiny_model, "--prompt", short, "--html", out) == 1

    assert "has 16 tokens for this model, needed are 17" in capsys.readouterr().err


def test_a_profile_of_another_model_is_refused(
    tiny_model: Path, prompt: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report(NAME, "--model", tiny_model, "--prompt", prompt, "--html", out) == 1

    error = capsys.readouterr().err
    assert "is of another model (SmolLM2-135M-Instruct): num_layers is 30 there and 3" in error


def test_a_failed_run_leaves_the_page_that_was_there(
    tiny_model: Path, profile: Path, prompt: Path, out: Path
) -> None:
    out.parent.mkdir()
    out.write_text("before")

    assert report(profile, "--model", tiny_model, "--prompt", prompt, "--tokens", 1, "--html", out)

    assert out.read_text() == "before"
    assert list(out.parent.iterdir()) == [out]


def test_a_place_that_cannot_be_written_is_told_before_the_model_runs(
    tiny_model: Path,
    profile: Path,
    prompt: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    below_a_file = prompt / "page.html"

    assert report(profile, "--model", tiny_model, "--prompt", prompt, "--html", below_a_file) == 1

    error = capsys.readouterr().err
    assert "File exists" in error or "Not a directory" in error
    assert "reading the prompt" not in error


def test_the_help_says_what_the_page_answers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        report("--help")

    text = " ".join(capsys.readouterr().out.split())
    assert "whether a pivot looks where its satellites look" in text
    assert "(default: 5000, or all if there are fewer)" in text
    assert "(default: 64)" in text
    assert "--prompt held-out.txt" in text
