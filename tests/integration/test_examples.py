"""The example configuration names every flag of the policy, each at its default."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from hetero_sglang.config import PRESETS
from hetero_sglang.sglang_adapter.arguments import add_cli_args

EXAMPLE = Path(__file__).parents[2] / "examples" / "server.yaml"


@pytest.fixture(scope="module")
def given() -> dict[str, object]:
    """The policy's part of the file."""
    settings: dict[str, object] = yaml.safe_load(EXAMPLE.read_text())
    return {key: value for key, value in settings.items() if key.startswith("kv-policy")}


@pytest.fixture(scope="module")
def defaults() -> dict[str, object]:
    """Default of every flag of the policy; of those that the preset sets, the default preset's."""
    parser = argparse.ArgumentParser()
    add_cli_args(lambda _: None, parser)
    return {
        option.removeprefix("--"): PRESETS["default"].get(
            action.dest.removeprefix("kv_policy_"), action.default
        )
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--kv-policy")
    }


def test_every_flag_is_there(given: dict[str, object], defaults: dict[str, object]) -> None:
    assert given.keys() == defaults.keys()


def test_only_the_policy_itself_is_not_at_its_default(
    given: dict[str, object], defaults: dict[str, object]
) -> None:
    assert {key for key, value in given.items() if value != defaults[key]} == {"kv-policy"}
