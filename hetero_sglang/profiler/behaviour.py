"""What heads do on one prompt, seen with a profile in hand.

A profile promises that stable heads stay where they are and that a pivot speaks for its satellites.
`watch_behaviour` reads one more prompt and notes what came of both promises, step by step, and
where each head looked. Only sums over positions are kept, never more than one step of attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hetero_sglang.errors import ConfigError, ProfileError
from hetero_sglang.profiler.observation import overlap, top_mask
from hetero_sglang.progress import Progress, no_progress

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_sglang.profile import HeadProfile
    from hetero_sglang.profiler.watching import Watchable

__all__ = ["HeadBehaviour", "watch_behaviour"]


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadBehaviour:
    """A model's heads over one prompt and the tokens decoded after it.

    Step 0 is the prompt's last token, step s the s-th decoded one; a head's best positions are
    those of `top_mask`. Masses are shares of all that a query attends to, decoded tokens included,
    so a step's masses over the prompt sum to 1 at step 0 and to less later.

    Attributes:
        num_prompt_tokens: Tokens of the prompt.
        top_k: Size of the sets of best positions.
        overlap_with_prompt: Share of the best positions of step 0 that are among the best of steps
            1 and on, fp64 [num_steps, num_layers, num_kv_heads].
        overlap_with_pivot: Share of its best positions that a satellite has in common with its
            pivot at the same step, fp64 [num_steps + 1, num_layers, num_kv_heads]; NaN for heads
            that are no satellites, here and in the next two.
        mass_on_pivot: Attention of a satellite that falls on its pivot's best positions, fp64
            [num_steps + 1, num_layers, num_kv_heads].
        mass_on_own: Attention of a satellite that falls on its own best positions, same shape.
        mass_by_bin: Attention to each of equal stretches of the prompt, fp32
            [num_steps + 1, num_layers, num_kv_heads, num_bins].
    """

    num_prompt_tokens: int
    top_k: int
    overlap_with_prompt: NDArray[np.float64]
    overlap_with_pivot: NDArray[np.float64]
    mass_on_pivot: NDArray[np.float64]
    mass_on_own: NDArray[np.float64]
    mass_by_bin: NDArray[np.float32]

    @property
    def num_steps(self) -> int:
        """Tokens decoded after the prompt."""
        return len(self.overlap_with_prompt)

    @property
    def overlap_by_chance(self) -> float:
        """Overlap to expect of two sets of positions drawn at random."""
        return self.top_k / self.num_prompt_tokens


def watch_behaviour(
    model: Watchable,
    prompt: torch.Tensor,
    profile: HeadProfile,
    *,
    top_k: int,
    num_steps: int,
    num_bins: int = 64,
    progress: Progress = no_progress,
) -> HeadBehaviour:
    """Reads a prompt, decodes greedily, and notes how the heads of a profile behave.

    Args:
        model: The model that the profile was made of.
        prompt: Token ids, int64 [num_tokens].
        profile: Says which head follows which.
        top_k: Size of the sets of best positions, at least 1 and below num_tokens.
        num_steps: Tokens to decode, at least 1.
        num_bins: Stretches of the prompt in `mass_by_bin`, at least 1; one for each token where
            the prompt has fewer tokens.
        progress: Told about the work done, in passes through the model.

    Raises:
        ProfileError: The profile is of a model with other layers or heads.
        ConfigError: A number is out of range.
    """
    num_tokens = len(prompt)
    _check_heads(profile, model)
    _check_numbers(top_k, num_steps, num_bins, num_tokens)
    num_bins = min(num_bins, num_tokens)
    followers = _Followers(profile)
    to_prompt, to_pivot, on_pivot, on_own, by_bin = [], [], [], [], []
    progress("reading the prompt", 0, num_steps + 1)
    for step, attention in enumerate(model.attention(prompt, num_steps)):
        best = top_mask(attention, top_k)  # [L, H, N]
        if step == 0:
            best_of_prompt = best
        else:
            to_prompt.append(overlap(best_of_prompt, best).cpu().numpy())
        own, pivots = best[followers.satellites], best[followers.pivots]  # [num_satellites, N]
        looks = attention[followers.satellites]
        to_pivot.append(followers.spread(overlap(own, pivots)))
        on_pivot.append(followers.spread((looks * pivots).sum(dim=-1)))
        on_own.append(followers.spread((looks * own).sum(dim=-1)))
        by_bin.append(_mass_by_bin(attention, num_bins).cpu().numpy())
        progress("decoding", step + 1, num_steps + 1)
    return HeadBehaviour(
        num_prompt_tokens=num_tokens,
        top_k=top_k,
        overlap_with_prompt=np.stack(to_prompt),
        overlap_with_pivot=np.stack(to_pivot),
        mass_on_pivot=np.stack(on_pivot),
        mass_on_own=np.stack(on_own),
        mass_by_bin=np.stack(by_bin),
    )


class _Followers:
    """Every satellite of a profile beside its pivot, as indices into [num_layers, num_kv_heads]."""

    def __init__(self, profile: HeadProfile) -> None:
        pairs = [
            (layer, satellite, pivot)
            for (layer, pivot), satellites in profile.satellites_of.items()
            for satellite in satellites
        ]
        layers, satellites, pivots = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3).T
        self.satellites = (layers, satellites)
        self.pivots = (layers, pivots)
        self._shape = profile.roles.shape

    def spread(self, values: torch.Tensor) -> NDArray[np.float64]:
        """Values of the satellites at their places among all heads; NaN elsewhere."""
        spread = torch.full(self._shape, torch.nan, dtype=torch.float64)
        spread[self.satellites] = values.double().cpu()
        return spread.numpy()


def _mass_by_bin(attention: torch.Tensor, num_bins: int) -> torch.Tensor:
    """Sums over equal stretches of positions: [..., num_positions] to [..., num_bins]."""
    num_positions = attention.shape[-1]
    bin_of = torch.arange(num_positions, device=attention.device) * num_bins // num_positions
    sums = attention.new_zeros(*attention.shape[:-1], num_bins)
    return sums.index_add_(-1, bin_of, attention)


def _check_heads(profile: HeadProfile, model: Watchable) -> None:
    ours, theirs = profile.model, model.shape
    if (ours.num_layers, ours.num_kv_heads) != (theirs.num_layers, theirs.num_kv_heads):
        name = profile.provenance.model or profile.origin or "unnamed"
        raise ProfileError(
            f"profile of {name} has {ours.num_layers} layers of {ours.num_kv_heads} KV heads, "
            f"model {model.name} has {theirs.num_layers} of {theirs.num_kv_heads}",
            remedy="Give the model that the profile was made of",
        )


def _check_numbers(top_k: int, num_steps: int, num_bins: int, num_tokens: int) -> None:
    for name, value in (("top_k", top_k), ("num_steps", num_steps), ("num_bins", num_bins)):
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if top_k >= num_tokens:
        raise ConfigError(
            f"the prompt must have more than top_k ({top_k}) tokens, got {num_tokens}"
        )
