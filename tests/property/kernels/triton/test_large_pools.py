"""Pools of more than 2^31 elements: no offset is 32 bits wide on its way to an address.

The pools are mapped, not written: a test touches the few pages that it names.
"""

from __future__ import annotations

import mmap

import pytest
import torch

from hetero_kernels import (
    DecodeBatch,
    DecodeLayer,
    LayerTensors,
    QuantizedKeys,
    extend_attention,
    gather_rows,
    install_rows,
    quantize_keys,
    scatter_rows,
    score_positions,
    triton_support,
)

pytestmark = pytest.mark.skipif(
    not triton_support.is_installed() or not triton_support.is_interpreted(),
    reason="needs Triton's interpreter",
)

D = 16
NUM_ROWS = 2**31 // D + 1000
# Rows on both sides of 2^31 elements, and of 2^30, where a product of two offsets would turn too.
ROWS = torch.tensor([3, 2**30 // D + 1, NUM_ROWS - 600, NUM_ROWS - 1, NUM_ROWS - 77])


def mapped(*shape, dtype=torch.float16):
    """Memory that is there once it is written; zeros elsewhere."""
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def rows(count=5, seed=0):
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)).half()


def test_movers_reach_the_last_rows():
    pool, small = mapped(NUM_ROWS, D), rows()
    scatter_rows(small, ROWS, pool, impl="triton")
    assert torch.equal(pool[ROWS], small)
    assert torch.equal(gather_rows(pool, ROWS, impl="triton"), small)


def test_installed_rows_reach_the_last_blocks():
    k_blocks, v_blocks = (mapped(NUM_ROWS // 8, 8, D) for _ in range(2))
    source = torch.cat([rows(seed=1), rows(seed=2)], dim=1)
    install_rows(source, ROWS, k_blocks=k_blocks, v_blocks=v_blocks, impl="triton")
    for pool, seed in ((k_blocks, 1), (v_blocks, 2)):
        assert torch.equal(pool.view(-1, D)[ROWS], rows(seed=seed))


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_keys_reach_the_last_slots(bits):
    head_dim = 32
    num_slots = 2**31 // (head_dim * bits // 8) + 1000
    slots = torch.tensor([3, num_slots - 1, num_slots - 900])
    pool = QuantizedKeys(
        mapped(1, num_slots, head_dim * bits // 8, dtype=torch.int8 if bits == 8 else torch.uint8),
        mapped(1, num_slots, 1, dtype=torch.bfloat16),
    )
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 3, head_dim, generator=generator)
    quantize_keys(keys, pool, slice(0, 1), slots, impl="triton")
    torch.testing.assert_close(pool.dequantize(0, slots), keys[0], rtol=0, atol=0.3)
    q = torch.randn(1, 2, head_dim, generator=generator)
    expected = score_positions(q, pool, 0.2, slots=slots.int(), impl="reference")
    actual = score_positions(q, pool, 0.2, slots=slots.int(), impl="triton")
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=1e-12)


@pytest.mark.parametrize("is_wide", [True, False])
def test_scores_and_chunks_read_the_last_slots_and_planes(is_wide):
    # One plane of many slots, or two planes that lie 2^31 elements apart.
    memory = mapped(NUM_ROWS, D)
    slots = ROWS if is_wide else torch.arange(5)
    pool = memory[None] if is_wide else memory.as_strided((2, 10, D), (2**31, D, 1))[1:]
    keys = rows()
    pool[0, slots] = keys
    # The plane before is another's.
    pool = pool if is_wide else memory.as_strided((2, 10, D), (2**31, D, 1))
    planes = torch.tensor([pool.shape[0] - 1], dtype=torch.int32)
    q = rows(2, seed=3)[None]
    scores = score_positions(q, pool, 0.2, planes=planes, slots=slots.int(), impl="triton")
    expected = score_positions(q, keys[None], 0.2, impl="reference")
    torch.testing.assert_close(scores, expected, rtol=5e-5, atol=1e-12)
    queries = rows(5 * len(pool), seed=4).view(5, len(pool), D)
    arguments = {"prefix_len": 0, "scale": 0.2}
    out = extend_attention(queries, pool, pool, **arguments, slots=slots.int(), impl="triton")
    expected = extend_attention(queries[:, -1:], keys[None], keys[None], **arguments)
    torch.testing.assert_close(out[:, -1:], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("is_resident", [True, False])
def test_a_decode_step_writes_and_reads_the_last_rows(is_resident):
    large, small = (mapped(1, NUM_ROWS, D), mapped(1, NUM_ROWS, D)), rows(1, seed=9)[None]
    places = ROWS.int()
    layer = LayerTensors(
        k_resident=large[0] if is_resident else small,
        v_resident=large[1] if is_resident else small,
        k_blocks=(small if is_resident else large[0]).transpose(0, 1),
        v_blocks=(small if is_resident else large[1]).transpose(0, 1),
        block_table=places[None, None],
        kept_lens=torch.tensor([[4]], dtype=torch.int32),
        prompt_lens=torch.tensor([4], dtype=torch.int32),
        head_map=torch.tensor([0 if is_resident else -1], dtype=torch.int32),
        scale=0.2,
        group_size=1,
        req_to_token=places[None],
    )
    keys, values = rows(seed=5), rows(seed=6)
    for pool, part in zip(large, (keys, values), strict=True):
        pool[0, ROWS[:4]] = part[:4]
    batch = DecodeBatch(torch.tensor([0]), torch.tensor([5]), ROWS[4:])
    launcher = DecodeLayer(layer, impl="triton")
    launcher.append(keys[4:, None], values[4:, None], None, batch)
    assert torch.equal(large[0][0, ROWS[4]], keys[4])
    q = rows(1, seed=7)[None]
    out = launcher.attend(q, torch.empty_like(q), batch)
    weights = torch.softmax(keys.float() @ q[0, 0].float() * 0.2, dim=0)
    torch.testing.assert_close(out[0, 0].float(), weights @ values.float(), rtol=0, atol=2e-3)
