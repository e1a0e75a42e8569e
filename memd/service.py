"""Messages to actions: every request of every client, without a socket in sight.

The server hands in frames and gets exactly one reply frame for each: at once, or from a later
`step` for a request that waits. A fetch waits while others are copied (`memd.fetches`), a ``Hello``
while memory is zeroed for it or a ring mapped, a ``Goodbye`` while one is unmapped, and with pages
on disk whatever needs them in memory (`memd.turns`). Sessions tie a ZeroMQ connection to a process:
the server opens one when a process attaches and closes it when that process is gone, and a
``Hello`` must name an open session. So from the first byte of a client's memory on, somebody
watches it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from memd.copying import CopyJob
from memd.cuda.errors import DeviceLost, RingRefused
from memd.errors import IntegrityError, PoolFull
from memd.fetches import Ended, FetchEnd, Fetches
from memd.fetches import Fetch as PinnedFetch
from memd.lifecycle import DaemonState
from memd.metrics import Metrics
from memd.protocol import (
    PROTOCOL_VERSION,
    REQUEST_TYPES,
    SESSION_BYTES,
    Commit,
    CommitReply,
    ErrorCode,
    Fetch,
    FetchReply,
    Freeze,
    FreezeReply,
    Goodbye,
    GoodbyeReply,
    Hello,
    HelloReply,
    Ping,
    Pong,
    Release,
    ReleaseReply,
    Reply,
    Request,
    Reserve,
    ReserveReply,
    Stats,
    StatsReply,
    Thaw,
    ThawReply,
    decode_request,
    encode,
)
from memd.refusals import MAX_MESSAGE_CHARS, Refusals, Refused, printable
from memd.rings import RingPhase
from memd.store import ClientRecord, OutOfRange, PageState, Store
from memd.tiers import BLOCK_BYTES, Progress, tier_stats
from memd.turns import Turn, Wait, WaitingRoom

if TYPE_CHECKING:
    import numpy.typing as npt

    from memd.copying import Delay
    from memd.rings import ClientRing, Rings
    from memd.tiers import ClientTier, Tiers
    from memd.transfer import Transfer

__all__ = ["MAX_FETCHES_IN_FLIGHT", "MAX_PAGES_PER_CLIENT", "Service"]

_LOG = logging.getLogger(__name__)

# Some 3 ms of zeroing, or of taking memory.
_SLICE_BYTES = 16 << 20
_TIER_CHECK_S = 10.0
MAX_PAGES_PER_CLIENT = 1 << 22
"""So that a look at all of them takes milliseconds; pages of 1 MiB would be 4 TiB."""
MAX_FETCHES_IN_FLIGHT = 4096
"""Of one client; bounds what an asker that never waits can make memd remember."""

_Steps = Generator[Wait, None, "Reply | None"]
"""A request that waits; None when somebody else will answer it."""


@dataclasses.dataclass
class _Session:
    """A process on the attach socket.

    Attributes:
        pid: As the kernel reported it.
        connection: ZeroMQ routing id that said ``Hello``, None before.
        record: Its registration, None before ``Hello`` is answered and after ``Goodbye``.
        tier: Where its pages are; None if all of them are in memory.
        ring: Where its fetched rows go; None if that is its extent's landing ring.
        heard_at: When it asked for something last, seconds of the clock.
    """

    pid: int
    connection: bytes | None = None
    record: ClientRecord | None = None
    tier: ClientTier | None = None
    ring: ClientRing | None = None
    heard_at: float = 0.0


class _Waiting(Turn["Reply | None"]):
    """A request that waits, and who asked it when."""

    def __init__(self, steps: _Steps, connection: bytes, request: Request, begun_ns: int) -> None:
        super().__init__(steps)
        self.connection = connection
        self.request = request
        self.begun_ns = begun_ns


_Handler = Callable[["Service", bytes, Any], "Reply | _Steps | None"]


class Service:
    """Handles requests against a store and a transfer.

    Args:
        store: Bookkeeping of the region.
        transfer: Data path over the same region.
        address: Shown in the stats.
        delay: Interconnect to imitate; by default none.
        max_client_bytes: Largest extent of one client; 0 means the region's size.
        max_frame_bytes: Longest request that is read.
        tiers: The disk below the region's memory; by default there is none.
        rings: Landing rings on devices; by default clients may have none.
        clock: Monotonic seconds; injected by tests.

    Attributes:
        metrics: Everything that was counted.
        state: What the daemon is doing; whoever runs the service keeps it up to date.
    """

    def __init__(
        self,
        store: Store,
        transfer: Transfer,
        *,
        address: str = "",
        delay: Delay | None = None,
        max_client_bytes: int = 0,
        max_frame_bytes: int = 16 << 20,
        tiers: Tiers | None = None,
        rings: Rings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Metrics()
        self.state = DaemonState.SERVING
        self._store = store
        self._transfer = transfer
        self._address = address
        self._max_frame_bytes = max_frame_bytes
        self._clock = clock
        self._tiers = tiers
        self._rings = rings
        self._room: WaitingRoom[Reply | None] = WaitingRoom()
        self._fetches = Fetches(
            transfer, delay=delay, clock=clock, rings=rings, on_room=self._room.wake
        )
        self._has_news = False
        # Connections whose Hello waits.
        self._greeting: set[bytes] = set()
        # Clients that are gone and whose memory a page on its way to or from disk still needs.
        self._leaving: list[tuple[ClientRecord, ClientTier]] = []
        self._refusals = Refusals(self.metrics)
        self._max_client_bytes = max_client_bytes
        # Replies of requests that ended otherwise than by being handled.
        self._outbox: list[tuple[bytes, bytes]] = []
        self._started_at = clock()
        self._check_tiers_at = self._started_at
        self._sessions: dict[bytes, _Session] = {}
        # By ZeroMQ routing id; those that are registered, or whose Hello waits.
        self._connections: dict[bytes, _Session] = {}

    def open_session(self, pid: int) -> bytes:
        """A new session for a process that attached; the token is what its ``Hello`` must carry."""
        token = secrets.token_bytes(SESSION_BYTES)
        self._sessions[token] = _Session(pid)
        return token

    def has_said_hello(self, token: bytes) -> bool:
        """Whether the session's client has registered, now or earlier."""
        return self._sessions[token].connection is not None

    def close_session(self, token: bytes, reason: str) -> None:
        """End a session whose process is gone; reclaims what it still holds."""
        session = self._sessions.pop(token)
        if session.record is not None:
            self.metrics.counters.clients_reclaimed += 1
            held = session.record.pages.num_pages - session.record.pages.count(PageState.FREE)
            _LOG.warning(
                "client %d (pid %d) is gone (%s); reclaimed its %d pages in use",
                session.record.client_id,
                session.pid,
                reason,
                held,
                extra=_fields(session.record),
            )
            self._end_registration(session)
        elif session.connection in self._greeting:
            self._dismiss(session.connection)

    def handle(self, connection: bytes, frame: bytes) -> bytes | None:
        """Do what a frame asks; never raises for anything a peer can send.

        Args:
            connection: ZeroMQ routing id of the sender.
            frame: One request.

        Returns:
            The reply frame; None if `step` will give it.
        """
        request_id: int | None = None
        begin_ns = time.perf_counter_ns()
        try:
            if len(frame) > self._max_frame_bytes:
                raise Refused(
                    ErrorCode.TOO_LARGE,
                    f"a frame has at most {self._max_frame_bytes} bytes, got {len(frame)}",
                )
            request = decode_request(frame)
            request_id = request.request_id
            answer = self._begin(connection, request)
            if isinstance(answer, Generator):
                answer = self._wait(_Waiting(answer, connection, request, begin_ns))
            if answer is None:
                return None
            self.metrics.answered(_tag(type(request)), time.perf_counter_ns() - begin_ns)
            reply: Reply = answer
        except Exception as error:
            reply = self._refusals.of(request_id, error)
        return encode(reply)

    def note_news(self) -> None:
        """Say that something has happened which a request may wait for; any thread may."""
        self._has_news = True

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do now."""
        return bool(self._outbox) or self._fetches.has_work or self._has_news or self._room.has_work

    def next_due(self) -> float | None:
        """When `step` has something to do that nobody will tell of, in seconds of the clock.

        That is a reply which is held back, or a look at devices; None if there is none.
        """
        dues = [self._fetches.next_due(), None if self._rings is None else self._rings.next_due()]
        return min((due for due in dues if due is not None), default=None)

    @property
    def num_leaving_rings(self) -> int:
        """Rings that somebody waits for to be closed."""
        return 0 if self._rings is None else self._rings.num_closing

    def step(self) -> list[tuple[bytes, bytes]]:
        """Copy for one client's turn, and let one request that waits go on.

        Returns:
            Replies that may go now, as (ZeroMQ routing id, frame).
        """
        rings_due = None if self._rings is None else self._rings.next_due()
        if self._has_news or (rings_due is not None and self._clock() >= rings_due):
            # First, so that news which comes meanwhile is not forgotten.
            self._has_news = False
            # Whoever waits goes on after all this, so that he finds what has changed.
            self._room.wake()
            self._end_leaving()
            self._follow_rings()
        for ended in self._fetches.step():
            self._answer_fetch(ended)
        turn = self._room.step()
        if turn is not None:
            self._answer_turn(turn)
        replies, self._outbox = self._outbox, []
        return replies

    def stop_rings(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        """Write to no device any more, and unmap all rings, for memd's end; blocks within a bound.

        Clients are not told, but for those that wait for their ring to be closed.

        Returns:
            Their replies, as `step` gives them.
        """
        if self._rings is None:
            return []
        for session in self._connections.values():
            if session.ring is not None and session.record is not None:
                # Nothing is to be gathered into a slot that has been given back.
                self._fetches.cancel(session.record.client_id)
        if not self._rings.stop(timeout_s):
            _LOG.warning("a device did not let go of its rings in %g s", timeout_s)
        self._room.wake()
        for _ in range(len(self._sessions) + len(self._connections)):
            turn = self._room.step()
            if turn is not None:
                self._answer_turn(turn)
        replies, self._outbox = self._outbox, []
        return replies

    def _follow_rings(self) -> None:
        """See what devices have done."""
        if self._rings is None:
            return
        for event in self._rings.poll():
            for ended in self._fetches.follow(event):
                self._answer_fetch(ended)

    def _begin(self, connection: bytes, request: Request) -> Reply | _Steps | None:
        """What a request is answered with, now or in some steps."""
        handler = self._HANDLERS[type(request)]
        if connection in self._greeting and not isinstance(request, Ping | Stats):
            return self._after_hello(handler, connection, request)
        return handler(self, connection, request)

    def _after_hello(self, handler: _Handler, connection: bytes, request: Request) -> _Steps:
        """A request behind a ``Hello`` that waits; its turn comes once that is answered."""
        answer = handler(self, connection, request)
        if isinstance(answer, Generator):
            answer = yield from answer
        return answer

    def _wait(self, turn: _Waiting) -> Reply | None:
        """Begin a request that may have to wait; its reply, if it need not."""
        num_waiting = self._room.num_waiting(turn.connection)
        if num_waiting >= MAX_FETCHES_IN_FLIGHT:
            turn.give_up()
            raise _too_many()
        if num_waiting == 0 and turn.go_on():
            if turn.error is not None:
                raise turn.error
            return turn.result
        self._room.add(turn.connection, turn)
        return None

    def _answer_turn(self, turn: Turn[Reply | None]) -> None:
        """Put the reply of a request that waited where `step` gives it out."""
        assert isinstance(turn, _Waiting), "nobody else waits"
        if turn.error is not None:
            reply: Reply = self._refusals.of(turn.request.request_id, turn.error)
        elif turn.result is not None:
            reply = turn.result
            self.metrics.answered(_tag(type(turn.request)), time.perf_counter_ns() - turn.begun_ns)
        else:
            return
        self._outbox.append((turn.connection, encode(reply)))

    def _answer_fetch(self, ended: Ended) -> None:
        """Put the reply of a fetch that was copied in turn where `step` gives it out."""
        fetch = ended.fetch
        if ended.end is FetchEnd.LANDED:
            reply: Reply = self._fetched(fetch.request_id, fetch.job, ended.copy_ns)
            self.metrics.answered(_tag(Fetch), time.perf_counter_ns() - fetch.begun_ns)
        elif ended.end is FetchEnd.DEVICE_LOST:
            assert fetch.ring is not None, "only a ring has a device"
            reply = self._refusals.of(fetch.request_id, fetch.ring.lost())
        else:
            text = "memd failed to copy; see its log"
            reply = self._refusals.make(fetch.request_id, ErrorCode.INTERNAL, text)
        self._outbox.append((fetch.connection, encode(reply)))

    def _fetched(self, request_id: int, job: CopyJob, copy_ns: int = 0) -> FetchReply:
        num_rows = len(job.rows)
        self.metrics.fetched(num_rows=num_rows, num_bytes=job.num_bytes, gather_ns=job.copy_ns)
        return FetchReply(
            request_id=request_id, num_rows=num_rows, gather_ns=job.copy_ns, copy_ns=copy_ns
        )

    def tidy(self, max_bytes: int) -> bool:
        """Do a bit of what nobody waits for: zero memory, make room; True when more is left."""
        more = self.scrub(max_bytes)
        for session in self._connections.values():
            if session.tier is not None:
                more |= session.tier.tidy()
        return more

    def scrub(self, max_bytes: int) -> bool:
        """Zero up to ``max_bytes`` of returned memory; True when more is left."""
        dirty = self._store.next_dirty(max_bytes)
        if dirty is None:
            return False
        offset, length = dirty
        if self._tiers is None:
            self._transfer.zero(offset=offset, length=length)
        else:
            self._tiers.punch(offset, length)
        self._store.mark_clean(offset, length)
        self.metrics.counters.bytes_zeroed += length
        return self._store.dirty_bytes > 0

    def stats(self) -> dict[str, Any]:
        """The daemon's state as plain data; keys in ``memd.metrics``."""
        try:
            self._store.check_integrity()
            self._fetches.check_integrity()
            self._room.check_integrity()
            if self._rings is not None:
                self._rings.check_integrity()
            self._check_tiers()
            integrity = "ok"
        except IntegrityError as error:
            integrity = str(error)
            _LOG.error("integrity: %s", error)
        extents = self._store.extents
        sessions = {
            session.record.client_id: session
            for session in self._connections.values()
            if session.record is not None
        }
        tiers = {client_id: session.tier for client_id, session in sessions.items()}
        now = self._clock()
        return {
            "daemon": {
                "pid": os.getpid(),
                "version": PROTOCOL_VERSION,
                "state": self.state,
                "uptime_s": round(self._clock() - self._started_at, 3),
                "address": self._address,
                "transfer": type(self._transfer).__name__,
            },
            "region": {
                "bytes": extents.size,
                "free_bytes": extents.num_free,
                "largest_free_bytes": extents.largest_free,
                "dirty_bytes": self._store.dirty_bytes,
                "memory_bytes": self._store.memory_bytes,
                "memory_free_bytes": self._store.memory_free_bytes,
            },
            "clients": [
                {
                    "client_id": record.client_id,
                    "pid": record.pid,
                    "name": record.name,
                    "pages": record.pages.num_pages,
                    "pages_free": record.pages.count(PageState.FREE),
                    "pages_reserved": record.pages.count(PageState.RESERVED),
                    "pages_sealed": record.pages.count(PageState.SEALED),
                    "pages_frozen": record.pages.count(PageState.FROZEN),
                    "pages_leaving": record.pages.count(PageState.LEAVING),
                    "page_bytes": record.layout.page_bytes,
                    "extent_bytes": record.extent_bytes,
                    "memory_bytes": record.memory_bytes,
                    **tier_stats(tiers.get(record.client_id), record.pages.num_pages),
                    "landing_rows": _landing_rows(record, sessions[record.client_id].ring),
                    "data_path": _data_path(sessions[record.client_id].ring),
                    "pending_bytes": self._fetches.pending_bytes(record.client_id),
                    "silent_s": round(now - sessions[record.client_id].heard_at, 3),
                }
                for record in self._store.clients
                if record.client_id in sessions
            ],
            **({} if self._tiers is None else {"disk": self._tiers.stats()}),
            **({} if self._rings is None else {"cuda": self._rings.stats()}),
            **self.metrics.snapshot(),
            "integrity": integrity,
        }

    def _check_tiers(self) -> None:
        """Verify the books of the tiers, now and then: it takes a microsecond for each page."""
        now = self._clock()
        if self._tiers is None or now < self._check_tiers_at:
            return
        self._tiers.check_integrity()
        for session in self._connections.values():
            if session.tier is not None:
                session.tier.pages.check_integrity()
        # Later only if it held: what does not is said every time.
        self._check_tiers_at = now + _TIER_CHECK_S

    def _end_registration(self, session: _Session) -> None:
        record, tier, connection = session.record, session.tier, session.connection
        assert record is not None, "only registered sessions end"
        assert connection is not None, "a registration has a connection"
        session.record = session.tier = session.ring = None
        if tier is not None:
            tier.mover.end()
        # Before its memory can be anybody else's, and its slots. These first: they came first.
        for fetch in self._fetches.cancel(record.client_id):
            self._refuse_gone(connection, fetch.request_id)
        self._dismiss(connection)
        if self._rings is not None:
            self._rings.close(record.client_id)
            # Slots may be free, and its ring closed.
            self._has_news = True
        if tier is None or tier.close():
            self._store.unregister(record.client_id)
        else:
            self._leaving.append((record, tier))

    def _dismiss(self, connection: bytes) -> None:
        """Forget a connection, and answer what waits for it."""
        del self._connections[connection]
        for turn in self._room.cancel(connection):
            assert isinstance(turn, _Waiting), "nobody else waits"
            self._refuse_gone(connection, turn.request.request_id)

    def _refuse_gone(self, connection: bytes, request_id: int) -> None:
        text = "the client left before its request was done"
        reply = self._refusals.make(request_id, ErrorCode.NOT_REGISTERED, text)
        self._outbox.append((connection, encode(reply)))

    def _end_leaving(self) -> None:
        """Take back the memory of clients that are gone, once no page of it is on its way."""
        for record, tier in list(self._leaving):
            if tier.close():
                self._leaving.remove((record, tier))
                self._store.unregister(record.client_id)

    def _record(self, connection: bytes) -> ClientRecord:
        session = self._connections.get(connection)
        if session is None or session.record is None:
            raise Refused(
                ErrorCode.NOT_REGISTERED, "this connection holds no extent; say Hello first"
            )
        session.heard_at = self._clock()
        return session.record

    def _hello(self, connection: bytes, request: Hello) -> _Steps:
        session = self._session_for(connection, request)
        layout = request.layout
        ring = self._read_ring(request)
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
        host_pages = self._host_pages(request)
        wanted = layout.page_bytes * host_pages + request.landing_bytes
        if self._max_client_bytes and wanted > self._max_client_bytes:
            fits = max(0, self._max_client_bytes - request.landing_bytes) // layout.page_bytes
            raise Refused(
                ErrorCode.QUOTA,
                f"a client may have {self._max_client_bytes} bytes, {host_pages} pages and "
                f"the landing ring are {wanted}; {fits} pages would fit",
            )
        # Nobody else may say Hello for this process, and this connection for no other.
        session.connection = connection
        self._connections[connection] = session
        self._greeting.add(connection)
        try:
            record = yield from self._register(session, request, host_pages, landing_rows)
            if ring is not None:
                yield from self._open_ring(record, ring)
        except (PoolFull, RingRefused, DeviceLost):
            session.connection = None
            del self._connections[connection]
            raise
        finally:
            self._greeting.discard(connection)
        session.record, session.ring = record, ring
        if self._tiers is not None and record.host_pages < request.num_pages:
            session.tier = self._tiers.attach(record)
        session.heard_at = self._clock()
        self.metrics.counters.clients_registered += 1
        _LOG.info(
            "client %d (pid %d, %s): %d pages of %d bytes, %d of them in memory, %d landing rows "
            "(%s)",
            record.client_id,
            record.pid,
            record.name or "no name",
            request.num_pages,
            layout.page_bytes,
            record.host_pages,
            _landing_rows(record, ring),
            _data_path(ring),
            extra=_fields(record),
        )
        return HelloReply(
            request_id=request.request_id,
            version=PROTOCOL_VERSION,
            client_id=record.client_id,
            extent_offset=record.extent_offset,
            extent_bytes=record.extent_bytes,
            landing_offset=record.landing_offset,
            landing_rows=_landing_rows(record, ring),
            row_bytes=layout.row_bytes,
            page_bytes=layout.page_bytes,
            row_index_bytes=layout.row_index_bytes(request.num_pages),
            max_frame_bytes=self._max_frame_bytes,
            host_pages=record.host_pages,
            data_path=_data_path(ring),
        )

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
            yield from self._rings.open(record.client_id, ring, self.scrub)
            is_open = True
        finally:
            if not is_open:
                self._store.unregister(record.client_id)

    def _session_for(self, connection: bytes, request: Hello) -> _Session:
        """The session that a ``Hello`` may open."""
        if request.version != PROTOCOL_VERSION:
            raise Refused(
                ErrorCode.VERSION,
                f"memd speaks protocol version {PROTOCOL_VERSION}, the client {request.version}; "
                f"run the same release on both sides",
            )
        if self.state is DaemonState.DRAINING:
            raise Refused(ErrorCode.DRAINING, "memd is ending and takes no new clients")
        session = self._sessions.get(request.session)
        if session is None:
            raise Refused(ErrorCode.UNKNOWN_SESSION, "no attached process holds this session")
        if session.connection is not None or connection in self._connections:
            raise Refused(ErrorCode.ALREADY_REGISTERED, "one Hello for each attached process")
        return session

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
        self, session: _Session, request: Hello, host_pages: int, landing_rows: int
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
                self.scrub(_SLICE_BYTES)
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
            length = min(_SLICE_BYTES, end - begin)
            if not self._tiers.fill(begin, length):
                raise PoolFull(
                    f"the host has no memory for {record.memory_bytes} bytes any more, though memd "
                    "was promised it; give memd a smaller --bytes, or the host fewer programs"
                )
            begin += length
            yield Wait.TURN

    def _reserve(self, connection: bytes, request: Reserve) -> Reply | _Steps:
        record, tier = self._record(connection), self._connections[connection].tier
        if tier is not None:
            return self._reserve_in_memory(record, tier, request)
        page_ids = record.pages.reserve(request.num_pages)
        return _reserved(request, record, page_ids)

    def _reserve_in_memory(
        self, record: ClientRecord, tier: ClientTier, request: Reserve
    ) -> _Steps:
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

    def _commit(self, connection: bytes, request: Commit) -> Reply:
        record, tier = self._record(connection), self._connections[connection].tier
        # First the book that is stricter, so that both change or none.
        if tier is not None:
            tier.pages.commit(request.page_ids)
        record.pages.commit(request.page_ids)
        return CommitReply(request_id=request.request_id)

    def _fetch(self, connection: bytes, request: Fetch) -> Reply | _Steps | None:
        record, session = self._record(connection), self._connections[connection]
        tier, ring = session.tier, session.ring
        if ring is not None:
            ring.require_open()
        job, page_ids = self._read_fetch(record, request, ring)
        if tier is None and ring is None and self._fetches.copy_now(job):
            return self._fetched(request.request_id, job)
        # Before anything is pinned.
        self._require_few_in_flight(connection, record)
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

    def _fetch_in_steps(self, fetch: PinnedFetch) -> _Steps:
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
                return self._fetched(fetch.request_id, fetch.job)
            is_handed_over = True
            for ended in self._fetches.send(fetch):
                self._answer_fetch(ended)
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

    def _require_few_in_flight(self, connection: bytes, record: ClientRecord) -> None:
        in_flight = self._fetches.num_of(record.client_id) + self._room.num_waiting(connection)
        if in_flight >= MAX_FETCHES_IN_FLIGHT:
            raise _too_many()

    def _read_fetch(
        self, record: ClientRecord, request: Fetch, ring: ClientRing | None
    ) -> tuple[CopyJob, npt.NDArray[np.int64]]:
        """What a fetch asks for, checked, and the pages that it reads, each once."""
        layout, num_pages = record.layout, record.pages.num_pages
        width = layout.row_index_bytes(num_pages)
        num_rows, rest = divmod(len(request.rows), width)
        if rest:
            raise Refused(
                ErrorCode.MALFORMED,
                f"rows must hold {width}-byte indices, got {len(request.rows)} bytes",
            )
        landing_rows = _landing_rows(record, ring)
        if request.landing_row + num_rows > landing_rows:
            raise OutOfRange(
                f"rows {request.landing_row}..+{num_rows} leave the landing ring of "
                f"{landing_rows} rows"
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

    def _release(self, connection: bytes, request: Release) -> Reply:
        record, tier = self._record(connection), self._connections[connection].tier
        freed = record.pages.release(request.page_ids)
        if tier is not None:
            tier.mover.release(freed)
            self._has_news = True
        return ReleaseReply(request_id=request.request_id)

    def _freeze(self, connection: bytes, request: Freeze) -> Reply:
        record, tier = self._record(connection), self._connections[connection].tier
        if request.depths and len(request.depths) != len(request.page_ids):
            raise OutOfRange(
                f"depths are none or one for each of {len(request.page_ids)} pages, got "
                f"{len(request.depths)}"
            )
        record.pages.freeze(request.page_ids)
        if tier is not None:
            tier.pages.freeze(request.page_ids, request.depths or None)
            self._has_news = True
        return FreezeReply(request_id=request.request_id)

    def _thaw(self, connection: bytes, request: Thaw) -> Reply | _Steps:
        record, tier = self._record(connection), self._connections[connection].tier
        if tier is None:
            record.pages.thaw(request.page_ids)
            return ThawReply(request_id=request.request_id)
        page_ids = record.pages.require_frozen(request.page_ids)
        self._require_few_in_flight(connection, record)
        record.pages.pin(page_ids)
        return self._thaw_in_memory(record, tier, page_ids, request)

    def _thaw_in_memory(
        self,
        record: ClientRecord,
        tier: ClientTier,
        page_ids: npt.NDArray[np.int64],
        request: Thaw,
    ) -> _Steps:
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

    def _stats(self, connection: bytes, request: Stats) -> Reply:
        del connection
        return StatsReply(request_id=request.request_id, stats=self.stats())

    def _ping(self, connection: bytes, request: Ping) -> Reply:
        del connection
        return Pong(request_id=request.request_id)

    def _goodbye(self, connection: bytes, request: Goodbye) -> Reply | _Steps:
        record, ring = self._record(connection), self._connections[connection].ring
        self._end_registration(self._connections[connection])
        _LOG.info(
            "client %d (pid %d) said goodbye", record.client_id, record.pid, extra=_fields(record)
        )
        if ring is not None:
            return self._wait_for_close(ring, request)
        return GoodbyeReply(request_id=request.request_id)

    def _wait_for_close(self, ring: ClientRing, request: Goodbye) -> _Steps:
        """Answer a ``Goodbye`` once the ring is its owner's again, or its device is lost."""
        while not ring.is_over:
            yield Wait.EVENT
        return GoodbyeReply(
            request_id=request.request_id, is_ring_closed=ring.phase is RingPhase.CLOSED
        )

    _HANDLERS: ClassVar[dict[type[Request], _Handler]] = {
        Hello: _hello,
        Reserve: _reserve,
        Commit: _commit,
        Fetch: _fetch,
        Release: _release,
        Freeze: _freeze,
        Thaw: _thaw,
        Stats: _stats,
        Ping: _ping,
        Goodbye: _goodbye,
    }

    if set(_HANDLERS) != set(REQUEST_TYPES):
        raise ImportError("every request type needs exactly one handler")


def _landing_rows(record: ClientRecord, ring: ClientRing | None) -> int:
    """Rows of a client's landing ring, wherever it is."""
    return record.landing_rows if ring is None else ring.num_rows


def _data_path(ring: ClientRing | None) -> str:
    """What ``HelloReply`` calls the way of a client's rows."""
    return "host" if ring is None else "cuda_ipc"


def _too_many() -> Refused:
    return Refused(
        ErrorCode.TOO_MANY,
        f"a client may have {MAX_FETCHES_IN_FLIGHT} requests in flight; wait for replies",
    )


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


def _tag(kind: type[Request]) -> str:
    """What a kind of request is called on the wire."""
    return str(kind.__struct_config__.tag)


def _fields(record: ClientRecord) -> dict[str, object]:
    """A client's fields in the log."""
    return {"client_id": record.client_id, "client_pid": record.pid, "client_name": record.name}
