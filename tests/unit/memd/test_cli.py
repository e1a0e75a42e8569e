from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING

import pytest

from memd.__main__ import main
from memd.endpoint import Endpoint, EndpointLock

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("serve", "status", "top", "check"))]
)
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
        (["serve", "--bytes", "1KiB"], "--bytes must be at least 1 MiB"),
        (["serve", "--bytes", "1GiB", "--address", "tcp://1"], "an address is ipc://"),
        (["serve", "--bytes", "1GiB", "--max-clients", "0"], "--max-clients must be at least 1"),
        (["serve", "--bytes", "1GiB", "--numa", "near"], "--numa must be interleave, local or"),
        (["serve", "--bytes", "1GiB", "--drain-s", "-1"], "--drain-s must be 0 to 3600"),
        (["serve", "--bytes", "1GiB", "--metrics-port", "99999"], "--metrics-port must be"),
        (["top", "--interval", "0"], "--interval must be 0.1 to 60"),
        (["check", "--numa", "near"], "--numa must be interleave, local or"),
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


def test_a_node_that_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bytes", "1MiB", "--numa", "99", "--address", f"ipc://{tmp_path}/d/s"]
    assert main(["serve", *arguments]) == 1
    assert "on node 99" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_metrics_port_that_is_taken_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        arguments = ["--bytes", "1MiB", "--metrics-port", str(port)]
        assert main(["serve", *arguments, "--address", f"ipc://{tmp_path}/d/s"]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_json_where_the_log_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bytes", "900TiB", "--log-format", "json", "--address", f"ipc://{tmp_path}/d/s"]
    assert main(["serve", *arguments]) == 1
    entry = json.loads(capsys.readouterr().err)
    assert entry["level"] == "error"
    assert "ask for at most" in entry["message"]


def test_a_daemon_that_starts_is_shown_as_such_and_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "memd-1").mkdir(mode=0o700)
    endpoint = Endpoint(tmp_path / "memd-1" / "control.sock")
    with EndpointLock(endpoint):
        assert main(["status"]) == 3
        assert f"memd {os.getpid()} at {endpoint.address} is starting" in capsys.readouterr().out
        assert main(["status", "--json", "--address", endpoint.address]) == 3
        daemon = {"pid": os.getpid(), "address": endpoint.address, "state": "starting"}
        assert json.loads(capsys.readouterr().out) == [{"daemon": daemon}]
        assert main(["top", "--once"]) == 3


def test_status_of_nobody_is_exit_status_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main(["status", "--json"]) == 3
    assert main(["top", "--once"]) == 3
    assert main(["status", "--address", f"ipc://{tmp_path}/s"]) == 3
    assert "start one with" in capsys.readouterr().err
