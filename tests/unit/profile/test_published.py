"""Profiles in the format that was published with the paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile import HeadRole, ModelShape
from hetero_sglang.profile.json_format import dumps_profile, loads_profile
from hetero_sglang.profile.published import import_published

WORDS = (
    ("anchor", "volatile", "pivot", "satellite"),
    ("Stable_Unique", "Decaying_Unique", "Similar_Leader", "Similar_Member"),
)
LLAMA_ROLES = Path(__file__).parents[2] / "data" / "llama-3.1-8b-roles.json"
MODEL = ModelShape(num_layers=2, num_q_heads=8, num_kv_heads=4)


def published(words: tuple[str, ...] = WORDS[0]) -> dict[str, Any]:
    """Two layers of four heads."""
    return {
        "meta": {
            "type_map": dict(zip(words, (1, 2, 3, 4), strict=True)),
            "counts": dict(zip(words, (2, 1, 2, 3), strict=True)),
        },
        "classification_matrix": [[3, 4, 4, 2], [1, 4, 3, 1]],
        "allocation_matrix": [[-1.0, 0.5, 1.5, -1.0], [0.75, 1.0, -1.0, 1.25]],
        "leader_member_relations": [{"0": [1, 2]}, {"2": [1]}],
    }


def bring(data: dict[str, Any], model: ModelShape = MODEL) -> Any:
    return import_published(json.dumps(data).encode(), model, origin="p.json", name="toy")


@pytest.mark.parametrize("words", WORDS)
def test_both_vocabularies_say_the_same(words: tuple[str, ...]) -> None:
    profile = bring(published(words))
    assert profile.roles.tolist() == [[3, 4, 4, 2], [1, 4, 3, 1]]
    assert profile.allocation.tolist() == [[0, 0.5, 1.5, 0], [0.75, 1, 0, 1.25]]
    assert dict(profile.satellites_of) == {(0, 0): (1, 2), (1, 2): (1,)}
    assert profile.provenance.model == "toy"
    assert profile.stability is None
    assert profile.thresholds is None


def test_the_numbers_are_those_of_the_files_own_map() -> None:
    data = published()
    data["meta"]["type_map"] = {"satellite": 1, "pivot": 2, "volatile": 3, "anchor": 4}
    data["classification_matrix"] = [[2, 1, 1, 3], [4, 1, 2, 4]]
    assert np.array_equal(bring(data).roles, bring(published()).roles)


def test_weights_are_normalised_exactly() -> None:
    data = published()
    data["allocation_matrix"][0][1] += 2e-4
    weights = bring(data).allocation
    assert weights[weights > 0].mean() == pytest.approx(1.0, abs=1e-12)


def test_an_imported_profile_is_written_and_read_like_any_other() -> None:
    profile = bring(published())
    again = loads_profile(dumps_profile(profile).encode(), origin="again")
    assert again == profile
    assert again.stability is None


def test_llamas_published_roles() -> None:
    source = json.loads(LLAMA_ROLES.read_text())
    clusters: list[dict[str, list[int]]] = [{} for _ in range(32)]
    for cluster in source["satellites_of"]:
        clusters[cluster["layer"]][str(cluster["pivot"])] = cluster["satellites"]
    data = {
        "meta": published()["meta"] | {"counts": {"anchor": 10, "volatile": 17, "pivot": 33}},
        "classification_matrix": source["roles"],
        "allocation_matrix": source["allocation"],
        "leader_member_relations": clusters,
    }
    profile = bring(data, ModelShape(num_layers=32, num_q_heads=32, num_kv_heads=8))
    assert [profile.counts[role] for role in HeadRole] == [10, 17, 33, 196]
    assert profile.floor == pytest.approx(0.1953, abs=1e-4)


def edited(path: str, value: Any) -> dict[str, Any]:
    """A published file with one thing changed, named by a dotted path."""
    data = published()
    *way, last = path.split(".")
    target: Any = data
    for step in way:
        target = target[int(step) if isinstance(target, list) else step]
    target[int(last) if isinstance(target, list) else last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("meta.type_map", {"boss": 3}, "meta.type_map must name roles as anchor, .*, got boss"),
        ("meta.counts.pivot", 3, "meta.counts.pivot says 3 heads, the matrix has 2"),
        ("classification_matrix.0", [3, 4, 4], r"classification_matrix must have a row of 4 heads"),
        ("classification_matrix.1.0", 7, r"classification_matrix must hold numbers .*, got 7"),
        ("allocation_matrix.1.0", 5.0, "allocation_matrix must average 1 .*, got 1.85"),
        ("leader_member_relations", [{"0": [1, 2]}], "leader_member_relations must have an entry"),
        ("leader_member_relations.0", {"x": [1, 2]}, r"relations\[0\] must be keyed .*, got 'x'"),
        ("leader_member_relations.0", {"0": [1]}, r"satellite \[0, 2\] follows no pivot"),
        ("leader_member_relations.0", {"0": [1, 2, 3]}, r"head \[0, 3\] follows pivot 0 but is no"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(path: str, value: Any, message: str) -> None:
    with pytest.raises(ProfileError, match=rf"p\.json: .*{message}"):
        bring(edited(path, value))


def test_a_cut_file_and_one_of_another_format_are_refused() -> None:
    text = json.dumps(published()).encode()
    with pytest.raises(ProfileError, match=r"p\.json: is no JSON"):
        import_published(text[:-20], MODEL, origin="p.json")
    with pytest.raises(ProfileError, match="published format: Object missing required field"):
        import_published(b'{"roles": []}', MODEL, origin="p.json")
    with pytest.raises(ProfileError, match="must average 1"):
        import_published(text.replace(b"0.75", b"-99"), MODEL, origin="p.json")
