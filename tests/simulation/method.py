"""The method's rules as plain functions: budget, pooled scores, top-k sets, overlap.

Written from the method's description alone. Shapes use ``L`` layers, ``H`` KV heads a layer,
``G`` query heads a KV head, ``D`` head dim, ``N`` prompt tokens. Scores are fp32.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

ANCHOR, VOLATILE, PIVOT, SATELLITE = 1, 2, 3, 4
POOL_KERNEL = 5


@dataclass(frozen=True)
class Profile:
    """What the simulation needs to know of a head profile."""

    roles: list[list[int]]
    """Role number of each head, [L][H]."""
    allocation: list[list[float]]
    """Budget weight of each anchor and satellite (mean 1), [L][H]; 0 elsewhere."""
    satellites_of: dict[tuple[int, int], tuple[int, ...]]
    """Heads that follow each pivot (layer, head); they are of the pivot's layer."""

    @property
    def num_layers(self) -> int:
        """Layers, L."""
        return len(self.roles)

    @property
    def num_heads(self) -> int:
        """KV heads a layer, H."""
        return len(self.roles[0])

    def heads(self, *wanted: int) -> list[tuple[int, int]]:
        """All (layer, head) whose role is one of ``wanted``, in order."""
        return [
            (layer, head)
            for layer, row in enumerate(self.roles)
            for head, role in enumerate(row)
            if role in wanted
        ]

    @property
    def floor(self) -> float:
        """Share of heads that keep everything whatever the ratio."""
        return len(self.heads(PIVOT, VOLATILE)) / (self.num_layers * self.num_heads)

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Read a shipped profile (JSON) without the plugin's own reader."""
        data = json.loads(path.read_text())
        satellites = {
            (cluster["layer"], cluster["pivot"]): tuple(cluster["satellites"])
            for cluster in data["satellites_of"]
        }
        profile = cls(data["roles"], data["allocation"], satellites)
        followers = [(layer, h) for (layer, _), heads in satellites.items() for h in heads]
        if sorted(followers) != profile.heads(SATELLITE):
            raise ValueError(f"{path}: satellites_of does not name every satellite exactly once")
        return profile


@dataclass(frozen=True)
class Method:
    """The settings of a server that change what is computed."""

    ratio: float
    """Resident share r of the prompt's KV, in (0, 1]."""
    drift_threshold: float = 0.5
    """A pivot drifts when the median overlap of its last queries is below this."""
    drift_interval: int = 5
    """Steps between checks, S."""
    min_tokens: int = 1024
    """Prompts shorter than this keep everything."""
    is_retrieving: bool = True
    """False: drift is seen but satellites keep their positions (retrieval off)."""
    landing_steps: int = 0
    """Steps that fetched rows are late; a refresh after step t counts from step t + 1 + this on.
    Less than ``drift_interval``."""


@dataclass(frozen=True)
class Budget:
    """How many prompt positions each head keeps."""

    base: int
    """Reference budget; a pivot's reference set holds max(1, base) positions."""
    tokens: dict[tuple[int, int], int] = field(repr=False)
    """Budget of each anchor and satellite."""
    keeps_all: bool
    """Nothing is dropped: no selection, no drift checks."""


def head_budgets(profile: Profile, method: Method, num_prompt: int) -> Budget:
    """Budget of every compressed head for a prompt of ``num_prompt`` tokens.

    Raises:
        ValueError: the ratio is at or under the profile's floor.
    """
    total = profile.num_layers * profile.num_heads
    whole = len(profile.heads(PIVOT, VOLATILE))
    room = method.ratio * total - whole
    if room <= 0:
        raise ValueError(f"ratio {method.ratio} is not above the floor {profile.floor:.4f}")
    compressed = profile.heads(ANCHOR, SATELLITE)
    base = math.floor(room * num_prompt / (total - whole) + 1e-9)
    if num_prompt < method.min_tokens or base >= num_prompt:
        return Budget(num_prompt, dict.fromkeys(compressed, num_prompt), keeps_all=True)
    weights = [profile.allocation[layer][head] for layer, head in compressed]
    level = _water_level(weights, num_prompt, base * len(compressed))
    tokens = {
        head: math.floor(min(num_prompt, level * weight) + 1e-9)
        for head, weight in zip(compressed, weights, strict=True)
    }
    return Budget(base, tokens, keeps_all=all(t == num_prompt for t in tokens.values()))


def _water_level(weights: list[float], cap: int, target: int) -> float:
    """The factor f for which ``sum(min(cap, f * w))`` is ``target``."""
    descending = sorted(weights, reverse=True)
    for num_full in range(len(descending)):
        rest = sum(descending[num_full:])
        level = (target - num_full * cap) / rest
        if level * descending[num_full] <= cap:
            return level
    raise ValueError(f"{target} tokens do not fit {len(weights)} heads of {cap}")


def pooled_scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Score of every prompt position for one KV head.

    Args:
        queries: Query vectors of the head's group, fp32 [..., G, D].
        keys: The prompt's keys, fp32 [N, D].
        scale: Factor on the dot products.

    Returns:
        Attention probabilities over exactly these keys, averaged over a window of 5 positions
        (zeros outside the prompt, always divided by 5), the largest of the G, fp32 [..., N].
    """
    probabilities = torch.softmax(queries @ keys.T * scale, dim=-1)  # [..., G, N]
    flat = probabilities.reshape(-1, 1, probabilities.shape[-1])
    pooled = F.avg_pool1d(
        flat, POOL_KERNEL, stride=1, padding=POOL_KERNEL // 2, count_include_pad=True
    )
    return pooled.reshape(probabilities.shape).amax(dim=-2)


def best_first(scores: Tensor) -> Tensor:
    """Positions by descending score, equal scores by ascending position, int64 [..., N]."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def boundary_margin(scores: Tensor, order: Tensor, budget: int) -> float:
    """Relative gap between the last score taken and the first one left; inf if none is left."""
    if not 0 < budget < scores.shape[-1]:
        return math.inf
    taken, left = scores[order[budget - 1]].item(), scores[order[budget]].item()
    return (taken - left) / taken if taken > 0 else 0.0


def overlap(reference: Tensor, current: Tensor) -> float:
    """Share of the ``reference`` positions [K] that are among ``current`` [K]."""
    return torch.isin(reference, current).sum().item() / reference.numel()


def median(values: list[float]) -> float:
    """Middle value; the mean of the two middle ones for an even count."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
