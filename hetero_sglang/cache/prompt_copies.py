"""Prompts' rows on their way into memd's pages.

From CPU tensors rows are copied where they lie, and a copy is done when it has begun. From a device
only whole pieces of memory can be copied without the processor's help: pages are put together in
scratch memory on the device and copied one by one. A page that another prompt has rows in, or may
soon have, is not overwritten: it goes to a buffer of its own, from which the host picks this
prompt's rows once they are there. Not yet run on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from hetero_sglang.cache.transfers import PASSED, Event, Transfers, to_device

if TYPE_CHECKING:
    from numpy.typing import NDArray

SCRATCH_BYTES = 64 * 2**20
"""Most device memory in which pages are put together, unless a single page is larger."""


@dataclass(frozen=True)
class PromptRows:
    """Which rows of memd a prompt's tokens have.

    Attributes:
        pages: Page of memd of each position, int64 [num_tokens].
        offsets: Token row within the page, int64 [num_tokens].
        is_shared: Whether others hold the page too, bool [num_tokens].
    """

    pages: NDArray[np.int64]
    offsets: NDArray[np.int64]
    is_shared: NDArray[np.bool_]


class PromptCopy(Protocol):
    """A prompt's rows on their way.

    Attributes:
        event: Passed when the source is not read any more and the pages are not written any more by
            the device.
    """

    event: Event

    def finish(self) -> None:
        """What is left for the host once ``event`` is passed; the rows are in their pages then."""


class PromptWriter(Protocol):
    """Begins copies into pages."""

    def begin(self, rows: PromptRows, k: torch.Tensor, v: torch.Tensor) -> PromptCopy:
        """Begins to copy a prompt.

        Args:
            rows: Where to.
            k: Keys, [num_heads, num_tokens, head_dim]; unchanged until the copy's event is passed.
            v: Values, same shape.
        """


class _Done:
    event = PASSED

    def finish(self) -> None:
        return


class DirectWriter:
    """Copies rows from CPU tensors."""

    def __init__(self, pages: torch.Tensor) -> None:
        """Looks at memd's pages.

        Args:
            pages: [pages, num_heads, page_tokens, 2, head_dim], the shared memory itself.
        """
        self._pages = pages

    def begin(self, rows: PromptRows, k: torch.Tensor, v: torch.Tensor) -> PromptCopy:
        """Copies at once."""
        pages, offsets = rows.pages, rows.offsets
        # Token ids mostly ascend by one: copy runs inside a page, not rows.
        breaks = np.flatnonzero((np.diff(offsets) != 1) | (np.diff(pages) != 0)) + 1
        starts = np.concatenate([[0], breaks])
        ends = np.concatenate([breaks, [len(pages)]])
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            offset = int(offsets[start])
            target = self._pages[int(pages[start]), :, offset : offset + end - start]
            target[:, :, 0].copy_(k[:, start:end])
            target[:, :, 1].copy_(v[:, start:end])
        return _Done()


@dataclass(frozen=True)
class _Pick:
    """Rows of one page that the host takes out of the buffer.

    Attributes:
        page: Page of memd.
        offsets: Its rows that are this prompt's, int64 [n].
    """

    page: int
    offsets: torch.Tensor


class _PackedCopy:
    def __init__(
        self, event: Event, pages: torch.Tensor, buffer: torch.Tensor, picks: list[_Pick]
    ) -> None:
        self.event = event
        self._pages, self._buffer, self._picks = pages, buffer, picks

    def finish(self) -> None:
        for pick, held in zip(self._picks, self._buffer, strict=True):
            self._pages[pick.page].index_copy_(1, pick.offsets, held.index_select(1, pick.offsets))


class PackedWriter:
    """Copies whole pages from a device."""

    def __init__(
        self, pages: torch.Tensor, transfers: Transfers, *, scratch_bytes: int = SCRATCH_BYTES
    ) -> None:
        """Allocates the scratch memory.

        Args:
            pages: [pages, num_heads, page_tokens, 2, head_dim], the shared memory itself,
                page-locked where ``transfers`` are of a GPU.
            transfers: Begins the copies.
            scratch_bytes: Most device memory for pages that are being put together.
        """
        self._pages = pages
        self._transfers = transfers
        at_a_time = num_scratch_pages(pages[0].nbytes, scratch_bytes)
        self._scratch = torch.empty(
            (at_a_time, *pages.shape[1:]), dtype=pages.dtype, device=transfers.device
        )

    def begin(self, rows: PromptRows, k: torch.Tensor, v: torch.Tensor) -> PromptCopy:
        """Asks the device for the copies; waits for nothing."""
        pages, first, which = np.unique(rows.pages, return_index=True, return_inverse=True)
        page_tokens = self._pages.shape[2]
        # Position of each row of each page; rows that are not this prompt's get any.
        source = np.full((len(pages), page_tokens), -1, dtype=np.int64)
        source[which, rows.offsets] = np.arange(len(rows.pages))
        shared = np.flatnonzero(rows.is_shared[first])
        buffer = self._transfers.host_buffer(
            (len(shared), *self._pages.shape[1:]), self._pages.dtype
        )
        targets = [self._pages[page] for page in pages.tolist()]
        picks: list[_Pick] = []
        for place, index in enumerate(shared.tolist()):
            targets[index] = buffer[place]
            offsets = torch.from_numpy(np.flatnonzero(source[index] >= 0))
            picks.append(_Pick(int(pages[index]), offsets))
        copy = partial(self._copy, np.maximum(source, 0), targets, k, v)
        return _PackedCopy(self._transfers.begin(copy), self._pages, buffer, picks)

    def _copy(
        self,
        source: NDArray[np.int64],
        targets: list[torch.Tensor],
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> None:
        positions = to_device(source, self._transfers.device)
        at_a_time = len(self._scratch)
        # One stream: a page in the scratch memory is overwritten when it has been copied.
        for begin in range(0, len(targets), at_a_time):
            end = min(begin + at_a_time, len(targets))
            packed = self._scratch[: end - begin]
            index = positions[begin:end].flatten()
            for side, rows in enumerate((k, v)):
                by_page = rows.index_select(1, index).view(
                    len(rows), end - begin, -1, rows.shape[2]
                )
                packed[:, :, :, side].copy_(by_page.transpose(0, 1))
            for page, target in zip(packed, targets[begin:end], strict=True):
                target.copy_(page, non_blocking=True)


def num_scratch_pages(page_bytes: int, scratch_bytes: int = SCRATCH_BYTES) -> int:
    """Pages that ``PackedWriter`` puts together at a time."""
    return max(1, scratch_bytes // page_bytes)
