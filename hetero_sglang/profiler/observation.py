"""What is measured of a model's heads: where they look, and for how long they keep looking there.

Source: HeteroCache (arXiv 2601.13684) section 3.1. Deliberate difference: several prompts may be
observed, of different texts and lengths. They are *pooled* for stability (the median over the
decode steps of all prompts, so each step counts alike) and *averaged* for similarity (the mean over
prompts). With one prompt both are the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from numpy.typing import NDArray

__all__ = [
    "POOL_KERNEL",
    "HeadObserver",
    "PromptObservation",
    "group_mean",
    "newest_attention",
    "overlap",
    "pooled_similarity",
    "pooled_stability",
    "top_mask",
]

POOL_KERNEL = 5


@dataclass(frozen=True)
class PromptObservation:
    """What one prompt and the tokens decoded after it showed of every head.

    Attributes:
        name: Of the prompt: its text's, and where several lengths were taken its length.
        overlaps: Overlap of each decoded token's set of best positions with the set of the prompt's
            last token, fp64 [num_steps, num_layers, num_kv_heads].
        similarity: Overlap of the sets of two heads of a layer at the prompt's last token, fp64
            [num_layers, num_kv_heads, num_kv_heads], symmetric with ones on the diagonal.
    """

    name: str
    overlaps: NDArray[np.float64] = field(repr=False)
    similarity: NDArray[np.float64] = field(repr=False)


def pooled_stability(prompts: Sequence[PromptObservation]) -> NDArray[np.float64]:
    """Median of the overlaps over all decode steps of all prompts.

    Args:
        prompts: At least one.

    Returns:
        fp64 [num_layers, num_kv_heads]; for an even number of steps the mean of the middle two.
    """
    overlaps = np.concatenate([prompt.overlaps for prompt in prompts])
    return np.asarray(np.median(overlaps, axis=0))


def pooled_similarity(prompts: Sequence[PromptObservation]) -> NDArray[np.float64]:
    """Mean of the similarities over prompts.

    Args:
        prompts: At least one.

    Returns:
        fp64 [num_layers, num_kv_heads, num_kv_heads].
    """
    return np.asarray(np.mean([prompt.similarity for prompt in prompts], axis=0))


def newest_attention(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """Where the newest query of one layer looks, averaged over the query heads of each KV head.

    Args:
        query: [num_q_heads, head_dim]; query head j belongs to KV head j // group_size.
        keys: Keys of all tokens so far, [num_kv_heads, num_tokens, head_dim].
        scale: Factor on the dot products.

    Returns:
        Probabilities, fp32 [num_kv_heads, num_tokens].
    """
    num_kv_heads, _, head_dim = keys.shape
    groups = query.float().reshape(num_kv_heads, -1, head_dim)  # [H, G, D]
    scores = groups @ keys.float().transpose(-1, -2) * scale  # [H, G, T]
    return scores.softmax(dim=-1).mean(dim=1)


def group_mean(probabilities: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Attention of KV heads as the mean over the query heads that share each.

    Args:
        probabilities: [..., num_q_heads, num_positions]; query head j belongs to KV head
            j // group_size.
        num_kv_heads: KV heads a layer, a divisor of num_q_heads.

    Returns:
        fp32 [..., num_kv_heads, num_positions].
    """
    *batch, num_q_heads, num_positions = probabilities.shape
    groups = probabilities.float().reshape(
        *batch, num_kv_heads, num_q_heads // num_kv_heads, num_positions
    )
    return groups.mean(dim=-2)


def top_mask(probabilities: torch.Tensor, top_k: int) -> torch.Tensor:
    """Marks the positions with the highest average-pooled probability.

    Pooling has width 5, stride 1 and zero padding 2, and divides by 5 at the edges too. Of equal
    values the lower position wins.

    Args:
        probabilities: fp32 [..., num_positions].
        top_k: Positions to mark in each row, at most num_positions.

    Returns:
        bool [..., num_positions] with exactly `top_k` true values in each row.
    """
    rows = probabilities.reshape(-1, 1, probabilities.shape[-1])
    pooled = functional.avg_pool1d(rows, POOL_KERNEL, stride=1, padding=POOL_KERNEL // 2)
    # The k-th largest value decides; among positions that have just this value the first ones fill
    # up. Same as a stable sort, at a fraction of its time.
    threshold = pooled.topk(top_k, dim=-1).values[..., -1:]
    is_above = pooled > threshold
    is_tied = pooled == threshold
    num_missing = top_k - is_above.sum(dim=-1, keepdim=True)
    mask = is_above | (is_tied & (is_tied.cumsum(dim=-1) <= num_missing))
    return mask.reshape(probabilities.shape)


def overlap(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Share of positions that two sets of equal size have in common.

    Args:
        first: bool [..., num_positions].
        second: bool of the same shape, with as many true values in each row.

    Returns:
        fp64 [...], in [0, 1].
    """
    common = (first & second).sum(dim=-1)
    return common.double() / first.sum(dim=-1)


class HeadObserver:
    """Observes one prompt, one query's attention at a time.

    `begin_prompt` with the last prompt token's attention, then `add_step` for each decoded token.
    Only masks and one number per head and step are kept.
    """

    def __init__(self, top_k: int) -> None:
        """Starts with nothing observed.

        Args:
            top_k: Size of the sets of positions that are compared, at least 1.
        """
        self._top_k = top_k
        self._reference: torch.Tensor | None = None
        self._similarity: NDArray[np.float64] | None = None
        self._overlaps: list[NDArray[np.float64]] = []

    def begin_prompt(self, probabilities: torch.Tensor) -> None:
        """Takes the attention of a prompt's last token over the prompt.

        Args:
            probabilities: [num_layers, num_kv_heads, num_positions].

        Raises:
            ValueError: The prompt is too short for sets of `top_k` positions to tell heads apart.
        """
        num_positions = probabilities.shape[-1]
        if num_positions <= self._top_k:
            raise ValueError(
                f"top_k must be below the number of prompt positions ({num_positions}), "
                f"got {self._top_k}"
            )
        self._reference = top_mask(probabilities, self._top_k)
        members = self._reference.double()
        similarity = members @ members.transpose(-1, -2) / self._top_k
        self._similarity = similarity.cpu().numpy()
        self._overlaps.clear()

    def add_step(self, probabilities: torch.Tensor) -> None:
        """Takes the attention of a decoded token over the prompt's positions.

        Args:
            probabilities: [num_layers, num_kv_heads, num_positions], as for `begin_prompt`.
        """
        assert self._reference is not None, "begin_prompt comes first"
        current = top_mask(probabilities, self._top_k)
        self._overlaps.append(overlap(self._reference, current).cpu().numpy())

    def result(self, name: str = "") -> PromptObservation:
        """What was observed since `begin_prompt`.

        Args:
            name: The prompt's name.
        """
        assert self._similarity is not None, "begin_prompt comes first"
        assert self._overlaps, "no step was added"
        return PromptObservation(name, np.stack(self._overlaps), self._similarity)
