"""Kernels of HeteroCache: what a decode or prefill step computes over the KV pools.

Knows tensors only: no model, no policy, no engine. Each operation is a folder with its definition
(``reference.py``, fp32 loops), its CPU implementations (``cpu.py``: compiled C++ through ctypes,
and torch where nothing is compiled) and ``triton.py``, which is imported when it is to run. All
implementations share one signature and are held against the definition by the same laws. Nobody but
the caller owns memory; nothing here keeps a tensor but ``DecodeLayer``, which is made to.
"""

from __future__ import annotations

from hetero_kernels.append_rows import append_rows
from hetero_kernels.decode_attention import DecodeWorkspace, decode_attention
from hetero_kernels.decode_layer import DecodeBatch, DecodeLayer
from hetero_kernels.extend_attention import extend_attention
from hetero_kernels.layer import LayerTensors
from hetero_kernels.move_rows import gather_rows, install_rows, scatter_rows
from hetero_kernels.native import native_status
from hetero_kernels.plan_delta import DeltaPlan, plan_delta
from hetero_kernels.quantize_keys import QuantizedKeys, quantize_keys, quantized_key_bytes
from hetero_kernels.score_positions import score_positions
from hetero_kernels.top_positions import pack_positions, top_bits, top_positions
from hetero_kernels.topk_overlap import topk_overlap
from hetero_kernels.window_scores import window_scores

__all__ = [
    "DecodeBatch",
    "DecodeLayer",
    "DecodeWorkspace",
    "DeltaPlan",
    "LayerTensors",
    "QuantizedKeys",
    "append_rows",
    "decode_attention",
    "extend_attention",
    "gather_rows",
    "install_rows",
    "native_status",
    "pack_positions",
    "plan_delta",
    "quantize_keys",
    "quantized_key_bytes",
    "scatter_rows",
    "score_positions",
    "top_bits",
    "top_positions",
    "topk_overlap",
    "window_scores",
]
