"""SGLang is what the adapter was written against: one test a hooked or overridden callable."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from hetero_sglang.errors import ConfigError
from hetero_sglang.sglang_adapter import compat

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

TARGETS = compat.LAUNCHER_TARGETS + compat.SCHEDULER_TARGETS + compat.GRAPH_TARGETS
MANIFEST = json.loads(compat.MANIFEST_PATH.read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_the_signature_is_the_recorded_one(target: str) -> None:
    assert compat.signature_of(target) == MANIFEST[target]


def test_the_manifest_holds_exactly_what_is_checked() -> None:
    assert set(MANIFEST) == set(TARGETS)


def test_every_hooked_callable_is_in_the_manifest() -> None:
    from hetero_sglang.sglang_adapter.hooks import _HOOKS

    assert set(_HOOKS) <= set(TARGETS)


def test_a_changed_signature_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = TARGETS[0]
    changed = tmp_path / "signatures.json"
    changed.write_text(json.dumps({**MANIFEST, target: "(something, else)"}))
    monkeypatch.setattr(compat, "MANIFEST_PATH", changed)
    monkeypatch.delenv("HETERO_ALLOW_UNTESTED", raising=False)
    with pytest.raises(ConfigError, match=r"add_cli_args.*differs.*HETERO_ALLOW_UNTESTED"):
        compat.check_compatibility((target,))
    monkeypatch.setenv("HETERO_ALLOW_UNTESTED", "1")
    compat.check_compatibility((target,))


def test_a_missing_callable_and_another_version_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HETERO_ALLOW_UNTESTED", raising=False)
    with pytest.raises(ConfigError, match=r"no sglang\.srt\.server_args\.ServerArgs\.gone"):
        compat.check_compatibility(("sglang.srt.server_args.ServerArgs.gone",))
    monkeypatch.setattr(compat, "TESTED_VERSION", "0.0.1")
    with pytest.raises(ConfigError, match=r"0\.0\.1 is tested"):
        compat.check_compatibility(())
