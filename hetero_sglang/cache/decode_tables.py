"""The batch of a decode step at addresses that never change.

A CUDA graph replays its launches on the addresses that it was captured with. So the step's rows,
lengths and token slots are copied into buffers that live as long as the graphs do, and padding is
marked there as the kernels define it (row -1, length 0). How many entries are real is read from
device memory, because a graph's Python does not run again. Not yet run on a GPU.

Knows nothing of who calls when: ``set_num_real`` is for between the steps, ``stage`` may be
captured.
"""

from __future__ import annotations

import torch

from hetero_kernels import DecodeBatch


class DecodeTables:
    """Static buffers of one decode batch.

    Entries at and after ``num_real`` are padding, and so is every entry whose row is 0: SGLang
    never gives row 0 of its request table to a request.

    Attributes:
        max_reqs: Most requests of a batch.
        rows: Row of each request, -1 for padding, int64 [max_reqs].
        seq_lens: Tokens of each request, the new one included, 0 for padding, int64 [max_reqs].
        token_ids: Token slot of the new token, 0 for padding, int64 [max_reqs].
        num_real: Requests that are not padding, int64 [1].
    """

    def __init__(self, max_reqs: int, device: torch.device | str) -> None:
        """Allocates the buffers; everything is padding.

        Args:
            max_reqs: Most requests of a batch.
            device: Device of the pools.

        Raises:
            ValueError: ``max_reqs`` is below 1.
        """
        if max_reqs < 1:
            raise ValueError(f"max_reqs must be at least 1, got {max_reqs}")
        self.max_reqs = max_reqs
        self.rows = torch.full((max_reqs,), -1, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(max_reqs, dtype=torch.int64, device=device)
        self.token_ids = torch.zeros(max_reqs, dtype=torch.int64, device=device)
        self.num_real = torch.zeros(1, dtype=torch.int64, device=device)
        self._index = torch.arange(max_reqs, dtype=torch.int64, device=device)
        self._is_padding = torch.ones(max_reqs, dtype=torch.bool, device=device)
        self._is_row_padding = torch.ones(max_reqs, dtype=torch.bool, device=device)
        self._batches: dict[int, DecodeBatch] = {}

    def batch(self, size: int) -> DecodeBatch:
        """The first ``size`` entries as a batch; the same object for the same size.

        Raises:
            ValueError: ``size`` is not in 1 .. ``max_reqs``.
        """
        found = self._batches.get(size)
        if found is None:
            if not 1 <= size <= self.max_reqs:
                raise ValueError(f"a batch must have 1 to {self.max_reqs} requests, got {size}")
            found = DecodeBatch(self.rows[:size], self.seq_lens[:size], self.token_ids[:size])
            self._batches[size] = found
        return found

    def set_num_real(self, num_real: int) -> None:
        """Says how many entries of the next step are real; host work, never captured."""
        if not 0 <= num_real <= self.max_reqs:
            raise ValueError(f"num_real must be in 0 .. {self.max_reqs}, got {num_real}")
        self.num_real.fill_(num_real)

    def stage(
        self, rows: torch.Tensor, seq_lens: torch.Tensor, token_ids: torch.Tensor
    ) -> DecodeBatch:
        """Copies a step's batch in and masks its padding; may be captured, waits for nothing.

        A captured call reads its arguments' addresses again at each replay.

        Args:
            rows: Rows of the batch, padding included, integers [size].
            seq_lens: Tokens of each row, integers [size].
            token_ids: Token slot of each new token, integers [size].

        Returns:
            ``batch(size)``, whose contents are now these.
        """
        batch = self.batch(rows.shape[0])
        assert batch.token_ids is not None
        size = batch.size
        is_padding, is_row_padding = self._is_padding[:size], self._is_row_padding[:size]
        batch.rows.copy_(rows)
        batch.seq_lens.copy_(seq_lens)
        batch.token_ids.copy_(token_ids)
        torch.ge(self._index[:size], self.num_real, out=is_padding)
        torch.le(batch.rows, 0, out=is_row_padding)
        is_padding.logical_or_(is_row_padding)
        batch.rows.masked_fill_(is_padding, -1)
        batch.seq_lens.masked_fill_(is_padding, 0)
        batch.token_ids.masked_fill_(is_padding, 0)
        return batch

    def reset(self) -> None:
        """Makes everything padding again; addresses stay."""
        self.rows.fill_(-1)
        self.seq_lens.zero_()
        self.token_ids.zero_()
        self.num_real.zero_()
