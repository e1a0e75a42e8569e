"""``Hello``: what a client may have, and how it gets it.

Clean memory may have to be made first, memory put behind a new extent, or a ring mapped on a
device: so a ``Hello`` may wait (`memd.turns`), and nobody else does meanwhile. What was begun for
one that comes to nothing is taken back.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from memd.errors import PoolFull
from memd.protocol import PROTOCOL_VERSION, ErrorCode, Hello, HelloReply
from memd.refusals import MAX_MESSAGE_CHARS, Refused, printable
from memd.scrubbing import SLICE_BYTES
from memd.sessions import Client
from memd.tiers import BLOCK_BYTES
from memd.turns import Wait

if TYPE_CHECKING:
    from collections.abc import Generator

    from memd.rings import ClientRing, Rings
    from memd.scrubbing import Scrubber
    from memd.sessions import Session
    from memd.store import ClientRecord, Store
    from memd.tiers import Tiers

__all__ = ["MAX_PAGES_PER_CLIENT", "Greeter"]

_LOG = logging.getLogger(__name__)

MAX_PAGES_PER_CLIENT = 1 << 22
"""So that a look at all of them takes milliseconds; pages of 1 MiB would be 4 TiB."""


class Greeter:
    """Gives new clients what they ask for.

    Args:
        store: Bookkeeping of the region.
        scrubber: Makes memory clean that was given back.
        tiers: The disk below the region's memory; None if there is none.
        rings: Landing rings on devices; None if clients may have none.
        max_client_bytes: Most memory of one client; 0 means the region's size.
        max_frame_bytes: Longest request that is read; clients are told.
    """

    def __init__(
        self,
        store: Store,
        scrubber: Scrubber,
        *,
        tiers: Tiers | None,
        rings: Rings | None,
        max_client_bytes: int,
        max_frame_bytes: int,
    ) -> None:
        self._store = store
        self._scrubber = scrubber
        self._tiers = tiers
        self._rings = rings
        self._max_client_bytes = max_client_bytes
        self._max_frame_bytes = max_frame_bytes

    def greet(self, session: Session, request: Hello) -> Generator[Wait, None, Client]:
        """Get a client its extent, and its ring if it has one.

        Raises:
            Refused: It asks for what no client may have.
            PoolFull: There is not so much.
            RingRefused: memd cannot map its ring.
            DeviceLost: The ring's device was given up.
        """
        ring = self._read_ring(request)
        host_pages = self._host_pages(request)
        landing_rows = self._check(request, host_pages)
        record = yield from self._register(session, request, host_pages, landing_rows)
        if ring is not None:
            yield from self._open_ring(record, ring)
        tier = None
        if self._tiers is not None and host_pages < request.num_pages:
            tier = self._tiers.attach(record)
        client = Client(record, tier, ring)
        _LOG.info(
            "client %d (pid %d, %s): %d pages of %d bytes, %d of them in memory, %d landing rows "
            "(%s)",
            record.client_id,
            record.pid,
            record.name or "no name",
            request.num_pages,
            request.layout.page_bytes,
            record.host_pages,
            client.landing_rows,
            client.data_path,
            extra=client.log_fields,
        )
        return client

    def reply(self, request: Hello, client: Client) -> HelloReply:
        """What the client is told."""
        record, layout = client.record, request.layout
        return HelloReply(
            request_id=request.request_id,
            version=PROTOCOL_VERSION,
            client_id=record.client_id,
            extent_offset=record.extent_offset,
            extent_bytes=record.extent_bytes,
            landing_offset=record.landing_offset,
            landing_rows=client.landing_rows,
            row_bytes=layout.row_bytes,
            page_bytes=layout.page_bytes,
            row_index_bytes=layout.row_index_bytes(request.num_pages),
            max_frame_bytes=self._max_frame_bytes,
            host_pages=record.host_pages,
            data_path=client.data_path,
        )

    def _check(self, request: Hello, host_pages: int) -> int:
        """Hold a ``Hello`` against what any client may have; its landing rows in host memory."""
        layout = request.layout
        landing_rows, rest = divmod(request.landing_bytes, layout.row_bytes)
        if rest:
            raise Refused(
                ErrorCode.OUT_OF_RANGE,
                f"landing_bytes must be a multiple of row_bytes ({layout.row_bytes}), "
                f"got {request.landing_bytes}",
            )
        if request.num_pages > MAX_PAGES_PER_CLIENT:
            raise Refused(
                ErrorCode.QUOTA,
                f"a client may have {MAX_PAGES_PER_CLIENT} pages, got {request.num_pages}; choose "
                f"larger page_tokens",
            )
        wanted = layout.page_bytes * host_pages + request.landing_bytes
        if self._max_client_bytes and wanted > self._max_client_bytes:
            fits = max(0, self._max_client_bytes - request.landing_bytes) // layout.page_bytes
            raise Refused(
                ErrorCode.QUOTA,
                f"a client may have {self._max_client_bytes} bytes, {host_pages} pages and "
                f"the landing ring are {wanted}; {fits} pages would fit",
            )
        return landing_rows

    def _read_ring(self, request: Hello) -> ClientRing | None:
        """The ring that a ``Hello`` names, checked; None if it names none."""
        if request.ring is None:
            return None
        if self._rings is None:
            raise Refused(
                ErrorCode.DEVICE_REFUSED,
                "this memd copies to no device: start it with --cuda-staging-bytes, at least the "
                "bytes of the longest landing ring, or connect without a ring",
            )
        if request.landing_bytes:
            raise Refused(
                ErrorCode.OUT_OF_RANGE,
                f"landing_bytes must be 0 with a ring, which is in its place, got "
                f"{request.landing_bytes}",
            )
        return self._rings.read(request.ring, request.layout.row_bytes)

    def _open_ring(self, record: ClientRecord, ring: ClientRing) -> Generator[Wait, None, None]:
        """Map a new client's ring; the extent goes back if that is not to be."""
        assert self._rings is not None, "they have read the ring"
        is_open = False
        try:
            yield from self._rings.open(record.client_id, ring, self._scrubber.scrub)
            is_open = True
        finally:
            if not is_open:
                self._store.unregister(record.client_id)

    def _host_pages(self, request: Hello) -> int:
        """How many of a client's pages may be in memory at a time."""
        wanted = request.host_pages or request.num_pages
        if self._tiers is None or wanted >= request.num_pages:
            return request.num_pages
        if not self._tiers.can_hold(request.layout.page_bytes):
            raise Refused(
                ErrorCode.OUT_OF_RANGE,
                f"pages that go to disk have a multiple of {BLOCK_BYTES} bytes, got "
                f"{request.layout.page_bytes}; choose other page_tokens, or leave host_pages out",
            )
        return wanted

    def _register(
        self, session: Session, request: Hello, host_pages: int, landing_rows: int
    ) -> Generator[Wait, None, ClientRecord]:
        """Carve an extent, once there is clean memory for it."""
        slot_bytes = 0
        if self._tiers is not None:
            slot_bytes = self._tiers.slot_bytes(request.layout.page_bytes)
        while True:
            try:
                record = self._store.register(
                    pid=session.pid,
                    name=printable(request.name, MAX_MESSAGE_CHARS),
                    layout=request.layout,
                    num_pages=request.num_pages,
                    landing_rows=landing_rows,
                    host_pages=host_pages,
                    slot_bytes=slot_bytes,
                )
                break
            except PoolFull:
                # Memory of a client that just left may only wait to be zeroed.
                if not self._store.could_register(request.layout, request.num_pages, landing_rows):
                    raise
                self._scrubber.scrub(SLICE_BYTES)
                yield Wait.TURN
        is_whole = False
        try:
            yield from self._fill(record)
            is_whole = True
        finally:
            if not is_whole:
                self._store.unregister(record.client_id)
        return record

    def _fill(self, record: ClientRecord) -> Generator[Wait, None, None]:
        """Put memory behind what never leaves it, where the region does not come with some."""
        if self._tiers is None:
            return
        begin = record.extent_offset
        end = begin + record.extent_bytes
        if record.host_pages < record.pages.num_pages:
            begin += record.landing_offset
        while begin < end:
            length = min(SLICE_BYTES, end - begin)
            if not self._tiers.fill(begin, length):
                raise PoolFull(
                    f"the host has no memory for {record.memory_bytes} bytes any more, though memd "
                    "was promised it; give memd a smaller --bytes, or the host fewer programs"
                )
            begin += length
            yield Wait.TURN
