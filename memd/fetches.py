"""Fetches from the moment their pages are in memory until their rows have landed; no messages here.

A fetch that is alone and fits one turn is copied at once. Others wait in the ``CopyQueue``, and the
pages they read are pinned meanwhile.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from typing import TYPE_CHECKING, NamedTuple

from memd.copying import CopyJob, CopyQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    import numpy.typing as npt

    from memd.copying import Delay
    from memd.store import ClientRecord
    from memd.tiers import ClientTier
    from memd.transfer import Transfer

__all__ = ["Ended", "Fetch", "Fetches"]

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Fetch:
    """A fetch that was accepted.

    Attributes:
        connection: Who is to be answered.
        request_id: Of the request.
        record: Whose pages are read.
        tier: Of the same client; None if all its pages are in memory.
        job: The copying.
        page_ids: Pages that it reads, each once.
        begun_ns: When it was asked for, by the performance counter.
    """

    connection: bytes
    request_id: int
    record: ClientRecord
    tier: ClientTier | None
    job: CopyJob
    page_ids: npt.NDArray[np.int64]
    begun_ns: int = dataclasses.field(default_factory=time.perf_counter_ns)

    def pin(self) -> None:
        """Keep the pages from being anybody else's."""
        self.record.pages.pin(self.page_ids)

    def hold(self) -> None:
        """Keep the pages in memory, too, or have them come back there."""
        assert self.tier is not None, "without a disk all pages are in memory"
        self.tier.pages.pin(self.page_ids)
        self.tier.pages.touch(self.page_ids)

    def unpin(self) -> None:
        """Take ``pin`` and ``hold`` back, and free pages that were released meanwhile."""
        if self.tier is not None:
            self.tier.pages.unpin(self.page_ids)
        freed = self.record.pages.unpin(self.page_ids)
        if self.tier is not None and freed.size:
            self.tier.mover.release(freed)


class Ended(NamedTuple):
    """A fetch that is over.

    Attributes:
        fetch: It; its pages are not pinned by it any more.
        is_copied: Whether its rows have landed.
    """

    fetch: Fetch
    is_copied: bool


class Fetches:
    """All fetches that are being copied or held back.

    Args:
        transfer: Does the copying.
        delay: Interconnect to imitate; by default none.
        clock: Monotonic seconds.
    """

    def __init__(
        self, transfer: Transfer, *, delay: Delay | None, clock: Callable[[], float]
    ) -> None:
        self._copies = CopyQueue(transfer, delay=delay, clock=clock)
        self._of_job: dict[CopyJob, Fetch] = {}

    @property
    def has_work(self) -> bool:
        """Whether something is to be copied now."""
        return not self._copies.is_idle

    def next_due(self) -> float | None:
        """When a fetch that is held back will be over, seconds of the clock; None if none is."""
        return self._copies.next_due()

    def num_of(self, client_id: int) -> int:
        """A client's fetches that are not over."""
        return self._copies.num_jobs_of(client_id)

    def pending_bytes(self, client_id: int) -> int:
        """Bytes of a client's fetches that are still to be copied."""
        return self._copies.pending_bytes(client_id)

    def copy_now(self, job: CopyJob) -> bool:
        """Copy the rows of a fetch if it waits for nobody; whether it did."""
        if not self._copies.is_immediate(job):
            return False
        self._copies.copy_now(job)
        return True

    def submit(self, fetch: Fetch) -> None:
        """Have a fetch copied in its turn; it is unpinned at its end, and was pinned before."""
        self._of_job[fetch.job] = fetch
        self._copies.submit(fetch.job)

    def step(self) -> list[Ended]:
        """Copy for one client's turn; what is over now."""
        ended = []
        try:
            self._copies.step()
        except Exception:
            job = self._copies.drop_current()
            _LOG.exception("copying for client %d failed", job.client_id)
            ended.append(Ended(self._of_job.pop(job), is_copied=False))
        ended += [
            Ended(self._of_job.pop(job), is_copied=True) for job in self._copies.take_finished()
        ]
        for end in ended:
            end.fetch.unpin()
        return ended

    def cancel(self, client_id: int) -> list[Fetch]:
        """Forget a client's fetches, in their order; none of its rows is written after this."""
        return [self._of_job.pop(job) for job in self._copies.cancel(client_id)]

    def check_integrity(self) -> None:
        """Verify the queue.

        Raises:
            IntegrityError: It does not hold.
        """
        self._copies.check_integrity()
