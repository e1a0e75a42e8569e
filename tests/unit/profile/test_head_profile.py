from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile import HeadProfile, HeadRole, Thresholds

if TYPE_CHECKING:
    from collections.abc import Callable

    Build = Callable[..., HeadProfile]

ROLES = [[1, 2, 3, 4], [4, 4, 4, 3]]
ALLOCATION = [[0.5, 0, 0, 1.5], [0.75, 1.0, 1.25, 0]]


def with_value(table: list[list[Any]], layer: int, head: int, value: Any) -> np.ndarray:
    changed = np.array(table, dtype=object)
    changed[layer, head] = value
    return np.array(changed.tolist())


def test_counts_floor_and_full_heads_follow_from_the_roles(build_profile: Build) -> None:
    profile = build_profile()

    assert profile.counts == {
        HeadRole.ANCHOR: 1,
        HeadRole.VOLATILE: 1,
        HeadRole.PIVOT: 2,
        HeadRole.SATELLITE: 4,
    }
    assert profile.num_full_heads == 3
    assert profile.floor == 3 / 8


def test_only_anchors_and_satellites_are_compressed() -> None:
    assert [role.name for role in HeadRole if role.is_compressed] == ["ANCHOR", "SATELLITE"]


def test_arrays_are_read_only_copies(build_profile: Build) -> None:
    roles = np.array(ROLES)
    profile = build_profile(roles=roles)
    roles[0, 0] = 2

    assert profile.roles[0, 0] == HeadRole.ANCHOR
    assert profile.roles.dtype == np.int8
    with pytest.raises(ValueError, match="read-only"):
        profile.allocation[0, 0] = 1.0


def test_satellites_are_listed_in_ascending_order(build_profile: Build) -> None:
    profile = build_profile(satellites_of={(1, 3): (2, 0, 1), (0, 2): (3,)})

    assert list(profile.satellites_of.items()) == [((0, 2), (3,)), ((1, 3), (0, 1, 2))]
    with pytest.raises(TypeError):
        profile.satellites_of[0, 0] = ()  # type: ignore[index]


def test_equality_ignores_where_a_profile_was_read_from(build_profile: Build) -> None:
    first, second = build_profile(origin="a.json"), build_profile(origin="b.json")
    other = build_profile(thresholds=Thresholds(stable=0.4, similarity=0.5))

    assert first == second
    assert hash(first) == hash(second)
    assert first != other
    assert first != "a profile"


def test_repr_names_model_and_counts(build_profile: Build) -> None:
    assert repr(build_profile()).startswith("HeadProfile(toy, 1/1/2/4 anchor/volatile/pivot/sat")


def test_a_profile_without_compressed_heads_is_valid(build_profile: Build) -> None:
    profile = build_profile(roles=np.full((2, 4), 2), allocation=np.zeros((2, 4)), satellites_of={})

    assert profile.floor == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"schema_version": 2}, "schema_version must be 1, got 2", id="version"),
        pytest.param({"roles": np.ones((3, 4))}, r"roles must have shape \[2, 4\]", id="shape"),
        pytest.param(
            {"similarity": np.ones((2, 4))}, r"similarity must have shape \[2, 4, 4\]", id="square"
        ),
        pytest.param(
            {"roles": with_value(ROLES, 0, 0, 5)}, "roles must be 1 to 4, got 5", id="role"
        ),
        # Would become role 4 in eight bits.
        pytest.param({"roles": with_value(ROLES, 0, 3, 260)}, "got 260", id="role-wraps"),
        pytest.param(
            {"stability": np.full((2, 4), 1.5)}, r"stability must be in \[0, 1\]", id="stability"
        ),
        pytest.param(
            {"similarity": np.full((2, 4, 4), -0.1)}, "similarity must be in", id="similarity"
        ),
        pytest.param(
            {"allocation": with_value(ALLOCATION, 0, 0, float("nan"))},
            "allocation must be finite",
            id="nan",
        ),
        pytest.param(
            {"stability": np.full((2, 4), float("inf"))},
            "stability must be finite, got inf",
            id="inf",
        ),
        pytest.param(
            {"similarity": np.full((2, 4, 4), float("nan"))},
            "similarity must be finite, got nan",
            id="nan-in-similarity",
        ),
        pytest.param(
            {"roles": np.full((2, 4), float("nan"))}, "roles must be 1 to 4, got nan", id="nan-role"
        ),
        pytest.param(
            {"allocation": np.ones((2, 5))},
            r"allocation must have shape \[2, 4\], got \(2, 5\)",
            id="too-wide",
        ),
        pytest.param(
            {"stability": np.ones(8)}, r"stability must have shape \[2, 4\], got \(8,\)", id="flat"
        ),
        pytest.param(
            {"allocation": with_value(ALLOCATION, 0, 2, 1.0)},
            r"allocation of head \[0, 2\] must be 0",
            id="pivot-with-budget",
        ),
        pytest.param(
            {"allocation": with_value(ALLOCATION, 0, 3, 0.0)},
            r"allocation of head \[0, 3\] must be above 0",
            id="satellite-without-budget",
        ),
        pytest.param(
            {"allocation": with_value(ALLOCATION, 0, 0, 0.6)},
            "allocation must average 1",
            id="mean",
        ),
        pytest.param(
            {"satellites_of": {(1, 3): (0, 1, 2)}},
            r"head \[0, 2\] has no satellites",
            id="lonely-pivot",
        ),
        pytest.param(
            {"satellites_of": {(1, 3): (0, 1, 2), (0, 2): ()}},
            r"head \[0, 2\] has no satellites",
            id="empty-cluster",
        ),
        pytest.param(
            {"satellites_of": {(1, 3): (0, 1, 2), (0, 2): (3,), (0, 1): (3,)}},
            r"head \[0, 1\] is listed but is no pivot",
            id="not-a-pivot",
        ),
        pytest.param(
            {"satellites_of": {(1, 3): (0, 1, 2), (0, 2): (0, 3)}},
            r"head \[0, 0\] follows pivot 2 but is no satellite",
            id="anchor-follows",
        ),
        pytest.param(
            {"satellites_of": {(1, 3): (0, 1, 2), (0, 2): (4,)}},
            r"head \[0, 4\] follows pivot 2 but is no satellite",
            id="no-such-head",
        ),
        pytest.param(
            {"satellites_of": {(1, 3): (0, 1, 2), (0, 2): (3, 3)}},
            r"head \[0, 3\] follows pivots 2 and 2",
            id="twice",
        ),
        pytest.param(
            {"satellites_of": {(1, 3): (0, 1), (0, 2): (3,)}},
            r"satellite \[1, 2\] follows no pivot",
            id="orphan",
        ),
    ],
)
def test_a_broken_rule_is_named(
    build_profile: Build, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProfileError, match=message):
        build_profile(**changes)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_thresholds_outside_their_range_are_refused(value: float) -> None:
    with pytest.raises(ProfileError, match=r"thresholds.stable must be in \[0, 1\]"):
        Thresholds(stable=value, similarity=0.5)


def test_it_fits_its_model_even_with_a_larger_vocabulary(
    build_profile: Build, model_config: dict[str, Any]
) -> None:
    build_profile().check_fits({**model_config, "vocab_size": 1001})


@pytest.mark.parametrize(
    ("field", "value", "name"),
    [
        ("num_hidden_layers", 3, "num_layers"),
        ("num_attention_heads", 4, "num_q_heads"),
        ("num_key_value_heads", 2, "num_kv_heads"),
        ("head_dim", 32, "head_dim"),
        ("hidden_size", 256, "hidden_size"),
        ("architectures", ["Qwen2ForCausalLM"], "architecture"),
    ],
)
def test_another_model_is_refused_by_name(
    build_profile: Build, model_config: dict[str, Any], field: str, value: Any, name: str
) -> None:
    profile = build_profile(origin="toy.json")

    with pytest.raises(ProfileError, match=rf"toy.json is of another model \(toy\): {name} is"):
        profile.check_fits({**model_config, field: value})
