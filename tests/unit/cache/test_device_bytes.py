"""What is counted for a device is what is allocated there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hetero_kernels.triton_support import num_programs
from hetero_sglang.cache.device_bytes import POSITION_BYTES, DeviceTables, transfer_bytes
from hetero_sglang.cache.sizing import SizingRule
from tests.captured_machine import CapturedMachine, tensors_held
from tests.held_transfers import HeldTransfers
from tests.property.cache import test_runtime as eager

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def bytes_of(*owners: object) -> int:
    seen: dict[int, object] = {}
    for owner in owners:
        tensors_held(owner, seen)
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor, address in seen.values()
        if address is not None
    }
    return sum(storages.values())


@pytest.mark.parametrize("retrieval", ["async", "off"])
def test_tables_scratch_and_drift_state_are_counted(retrieval: str) -> None:
    machine = CapturedMachine()
    machine.transfers = HeldTransfers()
    machine.begin(retrieval, ("budget", "int8", 4), 0)
    runtime = machine.runtime
    held = DeviceTables(
        num_rows=eager.ROWS,
        table_tokens=eager.CONTEXT,
        num_kv_heads=eager.HEADS,
        num_compressed=machine.tables.num_compressed,
        num_pivots=machine.tables.num_pivots if retrieval != "off" else 0,
        group_size=eager.GROUP,
        head_dim=eager.DIM,
        item_bytes=4,
        block_tokens=runtime.blocks.block_tokens,
        drift_interval=runtime.config.drift_interval,
        num_programs=num_programs(torch.device("cpu")),
    )
    mirror = runtime.mirror
    assert held.mirror_bytes == bytes_of(mirror.block_table, mirror.kept_lens, mirror.prompt_lens)
    assert held.batch_bytes == bytes_of(runtime.decode_tables)
    workspace = vars(runtime._workspace).values()
    assert held.workspace_bytes == bytes_of(
        [tensor for tensor in workspace if isinstance(tensor, torch.Tensor)]
    )
    assert held.drift_bytes == bytes_of(runtime.drift.pivot_queries, runtime.drift.reference)
    # Scores of all rows while they are checked: of each query, and the newest one's again.
    width = eager.CONTEXT * eager.ROWS * held.num_pivots * 4
    assert held.drift_scratch_bytes == width * (runtime.config.drift_interval + 1)
    assert held.total_bytes > held.drift_scratch_bytes + held.drift_bytes
    blocks = runtime.blocks
    assert blocks.positions.nbytes == blocks.num_blocks * blocks.block_tokens * POSITION_BYTES
    if retrieval != "off":
        assert transfer_bytes(
            num_compressed=machine.tables.num_compressed,
            row_bytes=machine.store.row_bytes,
            page_tokens=machine.store._page_tokens,
            landing_rows=len(machine.memd.landing),
        ) == bytes_of(machine.store._writer._scratch, machine.store._landing._ring)
    machine.teardown()


def test_pages_larger_than_the_scratch_are_put_together_one_by_one() -> None:
    page_bytes = 200 * 2**20
    row_bytes = page_bytes // (64 * 100)
    assert (
        transfer_bytes(num_compressed=100, row_bytes=row_bytes, page_tokens=64, landing_rows=2)
        == 2 * row_bytes + 64 * 100 * row_bytes
    )


def test_a_device_has_room_for_them_beside_the_tokens() -> None:
    on_host = SizingRule(0.5, 32, 58, 512, 32, 8192)
    on_device = replace(on_host, position_bytes=POSITION_BYTES, device_bytes=10_000)
    assert on_device.fixed_bytes() == on_host.fixed_bytes() + 10_000
    more = on_device.bytes_per_token - on_host.bytes_per_token
    assert more == pytest.approx(on_host.block_rows_per_token * POSITION_BYTES, abs=1)
    # The areas themselves are the same for the same tokens.
    assert on_device.shape_for(50_000) == on_host.shape_for(50_000)
