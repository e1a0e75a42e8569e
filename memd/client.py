"""The client of memd, made to live inside an engine's decode loop.

The bytes never travel: the client maps its extent of memd's region and writes pages there itself,
and memd gathers fetched rows into the landing ring beside them. Only small frames do, and no call
here waits for an answer (but ``connect``, ``wait``, ``drain``, ``check_integrity`` and ``close``):
requests give tickets, and ``poll`` completes them.

Order is part of the contract: memd handles the messages of one client in the order of the calls. So
pages may be fetched right after their ``commit``, and released right after a ``fetch`` that reads
them.

Where fetched rows land is ``data_path``: in ``landing``, unless ``connect`` was given a ring on a
GPU, into which memd then copies them by itself. Such a ring stays allocated until
``is_ring_closed``.

When memd is lost, ``is_alive`` turns False for ever. Every open ticket then ends with an error,
later calls do nothing and raise nothing, and ``pages`` and ``landing`` stay readable: the mapping
is the client's own.

A client is single-threaded. It must not know what a head's role or a request is.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from memd.allocator import RangeAllocator
from memd.errors import IntegrityError, MemdTimeout, ProtocolError
from memd.process import MemdProcess, spawn_memd
from memd.protocol import (
    MAX_PAGES_PER_MESSAGE,
    Commit,
    CommitReply,
    ErrorCode,
    ErrorReply,
    Fetch,
    FetchReply,
    Freeze,
    FreezeReply,
    Goodbye,
    GoodbyeReply,
    KVLayout,
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
    decode_reply,
    encode,
)
from memd.registration import Registration, register
from memd.store import PageState
from memd.tickets import FetchTicket, ReserveTicket, ThawTicket, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import numpy.typing as npt

    from memd.cuda.driver import Driver
    from memd.cuda.registration import PageLock
    from memd.cuda.ring import RingHandle

__all__ = [
    "FetchTicket",
    "MemdClient",
    "MemdProcess",
    "ReserveTicket",
    "ThawTicket",
    "Ticket",
    "spawn_memd",
]

_LOG = logging.getLogger(__name__)

_MAX_IN_FLIGHT = 65_536
# Time between two polls counts towards deadlines only up to this much: an engine that computed for
# a minute without polling must not blame memd for it.
_MAX_POLL_GAP_S = 1.0
_GOODBYE_WAIT_S = 1.0
# What memd said before it ended may take a moment longer than the news of its end.
_LAST_WORDS_S = 0.5
# Of a memd that does not say how long a request may be.
_COMMON_FRAME_BYTES = 16 << 20

_SomeTicket = TypeVar("_SomeTicket", bound=Ticket)

_LOST_CODES = frozenset({ErrorCode.NOT_REGISTERED, ErrorCode.MALFORMED, ErrorCode.TOO_LARGE})


@dataclasses.dataclass(frozen=True, slots=True)
class _Pending:
    """A request without its reply."""

    kind: str
    ticket: Ticket | None
    sent_at: float


@dataclasses.dataclass
class _Counters:
    """What this client did; only ever grow."""

    reserves: int = 0
    reserves_full: int = 0
    commits: int = 0
    releases: int = 0
    freezes: int = 0
    thaws: int = 0
    fetches_issued: int = 0
    fetches_landed: int = 0
    fetches_failed: int = 0
    fetches_refused_ring_full: int = 0
    rows_landed: int = 0
    bytes_landed: int = 0
    errors: int = 0


class MemdClient:
    """A registered client of one memd; a context manager. Made by ``connect``.

    Attributes:
        layout: Layout of the pages.
        num_pages: Pages of the extent.
        host_pages: How many of them may be in memory at a time; all unless memd has a disk.
        pages: uint8 [num_pages, num_heads, page_tokens, row_bytes], writable, shared with memd.
            Write only pages that are reserved and not yet committed, or rows of sealed ones that no
            fetch was told of. Touch no page that is frozen, and may be on disk.
        landing: uint8 [landing_rows, row_bytes], written by memd for fetches in flight, else
            stable; [0, row_bytes] with a ring on a device, which is in its place.
        landing_rows: Rows of the landing ring, wherever it is.
        device_lost_reason: Why nothing is fetched into the ring on the device any more; None as
            long as memd can copy there, and without such a ring.
        is_ring_closed: Whether memd has unmapped the ring on the device, so that it may be freed;
            True without one. Nothing but a ``close`` that memd has answered makes it True.
        address: Where memd listens.
        memd_pid: memd's process id.
    """

    def __init__(
        self,
        registration: Registration,
        layout: KVLayout,
        *,
        num_pages: int,
        address: str,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Wrap an established registration; ``connect`` is the way to get one.

        Args:
            registration: Channel, extent and numbers; owned from now on.
            layout: Layout of the pages.
            num_pages: Pages of the extent.
            address: Where memd listens.
            deadline_s: Seconds after which an unanswered request means that memd is lost.
            clock: Monotonic seconds.
        """
        self.layout = layout
        self.num_pages = num_pages
        self.address = address
        self.memd_pid = registration.memd_pid
        hello, extent = registration.hello, registration.extent
        self.client_id = hello.client_id
        self.host_pages = hello.host_pages or num_pages
        shape = (num_pages, layout.num_heads, layout.page_tokens, layout.row_bytes)
        self.pages: npt.NDArray[np.uint8] = extent[: num_pages * layout.page_bytes].reshape(shape)
        self._has_ring = hello.data_path != "host"
        self.landing_rows = hello.landing_rows
        self.device_lost_reason: str | None = None
        self.is_ring_closed = not self._has_ring
        num_rows_here = 0 if self._has_ring else hello.landing_rows
        self.landing: npt.NDArray[np.uint8] = extent[
            hello.landing_offset : hello.landing_offset + num_rows_here * layout.row_bytes
        ].reshape(num_rows_here, layout.row_bytes)
        self._page_lock: PageLock | None = None

        self._channel = registration.channel
        self._deadline_s = deadline_s
        self._clock = clock
        self._num_rows = num_pages * layout.rows_per_page
        # What the rows of a fetch are packed into: none has more of them than the ring.
        self._packed_rows = np.empty(hello.landing_rows, dtype=f"<u{hello.row_index_bytes}")
        # What is in a frame beside the indices is far below this.
        room = (hello.max_frame_bytes or _COMMON_FRAME_BYTES) - 256
        self._max_fetch_rows = room // hello.row_index_bytes
        self._ring = RangeAllocator(hello.landing_rows)
        self._states = np.zeros(num_pages, dtype=np.uint8)
        self._pages_used = 0
        self._in_flight: dict[int, _Pending] = {}
        # Request 0 was Hello.
        self._next_request_id = 1
        self._watched_s = 0.0
        self._polled_at = clock()
        self._lost_reason: str | None = None
        self._is_closed = False
        self._has_said_goodbye = False
        self._ended_at: float | None = None
        self._stats_id: int | None = None
        self._server_stats: dict[str, Any] = {}
        self._counters = _Counters()

    @classmethod
    def connect(
        cls,
        address: str,
        layout: KVLayout,
        *,
        num_pages: int,
        landing_rows: int,
        deadline_s: float = 10.0,
        name: str = "",
        host_pages: int = 0,
        ring: RingHandle | None = None,
    ) -> MemdClient:
        """Register with the memd at ``address`` and map the extent; blocks, at most ``deadline_s``.

        Args:
            address: ``ipc://`` and the path of the control socket.
            layout: Layout of the pages.
            num_pages: Pages wanted, >= 1.
            landing_rows: Rows of the landing ring; no fetch can be longer.
            deadline_s: Bound of this call, and later of every request, in seconds.
            name: Free text that ``memd status`` shows.
            host_pages: How many pages need memory at a time, if memd has a disk for the others; 0
                means all. What memd grants is in ``host_pages``.
            ring: Device memory of ``landing_rows`` rows, from ``memd.cuda.export_ring``, for
                fetched rows to land in instead of in ``landing``. It stays allocated until
                ``is_ring_closed``; when this raises anything but ``PoolFull`` or ``RingRefused``,
                until memd has ended.

        Raises:
            RingRefused: memd cannot or will not copy into the ring; the message says why.
            DeviceLost: The ring's device was given up meanwhile.
            MemdUnavailable: Nobody serves the address, or memd refused this process.
            MemdTimeout: memd did not answer in time.
            PoolFull: The region has no contiguous room; the message says what is free.
            ProtocolError: The two sides disagree on version or layout.
            ConfigError: The address is none.
        """
        registration = register(
            address,
            layout,
            num_pages=num_pages,
            landing_rows=landing_rows,
            deadline_s=deadline_s,
            name=name,
            host_pages=host_pages,
            ring=ring,
        )
        return cls(
            registration, layout, num_pages=num_pages, address=address, deadline_s=deadline_s
        )

    def __enter__(self) -> MemdClient:
        """The client."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the client."""
        self.close()

    @property
    def is_alive(self) -> bool:
        """Whether memd was there at the last ``poll``; False for ever once lost or closed."""
        return self._lost_reason is None

    @property
    def data_path(self) -> str:
        """How fetched rows come to the engine.

        ==============  ==========================================================================
        ``"shm"``       into ``landing``, for the processor
        ``"pinned"``    into ``landing``, which is page-locked: the engine copies from there to its
                        device by itself, and calls ``finish`` when the device has them
        ``"cuda_ipc"``  into the ring on the device; memd copies
        ==============  ==========================================================================
        """
        if self._has_ring:
            return "cuda_ipc"
        is_locked = self._page_lock is not None and self._page_lock.num_bytes > 0
        return "pinned" if is_locked else "shm"

    def page_lock(self, driver: Driver, *, device: int) -> PageLock:
        """Page-lock ``landing``, so that copies from it to a device need no help of the processor.

        The lock is the caller's, a context manager; it holds the memory, and ends before the
        device's context does. Not yet run on a GPU.

        Args:
            driver: Initialised; a context of the device is current, as it has to be at the end.
            device: The device's handle.

        Raises:
            CudaError: It could not be locked.
            ValueError: There is nothing to lock, for want of rows or of an open client, or it is
                locked already.
        """
        from memd.cuda.registration import PageLock

        if self.data_path == "pinned":
            raise ValueError("landing is page-locked already; close that lock first")
        lock = PageLock(driver, self.landing.reshape(-1), device=device)
        self._page_lock = lock
        return lock

    @property
    def has_disk(self) -> bool:
        """Whether frozen pages may leave memory."""
        return self.host_pages < self.num_pages

    @property
    def lost_reason(self) -> str | None:
        """Why ``is_alive`` is False; None while it is True."""
        return self._lost_reason

    @property
    def num_in_flight(self) -> int:
        """Requests without a reply."""
        return len(self._in_flight)

    @property
    def pages_used(self) -> int:
        """Pages that this client holds, reserved or sealed, those of open tickets not counted."""
        return self._pages_used

    @property
    def landing_rows_used(self) -> int:
        """Landing rows of fetches that are in flight or not yet finished."""
        return self._ring.num_allocated

    def reserve(self, num_pages: int) -> ReserveTicket:
        """Ask for pages, all or none; a full pool completes the ticket with ``page_ids`` None.

        Args:
            num_pages: Pages wanted, >= 0.
        """
        if num_pages < 0:
            raise ValueError(f"num_pages must not be negative, got {num_pages}")
        ticket = ReserveTicket(num_pages)
        if not self.is_alive:
            return _failed(ticket, self._lost_reason)
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            return _failed(ticket, f"{_MAX_IN_FLIGHT} requests are in flight")
        self._counters.reserves += 1
        self._request("reserve", ticket, lambda i: Reserve(request_id=i, num_pages=num_pages))
        return ticket

    def cancel(self, ticket: ReserveTicket) -> None:
        """Give the pages of a reserve ticket back, now or as soon as they arrive."""
        if ticket.is_cancelled:
            return
        ticket.is_cancelled = True
        if ticket.page_ids is not None:
            self.release(ticket.page_ids)

    def commit(self, page_ids: npt.ArrayLike | Iterable[int]) -> None:
        """Seal reserved pages: all their bytes are written, and fetches may read them.

        Args:
            page_ids: Integers [n], each once.

        Raises:
            ValueError: A page is not reserved by this client (never once memd is lost).
        """
        if not self.is_alive:
            return
        ids = self._move(page_ids, (PageState.RESERVED,), PageState.SEALED, "commit")
        self._counters.commits += self._tell("commit", ids, Commit)

    def release(self, page_ids: npt.ArrayLike | Iterable[int]) -> None:
        """Give pages back; fetches that were issued before still read them.

        Args:
            page_ids: Integers [n], each once.

        Raises:
            ValueError: A page is not held by this client (never once memd is lost).
        """
        if not self.is_alive:
            return
        held = (PageState.RESERVED, PageState.SEALED, PageState.FROZEN)
        ids = self._move(page_ids, held, PageState.FREE, "release")
        self._pages_used -= ids.size
        self._counters.releases += self._tell("release", ids, Release)

    def freeze(
        self, page_ids: npt.ArrayLike | Iterable[int], depths: npt.ArrayLike | None = None
    ) -> None:
        """Promise not to write sealed pages until ``thaw``: memd may move them to disk.

        Fetches read them as before, after they have come back. Nothing changes where memd has no
        disk; ``has_disk`` tells.

        Args:
            page_ids: Integers [n], each once.
            depths: How deep in a prompt each lies, integers [n], the first page of a prompt at 0;
                None says nothing.

        Raises:
            ValueError: A page is not sealed, or there is not one depth for each (never once memd is
                lost).
        """
        if not self.is_alive:
            return
        ids = np.asarray(page_ids, dtype=np.int64).reshape(-1)
        deep = [] if depths is None else np.asarray(depths, dtype=np.int64).reshape(-1).tolist()
        if depths is not None and (len(deep) != ids.size or min(deep, default=0) < 0):
            raise ValueError(f"freeze: need a depth >= 0 for each of {ids.size} pages, got {deep}")
        ids = self._move(ids, (PageState.SEALED,), PageState.FROZEN, "freeze")
        for start in range(0, ids.size, MAX_PAGES_PER_MESSAGE):
            part = slice(start, start + MAX_PAGES_PER_MESSAGE)
            self._request("freeze", None, partial(_freeze, ids[part].tolist(), deep[part]))
            self._counters.freezes += 1

    def thaw(self, page_ids: npt.ArrayLike | Iterable[int]) -> ThawTicket:
        """Take ``freeze`` back: once the ticket is done the pages are in memory and stay there.

        A ticket that ends with an error has thawed none of them. Pages whose bytes are ``lost``
        have to be released.

        Args:
            page_ids: Integers [n], each once, at most 1,048,576.

        Raises:
            ValueError: A page is not frozen, or there are too many (never once memd is lost).
        """
        ids = np.asarray(page_ids, dtype=np.int64).reshape(-1)
        ticket = ThawTicket(ids)
        if not self.is_alive:
            return _failed(ticket, self._lost_reason)
        if ids.size > MAX_PAGES_PER_MESSAGE:
            raise ValueError(f"thaw: at most {MAX_PAGES_PER_MESSAGE} pages, got {ids.size}")
        if len(self._in_flight) >= _MAX_IN_FLIGHT:
            return _failed(ticket, f"{_MAX_IN_FLIGHT} requests are in flight")
        # They stay frozen until memd says otherwise.
        self._move(ids, (PageState.FROZEN,), PageState.FROZEN, "thaw")
        self._counters.thaws += 1
        self._request("thaw", ticket, lambda i: Thaw(request_id=i, page_ids=ids.tolist()))
        return ticket

    def fetch(self, rows: npt.NDArray[np.int64]) -> FetchTicket | None:
        """Ask memd to gather rows of sealed pages into the landing ring.

        Args:
            rows: Flat row indices ``(page_id * num_heads + head) * page_tokens + offset``, int64
                [num_rows], any order, repetitions allowed.

        Returns:
            The ticket; None when the ring has no contiguous room now, or memd or the ring's device
            is lost.

        Raises:
            ValueError: A row lies outside the pages, or there are more than memd reads at once.
        """
        if not self.is_alive or len(self._in_flight) >= _MAX_IN_FLIGHT:
            return None
        if self.device_lost_reason is not None:
            return None
        num_rows = int(rows.size)
        if num_rows == 0:
            ticket = FetchTicket(0, 0)
            ticket.is_done = True
            return ticket
        flat = rows.reshape(-1).astype(np.int64, copy=False)
        # Packed first: the look at them then finds part of them in the cache.
        packed = self._packed_rows[:num_rows]
        np.copyto(packed, flat[: packed.size], casting="unsafe")
        # Read as unsigned, negative ones are larger than any row: one pass finds both kinds.
        if int(flat.view(np.uint64).max()) >= self._num_rows:
            raise ValueError(
                f"rows are 0..{self._num_rows - 1}, got {int(rows.min())}..{int(rows.max())}"
            )
        if num_rows > self._max_fetch_rows:
            raise ValueError(
                f"memd reads requests of at most {self._max_fetch_rows} rows, got {num_rows}; "
                "fetch them in parts"
            )
        start = self._ring.allocate(num_rows)
        if start is None:
            self._counters.fetches_refused_ring_full += 1
            return None
        ticket = FetchTicket(num_rows, start)
        # The encoder copies it, and takes any buffer for bytes.
        in_frame = cast("bytes", packed.data)
        self._counters.fetches_issued += 1
        self._request(
            "fetch", ticket, lambda i: Fetch(request_id=i, rows=in_frame, landing_row=start)
        )
        return ticket

    def landed(self, ticket: FetchTicket) -> npt.NDArray[np.uint8]:
        """The rows of a done ticket, uint8 [num_rows, row_bytes], a view valid until ``finish``.

        Raises:
            ValueError: The ticket is open, failed or finished, or its rows are on a device, from
                row ``landing_start`` of the ring on.
        """
        if self._has_ring:
            raise ValueError(
                f"the rows are on the device, from row {ticket.landing_start} of the ring on"
            )
        if not ticket.is_done or ticket.error is not None or ticket.is_finished:
            raise ValueError("only a done ticket without error, before finish, has rows")
        return self.landing[ticket.landing_start : ticket.landing_start + ticket.num_rows]

    def finish(self, ticket: FetchTicket) -> None:
        """Say that a fetch's rows are consumed or no longer wanted.

        Where a device reads them, they are consumed when it *has* read them, which is later than
        when the reading was launched.

        The ring space of a ticket that is still open comes back only when memd has answered it,
        because until then memd may write there.
        """
        if ticket.is_finished:
            return
        ticket.is_finished = True
        if ticket.is_done and ticket.num_rows:
            self._ring.free(ticket.landing_start)

    def poll(self) -> None:
        """Handle what has arrived, deadlines and memd's end; never blocks, microseconds if idle."""
        if self._lost_reason is not None:
            return
        now = self._clock()
        self._watched_s += min(now - self._polled_at, _MAX_POLL_GAP_S)
        self._polled_at = now
        has_ended = self._channel.peer_has_closed()
        if self._in_flight:
            while self._lost_reason is None and (frame := self._channel.receive()) is not None:
                self._on_frame(frame)
        if has_ended and not self._may_hear_more():
            self._lose("it has ended")
        elif self._in_flight:
            oldest = next(iter(self._in_flight.values()))
            if self._watched_s - oldest.sent_at > self._deadline_s:
                self._lose(f"memd did not answer a {oldest.kind} in {self._deadline_s:g} s")

    def wait(self, ticket: Ticket, timeout_s: float) -> bool:
        """Poll until a ticket is done, ``timeout_s`` seconds at most; whether it is done."""
        return self._wait_until(lambda: ticket.is_done, timeout_s)

    def drain(self, timeout_s: float) -> bool:
        """Poll until no request is in flight, at most ``timeout_s`` seconds; whether none is."""
        return self._wait_until(lambda: not self._in_flight, timeout_s)

    def stats(self) -> dict[str, Any]:
        """What is known now, as plain data; also asks memd for news, which a later call shows.

        Keys: ``state`` (``"alive"``, ``"lost"``, ``"closed"``), ``lost_reason``, ``address``,
        ``pid``, ``pages``, ``host_pages``, ``pages_used``, ``landing_rows``,
        ``landing_rows_used``, ``data_path``, ``device_lost_reason``, ``in_flight``, ``counters``
        (this client's), ``server`` (memd's last answer, keys in ``memd.metrics``; empty before the
        first one).
        """
        if self.is_alive and self._stats_id is None:
            self._stats_id = self._request("stats", None, lambda i: Stats(request_id=i))
        state = "closed" if self._is_closed else "alive" if self.is_alive else "lost"
        return {
            "state": state,
            "lost_reason": self._lost_reason,
            "address": self.address,
            "pid": self.memd_pid,
            "pages": self.num_pages,
            "host_pages": self.host_pages,
            "pages_used": self._pages_used,
            "landing_rows": self._ring.size,
            "landing_rows_used": self._ring.num_allocated,
            "data_path": self.data_path,
            "device_lost_reason": self.device_lost_reason,
            "in_flight": len(self._in_flight),
            "counters": dataclasses.asdict(self._counters),
            "server": self._server_stats,
        }

    def check_integrity(self, timeout_s: float = 5.0) -> None:
        """Verify this side's books and that a living memd's agree; may block for ``timeout_s``.

        Raises:
            IntegrityError: Something does not hold.
            MemdTimeout: memd lives but did not answer in time.
        """
        self._ring.check_integrity()
        held = int(np.count_nonzero(self._states != PageState.FREE))
        if self.is_alive and held != self._pages_used:
            raise IntegrityError(f"{held} pages are held, counted {self._pages_used}")
        open_rows = sum(
            pending.ticket.num_rows
            for pending in self._in_flight.values()
            if isinstance(pending.ticket, FetchTicket)
        )
        if open_rows > self._ring.num_allocated:
            raise IntegrityError(
                f"fetches of {open_rows} rows are in flight in {self._ring.num_allocated} ring rows"
            )
        if self.is_alive:
            self._check_memd(timeout_s)

    def close(self) -> None:
        """Say goodbye and unmap; idempotent. Arrays taken from ``pages`` must not be used after.

        With a ring on a device it waits for memd to unmap that, for ``deadline_s`` at most;
        ``is_ring_closed`` tells.
        """
        if self._is_closed:
            return
        if self.is_alive:
            self._has_said_goodbye = True
            self._request("goodbye", None, lambda i: Goodbye(request_id=i))
            self.drain(self._deadline_s if self._has_ring else _GOODBYE_WAIT_S)
            self._lose("closed", is_expected=True)
        self._is_closed = True
        self._channel.close()
        # The mapping goes with the last array that points into it.
        self.pages = np.empty((0, *self.pages.shape[1:]), dtype=np.uint8)
        self.landing = np.empty((0, self.layout.row_bytes), dtype=np.uint8)

    def _check_memd(self, timeout_s: float) -> None:
        if not self.drain(timeout_s):
            raise MemdTimeout(f"memd left requests unanswered for {timeout_s:g} s")
        self.stats()
        if not self.drain(timeout_s):
            raise MemdTimeout(f"memd did not answer Stats in {timeout_s:g} s")
        if not self.is_alive:
            return
        server = self._server_stats
        if server.get("integrity") != "ok":
            raise IntegrityError(f"memd: {server.get('integrity', 'says nothing of itself')}")
        clients = server.get("clients", [])
        mine = next((c for c in clients if c.get("client_id") == self.client_id), None)
        if mine is None:
            raise IntegrityError(f"memd knows no client {self.client_id}")
        for state in (PageState.FREE, PageState.RESERVED, PageState.SEALED, PageState.FROZEN):
            here = int(np.count_nonzero(self._states == state))
            there = mine.get(f"pages_{state.name.lower()}")
            if here != there:
                raise IntegrityError(f"{here} pages are {state.name} here, {there} in memd")

    def _may_hear_more(self) -> bool:
        """Whether a memd that has ended may have answered a goodbye that somebody waits for."""
        if not (self._has_said_goodbye and self._has_ring and self._in_flight):
            return False
        now = time.monotonic()
        self._ended_at = now if self._ended_at is None else self._ended_at
        return now - self._ended_at < _LAST_WORDS_S

    def _wait_until(self, is_true: Callable[[], bool], timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        self.poll()
        while not is_true():
            left = deadline - time.monotonic()
            if left <= 0 or not self.is_alive:
                return False
            self._channel.wait(min(left, 0.1))
            self.poll()
        return True

    def _request(
        self, kind: str, ticket: Ticket | None, make: Callable[[int], Request]
    ) -> int | None:
        request_id = self._next_request_id
        self._next_request_id += 1
        self._in_flight[request_id] = _Pending(kind, ticket, self._watched_s)
        if not self._channel.send(encode(make(request_id))):
            self._lose("the connection to memd broke")
            return None
        return request_id

    def _tell(self, kind: str, ids: npt.NDArray[np.int64], message: type[Commit | Release]) -> int:
        """Send page ids in as few messages as may be; how many."""
        parts = [
            ids[start : start + MAX_PAGES_PER_MESSAGE].tolist()
            for start in range(0, ids.size, MAX_PAGES_PER_MESSAGE)
        ]
        for part in parts:
            self._request(kind, None, partial(_pages_message, message, part))
        return len(parts)

    def _move(
        self,
        page_ids: npt.ArrayLike | Iterable[int],
        old: tuple[PageState, ...],
        new: PageState,
        verb: str,
    ) -> npt.NDArray[np.int64]:
        """Change the states of pages on this side, at once: memd follows in order."""
        ids = np.asarray(page_ids, dtype=np.int64).reshape(-1)
        if ids.size == 0:
            return ids
        if not self._are_pages(ids):
            raise ValueError(f"{verb}: page ids are 0..{self.num_pages - 1}, each once, got {ids}")
        # A comparison for each state: for a few pages, a search takes ten times as long.
        states = self._states[ids]
        is_wrong = states != old[0]
        for state in old[1:]:
            is_wrong &= states != state
        if is_wrong.any():
            page_id = int(ids[is_wrong][0])
            raise ValueError(
                f"{verb}: page {page_id} is {PageState(int(self._states[page_id])).name}"
            )
        self._states[ids] = new
        return ids

    def _are_pages(self, ids: npt.NDArray[np.int64]) -> bool:
        """Whether these, at least one, are ids of pages, each once."""
        in_order = np.sort(ids)
        return bool(
            in_order[0] >= 0
            and in_order[-1] < self.num_pages
            and not (in_order[1:] == in_order[:-1]).any()
        )

    def _on_frame(self, frame: bytes) -> None:
        try:
            reply = decode_reply(frame)
        except ProtocolError as error:
            self._lose(f"memd sent what is no reply: {error}")
            return
        pending_id = reply.request_id
        pending = self._in_flight.pop(pending_id, None) if pending_id is not None else None
        if pending is None or pending_id is None:
            self._lose(f"memd answered {type(reply).__name__} to no request of ours: {reply}")
            return
        if isinstance(reply, ErrorReply):
            self._on_error(pending, reply)
            return
        ticket = pending.ticket
        wrong = _what_is_wrong(pending, reply) or self._wrong_pages(ticket, reply)
        if wrong is not None:
            # Whatever the request was about is in doubt from now on.
            self._in_flight[pending_id] = pending
            self._lose(f"memd answered a {pending.kind} with {wrong}")
        elif isinstance(reply, ReserveReply):
            assert isinstance(ticket, ReserveTicket), "checked above"
            self._on_reserved(ticket, reply)
        elif isinstance(reply, FetchReply):
            assert isinstance(ticket, FetchTicket), "checked above"
            self._counters.fetches_landed += 1
            self._counters.rows_landed += ticket.num_rows
            self._counters.bytes_landed += ticket.num_rows * self.layout.row_bytes
            self._complete(ticket, None)
        elif isinstance(reply, ThawReply):
            assert isinstance(ticket, ThawTicket), "checked above"
            self._on_thawed(ticket, reply)
        elif isinstance(reply, GoodbyeReply):
            self.is_ring_closed |= reply.is_ring_closed
        elif isinstance(reply, StatsReply):
            self._stats_id = None
            self._server_stats = reply.stats

    def _on_error(self, pending: _Pending, reply: ErrorReply) -> None:
        self._counters.errors += 1
        message = f"{reply.code}: {reply.message}"
        if self._has_said_goodbye:
            # Fetches that it ended; memd's answer to the goodbye itself is still to come.
            if pending.ticket is not None:
                self._complete(pending.ticket, message)
            return
        _LOG.warning("memd refused a %s: %s", pending.kind, message)
        if pending.ticket is not None:
            self._complete(pending.ticket, message)
        if pending.kind == "stats":
            self._stats_id = None
        if reply.code is ErrorCode.DEVICE_LOST:
            self.device_lost_reason = reply.message
        if reply.code in _LOST_CODES or pending.kind in ("commit", "release", "freeze"):
            # The two sides no longer agree on who holds what.
            self._lose(f"memd refused a {pending.kind} ({message})")

    def _wrong_pages(self, ticket: Ticket | None, reply: Reply) -> str | None:
        """What cannot be about the pages of a ``ReserveReply``; None if nothing."""
        if not (isinstance(ticket, ReserveTicket) and isinstance(reply, ReserveReply)):
            return None
        page_ids = reply.page_ids
        if page_ids is None:
            return None
        is_possible = len(page_ids) == ticket.num_pages
        if is_possible and page_ids:
            try:
                ids = np.array(page_ids, dtype=np.int64)
            except OverflowError:
                is_possible = False
            else:
                # Free is zero, and the only state that is.
                is_possible = self._are_pages(ids) and not self._states[ids].any()
        return None if is_possible else f"pages that cannot be ({page_ids[:8]})"

    def _on_reserved(self, ticket: ReserveTicket, reply: ReserveReply) -> None:
        if reply.page_ids is None:
            self._counters.reserves_full += 1
        else:
            ticket.page_ids = np.array(reply.page_ids, dtype=np.int64)
            self._states[ticket.page_ids] = PageState.RESERVED
            self._pages_used += ticket.page_ids.size
        self._complete(ticket, None)
        if ticket.is_cancelled and ticket.page_ids is not None:
            self.release(ticket.page_ids)

    def _on_thawed(self, ticket: ThawTicket, reply: ThawReply) -> None:
        ticket.lost = np.array(reply.lost, dtype=np.int64)
        # But for those that were released meanwhile.
        is_held = self._states[ticket.page_ids] == PageState.FROZEN
        self._states[ticket.page_ids[is_held]] = PageState.SEALED
        self._complete(ticket, None)

    def _complete(self, ticket: Ticket, error: str | None) -> None:
        ticket.is_done, ticket.error = True, error
        if isinstance(ticket, FetchTicket):
            if error is not None:
                self._counters.fetches_failed += 1
            if ticket.is_finished:
                self._ring.free(ticket.landing_start)

    def _lose(self, reason: str, *, is_expected: bool = False) -> None:
        """Give memd up: every open ticket fails, and nothing is sent any more.

        The channel stays open until ``close``: a daemon that was only stopped must go on believing
        that this client lives, because the client may still be reading its landing rows.
        """
        if self._lost_reason is not None:
            return
        self._lost_reason = reason
        if not is_expected:
            _LOG.warning("memd (pid %d at %s) is lost: %s", self.memd_pid, self.address, reason)
        pending = list(self._in_flight.values())
        self._in_flight.clear()
        self._stats_id = None
        for entry in pending:
            if entry.ticket is not None:
                self._complete(entry.ticket, f"memd is lost: {reason}")


_REPLY_TO: dict[str, type[Reply]] = {
    "reserve": ReserveReply,
    "commit": CommitReply,
    "fetch": FetchReply,
    "release": ReleaseReply,
    "freeze": FreezeReply,
    "thaw": ThawReply,
    "stats": StatsReply,
    "goodbye": GoodbyeReply,
}


def _what_is_wrong(pending: _Pending, reply: Reply) -> str | None:
    """Why a reply is none to this request; None if it is one."""
    if type(reply) is not _REPLY_TO[pending.kind]:
        return type(reply).__name__
    ticket = pending.ticket
    if (
        isinstance(ticket, FetchTicket)
        and isinstance(reply, FetchReply)
        and reply.num_rows != ticket.num_rows
    ):
        return f"{reply.num_rows} rows instead of {ticket.num_rows}"
    if (
        isinstance(ticket, ThawTicket)
        and isinstance(reply, ThawReply)
        and not set(reply.lost) <= set(ticket.page_ids.tolist())
    ):
        return f"lost pages that it was not asked for ({reply.lost[:8]})"
    return None


def _pages_message(
    message: type[Commit | Release], page_ids: list[int], request_id: int
) -> Request:
    return message(request_id=request_id, page_ids=page_ids)


def _freeze(page_ids: list[int], depths: list[int], request_id: int) -> Request:
    return Freeze(request_id=request_id, page_ids=page_ids, depths=depths)


def _failed(ticket: _SomeTicket, reason: str | None) -> _SomeTicket:
    ticket.is_done, ticket.error = True, reason
    return ticket
