"""Reads the profiles that were published with the paper.

Their format is that of the reference tool (`tools/get_cluster.py` of github ponytaill/HeteroCache):
roles, weights and clusters, without the model they are of and without what the roles were made
from. So a model's configuration has to come with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile.head_profile import HeadProfile, Provenance
from hetero_sglang.profile.roles import HeadRole

if TYPE_CHECKING:
    from hetero_sglang.profile.head_profile import Head
    from hetero_sglang.profile.model_shape import ModelShape

__all__ = ["import_published"]

ROLE_NAMES = {
    "anchor": HeadRole.ANCHOR,
    "volatile": HeadRole.VOLATILE,
    "pivot": HeadRole.PIVOT,
    "satellite": HeadRole.SATELLITE,
    "Stable_Unique": HeadRole.ANCHOR,
    "Decaying_Unique": HeadRole.VOLATILE,
    "Similar_Leader": HeadRole.PIVOT,
    "Similar_Member": HeadRole.SATELLITE,
}
"""Both vocabularies; which number stands for which is in each file."""

# The published weights average 1 up to single precision.
_MEAN_TOLERANCE = 1e-3


class _Meta(msgspec.Struct, frozen=True):
    type_map: dict[str, int]
    counts: dict[str, int]


class _Published(msgspec.Struct, frozen=True):
    meta: _Meta
    classification_matrix: list[list[int]]
    allocation_matrix: list[list[float]]
    leader_member_relations: list[dict[str, list[int]]]


def import_published(
    data: bytes, model: ModelShape, *, origin: str = "", name: str = ""
) -> HeadProfile:
    """Turns a published file into a profile.

    Args:
        data: The file's bytes.
        model: Shape of the model that it was made for.
        origin: Where it comes from, for messages and provenance.
        name: The model's name.

    Returns:
        The profile. Stability, similarity and thresholds were not published, so they are None.

    Raises:
        ProfileError: The file is cut, of another format or of a model of another shape, or it
            contradicts itself.
    """
    try:
        return _convert(_decode(data), model, origin, name)
    except ProfileError as error:
        raise ProfileError(f"{origin or 'published profile'}: {error}") from error


def _decode(data: bytes) -> _Published:
    try:
        return msgspec.json.decode(data, type=_Published)
    except msgspec.ValidationError as error:
        raise ProfileError(
            f"is not in the published format: {error}",
            remedy="A profile of hetero-sglang's own needs no import",
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"is no JSON (cut short, or NaN in it?): {error}") from error


def _convert(file: _Published, model: ModelShape, origin: str, name: str) -> HeadProfile:
    role_of: dict[int, HeadRole] = {}
    for word, number in file.meta.type_map.items():
        if word not in ROLE_NAMES:
            raise ProfileError(
                f"must name roles as {', '.join(ROLE_NAMES)}", field="meta.type_map", value=word
            )
        role_of[number] = ROLE_NAMES[word]
    for field in ("classification_matrix", "allocation_matrix"):
        widths = [len(row) for row in getattr(file, field)]
        if widths != [model.num_kv_heads] * model.num_layers:
            found = f"{len(widths)} rows of {sorted(set(widths))}"
            raise ProfileError(
                f"must have a row of {model.num_kv_heads} heads for each of the model's "
                f"{model.num_layers} layers",
                field=field,
                value=found,
                remedy="Give the configuration of the model that the profile was made for",
            )
    unknown = {n for row in file.classification_matrix for n in row} - set(role_of)
    if unknown:
        raise ProfileError(
            f"must hold numbers of meta.type_map ({sorted(role_of)})",
            field="classification_matrix",
            value=str(min(unknown)),
        )
    roles = np.array([[role_of[n] for n in row] for row in file.classification_matrix])
    for word, count in file.meta.counts.items():
        role = ROLE_NAMES.get(word)
        if role is not None and count != int((roles == role).sum()):
            raise ProfileError(
                f"says {count} heads, the matrix has {int((roles == role).sum())}",
                field=f"meta.counts.{word}",
            )
    return HeadProfile(
        model=model,
        roles=roles.astype(np.int8),
        allocation=_weights(np.array(file.allocation_matrix), roles),
        satellites_of=_clusters(file, model),
        provenance=Provenance(model=name, tool=f"imported: {origin}" if origin else "imported"),
        origin=origin,
    )


def _weights(allocation: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """Weights of the compressed heads, mean exactly 1; other heads carry -1 in the file, here 0."""
    is_compressed = (roles == HeadRole.ANCHOR) | (roles == HeadRole.SATELLITE)
    weights = np.where(is_compressed, allocation, 0.0)
    if is_compressed.any():
        mean = float(weights[is_compressed].mean())
        # NaN fails this too.
        if not abs(mean - 1.0) <= _MEAN_TOLERANCE:
            raise ProfileError(
                "must average 1 over anchors and satellites",
                field="allocation_matrix",
                value=f"{mean:.6g}",
            )
        weights /= mean
    return weights


def _clusters(file: _Published, model: ModelShape) -> dict[Head, tuple[int, ...]]:
    if len(file.leader_member_relations) != model.num_layers:
        raise ProfileError(
            f"must have an entry for each of the model's {model.num_layers} layers",
            field="leader_member_relations",
            value=str(len(file.leader_member_relations)),
        )
    clusters: dict[Head, tuple[int, ...]] = {}
    for layer, relations in enumerate(file.leader_member_relations):
        for leader, members in relations.items():
            if not leader.isdecimal():
                raise ProfileError(
                    "must be keyed by head numbers",
                    field=f"leader_member_relations[{layer}]",
                    value=repr(leader),
                )
            clusters[layer, int(leader)] = tuple(members)
    return clusters
