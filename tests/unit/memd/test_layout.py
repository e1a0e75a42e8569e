from __future__ import annotations

import pytest

from memd.protocol import DTYPE_BYTES, KVLayout


@pytest.mark.parametrize(("dtype", "itemsize"), DTYPE_BYTES.items())
def test_sizes_follow_from_the_layout(dtype: str, itemsize: int) -> None:
    layout = KVLayout(num_heads=5, head_dim=64, dtype=dtype, page_tokens=16)
    assert layout.row_bytes == 2 * 64 * itemsize
    assert layout.rows_per_page == 80
    assert layout.page_bytes == 80 * layout.row_bytes
    assert layout.bytes_per_token == 5 * layout.row_bytes


def test_row_indices_are_wide_only_when_they_must_be() -> None:
    layout = KVLayout(num_heads=1 << 10, head_dim=1, dtype="float16", page_tokens=1 << 10)
    assert layout.row_index_bytes(1) == 4
    assert layout.row_index_bytes(1 << 12) == 4
    assert layout.row_index_bytes((1 << 12) + 1) == 8


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_heads", 0),
        ("head_dim", -1),
        ("page_tokens", 0),
        ("page_tokens", 1 << 20),
        ("dtype", "float64"),
    ],
)
def test_an_impossible_layout_is_refused_by_name(field: str, value: object) -> None:
    good = {"num_heads": 1, "head_dim": 1, "dtype": "float16", "page_tokens": 1}
    with pytest.raises(ValueError, match=field):
        KVLayout(**{**good, field: value})


def test_layouts_compare_by_value() -> None:
    layout = KVLayout(num_heads=1, head_dim=2, dtype="float16", page_tokens=3)
    assert layout == KVLayout(num_heads=1, head_dim=2, dtype="float16", page_tokens=3)
    assert len({layout, KVLayout(num_heads=1, head_dim=2, dtype="float32", page_tokens=3)}) == 2
