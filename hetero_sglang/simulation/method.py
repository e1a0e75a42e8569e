"""The method's rules as plain functions: budget, pooled scores, top-k sets, overlap.

Written from the method's description alone. Shapes use ``L`` layers, ``H`` KV heads a layer,
``G`` query heads a KV head, ``D`` head dim, ``N`` prompt tokens. Scores are fp32.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    from hetero_sglang.profile import HeadProfile

ANCHOR, VOLATILE, PIVOT, SATELLITE = 1, 2, 3, 4
POOL_KERNEL = 5
NUM_SINKS = 4
INT4_GROUP = 32


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

    @classmethod
    def uniform(cls, num_layers: int, num_heads: int) -> Profile:
        """All heads alike and nobody watching: with a window this is SnapKV."""
        roles = [[ANCHOR] * num_heads for _ in range(num_layers)]
        return cls(roles, [[1.0] * num_heads for _ in range(num_layers)], {})

    @classmethod
    def of(cls, profile: HeadProfile) -> Profile:
        """What of a head profile counts here."""
        return cls(profile.roles.tolist(), profile.allocation.tolist(), dict(profile.satellites_of))

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
    """The settings of a server that change what is computed; as they are, the default preset."""

    ratio: float
    """Resident share r of the prompt's KV bytes, in (0, 1]."""
    drift_threshold: float = 0.5
    """A pivot drifts when the median overlap of its last queries is below this."""
    drift_interval: int = 5
    """Steps between checks, S."""
    min_tokens: int = 1024
    """Prompts shorter than this keep everything."""
    is_retrieving: bool = True
    """False: nobody watches and heads keep their positions (retrieval off)."""
    landing_steps: int = 0
    """Steps that fetched rows are late; a refresh after step t counts from step t + 1 + this on.
    Less than ``drift_interval``."""
    has_budgeted_pivots: bool = True
    """Pivots keep a budget of rows and all keys, which they watch with; False: all rows."""
    watched_bits: int = 8
    """Bits of an element of a budgeted pivot's watched keys: 8, 4, or those of the KV dtype."""
    priced_bits: int = 0
    """Bits that an element of a watched key is charged for, if not those it has; for studies."""
    window: int = 32
    """Prompt tokens whose mean attention selects; they and the sinks stay. 1: the last token's
    query, maximum over the group, nothing stays."""
    refresh_share: float = 0.25
    """Share of a refreshed head's budget that the pivot's best positions must have; of what it held
    the worst by the pivot's scores go. 1: the pivot's best take it all."""
    is_filling: bool = True
    """What a head clamped at the prompt length leaves of its budget goes to the others."""
    item_bits: int = 32
    """Bits of an element of the KV dtype; decides what share of a row a watched key is."""

    @classmethod
    def paper(cls, ratio: float, **changes: Any) -> Method:
        """The method of arXiv 2601.13684."""
        settings = {
            "has_budgeted_pivots": False,
            "window": 1,
            "refresh_share": 1.0,
            "min_tokens": 1,
            "is_filling": False,
            **changes,
        }
        return cls(ratio, **settings)

    def watched_share(self, head_dim: int) -> float:
        """Bytes of a watched key over those of a row's K and V; 0 where nothing is watched."""
        if not (self.has_budgeted_pivots and (self.is_retrieving or self.priced_bits)):
            return 0.0
        if self.ratio >= 1 and self.is_filling:
            return 0.0
        bits = self.priced_bits or self.watched_bits
        return watched_key_bits(bits, head_dim) / (2 * head_dim * self.item_bits)


@dataclass(frozen=True)
class Budget:
    """How many prompt positions each head keeps."""

    base: int
    """Reference budget; a pivot's reference set holds max(1, base) positions."""
    tokens: dict[tuple[int, int], int] = field(repr=False)
    """Budget of each anchor and satellite."""
    keeps_all: bool
    """Nothing is dropped: no selection, no drift checks."""


def held_heads(profile: Profile, method: Method, head_dim: int) -> float:
    """Rows that each prompt token costs whatever the budgets are."""
    volatile, pivots = len(profile.heads(VOLATILE)), len(profile.heads(PIVOT))
    share = method.watched_share(head_dim) if method.has_budgeted_pivots else 1.0
    return volatile + share * pivots


def head_budgets(profile: Profile, method: Method, num_prompt: int, head_dim: int) -> Budget:
    """Budget of every compressed head for a prompt of ``num_prompt`` tokens.

    Raises:
        ValueError: the ratio is at or under the profile's floor.
    """
    total = profile.num_layers * profile.num_heads
    held = held_heads(profile, method, head_dim)
    room = method.ratio * total - held
    if room <= 0:
        raise ValueError(f"ratio {method.ratio} is not above the floor {held / total:.4f}")
    budgeted = (ANCHOR, SATELLITE, PIVOT) if method.has_budgeted_pivots else (ANCHOR, SATELLITE)
    compressed = profile.heads(*budgeted)
    base = math.floor(room * num_prompt / len(compressed) + 1e-9)
    is_whole = method.is_filling and base >= num_prompt
    if num_prompt < method.min_tokens or base < 1 or is_whole:
        return Budget(num_prompt, dict.fromkeys(compressed, num_prompt), keeps_all=True)
    base = min(base, num_prompt)
    weights = [
        1.0 if profile.roles[layer][head] == PIVOT else profile.allocation[layer][head]
        for layer, head in compressed
    ]
    level: float = base
    if method.is_filling:
        level = _water_level(weights, num_prompt, base * len(compressed))
    tokens = {
        head: math.floor(min(num_prompt, level * weight) + 1e-9)
        for head, weight in zip(compressed, weights, strict=True)
    }
    return Budget(base, tokens, keeps_all=all(t == num_prompt for t in tokens.values()))


def watched_key_bits(bits: int, head_dim: int) -> int:
    """Bits of one watched key with its scales (16 bits each): one for 8 bits, for 4 bits one for
    every 32 elements, none for wider elements."""
    num_scales = {8: 1, 4: head_dim // INT4_GROUP}.get(bits, 0)
    return head_dim * bits + 16 * num_scales


def quantise(keys: Tensor, bits: int) -> Tensor:
    """What keys are worth after a way through ``bits`` bits, fp32 [N, D]."""
    if bits not in (8, 4):
        return keys
    N, D = keys.shape
    groups = keys.reshape(N, -1, D if bits == 8 else INT4_GROUP)
    largest = 2 ** (bits - 1) - 1
    step = (groups.abs().amax(-1, keepdim=True) / largest).bfloat16().float()
    whole = torch.round(groups / step).clamp(-largest, largest).nan_to_num()
    rounded: Tensor = (whole * step).reshape(N, D)
    return rounded


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


def window_scores(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Score of every prompt position by the mean attention of the prompt's last W tokens.

    Args:
        queries: Query vectors of the head's group, fp32 [W, G, D].
        keys: The prompt's keys, fp32 [N, D].
        scale: Factor on the dot products.

    Returns:
        Mean over W and G of the causal attention, averaged over windows of 5 positions, fp32 [N].
    """
    W, N = queries.shape[0], keys.shape[0]
    attention = torch.zeros(N, device=keys.device)
    for w in range(W):
        seen = N - W + w + 1
        attention[:seen] += torch.softmax(queries[w] @ keys[:seen].T * scale, dim=-1).mean(0)
    padded = F.pad(attention / W, (POOL_KERNEL // 2, POOL_KERNEL // 2))
    return padded.unfold(0, POOL_KERNEL, 1).mean(-1)


def protect(scores: Tensor, window: int) -> Tensor:
    """Scores with the window and the sinks above all else: sinks first, then newest first."""
    if window == 1:
        return scores
    scores = scores.clone()
    N = scores.shape[-1]
    for position in range(max(0, N - window), N):
        scores[position] = 2 + (position + 1) / N
    for position in range(min(NUM_SINKS, N)):
        scores[position] = 8 - position
    return scores


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
