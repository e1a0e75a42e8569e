"""The runtime's state machine with its decode steps as SGLang's graph runner makes them.

A stand-in for the runner: static input buffers, SGLang's padding, warm-ups with SGLang's hooks, one
graph a batch size, and SGLang's own view of a batch at a replay. What is replayed is either the
call itself (``impl`` torch) or a recording of its launches (``impl`` triton,
``tests/fake_graph.py``), or a CUDA graph where the pools are on a GPU.
"""

from __future__ import annotations

import contextlib
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from hypothesis.stateful import rule
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import build_replay_fb_view

from hetero_sglang.cache.mailbox import Mailbox
from hetero_sglang.graph_runtime import GraphRuntime
from hetero_sglang.sglang_adapter.graph import GraphAttentionBackend
from tests.fake_graph import FakeGraph
from tests.property.cache import test_runtime as eager

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYERS = 2


def tensors_held(owner: Any, seen: dict[int, Any] | None = None) -> dict[int, Any]:
    """Every tensor that an object of ours holds, by identity, with its address."""
    seen = {} if seen is None else seen
    if id(owner) in seen:
        return seen
    if isinstance(owner, torch.Tensor):
        seen[id(owner)] = (owner, owner.data_ptr())
        return seen
    parts: list[Any] = []
    if isinstance(owner, dict):
        parts = list(owner.values())
    elif isinstance(owner, list | tuple):
        parts = list(owner)
    elif type(owner).__module__.startswith(("hetero_", "tests.")):
        slots = [getattr(owner, name, None) for name in getattr(type(owner), "__slots__", ())]
        parts = [*slots, *getattr(owner, "__dict__", {}).values()]
    if parts:
        seen[id(owner)] = (owner, None)
    for part in parts:
        tensors_held(part, seen)
    return seen


def addresses_held(owner: Any) -> list[int]:
    """Addresses of every tensor that an object of ours holds."""
    return sorted(address for _, address in tensors_held(owner).values() if address is not None)


class Backend(GraphAttentionBackend):
    """The backend over a runtime that is there, without SGLang's pools."""

    def __init__(self, runtime: GraphRuntime) -> None:
        AttentionBackend.__init__(self)
        self.runtime = runtime
        self._spans = []
        self._num_q_heads = eager.HEADS * eager.GROUP
        self._num_kv_heads, self._head_dim = eager.HEADS, eager.DIM


class Runner:
    """What ``DecodeCudaGraphRunner`` does with an attention backend."""

    def __init__(self, backend: Backend, sizes: list[int], is_recording: bool) -> None:
        self.backend, self.sizes, self.is_recording = backend, sizes, is_recording
        most = max(sizes)
        backend.init_cuda_graph_state(most, most)
        self.fill_value = backend.get_cuda_graph_seq_len_fill_value()
        self.device = device = backend.runtime.blocks.k.device
        seq_lens_cpu = torch.full((most,), self.fill_value, dtype=torch.int64)
        self.buffers = SimpleNamespace(
            input_ids=torch.zeros(most, dtype=torch.int64, device=device),
            positions=torch.zeros(most, dtype=torch.int64, device=device),
            req_pool_indices=torch.zeros(most, dtype=torch.int64, device=device),
            seq_lens=seq_lens_cpu.clone().to(device),
            seq_lens_cpu=seq_lens_cpu,
            out_cache_loc=torch.zeros(most, dtype=torch.int64, device=device),
            encoder_lens=None,
            mamba_track_indices=None,
        )
        nan = float("nan")
        heads, dim = eager.HEADS, eager.DIM
        self.q = torch.full((LAYERS, most, heads * eager.GROUP * dim), nan, device=device)
        self.k = torch.full((LAYERS, most, heads * dim), nan, device=device)
        self.v = self.k.clone()
        self.out = torch.full_like(self.q, nan)
        self.layers = [
            SimpleNamespace(
                layer_id=layer,
                scaling=eager.SCALE,
                is_cross_attention=False,
                sliding_window_size=-1,
                logit_cap=0.0,
            )
            for layer in range(LAYERS)
        ]
        self.graphs: dict[int, Callable[[], None]] = {}
        for size in sorted(sizes, reverse=True):
            self.graphs[size] = self.capture(size)

    def capture(self, size: int) -> Callable[[], None]:
        """``_capture_one_batch_size`` and ``FullCudaGraphBackend.capture_one``."""
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            batch_size=size,
            req_pool_indices=self.buffers.req_pool_indices[:size],
            seq_lens=self.buffers.seq_lens[:size],
            seq_lens_cpu=self.buffers.seq_lens_cpu[:size],
            out_cache_loc=self.buffers.out_cache_loc[:size],
            rids=None,
        )
        self.backend.init_forward_metadata_out_graph(batch, in_capture=True)

        def run_once() -> None:
            self.backend.init_forward_metadata_in_graph(batch)
            for layer in self.layers:
                at = (layer.layer_id, slice(0, size))
                out = self.backend.forward_decode(self.q[at], self.k[at], self.v[at], layer, batch)
                self.out[at].copy_(out)

        for _ in range(2):
            run_once()
            self.backend.on_after_cuda_graph_warmup()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            real = torch.cuda.CUDAGraph()
            with torch.cuda.graph(real):
                run_once()
            return real.replay
        if not self.is_recording:
            return run_once
        before = addresses_held(self.backend.runtime)
        graph = FakeGraph.capture(run_once)
        assert graph.num_launches == 4 * LAYERS
        # What a capture makes is the graph's; the backend keeps nothing of it.
        assert addresses_held(self.backend.runtime) == before
        assert not {t.data_ptr() for t in graph.made if t.numel()} & set(before)
        return graph.replay

    @contextlib.contextmanager
    def host_runs_ahead(self) -> Iterator[None]:
        """While a replay runs the host's tables are the host's: no launch reads them."""
        blocks = self.backend.runtime.blocks
        tables = (blocks.table, blocks.kept_lens, blocks.prompt_lens)
        before = [table.clone() for table in tables]
        for table in tables:
            table.zero_()
        yield
        for table, contents in zip(tables, before, strict=True):
            table.copy_(contents)

    def replay(
        self,
        rows: torch.Tensor,
        lens: torch.Tensor,
        ids: torch.Tensor,
        inputs: Callable[[], list[tuple[torch.Tensor, ...]]],
    ) -> torch.Tensor:
        """``load_batch`` and the replay; ``inputs`` is called after the host work.

        Returns:
            Attention of every layer, [layers, num_reqs, num_q_heads, head_dim].
        """
        count = len(rows)
        size = min(s for s in self.sizes if s >= count)
        for target, source, pad in (
            (self.buffers.req_pool_indices, rows, 0),
            (self.buffers.seq_lens, lens, self.fill_value),
            (self.buffers.seq_lens_cpu, lens, self.fill_value),
            (self.buffers.out_cache_loc, ids, 0),
        ):
            target[:count] = source
            target[count:size] = pad
        real = SimpleNamespace(
            forward_mode=ForwardMode.DECODE,
            seq_lens_sum=int(lens.sum()),
            seq_lens_cpu=lens,
            max_seq_len_host=None,
            out_cache_loc=ids,
            out_cache_loc_virtual=None,
            kv_loc_plan=None,
            kv_loc_cols=None,
            max_seq_len_override=None,
            spec_info=None,
            lora_ids=None,
            can_run_decode_cuda_graph=True,
        )
        view = build_replay_fb_view(
            forward_batch=real,
            buffers=self.buffers,
            bs=size,
            raw_bs=count,
            num_tokens=size,
            global_num_tokens_cpu=None,
            seq_len_fill_value=self.fill_value,
            capture_forward_mode=ForwardMode.DECODE,
            is_encoder_decoder=False,
        )
        self.backend.init_forward_metadata_out_graph(view)
        for tensor in (self.q, self.k, self.v, self.out):
            tensor.fill_(float("nan"))
        for layer, (q, k, v) in enumerate(inputs()):
            self.q[layer, :count], self.k[layer, :count] = q.flatten(1), k.flatten(1)
            self.v[layer, :count] = v.flatten(1)
        before = addresses_held(self.backend.runtime)
        with self.host_runs_ahead():
            self.graphs[size]()
        assert not self.is_recording or addresses_held(self.backend.runtime) == before
        padding = self.out[:, count:size]
        assert torch.equal(padding, torch.zeros_like(padding))
        out = self.out[:, :count].cpu()
        return out.view(LAYERS, count, eager.HEADS * eager.GROUP, eager.DIM)


class HeldMail:
    """Marks of work that the device has passed only while nobody holds it back.

    ``num_let_through`` counts down: so many letters still arrive while it is held back.
    """

    is_held = False
    num_let_through = 0

    def __call__(self, _: torch.device) -> HeldMail:
        return self

    def query(self) -> bool:
        if self.is_held and self.num_let_through:
            self.num_let_through -= 1
            return True
        return not self.is_held

    def synchronize(self) -> None:
        return


class CapturedMachine(eager.Machine):
    """``test_runtime.Machine`` over captured decode steps."""

    impl = "torch"
    sizes = (1, 2, 4)

    @property
    def is_recording(self) -> bool:
        return self.impl == "triton" and self.device == "cpu"

    def begin(self, retrieval: str, variant: tuple[str, str, int], seed: int) -> None:
        self.mail = HeldMail()
        mailbox = Mailbox(torch.device("cpu"), self.mail) if self.device == "cpu" else None
        made: Any = partial(GraphRuntime, impl=self.impl, mailbox=mailbox)
        with mock.patch.object(eager, "HeteroRuntime", made):
            eager.Machine.start(self, retrieval=retrieval, variant=variant, seed=seed)
        pools = self.pools()
        before = [pool.clone() for pool in pools]
        self.runner = Runner(Backend(self.runtime), list(self.sizes), self.is_recording)
        # Neither a warm-up nor a capture leaves anything.
        for pool, untouched in zip(pools, before, strict=True):
            assert torch.equal(pool.view(torch.uint8), untouched.view(torch.uint8))

    @rule()
    def hold_mail_back(self) -> None:
        self.mail.is_held = True

    @rule()
    def let_mail_come(self) -> None:
        self.mail.is_held = False

    def pools(self) -> list[torch.Tensor]:
        runtime = self.runtime
        blocks = (runtime.blocks.k, runtime.blocks.v, runtime.blocks.positions)
        resident = (runtime._k_resident, runtime._v_resident)
        return [t for t in (*blocks, *resident, runtime.drift.pivot_queries) if t.numel()]

    def step(self, batch: list[eager.Request]) -> None:
        ids = [self.extend_ids(r, 1)[0] for r in batch]
        rows = torch.tensor([r.row for r in batch])
        lens = torch.tensor([len(r.ids) for r in batch])
        self.runtime.allocate(rows.numpy(), lens.numpy())
        drawn: list[tuple[torch.Tensor, ...]] = []
        kept = {}

        def inputs() -> list[tuple[torch.Tensor, ...]]:
            kept.update({r.row: self.kept(r) for r in batch})
            for _ in range(LAYERS):
                q = self.random(len(batch), eager.HEADS * eager.GROUP, eager.DIM)
                k = self.random(len(batch), eager.HEADS, eager.DIM)
                drawn.append((q, k, self.random(len(batch), eager.HEADS, eager.DIM)))
            return drawn

        out = self.runner.replay(rows, lens, torch.tensor(ids), inputs)
        for layer, (q, k, v) in enumerate(drawn):
            for i, r in enumerate(batch):
                r.k[layer] = torch.cat([r.k[layer], k[i][:, None]], 1)
                r.v[layer] = torch.cat([r.v[layer], v[i][:, None]], 1)
                self.compare(r, layer, q[i], out[layer, i], len(r.ids), kept[r.row])
