"""The engine's side of memd: which logical tokens have rows in which pages.

A page of memd holds ``page_tokens`` logical token ids for all compressed heads, so a
token id alone names its row: page ``id // page_tokens``, offset ``id % page_tokens``.
Pages are given out by memd when the first request needs them and go back with the last
one. Two prompts may share a page: rows of the later one are written into a page that is
sealed already. That is safe, because memd reads only rows that a fetch names, and no fetch
names a row before its prompt is stored. This module never waits for memd on the decode path.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hetero_sglang.errors import ResidencyError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from memd.client import FetchTicket, MemdClient, ReserveTicket

_ABSENT = -1
_PENDING = -2


@dataclass
class _Reservation:
    ticket: ReserveTicket
    logical_pages: NDArray[np.int64]


class HostStore:
    """Pages of memd by logical token id.

    Owned by the runtime's thread. After memd is lost (``is_available`` False) every call
    is harmless: nothing is stored, nothing is fetched.

    Attributes:
        client: Connection to memd.
        stored_bytes: Bytes copied to memd so far.
    """

    def __init__(
        self,
        client: MemdClient,
        *,
        num_slots: int,
        num_heads: int,
        head_dim: int,
        page_tokens: int,
        dtype: torch.dtype,
    ) -> None:
        """Wraps a connected client.

        Args:
            client: Connected client whose layout has these heads, dim, dtype and page size.
            num_slots: Token ids that SGLang may use.
            num_heads: Compressed heads of the model.
            head_dim: Head dimension.
            page_tokens: Token ids of one page.
            dtype: Element type of K and V.
        """
        self.client = client
        self.stored_bytes = 0
        self._page_tokens = page_tokens
        self._num_heads = num_heads
        num_logical = -(-num_slots // page_tokens)
        self._page_of = np.full(num_logical, _ABSENT, dtype=np.int64)
        self._references = np.zeros(num_logical, dtype=np.int64)
        self._is_committed = np.zeros(num_logical, dtype=np.bool_)
        self._held: dict[int, NDArray[np.int64]] = {}
        self._token_ids: dict[int, NDArray[np.int64]] = {}
        self._reservations: list[_Reservation] = []
        # [pages, heads, page_tokens, K|V, head_dim], the shared memory itself.
        self._pages = (
            torch.from_numpy(client.pages)
            .view(dtype)
            .view(client.num_pages, num_heads, page_tokens, 2, head_dim)
        )
        self._landing = torch.from_numpy(client.landing).view(dtype).view(-1, 2, head_dim)
        self.row_bytes = 2 * head_dim * self._pages.element_size()

    @property
    def is_available(self) -> bool:
        """Whether memd answers."""
        return self.client.is_alive

    @property
    def num_pages_used(self) -> int:
        """Logical pages that hold or await a page of memd."""
        return int((self._page_of != _ABSENT).sum())

    def has(self, row: int) -> bool:
        """Whether the row's compressed heads are stored, so that they can be fetched."""
        return row in self._token_ids

    def reserve(self, row: int, token_ids: NDArray[np.int64]) -> None:
        """Asks memd for the pages that these token ids need; returns at once.

        Args:
            row: Row of the request table; may be called again with more ids of the prompt.
            token_ids: Logical token ids, int64 [n].
        """
        if not self.is_available:
            return
        wanted = np.unique(token_ids // self._page_tokens)
        held = self._held.get(row)
        if held is not None:
            wanted = np.setdiff1d(wanted, held, assume_unique=True)
        self._held[row] = wanted if held is None else np.union1d(held, wanted)
        self._references[wanted] += 1
        absent = wanted[self._page_of[wanted] == _ABSENT]
        if len(absent):
            self._page_of[absent] = _PENDING
            self._reservations.append(_Reservation(self.client.reserve(len(absent)), absent))

    def poll(self) -> None:
        """Takes memd's answers; never blocks."""
        self.client.poll()
        if self._reservations:
            self._settle()

    def wait_reserved(self, row: int, timeout_s: float) -> bool:
        """Waits, bounded, until the row's pages are there; used at the end of a prefill.

        Args:
            row: Row of the request table.
            timeout_s: Longest wait in all, seconds.

        Returns:
            Whether every page of the row is assigned.
        """
        held = self._held.get(row)
        if held is None:
            return False
        self.poll()
        deadline = time.monotonic() + timeout_s
        for reservation in list(self._reservations):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not np.any(self._page_of[held] == _PENDING):
                break
            self.client.wait(reservation.ticket, remaining)
            self._settle()
        return bool(np.all(self._page_of[held] >= 0))

    def store(
        self, row: int, token_ids: NDArray[np.int64], k: torch.Tensor, v: torch.Tensor
    ) -> bool:
        """Copies a prompt's compressed heads into memd and seals the pages.

        Args:
            row: Row whose pages were reserved.
            token_ids: Logical token id of each position, int64 [num_tokens].
            k: Keys, [num_heads, num_tokens, head_dim].
            v: Values, same shape.

        Returns:
            False when the pages are not all there; nothing is stored then.
        """
        held = self._held.get(row)
        if held is None or not self.is_available or np.any(self._page_of[held] < 0):
            return False
        pages = self._page_of[token_ids // self._page_tokens]
        offsets = token_ids % self._page_tokens
        # Token ids mostly ascend by one: copy runs inside a page, not rows.
        breaks = np.flatnonzero((np.diff(token_ids) != 1) | (np.diff(pages) != 0)) + 1
        starts = np.concatenate([[0], breaks])
        ends = np.concatenate([breaks, [len(token_ids)]])
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            offset = int(offsets[start])
            target = self._pages[int(pages[start]), :, offset : offset + end - start]
            target[:, :, 0].copy_(k[:, start:end])
            target[:, :, 1].copy_(v[:, start:end])
        fresh = held[~self._is_committed[held]]
        if len(fresh):
            self._is_committed[fresh] = True
            self.client.commit(self._page_of[fresh])
        self._token_ids[row] = token_ids
        self.stored_bytes += len(token_ids) * self._num_heads * self.row_bytes
        return True

    def row_indices(self, row: int, head: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """memd's flat row indices of prompt positions of one head.

        Args:
            row: A stored row.
            head: Compressed head id.
            positions: Prompt positions, int64 [n].

        Returns:
            int64 [n]: ``(page * num_heads + head) * page_tokens + offset``.
        """
        ids = self._token_ids[row][positions]
        pages = self._page_of[ids // self._page_tokens]
        return np.asarray(
            (pages * self._num_heads + head) * self._page_tokens + ids % self._page_tokens
        )

    def fetch(self, rows: NDArray[np.int64]) -> FetchTicket | None:
        """Starts one fetch; None when the landing ring has no room or memd is lost."""
        return self.client.fetch(rows) if self.is_available else None

    def landed(self, ticket: FetchTicket) -> torch.Tensor:
        """Rows of a finished fetch, [num_rows, 2, head_dim], valid until ``client.finish``."""
        return self._landing[ticket.landing_start : ticket.landing_start + ticket.num_rows]

    def free_row(self, row: int) -> None:
        """Gives back what the row held; pages that nobody else holds return to memd."""
        self._token_ids.pop(row, None)
        held = self._held.pop(row, None)
        if held is None:
            return
        self._references[held] -= 1
        idle = held[(self._references[held] == 0) & (self._page_of[held] >= 0)]
        self._release(idle)

    def check_integrity(self) -> None:
        """Raises ResidencyError when references, pages and holders disagree.

        Looks at this side only and never waits: memd reports its own side with its stats, and
        ``client.check_integrity`` compares both.
        """
        counted = np.zeros_like(self._references)
        for held in self._held.values():
            counted[held] += 1
        if not np.array_equal(counted, self._references):
            raise ResidencyError("host store: reference counts differ from the holders")
        pages = self._page_of[self._page_of >= 0]
        if len(np.unique(pages)) != len(pages):
            raise ResidencyError("host store: a memd page has two owners")
        if np.any((self._page_of >= 0) & (self._references == 0)):
            raise ResidencyError("host store: a page is held by nobody")

    def _settle(self) -> None:
        waiting: list[_Reservation] = []
        for reservation in self._reservations:
            if not reservation.ticket.is_done and self.is_available:
                waiting.append(reservation)
                continue
            logical = reservation.logical_pages
            page_ids = reservation.ticket.page_ids if self.is_available else None
            if page_ids is None:
                self._page_of[logical] = _ABSENT
                continue
            self._page_of[logical] = page_ids
            self._release(logical[self._references[logical] == 0])
        self._reservations = waiting

    def _release(self, logical: NDArray[np.int64]) -> None:
        if not len(logical):
            return
        self.client.release(self._page_of[logical])
        self._page_of[logical] = _ABSENT
        self._is_committed[logical] = False
