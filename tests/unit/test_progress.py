from __future__ import annotations

from typing import TYPE_CHECKING

from hetero_sglang.progress import no_progress, shown_progress

if TYPE_CHECKING:
    import pytest


def test_without_a_terminal_each_stage_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress() as progress:
        for stage in ("reading [1]", "writing"):
            for done in range(3):
                progress(stage, done, 2)

    captured = capsys.readouterr()
    assert captured.err == "reading [1]\nwriting\n"
    assert not captured.out


def test_on_a_terminal_there_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")

    with shown_progress() as progress:
        progress("reading", 1, 2)

    captured = capsys.readouterr()
    assert "reading" in captured.err
    assert "50%" in captured.err
    assert not captured.out


def test_nobody_may_be_told() -> None:
    no_progress("reading", 0, 1)
