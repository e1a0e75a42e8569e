"""Attention backend whose decode steps SGLang captures in CUDA graphs. Not yet run on a GPU.

SGLang's runner fills static input buffers, calls ``init_forward_metadata_out_graph`` (host work)
and replays a graph that begins with ``init_forward_metadata_in_graph``. At a replay the batch is a
view of these buffers: padded, on the device, without request ids. Nothing here reads it back; the
runtime remembers what the scheduler told it when it made room for the step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds

from hetero_sglang.errors import ConfigError
from hetero_sglang.graph_runtime import GraphRuntime
from hetero_sglang.sglang_adapter.backend import HeteroAttentionBackend
from hetero_sglang.sglang_adapter.compat import GRAPH_TARGETS, check_compatibility

if TYPE_CHECKING:
    from numpy.typing import NDArray

SEQ_LEN_FILL_VALUE = 1
"""Length that SGLang gives padded requests, as its own backends have it. Padding is recognised by
the number of real requests and by row 0, not by its length."""


class GraphAttentionBackend(HeteroAttentionBackend):
    """Extend as on the CPU; decode through static tables.

    Attributes:
        runtime: Residency of all requests.
    """

    runtime_class = GraphRuntime
    runtime: GraphRuntime

    def __init__(self, runner: Any) -> None:
        check_compatibility(GRAPH_TARGETS)
        super().__init__(runner)

    def support_triton(self) -> bool:
        """Whether SGLang may prepare its own metadata by Triton kernels."""
        return self.runtime.is_on_cuda

    def shared_read_ends(self, fm: Any) -> SharedReadEnds:
        """Decode reads SGLang's ``req_to_token`` in every layer, so until the replay has ended."""
        if fm.is_decode():
            return SharedReadEnds.POST_REPLAY
        ends: SharedReadEnds = super().shared_read_ends(fm)
        return ends

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Makes room for graphs of up to ``max_bs`` requests of one token each.

        Raises:
            ConfigError: A request decodes several tokens a step (speculative decoding).
        """
        if max_num_tokens != max_bs:
            raise ConfigError(
                f"--kv-policy heterocache decodes one token a request and step, got "
                f"{max_num_tokens} tokens for {max_bs} requests"
            )
        self.runtime.prepare_capture(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Length of padded requests."""
        return SEQ_LEN_FILL_VALUE

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Prepares an eager batch before its first layer."""
        if forward_batch.forward_mode.is_decode():
            self.init_forward_metadata_out_graph(forward_batch)
            self.init_forward_metadata_in_graph(forward_batch)
        else:
            super().init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Host work before a step's launches; before a capture there is none."""
        if not forward_batch.forward_mode.is_decode():
            return
        num_padding = getattr(forward_batch, "num_padding", None)
        # SGLang's warm-up batches, which belong to no request, have no request ids either.
        is_dummy = num_padding is None and not forward_batch.rids
        if in_capture or is_dummy:
            self.runtime.prepare_padding()
            return
        num_real = forward_batch.batch_size - (num_padding or 0)
        seq_lens: NDArray[Any] | None = None
        if forward_batch.seq_lens_cpu is not None:
            seq_lens = forward_batch.seq_lens_cpu[:num_real].numpy()
        self.runtime.prepare_step(num_real, seq_lens)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Copies the batch to the static tables and masks its padding; captured."""
        if forward_batch.forward_mode.is_decode():
            self.runtime.stage(
                forward_batch.req_pool_indices,
                forward_batch.seq_lens,
                forward_batch.out_cache_loc,
            )

    def on_after_cuda_graph_warmup(self) -> None:
        """Leaves nothing of a warm-up's batch in the static tables."""
        self.runtime.undo_warmup()
