"""What a model's heads might have done, made up from a seed: for pages without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hetero_sglang.profile import HeadRole
from hetero_sglang.profiler.behaviour import HeadBehaviour

if TYPE_CHECKING:
    from hetero_sglang.profile import HeadProfile


def synthetic_behaviour(
    profile: HeadProfile, *, num_steps: int = 6, num_bins: int = 8, seed: int = 0
) -> HeadBehaviour:
    """Heads of a profile over a prompt of 400 tokens, compared by their 100 best positions.

    Heads with a recorded stability are about as stable as that; the rest is noise.
    """
    random = np.random.default_rng(seed)
    per_step = (num_steps + 1, *profile.roles.shape)
    is_satellite = profile.roles == HeadRole.SATELLITE
    stability = (
        np.full(profile.roles.shape, 0.6) if profile.stability is None else profile.stability
    )
    noise = random.uniform(-0.1, 0.1, (num_steps, *profile.roles.shape))
    on_own = random.uniform(0.3, 0.9, per_step)
    masses = random.dirichlet(np.full(num_bins, 0.3), per_step)
    return HeadBehaviour(
        num_prompt_tokens=400,
        top_k=100,
        overlap_with_prompt=np.clip(stability + noise, 0.0, 1.0),
        overlap_with_pivot=np.where(is_satellite, random.uniform(0.2, 1.0, per_step), np.nan),
        mass_on_pivot=np.where(is_satellite, on_own * random.uniform(0.5, 1.0, per_step), np.nan),
        mass_on_own=np.where(is_satellite, on_own, np.nan),
        mass_by_bin=masses.astype(np.float32),
    )
