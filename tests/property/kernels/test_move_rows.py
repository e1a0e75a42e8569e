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


def some_index(count, limit, *, unique, has_padding=True):
    """Row numbers below a limit, some of them padding."""
    index = torch.randperm(limit)[:count] if unique else torch.randint(0, limit, (count,))
    if has_padding:
        index[::7] = -1
    return index


@pytest.mark.parametrize("name", implementations())
@given(
    num_rows=st.sampled_from([1, 63, 65]),
    count=st.sampled_from([0, 1, 64, 1000]),
    width=st.sampled_from([1, 5, 64, 256]),
    dtype=st.sampled_from(DTYPES),
)
def test_gather_copies_the_named_rows(name, num_rows, count, width, dtype):
    source = table(num_rows, width, dtype)
    index = some_index(count, num_rows, unique=False, has_padding=name != "torch")
    expected, actual = table(count, width, dtype, 1), table(count, width, dtype, 1)
    gather_rows(source, index, out=expected, impl="reference")
    with using(name) as impl:
        gather_rows(source, index, out=actual, impl=impl)
    assert torch.equal(bits(actual), bits(expected))


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
    index = some_index(count, num_rows, unique=True, has_padding=name != "torch")
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
    with using(name) as impl:
        install_rows(rows, index, **arguments, impl=impl)
    back = [gather_rows(pool.flatten(0, 1), index) for pool in (k_blocks, v_blocks)]
    assert torch.equal(bits(torch.cat(back, dim=1)), bits(rows))
    assert torch.equal(held.flatten()[index], positions)
    assert int((held >= 0).sum()) == 20


def test_nothing_is_installed_of_what_does_not_fit_whole():
    pool = torch.zeros(2, 2, 16)
    source, index = torch.ones(1, 32), torch.tensor([0])
    with pytest.raises(ValueError, match=r"v_blocks must be torch\.float32, got torch\.bfloat16"):
        install_rows(source, index, k_blocks=pool, v_blocks=pool.bfloat16())
    with pytest.raises(ValueError, match="of source must be contiguous"):
        install_rows(torch.ones(32, 2).T[:1], index, k_blocks=pool, v_blocks=pool.clone())
    with pytest.raises(ValueError, match="v_blocks must be on cpu like source, got meta"):
        install_rows(source, index, k_blocks=pool, v_blocks=pool.to("meta"))
    assert torch.equal(pool, torch.zeros_like(pool))


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
