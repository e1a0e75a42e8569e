"""Profiles the heads of the model that SGLang has just loaded, before any pool exists.

`--kv-policy-profile calibrate`: the scheduler knows the model when it sizes the pools; there the
calibration texts are run through it with an attention of this module's own, and the profile is kept
in a cache by everything that it depends on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from torch.nn.functional import scaled_dot_product_attention

import hetero_sglang
from hetero_sglang.config import profile_cache_dir
from hetero_sglang.errors import ConfigError, ProfileError
from hetero_sglang.profile import ModelShape, load_profile, save_profile
from hetero_sglang.profiler import Calibration, calibration_prompts, calibration_texts, observe
from hetero_sglang.profiler.observation import newest_attention
from hetero_sglang.profiler.texts import read_texts
from hetero_sglang.profiler.watching import take_layers, weights_digest
from hetero_sglang.report import profile_summary
from hetero_sglang.sglang_adapter.refusals import check_layer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from hetero_sglang.config import HeteroConfig
    from hetero_sglang.profile import HeadProfile
    from hetero_sglang.profiler import CalibrationText, Prompt

logger = logging.getLogger(__name__)

_CHUNK_TOKENS = 2048
"""Prompt tokens of one pass: bounds activations, as chunked prefill does in serving."""


class ServedModel:
    """The model of a scheduler process as something that can be watched.

    Attributes:
        name: Last part of the model's path.
        shape: Its layers and heads.
    """

    def __init__(self, configurator: Any, model_config: dict[str, Any]) -> None:
        """Takes the loaded model of a KV cache configurator.

        Args:
            configurator: SGLang's ``KVCacheConfigurator`` of the target model.
            model_config: Contents of the model's ``config.json``.
        """
        self._model = configurator.model
        self.name = Path(configurator.model_config.model_path).name
        self.shape = ModelShape.from_config(model_config)
        self.context_tokens = int(configurator.model_config.context_len)
        self._dtype: torch.dtype = configurator.model_dtype
        self._device = next(self._model.parameters()).device

    @property
    def dtype(self) -> str:
        """Of activations."""
        return str(self._dtype).removeprefix("torch.")

    def tokenize(self, text: str) -> torch.Tensor:
        """Token ids of a text, int64 [num_tokens]."""
        return torch.tensor(self._tokenizer(text, verbose=False)["input_ids"])

    @cached_property
    def _tokenizer(self) -> Any:
        """The tokenizer that the server answers with; the scheduler loads its own only later."""
        from sglang.srt.runtime_context import get_model, get_serving
        from sglang.srt.utils.hf_transformers_utils import get_tokenizer

        return get_tokenizer(
            get_serving().tokenizer_path,
            tokenizer_mode=get_serving().tokenizer_mode,
            trust_remote_code=get_model().trust_remote_code,
            revision=get_model().revision,
            tokenizer_backend=get_serving().tokenizer_backend,
        )

    def digest(self) -> str:
        """Names the weights as they are loaded."""
        return weights_digest(self._model.named_parameters())

    @torch.inference_mode()
    def attention(self, token_ids: torch.Tensor, num_steps: int) -> Iterator[torch.Tensor]:
        """See `hetero_sglang.profiler.Watchable.attention`."""
        num_tokens = len(token_ids)
        backend = _WatchedAttention(self.shape, num_tokens + num_steps)
        token_ids = token_ids.to(self._device)
        for start in range(0, num_tokens, _CHUNK_TOKENS):
            logits = self._forward(backend, token_ids[start : start + _CHUNK_TOKENS])
        yield backend.take(num_tokens)
        for _ in range(num_steps):
            logits = self._forward(backend, logits.argmax(dim=-1).reshape(1))
            yield backend.take(num_tokens)

    def _forward(self, backend: _WatchedAttention, token_ids: torch.Tensor) -> torch.Tensor:
        """One pass over the request's next tokens; logits after the last, [1, vocab]."""
        from sglang.srt.model_executor.forward_batch_info import (
            CaptureHiddenMode,
            ForwardBatch,
            ForwardMode,
        )
        from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
        from sglang.srt.runtime_context import get_model

        start, count = backend.num_tokens, len(token_ids)
        end = start + count
        zero = torch.zeros(1, dtype=torch.int64, device=self._device)
        positions = torch.arange(start, end, device=self._device)
        batch = ForwardBatch(
            forward_mode=ForwardMode.EXTEND,
            batch_size=1,
            input_ids=token_ids,
            req_pool_indices=zero,
            seq_lens=zero + end,
            seq_lens_cpu=torch.tensor([end]),
            seq_lens_sum=end,
            # Where a pool would put the rows; here is none.
            out_cache_loc=positions,
            positions=positions,
            extend_num_tokens=count,
            extend_seq_lens=zero + count,
            extend_seq_lens_cpu=[count],
            extend_prefix_lens=zero + start,
            extend_prefix_lens_cpu=[start],
            extend_start_loc=zero,
            extend_logprob_start_lens_cpu=[count],
            capture_hidden_mode=CaptureHiddenMode.NULL,
        )
        # As ModelRunner does around every pass.
        with (
            get_model().override(shared_experts=self._model.shared_experts_config),
            forward_context(ForwardContext(attn_backend=backend), forward_batch=batch),
        ):
            output = self._model.forward(token_ids, positions, batch)
        backend.num_tokens = end
        logits: torch.Tensor = output.next_token_logits
        return logits


class _WatchedAttention(AttentionBackend):
    """Causal attention of one request over keys and values of its own.

    Attributes:
        num_tokens: Tokens that all layers have seen.
    """

    def __init__(self, shape: ModelShape, capacity: int) -> None:
        """Makes room.

        Args:
            shape: Layers and heads.
            capacity: Tokens, prompt and decoded ones together.
        """
        super().__init__()
        self.num_tokens = 0
        self._shape = shape
        self._capacity = capacity
        # By layer: K and V as [num_kv_heads, capacity, head_dim], and the newest attention.
        self._rows: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._newest: dict[int, torch.Tensor] = {}

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attention of the next tokens, [num_new, num_q_heads * head_dim].

        Raises:
            ConfigError: The layer's attention is not causal attention over all tokens.
        """
        check_layer(layer, has_sinks=kwargs.get("sinks") is not None)
        heads, head_dim = self._shape.num_kv_heads, layer.head_dim
        query, key, value = (
            rows.view(-1, count, head_dim).transpose(0, 1)
            for rows, count in ((q, self._shape.num_q_heads), (k, heads), (v, heads))
        )  # [heads, num_new, head_dim]
        start = self.num_tokens
        end = start + key.shape[1]
        if layer.layer_id not in self._rows:
            room = (heads, self._capacity, head_dim)
            self._rows[layer.layer_id] = (key.new_empty(room), value.new_empty(room))
        keys, values = self._rows[layer.layer_id]
        keys[:, start:end] = key
        values[:, start:end] = value
        self._newest[layer.layer_id] = newest_attention(query[:, -1], keys[:, :end], layer.scaling)
        mask = None
        if start and end - start > 1:
            shape = (end - start, end)
            mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(start)
        out = scaled_dot_product_attention(
            query[None],
            keys[None, :, :end],
            values[None, :, :end],
            attn_mask=mask,
            is_causal=not start,
            scale=layer.scaling,
            enable_gqa=True,
        )[0]
        return out.transpose(0, 1).reshape(q.shape[0], -1)

    def take(self, num_positions: int) -> torch.Tensor:
        """Attention of the newest token over the first positions; forgets it.

        Returns:
            fp32 [num_layers, num_kv_heads, num_positions].

        Raises:
            ConfigError: Not all layers have attention.
        """
        return take_layers(self._newest, self._shape.num_layers, num_positions)


def calibrated_profile(
    configurator: Any, config: HeteroConfig, model_config: dict[str, Any]
) -> HeadProfile:
    """The profile of a loaded model, from the cache or by a calibration run.

    Args:
        configurator: SGLang's ``KVCacheConfigurator`` of the target model.
        config: The policy's settings.
        model_config: Contents of the model's ``config.json``.

    Returns:
        A profile whose ``origin`` is its file in the cache.

    Raises:
        ConfigError: A text is missing or too short, or the model's attention cannot be watched.
        ProfileError: The model has no KV heads to give roles to.
    """
    model = ServedModel(configurator, model_config)
    settings = _settings(config, model)
    texts = texts_to_read(config)
    prompts = calibration_prompts(model, texts, settings.prompt_lengths)
    path = profile_cache_dir() / f"{model.name}-{_key(model, settings, prompts)}.json"
    cached = cached_profile(path)
    if cached is not None:
        logger.info("HeteroCache: calibrated before, %s", path)
        return cached
    logger.info(
        "HeteroCache: calibrating on %s of %d tokens; the profile is kept in %s",
        ", ".join(prompt.name for prompt in prompts),
        max(settings.prompt_lengths),
        path,
    )
    began = time.monotonic()
    run = observe(model, prompts, settings, progress=_LoggedProgress())
    save_profile(run.profile(), path)
    profile = load_profile(path)
    logger.info(
        "HeteroCache: calibrated in %.1f s: %s",
        time.monotonic() - began,
        profile_summary(profile).replace("\n", "; "),
    )
    return profile


def texts_to_read(config: HeteroConfig) -> tuple[CalibrationText, ...]:
    """The texts that the settings name.

    Raises:
        ConfigError: One cannot be read.
    """
    given = config.calibration_text
    return calibration_texts() if given == "shipped" else read_texts(given)


def _settings(config: HeteroConfig, model: ServedModel) -> Calibration:
    settings = Calibration(name=model.name)
    room = model.context_tokens - settings.num_decode_steps
    length = config.calibration_tokens
    if length > room:
        raise ConfigError(
            f"--kv-policy-calibration-tokens {length} and {settings.num_decode_steps} decoded "
            f"tokens do not fit the context of {model.context_tokens} tokens; give at most {room}"
        )
    return dataclasses.replace(settings, prompt_lengths=(length,))


def _key(model: ServedModel, settings: Calibration, prompts: Sequence[Prompt]) -> str:
    """Names everything that the profile depends on."""
    digest = hashlib.sha256()
    about = (
        model.shape.fingerprint,
        model.digest(),
        model.dtype,
        dataclasses.asdict(settings),
        hetero_sglang.__version__,
    )
    digest.update(json.dumps(about).encode())
    for prompt in prompts:
        digest.update(prompt.token_ids.numpy().tobytes())
    return digest.hexdigest()[:16]


def cached_profile(path: Path) -> HeadProfile | None:
    """A profile of the cache; None if there is none, or a damaged one, which is logged."""
    if not path.exists():
        return None
    try:
        return load_profile(path)
    except ProfileError as error:
        # What is in the cache can be made again.
        logger.warning("HeteroCache: %s; calibrating anew", error)
        return None


class _LoggedProgress:
    """Progress as log lines, one when a stage begins."""

    def __init__(self) -> None:
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            logger.info("HeteroCache: calibration %3.0f %%, %s", 100 * done / total, stage)
