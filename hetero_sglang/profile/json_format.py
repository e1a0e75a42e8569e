"""Profile files: JSON, a line for each layer, with a digest that notices edits and cuts.

The schema is the set of structs below. Fields may be added with a default; anything else raises the
schema version.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile.head_profile import (
    SCHEMA_VERSION,
    HeadProfile,
    Provenance,
    Thresholds,
)
from hetero_sglang.profile.model_shape import ModelShape

__all__ = ["digest", "dumps_profile", "load_profile", "loads_profile", "save_profile"]

# A profile of 128 layers with 128 KV heads and its similarities stays under this.
_MAX_FILE_BYTES = 64 << 20
# What fits is written on one line.
_LINE_WIDTH = 90


class _Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    layer: int
    pivot: int
    satellites: list[int]


class _ProfileFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    schema_version: int
    digest: str = ""
    fingerprint: str = ""
    model: ModelShape
    thresholds: Thresholds | None = None
    provenance: Provenance
    roles: list[list[int]]
    allocation: list[list[float]]
    stability: list[list[float]] | None = None
    satellites_of: list[_Cluster]
    similarity: list[list[list[float]]] | None = None


class _Version(msgspec.Struct, frozen=True):
    schema_version: int


def load_profile(path: str | os.PathLike[str]) -> HeadProfile:
    """Reads and checks a profile file.

    Args:
        path: The file.

    Returns:
        The profile, its `origin` set to the path.

    Raises:
        ProfileError: The file is missing, too large, cut, edited or against the schema.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ProfileError(f"{path} is larger than any profile", value=f"{path.stat().st_size}")
        data = path.read_bytes()
    except OSError as error:
        raise ProfileError(
            f"cannot read profile {path}: {error.strerror}",
            remedy="Give the path of a profile file, or `auto` for a shipped one",
        ) from error
    return loads_profile(data, origin=str(path))


def loads_profile(data: bytes, *, origin: str) -> HeadProfile:
    """Decodes and checks the contents of a profile file.

    Args:
        data: The file's bytes.
        origin: Where they come from, for messages.

    Returns:
        The profile.

    Raises:
        ProfileError: The contents are cut, edited or against the schema.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version != SCHEMA_VERSION:
            raise ProfileError(
                f"must be {SCHEMA_VERSION}",
                field="schema_version",
                value=str(version),
                remedy="Make the profile again, or use the version of hetero-sglang it belongs to",
            )
        file = msgspec.json.decode(data, type=_ProfileFile)
        profile = _from_file(file, origin)
    except ProfileError as error:
        raise ProfileError(f"{origin}: {error}") from error
    except msgspec.ValidationError as error:
        raise ProfileError(
            f"{origin} is no profile of schema version {SCHEMA_VERSION}: {error}",
            remedy="Make one with `hetero-sglang profile --model DIR --out FILE`",
        ) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{origin} is no JSON (cut short, or NaN in it?): {error}") from error
    for name, given, actual in (
        ("digest", file.digest, profile.digest),
        ("fingerprint", file.fingerprint, profile.fingerprint),
    ):
        if given and given != actual:
            raise ProfileError(
                f"{origin}: {name} does not match the contents, the file was changed",
                value=given,
                remedy=f"Restore the file, or delete its `{name}` if the change is meant",
            )
    return profile


def save_profile(profile: HeadProfile, path: str | os.PathLike[str]) -> None:
    """Writes a profile file; readers see the old file or the new one, never a part.

    Args:
        profile: What to write.
        path: Where to; its directory is made if missing.

    Raises:
        OSError: The file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, staging = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(dumps_profile(profile))
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes it private; a profile is for every reader of the directory.
        os.chmod(staging, 0o644)
        os.replace(staging, path)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise


def dumps_profile(profile: HeadProfile) -> str:
    """The file's text: indented, with a layer or a cluster on a line, for readable diffs."""
    body = _body(profile)
    version = {"schema_version": body.pop("schema_version")}
    names = {"digest": profile.digest, "fingerprint": profile.fingerprint}
    return _indented({**version, **names, **body}, "") + "\n"


def digest(profile: HeadProfile) -> str:
    """SHA-256 of a profile's canonical JSON form, hexadecimal; digest and origin excluded."""
    canonical = json.dumps(_body(profile), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _body(profile: HeadProfile) -> dict[str, Any]:
    body: dict[str, Any] = {
        "schema_version": profile.schema_version,
        "model": msgspec.to_builtins(profile.model),
        "provenance": msgspec.to_builtins(profile.provenance),
        "roles": profile.roles.tolist(),
        "allocation": profile.allocation.tolist(),
        "satellites_of": [
            {"layer": layer, "pivot": pivot, "satellites": list(heads)}
            for (layer, pivot), heads in profile.satellites_of.items()
        ],
    }
    # What was not recorded is left out.
    if profile.thresholds is not None:
        body["thresholds"] = msgspec.to_builtins(profile.thresholds)
    for name in ("stability", "similarity"):
        values = getattr(profile, name)
        if values is not None:
            body[name] = values.tolist()
    return body


def _indented(value: Any, indent: str) -> str:
    line = json.dumps(value)
    inner = indent + " "
    if len(line) <= _LINE_WIDTH:
        return line
    if isinstance(value, dict):
        lines = [f"{json.dumps(key)}: {_indented(item, inner)}" for key, item in value.items()]
    elif isinstance(value, list) and isinstance(value[0], dict | list):
        lines = [_indented(item, inner) for item in value]
    else:
        return line
    return f"{line[0]}\n{inner}" + f",\n{inner}".join(lines) + f"\n{indent}{line[-1]}"


def _from_file(file: _ProfileFile, origin: str) -> HeadProfile:
    satellites_of: dict[tuple[int, int], tuple[int, ...]] = {}
    for cluster in file.satellites_of:
        pivot = (cluster.layer, cluster.pivot)
        if pivot in satellites_of:
            raise ProfileError(f"head {list(pivot)} is listed twice", field="satellites_of")
        satellites_of[pivot] = tuple(cluster.satellites)
    for name in ("roles", "allocation", "stability"):
        if (rows := getattr(file, name)) is not None:
            _check_rectangle(rows, name, file.model)
    for layer in file.similarity or ():
        for row in layer:
            if len(row) != len(layer):
                raise ProfileError("must be square for each layer", field="similarity")
    return HeadProfile(
        model=file.model,
        roles=file.roles,  # type: ignore[arg-type]  # lists become arrays on construction
        allocation=file.allocation,  # type: ignore[arg-type]
        stability=file.stability,  # type: ignore[arg-type]
        satellites_of=satellites_of,
        thresholds=file.thresholds,
        similarity=file.similarity,  # type: ignore[arg-type]
        provenance=file.provenance,
        schema_version=file.schema_version,
        origin=origin,
    )


def _check_rectangle(rows: list[list[Any]], name: str, model: ModelShape) -> None:
    widths = [len(row) for row in rows]
    if widths != [model.num_kv_heads] * model.num_layers:
        raise ProfileError(
            f"must be {model.num_layers} lists of {model.num_kv_heads} values", field=name
        )
