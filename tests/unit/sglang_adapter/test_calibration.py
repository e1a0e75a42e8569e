from __future__ import annotations

import json
from pathlib import Path

import pytest

from hetero_sglang.config import HeteroConfig, profile_cache_dir
from hetero_sglang.errors import ConfigError
from hetero_sglang.profile import save_profile, shipped_profiles
from hetero_sglang.sglang_adapter.calibration import cached_profile

PROFILE = shipped_profiles()["smollm2-135m-instruct"]


def test_profiles_are_kept_where_the_desktop_standard_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert profile_cache_dir() == tmp_path / "hetero-sglang" / "profiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert profile_cache_dir() == Path.home() / ".cache" / "hetero-sglang" / "profiles"


def test_a_damaged_profile_in_the_cache_is_made_anew_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.json"
    assert cached_profile(path) is None
    save_profile(PROFILE, path)
    assert cached_profile(path) == PROFILE
    assert not caplog.records

    path.write_bytes(path.read_bytes()[:-50])
    assert cached_profile(path) is None
    data = json.dumps({"schema_version": 99})
    path.write_text(data)
    assert cached_profile(path) is None
    assert ["calibrating anew" in record.message for record in caplog.records] == [True, True]


@pytest.mark.parametrize(
    ("field", "value"), [("calibration_text", "a.txt"), ("calibration_tokens", 100)]
)
def test_calibration_flags_mean_nothing_without_calibrating(field: str, value: object) -> None:
    flag = "--kv-policy-" + field.replace("_", "-")

    with pytest.raises(ConfigError, match=f"{flag} must be left out without --kv-policy-profile"):
        HeteroConfig(profile="auto", **{field: value})  # type: ignore[arg-type]
    assert getattr(HeteroConfig(profile="calibrate", **{field: value}), field) == value  # type: ignore[arg-type]
