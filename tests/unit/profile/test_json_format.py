from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile import (
    HeadProfile,
    ModelShape,
    Provenance,
    Thresholds,
    load_profile,
    save_profile,
)
from hetero_sglang.profile.json_format import dumps_profile, loads_profile
from hetero_sglang.profiler import assign_roles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Build = Callable[..., HeadProfile]


@st.composite
def profiles(draw: st.DrawFn) -> HeadProfile:
    """Profiles of random heads, made the way the profiler makes them."""
    num_layers, num_kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    similarity = random.random((num_layers, num_kv_heads, num_kv_heads))
    return assign_roles(
        random.random((num_layers, num_kv_heads)),
        (similarity + similarity.transpose(0, 2, 1)) / 2,
        model=ModelShape(
            num_layers=num_layers, num_q_heads=2 * num_kv_heads, num_kv_heads=num_kv_heads
        ),
        thresholds=Thresholds(stable=draw(st.floats(0, 1)), similarity=draw(st.floats(0, 1))),
        provenance=Provenance(model=draw(st.text(max_size=8)), texts=("a", "b")),
    )


@given(profiles())
def test_a_file_holds_all_of_a_profile(profile: HeadProfile) -> None:
    read = loads_profile(dumps_profile(profile).encode(), origin="test")

    assert read == profile
    assert read.provenance == profile.provenance
    np.testing.assert_array_equal(read.allocation, profile.allocation)
    assert read.satellites_of == profile.satellites_of


def test_a_saved_file_is_loaded_again(build_profile: Build, tmp_path: Path) -> None:
    path = tmp_path / "new" / "toy.json"
    save_profile(build_profile(), path)

    profile = load_profile(path)

    assert profile == build_profile()
    assert profile.origin == str(path)
    assert profile.similarity is None
    assert [p.name for p in path.parent.iterdir()] == ["toy.json"]


def test_the_method_names_do_the_same(build_profile: Build, tmp_path: Path) -> None:
    build_profile().save(tmp_path / "toy.json")

    assert HeadProfile.load(tmp_path / "toy.json") == build_profile()


def test_the_file_has_a_line_for_each_layer_or_cluster(build_profile: Build) -> None:
    lines = dumps_profile(build_profile()).splitlines()

    assert ' "roles": [[1, 2, 3, 4], [4, 4, 4, 3]],' in lines
    assert '  "texts": ["a.txt"],' in lines
    assert '  {"layer": 0, "pivot": 2, "satellites": [3]},' in lines


# Golden: it changes only with the schema version.
def test_the_digest_of_a_given_profile_never_changes(build_profile: Build) -> None:
    assert build_profile().digest == (
        "760f9081fefe80f8d101976c0b03e496d8936ccfb99412e7eb518d0c6ee98d66"
    )


def spoiled(profile: HeadProfile, **changes: Any) -> bytes:
    data = json.loads(dumps_profile(profile))
    for name in ("digest", "fingerprint"):
        data.pop(name)
    data.update(changes)
    return json.dumps({k: v for k, v in data.items() if v is not ...}).encode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"schema_version": 7}, "schema_version must be 1, got 7", id="version"),
        pytest.param({"schema_version": ...}, "schema_version", id="no-version"),
        pytest.param({"roles": ...}, "missing required field `roles`", id="missing"),
        pytest.param({"rolls": []}, "unknown field `rolls`", id="unknown"),
        pytest.param({"roles": [[1, "2"]]}, r"Expected `int`, got `str` - at .*roles", id="type"),
        pytest.param({"roles": [[1, 2, 3, 4]]}, "roles must be 2 lists of 4", id="layers"),
        pytest.param({"stability": [[1], [1, 2, 3, 4]]}, "stability must be 2 lists", id="ragged"),
        pytest.param({"roles": [[9] * 4] * 2}, "roles must be 1 to 4, got 9", id="role"),
        pytest.param({"similarity": [[[1.0]], [[1.0, 0.5]]]}, "must be square", id="square"),
        pytest.param({"similarity": [[[1.0]], [[1.0]]]}, "similarity must have", id="small"),
        pytest.param(
            {"thresholds": {"stable": 3, "similarity": 0.5}}, "thresholds.stable", id="threshold"
        ),
        pytest.param(
            {
                "satellites_of": [
                    {"layer": 0, "pivot": 2, "satellites": [3]},
                    {"layer": 0, "pivot": 2, "satellites": [3]},
                ]
            },
            r"head \[0, 2\] is listed twice",
            id="listed-twice",
        ),
    ],
)
def test_a_file_against_the_schema_is_refused_by_field(
    build_profile: Build, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        loads_profile(spoiled(build_profile(), **changes), origin="toy.json")
    assert "toy.json" in str(caught.value)


@pytest.mark.parametrize("name", ["allocation", "stability"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        # Python writes them so; JSON has no word for them.
        ("NaN", r"toy.json is no JSON \(cut short, or NaN in it\?\): .*invalid character"),
        ("Infinity", r"toy.json is no JSON \(cut short, or NaN in it\?\): .*invalid character"),
        ("1e999", r"toy.json is no profile .*: Number out of range - at `\$\.{name}\[1\]\[0\]`"),
    ],
)
def test_numbers_that_are_not_finite_are_refused(
    build_profile: Build, name: str, number: str, message: str
) -> None:
    data = json.loads(spoiled(build_profile()))
    data[name][1][0] = "here"
    text = json.dumps(data).replace('"here"', number)

    with pytest.raises(ProfileError, match=message.replace("{name}", name)):
        loads_profile(text.encode(), origin="toy.json")


def test_a_file_cut_in_the_middle_is_named(build_profile: Build, tmp_path: Path) -> None:
    whole = dumps_profile(build_profile()).encode()
    (tmp_path / "cut.json").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(ProfileError, match=r"cut\.json is no JSON \(cut short.*truncated"):
        load_profile(tmp_path / "cut.json")


def test_an_edited_file_is_noticed_and_accepted_without_its_digest(build_profile: Build) -> None:
    text = dumps_profile(build_profile()).replace('"stable": 0.5', '"stable": 0.25')

    with pytest.raises(ProfileError, match="digest does not match the contents"):
        loads_profile(text.encode(), origin="toy.json")

    data = json.loads(text)
    del data["digest"]
    assert loads_profile(json.dumps(data).encode(), origin="toy").thresholds.stable == 0.25


def test_a_wrong_fingerprint_is_noticed(build_profile: Build) -> None:
    data = json.loads(dumps_profile(build_profile()))
    data["fingerprint"] = "0" * 16

    with pytest.raises(ProfileError, match="fingerprint does not match"):
        loads_profile(json.dumps(data).encode(), origin="toy")


@given(st.data())
def test_a_cut_file_is_refused(data: st.DataObject) -> None:
    whole = dumps_profile(data.draw(profiles())).encode().rstrip()
    cut = whole[: data.draw(st.integers(0, len(whole) - 1))]

    with pytest.raises(ProfileError, match="no JSON"):
        loads_profile(cut, origin="cut.json")


@given(st.binary(max_size=64))
def test_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(ProfileError):
        loads_profile(noise, origin="noise")


def test_a_missing_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"cannot read profile .*No such file.*`auto`"):
        load_profile(tmp_path / "none.json")


def test_a_failed_write_leaves_the_old_file(
    build_profile: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "toy.json"
    path.write_text("old")

    def refuse(*_: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(OSError, match="no space"):
        save_profile(build_profile(), path)

    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["toy.json"]
