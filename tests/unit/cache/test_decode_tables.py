"""Static tables: addresses stay, padding is masked, every size shares one storage."""

from __future__ import annotations

import pytest
import torch

from hetero_sglang.cache.decode_tables import DecodeTables

MAX = 6


def addresses(tables: DecodeTables) -> list[int]:
    return [t.data_ptr() for t in (tables.rows, tables.seq_lens, tables.token_ids, tables.num_real)]


@pytest.mark.parametrize("size", range(1, MAX + 1))
@pytest.mark.parametrize("num_real", [0, 1, 3, MAX])
def test_what_is_staged_is_the_batch_and_the_rest_is_padding(size: int, num_real: int) -> None:
    tables = DecodeTables(MAX, "cpu")
    before = addresses(tables)
    num_real = min(num_real, size)
    rows, lens = torch.arange(1, size + 1), torch.arange(10, size + 10)
    ids = torch.arange(50, size + 50)
    tables.set_num_real(num_real)
    batch = tables.stage(rows, lens, ids)
    assert batch is tables.batch(size)
    assert batch.size == size
    assert batch.rows.tolist() == rows[:num_real].tolist() + [-1] * (size - num_real)
    assert batch.seq_lens.tolist() == lens[:num_real].tolist() + [0] * (size - num_real)
    assert batch.token_ids.tolist() == ids[:num_real].tolist() + [0] * (size - num_real)
    assert addresses(tables) == before
    assert batch.rows.data_ptr() == tables.rows.data_ptr()


def test_the_padding_row_is_padding_wherever_it_is() -> None:
    tables = DecodeTables(MAX, "cpu")
    tables.set_num_real(3)
    batch = tables.stage(
        torch.tensor([2, 0, 1], dtype=torch.int32), torch.tensor([5, 1, 7]), torch.tensor([8, 0, 9])
    )
    assert batch.rows.tolist() == [2, -1, 1]
    assert batch.seq_lens.tolist() == [5, 0, 7]
    assert batch.token_ids.tolist() == [8, 0, 9]


def test_a_smaller_batch_leaves_nothing_of_a_larger_one_in_itself() -> None:
    tables = DecodeTables(MAX, "cpu")
    tables.set_num_real(MAX)
    tables.stage(*(torch.arange(1, MAX + 1) for _ in range(3)))
    tables.set_num_real(1)
    batch = tables.stage(torch.tensor([4, 0]), torch.tensor([9, 1]), torch.tensor([3, 0]))
    assert batch.rows.tolist() == [4, -1]
    tables.reset()
    assert tables.rows.tolist() == [-1] * MAX
    assert tables.seq_lens.tolist() == [0] * MAX
    assert tables.num_real.tolist() == [0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        DecodeTables(0, "cpu")
    tables = DecodeTables(2, "cpu")
    for size in (0, 3):
        with pytest.raises(ValueError, match=rf"1 to 2 requests, got {size}"):
            tables.batch(size)
    for count in (-1, 3):
        with pytest.raises(ValueError, match=rf"0 \.\. 2, got {count}"):
            tables.set_num_real(count)
