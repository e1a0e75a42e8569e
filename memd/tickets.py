"""Tickets: one request of a client whose answer is awaited. Only ``memd.client`` completes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["FetchTicket", "ReserveTicket", "ThawTicket", "Ticket"]


class Ticket:
    """One request whose answer is awaited.

    Attributes:
        is_done: Whether the outcome is known.
        error: Why it failed, None while it is open or when it succeeded.
    """

    __slots__ = ("error", "is_done")

    def __init__(self) -> None:
        self.is_done = False
        self.error: str | None = None


class ReserveTicket(Ticket):
    """A request for pages.

    Attributes:
        num_pages: Pages asked for.
        page_ids: The pages, int64 [num_pages], ascending; None while open, and when the pool is
            full or memd is lost.
    """

    __slots__ = ("is_cancelled", "num_pages", "page_ids")

    def __init__(self, num_pages: int) -> None:
        super().__init__()
        self.num_pages = num_pages
        self.page_ids: npt.NDArray[np.int64] | None = None
        self.is_cancelled = False


class FetchTicket(Ticket):
    """A gather in flight; hand it to ``finish`` in any case, done or not.

    Attributes:
        num_rows: Rows asked for.
        landing_start: First landing row; the rows lie at ``landing[landing_start:][:num_rows]``.
        is_finished: Whether ``finish`` was called.
    """

    __slots__ = ("is_finished", "landing_start", "num_rows")

    def __init__(self, num_rows: int, landing_start: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.landing_start = landing_start
        self.is_finished = False


class ThawTicket(Ticket):
    """A wish to write frozen pages again.

    Attributes:
        page_ids: Which, int64 [n].
        lost: Those whose bytes did not come back from disk, int64; None before that is known.
    """

    __slots__ = ("lost", "page_ids")

    def __init__(self, page_ids: npt.NDArray[np.int64]) -> None:
        super().__init__()
        self.page_ids = page_ids
        self.lost: npt.NDArray[np.int64] | None = None
