"""The backend for captured decode steps: SGLang's contract, and the eager backend's tokens."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend, SharedReadEnds
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from hetero_kernels import triton_support
from hetero_sglang.errors import ConfigError, ResidencyError
from hetero_sglang.sglang_adapter.graph import GraphAttentionBackend
from tests.captured_machine import CapturedMachine
from tests.compared_machines import Logged, assert_same_steps, drive
from tests.property.cache import test_runtime as eager

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

HOOKS = (
    "init_cuda_graph_state",
    "init_forward_metadata_out_graph",
    "init_forward_metadata_in_graph",
    "get_cuda_graph_seq_len_fill_value",
    "on_after_cuda_graph_warmup",
    "shared_read_ends",
    "init_forward_metadata",
    "support_triton",
)


class Captured(Logged, CapturedMachine):
    """Recorded launches, replayed; the same notes."""

    impl = "triton"
    begin = CapturedMachine.begin
    step = CapturedMachine.step


@pytest.fixture
def machine() -> Iterator[CapturedMachine]:
    machine = CapturedMachine()
    machine.begin("off", eager.VARIANTS[0], 0)
    yield machine
    machine.teardown()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not triton_support.is_installed() or not triton_support.is_interpreted(),
    reason="needs Triton's interpreter",
)
@pytest.mark.parametrize(
    ("retrieval", "variant"),
    [
        ("async", eager.VARIANTS[0]),
        ("sync", eager.VARIANTS[1]),
        ("async", eager.VARIANTS[2]),
        ("sync", eager.VARIANTS[3]),
        ("off", eager.VARIANTS[3]),
    ],
)
def test_replayed_launches_give_the_eager_backends_tokens(
    retrieval: str, variant: tuple[str, str, int]
) -> None:
    assert_same_steps(Captured(), retrieval, variant, rtol=0)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_has_its_base_classs_signature(name: str) -> None:
    base = inspect.signature(getattr(AttentionBackend, name)).parameters.values()
    ours = inspect.signature(getattr(GraphAttentionBackend, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in base
    ]


def test_shared_tables_are_read_until_a_decode_replay_ends(machine: CapturedMachine) -> None:
    backend = machine.runner.backend
    assert backend.shared_read_ends(ForwardMode.DECODE) is SharedReadEnds.POST_REPLAY
    assert backend.shared_read_ends(ForwardMode.EXTEND) is SharedReadEnds.UNKNOWN
    assert not backend.support_triton()


def test_several_tokens_a_request_are_refused(machine: CapturedMachine) -> None:
    with pytest.raises(ConfigError, match="8 tokens for 4 requests"):
        machine.runner.backend.init_cuda_graph_state(4, 8)


def test_graphs_larger_than_the_request_table_get_room(machine: CapturedMachine) -> None:
    machine.runner.backend.init_cuda_graph_state(9, 9)
    assert machine.runtime.decode_tables.max_reqs == 9
    machine.runner.backend.init_cuda_graph_state(2, 2)
    assert machine.runtime.decode_tables.max_reqs == 9


def batch_of(machine: CapturedMachine, **changes: Any) -> SimpleNamespace:
    request = next(iter(machine.live.values()))
    lens = torch.tensor([len(request.ids)])
    plain = {
        "forward_mode": ForwardMode.DECODE,
        "batch_size": 1,
        "req_pool_indices": torch.tensor([request.row]),
        "seq_lens": lens,
        "seq_lens_cpu": lens,
        "out_cache_loc": torch.tensor([request.ids[-1]]),
        "rids": ["request"],
    }
    return SimpleNamespace(**{**plain, **changes})


def test_a_step_that_no_room_was_made_for_is_an_error(machine: CapturedMachine) -> None:
    machine.admit(prompt_len=9, chunk=9)
    machine.extend_ids(machine.live[1], 1)
    backend, batch = machine.runner.backend, batch_of(machine)
    machine.runtime._announced = None
    with pytest.raises(ResidencyError, match="1 requests, but room was made for 0"):
        backend.init_forward_metadata(batch)
    machine.runtime.allocate(batch.req_pool_indices.numpy(), batch.seq_lens.numpy())
    other = batch_of(machine, seq_lens_cpu=batch.seq_lens + 1)
    with pytest.raises(ResidencyError, match=r"lengths \[11\], but room was made for \[10\]"):
        backend.init_forward_metadata(other)


def test_an_eager_batch_takes_the_same_way_and_a_dummy_one_is_padding(
    machine: CapturedMachine,
) -> None:
    machine.admit(prompt_len=9, chunk=9)
    machine.extend_ids(machine.live[1], 1)
    backend, batch = machine.runner.backend, batch_of(machine)
    tables = machine.runtime.decode_tables
    backend.init_forward_metadata(batch_of(machine, rids=None))
    assert tables.rows[0] == -1
    machine.runtime.allocate(batch.req_pool_indices.numpy(), batch.seq_lens.numpy())
    backend.init_forward_metadata(batch)
    assert tables.rows[0] == 1
    assert tables.seq_lens[0] == 10


def test_a_prompt_of_nobody_writes_nothing(machine: CapturedMachine) -> None:
    machine.admit(prompt_len=9, chunk=9)
    backend, before = machine.runner.backend, [pool.clone() for pool in machine.pools()]
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        req_pool_indices=torch.tensor([0]),
        extend_prefix_lens=torch.tensor([0]),
        extend_seq_lens=torch.tensor([7]),
        rids=None,
    )
    backend.init_forward_metadata(batch)
    q = torch.ones(7, eager.HEADS * eager.GROUP * eager.DIM)
    kv = torch.ones(7, eager.HEADS * eager.DIM)
    out = backend.forward_extend(q, kv, kv, machine.runner.layers[0], batch)
    assert torch.equal(out, torch.zeros_like(q))
    for pool, untouched in zip(machine.pools(), before, strict=True):
        assert torch.equal(pool.view(torch.uint8), untouched.view(torch.uint8))
    machine.pools_agree()


@pytest.mark.parametrize("num_let_through", [0, 1], ids=["overlaps", "scores"])
def test_mail_about_a_request_that_has_ended_moves_nothing(num_let_through: int) -> None:
    machine = CapturedMachine()
    machine.begin("async", ("budget", "model", 1), 1)
    runtime = machine.runtime
    machine.admit(prompt_len=40, chunk=40)
    machine.mail.is_held = True
    # A check is due at the third step; its first letter or its second stays on its way.
    machine.decode(steps=2)
    machine.mail.num_let_through = num_let_through
    machine.decode(steps=1)
    assert runtime.mailbox.num_letters >= 1
    assert runtime.drift.events == (2 if num_let_through else 0)
    machine.end(which=0)
    machine.admit(prompt_len=9, chunk=9)
    assert list(machine.live) == [1]
    held = [positions.copy() for positions in runtime.kept_positions(1)]
    reference = runtime.drift.reference[1].clone()
    machine.mail.is_held = False
    # Of the new request no check is due at its first step.
    machine.decode(steps=1)
    assert runtime.mailbox.num_letters == 0
    assert runtime._retrieval.is_idle
    assert torch.equal(runtime.drift.reference[1], reference)
    for positions, expected in zip(runtime.kept_positions(1), held, strict=True):
        assert positions.tolist() == expected.tolist()
    machine.pools_agree()
    machine.teardown()


def test_what_is_made_outside_of_inference_mode_serves_inside_and_back() -> None:
    # SGLang builds backends in normal mode and runs its loop in inference mode.
    machine = CapturedMachine()
    machine.begin("async", ("budget", "int8", 4), 2)
    with torch.inference_mode():
        drive(machine, 4, 15)
    drive(machine, 5, 15)
    machine.teardown()


def test_late_mail_of_a_running_request_moves_its_rows() -> None:
    machine = CapturedMachine()
    machine.begin("async", ("budget", "model", 1), 1)
    machine.admit(prompt_len=40, chunk=40)
    machine.mail.is_held = True
    machine.decode(steps=5)
    assert machine.runtime.state()["rows_installed"] == 0
    machine.mail.is_held = False
    machine.decode(steps=2)
    assert machine.runtime.state()["rows_installed"] > 0
    machine.teardown()


def test_a_replay_that_serves_nobody_writes_nothing(machine: CapturedMachine) -> None:
    machine.admit(prompt_len=9, chunk=9)
    before = [pool.clone() for pool in machine.pools()]
    nobody = torch.zeros(0, dtype=torch.int64)
    machine.runner.replay(nobody, nobody, nobody, list)
    for pool, untouched in zip(machine.pools(), before, strict=True):
        assert torch.equal(pool.view(torch.uint8), untouched.view(torch.uint8))
