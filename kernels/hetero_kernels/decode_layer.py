"""The decode step of one layer with everything static prepared.

``append_rows`` and ``decode_attention`` check and describe their tensors at each call. A decode
step calls them once per layer while only the batch changes, so ``DecodeLayer`` does that work when
it is made and a call costs a few microseconds.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from hetero_kernels.append_rows import check_new_rows
from hetero_kernels.append_rows.cpu import append_rows_torch
from hetero_kernels.append_rows.reference import append_rows_reference
from hetero_kernels.decode_attention import check_queries
from hetero_kernels.decode_attention.cpu import decode_attention_torch
from hetero_kernels.decode_attention.reference import decode_attention_reference
from hetero_kernels.dispatch import loaded, resolve
from hetero_kernels.layer import DecodeBatch, LayerTensors

if TYPE_CHECKING:
    from torch import Tensor

    from hetero_kernels.decode_attention import DecodeWorkspace
    from hetero_kernels.dispatch import Impl

__all__ = ["DecodeBatch", "DecodeLayer"]


class DecodeLayer:
    """Appends to and attends over one layer.

    Args:
        tensors: Where the layer's keys and values lie, with ``req_to_token`` and
            ``block_positions``. They must keep their storage as long as this object is used.
        impl: See ``hetero_kernels.dispatch``.
        workspace: Scratch memory of ``triton``, shared by all layers; ``None``: made for each call.

    Raises:
        ValueError: ``impl`` is not available.
    """

    __slots__ = (
        *("_address", "_append", "_attend", "_known", "_struct"),
        *("_workspace", "impl", "tensors"),
    )

    def __init__(
        self, tensors: LayerTensors, impl: Impl = "auto", workspace: DecodeWorkspace | None = None
    ) -> None:
        self.tensors = tensors
        self.impl = resolve(impl, tensors.device)
        self._workspace = workspace
        # Layouts of arguments that were checked once; a model uses one or two.
        self._known: set[tuple[object, ...]] = set()
        if self.impl == "native":
            self._struct = tensors.to_struct()
            self._address = ctypes.addressof(self._struct)
            self._append = loaded().append_rows
            self._attend = loaded().decode_attention

    def append(self, k: Tensor, v: Tensor, q: Tensor | None, batch: DecodeBatch) -> None:
        """Write the new tokens' rows, and pivots' queries if ``q`` is given; see ``append_rows``.

        Args:
            k: [B, H, D], dense over heads.
            v: [B, H, D], dense over heads.
            q: [B, Hq, D], dense over heads, or ``None``.
            batch: The step's requests, with ``token_ids``.

        Raises:
            ValueError: A shape, dtype or stride does not fit.
        """
        if self.impl == "native":
            k_strides, v_strides = k.stride(), v.stride()
            key: tuple[object, ...]
            if q is None:
                q_address, q_stride = None, 0
                key = (k.shape, k_strides, k.dtype, v.shape, v_strides, v.dtype)
            else:
                q_strides = q.stride()
                q_address, q_stride = q.data_ptr(), q_strides[0]
                key = (
                    *(k.shape, k_strides, k.dtype, v.shape, v_strides, v.dtype),
                    *(q.shape, q_strides, q.dtype),
                )
            is_here = k.is_cpu and v.is_cpu and batch.is_cpu and (q is None or q.is_cpu)
            if (
                not is_here
                or batch.token_ids is None
                or k.shape[0] != batch.size
                or key not in self._known
            ):
                check_new_rows(k, v, q, self.tensors, batch)
                self._known.add(key)
            self._append(
                self._address,
                batch.address,
                k.data_ptr(),
                k_strides[0],
                v.data_ptr(),
                v_strides[0],
                q_address,
                q_stride,
            )
            return
        check_new_rows(k, v, q, self.tensors, batch)
        if self.impl == "triton":
            from hetero_kernels.append_rows.triton import append_rows_triton

            append_rows_triton(k, v, q, self.tensors, batch)
            return
        run = append_rows_torch if self.impl == "torch" else append_rows_reference
        run(k, v, q, self.tensors, batch)

    def attend(self, q: Tensor, out: Tensor, batch: DecodeBatch) -> Tensor:
        """Attend with the newest tokens; see ``decode_attention``.

        Args:
            q: [B, Hq, D], dense over heads.
            out: [B, Hq, D], overwritten.
            batch: The step's requests.

        Returns:
            ``out``.

        Raises:
            ValueError: A shape, dtype or stride does not fit.
        """
        if self.impl == "native":
            shape, q_strides, out_strides = q.shape, q.stride(), out.stride()
            key = (shape, q_strides, out_strides, q.dtype, out.shape, out.dtype)
            is_here = q.is_cpu and out.is_cpu and batch.is_cpu
            if not is_here or shape[0] != batch.size or key not in self._known:
                check_queries(q, out, self.tensors, batch)
                self._known.add(key)
            self._attend(
                self._address,
                batch.address,
                q.data_ptr(),
                q_strides[0],
                out.data_ptr(),
                out_strides[0],
            )
            return out
        check_queries(q, out, self.tensors, batch)
        if self.impl == "triton":
            from hetero_kernels.decode_attention.triton import decode_attention_triton

            decode_attention_triton(q, out, self.tensors, batch, self._workspace)
            return out
        run = decode_attention_torch if self.impl == "torch" else decode_attention_reference
        run(q, out, self.tensors, batch)
        return out
