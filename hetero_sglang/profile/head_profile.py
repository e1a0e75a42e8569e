"""The head profile itself: roles, budgets' weights, clusters, and where they come from.

A `HeadProfile` that exists is valid: every rule of the schema is checked on construction, whoever
constructs it. Reading and writing files is `json_format`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile.model_shape import ModelShape
from hetero_sglang.profile.roles import HeadRole

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["SCHEMA_VERSION", "Head", "HeadProfile", "Provenance", "Thresholds"]

SCHEMA_VERSION = 1

Head = tuple[int, int]
"""A KV head of the model: (layer, head in the layer)."""

# Allocation weights are normalised in double precision and survive JSON exactly.
_MEAN_TOLERANCE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """Where the lines between the roles were drawn, each in [0, 1]."""

    stable: float
    """A head at or over this stability is stable."""
    similarity: float
    """Two heads of a layer at or over this similarity may share a cluster."""

    def __post_init__(self) -> None:
        """Checks the range.

        Raises:
            ProfileError: A threshold is not in [0, 1].
        """
        for name in ("stable", "similarity"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ProfileError(
                    "must be in [0, 1]", field=f"thresholds.{name}", value=repr(value)
                )


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a profile came to be; none of it is used in serving."""

    model: str = ""
    """Name of the profiled model."""
    tool: str = ""
    """Program and version that made the profile."""
    texts: tuple[str, ...] = ()
    """Names of the calibration texts."""
    text_digest: str = ""
    """SHA-256 over the texts' token ids that were used."""
    dtype: str = ""
    """Dtype of the calibration run."""
    num_prompt_tokens: int = 0
    """Tokens of each prompt."""
    num_decode_steps: int = 0
    """Decoded tokens whose queries were looked at, for each prompt."""
    top_k: int = 0
    """Size of the compared sets of positions."""
    pool_kernel: int = 0
    """Width of the average pooling over positions."""


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadProfile:
    """What is known offline about every KV head of one model.

    Two profiles are equal if their digests are. The arrays are read-only copies.

    Attributes:
        model: Shape of the model it was made for.
        roles: `HeadRole` of each head, int8 [num_layers, num_kv_heads].
        allocation: Weight of each compressed head in the budget, fp64 [num_layers, num_kv_heads];
            mean 1 over anchors and satellites, 0 for pivots and volatile heads.
        stability: Share of a head's best prompt positions that stay its best while decoding, fp64
            [num_layers, num_kv_heads], in [0, 1]; None if not recorded.
        satellites_of: For each pivot (layer, head) the heads of the same layer that follow it,
            ascending.
        thresholds: Where the lines between the roles were drawn; None if not recorded.
        similarity: Overlap of the best positions of two heads of a layer, fp64
            [num_layers, num_kv_heads, num_kv_heads], symmetric, in [0, 1]; None if not recorded.
        provenance: How the profile came to be.
        schema_version: Version of the file format, always `SCHEMA_VERSION` here.
        origin: Where it was read from, for messages; no part of the digest.

    Raises:
        ProfileError: A rule of the schema is broken; the message names field, rule and value.
    """

    model: ModelShape
    roles: NDArray[np.int8]
    allocation: NDArray[np.float64]
    satellites_of: Mapping[Head, tuple[int, ...]]
    stability: NDArray[np.float64] | None = None
    thresholds: Thresholds | None = None
    similarity: NDArray[np.float64] | None = None
    provenance: Provenance = field(default_factory=Provenance)
    schema_version: int = SCHEMA_VERSION
    origin: str = ""

    def __post_init__(self) -> None:
        """Copies the arrays and checks every rule of the schema."""
        if self.schema_version != SCHEMA_VERSION:
            raise ProfileError(
                f"must be {SCHEMA_VERSION}",
                field="schema_version",
                value=str(self.schema_version),
                remedy="Make the profile again with `hetero-sglang profile`",
            )
        per_head = (self.model.num_layers, self.model.num_kv_heads)
        self._freeze("roles", np.int8, per_head)
        self._freeze("allocation", np.float64, per_head)
        if self.stability is not None:
            self._freeze("stability", np.float64, per_head)
        if self.similarity is not None:
            self._freeze("similarity", np.float64, (*per_head, self.model.num_kv_heads))
        satellites = {
            pivot: tuple(sorted(heads)) for pivot, heads in sorted(self.satellites_of.items())
        }
        object.__setattr__(self, "satellites_of", MappingProxyType(satellites))
        self._check_roles()
        self._check_clusters()
        self._check_allocation()

    def __eq__(self, other: object) -> bool:
        """Whether both say the same, wherever they were read from."""
        if not isinstance(other, HeadProfile):
            return NotImplemented
        return self.digest == other.digest

    def __hash__(self) -> int:
        """Follows the digest, as equality does."""
        return hash(self.digest)

    def __repr__(self) -> str:
        """A line for logs."""
        name = self.provenance.model or self.model.architecture or "unknown model"
        counts = "/".join(str(self.counts[role]) for role in HeadRole)
        return f"HeadProfile({name}, {counts} anchor/volatile/pivot/satellite, {self.digest[:12]})"

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return self.model.num_layers

    @property
    def num_kv_heads(self) -> int:
        """KV heads a layer."""
        return self.model.num_kv_heads

    @property
    def num_heads(self) -> int:
        """KV heads of the whole model."""
        return self.model.num_heads

    @cached_property
    def counts(self) -> Mapping[HeadRole, int]:
        """Number of heads of each role."""
        return MappingProxyType({role: int((self.roles == role).sum()) for role in HeadRole})

    @property
    def num_full_heads(self) -> int:
        """Pivots and volatile heads, which keep every token in the paper's method."""
        return self.counts[HeadRole.PIVOT] + self.counts[HeadRole.VOLATILE]

    @property
    def floor(self) -> float:
        """Share of pivots and volatile heads: what the paper's method keeps whole."""
        return self.num_full_heads / self.num_heads

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the architecture it was made for."""
        return self.model.fingerprint

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, hexadecimal."""
        from hetero_sglang.profile import json_format

        return json_format.digest(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> HeadProfile:
        """Reads a profile file, see `json_format.load_profile`."""
        from hetero_sglang.profile import json_format

        return json_format.load_profile(path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a profile file, see `json_format.save_profile`."""
        from hetero_sglang.profile import json_format

        json_format.save_profile(self, path)

    def check_fits(self, config: Mapping[str, Any]) -> None:
        """Makes sure that the profile speaks of the heads of this model.

        The vocabulary may differ: fine-tunes add tokens and keep the heads.

        Args:
            config: Contents of the model's `config.json`.

        Raises:
            ProfileError: The model differs in layers, heads, widths or architecture.
        """
        found = ModelShape.from_config(config)
        remedy = (
            "Use a profile of this model: --kv-policy-profile auto, or make one with "
            "`hetero-sglang profile --model DIR --out FILE`"
        )
        where = f"profile {self.origin}" if self.origin else "profile"
        for name in (
            "architecture",
            "num_layers",
            "num_q_heads",
            "num_kv_heads",
            "head_dim",
            "hidden_size",
        ):
            ours, theirs = getattr(self.model, name), getattr(found, name)
            if ours != theirs:
                raise ProfileError(
                    f"is of another model ({self.provenance.model or 'unnamed'}): "
                    f"{name} is {ours} there and {theirs} in the model",
                    field=where,
                    remedy=remedy,
                )

    def _freeze(self, name: str, dtype: type, shape: tuple[int, ...]) -> None:
        given = np.asarray(getattr(self, name))
        if given.shape != shape:
            raise ProfileError(f"must have shape {list(shape)}", field=name, value=str(given.shape))
        # Checked before narrowing: 260 would become role 4 in int8.
        if name == "roles" and not np.isin(given, [int(role) for role in HeadRole]).all():
            bad = given[~np.isin(given, [int(role) for role in HeadRole])][0]
            raise ProfileError("must be 1 to 4", field=name, value=str(bad))
        copy: NDArray[Any] = np.array(given, dtype=dtype)
        if not np.isfinite(copy).all():
            raise ProfileError("must be finite", field=name, value=str(copy[~np.isfinite(copy)][0]))
        copy.setflags(write=False)
        object.__setattr__(self, name, copy)

    def _check_roles(self) -> None:
        for name in ("stability", "similarity"):
            values = getattr(self, name)
            if values is not None and not ((values >= 0.0) & (values <= 1.0)).all():
                bad = values[(values < 0.0) | (values > 1.0)][0]
                raise ProfileError("must be in [0, 1]", field=name, value=str(bad))

    def _check_clusters(self) -> None:
        pivots = {(int(layer), int(h)) for layer, h in np.argwhere(self.roles == HeadRole.PIVOT)}
        if pivots != set(self.satellites_of):
            odd = min(pivots ^ set(self.satellites_of))
            rule = "has no satellites" if odd in pivots else "is listed but is no pivot"
            raise ProfileError(f"head {list(odd)} {rule}", field="satellites_of")
        pivot_of: dict[Head, int] = {}
        for (layer, pivot), heads in self.satellites_of.items():
            if not heads:
                raise ProfileError(
                    f"head {[layer, pivot]} has no satellites", field="satellites_of"
                )
            for head in heads:
                where = f"head {[layer, head]}"
                if not 0 <= head < self.num_kv_heads or (
                    self.roles[layer, head] != HeadRole.SATELLITE
                ):
                    raise ProfileError(
                        f"{where} follows pivot {pivot} but is no satellite", field="satellites_of"
                    )
                if (layer, head) in pivot_of:
                    raise ProfileError(
                        f"{where} follows pivots {pivot_of[layer, head]} and {pivot}; "
                        "it must follow one",
                        field="satellites_of",
                    )
                pivot_of[layer, head] = pivot
        for layer, head in np.argwhere(self.roles == HeadRole.SATELLITE).tolist():
            if (layer, head) not in pivot_of:
                raise ProfileError(f"satellite {[layer, head]} follows no pivot", field="roles")

    def _check_allocation(self) -> None:
        is_compressed = (self.roles == HeadRole.ANCHOR) | (self.roles == HeadRole.SATELLITE)
        if (self.allocation[~is_compressed] != 0.0).any():
            layer, head = np.argwhere(~is_compressed & (self.allocation != 0.0))[0].tolist()
            raise ProfileError(
                f"of head {[layer, head]} must be 0, it keeps every token",
                field="allocation",
                value=str(self.allocation[layer, head]),
            )
        weights = self.allocation[is_compressed]
        if not weights.size:
            return
        if (weights <= 0.0).any():
            layer, head = np.argwhere(is_compressed & (self.allocation <= 0.0))[0].tolist()
            raise ProfileError(
                f"of head {[layer, head]} must be above 0",
                field="allocation",
                value=str(self.allocation[layer, head]),
            )
        mean = float(weights.mean())
        if abs(mean - 1.0) > _MEAN_TOLERANCE:
            raise ProfileError(
                "must average 1 over anchors and satellites", field="allocation", value=str(mean)
            )
