"""Messages to actions: every request of every client, without a socket in sight.

The server hands in frames and gets exactly one reply frame for each: at once, or for a fetch that
has to be copied in turn with others (`memd.copying`) from a later `step`. Sessions tie a ZeroMQ
connection to a process: the server opens one when a process attaches and closes it when that
process is gone, and a ``Hello`` must name an open session. So from the first byte of a client's
memory on, somebody watches it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import secrets
import time
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from memd.copying import CopyJob, CopyQueue
from memd.errors import IntegrityError, PoolFull, ProtocolError
from memd.lifecycle import DaemonState
from memd.metrics import Metrics
from memd.protocol import (
    PROTOCOL_VERSION,
    REQUEST_TYPES,
    SESSION_BYTES,
    Commit,
    CommitReply,
    ErrorCode,
    ErrorReply,
    Fetch,
    FetchReply,
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
    decode_request,
    encode,
)
from memd.store import ClientRecord, OutOfRange, PageState, Store, WrongState

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from memd.copying import Delay
    from memd.transfer import Transfer

__all__ = ["MAX_FETCHES_IN_FLIGHT", "Service", "printable"]

_LOG = logging.getLogger(__name__)

_SCRUB_ALL = 1 << 62
_MAX_MESSAGE_CHARS = 1000
MAX_FETCHES_IN_FLIGHT = 4096
"""Of one client; bounds what an asker that never waits can make memd remember."""


def printable(text: str, max_chars: int) -> str:
    """A peer's words, so that they can neither steer a terminal nor begin a line of a log."""
    shown = text if len(text) <= max_chars else text[:max_chars] + "..."
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)


class _Refused(Exception):
    """A request that gets an ``ErrorReply``."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclasses.dataclass
class _Session:
    """A process on the attach socket.

    Attributes:
        pid: As the kernel reported it.
        connection: ZeroMQ routing id that said ``Hello``, None before.
        record: Its registration, None before ``Hello`` and after ``Goodbye``.
        heard_at: When it asked for something last, seconds of the clock.
    """

    pid: int
    connection: bytes | None = None
    record: ClientRecord | None = None
    heard_at: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Fetch:
    """A fetch that is being copied or held back.

    Attributes:
        connection: Who is to be answered.
        request_id: Of the request.
        record: Whose pages are read.
        job: The copying.
        page_ids: Pages that are pinned for it, each once.
        begun_ns: When it was asked for, by the performance counter.
    """

    connection: bytes
    request_id: int
    record: ClientRecord
    job: CopyJob
    page_ids: npt.NDArray[np.int64]
    begun_ns: int = dataclasses.field(default_factory=time.perf_counter_ns)


class Service:
    """Handles requests against a store and a transfer.

    Args:
        store: Bookkeeping of the region.
        transfer: Data path over the same region.
        address: Shown in the stats.
        delay: Interconnect to imitate; by default none.
        max_client_bytes: Largest extent of one client; 0 means the region's size.
        max_frame_bytes: Longest request that is read.
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Metrics()
        self.state = DaemonState.SERVING
        self._store = store
        self._transfer = transfer
        self._address = address
        self._max_frame_bytes = max_frame_bytes
        self._clock = clock
        self._copies = CopyQueue(transfer, delay=delay, clock=clock)
        self._fetches: dict[CopyJob, _Fetch] = {}
        self._max_client_bytes = max_client_bytes
        # Replies of requests that ended otherwise than by being handled.
        self._outbox: list[tuple[bytes, bytes]] = []
        self._started_at = clock()
        self._sessions: dict[bytes, _Session] = {}
        # By ZeroMQ routing id; holds registered sessions only.
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
                raise _Refused(
                    ErrorCode.TOO_LARGE,
                    f"a frame has at most {self._max_frame_bytes} bytes, got {len(frame)}",
                )
            request = decode_request(frame)
            request_id = request.request_id
            reply: Reply | None = self._HANDLERS[type(request)](self, connection, request)
            if reply is not None:
                self.metrics.answered(_tag(type(request)), time.perf_counter_ns() - begin_ns)
        except _Refused as refused:
            reply = self._error(request_id, refused.code, str(refused))
        except ProtocolError as error:
            reply = self._error(request_id, ErrorCode.MALFORMED, str(error))
        except PoolFull as error:
            reply = self._error(request_id, ErrorCode.POOL_FULL, str(error))
        except OutOfRange as error:
            reply = self._error(request_id, ErrorCode.OUT_OF_RANGE, str(error))
        except WrongState as error:
            reply = self._error(request_id, ErrorCode.WRONG_STATE, str(error))
        except Exception:
            _LOG.exception("request %s failed", request_id)
            reply = self._error(request_id, ErrorCode.INTERNAL, "memd failed; see its log")
        return None if reply is None else encode(reply)

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do now."""
        return bool(self._outbox) or not self._copies.is_idle

    def next_due(self) -> float | None:
        """When `step` will have a reply that is held back, seconds of the clock; None if never."""
        return self._copies.next_due()

    def step(self) -> list[tuple[bytes, bytes]]:
        """Copy for one client's turn.

        Returns:
            Replies that may go now, as (ZeroMQ routing id, frame).
        """
        self._copy_turn()
        for job in self._copies.take_finished():
            fetch = self._fetches[job]
            self._answer_later(job, self._finish(fetch))
            self.metrics.answered(_tag(Fetch), time.perf_counter_ns() - fetch.begun_ns)
        replies, self._outbox = self._outbox, []
        return replies

    def _copy_turn(self) -> None:
        """One client's turn; a fetch whose copy fails is answered with an error."""
        try:
            self._copies.step()
        except Exception:
            job = self._copies.drop_current()
            _LOG.exception("copying for client %d failed", job.client_id)
            fetch = self._fetches[job]
            fetch.record.pages.unpin(fetch.page_ids)
            text = "memd failed to copy; see its log"
            self._answer_later(job, self._error(fetch.request_id, ErrorCode.INTERNAL, text))

    def _answer_later(self, job: CopyJob, reply: Reply) -> None:
        """Put a fetch's reply where `step` gives it out; the fetch is over."""
        self._outbox.append((self._fetches.pop(job).connection, encode(reply)))

    def _finish(self, fetch: _Fetch) -> FetchReply:
        fetch.record.pages.unpin(fetch.page_ids)
        return self._fetched(fetch.request_id, fetch.job)

    def _fetched(self, request_id: int, job: CopyJob) -> FetchReply:
        num_rows = len(job.rows)
        self.metrics.fetched(num_rows=num_rows, num_bytes=job.num_bytes, gather_ns=job.copy_ns)
        return FetchReply(request_id=request_id, num_rows=num_rows, gather_ns=job.copy_ns)

    def scrub(self, max_bytes: int) -> bool:
        """Zero up to ``max_bytes`` of returned memory; True when more is left."""
        dirty = self._store.next_dirty(max_bytes)
        if dirty is None:
            return False
        offset, length = dirty
        self._transfer.zero(offset=offset, length=length)
        self._store.mark_clean(offset, length)
        self.metrics.counters.bytes_zeroed += length
        return self._store.dirty_bytes > 0

    def stats(self) -> dict[str, Any]:
        """The daemon's state as plain data; keys in ``memd.metrics``."""
        try:
            self._store.check_integrity()
            self._copies.check_integrity()
            integrity = "ok"
        except IntegrityError as error:
            integrity = str(error)
            _LOG.error("integrity: %s", error)
        extents = self._store.extents
        heard_at = {
            session.record.client_id: session.heard_at
            for session in self._connections.values()
            if session.record is not None
        }
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
                    "pages_leaving": record.pages.count(PageState.LEAVING),
                    "page_bytes": record.layout.page_bytes,
                    "extent_bytes": record.extent_bytes,
                    "landing_rows": record.landing_rows,
                    "pending_bytes": self._copies.pending_bytes(record.client_id),
                    "silent_s": round(now - heard_at[record.client_id], 3),
                }
                for record in self._store.clients
            ],
            **self.metrics.snapshot(),
            "integrity": integrity,
        }

    def _error(self, request_id: int | None, code: ErrorCode, message: str) -> ErrorReply:
        self.metrics.errors[code] += 1
        # A peer that repeats itself must not fill the disk: one line for each kind of error.
        message = printable(message, _MAX_MESSAGE_CHARS)
        if self.metrics.errors[code] == 1:
            _LOG.warning("refused (%s, further ones are only counted): %s", code, message)
        return ErrorReply(request_id=request_id, code=code, message=message)

    def _end_registration(self, session: _Session) -> None:
        record, connection = session.record, session.connection
        assert record is not None, "only registered sessions end"
        assert connection is not None, "a registration has a connection"
        session.record = None
        del self._connections[connection]
        # Before its memory can be anybody else's.
        for job in self._copies.cancel(record.client_id):
            text = "the client left before its fetch"
            asked = self._fetches[job].request_id
            self._answer_later(job, self._error(asked, ErrorCode.NOT_REGISTERED, text))
        self._store.unregister(record.client_id)

    def _record(self, connection: bytes) -> ClientRecord:
        session = self._connections.get(connection)
        if session is None or session.record is None:
            raise _Refused(
                ErrorCode.NOT_REGISTERED, "this connection holds no extent; say Hello first"
            )
        session.heard_at = self._clock()
        return session.record

    def _hello(self, connection: bytes, request: Hello) -> Reply:
        if request.version != PROTOCOL_VERSION:
            raise _Refused(
                ErrorCode.VERSION,
                f"memd speaks protocol version {PROTOCOL_VERSION}, the client {request.version}; "
                f"run the same release on both sides",
            )
        if self.state is DaemonState.DRAINING:
            raise _Refused(ErrorCode.DRAINING, "memd is ending and takes no new clients")
        session = self._sessions.get(request.session)
        if session is None:
            raise _Refused(ErrorCode.UNKNOWN_SESSION, "no attached process holds this session")
        if session.connection is not None or connection in self._connections:
            raise _Refused(ErrorCode.ALREADY_REGISTERED, "one Hello for each attached process")
        layout = request.layout
        landing_rows, rest = divmod(request.landing_bytes, layout.row_bytes)
        if rest:
            raise _Refused(
                ErrorCode.OUT_OF_RANGE,
                f"landing_bytes must be a multiple of row_bytes ({layout.row_bytes}), "
                f"got {request.landing_bytes}",
            )
        wanted = layout.page_bytes * request.num_pages + request.landing_bytes
        if self._max_client_bytes and wanted > self._max_client_bytes:
            fits = max(0, self._max_client_bytes - request.landing_bytes) // layout.page_bytes
            raise _Refused(
                ErrorCode.QUOTA,
                f"a client may have {self._max_client_bytes} bytes, {request.num_pages} pages and "
                f"the landing ring are {wanted}; {fits} pages would fit",
            )
        try:
            record = self._register(session, request, landing_rows)
        except PoolFull:
            # Memory of a client that just left may only wait for its scrub: do that now, then ask
            # again. Zeroing what could not be enough would keep everybody waiting for nothing.
            if wanted > self._store.extents.num_free + self._store.dirty_bytes:
                raise
            while self.scrub(_SCRUB_ALL):
                pass
            record = self._register(session, request, landing_rows)
        session.record, session.connection = record, connection
        session.heard_at = self._clock()
        self._connections[connection] = session
        self.metrics.counters.clients_registered += 1
        _LOG.info(
            "client %d (pid %d, %s): %d pages of %d bytes, %d landing rows",
            record.client_id,
            record.pid,
            record.name or "no name",
            request.num_pages,
            layout.page_bytes,
            landing_rows,
            extra=_fields(record),
        )
        return HelloReply(
            request_id=request.request_id,
            version=PROTOCOL_VERSION,
            client_id=record.client_id,
            extent_offset=record.extent_offset,
            extent_bytes=record.extent_bytes,
            landing_offset=record.landing_offset,
            landing_rows=record.landing_rows,
            row_bytes=layout.row_bytes,
            page_bytes=layout.page_bytes,
            row_index_bytes=layout.row_index_bytes(request.num_pages),
            max_frame_bytes=self._max_frame_bytes,
        )

    def _register(self, session: _Session, request: Hello, landing_rows: int) -> ClientRecord:
        return self._store.register(
            pid=session.pid,
            name=printable(request.name, _MAX_MESSAGE_CHARS),
            layout=request.layout,
            num_pages=request.num_pages,
            landing_rows=landing_rows,
        )

    def _reserve(self, connection: bytes, request: Reserve) -> Reply:
        pages = self._record(connection).pages
        page_ids = pages.reserve(request.num_pages)
        return ReserveReply(
            request_id=request.request_id,
            page_ids=None if page_ids is None else page_ids.tolist(),
            free_pages=pages.count(PageState.FREE),
        )

    def _commit(self, connection: bytes, request: Commit) -> Reply:
        self._record(connection).pages.commit(request.page_ids)
        return CommitReply(request_id=request.request_id)

    def _fetch(self, connection: bytes, request: Fetch) -> Reply | None:
        record = self._record(connection)
        layout, num_pages = record.layout, record.pages.num_pages
        width = layout.row_index_bytes(num_pages)
        num_rows, rest = divmod(len(request.rows), width)
        if rest:
            raise _Refused(
                ErrorCode.MALFORMED,
                f"rows must hold {width}-byte indices, got {len(request.rows)} bytes",
            )
        if request.landing_row + num_rows > record.landing_rows:
            raise OutOfRange(
                f"rows {request.landing_row}..+{num_rows} leave the landing ring of "
                f"{record.landing_rows} rows"
            )
        raw = np.frombuffer(request.rows, dtype=f"<u{width}")
        if num_rows and int(raw.max()) >= num_pages * layout.rows_per_page:
            raise OutOfRange(
                f"rows are 0..{num_pages * layout.rows_per_page - 1}, got {int(raw.max())}"
            )
        rows = raw.astype(np.int64)
        # In the indices' own width: as int64 it would take as long as copying the rows.
        pages_of_rows = raw // raw.dtype.type(layout.rows_per_page)
        record.pages.require_sealed(pages_of_rows)
        job = CopyJob(
            client_id=record.client_id,
            source_offset=record.extent_offset,
            row_bytes=layout.row_bytes,
            rows=rows,
            landing_offset=record.extent_offset
            + record.landing_offset
            + request.landing_row * layout.row_bytes,
        )
        if self._copies.is_immediate(job):
            self._copies.copy_now(job)
            return self._fetched(request.request_id, job)
        if self._copies.num_jobs_of(record.client_id) >= MAX_FETCHES_IN_FLIGHT:
            raise _Refused(
                ErrorCode.TOO_MANY,
                f"a client may have {MAX_FETCHES_IN_FLIGHT} fetches in flight; wait for replies",
            )
        # Sorting so many would cost more than copying them.
        is_read = np.zeros(num_pages, dtype=np.bool_)
        is_read[pages_of_rows] = True
        fetch = _Fetch(connection, request.request_id, record, job, np.flatnonzero(is_read))
        record.pages.pin(fetch.page_ids)
        self._fetches[job] = fetch
        self._copies.submit(job)
        return None

    def _release(self, connection: bytes, request: Release) -> Reply:
        self._record(connection).pages.release(request.page_ids)
        return ReleaseReply(request_id=request.request_id)

    def _stats(self, connection: bytes, request: Stats) -> Reply:
        del connection
        return StatsReply(request_id=request.request_id, stats=self.stats())

    def _ping(self, connection: bytes, request: Ping) -> Reply:
        del connection
        return Pong(request_id=request.request_id)

    def _goodbye(self, connection: bytes, request: Goodbye) -> Reply:
        record = self._record(connection)
        self._end_registration(self._connections[connection])
        _LOG.info(
            "client %d (pid %d) said goodbye", record.client_id, record.pid, extra=_fields(record)
        )
        return GoodbyeReply(request_id=request.request_id)

    _HANDLERS: ClassVar[dict[type[Request], Callable[[Service, bytes, Any], Reply | None]]] = {
        Hello: _hello,
        Reserve: _reserve,
        Commit: _commit,
        Fetch: _fetch,
        Release: _release,
        Stats: _stats,
        Ping: _ping,
        Goodbye: _goodbye,
    }

    if set(_HANDLERS) != set(REQUEST_TYPES):
        raise ImportError("every request type needs exactly one handler")


def _tag(kind: type[Request]) -> str:
    """What a kind of request is called on the wire."""
    return str(kind.__struct_config__.tag)


def _fields(record: ClientRecord) -> dict[str, object]:
    """A client's fields in the log."""
    return {"client_id": record.client_id, "client_pid": record.pid, "client_name": record.name}
