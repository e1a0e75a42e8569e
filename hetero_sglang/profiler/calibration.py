"""The calibration run: a Transformers model reads, decodes, and its heads are watched.

Attention probabilities exist only for the queries that count: the prompt's last one and those of
decoded tokens. The prompt itself goes through SDPA, so memory stays that of ordinary generation.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hetero_sglang
from hetero_sglang.errors import ConfigError
from hetero_sglang.profile import HeadProfile, ModelShape, Provenance, Thresholds
from hetero_sglang.profiler.classify import assign_roles
from hetero_sglang.profiler.observation import POOL_KERNEL, HeadObserver, group_mean
from hetero_sglang.profiler.texts import CalibrationText, calibration_texts
from hetero_sglang.progress import Progress, no_progress

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

__all__ = ["Calibration", "profile_model"]

_ATTENTION_NAME = "hetero_calibration"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Settings of a calibration run; the defaults are the paper's."""

    num_prompt_tokens: int = 5000
    """Tokens of each prompt, above `top_k`."""
    num_decode_steps: int = 100
    """Greedily decoded tokens whose queries are watched, at least 1."""
    top_k: int = 1024
    """Size of the compared sets of positions, at least 1."""
    thresholds: Thresholds = field(default_factory=lambda: Thresholds(stable=0.5, similarity=0.5))
    """Where the lines between the roles are drawn."""
    dtype: str = "float32"
    """Dtype of weights and activations: float32, bfloat16 or float16."""
    name: str = ""
    """The model's name in the profile; by default that of its directory."""

    def __post_init__(self) -> None:
        """Checks what the field descriptions say.

        Raises:
            ConfigError: A value is out of range.
        """
        for name in ("num_decode_steps", "top_k"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_prompt_tokens <= self.top_k:
            raise ConfigError(
                f"num_prompt_tokens must be above top_k ({self.top_k}), "
                f"got {self.num_prompt_tokens}; take a smaller top_k or a longer prompt"
            )
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")


def profile_model(
    model_dir: str | os.PathLike[str],
    calibration: Calibration,
    *,
    texts: Sequence[CalibrationText] = (),
    progress: Progress = no_progress,
) -> HeadProfile:
    """Profiles the heads of a Transformers model.

    The run has no random element: prompts are the texts' first tokens and decoding is greedy.

    Args:
        model_dir: Transformers directory of a decoder-only model.
        calibration: Settings.
        texts: Calibration texts, a prompt each; by default the shipped ones.
        progress: Told about the work done; a prompt counts as much as a decoded token.

    Returns:
        The profile, with the run's provenance.

    Raises:
        ConfigError: The directory holds no model that can be run, or a text is too short.
        ProfileError: The model has no KV heads to give roles to.
    """
    folder = Path(model_dir)
    shape = ModelShape.from_config(_read_config(folder))
    prompts = _Prompts.tokenize(folder, texts or calibration_texts(), calibration)
    steps_each = calibration.num_decode_steps
    total = len(prompts.token_ids) * (steps_each + 1)

    progress("loading the model", 0, total)
    model = _load(folder, calibration)
    observer = HeadObserver(calibration.top_k)
    watch = _AttentionWatch.install(model, shape)
    with torch.inference_mode():
        for index, (name, token_ids) in enumerate(prompts.items()):
            progress(f"{name}: prompt", index * (steps_each + 1), total)
            output = model(token_ids, use_cache=True, logits_to_keep=1)
            observer.begin_prompt(watch.take(len(token_ids[0])))
            for step in range(steps_each):
                progress(f"{name}: decoding", index * (steps_each + 1) + step + 1, total)
                newest = output.logits[:, -1:].argmax(dim=-1)
                output = model(newest, past_key_values=output.past_key_values, use_cache=True)
                observer.add_step(watch.take(len(token_ids[0])))
    progress("done", total, total)

    return assign_roles(
        observer.stability,
        observer.similarity,
        model=shape,
        thresholds=calibration.thresholds,
        provenance=Provenance(
            model=calibration.name or folder.resolve().name,
            tool=f"hetero-sglang {hetero_sglang.__version__}",
            texts=tuple(prompts.names),
            text_digest=prompts.digest,
            dtype=calibration.dtype,
            num_prompt_tokens=calibration.num_prompt_tokens,
            num_decode_steps=steps_each,
            top_k=calibration.top_k,
            pool_kernel=POOL_KERNEL,
        ),
    )


@dataclass(frozen=True)
class _Prompts:
    names: tuple[str, ...]
    # each int64 [1, num_prompt_tokens]
    token_ids: tuple[torch.Tensor, ...]

    @classmethod
    def tokenize(
        cls, folder: Path, texts: Sequence[CalibrationText], calibration: Calibration
    ) -> _Prompts:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        num_tokens = calibration.num_prompt_tokens
        prompts = []
        for text in texts:
            token_ids = tokenizer(text.text, return_tensors="pt", verbose=False).input_ids
            if token_ids.shape[1] < num_tokens:
                raise ConfigError(
                    f"text {text.name} has {token_ids.shape[1]} tokens for this model, needed are "
                    f"{num_tokens}; give a longer text or fewer tokens"
                )
            prompts.append(token_ids[:, :num_tokens])
        return cls(tuple(text.name for text in texts), tuple(prompts))

    def items(self) -> Iterator[tuple[str, torch.Tensor]]:
        return zip(self.names, self.token_ids, strict=True)

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for token_ids in self.token_ids:
            digest.update(token_ids.numpy().tobytes())
        return digest.hexdigest()


class _AttentionWatch:
    """Keeps the newest query's attention of every layer, averaged over query groups."""

    def __init__(self, shape: ModelShape) -> None:
        self._shape = shape
        self._layers: dict[int, torch.Tensor] = {}

    @classmethod
    def install(cls, model: Any, shape: ModelShape) -> _AttentionWatch:
        """Makes a model's attention go through a new watch, by Transformers' own registry."""
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        watch = cls(shape)
        AttentionInterface.register(_ATTENTION_NAME, watch.attend)
        AttentionMaskInterface.register(_ATTENTION_NAME, sdpa_mask)
        model.set_attn_implementation(_ATTENTION_NAME)
        return watch

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> Any:
        """Attention by SDPA, with a note of where the newest query looks.

        Shapes: query [1, num_q_heads, num_new, head_dim], key and value
        [1, num_kv_heads, num_tokens, head_dim].
        """
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        num_kv_heads = self._shape.num_kv_heads
        groups = query[0, :, -1].float().reshape(num_kv_heads, -1, query.shape[-1])  # [H, G, D]
        scores = groups @ key[0].float().transpose(-1, -2) * scale  # [H, G, T]
        probabilities = scores.softmax(dim=-1).flatten(0, 1)
        self._layers[module.layer_idx] = group_mean(probabilities, num_kv_heads)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    def take(self, num_positions: int) -> torch.Tensor:
        """Attention over the first positions, fp32 [num_layers, num_kv_heads, num_positions]."""
        if sorted(self._layers) != list(range(self._shape.num_layers)):
            raise ConfigError(
                f"the model ran attention in layers {sorted(self._layers)}, expected all of "
                f"{self._shape.num_layers}; its architecture is not supported by the profiler"
            )
        layers = [self._layers[layer] for layer in range(self._shape.num_layers)]
        self._layers.clear()
        return torch.stack(layers)[..., :num_positions]


def _load(folder: Path, calibration: Calibration) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, calibration.dtype),
        attn_implementation="sdpa",
        local_files_only=True,
    ).eval()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is no Transformers model directory: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.json'} must hold a JSON object")
    return config
