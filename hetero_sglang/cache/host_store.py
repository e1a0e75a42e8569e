"""The engine's side of memd: which logical tokens have rows in which pages.

A page of memd holds ``page_tokens`` logical token ids for all compressed heads, so a
token id alone names its row: page ``id // page_tokens``, offset ``id % page_tokens``.
Pages are given out by memd when the first request needs them and go back with the last
one. Two prompts may share a page: rows of the later one are written into a page that is
sealed already. That is safe, because memd reads only rows that a fetch names, and no fetch
names a row before its prompt is stored. This module never waits for memd on the decode path.

Rows of a prompt may take a while to get from the device into its pages. Until they are there the
pages are not sealed, nothing is fetched from them, and they stay the prompt's even when its request
has ended.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hetero_sglang.cache.landing import DeviceLanding, HostLanding, Landed, Landing
from hetero_sglang.cache.prompt_copies import DirectWriter, PackedWriter, PromptRows, PromptWriter
from hetero_sglang.errors import ResidencyError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from hetero_sglang.cache.prompt_copies import PromptCopy
    from hetero_sglang.cache.transfers import Transfers
    from memd.client import FetchTicket, MemdClient, ReserveTicket

_ABSENT = -1
_PENDING = -2


@dataclass
class _Reservation:
    ticket: ReserveTicket
    logical_pages: NDArray[np.int64]


@dataclass
class _Storing:
    """A prompt whose rows are on their way into its pages.

    ``row`` is None once its request has ended; the pages go back when they are not written to.
    """

    row: int | None
    held: NDArray[np.int64]
    copy: PromptCopy
    on_done: Callable[[], None]
    num_tokens: int


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
        transfers: Transfers | None = None,
    ) -> None:
        """Wraps a connected client.

        Args:
            client: Connected client whose layout has these heads, dim, dtype and page size.
            num_slots: Token ids that SGLang may use.
            num_heads: Compressed heads of the model.
            head_dim: Head dimension.
            page_tokens: Token ids of one page.
            dtype: Element type of K and V.
            transfers: Begins copies between the pools' device and memd's memory; None where the
                pools are CPU tensors, from and to which rows are copied at once.
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
        self._storing: deque[_Storing] = deque()
        # [pages, heads, page_tokens, K|V, head_dim], the shared memory itself.
        pages = (
            torch.from_numpy(client.pages)
            .view(dtype)
            .view(client.num_pages, num_heads, page_tokens, 2, head_dim)
        )
        ring = torch.from_numpy(client.landing).view(dtype).view(-1, 2, head_dim)
        self._writer: PromptWriter
        self._landing: Landing
        if transfers is None:
            self._writer, self._landing = DirectWriter(pages), HostLanding(ring)
        else:
            self._writer, self._landing = (
                PackedWriter(pages, transfers),
                DeviceLanding(ring, transfers),
            )
        self.row_bytes = 2 * head_dim * pages.element_size()

    @property
    def is_available(self) -> bool:
        """Whether memd answers."""
        return self.client.is_alive

    @property
    def num_pages_used(self) -> int:
        """Logical pages that hold or await a page of memd."""
        return int((self._page_of != _ABSENT).sum())

    def has(self, row: int) -> bool:
        """Whether the row's compressed heads are stored, or on their way."""
        return row in self._token_ids

    def is_ready(self, row: int) -> bool:
        """Whether the row's compressed heads are stored, so that they can be fetched."""
        return row in self._token_ids and all(storing.row != row for storing in self._storing)

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
        """Takes memd's answers and seals prompts that have arrived; never blocks."""
        self.client.poll()
        self._settle_copies()
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
        self,
        row: int,
        token_ids: NDArray[np.int64],
        k: torch.Tensor,
        v: torch.Tensor,
        on_done: Callable[[], None],
    ) -> bool:
        """Begins to copy a prompt's compressed heads into memd; seals the pages when it is done.

        Args:
            row: Row whose pages were reserved.
            token_ids: Logical token id of each position, int64 [num_tokens].
            k: Keys, [num_heads, num_tokens, head_dim].
            v: Values, same shape.
            on_done: Called once when ``k`` and ``v`` are not read any more: before this returns
                where they are CPU tensors, else by a later ``poll``.

        Returns:
            False when the pages are not all there; nothing is stored and called then.
        """
        held = self._held.get(row)
        if held is None or not self.is_available or np.any(self._page_of[held] < 0):
            return False
        logical = token_ids // self._page_tokens
        rows = PromptRows(
            pages=self._page_of[logical],
            offsets=token_ids % self._page_tokens,
            is_shared=self._references[logical] > 1,
        )
        copy = self._writer.begin(rows, k, v)
        self._token_ids[row] = token_ids
        self._storing.append(_Storing(row, held, copy, on_done, len(token_ids)))
        self._settle_copies()
        return True

    def wait_stored(self) -> None:
        """Waits until all prompts are in their pages (``sync`` retrieval)."""
        if self._storing:
            self._storing[-1].copy.event.synchronize()
            self._settle_copies()

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

    def land(self, ticket: FetchTicket) -> Landed:
        """Begins to bring a finished fetch's rows to the pools' device.

        The ticket is finished (``client.finish``) when the result's event is passed and the rows
        are installed, not before.
        """
        return self._landing.begin(ticket)

    def free_row(self, row: int) -> None:
        """Gives back what the row held; pages that nobody else holds return to memd.

        Pages that are still being written to follow when that is done.
        """
        self._token_ids.pop(row, None)
        held = self._held.pop(row, None)
        if held is None:
            return
        for storing in self._storing:
            if storing.row == row:
                storing.row = None
                return
        self._give_back(held)

    def _give_back(self, held: NDArray[np.int64]) -> None:
        self._references[held] -= 1
        idle = held[(self._references[held] == 0) & (self._page_of[held] >= 0)]
        self._release(idle)

    def check_integrity(self) -> None:
        """Raises ResidencyError when references, pages and holders disagree.

        Looks at this side only and never waits: memd reports its own side with its stats, and
        ``client.check_integrity`` compares both.
        """
        counted = np.zeros_like(self._references)
        ended = [storing.held for storing in self._storing if storing.row is None]
        for held in [*self._held.values(), *ended]:
            counted[held] += 1
        if not np.array_equal(counted, self._references):
            raise ResidencyError("host store: reference counts differ from the holders")
        pages = self._page_of[self._page_of >= 0]
        if len(np.unique(pages)) != len(pages):
            raise ResidencyError("host store: a memd page has two owners")
        if np.any((self._page_of >= 0) & (self._references == 0)):
            raise ResidencyError("host store: a page is held by nobody")

    def _settle_copies(self) -> None:
        # In the order in which they were begun: the later of two prompts that share a page has the
        # last word on what both wrote.
        while self._storing and self._storing[0].copy.event.query():
            storing = self._storing.popleft()
            storing.on_done()
            if storing.row is None:
                self._give_back(storing.held)
                continue
            storing.copy.finish()
            fresh = storing.held[~self._is_committed[storing.held]]
            if len(fresh) and self.is_available:
                self._is_committed[fresh] = True
                self.client.commit(self._page_of[fresh])
            self.stored_bytes += storing.num_tokens * self._num_heads * self.row_bytes

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
