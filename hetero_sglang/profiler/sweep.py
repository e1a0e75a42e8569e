"""How sensitive a profile is to its settings: what thresholds and set sizes do to answers.

Every point of a grid becomes a profile, and every profile's answers are simulated and compared with
full attention's. No text is judged by a profile that has seen it: a text is left out of the profile
it judges, or other texts judge.

Source: the second of the paper's "next checks"; HeteroCache (arXiv 2601.13684) section 3.1 for what
the thresholds mean.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from dataclasses import dataclass
from statistics import mean
from typing import TYPE_CHECKING

from hetero_sglang.errors import ConfigError
from hetero_sglang.profile import HeadRole, Thresholds
from hetero_sglang.profiler.calibration import calibration_prompts, observe
from hetero_sglang.progress import Progress, no_progress
from hetero_sglang.simulation import (
    Fidelity,
    Method,
    Simulation,
    compare_distributions,
    distributions,
    prefill,
)
from hetero_sglang.simulation import Profile as SimulatedProfile
from hetero_sglang.simulation.method import held_heads

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from hetero_sglang.profile import HeadProfile
    from hetero_sglang.profiler.calibration import Calibration, Observations
    from hetero_sglang.profiler.texts import CalibrationText
    from hetero_sglang.profiler.watching import WatchedModel

__all__ = ["Sweep", "SweepPoint", "sweep_profiles", "to_csv"]

_ITEM_BITS = 16
"""Of KV elements: decides what share of a row a watched key is."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The grid, and how each of its points is judged."""

    stable: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7)
    """Thresholds of stability."""
    similarity: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7)
    """Thresholds of similarity."""
    top_k: tuple[int, ...] = (1024,)
    """Sizes of the compared sets."""
    ratios: tuple[float, ...] = (0.3, 0.5)
    """Resident shares at which answers are compared, each in (0, 1]."""
    num_fed: int = 64
    """Tokens that are fed after each prompt, at least 2."""
    is_paper: bool = False
    """Whether the method is that of the preset `paper` instead of `default`."""

    def __post_init__(self) -> None:
        """Checks what the field descriptions say.

        Raises:
            ConfigError: A value is out of range or nothing is to be done.
        """
        for name in ("stable", "similarity", "top_k", "ratios"):
            if not getattr(self, name):
                raise ConfigError(f"sweep needs at least one value of {name}, got none")
        for name in ("stable", "similarity"):
            for value in getattr(self, name):
                if not 0.0 <= value <= 1.0:
                    raise ConfigError(f"{name} must be in [0, 1], got {value:g}")
        for ratio in self.ratios:
            if not 0.0 < ratio <= 1.0:
                raise ConfigError(f"ratios must be above 0 and at most 1, got {ratio:g}")
        if self.num_fed < 2:
            raise ConfigError(f"num_fed must be at least 2, got {self.num_fed}")

    def method(self, ratio: float) -> Method:
        """The method that answers are simulated with."""
        if self.is_paper:
            return Method.paper(ratio, item_bits=_ITEM_BITS)
        return Method(ratio, item_bits=_ITEM_BITS)


@dataclass(frozen=True)
class SweepPoint:
    """One profile at one ratio.

    Attributes:
        top_k: Size of the compared sets.
        stable: Threshold of stability.
        similarity: Threshold of similarity.
        anchor: Heads of this role, in the profile made of all calibration texts.
        volatile: The same.
        pivot: The same.
        satellite: The same.
        floor: Share of a prompt's bytes that no budget takes away, under the sweep's preset.
        ratio: Resident share.
        kl: Mean KL divergence from full attention, nats a token; None where the ratio is not above
            the floor of some text's profile.
        top1: Share of tokens whose likeliest candidate is full attention's; None likewise.
    """

    top_k: int
    stable: float
    similarity: float
    anchor: int
    volatile: int
    pivot: int
    satellite: int
    floor: float
    ratio: float
    kl: float | None
    top1: float | None


def sweep_profiles(
    model: WatchedModel,
    texts: Sequence[CalibrationText],
    calibration: Calibration,
    sweep: Sweep,
    *,
    judges: Sequence[CalibrationText] = (),
    progress: Progress = no_progress,
) -> list[SweepPoint]:
    """Judges the profiles of a grid of settings.

    Args:
        model: The model, in float32.
        texts: Calibration texts.
        calibration: Settings of the runs; top_k and thresholds are the grid's. Its longest prompt
            length is also that of the judging prompts, which are texts' first tokens.
        sweep: The grid.
        judges: Texts to judge by. Without them each calibration text judges the profiles made of
            the others, of which there must be at least one.
        progress: Told about the work done.

    Returns:
        A point for each combination and ratio; top_k varies slowest, then stable, similarity,
        ratio.

    Raises:
        ConfigError: A text is too short, or there are too few.
    """
    if not judges and len(texts) < 2:
        raise ConfigError(
            f"one calibration text ({texts[0].name}) cannot judge a profile made of itself; give "
            "a second text, or texts to judge by"
        )
    length = max(calibration.prompt_lengths)
    excerpts = calibration_prompts(model, judges or texts, (length + sweep.num_fed,))
    runs = {}
    for top_k in sweep.top_k:
        settings = dataclasses.replace(calibration, top_k=top_k)
        prompts = calibration_prompts(model, texts, settings.prompt_lengths)
        runs[top_k] = observe(
            model,
            prompts,
            settings,
            progress=_titled(f"top {top_k}", progress),
        )
    grid = [
        (top_k, Thresholds(stable=stable, similarity=similarity))
        for top_k in sweep.top_k
        for stable in sweep.stable
        for similarity in sweep.similarity
    ]
    found: dict[tuple[int, float], list[Fidelity | None]] = {
        (index, ratio): [] for index in range(len(grid)) for ratio in sweep.ratios
    }
    total, done = len(excerpts) * len(found), 0
    for excerpt in excerpts:
        progress(f"{excerpt.name}: full attention", done, total)
        ids = excerpt.token_ids.tolist()
        judge = _Judge(model, sweep, ids[:length], ids[length:])
        for index, (top_k, thresholds) in enumerate(grid):
            run = runs[top_k]
            unseen = run if judges else _without(run, excerpt.name)
            profile = unseen.profile(thresholds=thresholds)
            for ratio in sweep.ratios:
                progress(f"{excerpt.name}: judging", done, total)
                found[index, ratio].append(judge.fidelity(profile, ratio))
                done += 1
    progress("done", total, total)
    return [
        _point(runs[top_k].profile(thresholds=thresholds), sweep, ratio, found[index, ratio])
        for index, (top_k, thresholds) in enumerate(grid)
        for ratio in sweep.ratios
    ]


def to_csv(points: Sequence[SweepPoint]) -> str:
    """The points as CSV with a header; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in dataclasses.fields(SweepPoint)]
    writer.writerow(names)
    for point in points:
        values = (getattr(point, name) for name in names)
        writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in values)
    return text.getvalue()


class _Judge:
    """One prompt after full attention, and what was already simulated from it."""

    def __init__(
        self, model: WatchedModel, sweep: Sweep, prompt: list[int], following: list[int]
    ) -> None:
        self._model = model.model
        self._sweep = sweep
        self._following = following
        self._prefill = prefill(self._model, prompt)
        shape = model.shape
        uniform = SimulatedProfile.uniform(shape.num_layers, shape.num_kv_heads)
        self._full = self._distributions(uniform, Method(1.0))
        self._known: dict[tuple[str, float], Fidelity] = {}

    def fidelity(self, profile: HeadProfile, ratio: float) -> Fidelity | None:
        """Nearness of the profile's answers to full attention's; None under the floor."""
        method = self._sweep.method(ratio)
        simulated = SimulatedProfile.of(profile)
        head_dim = profile.model.head_dim
        if ratio * profile.num_heads <= held_heads(simulated, method, head_dim):
            return None
        # Thresholds that lead to the same roles lead to the same answers.
        key = (f"{simulated}", ratio)
        if key not in self._known:
            answers = self._distributions(simulated, method)
            self._known[key] = compare_distributions(self._full, answers)
        return self._known[key]

    def _distributions(self, profile: SimulatedProfile, method: Method) -> torch.Tensor:
        simulation = Simulation(self._model, profile, method)
        return distributions(simulation, self._prefill, self._following)


def _titled(title: str, progress: Progress) -> Progress:
    return lambda stage, done, total: progress(f"{title}: {stage}", done, total)


def _without(run: Observations, name: str) -> Observations:
    """The run less the prompts of one text."""
    kept = tuple(p for p in run.prompts if p.name != name and not p.name.startswith(f"{name} ("))
    return dataclasses.replace(run, prompts=kept)


def _point(
    profile: HeadProfile, sweep: Sweep, ratio: float, found: Sequence[Fidelity | None]
) -> SweepPoint:
    thresholds = profile.thresholds
    assert thresholds is not None
    held = held_heads(SimulatedProfile.of(profile), sweep.method(ratio), profile.model.head_dim)
    measured = [one for one in found if one is not None]
    is_complete = len(measured) == len(found)
    return SweepPoint(
        top_k=profile.provenance.top_k,
        stable=thresholds.stable,
        similarity=thresholds.similarity,
        anchor=profile.counts[HeadRole.ANCHOR],
        volatile=profile.counts[HeadRole.VOLATILE],
        pivot=profile.counts[HeadRole.PIVOT],
        satellite=profile.counts[HeadRole.SATELLITE],
        floor=held / profile.num_heads,
        ratio=ratio,
        kl=mean(one.kl for one in measured) if is_complete else None,
        top1=mean(one.top1 for one in measured) if is_complete else None,
    )
