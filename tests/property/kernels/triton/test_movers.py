"""The row movers in Triton: exact bits, nothing else touched, padding skipped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hetero_kernels import gather_rows, install_rows, scatter_rows
from tests.property.kernels.test_move_rows import DTYPES, bits, some_index, table

few = settings(max_examples=20, suppress_health_check=list(HealthCheck))


@few
@given(
    num_rows=st.sampled_from([1, 63, 65]),
    count=st.sampled_from([0, 1, 64, 1000]),
    width=st.sampled_from([1, 5, 64, 1500]),
    dtype=st.sampled_from(DTYPES),
)
def test_gather_copies_the_named_rows(device, num_rows, count, width, dtype):
    source, index = table(num_rows, width, dtype), some_index(count, num_rows, unique=False)
    expected, actual = table(count, width, dtype, 1), table(count, width, dtype, 1).to(device)
    gather_rows(source, index, out=expected, impl="reference")
    gather_rows(source.to(device), index.to(device), out=actual, impl="triton")
    assert torch.equal(bits(actual.cpu()), bits(expected))


@few
@given(
    num_rows=st.sampled_from([1, 63, 64, 1000]),
    width=st.sampled_from([1, 5, 64, 1500]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_scatter_writes_the_named_rows_only(device, num_rows, width, dtype, data):
    count = data.draw(st.integers(0, num_rows))
    source, index = table(count, width, dtype), some_index(count, num_rows, unique=True)
    expected, actual = table(num_rows, width, dtype, 1), table(num_rows, width, dtype, 1).to(device)
    scatter_rows(source, index, expected, impl="reference")
    scatter_rows(source.to(device), index.to(device), actual, impl="triton")
    assert torch.equal(bits(actual.cpu()), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 80, 128])
@pytest.mark.parametrize("has_positions", [True, False])
def test_installed_rows_lie_where_the_reference_puts_them(device, dtype, head_dim, has_positions):
    rows = table(40, 2 * head_dim, dtype)
    index = some_index(40, 64, unique=True)
    results = []
    for impl, where in (("reference", "cpu"), ("triton", device)):
        pools = {
            "k_blocks": table(64, head_dim, dtype, 1).view(16, 4, head_dim).to(where),
            "v_blocks": table(64, head_dim, dtype, 2).view(16, 4, head_dim).to(where),
        }
        if has_positions:
            pools["block_positions"] = torch.full((16, 4), -7, dtype=torch.int32, device=where)
        positions = torch.arange(100, 140, dtype=torch.int32, device=where)
        install_rows(
            rows.to(where),
            index.to(where),
            **pools,
            positions=positions if has_positions else None,
            impl=impl,
        )
        results.append({name: bits(pool.cpu()) for name, pool in pools.items()})
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_what_an_installation_would_misread_is_refused(device):
    blocks = torch.zeros(4, 4, 16, device=device)
    good = {
        "source": torch.zeros(6, 32, device=device),
        "index": torch.arange(6, device=device),
        "k_blocks": blocks,
        "v_blocks": blocks.clone(),
        "block_positions": torch.zeros(4, 4, dtype=torch.int32, device=device),
        "positions": torch.arange(6, dtype=torch.int32, device=device),
    }
    every_other = torch.arange(12, device=device)[::2]
    for name, bad, message in (
        ("index", every_other, "index must be contiguous"),
        ("index", good["index"].int(), "index must be torch.int64"),
        ("positions", every_other.int().repeat(2)[::2], "positions must be contiguous"),
        ("positions", good["positions"][:5], r"positions must have shape \[6\]"),
        ("block_positions", good["block_positions"].T, "block_positions must be contiguous"),
        ("block_positions", good["block_positions"].float(), "block_positions must be torch.int32"),
    ):
        for impl in ("triton", "torch"):
            with pytest.raises(ValueError, match=message):
                install_rows(**{**good, name: bad}, impl=impl)


def test_a_replay_moves_what_the_index_names_now(device, replay):
    source = torch.randn(30, 8, device=device)
    index = torch.zeros(12, dtype=torch.int64, device=device)
    out = torch.zeros(12, 8, device=device)
    again = replay(lambda: gather_rows(source, index, out=out, impl="triton"))
    for count in (12, 5, 0):
        index.copy_(torch.randperm(30)[:12])
        index[count:] = -1
        out.zero_()
        again()
        assert torch.equal(out[:count], source[index[:count]])
        assert torch.equal(out[count:], torch.zeros_like(out[count:]))
