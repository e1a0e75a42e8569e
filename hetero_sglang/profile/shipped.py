"""Profiles that come with the distribution.

They lie in `profiles/` of the repository and, installed, in the package
`hetero_sglang.shipped_profiles`, which the packaging maps to that folder.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hetero_sglang.errors import ProfileError
from hetero_sglang.profile.json_format import loads_profile
from hetero_sglang.profile.model_shape import ModelShape

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.resources.abc import Traversable

    from hetero_sglang.profile.head_profile import HeadProfile

__all__ = ["find_shipped", "shipped_profiles"]

_PACKAGE = "hetero_sglang.shipped_profiles"


def shipped_profiles() -> dict[str, HeadProfile]:
    """All shipped profiles by name, which is the file's name without its ending.

    Returns:
        Name to profile, in alphabetical order.

    Raises:
        ProfileError: A shipped file is damaged.
    """
    folder = _folder()
    files = {
        entry.name.removesuffix(".json"): entry
        for entry in (folder.iterdir() if folder is not None else ())
        if entry.name.endswith(".json")
    }
    return {
        name: loads_profile(files[name].read_bytes(), origin=f"shipped profile {name}")
        for name in sorted(files)
    }


def find_shipped(config: Mapping[str, Any]) -> HeadProfile:
    """The shipped profile of this model's architecture.

    Args:
        config: Contents of the model's `config.json`.

    Returns:
        The profile; its `origin` says which one it is.

    Raises:
        ProfileError: None fits; the message lists those there are.
    """
    shape = ModelShape.from_config(config)
    shipped = shipped_profiles()
    for profile in shipped.values():
        if profile.fingerprint == shape.fingerprint:
            return profile
    listed = ", ".join(f"{name} ({_describe(p.model)})" for name, p in shipped.items()) or "none"
    raise ProfileError(
        f"no shipped profile fits this model ({_describe(shape)}); shipped are: {listed}",
        remedy="Make one with `hetero-sglang profile --model DIR --out FILE` and pass it with "
        "--kv-policy-profile FILE",
    )


def _folder() -> Traversable | None:
    # Absent when the package runs from a checkout that was never installed.
    if importlib.util.find_spec(_PACKAGE) is not None:
        return importlib.resources.files(_PACKAGE)
    checkout = Path(__file__).resolve().parents[2] / "profiles"
    return checkout if checkout.is_dir() else None


def _describe(model: ModelShape) -> str:
    return (
        f"{model.architecture} with {model.num_layers} layers, {model.num_q_heads} query and "
        f"{model.num_kv_heads} KV heads of {model.head_dim}"
    )
