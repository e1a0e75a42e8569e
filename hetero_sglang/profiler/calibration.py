"""The calibration run: prompts go through a model, its heads are watched, roles come out."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING

import hetero_sglang
from hetero_sglang.errors import ConfigError
from hetero_sglang.profile import HeadProfile, Provenance, Thresholds
from hetero_sglang.profile.compare import kappa, rank_correlation
from hetero_sglang.profiler.checkpoint import Checkpoint
from hetero_sglang.profiler.classify import assign_roles
from hetero_sglang.profiler.observation import (
    POOL_KERNEL,
    HeadObserver,
    PromptObservation,
    pooled_similarity,
    pooled_stability,
)
from hetero_sglang.profiler.texts import CalibrationText, calibration_texts
from hetero_sglang.profiler.watching import DEVICES, DTYPES, Watchable, WatchedModel
from hetero_sglang.progress import Progress, no_progress

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from hetero_sglang.profile import ModelShape

__all__ = [
    "Agreement",
    "Calibration",
    "Observations",
    "Prompt",
    "calibration_prompts",
    "observe",
    "profile_model",
]

_TOKENS_OF_A_STEP = 50
"""Prompt tokens that take about as long as one decoded token; only the progress bar's share."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Settings of a calibration run; the defaults are the paper's."""

    prompt_lengths: tuple[int, ...] = (5000,)
    """Tokens of the prompts, each above `top_k`; every text is read at every length."""
    num_decode_steps: int = 100
    """Greedily decoded tokens whose queries are watched after each prompt, at least 1."""
    top_k: int = 1024
    """Size of the compared sets of positions, at least 1."""
    thresholds: Thresholds = field(default_factory=lambda: Thresholds(stable=0.5, similarity=0.5))
    """Where the lines between the roles are drawn."""
    dtype: str = "auto"
    """Dtype of weights and activations: float32, bfloat16, float16, or auto, which is float32 on a
    CPU and what the weights are stored in on a GPU."""
    device: str = "auto"
    """Where the model runs: cpu, cuda, or auto, which is a GPU where there is one."""
    name: str = ""
    """The model's name in the profile; by default its own."""

    def __post_init__(self) -> None:
        """Checks what the field descriptions say.

        Raises:
            ConfigError: A value is out of range.
        """
        for name in ("num_decode_steps", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.prompt_lengths:
            raise ConfigError("prompt_lengths must name at least one length, got none")
        for length in self.prompt_lengths:
            if length <= self.top_k:
                raise ConfigError(
                    f"prompt_lengths must be above top_k ({self.top_k}), "
                    f"got {length}; take a smaller top_k or a longer prompt"
                )
        for name, known in (("dtype", DTYPES), ("device", DEVICES)):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )


@dataclass(frozen=True)
class Prompt:
    """A calibration text's first tokens.

    Attributes:
        name: The text's name, and where several lengths are taken the length.
        token_ids: int64 [num_tokens].
    """

    name: str
    token_ids: torch.Tensor


@dataclass(frozen=True)
class Agreement:
    """How far each prompt alone tells the same as the others; means and minima over pairs.

    Attributes:
        kappa: Mean of Cohen's kappa of the roles.
        least_kappa: The least of them.
        least_pair: The two prompts it is of.
        rank_correlation: Mean of Spearman's correlation of the stability.
    """

    kappa: float
    least_kappa: float
    least_pair: tuple[str, str]
    rank_correlation: float


@dataclass(frozen=True)
class Observations:
    """All prompts of a run; profiles with any thresholds can be made of them.

    Attributes:
        name: The model's name.
        shape: Layers and heads of the model.
        prompts: What each prompt showed, at least one.
        calibration: Settings of the run.
        dtype: Dtype the model ran in.
        text_digest: SHA-256 over the prompts' token ids.
    """

    name: str
    shape: ModelShape
    prompts: tuple[PromptObservation, ...]
    calibration: Calibration
    dtype: str
    text_digest: str

    def profile(
        self, *, prompts: Sequence[PromptObservation] = (), thresholds: Thresholds | None = None
    ) -> HeadProfile:
        """Sorts the heads into roles.

        Args:
            prompts: Some of this run's prompts; by default all.
            thresholds: Where the lines are drawn; by default those of the run's settings.

        Returns:
            The profile, with the run's provenance.
        """
        taken = tuple(prompts) or self.prompts
        settings = self.calibration
        return assign_roles(
            pooled_stability(taken),
            pooled_similarity(taken),
            model=self.shape,
            thresholds=thresholds or settings.thresholds,
            provenance=Provenance(
                model=self.name,
                tool=f"hetero-sglang {hetero_sglang.__version__}",
                texts=tuple(prompt.name for prompt in taken),
                text_digest=self.text_digest,
                dtype=self.dtype,
                num_prompt_tokens=max(settings.prompt_lengths),
                num_decode_steps=settings.num_decode_steps,
                top_k=settings.top_k,
                pool_kernel=POOL_KERNEL,
            ),
        )

    def agreement(self) -> Agreement | None:
        """How far the prompts agree; None if there is only one."""
        alone = [self.profile(prompts=[prompt]) for prompt in self.prompts]
        pairs = list(itertools.combinations(range(len(alone)), 2))
        if not pairs:
            return None
        kappas = [kappa(alone[a], alone[b]) for a, b in pairs]
        stability = [pooled_stability([prompt]) for prompt in self.prompts]
        least = min(range(len(pairs)), key=kappas.__getitem__)
        first, second = pairs[least]
        return Agreement(
            mean(kappas),
            kappas[least],
            (self.prompts[first].name, self.prompts[second].name),
            mean(rank_correlation(stability[a], stability[b]) for a, b in pairs),
        )


def profile_model(
    model_dir: str | os.PathLike[str],
    calibration: Calibration,
    *,
    texts: Sequence[CalibrationText] = (),
    progress: Progress = no_progress,
) -> HeadProfile:
    """Profiles the heads of a Transformers model: `observe`, then `Observations.profile`.

    The run has no random element: prompts are the texts' first tokens and decoding is greedy.

    Args:
        model_dir: Transformers directory of a decoder-only model.
        calibration: Settings.
        texts: Calibration texts; by default the shipped ones.
        progress: Told about the work done.

    Returns:
        The profile, with the run's provenance.

    Raises:
        ConfigError: The directory holds no model that can be run, or a text is too short.
        ProfileError: The model has no KV heads to give roles to.
    """
    model = WatchedModel(model_dir, dtype=calibration.dtype, device=calibration.device)
    prompts = calibration_prompts(model, texts or calibration_texts(), calibration.prompt_lengths)
    return observe(model, prompts, calibration, progress=progress).profile()


def calibration_prompts(
    model: Watchable, texts: Sequence[CalibrationText], lengths: Sequence[int]
) -> tuple[Prompt, ...]:
    """Each text's first tokens, at every length.

    Args:
        model: Whose tokenizer counts.
        texts: Texts.
        lengths: Numbers of tokens.

    Raises:
        ConfigError: A text is too short.
    """
    prompts = []
    for text in texts:
        token_ids = model.tokenize(text.text)
        for length in lengths:
            if len(token_ids) < length:
                raise ConfigError(
                    f"text {text.name} has {len(token_ids)} tokens for this model, needed are "
                    f"{length}; give a longer text or fewer tokens"
                )
            name = text.name if len(lengths) == 1 else f"{text.name} ({length} tokens)"
            prompts.append(Prompt(name, token_ids[:length]))
    return tuple(prompts)


def observe(
    model: Watchable,
    prompts: Sequence[Prompt],
    calibration: Calibration,
    *,
    progress: Progress = no_progress,
    checkpoint: Path | None = None,
) -> Observations:
    """Watches a model's heads over all prompts.

    Args:
        model: The model.
        prompts: At least one.
        calibration: Settings.
        progress: Told about the work done, in units of about a decoded token.
        checkpoint: File that keeps finished prompts, so that a run that was cut off goes on where
            it was; made, read and left to the caller to remove.

    Raises:
        ConfigError: The checkpoint is of a run with another model, other prompts or settings, or
            prompt and decoded tokens do not fit the model's context.
    """
    num_steps = calibration.num_decode_steps
    _check_context(model, prompts, num_steps)
    costs = [len(prompt.token_ids) // _TOKENS_OF_A_STEP + num_steps for prompt in prompts]
    total, done = sum(costs), 0
    progress("loading the model", 0, total)
    digest = _digest_of(prompts)
    finished: dict[str, PromptObservation] = {}
    if checkpoint is not None:
        key = json.dumps(
            [model.digest(), model.dtype, digest, num_steps, calibration.top_k, POOL_KERNEL]
        )
        saved = Checkpoint(checkpoint, hashlib.sha256(key.encode()).hexdigest())
        finished = saved.load()
    for prompt, cost in zip(prompts, costs, strict=True):
        if prompt.name not in finished:
            progress(f"{prompt.name}: prompt", done, total)
            observer = HeadObserver(calibration.top_k)
            attention = model.attention(prompt.token_ids, num_steps)
            observer.begin_prompt(next(attention))
            for left, step in zip(range(num_steps, 0, -1), attention, strict=True):
                progress(f"{prompt.name}: decoding", done + cost - left, total)
                observer.add_step(step)
            finished[prompt.name] = observer.result(prompt.name)
            if checkpoint is not None:
                saved.store(finished)
        done += cost
    progress("done", total, total)
    return Observations(
        name=calibration.name or model.name,
        shape=model.shape,
        prompts=tuple(finished[prompt.name] for prompt in prompts),
        calibration=calibration,
        dtype=model.dtype,
        text_digest=digest,
    )


def _check_context(model: Watchable, prompts: Sequence[Prompt], num_steps: int) -> None:
    longest = max(len(prompt.token_ids) for prompt in prompts)
    if model.context_tokens and longest + num_steps > model.context_tokens:
        raise ConfigError(
            f"a prompt of {longest} and {num_steps} decoded tokens do not fit the context of "
            f"{model.name}, {model.context_tokens} tokens; take fewer"
        )


def _digest_of(prompts: Sequence[Prompt]) -> str:
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.token_ids.numpy().tobytes())
    return digest.hexdigest()
