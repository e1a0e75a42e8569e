"""Loads the compiled CPU kernels and mirrors their C structs.

Owns the choice of library (``csrc/api.h`` is the other side of the contract) and the link to
torch's OpenMP threads. Knows nothing about what the kernels compute. Nothing here raises when there
is no library: ``library()`` is then ``None`` and ``native_status()`` says why.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from hetero_kernels.quantize_keys.format import QuantizedKeys

ABI_VERSION = 4

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Names in /proc/cpuinfo that stand for an instruction level (a few of each suffice: no processor
# has them without the rest).
_V4_FLAGS = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_LEVEL_FLAGS = {
    "x86-64-v4-bf16": {*_V4_FLAGS, "avx512_bf16"},
    "x86-64-v4": _V4_FLAGS,
    "x86-64-v3": {"avx2", "bmi2", "f16c", "fma", "abm"},
    "x86-64": set[str](),
    "generic": set[str](),
}


class LayerStruct(ctypes.Structure):
    """``HkLayer`` of ``csrc/api.h``, where the fields are explained."""

    _fields_ = (
        ("dtype", c_int32),
        ("head_dim", c_int32),
        ("num_kv_heads", c_int32),
        ("group_size", c_int32),
        ("block_tokens", c_int32),
        ("num_steps", c_int32),
        ("scale", c_float),
        ("reserved", c_int32),
        ("k_resident", c_void_p),
        ("v_resident", c_void_p),
        ("resident_plane_stride", c_int64),
        ("resident_slot_stride", c_int64),
        ("k_blocks", c_void_p),
        ("v_blocks", c_void_p),
        ("block_stride", c_int64),
        ("block_row_stride", c_int64),
        ("block_positions", c_void_p),
        ("block_positions_stride", c_int64),
        ("block_table", c_void_p),
        ("block_table_row_stride", c_int64),
        ("block_table_head_stride", c_int64),
        ("kept_lens", c_void_p),
        ("kept_lens_row_stride", c_int64),
        ("kept_lens_head_stride", c_int64),
        ("prompt_lens", c_void_p),
        ("req_to_token", c_void_p),
        ("req_to_token_stride", c_int64),
        ("head_map", c_void_p),
        ("pivot_map", c_void_p),
        ("pivot_queries", c_void_p),
        ("pivot_row_stride", c_int64),
        ("pivot_head_stride", c_int64),
    )


class BatchStruct(ctypes.Structure):
    """``HkBatch`` of ``csrc/api.h``."""

    _fields_ = (
        ("size", c_int64),
        ("rows", c_void_p),
        ("seq_lens", c_void_p),
        ("token_ids", c_void_p),
        ("num_threads", c_int32),
        ("reserved", c_int32),
    )


class ScoreStruct(ctypes.Structure):
    """``HkScore`` of ``csrc/api.h``."""

    _fields_ = (
        ("dtype", c_int32),
        ("head_dim", c_int32),
        ("num_queries", c_int32),
        ("group_size", c_int32),
        ("num_threads", c_int32),
        ("scale", c_float),
        ("key_dtype", c_int32),
        ("num_groups", c_int32),
        ("num_items", c_int64),
        ("queries", c_void_p),
        ("keys", c_void_p),
        ("plane_stride", c_int64),
        ("slot_stride", c_int64),
        ("scales", c_void_p),
        ("scales_plane_stride", c_int64),
        ("scales_slot_stride", c_int64),
        ("planes", c_void_p),
        ("slots", c_void_p),
        ("slots_stride", c_int64),
        ("rows", c_void_p),
        ("prompt_lens", c_void_p),
        ("top_k", c_void_p),
        ("reference", c_void_p),
        ("reference_stride", c_int64),
        ("overlap", c_void_p),
        ("newest_scores", c_void_p),
        ("newest_stride", c_int64),
    )


class ExtendStruct(ctypes.Structure):
    """``HkExtend`` of ``csrc/api.h``."""

    _fields_ = (
        ("dtype", c_int32),
        ("head_dim", c_int32),
        ("num_kv_heads", c_int32),
        ("group_size", c_int32),
        ("num_threads", c_int32),
        ("scale", c_float),
        ("num_new", c_int64),
        ("prefix_len", c_int64),
        ("q", c_void_p),
        ("q_stride", c_int64),
        ("k", c_void_p),
        ("k_head_stride", c_int64),
        ("k_row_stride", c_int64),
        ("v", c_void_p),
        ("v_head_stride", c_int64),
        ("v_row_stride", c_int64),
        ("out", c_void_p),
        ("out_stride", c_int64),
    )


class NativeError(RuntimeError):
    """A compiled library cannot be used; the message says why."""


@dataclass(frozen=True)
class Library:
    """The loaded kernels: one callable for each exported function, arguments as in ``api.h``."""

    level: str
    has_threads: bool
    append_rows: Callable[..., None]
    decode_attention: Callable[..., None]
    extend_attention: Callable[..., None]
    score: Callable[..., None]
    top_positions: Callable[..., None]
    gather_rows: Callable[..., None]
    scatter_rows: Callable[..., None]


def pointer(tensor: Tensor | None) -> int | None:
    """Address of a tensor's first element; ``None`` (null) for no tensor or an empty one."""
    if tensor is None or tensor.numel() == 0:
        return None
    return tensor.data_ptr()


KEY_DTYPE_CODES = {8: 3, 4: 4}
"""``HkDtype`` of quantised keys by bits."""


def key_fields(keys: Tensor | QuantizedKeys) -> dict[str, Any]:
    """The fields of ``ScoreStruct`` that say where keys lie, [num_planes, num_slots, ...]."""
    data = keys if isinstance(keys, torch.Tensor) else keys.data
    fields: dict[str, Any] = {
        "keys": pointer(data),
        "plane_stride": data.stride(0),
        "slot_stride": data.stride(1),
    }
    if isinstance(keys, torch.Tensor):
        return {**fields, "key_dtype": DTYPE_CODES[keys.dtype]}
    return {
        **fields,
        "key_dtype": KEY_DTYPE_CODES[keys.bits],
        "num_groups": keys.scales.shape[2],
        "scales": pointer(keys.scales),
        "scales_plane_stride": keys.scales.stride(0),
        "scales_slot_stride": keys.scales.stride(1),
    }


def library() -> Library | None:
    """The compiled kernels for this processor, loaded once; ``None`` where there are none."""
    return _load()[0]


def native_status() -> str:
    """Which CPU kernels are active, in one line.

    Returns:
        ``"native x86-64-v4"`` and the like, with a remark when it has only one thread; or
        ``"torch (reason)"`` when nothing compiled can be used.
    """
    return _load()[1]


def _cpu_flags() -> set[str]:
    """Feature names of the first processor; empty where the system does not tell."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("flags"):
                    return set(line.partition(":")[2].split())
    except OSError:
        pass
    return set()


def _parallel_entry() -> int | None:
    """Address of GOMP_parallel in the OpenMP library that torch has loaded into this process.

    LLVM's and Intel's libraries have it too. Without /proc there is no way to know which copy is
    torch's; then the kernels use one thread.
    """
    # Torch loads its thread pool's library with itself, so this is not a race.
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if "omp" in line}
    candidates = [path for path in paths if ".so" in path]
    # Torch's own copy first, should another package have brought a second one.
    candidates.sort(key=lambda path: ("/torch" not in path, path))
    for path in candidates:
        try:
            entry = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(entry, c_void_p).value
    return None


def runnable_levels() -> tuple[str, ...]:
    """Instruction levels of this architecture that this processor has, best first."""
    # Not at the top: ``python -m hetero_kernels.build_native`` must be the first to import it.
    from hetero_kernels import build_native

    flags = _cpu_flags()
    return tuple(level for level in build_native.levels() if _LEVEL_FLAGS[level] <= flags)


def open_library(level: str, directory: Path | None = None) -> Library:
    """Load the library of one instruction level.

    Args:
        level: One of ``runnable_levels()``; any other may end the process with an illegal
            instruction.
        directory: Where it lies; by default where ``build_native`` puts it.

    Returns:
        The kernels, running on torch's threads if those were found.

    Raises:
        NativeError: It is not there, cannot be loaded, or was made from other sources.
    """
    from hetero_kernels import build_native

    path = (directory or build_native.DEFAULT_OUT_DIR) / build_native.library_name(level)
    if not path.exists():
        raise NativeError(f"{path.name} is not there")
    try:
        # Short calls keep the interpreter lock: giving it up costs more than they take.
        short = ctypes.PyDLL(str(path))
        long = ctypes.CDLL(str(path))
        version = short.hk_abi_version()
        short.hk_struct_bytes.restype = c_int64
        structs = (LayerStruct, BatchStruct, ScoreStruct, ExtendStruct)
        sizes = [(ctypes.sizeof(s), short.hk_struct_bytes(i)) for i, s in enumerate(structs)]
        short.hk_source_digest.restype = ctypes.c_char_p
        digest = short.hk_source_digest().decode()
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path.name}: {error}") from error
    if version != ABI_VERSION:
        raise NativeError(f"{path.name} has interface version {version}, not {ABI_VERSION}")
    if any(ours != theirs for ours, theirs in sizes):
        raise NativeError(
            f"{path.name} was compiled with structs of other sizes (here, there: {sizes})"
        )
    if build_native.SOURCE_DIR.is_dir() and digest != build_native.source_digest():
        raise NativeError(f"{path.name} was made from other sources")
    parallel = _parallel_entry()
    short.hk_set_parallel.argtypes = [c_void_p]
    short.hk_set_parallel(parallel)
    return _bind(short, long, level, parallel is not None)


@functools.cache
def _load() -> tuple[Library | None, str]:
    reasons = []
    for level in runnable_levels():
        try:
            found = open_library(level)
        except NativeError as error:
            reasons.append(str(error))
            continue
        remark = "" if found.has_threads else " (one thread: torch's OpenMP was not found)"
        return found, f"native {level}{remark}"
    reason = "; ".join(reasons) or "no library for this processor"
    return None, f"torch ({reason}; run: python -m hetero_kernels.build_native)"


def _bind(short: Any, long: Any, level: str, has_threads: bool) -> Library:
    def bind(function: Any, *types: Any) -> Callable[..., None]:
        function.argtypes = types
        function.restype = None
        return function  # type: ignore[no-any-return]

    address, i32, i64 = c_void_p, c_int32, c_int64
    return Library(
        level=level,
        has_threads=has_threads,
        append_rows=bind(
            short.hk_append_rows, address, address, address, i64, address, i64, address, i64
        ),
        decode_attention=bind(
            long.hk_decode_attention, address, address, address, i64, address, i64
        ),
        extend_attention=bind(long.hk_extend_attention, address),
        score=bind(long.hk_score, address),
        top_positions=bind(
            long.hk_top_positions,
            *(address, i64, i64, i64, address, i32, address, i64, address, i64, i32),
        ),
        gather_rows=bind(long.hk_gather_rows, address, i64, address, i64, i64, address, i64, i32),
        scatter_rows=bind(long.hk_scatter_rows, address, i64, address, i64, i64, address, i64, i32),
    )
