"""What the deployment files say is what `memd` understands."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path

import pytest

from memd.__main__ import parser
from memd.sizes import parse_bytes

UNIT = Path(__file__).parents[3] / "docs" / "deploy" / "memd.service"


@pytest.fixture
def service() -> dict[str, str]:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(UNIT.read_text().replace("\\\n", " "))
    return dict(unit["Service"])


@pytest.mark.parametrize("key", ["ExecStart", "ExecStartPost"])
def test_the_units_commands_are_understood(service: dict[str, str], key: str) -> None:
    program, *arguments = shlex.split(service[key])
    assert program.endswith("/memd")
    assert parser().parse_args(arguments).address == "ipc:///run/memd/control.sock"


def test_the_units_limits_fit_its_pool(service: dict[str, str]) -> None:
    serve = parser().parse_args(shlex.split(service["ExecStart"])[1:])
    assert serve.lock
    assert int(service["LimitMEMLOCK"]) >= serve.bytes
    assert parse_bytes(service["MemoryMax"].replace("G", "GiB")) >= serve.bytes + (1 << 30)
    assert float(service["TimeoutStopSec"]) > serve.drain_s
    assert f"/run/{service['RuntimeDirectory']}/" in serve.address
    assert service["RuntimeDirectoryMode"] == "0700"
