from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING

import pytest

from memd.__main__ import main
from memd.config import MemdConfig, default_address, runtime_directory
from memd.endpoint import Endpoint
from memd.errors import ConfigError
from memd.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("4096", 4096),
        ("2KiB", 2048),
        ("64MiB", 64 << 20),
        ("1.5GiB", 3 << 29),
        (" 1 TiB ", 1 << 40),
    ],
)
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "0", "-1", "4GB", "4G", "GiB", "1e9", "0.3KiB", "4 gib"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match="for example 4GiB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (2048, "2 KiB"), (3 << 29, "1.5 GiB"), (5 << 40, "5 TiB")],
)
def test_sizes_are_shown(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_good_settings_are_taken() -> None:
    config = MemdConfig(address="ipc:///run/x/y.sock", region_bytes=1 << 20)
    assert config.parent_pid is None


@pytest.mark.parametrize(
    ("setting", "value", "name"),
    [
        ("region_bytes", 100, "--bytes"),
        ("numa", "everywhere", "--numa"),
        ("parent_pid", -1, "--parent-pid"),
        ("parent_pid", 0, "--parent-pid"),
        ("max_clients", 0, "--max-clients"),
        ("client_bytes", -1, "--client-bytes"),
        ("drain_s", -1.0, "--drain-s"),
        ("drain_s", 4000.0, "--drain-s"),
        ("drain_s", float("nan"), "--drain-s"),
        ("metrics_port", -1, "--metrics-port"),
        ("metrics_port", 65536, "--metrics-port"),
        ("log_level", "loud", "--log-level"),
        ("log_format", "xml", "--log-format"),
        ("max_frame_bytes", 10, "max_frame_bytes"),
        ("max_frame_bytes", 1 << 40, "max_frame_bytes"),
        ("hello_grace_s", 0.0, "hello_grace_s"),
        ("watch_interval_s", -1.0, "watch_interval_s"),
        ("scrub_bytes", 1, "scrub_bytes"),
    ],
)
def test_a_bad_setting_is_refused_by_its_flag_with_value_and_remedy(
    setting: str, value: object, name: str
) -> None:
    good = {"address": "ipc:///run/x/y.sock", "region_bytes": 1 << 20}
    with pytest.raises(ConfigError, match=rf"^{name} must be .+, got {value}; .+"):
        MemdConfig(**{**good, setting: value})


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"cuda_staging_bytes": -1}, "must be 0, or at least 1 MiB"),
        ({"cuda_staging_bytes": 4096}, "must be 0, or at least 1 MiB"),
        ({"cuda_staging_bytes": 8 << 20}, "less than --bytes"),
        ({"cuda_staging_bytes": 1 << 20, "link_gbps": 10.0}, "do not go with"),
    ],
)
def test_bad_settings_of_staging_memory_are_refused(settings: dict[str, object], text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{text}.+; .+"):
        MemdConfig(address="ipc:///run/x/y.sock", region_bytes=8 << 20, **settings)


def test_every_flag_of_serve_is_a_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    flags = set(re.findall(r"^  --([a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    settings = {field.name.replace("_", "-") for field in dataclasses.fields(MemdConfig)}
    assert flags - {"bytes"} <= settings


def test_a_bad_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="ipc://"):
        MemdConfig(address="tcp://127.0.0.1:5555", region_bytes=1 << 20)


def test_the_runtime_directory_of_the_session_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_directory() == tmp_path
    assert Endpoint.parse(default_address()).control.is_relative_to(tmp_path)


def test_a_runtime_directory_that_is_not_there_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "missing"))
    assert runtime_directory() != tmp_path / "missing"
