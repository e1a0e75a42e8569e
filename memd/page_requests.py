"""What clients do with their pages: reserve, commit, fetch, release, freeze, thaw.

The verbs change books at once. What needs pages in memory that are not, or a slot for a device, is
a request that waits (`memd.turns`).
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING

import numpy as np

from memd.copying import CopyJob
from memd.fetches import Fetch as PinnedFetch
from memd.protocol import (
    Commit,
    CommitReply,
    ErrorCode,
    Fetch,
    Freeze,
    FreezeReply,
    Release,
    ReleaseReply,
    Reply,
    Reserve,
    ReserveReply,
    Thaw,
    ThawReply,
)
from memd.refusals import Refused
from memd.store import ClientRecord, OutOfRange, PageState
from memd.tiers import Progress
from memd.turns import Wait

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from memd.answers import Answers
    from memd.fetches import Fetches
    from memd.sessions import Client
    from memd.tiers import ClientTier

__all__ = ["PageRequests", "Steps"]

Steps = Generator[Wait, None, "Reply | None"]
"""A request that waits; None when somebody else will answer it."""


class PageRequests:
    """Handles the requests of registered clients that are about pages.

    Args:
        fetches: All fetches.
        answers: Where replies of fetches go.
        require_few: Raises for a connection and client id with too many requests in flight.
        note_news: Called when pages have changed that others may wait for.
    """

    def __init__(
        self,
        fetches: Fetches,
        answers: Answers,
        *,
        require_few: Callable[[bytes, int], None],
        note_news: Callable[[], None],
    ) -> None:
        self._fetches = fetches
        self._answers = answers
        self._require_few = require_few
        self._note_news = note_news

    def reserve(self, connection: bytes, client: Client, request: Reserve) -> Reply | Steps:
        """Give free pages, all or none; above a disk once they have memory."""
        del connection
        record, tier = client.record, client.tier
        if tier is not None:
            return self._reserve_in_memory(record, tier, request)
        page_ids = record.pages.reserve(request.num_pages)
        return _reserved(request, record, page_ids)

    def _reserve_in_memory(self, record: ClientRecord, tier: ClientTier, request: Reserve) -> Steps:
        page_ids = record.pages.reserve(request.num_pages)
        if page_ids is None:
            return _reserved(request, record, None)
        tier.pages.reserve(page_ids)
        if not (yield from self._bring(record, tier, page_ids)):
            tier.mover.release(record.pages.release(page_ids))
            page_ids = None
        return _reserved(request, record, page_ids)

    def _bring(
        self, record: ClientRecord, tier: ClientTier, page_ids: npt.NDArray[np.int64]
    ) -> Generator[Wait, None, bool]:
        """Wait until reserved or pinned pages are in memory; False if there is no room."""
        while True:
            progress = tier.mover.bring(page_ids)
            if progress is Progress.DONE:
                return True
            if progress is Progress.STUCK and not self._fetches.is_reading(record.client_id):
                return False
            yield Wait.TURN if progress is Progress.MOVED else Wait.EVENT

    def commit(self, connection: bytes, client: Client, request: Commit) -> Reply:
        """Seal reserved pages."""
        del connection
        record, tier = client.record, client.tier
        # First the book that is stricter, so that both change or none.
        if tier is not None:
            tier.pages.commit(request.page_ids)
        record.pages.commit(request.page_ids)
        return CommitReply(request_id=request.request_id)

    def fetch(self, connection: bytes, client: Client, request: Fetch) -> Reply | Steps | None:
        """Copy rows to the landing ring, at once or in turn with others."""
        record, tier, ring = client.record, client.tier, client.ring
        if ring is not None:
            ring.require_open()
        job, page_ids = self._read_fetch(client, request)
        if tier is None and ring is None and self._fetches.copy_now(job):
            return self._answers.fetched(request.request_id, job)
        # Before anything is pinned.
        self._require_few(connection, record.client_id)
        fetch = PinnedFetch(
            connection,
            request.request_id,
            record,
            tier,
            job,
            page_ids,
            ring,
            ring_offset=request.landing_row * record.layout.row_bytes,
        )
        fetch.pin()
        if tier is not None or ring is not None:
            return self._fetch_in_steps(fetch)
        self._fetches.submit(fetch)
        return None

    def _fetch_in_steps(self, fetch: PinnedFetch) -> Steps:
        """Bring a pinned fetch's pages to memory, get it a slot, and have it copied."""
        tier, ring = fetch.tier, fetch.ring
        if tier is not None:
            # Here and not before: what waits behind others must not keep its pages in memory.
            fetch.hold()
        is_handed_over = False
        try:
            if tier is not None:
                yield from self._bring_for(fetch, tier)
            if ring is not None:
                ring.require_open()
                while not self._fetches.stage(fetch):
                    yield Wait.EVENT
                    ring.require_open()
            if not self._fetches.copy_now(fetch.job):
                self._fetches.submit(fetch)
                is_handed_over = True
                return None
            if ring is None:
                return self._answers.fetched(fetch.request_id, fetch.job)
            is_handed_over = True
            for ended in self._fetches.send(fetch):
                self._answers.put_fetch(ended)
            return None
        finally:
            if not is_handed_over:
                fetch.unpin()
                self._fetches.unstage(fetch)

    def _bring_for(self, fetch: PinnedFetch, tier: ClientTier) -> Generator[Wait, None, None]:
        """Bring the pages of a fetch to memory."""
        if not (yield from self._bring(fetch.record, tier, fetch.page_ids)):
            raise _no_room("the fetch", fetch.page_ids, tier)
        lost = tier.pages.lost_among(fetch.page_ids)
        if lost.size:
            raise Refused(
                ErrorCode.PAGE_LOST,
                f"page {int(lost[0])} did not come back from disk as it went"
                + (f", and {lost.size - 1} more did not" if lost.size > 1 else "")
                + "; release it and compute it again",
            )

    def _read_fetch(self, client: Client, request: Fetch) -> tuple[CopyJob, npt.NDArray[np.int64]]:
        """What a fetch asks for, checked, and the pages that it reads, each once."""
        record = client.record
        layout, num_pages = record.layout, record.pages.num_pages
        width = layout.row_index_bytes(num_pages)
        num_rows, rest = divmod(len(request.rows), width)
        if rest:
            raise Refused(
                ErrorCode.MALFORMED,
                f"rows must hold {width}-byte indices, got {len(request.rows)} bytes",
            )
        if request.landing_row + num_rows > client.landing_rows:
            raise OutOfRange(
                f"rows {request.landing_row}..+{num_rows} leave the landing ring of "
                f"{client.landing_rows} rows"
            )
        raw = np.frombuffer(request.rows, dtype=f"<u{width}")
        if num_rows and int(raw.max()) >= num_pages * layout.rows_per_page:
            raise OutOfRange(
                f"rows are 0..{num_pages * layout.rows_per_page - 1}, got {int(raw.max())}"
            )
        # In the indices' own width: as int64 it would take as long as copying the rows. Sorting
        # so many would cost more than copying them.
        is_read = np.zeros(num_pages, dtype=np.bool_)
        is_read[raw // raw.dtype.type(layout.rows_per_page)] = True
        page_ids = np.flatnonzero(is_read)
        record.pages.require_readable(page_ids)
        # With a ring on a device it is the slot that says where they go first.
        landing = record.extent_offset + record.landing_offset
        job = CopyJob(
            client_id=record.client_id,
            source_offset=record.extent_offset,
            row_bytes=layout.row_bytes,
            rows=raw.astype(np.int64),
            landing_offset=landing + request.landing_row * layout.row_bytes,
        )
        return job, page_ids

    def release(self, connection: bytes, client: Client, request: Release) -> Reply:
        """Free pages; those that fetches still read are free when they are over."""
        del connection
        record, tier = client.record, client.tier
        freed = record.pages.release(request.page_ids)
        if tier is not None:
            tier.mover.release(freed)
            self._note_news()
        return ReleaseReply(request_id=request.request_id)

    def freeze(self, connection: bytes, client: Client, request: Freeze) -> Reply:
        """Note that pages are not written, and may go to disk."""
        del connection
        record, tier = client.record, client.tier
        if request.depths and len(request.depths) != len(request.page_ids):
            raise OutOfRange(
                f"depths are none or one for each of {len(request.page_ids)} pages, got "
                f"{len(request.depths)}"
            )
        record.pages.freeze(request.page_ids)
        if tier is not None:
            tier.pages.freeze(request.page_ids, request.depths or None)
            self._note_news()
        return FreezeReply(request_id=request.request_id)

    def thaw(self, connection: bytes, client: Client, request: Thaw) -> Reply | Steps:
        """Let pages be written again, once they are in memory."""
        record, tier = client.record, client.tier
        if tier is None:
            record.pages.thaw(request.page_ids)
            return ThawReply(request_id=request.request_id)
        page_ids = record.pages.require_frozen(request.page_ids)
        self._require_few(connection, record.client_id)
        record.pages.pin(page_ids)
        return self._thaw_in_memory(record, tier, page_ids, request)

    def _thaw_in_memory(
        self,
        record: ClientRecord,
        tier: ClientTier,
        page_ids: npt.NDArray[np.int64],
        request: Thaw,
    ) -> Steps:
        """Bring pinned pages to memory, and let the client write them."""
        tier.pages.pin(page_ids)
        try:
            if not (yield from self._bring(record, tier, page_ids)):
                raise _no_room("the thaw", page_ids, tier)
            # Released meanwhile, they are not to be thawed any more.
            record.pages.thaw(page_ids)
            tier.pages.thaw(page_ids)
            lost = tier.pages.lost_among(page_ids)
        finally:
            tier.pages.unpin(page_ids)
            tier.mover.release(record.pages.unpin(page_ids))
        return ThawReply(request_id=request.request_id, lost=lost.tolist())


def _no_room(what: str, page_ids: npt.NDArray[np.int64], tier: ClientTier) -> Refused:
    return Refused(
        ErrorCode.NO_ROOM,
        f"{what} needs {page_ids.size} pages in memory at a time, and of the "
        f"{tier.pages.host_pages} that may be there too few can leave; name fewer pages, freeze "
        "more, or ask for more host pages (a full or failing disk takes none: `memd status`)",
    )


def _reserved(
    request: Reserve, record: ClientRecord, page_ids: npt.NDArray[np.int64] | None
) -> ReserveReply:
    return ReserveReply(
        request_id=request.request_id,
        page_ids=None if page_ids is None else page_ids.tolist(),
        free_pages=record.pages.count(PageState.FREE),
    )
