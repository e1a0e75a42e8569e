"""Shape of a model as far as its heads are concerned, and the fingerprint made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hetero_sglang.errors import ProfileError

__all__ = ["ModelShape", "fingerprint"]

# What a configuration without `num_key_value_heads` means is each model type's own affair. Checked
# against Transformers 5.19; types beyond these have to say the number.
# Every query head has a KV head of its own, whether the field is missing or null.
_MHA_IF_ABSENT = frozenset(
    {
        *("apertus", "arcee", "cohere", "cohere2", "granite", "granitemoe", "hunyuan_v1_dense"),
        *("llama", "olmo", "olmo2", "olmo3", "olmoe", "phi", "phi3"),
        # Without the field at all: their attention knows nothing else.
        *("gpt_neox", "opt", "persimmon"),
    }
)
# The same if it is null; if it is missing, Transformers fills in the head count of one checkpoint.
_MHA_IF_NULL = frozenset({"ernie4_5", "minicpm3", "qwen2", "qwen3", "seed_oss", "smollm3"})


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Everything about a model that a profile of its heads depends on, save the weights.

    The last four fields may be 0 (the architecture empty), meaning unknown: then the shape serves
    for computing with heads but fits no model.
    """

    num_layers: int
    """Transformer layers, at least 1."""
    num_q_heads: int
    """Query heads a layer, a multiple of `num_kv_heads`."""
    num_kv_heads: int
    """KV heads a layer, at least 1."""
    architecture: str = ""
    """First entry of `architectures` in the model's configuration."""
    head_dim: int = 0
    """Elements of one head's key."""
    hidden_size: int = 0
    """Width of the residual stream."""
    vocab_size: int = 0
    """Rows of the token embedding."""

    def __post_init__(self) -> None:
        """Checks what the field descriptions say.

        Raises:
            ProfileError: A count is out of range or the heads do not divide into groups.
        """
        for field in ("num_layers", "num_q_heads", "num_kv_heads"):
            if getattr(self, field) < 1:
                raise ProfileError(
                    "must be at least 1", field=f"model.{field}", value=str(getattr(self, field))
                )
        for field in ("head_dim", "hidden_size", "vocab_size"):
            if getattr(self, field) < 0:
                raise ProfileError(
                    "must not be negative", field=f"model.{field}", value=str(getattr(self, field))
                )
        if self.num_q_heads % self.num_kv_heads:
            raise ProfileError(
                f"must be a multiple of model.num_kv_heads ({self.num_kv_heads})",
                field="model.num_q_heads",
                value=str(self.num_q_heads),
            )

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def num_heads(self) -> int:
        """KV heads of the whole model."""
        return self.num_layers * self.num_kv_heads

    @property
    def is_known(self) -> bool:
        """Whether no field is unknown."""
        return bool(self.architecture and self.head_dim and self.hidden_size and self.vocab_size)

    @property
    def fingerprint(self) -> str:
        """Names the architecture: 16 hexadecimal digits, equal only for equal shapes.

        Fine-tunes of one base model share it. Their heads tend to behave alike, but the name of the
        profiled model is kept beside it for that reason (`Provenance.model`).
        """
        canonical = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Reads the shape out of a Transformers configuration.

        Args:
            config: Contents of `config.json`, or `PretrainedConfig.to_dict()`. For a multimodal
                model the part under `text_config` counts.

        Returns:
            The shape, with `head_dim` and `num_kv_heads` filled in the way Transformers does.

        Raises:
            ProfileError: A field is missing or no number, the number of KV heads is not given and
                does not follow from the model's type, or the model uses multi-head latent
                attention, which has no KV heads to give roles to.
        """
        text = config.get("text_config")
        inner = {**config, **text} if isinstance(text, Mapping) else dict(config)
        if inner.get("kv_lora_rank"):
            raise ProfileError(
                "names multi-head latent attention, whose cache has no KV heads",
                field="config.kv_lora_rank",
                value=str(inner["kv_lora_rank"]),
                remedy="Serve this model without --kv-policy heterocache",
            )
        num_q_heads = _positive(inner, "num_attention_heads")
        hidden_size = _positive(inner, "hidden_size")
        has_head_dim = inner.get("head_dim") is not None
        # `architectures` is a list in a configuration of either level, or None in a bare text one.
        architectures = config.get("architectures") or inner.get("architectures") or [""]
        return cls(
            num_layers=_positive(inner, "num_hidden_layers"),
            num_q_heads=num_q_heads,
            num_kv_heads=_num_kv_heads(inner, num_q_heads),
            architecture=str(architectures[0]),
            head_dim=_positive(inner, "head_dim") if has_head_dim else hidden_size // num_q_heads,
            hidden_size=hidden_size,
            vocab_size=_positive(inner, "vocab_size"),
        )


def fingerprint(config: Mapping[str, Any]) -> str:
    """Fingerprint of a model's architecture, see `ModelShape.fingerprint`.

    Args:
        config: Contents of the model's `config.json`.

    Returns:
        16 hexadecimal digits.

    Raises:
        ProfileError: As `ModelShape.from_config`.
    """
    return ModelShape.from_config(config).fingerprint


def _num_kv_heads(config: Mapping[str, Any], num_q_heads: int) -> int:
    name = "num_key_value_heads"
    if config.get(name) is not None:
        return _positive(config, name)
    model_type = str(config.get("model_type", ""))
    if model_type in _MHA_IF_ABSENT or (name in config and model_type in _MHA_IF_NULL):
        return num_q_heads
    raise ProfileError(
        f"must be given, since model type {model_type!r} does not settle it",
        field=f"config.{name}",
        value="nothing",
        remedy=f'Add "{name}" to the model\'s config.json: {num_q_heads} if each query head has a '
        "KV head of its own (MHA), 1 if all share one (MQA), else the number of groups (GQA)",
    )


def _positive(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProfileError(
            "must be a positive whole number",
            field=f"config.{name}",
            value="nothing" if value is None else repr(value),
            remedy="Profiles describe decoder-only models with KV heads (MHA, GQA, MQA)",
        )
    return value
