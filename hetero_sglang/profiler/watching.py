"""A Transformers model that reads and decodes while somebody watches where its heads look.

Attention probabilities exist only for the queries that count: the prompt's last one and those of
decoded tokens. The prompt itself goes through SDPA, so memory stays that of ordinary generation.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from hetero_sglang.errors import ConfigError
from hetero_sglang.profile import ModelShape
from hetero_sglang.profiler.observation import newest_attention

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

__all__ = [
    "DEVICES",
    "DTYPES",
    "Watchable",
    "WatchedModel",
    "read_model_config",
    "take_layers",
    "weights_digest",
]

_ATTENTION_NAME = "hetero_calibration"
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
_SAMPLED_VALUES = 64
"""Of each weight, for its digest."""


class Watchable(Protocol):
    """A model that can be observed, wherever it runs."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def shape(self) -> ModelShape:
        """Layers and heads."""

    @property
    def context_tokens(self) -> int:
        """Tokens that it can take in all; 0 if that is not known."""

    @property
    def dtype(self) -> str:
        """Of weights and activations: float32, bfloat16 or float16."""

    def tokenize(self, text: str) -> torch.Tensor:
        """Token ids of a text, int64 [num_tokens]."""

    def digest(self) -> str:
        """Names the weights, see `weights_digest`."""

    def attention(self, token_ids: torch.Tensor, num_steps: int) -> Iterator[torch.Tensor]:
        """Reads a prompt, then decodes greedily, and tells where each newest query looks.

        Args:
            token_ids: The prompt, int64 [num_tokens].
            num_steps: Tokens to decode.

        Yields:
            Attention probabilities over the prompt, averaged over query groups, fp32
            [num_layers, num_kv_heads, num_tokens]: of the prompt's last token, then of each of the
            `num_steps` decoded ones. Yours to keep.
        """


class WatchedModel:
    """A Transformers model as a `Watchable`; its weights are loaded when they are first needed.

    Its attention goes through Transformers' own registry; the model's code is untouched.
    """

    def __init__(
        self, model_dir: str | os.PathLike[str], *, dtype: str = "auto", device: str = "auto"
    ) -> None:
        """Opens a Transformers directory.

        Args:
            model_dir: Directory of a decoder-only model.
            dtype: float32, bfloat16 or float16; `auto` is float32 on a CPU and what the weights
                are stored in on a GPU.
            device: cpu or cuda; `auto` is a GPU where there is one.

        Raises:
            ConfigError: The directory holds no model, or dtype or device cannot be had.
            ProfileError: The model has no KV heads to give roles to.
        """
        from transformers import AutoTokenizer

        self._folder = Path(model_dir)
        config = read_model_config(self._folder)
        self._shape = ModelShape.from_config(config)
        self._context_tokens = int(config.get("max_position_embeddings") or 0)
        self._device = _resolve_device(device)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        self._dtype = "float32" if dtype == "auto" and self._device == "cpu" else dtype
        self._tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        # Attention of the newest query by layer, [num_kv_heads, num_tokens] each.
        self._layers: dict[int, torch.Tensor] = {}

    @cached_property
    def model(self) -> Any:
        """The Transformers model in evaluation mode, its attention watched."""
        from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
        from transformers.masking_utils import sdpa_mask
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            self._folder,
            dtype="auto" if self._dtype == "auto" else getattr(torch, self._dtype),
            attn_implementation="sdpa",
            local_files_only=True,
        )
        AttentionInterface.register(_ATTENTION_NAME, _attend)
        AttentionMaskInterface.register(_ATTENTION_NAME, sdpa_mask)
        model.set_attn_implementation(_ATTENTION_NAME)
        return model.eval().to(self._device)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self._folder.resolve().name

    @property
    def shape(self) -> ModelShape:
        """Layers and heads."""
        return self._shape

    @property
    def context_tokens(self) -> int:
        """As its configuration says; 0 if it does not."""
        return self._context_tokens

    @property
    def dtype(self) -> str:
        """Of weights and activations."""
        return str(self.model.dtype).removeprefix("torch.")

    def tokenize(self, text: str) -> torch.Tensor:
        """Token ids of a text, int64 [num_tokens]."""
        # Not verbose: the text may be longer than the context, the part that is used is not.
        ids = self._tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        return torch.as_tensor(ids)

    def digest(self) -> str:
        """Names the weights, see `weights_digest`."""
        return weights_digest(self.model.named_parameters())

    @torch.inference_mode()
    def attention(self, token_ids: torch.Tensor, num_steps: int) -> Iterator[torch.Tensor]:
        """See `Watchable.attention`.

        Raises:
            ConfigError: The model's attention is not of the kind that can be watched.
        """
        num_tokens = len(token_ids)
        newest = token_ids[None].to(self.model.device)
        cache = None
        for _ in range(num_steps + 1):
            output = self.model(
                newest,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                attention_layers=self._layers,
            )
            cache = output.past_key_values
            newest = output.logits[:, -1:].argmax(dim=-1)
            yield take_layers(self._layers, self._shape.num_layers, num_tokens)


def _attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    attention_layers: dict[int, torch.Tensor],
    **kwargs: Any,
) -> Any:
    """Attention by SDPA, with a note by layer of where the newest query looks.

    Shapes: query [1, num_q_heads, num_new, head_dim], key and value
    [1, num_kv_heads, num_tokens, head_dim].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("sliding_window"):
        raise ConfigError(
            f"layer {module.layer_idx} attends in a sliding window of {kwargs['sliding_window']} "
            "tokens; profiles are for models whose layers all attend to the whole prompt"
        )
    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    attention_layers[module.layer_idx] = newest_attention(query[0, :, -1], key[0], scale)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def take_layers(
    layers: dict[int, torch.Tensor], num_layers: int, num_positions: int
) -> torch.Tensor:
    """Takes what each layer noted in one pass, and forgets it.

    Args:
        layers: Attention of the newest query by layer, [num_kv_heads, num_tokens] each; emptied.
        num_layers: Layers that must be there.
        num_positions: First tokens to keep.

    Returns:
        fp32 [num_layers, num_kv_heads, num_positions].

    Raises:
        ConfigError: Not all layers ran attention, or others did.
    """
    if sorted(layers) != list(range(num_layers)):
        raise ConfigError(
            f"the model ran attention in layers {sorted(layers)}, expected all of {num_layers}; "
            "its architecture cannot be profiled"
        )
    taken = torch.stack([layers[layer][:, :num_positions] for layer in range(num_layers)])
    layers.clear()
    return taken


def read_model_config(folder: Path) -> dict[str, Any]:
    """Contents of a model directory's `config.json`.

    Raises:
        ConfigError: There is none, or it is no JSON object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is no Transformers model directory: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{folder / 'config.json'} must hold a JSON object")
    return config


def weights_digest(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Names a model's weights as they are loaded: SHA-256, hexadecimal.

    From every parameter 64 values are taken, evenly spread, so that fine-tunes and quantised
    versions of one architecture differ while an 8B model takes no noticeable time.

    Args:
        parameters: Names and values, in any order.
    """
    digest = hashlib.sha256()
    for name, values in sorted(parameters, key=lambda item: item[0]):
        flat = values.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLED_VALUES)].cpu().contiguous()
        digest.update(f"{name} {list(values.shape)} {values.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _resolve_device(device: str) -> str:
    if device not in DEVICES:
        raise ConfigError(f"device must be one of {', '.join(DEVICES)}, got {device!r}")
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise ConfigError("device cuda was asked for, but torch sees no GPU; use cpu or auto")
    return "cuda" if has_gpu and device != "cpu" else "cpu"
