"""The row movers: exact bits, nothing else touched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_kernels import gather_rows, install_rows, scatter_rows
from hetero_kernels.testing import implementations, using

DTYPES = [torch.uint8, torch.float32, torch.bfloat16, torch.float16, torch.int32]


def table(num_rows, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    # Random bytes: any bit pattern must survive, NaN included.
    size = torch.empty(0, dtype=dtype).element_size()
    data = torch.randint(0, 256, (num_rows, width * size), dtype=torch.uint8, generator=generator)
    return data.view(dtype)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", implementations())
@given(
    num_rows=st.sampled_from([1, 63, 65]),
    count=st.sampled_from([0, 1, 64, 1000]),
    width=st.sampled_from([1, 5, 64, 256]),
    dtype=st.sampled_from(DTYPES),
)
def test_gather_copies_the_named_rows(name, num_rows, count, width, dtype):
    source = table(num_rows, width, dtype)
    index = torch.randint(0, num_rows, (count,))
    expected = gather_rows(source, index, impl="reference")
    with using(name) as impl:
        assert torch.equal(bits(gather_rows(source, index, impl=impl)), bits(expected))


@pytest.mark.parametrize("name", implementations())
@given(
    num_rows=st.sampled_from([1, 63, 1000]),
    width=st.sampled_from([1, 5, 64, 256]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_scatter_writes_the_named_rows_only(name, num_rows, width, dtype, data):
    count = data.draw(st.integers(0, num_rows))
    source = table(count, width, dtype)
    index = torch.randperm(num_rows)[:count]
    expected, actual = table(num_rows, width, dtype, 1), table(num_rows, width, dtype, 1)
    scatter_rows(source, index, expected, impl="reference")
    with using(name) as impl:
        scatter_rows(source, index, actual, impl=impl)
    assert torch.equal(bits(actual), bits(expected))


@pytest.mark.parametrize("name", [*implementations(), "reference"])
def test_what_was_installed_is_gathered_again(name):
    rows = table(20, 2 * 16, torch.float32)
    k_blocks, v_blocks = torch.zeros(8, 4, 16), torch.zeros(8, 4, 16)
    held = torch.full((8, 4), -1, dtype=torch.int32)
    index = torch.randperm(32)[:20]
    positions = torch.arange(100, 120, dtype=torch.int32)
    arguments = {
        "k_blocks": k_blocks,
        "v_blocks": v_blocks,
        "block_positions": held,
        "positions": positions,
    }
    if name == "reference":
        install_rows(rows, index, **arguments, impl="reference")
    else:
        with using(name) as impl:
            install_rows(rows, index, **arguments, impl=impl)
    back = [gather_rows(pool.flatten(0, 1), index) for pool in (k_blocks, v_blocks)]
    assert torch.equal(bits(torch.cat(back, dim=1)), bits(rows))
    assert torch.equal(held.flatten()[index], positions)
    assert int((held >= 0).sum()) == 20


def test_positions_without_a_place_for_them_are_refused():
    pool = torch.zeros(2, 2, 16)
    with pytest.raises(ValueError, match="go together"):
        install_rows(
            torch.zeros(1, 32),
            torch.tensor([0]),
            k_blocks=pool,
            v_blocks=pool.clone(),
            positions=torch.tensor([1], dtype=torch.int32),
        )
