from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from memd.__main__ import main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["status", "--help"]])
def test_help_teaches(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "memd" in text
    assert len(text.splitlines()) > 10


@pytest.mark.parametrize(
    "arguments", [[], ["serve"], ["no-such-command"], ["status", "--wait", "soon"]]
)
def test_wrong_usage_is_exit_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["serve", "--bytes", "4GB"], "for example 4GiB"),
        (["serve", "--bytes", "1KiB"], "region_bytes must be at least 1 MiB"),
        (["serve", "--bytes", "1GiB", "--address", "tcp://1"], "an address is ipc://"),
        (["serve", "--bytes", "1GiB", "--max-clients", "0"], "max_clients"),
        (["status", "--address", "nowhere"], "an address is ipc://"),
    ],
)
def test_a_refusal_is_one_line_and_exit_status_1(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1


def test_a_directory_that_others_can_enter_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o755)
    assert main(["serve", "--bytes", "1MiB", "--address", f"ipc://{tmp_path}/s"]) == 1
    assert "mode 0700" in capsys.readouterr().err


def test_a_region_that_does_not_fit_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--bytes", "900TiB", "--address", f"ipc://{tmp_path}/d/s"]) == 1
    assert "ask for at most" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_status_of_nobody_is_exit_status_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main(["status", "--json"]) == 3
    assert main(["status", "--address", f"ipc://{tmp_path}/s"]) == 3
    assert "start one with" in capsys.readouterr().err
