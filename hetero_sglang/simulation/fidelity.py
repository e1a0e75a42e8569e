"""How near a method's next-token distributions are to full attention's.

Teacher-forced: after a prompt the text's own next tokens are fed, and at every one the
distributions are compared. Rows that are fetched count from the next step on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hetero_sglang.simulation.engine import Prefill, Simulation

__all__ = ["Fidelity", "compare_distributions", "distributions"]


@dataclass(frozen=True)
class Fidelity:
    """Nearness to full attention over the tokens that were fed.

    Attributes:
        kl: Mean KL divergence of the distributions from full attention's, nats a token.
        top1: Share of tokens at which both think the same token the likeliest.
    """

    kl: float
    top1: float


def distributions(
    simulation: Simulation, prompt: Prefill, following: Sequence[int]
) -> torch.Tensor:
    """Log-probabilities of all tokens at every step, fp32 [num_steps, vocab].

    Args:
        simulation: Method and profile on a model.
        prompt: A prompt after full attention.
        following: Token ids that are fed after it.
    """
    trace = simulation.follow(prompt, following, with_distributions=True)
    return torch.stack(trace.distributions)


def compare_distributions(full: torch.Tensor, other: torch.Tensor) -> Fidelity:
    """Compares what two methods expected at the same steps.

    Args:
        full: Log-probabilities under full attention, fp32 [num_steps, vocab], num_steps above 1.
        other: Those of the method, same shape.
    """
    # The first token comes from full attention in every method.
    full, other = full[1:], other[1:]
    kl = (full.exp() * (full - other)).sum(-1).mean().item()
    top1 = (full.argmax(-1) == other.argmax(-1)).float().mean().item()
    return Fidelity(kl, top1)
