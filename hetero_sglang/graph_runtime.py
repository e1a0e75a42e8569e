"""The runtime for decode steps that a CUDA graph replays. Not yet run on a GPU.

A replay is launches without Python, so a step has two halves. ``prepare_step`` runs between two
replays, on the host and the stream of the forward passes: new blocks to the device's tables, landed
rows to the block pool, mail of earlier steps read, the drift check of requests that are due.
``stage`` and ``decode_layer`` are captured: they read static tables and pools only, and wait for
nothing.

The host learns of drift from mail, so on a device that has work queued a refresh begins at least
one step later than on the CPU: first come the overlaps, then the scores of those pivots that
drifted. Where results are there at once (CPU tensors) it is the same step, and everything is as in
``HeteroRuntime``.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hetero_kernels import DecodeLayer, DecodeWorkspace
from hetero_sglang.cache.decode_tables import DecodeTables
from hetero_sglang.cache.mailbox import Mailbox
from hetero_sglang.cache.table_mirror import TableMirror
from hetero_sglang.errors import ResidencyError
from hetero_sglang.runtime import HeteroRuntime

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hetero_kernels.dispatch import Impl


class GraphRuntime(HeteroRuntime):
    """Residency of all requests, decode steps prepared on the host and captured on the device.

    Attributes:
        decode_tables: Batch of the step at static addresses.
        mirror: Block tables on the device.
        mailbox: Results on their way to the host.
    """

    def __init__(self, *, impl: Impl = "triton", mailbox: Mailbox | None = None, **areas: Any):
        """Wires the areas together.

        Args:
            impl: Kernels of the decode step and the drift check; only ``triton`` can be captured.
            mailbox: Where results arrive; ``None``: one of its own.
            areas: As ``HeteroRuntime`` takes them.
        """
        super().__init__(**areas)
        self._impl: Impl = impl
        self._device = self._k_resident.device
        self.mirror = TableMirror(self.blocks, self._device)
        self.mailbox = Mailbox(self._device) if mailbox is None else mailbox
        num_rows = self.blocks.prompt_lens.shape[0]
        self._generation = np.zeros(num_rows, dtype=np.int64)
        self._announced: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._make_room(max(num_rows - 1, 1))

    @property
    def is_on_cuda(self) -> bool:
        """Whether the pools lie on a CUDA device."""
        return self._device.type == "cuda"

    def prepare_capture(self, max_reqs: int) -> None:
        """Makes room for graphs of up to ``max_reqs`` requests; before the first capture."""
        if max_reqs > self.decode_tables.max_reqs:
            self._make_room(max_reqs)

    def _make_room(self, max_reqs: int) -> None:
        self.decode_tables = DecodeTables(max_reqs, self._device)
        self._workspace = DecodeWorkspace.allocate(
            max_reqs, self.tables.num_kv_heads, self._group_size, self._head_dim, self._device
        )
        self._layers = [None] * len(self.tables.layers)

    # -- between two steps: host work ----------------------------------------------------

    def allocate(self, rows: NDArray[np.int64], seq_lens: NDArray[np.int64]) -> None:
        """As ``HeteroRuntime.allocate``; remembers the rows for the step that follows.

        At a replay SGLang shows the batch on the device only. What the host was told here, just
        before, is the same batch.
        """
        super().allocate(rows, seq_lens)
        # Copies: SGLang counts its lengths up in place.
        self._announced = (rows.astype(np.int64), seq_lens.astype(np.int64))

    def free(self, row: int) -> None:
        """As ``HeteroRuntime.free``; mail about the row's request is void from now on."""
        super().free(row)
        self._generation[row] += 1
        self.mirror.forget(row)

    def prepare_step(self, num_real: int, seq_lens: NDArray[np.int64] | None) -> None:
        """Host work of one decode step, before its launches; does not wait for the device.

        Args:
            num_real: Requests of the batch that are not padding.
            seq_lens: Their lengths where SGLang has them on the host, for comparison.

        Raises:
            ResidencyError: The batch is not the one that room was made for.
        """
        announced, self._announced = self._announced, None
        if num_real == 0:
            self.prepare_padding()
            return
        if announced is None or len(announced[0]) != num_real:
            known = 0 if announced is None else len(announced[0])
            raise ResidencyError(
                f"a decode step of {num_real} requests, but room was made for {known}"
            )
        rows, lens = announced
        if seq_lens is not None and not np.array_equal(lens, seq_lens):
            raise ResidencyError(
                f"a decode step to lengths {seq_lens.tolist()}, but room was made for "
                f"{lens.tolist()}"
            )
        self.mirror.sync(rows)
        self._read_mail()
        host_rows = torch.from_numpy(rows)
        # Of the batch only rows and lengths are used there; the step's own is staged.
        self.begin_decode(host_rows, torch.from_numpy(lens), host_rows)
        self.decode_tables.set_num_real(num_real)

    def prepare_padding(self) -> None:
        """Host work of a step that serves nobody: a capture, a warm-up, an idle rank."""
        self.decode_tables.set_num_real(0)

    def undo_warmup(self) -> None:
        """Makes the static tables padding again; nothing else was written by a warm-up."""
        self.decode_tables.reset()

    def _read_mail(self) -> None:
        if self.config.retrieval == "sync":
            self.mailbox.wait()
        else:
            self.mailbox.deliver()

    def _check_drift(self, rows: NDArray[np.int64]) -> None:
        if self.tables.num_pivots == 0:
            return
        prompt_lens = self.blocks.prompt_lens.numpy()
        for group in self.drift.groups(rows, prompt_lens[rows]):
            overlap, newest = self.drift.measure(
                group,
                self.mirror.prompt_lens,
                self._scale,
                width=int(prompt_lens[group].max()),
                impl=self._impl,
            )
            on_overlaps = partial(self._on_overlaps, group, self._generation[group], newest)
            self.mailbox.post(on_overlaps, overlap)
        self._read_mail()

    def _on_overlaps(
        self,
        rows: NDArray[np.int64],
        generations: NDArray[np.int64],
        newest: torch.Tensor,
        overlap: NDArray[np.float32],
    ) -> None:
        """Overlaps have arrived: asks for the scores of pivots that drifted."""
        if not self._store_is_there:
            return
        generation = dict(zip(rows.tolist(), generations.tolist(), strict=True))
        for row, pivot, entry in self.drift.drifted(rows, overlap):
            if self._generation[row] == generation[row]:
                self.mailbox.post(
                    partial(self._on_scores, row, generation[row], pivot),
                    *self._rank_anew(row, pivot, newest[entry]),
                )

    def _on_scores(
        self,
        row: int,
        generation: int,
        pivot: int,
        best: NDArray[np.int32],
        scores: NDArray[np.float32],
    ) -> None:
        """Scores of a pivot that drifted have arrived: its heads get new targets."""
        if self._store_is_there and self._generation[row] == generation:
            self._retarget(row, pivot, best, scores)

    # -- the step itself: captured -------------------------------------------------------

    def stage(self, rows: torch.Tensor, seq_lens: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Copies the batch to its static addresses and masks padding; captured.

        Args:
            rows: Rows of the batch, padding included, on the device.
            seq_lens: Tokens of each row, the new one included.
            token_ids: Token id of each new token.
        """
        self._batch = self.decode_tables.stage(rows, seq_lens, token_ids)

    def _make_layer(self, layer: int, scale: float) -> DecodeLayer:
        self._scale = scale
        tensors = self._layer_tensors(layer, scale)
        pivot_map = tensors.pivot_map
        return DecodeLayer(
            replace(
                tensors,
                block_table=self.mirror.block_table,
                kept_lens=self.mirror.kept_lens,
                prompt_lens=self.mirror.prompt_lens,
                head_map=tensors.head_map.to(self._device),
                pivot_map=None if pivot_map is None else pivot_map.to(self._device),
            ),
            impl=self._impl,
            workspace=self._workspace,
        )
