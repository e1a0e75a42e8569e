"""Messages to actions: every request of every client, without a socket in sight.

The server hands in frames and gets exactly one reply frame for each: at once, or from a later
`step` for a request that waits (`memd.turns`). A fetch waits while others are copied
(`memd.fetches`), a ``Hello`` while memory is zeroed for it or a ring mapped (`memd.greeting`), a
``Goodbye`` while one is unmapped, and with pages on disk whatever needs them in memory
(`memd.page_requests`). Sessions tie a ZeroMQ connection to a process (`memd.sessions`): the server
opens one when a process attaches and closes it when that process is gone, and a ``Hello`` must name
an open session. So from the first byte of a client's memory on, somebody watches it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, ClassVar

from memd.answers import Answers, Waiting
from memd.errors import IntegrityError
from memd.fetches import Fetches
from memd.greeting import Greeter
from memd.lifecycle import DaemonState
from memd.metrics import Metrics
from memd.page_requests import PageRequests, Steps
from memd.protocol import (
    PROTOCOL_VERSION,
    REQUEST_TYPES,
    Commit,
    ErrorCode,
    Fetch,
    Freeze,
    Goodbye,
    GoodbyeReply,
    Hello,
    Ping,
    Pong,
    Release,
    Reply,
    Request,
    Reserve,
    Stats,
    StatsReply,
    Thaw,
    decode_request,
    encode,
)
from memd.refusals import Refused
from memd.rings import RingPhase
from memd.scrubbing import Scrubber
from memd.sessions import Sessions
from memd.store import PageState
from memd.tiers import tier_stats
from memd.turns import Wait, WaitingRoom

if TYPE_CHECKING:
    from memd.copying import Delay
    from memd.rings import ClientRing, Rings
    from memd.sessions import Client, Session
    from memd.store import ClientRecord, Store
    from memd.tiers import ClientTier, Tiers
    from memd.transfer import Transfer

__all__ = ["MAX_FETCHES_IN_FLIGHT", "Service"]

_LOG = logging.getLogger(__name__)

_TIER_CHECK_S = 10.0
MAX_FETCHES_IN_FLIGHT = 4096
"""Of one client; bounds what an asker that never waits can make memd remember."""

_Handler = Callable[["Service", bytes, Any], "Reply | Steps | None"]
_PageHandler = Callable[[PageRequests, bytes, "Client", Any], "Reply | Steps | None"]


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
        self._sessions = Sessions(clock)
        self._answers = Answers(self.metrics)
        self._scrubber = Scrubber(store, transfer, tiers, self.metrics)
        self._room: WaitingRoom[Reply | None] = WaitingRoom()
        self._has_news = False
        self._fetches = Fetches(
            transfer, delay=delay, clock=clock, rings=rings, on_room=self._room.wake
        )
        self._greeter = Greeter(
            store,
            self._scrubber,
            tiers=tiers,
            rings=rings,
            max_client_bytes=max_client_bytes,
            max_frame_bytes=max_frame_bytes,
        )
        self._page_requests = PageRequests(
            self._fetches,
            self._answers,
            require_few=self._require_few_in_flight,
            note_news=self.note_news,
        )
        # Clients that are gone and whose memory a page on its way to or from disk still needs.
        self._leaving: list[tuple[ClientRecord, ClientTier]] = []
        self._started_at = clock()
        self._check_tiers_at = self._started_at

    def open_session(self, pid: int) -> bytes:
        """A new session for a process that attached; the token is what its ``Hello`` must carry."""
        return self._sessions.open(pid)

    def has_said_hello(self, token: bytes) -> bool:
        """Whether the session's client has registered, now or earlier."""
        session = self._sessions.find(token)
        return session is not None and session.connection is not None

    def close_session(self, token: bytes, reason: str) -> None:
        """End a session whose process is gone; reclaims what it still holds."""
        session = self._sessions.close(token)
        if session.client is not None:
            self.metrics.counters.clients_reclaimed += 1
            pages = session.client.record.pages
            _LOG.warning(
                "client %d (pid %d) is gone (%s); reclaimed its %d pages in use",
                session.client.record.client_id,
                session.pid,
                reason,
                pages.num_pages - pages.count(PageState.FREE),
                extra=session.client.log_fields,
            )
            self._end_registration(session, session.client)
        elif session.is_greeting and session.connection is not None:
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
                answer = self._wait(Waiting(answer, connection, request, begin_ns))
            if answer is None:
                return None
            self._answers.answered(request, begin_ns)
            reply: Reply = answer
        except Exception as error:
            reply = self._answers.refuse(request_id, error)
        return encode(reply)

    def note_news(self) -> None:
        """Say that something has happened which a request may wait for; any thread may."""
        self._has_news = True

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do now."""
        return (
            self._answers.has_any or self._fetches.has_work or self._has_news or self._room.has_work
        )

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
            self._answers.put_fetch(ended)
        turn = self._room.step()
        if turn is not None:
            self._answers.put_turn(turn)
        return self._answers.take()

    def stop_rings(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        """Write to no device any more, and unmap all rings, for memd's end; blocks within a bound.

        Clients are not told, but for those that wait for their ring to be closed.

        Returns:
            Their replies, as `step` gives them.
        """
        if self._rings is None:
            return []
        for _, client in self._sessions.registered():
            if client.ring is not None:
                # Nothing is to be gathered into a slot that has been given back.
                self._fetches.cancel(client.record.client_id)
        if not self._rings.stop(timeout_s):
            _LOG.warning("a device did not let go of its rings in %g s", timeout_s)
        self._room.wake()
        for _ in range(self._room.num_connections):
            turn = self._room.step()
            if turn is not None:
                self._answers.put_turn(turn)
        return self._answers.take()

    def _follow_rings(self) -> None:
        """See what devices have done."""
        if self._rings is None:
            return
        for event in self._rings.poll():
            for ended in self._fetches.follow(event):
                self._answers.put_fetch(ended)

    def _begin(self, connection: bytes, request: Request) -> Reply | Steps | None:
        """What a request is answered with, now or in some steps."""
        if self._sessions.is_greeting(connection) and not isinstance(request, Ping | Stats):
            return self._after_hello(connection, request)
        return self._do(connection, request)

    def _do(self, connection: bytes, request: Request) -> Reply | Steps | None:
        of_pages = self._PAGE_HANDLERS.get(type(request))
        if of_pages is not None:
            client = self._sessions.client(connection)
            return of_pages(self._page_requests, connection, client, request)
        return self._HANDLERS[type(request)](self, connection, request)

    def _after_hello(self, connection: bytes, request: Request) -> Steps:
        """A request behind a ``Hello`` that waits; its turn comes once that is answered."""
        answer = self._do(connection, request)
        if isinstance(answer, Generator):
            answer = yield from answer
        return answer

    def _wait(self, turn: Waiting) -> Reply | None:
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

    def _require_few_in_flight(self, connection: bytes, client_id: int) -> None:
        in_flight = self._fetches.num_of(client_id) + self._room.num_waiting(connection)
        if in_flight >= MAX_FETCHES_IN_FLIGHT:
            raise _too_many()

    def tidy(self, max_bytes: int) -> bool:
        """Do a bit of what nobody waits for: zero memory, make room; True when more is left."""
        more = self.scrub(max_bytes)
        if self._tiers is None:
            return more
        for _, client in self._sessions.registered():
            if client.tier is not None:
                more |= client.tier.tidy()
        return more

    def scrub(self, max_bytes: int) -> bool:
        """Zero up to ``max_bytes`` of returned memory; True when more is left."""
        return self._scrubber.scrub(max_bytes)

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
        extents, now = self._store.extents, self._clock()
        return {
            "daemon": {
                "pid": os.getpid(),
                "version": PROTOCOL_VERSION,
                "state": self.state,
                "uptime_s": round(now - self._started_at, 3),
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
                self._describe(client, now - session.heard_at)
                for session, client in self._sessions.registered()
            ],
            **({} if self._tiers is None else {"disk": self._tiers.stats()}),
            **({} if self._rings is None else {"cuda": self._rings.stats()}),
            **self.metrics.snapshot(),
            "integrity": integrity,
        }

    def _describe(self, client: Client, silent_s: float) -> dict[str, Any]:
        """A client in the stats."""
        record = client.record
        pages = record.pages
        return {
            "client_id": record.client_id,
            "pid": record.pid,
            "name": record.name,
            "pages": pages.num_pages,
            **{f"pages_{state.name.lower()}": pages.count(state) for state in PageState},
            "page_bytes": record.layout.page_bytes,
            "extent_bytes": record.extent_bytes,
            "memory_bytes": record.memory_bytes,
            **tier_stats(client.tier, pages.num_pages),
            "landing_rows": client.landing_rows,
            "data_path": client.data_path,
            "pending_bytes": self._fetches.pending_bytes(record.client_id),
            "silent_s": round(silent_s, 3),
        }

    def _check_tiers(self) -> None:
        """Verify the books of the tiers, now and then: it takes a microsecond for each page."""
        now = self._clock()
        if self._tiers is None or now < self._check_tiers_at:
            return
        self._tiers.check_integrity()
        for _, client in self._sessions.registered():
            if client.tier is not None:
                client.tier.pages.check_integrity()
        # Later only if it held: what does not is said every time.
        self._check_tiers_at = now + _TIER_CHECK_S

    def _end_registration(self, session: Session, client: Client) -> None:
        record, tier, connection = client.record, client.tier, session.connection
        assert connection is not None, "a registration has a connection"
        if tier is not None:
            tier.mover.end()
        # Before its memory can be anybody else's, and its slots. These first: they came first.
        for fetch in self._fetches.cancel(record.client_id):
            self._answers.put_gone(connection, fetch.request_id)
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
        self._sessions.leave(connection)
        for turn in self._room.cancel(connection):
            assert isinstance(turn, Waiting), "nobody else waits"
            self._answers.put_gone(connection, turn.request.request_id)

    def _end_leaving(self) -> None:
        """Take back the memory of clients that are gone, once no page of it is on its way."""
        for record, tier in list(self._leaving):
            if tier.close():
                self._leaving.remove((record, tier))
                self._store.unregister(record.client_id)

    def _hello(self, connection: bytes, request: Hello) -> Steps:
        session = self._session_for(connection, request)
        self._sessions.greet(session, connection)
        try:
            client = yield from self._greeter.greet(session, request)
        except Exception:
            # It may say Hello again. (When its process ends meanwhile, nobody will.)
            self._sessions.dismiss(session)
            raise
        self._sessions.welcome(session, client)
        self.metrics.counters.clients_registered += 1
        return self._greeter.reply(request, client)

    def _session_for(self, connection: bytes, request: Hello) -> Session:
        """The session that a ``Hello`` may open."""
        if request.version != PROTOCOL_VERSION:
            raise Refused(
                ErrorCode.VERSION,
                f"memd speaks protocol version {PROTOCOL_VERSION}, the client {request.version}; "
                f"run the same release on both sides",
            )
        if self.state is DaemonState.DRAINING:
            raise Refused(ErrorCode.DRAINING, "memd is ending and takes no new clients")
        session = self._sessions.find(request.session)
        if session is None:
            raise Refused(ErrorCode.UNKNOWN_SESSION, "no attached process holds this session")
        if session.connection is not None or self._sessions.at(connection) is not None:
            raise Refused(ErrorCode.ALREADY_REGISTERED, "one Hello for each attached process")
        return session

    def _stats(self, connection: bytes, request: Stats) -> Reply:
        del connection
        return StatsReply(request_id=request.request_id, stats=self.stats())

    def _ping(self, connection: bytes, request: Ping) -> Reply:
        del connection
        return Pong(request_id=request.request_id)

    def _goodbye(self, connection: bytes, request: Goodbye) -> Reply | Steps:
        client = self._sessions.client(connection)
        session = self._sessions.at(connection)
        assert session is not None, "a client has a session"
        self._end_registration(session, client)
        _LOG.info(
            "client %d (pid %d) said goodbye",
            client.record.client_id,
            client.record.pid,
            extra=client.log_fields,
        )
        if client.ring is not None:
            return self._wait_for_close(client.ring, request)
        return GoodbyeReply(request_id=request.request_id)

    def _wait_for_close(self, ring: ClientRing, request: Goodbye) -> Steps:
        """Answer a ``Goodbye`` once the ring is its owner's again, or its device is lost."""
        while not ring.is_over:
            yield Wait.EVENT
        return GoodbyeReply(
            request_id=request.request_id, is_ring_closed=ring.phase is RingPhase.CLOSED
        )

    _HANDLERS: ClassVar[dict[type[Request], _Handler]] = {
        Hello: _hello,
        Stats: _stats,
        Ping: _ping,
        Goodbye: _goodbye,
    }
    _PAGE_HANDLERS: ClassVar[dict[type[Request], _PageHandler]] = {
        Reserve: PageRequests.reserve,
        Commit: PageRequests.commit,
        Fetch: PageRequests.fetch,
        Release: PageRequests.release,
        Freeze: PageRequests.freeze,
        Thaw: PageRequests.thaw,
    }

    if {*_HANDLERS, *_PAGE_HANDLERS} != set(REQUEST_TYPES):
        raise ImportError("every request type needs exactly one handler")


def _too_many() -> Refused:
    return Refused(
        ErrorCode.TOO_MANY,
        f"a client may have {MAX_FETCHES_IN_FLIGHT} requests in flight; wait for replies",
    )
