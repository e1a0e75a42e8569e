"""Head profiles: which KV heads need everything and which can do with a part.

A profile is made once per model by `hetero_sglang.profiler` and read by every server. This package
owns its schema, its file format and the profiles that are shipped; it knows nothing of tensors on a
device, of requests or of SGLang.
"""

from __future__ import annotations

from hetero_sglang.profile.head_profile import (
    SCHEMA_VERSION,
    Head,
    HeadProfile,
    Provenance,
    Thresholds,
)
from hetero_sglang.profile.json_format import load_profile, save_profile
from hetero_sglang.profile.model_shape import ModelShape, fingerprint
from hetero_sglang.profile.roles import HeadRole
from hetero_sglang.profile.sharding import floor_by_rank, shard_profile
from hetero_sglang.profile.shipped import find_shipped, shipped_profiles

__all__ = [
    "SCHEMA_VERSION",
    "Head",
    "HeadProfile",
    "HeadRole",
    "ModelShape",
    "Provenance",
    "Thresholds",
    "find_shipped",
    "fingerprint",
    "floor_by_rank",
    "load_profile",
    "save_profile",
    "shard_profile",
    "shipped_profiles",
]
