"""The whole runtime on a small random model: any mix of requests, against dense attention.

A model of what attention must be runs beside it: full KV of each request in plain lists,
and for compressed heads a mask made of the runtime's kept positions. memd is the real
service in this process, whose replies the machine can hold back or kill.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hetero_sglang.cache.blocks import BlockPool
from hetero_sglang.cache.host_store import HostStore
from hetero_sglang.cache.staging import StagingPool
from hetero_sglang.cache.watch import WatchPool, watched_key_bytes
from hetero_sglang.config import HeteroConfig
from hetero_sglang.policy.roles import build_role_tables
from hetero_sglang.prefill import ExtendSpan
from hetero_sglang.profile import HeadProfile, HeadRole, ModelShape, Thresholds
from hetero_sglang.runtime import HeteroRuntime
from memd.protocol import KVLayout
from memd.testing import FakeMemd

GROUP, DIM, CONTEXT, ROWS, TOKENS = 2, 32, 96, 5, 256
SCALE = DIM**-0.5
HEADS = 3  # of each layer: satellite, pivot, satellite
RATIO = 0.7
# What pivots keep, what they watch with, how many prompt tokens select.
VARIANTS = [
    ("all", "model", 1),
    ("budget", "model", 1),
    ("budget", "int8", 4),
    ("budget", "int4", 4),
]
PROFILE = HeadProfile(
    model=ModelShape(num_layers=2, num_q_heads=HEADS * GROUP, num_kv_heads=HEADS, head_dim=DIM),
    roles=np.array([[HeadRole.SATELLITE, HeadRole.PIVOT, HeadRole.SATELLITE]] * 2),
    allocation=np.array([[0.6, 0.0, 1.4], [1.2, 0.0, 0.8]]),
    stability=np.full((2, HEADS), 0.5),
    satellites_of={(0, 1): (0, 2), (1, 1): (0, 2)},
    thresholds=Thresholds(stable=0.5, similarity=0.5),
)


class Request:
    def __init__(self, row: int, prompt_len: int) -> None:
        self.row = row
        self.prompt_len = prompt_len
        self.done = 0
        self.ids: list[int] = []
        # K and V so far, [layers][heads] lists of rows.
        self.k = [torch.empty(HEADS, 0, DIM) for _ in range(2)]
        self.v = [torch.empty(HEADS, 0, DIM) for _ in range(2)]

    @property
    def in_prefill(self) -> bool:
        return self.done < self.prompt_len


class Machine(RuleBasedStateMachine):
    # Where the pools lie; requests' K and V are kept on the CPU.
    device = "cpu"
    # Copies between the pools' device and memd; None: at once.
    transfers = None

    @property
    def is_copying(self) -> bool:
        """Whether a prompt is on its way to memd, or has arrived and nobody has looked."""
        return self.store is not None and len(self.store._storing) > 0

    @initialize(
        retrieval=st.sampled_from(["async", "sync", "off"]),
        variant=st.sampled_from(VARIANTS),
        seed=st.integers(0, 99),
    )
    def start(self, retrieval: str, variant: tuple[str, str, int], seed: int) -> None:
        pivot_rows, watch_dtype, window = variant
        self.rng = torch.Generator().manual_seed(seed)
        # A threshold of 1 makes nearly every check drift.
        config = HeteroConfig(
            ratio=RATIO,
            min_tokens=8,
            drift_interval=2,
            drift_threshold=1.0,
            block_tokens=4,
            page_tokens=8,
            landing_rows=48,
            retrieval=retrieval,
            pivot_rows=pivot_rows,
            watch_dtype=watch_dtype,
            window=window,
        )
        share = 0.0
        if config.has_watch_pool:
            share = watched_key_bytes(watch_dtype, DIM, 4) / (2 * DIM * 4)
        self.tables = build_role_tables(PROFILE, pivot_rows=pivot_rows, watched_share=share)
        num_heads = self.tables.num_compressed
        self.watch = None
        if config.has_watch_pool:
            self.watch = WatchPool(
                num_pivots=2,
                num_slots=TOKENS + 1,
                head_dim=DIM,
                watch_dtype=watch_dtype,
                dtype=torch.float32,
                device=self.device,
            )
        blocks = BlockPool(
            num_blocks=num_heads * (CONTEXT // 4 + 1) * ROWS,
            block_tokens=4,
            head_dim=DIM,
            num_rows=ROWS,
            num_compressed=num_heads,
            context_tokens=CONTEXT,
            dtype=torch.float32,
            device=self.device,
        )
        self.memd = FakeMemd.create(
            KVLayout(num_heads=num_heads, head_dim=DIM, dtype="float32", page_tokens=8),
            num_pages=40,
            landing_rows=48,
        )
        self.store = (
            None
            if retrieval == "off"
            else HostStore(
                self.memd,
                num_slots=TOKENS + 1,
                num_heads=num_heads,
                head_dim=DIM,
                page_tokens=8,
                dtype=torch.float32,
                transfers=self.transfers,
            )
        )
        self.req_to_token = torch.zeros(ROWS, CONTEXT, dtype=torch.int32, device=self.device)
        resident = torch.full(
            (self.tables.num_planes, TOKENS + 1, DIM), float("nan"), device=self.device
        )
        self.runtime = HeteroRuntime(
            tables=self.tables,
            config=config,
            k_resident=resident,
            v_resident=resident.clone(),
            blocks=blocks,
            staging=StagingPool(num_heads, 3 * CONTEXT, DIM, torch.float32, self.device),
            store=self.store,
            watch=self.watch,
            req_to_token=self.req_to_token,
            group_size=GROUP,
        )
        self.live: dict[int, Request] = {}
        self.free_ids = list(range(1, TOKENS + 1))

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.rng)

    def extend_ids(self, request: Request, count: int) -> list[int]:
        # Alternate ends, so that ids are neither contiguous nor ascending.
        ids = [self.free_ids.pop(-1 if i % 3 else 0) for i in range(count)]
        start = len(request.ids)
        self.req_to_token[request.row, start : start + count] = torch.tensor(ids).int()
        request.ids += ids
        return ids

    @precondition(lambda self: len(self.live) < ROWS - 1)
    @rule(prompt_len=st.integers(1, 40), chunk=st.integers(1, 40))
    def admit(self, prompt_len: int, chunk: int) -> None:
        if prompt_len + 20 > len(self.free_ids):
            return
        row = next(r for r in range(1, ROWS) if r not in self.live)
        if not self.runtime.staging.extents.fits([prompt_len]):
            return
        self.live[row] = Request(row, prompt_len)
        self.prefill(row, chunk)

    @precondition(lambda self: any(r.in_prefill for r in self.live.values()))
    @rule(chunk=st.integers(1, 40))
    def go_on(self, chunk: int) -> None:
        row = next(row for row, r in self.live.items() if r.in_prefill)
        self.prefill(row, chunk)

    def prefill(self, row: int, chunk: int) -> None:
        request = self.live[row]
        start, end = request.done, min(request.done + chunk, request.prompt_len)
        count = end - start
        self.runtime.begin_prefill(row, request.prompt_len, end)
        self.extend_ids(request, count)
        self.runtime.allocate(np.array([row]), np.array([end]))
        spans = [ExtendSpan(row, 0, start, count)]
        self.runtime.begin_extend(spans)
        for layer in range(2):
            q = self.random(count, HEADS * GROUP, DIM)
            k, v = self.random(count, HEADS, DIM), self.random(count, HEADS, DIM)
            request.k[layer] = torch.cat([request.k[layer], k.transpose(0, 1)], 1)
            request.v[layer] = torch.cat([request.v[layer], v.transpose(0, 1)], 1)
            there = [tensor.to(self.device) for tensor in (q, k, v)]
            out = self.runtime.extend_layer(layer, *there, spans, SCALE).cpu()
            for i in range(count):
                self.compare(request, layer, q[i], out[i], start + i + 1, None)
        request.done = end

    @precondition(lambda self: any(not r.in_prefill for r in self.live.values()))
    @rule(steps=st.integers(1, 5))
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            batch = [
                r
                for r in self.live.values()
                if not r.in_prefill and len(r.ids) < CONTEXT and self.free_ids
            ][: len(self.free_ids)]
            if batch:
                self.step(batch)

    def step(self, batch: list[Request]) -> None:
        ids = [self.extend_ids(r, 1)[0] for r in batch]
        rows = torch.tensor([r.row for r in batch])
        lens = torch.tensor([len(r.ids) for r in batch])
        self.runtime.allocate(rows.numpy(), lens.numpy())
        self.runtime.begin_decode(rows, lens, torch.tensor(ids))
        kept = {r.row: self.kept(r) for r in batch}
        for layer in range(2):
            q = self.random(len(batch), HEADS * GROUP, DIM)
            k, v = self.random(len(batch), HEADS, DIM), self.random(len(batch), HEADS, DIM)
            out = self.runtime.decode_layer(layer, q, k, v, SCALE)
            for i, r in enumerate(batch):
                r.k[layer] = torch.cat([r.k[layer], k[i][:, None]], 1)
                r.v[layer] = torch.cat([r.v[layer], v[i][:, None]], 1)
                self.compare(r, layer, q[i], out[i], len(r.ids), kept[r.row])

    def kept(self, request: Request) -> list[np.ndarray]:
        """Kept positions as the block pool has them, by compressed head."""
        blocks = self.runtime.blocks
        flat = blocks.positions.cpu().numpy().reshape(-1)
        return [
            flat[
                blocks.row_addresses(
                    request.row, head, np.arange(int(blocks.kept_lens[request.row, head]))
                )
            ]
            for head in range(self.tables.num_compressed)
        ]

    def compare(
        self,
        request: Request,
        layer: int,
        q: torch.Tensor,
        out: torch.Tensor,
        seq_len: int,
        kept: list[np.ndarray] | None,
    ) -> None:
        for head, place in enumerate(self.tables.layers[layer].head_map.tolist()):
            visible = torch.ones(seq_len, dtype=torch.bool)
            if kept is not None and place < 0:
                visible[: request.prompt_len] = False
                visible[kept[~place].astype(np.int64)] = True
            k, v = request.k[layer][head, :seq_len], request.v[layer][head, :seq_len]
            queries = q[head * GROUP : (head + 1) * GROUP]
            scores = (queries @ k.T * SCALE).masked_fill(~visible, float("-inf"))
            expected = torch.softmax(scores, -1) @ v
            torch.testing.assert_close(
                out[head * GROUP : (head + 1) * GROUP], expected, rtol=1e-4, atol=1e-5
            )

    @precondition(lambda self: bool(self.live))
    @rule(which=st.integers(0, ROWS))
    def end(self, which: int) -> None:
        request = self.live.pop(list(self.live)[which % len(self.live)])
        self.runtime.free(request.row)
        self.free_ids += request.ids

    @rule()
    def flush(self) -> None:
        self.runtime.clear()
        for request in self.live.values():
            self.free_ids += request.ids
        self.live.clear()

    @precondition(lambda self: self.runtime.config.retrieval == "async")
    @rule()
    def hold_memd_back(self) -> None:
        self.memd.hold()

    @rule()
    def let_memd_go_on(self) -> None:
        self.memd.resume()

    @precondition(lambda self: self.memd.is_alive)
    @rule(really=st.integers(0, 9))
    def kill_memd(self, really: int) -> None:
        if really == 0:
            self.memd.kill()

    @invariant()
    def watched_keys_are_the_prompts(self) -> None:
        if self.watch is None:
            return
        bound = {"model": 0.0, "int8": 0.51 / 127, "int4": 0.51 / 7}
        for request in self.live.values():
            ids = torch.tensor(request.ids[: min(request.done, request.prompt_len)])
            for layer in range(2):
                exact = request.k[layer][1, : len(ids)]
                keys = self.watch.keys
                held = (
                    keys[layer, ids.to(self.device)]
                    if isinstance(keys, torch.Tensor)
                    else keys.dequantize(layer, ids.to(self.device))
                ).cpu()
                largest = exact.abs().amax(-1, keepdim=True)
                error = bound[self.runtime.config.watch_dtype] * largest + exact.abs() / 256
                if self.runtime.config.watch_dtype == "model":
                    assert torch.equal(held, exact)
                else:
                    assert torch.all((held - exact).abs() <= error)

    def has_its_rows_in_memd(self, row: int) -> bool:
        """Whether memd has K and V of all compressed heads of a prompt, bit for bit."""
        request = self.live[row]
        positions = np.arange(request.prompt_len)
        rows = torch.from_numpy(self.memd.pages).view(torch.float32).view(-1, 2, DIM)
        for layer, heads in enumerate(self.tables.layers):
            for index, head in enumerate(heads.compressed.tolist()):
                where = self.store.row_indices(row, heads.first_compressed + index, positions)
                for side, given in enumerate((request.k[layer], request.v[layer])):
                    if not torch.equal(rows[where, side], given[head, : request.prompt_len]):
                        return False
        return True

    @invariant()
    def what_can_be_fetched_is_the_prompts(self) -> None:
        if self.store is not None and self.store.is_available:
            for row in self.live:
                assert not self.store.is_ready(row) or self.has_its_rows_in_memd(row)

    @invariant()
    def pools_agree(self) -> None:
        self.runtime.check_integrity()
        state = self.runtime.state()
        assert state["requests"]["prefill"] == sum(r.in_prefill for r in self.live.values())
        if not self.live:
            assert state["areas"]["blocks"]["used_bytes"] == 0
            assert self.is_copying or state["areas"]["staging"]["used_bytes"] == 0

    def teardown(self) -> None:
        if not hasattr(self, "runtime"):
            return
        self.flush()
        self.memd.resume()
        if self.store is not None:
            self.store.wait_stored()
            self.store.poll()
            assert self.runtime.staging.extents.used == 0
            self.runtime._retrieval.install_landed(wait=True)
            self.runtime._retrieval.install_landed(wait=True)
            if self.memd.is_alive:
                self.memd.check_integrity()
                self.store.poll()
                assert self.store.num_pages_used == 0
                assert self.memd.landing_rows_used == 0


TestRuntime = Machine.TestCase
TestRuntime.settings = settings(stateful_step_count=30, max_examples=40)
TestRuntime.pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
