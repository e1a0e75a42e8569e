"""Decides whether a server's tokens are the simulation's, and accepts ties only with evidence.

Two correct programs add numbers in different orders. Where two logits, two selection scores or an
overlap and its threshold are closer than that rounding, either outcome is right. Such a divergence
is never excused by its look: the simulation is run again on the server's tokens, with the near-tie
decided the other way, and must then agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from hetero_sglang.simulation.engine import Event, Prefill, Simulation, Trace

LOGIT_TIE = 1e-3
"""Two fp32 implementations of a 30-layer model differ by up to a few 1e-4 in a logit."""
LOGPROB_TOLERANCE = 2e-3
"""Largest difference of a token's log-probability, whether or not it is the simulation's choice."""
SELECTION_TIE = 1e-3
"""Relative gap of scores under which a boundary position may fall on either side."""
DRIFT_TIE_POSITIONS = 1.0
"""A median overlap this near to the threshold (in positions of the set) may fall either way."""
MAX_INVERSIONS = 4


@dataclass(frozen=True)
class Verdict:
    """How a stream of tokens compares with the simulation."""

    is_accepted: bool
    trace: Trace
    """The simulation on the server's tokens, as it was accepted or (else) without any excuse."""
    mismatches: tuple[int, ...]
    """Indices of the tokens that are not the simulation's own choice."""
    logprob_error: float
    """Largest difference of a log-probability in ``trace``; 0 if none were given."""
    evidence: str
    """One line for the log or the failure message."""


@dataclass(frozen=True)
class Stream:
    """What a server answered."""

    tokens: Sequence[int]
    logprobs: Sequence[float] = ()
    """Log-probability of every token, or nothing."""


def compare(simulation: Simulation, prompt: Prefill, stream: Stream) -> Verdict:
    """Check every token of a stream, each in the context of the server's own earlier tokens."""
    trace = simulation.follow(prompt, stream.tokens)
    mismatches, error = _mismatches(trace, stream), _logprob_error(trace, stream)
    if _is_near(trace, stream):
        evidence = f"logit ties: {_describe(trace, stream)}" if mismatches else "equal"
        return Verdict(True, trace, mismatches, error, evidence)
    first = min(i for i in range(len(stream.tokens)) if not _is_near_at(trace, stream, i))
    for variant, why in _near_ties(simulation, trace, before=first):
        other = variant.follow(prompt, stream.tokens)
        if _is_near(other, stream):
            return Verdict(True, other, mismatches, _logprob_error(other, stream), why)
    return Verdict(False, trace, mismatches, error, _describe(trace, stream))


def _near_ties(
    simulation: Simulation, trace: Trace, *, before: int
) -> Iterable[tuple[Simulation, str]]:
    """The simulation with near-ties that token ``before`` could have felt decided otherwise.

    A decision of step s counts from step s + 1 on, and step s + 1 makes token s + 1.
    """
    swapped: set[Event] = {
        (s.step, s.layer, s.head)
        for s in trace.selections
        if s.step < before and s.margin < SELECTION_TIE
    }
    if swapped:
        yield simulation.variant(swapped=swapped), f"selection ties at {sorted(swapped)}"
    inverted: list[Event] = [
        (c.step, c.layer, c.pivot)
        for c in reversed(trace.checks)
        if c.step < before and c.distance <= DRIFT_TIE_POSITIONS
    ]
    for event in inverted[:MAX_INVERSIONS]:
        yield simulation.variant(inverted={event}), f"drift tie at {event}"
        if swapped:
            both = simulation.variant(swapped=swapped, inverted={event})
            yield both, f"drift tie at {event}, selection ties at {sorted(swapped)}"


def _mismatches(trace: Trace, stream: Stream) -> tuple[int, ...]:
    pairs = zip(trace.tokens, stream.tokens, strict=True)
    return tuple(i for i, (ours, theirs) in enumerate(pairs) if ours != theirs)


def _logprob_error(trace: Trace, stream: Stream) -> float:
    if not stream.logprobs:
        return 0.0
    pairs = zip(trace.logprobs, stream.logprobs, strict=True)
    return max(abs(ours - theirs) for ours, theirs in pairs)


def _is_near_at(trace: Trace, stream: Stream, index: int) -> bool:
    if trace.deficits[index] > LOGIT_TIE:
        return False
    if not stream.logprobs:
        return True
    return abs(trace.logprobs[index] - stream.logprobs[index]) <= LOGPROB_TOLERANCE


def _is_near(trace: Trace, stream: Stream) -> bool:
    return all(_is_near_at(trace, stream, i) for i in range(len(stream.tokens)))


def _describe(trace: Trace, stream: Stream) -> str:
    wrong = _mismatches(trace, stream)
    shown = ", ".join(
        f"token {i}: {stream.tokens[i]} is {trace.deficits[i]:.2e} under {trace.tokens[i]}"
        for i in wrong[:5]
    )
    error = _logprob_error(trace, stream)
    return f"{len(wrong)} of {len(stream.tokens)} differ ({shown}); logprobs by {error:.1e}"
